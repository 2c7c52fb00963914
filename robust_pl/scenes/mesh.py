"""A triangle mesh with everything that a renderer needs, as plain tensors."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

CREASE = 40.0
"""Degrees between two faces from which on their common edge is seen as an edge, where a file gives no normals."""


class Mesh:
    """Triangles with colours, normals and textures at their corners; z is up.

    Colours multiply the texture. All that varies over a face is held by corner, so that a vertex may have several normals
    and texture coordinates. Nothing is changed in place: what moves a mesh returns another.

    Args:
        vertices: positions (V, 3).
        faces: three vertices a face, counter-clockwise as seen from outside, integers (F, 3).
        colors: RGB in [0, 1] by vertex (V, 3), by face (F, 1, 3) or by corner (F, 3, 3); white by default.
        normals: by vertex (V, 3) or by corner (F, 3, 3); by default, and where they are 0, smooth between faces that differ by
            less than 40 degrees.
        uv: texture coordinates by vertex (V, 2) or by corner (F, 3, 2), (0, 0) at the lower left of the picture.
        textures: pictures (H, W, 3) in [0, 1], first row at the top, repeated over the plane.
        texture_of_face: number of the texture of each face, (F,); -1 for none. By default all have the first one, if any.

    Raises:
        ValueError: if shapes disagree, a value is not finite, or an index points outside.
    """

    def __init__(
        self,
        vertices: Tensor,
        faces: Tensor,
        *,
        colors: Tensor | None = None,
        normals: Tensor | None = None,
        uv: Tensor | None = None,
        textures: Sequence[Tensor] = (),
        texture_of_face: Tensor | None = None,
    ) -> None:
        self.vertices, self.faces = vertices.detach().float(), faces.detach().long()
        _check_triangles(self.vertices, self.faces)
        self.colors = self._corners("colors", colors, 3, 1.0).clamp(0.0, 1.0)
        self.uv = self._corners("uv", uv, 2, 0.0)
        self.textures = tuple(picture.detach().float().clamp(0.0, 1.0) for picture in textures)
        count = len(self.faces)
        if texture_of_face is None:
            texture_of_face = torch.full((count,), 0 if self.textures else -1, device=self.faces.device)
        self.texture_of_face = texture_of_face.detach().long()
        for number, picture in enumerate(self.textures):
            if picture.dim() != 3 or picture.shape[2] != 3 or not picture.numel():
                raise ValueError(f"textures[{number}] has the shape {tuple(picture.shape)}: give pictures (H, W, 3)")
        if self.texture_of_face.shape != (count,) or not _within(self.texture_of_face, -1, len(self.textures)):
            raise ValueError(f"texture_of_face must be {count} numbers from -1 to {len(self.textures) - 1}")
        if normals is None:
            self.normals = smooth_normals(self.vertices, self.faces)
        else:
            self.normals = F.normalize(self._corners("normals", normals, 3, 0.0), dim=-1)
            missing = self.normals.norm(dim=-1) < 0.5
            if missing.any():
                self.normals[missing] = smooth_normals(self.vertices, self.faces)[missing]

    def __repr__(self) -> str:
        sizes = f"{len(self.vertices):,} vertices, {len(self.faces):,} faces, {len(self.textures)} textures"
        return f"{type(self).__name__}({sizes}, radius {self.radius:.3g})"

    @property
    def radius(self) -> float:
        """Distance of the farthest vertex from the origin."""
        return float(self.vertices.norm(dim=1).max())

    def fitted(self, radius: float = 1.0) -> Mesh:
        """The mesh with the middle of its bounding box at the origin and its farthest vertex at that distance.

        Raises:
            ValueError: if all vertices lie in one point.
        """
        if radius <= 0:
            raise ValueError(f"radius={radius} must lie above 0")
        centred = self.vertices - (self.vertices.amax(0) + self.vertices.amin(0)) / 2
        reach = centred.norm(dim=1).max()
        if reach == 0:
            raise ValueError("all vertices of the mesh lie in one point: there is nothing to scale")
        return self._with(centred * (radius / reach), self.normals)

    def turned(self, rotation: Tensor) -> Mesh:
        """The mesh turned by a rotation matrix (3, 3)."""
        rotation = rotation.to(self.vertices)
        return self._with(self.vertices @ rotation.T, self.normals @ rotation.T)

    def y_up_to_z_up(self) -> Mesh:
        """The mesh of a file whose y points up, set upright: its y becomes z, its front, +z, looks along -y."""
        return self.turned(torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, -1.0], [0.0, 1.0, 0.0]]))

    @cached_property
    def closed(self) -> bool:
        """Whether every part is a closed surface whose faces all look outwards: then no face is ever seen from behind.

        Every edge is run through as often in one direction as in the other; a part that encloses a negative volume looks
        inwards. Vertices at the same place count as one.
        """
        from scipy.sparse import coo_matrix
        from scipy.sparse.csgraph import connected_components

        places, same = np.unique(self.vertices.cpu().numpy(), axis=0, return_inverse=True)
        faces = same.reshape(-1)[self.faces.cpu().numpy()]
        faces = faces[(faces != np.roll(faces, 1, axis=1)).all(1)]  # without those that lost their area
        count = len(places)
        edges = np.concatenate([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]]).astype(np.int64)
        there, back = np.sort(edges @ [count, 1]), np.sort(edges @ [1, count])
        if not len(faces) or not np.array_equal(there, back):
            return False
        graph = coo_matrix((np.ones(len(edges), dtype=np.int8), (edges[:, 0], edges[:, 1])), shape=(count, count))
        part = connected_components(graph, directed=False)[1][faces[:, 0]]
        a, b, c = (places[faces[:, corner]].astype(np.float64) for corner in range(3))
        volume = np.bincount(part, (a * np.cross(b, c)).sum(1))
        return bool((volume[np.unique(part)] > 0).all())

    def fingerprint(self) -> str:
        """Sum of all that the mesh holds, 32 hexadecimal digits."""
        digest = hashlib.blake2b(digest_size=16)
        tensors = (self.vertices, self.faces, self.colors, self.normals, self.uv, self.texture_of_face, *self.textures)
        for tensor in tensors:
            digest.update(repr(tuple(tensor.shape)).encode())
            digest.update(tensor.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    @staticmethod
    def joined(meshes: Sequence[Mesh]) -> Mesh:
        """One mesh of several, each with its textures."""
        if not meshes:
            raise ValueError("there is no mesh to join")
        vertices = np.cumsum([0, *(len(mesh.vertices) for mesh in meshes)])
        textures = np.cumsum([0, *(len(mesh.textures) for mesh in meshes)])
        of_face = [
            torch.where(mesh.texture_of_face < 0, -1, mesh.texture_of_face + int(first))
            for mesh, first in zip(meshes, textures, strict=False)
        ]
        return Mesh(
            torch.cat([mesh.vertices for mesh in meshes]),
            torch.cat([mesh.faces + int(first) for mesh, first in zip(meshes, vertices, strict=False)]),
            colors=torch.cat([mesh.colors for mesh in meshes]),
            normals=torch.cat([mesh.normals for mesh in meshes]),
            uv=torch.cat([mesh.uv for mesh in meshes]),
            textures=[picture for mesh in meshes for picture in mesh.textures],
            texture_of_face=torch.cat(of_face),
        )

    def _with(self, vertices: Tensor, normals: Tensor) -> Mesh:
        return Mesh(
            vertices,
            self.faces,
            colors=self.colors,
            normals=normals,
            uv=self.uv,
            textures=self.textures,
            texture_of_face=self.texture_of_face,
        )

    def _corners(self, name: str, given: Tensor | None, channels: int, fill: float) -> Tensor:
        """By corner (F, 3, channels), of what may be given by vertex."""
        count = len(self.faces)
        if given is None:
            return torch.full((count, 3, channels), fill, device=self.vertices.device)
        given = given.detach().float()
        if not given.isfinite().all():
            raise ValueError(f"{name} of the mesh are not finite everywhere: repair the file")
        if given.shape == (len(self.vertices), channels):
            return given[self.faces]
        if given.shape in ((count, 3, channels), (count, 1, channels)):
            return given.expand(count, 3, channels).contiguous()
        raise ValueError(
            f"{name} of the mesh have the shape {tuple(given.shape)}: give ({len(self.vertices)}, {channels}) by vertex or"
            f" ({count}, 3, {channels}) by corner"
        )


def smooth_normals(vertices: Tensor, faces: Tensor, crease: float = CREASE) -> Tensor:
    """Normals by corner (F, 3, 3): of the faces around it, by their area, that turn away from its own by less than ``crease``.

    A box keeps its edges and a sphere becomes round. Vertices at the same place count as one.
    """
    corners = vertices.double()[faces]
    area = torch.linalg.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    unit = F.normalize(area, dim=-1)
    place = torch.unique(vertices, dim=0, return_inverse=True)[1][faces].flatten()
    place, order = place.sort(stable=True)
    # Every pair of corners that meet in a place: a run of n corners makes n * n pairs.
    size = torch.bincount(place)
    first = size.cumsum(0) - size
    partners = size[place]
    mine = torch.repeat_interleave(partners)
    step = torch.arange(len(mine), device=mine.device) - (partners.cumsum(0) - partners)[mine]
    theirs = order[first[place[mine]] + step]
    mine = order[mine]
    flat = (unit[mine // 3] * unit[theirs // 3]).sum(1) >= np.cos(np.radians(crease))
    total = torch.zeros(faces.numel(), 3, dtype=area.dtype, device=area.device)
    total.index_add_(0, mine[flat], area[theirs[flat] // 3])
    return F.normalize(total, dim=-1).float().view(-1, 3, 3)


def _check_triangles(vertices: Tensor, faces: Tensor) -> None:
    if vertices.dim() != 2 or vertices.shape[1] != 3:
        raise ValueError(f"vertices of the mesh have the shape {tuple(vertices.shape)}: give (V, 3)")
    if faces.dim() != 2 or faces.shape[1] != 3:
        raise ValueError(f"faces of the mesh have the shape {tuple(faces.shape)}: give triangles (F, 3)")
    if not len(faces):
        raise ValueError("the mesh has no faces: a cloud of points must be meshed first")
    if not vertices.isfinite().all():
        raise ValueError("vertices of the mesh are not finite everywhere: repair the file")
    if not _within(faces, 0, len(vertices)):
        raise ValueError(f"faces of the mesh name vertices outside of 0 to {len(vertices) - 1}: repair the file")


def _within(index: Tensor, low: int, end: int) -> bool:
    return not index.numel() or bool(((index >= low) & (index < end)).all())
