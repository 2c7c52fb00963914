"""A z-buffer rasteriser for triangle meshes in plain torch, batched over poses."""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .fragments import Faces, at_once, face_of
from .mesh import Mesh
from .renderer import Views, focal_length


class MeshRasterizer:
    """Renders a :class:`Mesh`: every pixel shows the nearest face at its centre, lit by ambient and directional light.

    How a face is turned into pixels is told in :mod:`robust_pl.scenes.fragments`. The front of a closed mesh hides its back, so
    that only faces turned to the camera are drawn; others are drawn from both sides.

    Light: colour * (ambient + directional * max(0, n . l)). Faces are two-sided, their normal is that of the side seen, because
    the winding in files from the wild cannot be relied on. Colours are taken as written (no conversion from or to linear
    light), textures are bilinear and without mip maps: far views of fine textures ask for supersampling.

    Poses are rigid (no scale). Rendering is in float32 and not differentiable. No loop runs over pixels, faces or poses, only
    over chunks of about 260,000 faces, pixels or fragments (8 million on a GPU), and what a pose gives does not depend on the
    others. On a GPU each chunk waits a few times for the number of faces and fragments.

    Args:
        mesh: what is seen.
        image_size: height and width in pixels.
        fov_x: horizontal field of view in degrees; 39.6 is that of the NeRF synthetic scenes.
        supersampling: s renders s * s samples a pixel and takes their mean, which softens edges and alpha; costs about s * s.
        ambient: light from everywhere.
        directional: light from one side.
        light: where that comes from, a direction (x, y, z) in the world.

    Raises:
        ValueError: if an argument lies outside its range.
    """

    differentiable = False

    def __init__(
        self,
        mesh: Mesh,
        image_size: tuple[int, int] = (224, 224),
        fov_x: float = 39.6,
        *,
        supersampling: int = 1,
        ambient: float = 0.5,
        directional: float = 0.5,
        light: tuple[float, float, float] = (0.4, -0.5, 0.8),
    ) -> None:
        height, width = image_size
        if height < 1 or width < 1:
            raise ValueError(f"image_size={tuple(image_size)} must be at least 1 pixel high and wide")
        if supersampling < 1:
            raise ValueError(f"supersampling={supersampling} must be at least 1")
        if ambient < 0 or directional < 0:
            raise ValueError(f"ambient={ambient} and directional={directional} must not lie below 0")
        if not any(light):
            raise ValueError("light=(0, 0, 0) is no direction")
        self.mesh, self.image_size, self.fov_x = mesh, (height, width), float(fov_x)
        self.supersampling, self.ambient, self.directional, self.light = supersampling, ambient, directional, light
        self.focal = supersampling * focal_length(fov_x, width)
        self._scene = _Scene.of(mesh)

    @property
    def radius(self) -> float:
        """Of a sphere around the origin that holds the mesh."""
        return self._scene.radius

    def fingerprint(self) -> str:
        """Sum of the mesh and of all arguments, 32 hexadecimal digits."""
        what = (
            "MeshRasterizer 1",
            self.mesh.fingerprint(),
            *self.image_size,
            self.fov_x,
            self.supersampling,
            float(self.ambient),
            float(self.directional),
            *map(float, self.light),
        )
        return hashlib.blake2b(repr(what).encode(), digest_size=16).hexdigest()

    @torch.no_grad()
    def render(self, pose: Tensor) -> Views:
        """Images from poses camera-to-world (N, 4, 4), on their device.

        Raises:
            ValueError: if the poses have another shape.
        """
        if pose.dim() != 3 or pose.shape[1:] != (4, 4):
            raise ValueError(f"pose has the shape {tuple(pose.shape)}: give (N, 4, 4)")
        pose = pose.float()
        if self._scene.vertices.device != pose.device:
            self._scene = self._scene.to(pose.device)
        height, width = self.image_size
        samples = height * width * self.supersampling**2
        poses = max(1, at_once(pose.device) // max(samples, self._scene.faces.shape[1]))
        parts = [self._render(chunk) for chunk in pose.split(poses)]
        return Views(torch.cat([part.rgb for part in parts]), torch.cat([part.alpha for part in parts]))

    def _render(self, pose: Tensor) -> Views:
        height, width = (self.supersampling * side for side in self.image_size)
        faces = self._scene.seen(pose, self.focal)
        nearest = faces.nearest(len(pose), height, width)
        sample = nearest.nonzero().squeeze(1)
        color = self._shade(faces, face_of(nearest.index_select(0, sample)), sample, width, height)
        rgb = torch.zeros(3, len(nearest), device=pose.device).index_copy_(1, sample, color)
        alpha = (nearest > 0).float()
        rgb = self._mean(rgb.view(3, len(pose), height, width)).transpose(0, 1).contiguous()
        return Views(rgb, self._mean(alpha.view(len(pose), 1, height, width)))

    def _mean(self, samples: Tensor) -> Tensor:
        """Mean over the samples of a pixel, added in a fixed order."""
        s = self.supersampling
        if s == 1:
            return samples
        total = sum(samples[..., down::s, across::s] for down in range(s) for across in range(s))
        return total / (s * s)

    def _shade(self, faces: Faces, which: Tensor, sample: Tensor, width: int, height: int) -> Tensor:
        """Colours (3, S) of samples, counted over all images, each of which sees a face."""
        face, side, view = (values.index_select(0, which) for values in (faces.face, faces.side, faces.view))
        line = torch.div(sample, width, rounding_mode="floor")
        x, y = (sample - line * width) - (width - 1) / 2, (line - view * height) - (height - 1) / 2
        weights = faces.weights(which, x, y)
        first, second, third = self._scene.corners.index_select(1, face).chunk(3)
        value = first * weights[0] + second * weights[1] + third * weights[2]
        color, normal, uv = value[:3], value[3:6], value[6:]
        light = F.normalize(torch.tensor(self.light, dtype=torch.float64), dim=0).tolist()
        length = (normal[0] * normal[0] + normal[1] * normal[1] + normal[2] * normal[2]).sqrt()
        towards = normal[0] * light[0] + normal[1] * light[1] + normal[2] * light[2]
        cosine = (towards * side / length.clamp(min=1e-12)).clamp(min=0.0)
        if len(uv):
            color = color * self._scene.texel(uv, self._scene.texture_of_face.index_select(0, face))
        return (color * (self.ambient + self.directional * cosine)).clamp(0.0, 1.0)


class _Scene(NamedTuple):
    """The mesh, laid out for rendering."""

    vertices: Tensor  # (3, V)
    faces: Tensor  # (3, F)
    planes: Tensor  # (4, F), unit normal and distance: where a camera is positive it sees the front
    corners: Tensor  # (3 * channels, F), colour, normal and, with textures, uv of the first, second and third corner
    texels: Tensor  # (3, T) of all textures, one behind the other
    layout: Tensor  # (textures, 3), first texel, height and width
    texture_of_face: Tensor  # (F,)
    radius: float
    closed: bool

    @staticmethod
    def of(mesh: Mesh) -> _Scene:
        a, b, c = mesh.vertices.double()[mesh.faces].unbind(1)
        normal = F.normalize(torch.linalg.cross(b - a, c - a), dim=-1)
        planes = torch.cat([normal, -(normal * a).sum(1, keepdim=True)], 1)
        # There are files whose normals look to the other side than their winding says.
        agrees = torch.where((mesh.normals.double() * normal.unsqueeze(1)).sum((1, 2)) < 0, -1.0, 1.0)
        values = [mesh.colors, mesh.normals * agrees.view(-1, 1, 1)]
        white = torch.ones(1, 1, 3, device=mesh.vertices.device)
        if mesh.textures:
            values.append(mesh.uv)
        pictures = [white, *mesh.textures]
        sizes = torch.tensor([picture.shape[:2] for picture in pictures], device=mesh.vertices.device)
        area = sizes.prod(1)
        corners = torch.cat(values, 2)
        return _Scene(
            mesh.vertices.T.contiguous(),
            mesh.faces.T.contiguous(),
            planes.float().T.contiguous(),
            corners.reshape(len(corners), -1).float().T.contiguous(),
            torch.cat([picture.reshape(-1, 3) for picture in pictures]).T.contiguous(),
            torch.cat([(area.cumsum(0) - area).unsqueeze(1), sizes], 1),
            mesh.texture_of_face + 1,
            mesh.radius,
            mesh.closed,
        )

    def to(self, device: torch.device) -> _Scene:
        return _Scene(*(value.to(device) if isinstance(value, Tensor) else value for value in self))

    def seen(self, pose: Tensor, focal: float) -> Faces:
        """The faces that may be seen from poses (N, 4, 4); their camera space has x right and y down in pixels, z forwards."""
        eye = pose[:, :3, 3]
        nx, ny, nz, distance = self.planes
        side = nx * eye[:, :1] + ny * eye[:, 1:2] + nz * eye[:, 2:] + distance
        shown = side != 0
        if self.closed:  # from outside the back of a closed surface is always hidden
            outside = eye.norm(dim=1, keepdim=True) > self.radius
            shown &= (side > 0) | ~outside
        view, face = shown.nonzero(as_tuple=True)
        # No matrix product: its rounding could depend on the number of poses.
        x, y, z = (self.vertices[k] - eye[:, k : k + 1] for k in range(3))
        right, up, back = (pose[:, :3, k].unsqueeze(2) for k in range(3))
        across, above, behind = (x * axis[:, 0] + y * axis[:, 1] + z * axis[:, 2] for axis in (right, up, back))
        points = torch.stack([focal * across, -focal * above, -behind]).flatten(1)
        index = self.faces.index_select(1, face) + view * self.vertices.shape[1]
        corners = points.index_select(1, index.flatten()).view(3, 3, -1)
        return Faces.of(corners, view, face)

    def texel(self, uv: Tensor, texture: Tensor) -> Tensor:
        """Colours (3, S) at uv (2, S) of textures (S,), bilinear between the four nearest texels."""
        first, height, width = self.layout.index_select(0, texture).unbind(1)
        x, y = uv[0] * width - 0.5, (1 - uv[1]) * height - 0.5
        left, top = x.floor(), y.floor()
        right_share, low_share = x - left, y - top
        columns = [torch.remainder(left.long() + step, width) for step in range(2)]
        rows = [first + torch.remainder(top.long() + step, height) * width for step in range(2)]
        (a, b), (c, d) = ([self.texels.index_select(1, row + column) for column in columns] for row in rows)
        above, below = (near + (far - near) * right_share for near, far in ((a, b), (c, d)))
        return above + (below - above) * low_share
