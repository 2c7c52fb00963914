"""Meshes from files: OBJ with its materials, PLY and glTF, read through trimesh."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from urllib.parse import unquote

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .mesh import Mesh

if TYPE_CHECKING:
    import trimesh

UP: dict[str, Literal["y", "z"]] = {".obj": "y", ".gltf": "y", ".glb": "y", ".ply": "z"}
"""Formats, and which axis points up where a file does not say: glTF rules y, and most OBJ files follow it."""


def load_mesh(path: str | Path, *, up: Literal["y", "z"] | None = None, radius: float | None = 1.0) -> Mesh:
    """The triangles of an OBJ, PLY, GLB or glTF file with colours, normals and textures, as one mesh.

    Larger polygons are cut into triangles, and all parts of a file are joined, each with its texture. Colours come from the
    vertices, the faces or the material: ``Kd`` where an OBJ's material has no ``map_Kd``, the base colour of glTF times its
    texture. glTF's factors and vertex colours are linear light and get the exponent 1 / 2.2, so that they go with pictures.
    Transparency, other maps and other lights are left out.

    Args:
        path: the file; materials and pictures lie beside it.
        up: which axis of the file points up; by default y for OBJ and glTF, z for PLY. The mesh has z up.
        radius: size of the mesh, see :meth:`Mesh.fitted`; None leaves place and size as they are.

    Raises:
        FileNotFoundError: if the file, or a material or picture that it names, does not exist.
        ValueError: if it is no mesh, has no faces, or holds values that are not finite.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: give the path of a mesh")
    if path.suffix.lower() not in UP:
        raise ValueError(f"{path} is no mesh that can be read: give one of {', '.join(UP)}")
    if up not in (None, "y", "z"):
        raise ValueError(f"up={up!r} is no axis that may point up: choose y or z")
    import trimesh  # with networkx a third of a second, which not every start of the command line should take

    kind = path.suffix.lower()
    named = _named_pictures(path)
    try:
        scene = trimesh.load_scene(path, process=False)
    except Exception as error:  # trimesh lets through whatever its parsers run into
        raise ValueError(f"{path} cannot be read as {kind[1:]}: {type(error).__name__} {error}") from error
    try:
        mesh = _joined(_surfaces(scene), named, linear=kind in (".gltf", ".glb"))
        if (up or UP[kind]) == "y":
            mesh = mesh.y_up_to_z_up()
        return mesh if radius is None else mesh.fitted(radius)
    except (ValueError, OSError) as error:
        raise ValueError(f"{path}: {error}") from error


def _surfaces(scene: trimesh.Scene) -> Iterator[tuple[trimesh.Trimesh, np.ndarray]]:
    """The parts of a scene that have faces, each as often as it occurs, with where it stands."""
    from trimesh import Trimesh

    for node in scene.graph.nodes_geometry:
        transform, name = scene.graph[node]
        geometry = scene.geometry[name]
        if isinstance(geometry, Trimesh) and len(geometry.faces):
            yield geometry, transform


def _joined(surfaces: Iterator[tuple[trimesh.Trimesh, np.ndarray]], named: dict[str, str], linear: bool) -> Mesh:
    """One mesh; a picture that several parts share is kept once."""
    parts: list[Mesh] = []
    pictures: list[Image.Image] = []
    of_face: list[Tensor] = []
    for surface, transform in surfaces:
        visual = surface.visual
        material, uv = getattr(visual, "material", None), getattr(visual, "uv", None)
        picture = getattr(material, "image", None) or getattr(material, "baseColorTexture", None)
        if picture is None and getattr(material, "name", None) in named:
            raise ValueError(f"its picture {named[material.name]} cannot be read: write it anew")
        number = -1
        if picture is not None and uv is not None:
            number = next((k for k, other in enumerate(pictures) if other is picture), len(pictures))
            pictures[number:] = [*pictures[number:]] or [picture]
        of_face.append(torch.full((len(surface.faces),), number))
        parts.append(_part(surface, transform, uv if number >= 0 else None, linear))
    if not parts:
        raise ValueError("it has no faces: a cloud of points must be meshed first")
    whole = Mesh.joined(parts)
    return Mesh(
        whole.vertices,
        whole.faces,
        colors=whole.colors,
        normals=whole.normals,
        uv=whole.uv,
        textures=[torch.from_numpy(np.array(picture.convert("RGB"))) / 255 for picture in pictures],
        texture_of_face=torch.cat(of_face),
    )


def _part(surface: trimesh.Trimesh, transform: np.ndarray, uv: np.ndarray | None, linear: bool) -> Mesh:
    vertices = surface.vertices @ transform[:3, :3].T + transform[:3, 3]
    faces = np.array(surface.faces)
    if np.linalg.det(transform[:3, :3]) < 0:  # mirrored: turn the faces outwards again
        faces = faces[:, ::-1].copy()
    normals = None
    if "vertex_normals" in surface._cache.cache:  # the only place where trimesh tells those of the file from its own
        normals = _tensor(surface.vertex_normals @ np.linalg.inv(transform[:3, :3]))
    colors = _colors(surface, textured=uv is not None)
    if linear and colors is not None:
        colors = colors.clamp(min=0) ** (1 / 2.2)
    return Mesh(
        _tensor(vertices), torch.from_numpy(faces), colors=colors, normals=normals, uv=None if uv is None else _tensor(uv)
    )


def _colors(surface: trimesh.Trimesh, textured: bool) -> Tensor | None:
    """In [0, 1] by vertex (V, 3), by face (F, 1, 3) or by corner (F, 3, 3)."""
    visual = surface.visual
    if visual.kind == "vertex":
        return _tensor(visual.vertex_colors)[:, :3] / 255
    if visual.kind == "face":
        return _tensor(visual.face_colors)[:, None, :3] / 255
    material = getattr(visual, "material", None)
    factor = getattr(material, "baseColorFactor", None)
    if factor is None and not textured:
        factor = getattr(material, "diffuse", None)  # with a picture it would only darken it
    colors = None if factor is None else (_tensor(factor)[:3] / 255).expand(len(surface.faces), 1, 3)
    written = getattr(visual, "vertex_attributes", {}).get("color")  # of glTF, beside a material
    if written is not None:
        scale = np.iinfo(written.dtype).max if written.dtype.kind in "iu" else 1.0
        by_vertex = (_tensor(written)[:, :3] / scale)[torch.from_numpy(np.array(surface.faces))]
        colors = by_vertex if colors is None else by_vertex * colors
    return colors


def _named_pictures(path: Path) -> dict[str, str]:
    """Pictures of an OBJ's materials, by the material's name; all files that a mesh names exist.

    trimesh goes on without those that are missing.
    """
    kind, folder = path.suffix.lower(), path.parent
    pictures: dict[str, str] = {}
    if kind == ".obj":
        text = path.read_text(errors="replace")
        used = {name.strip() for name in re.findall(r"^\s*usemtl\s+(.+)$", text, re.MULTILINE)}
        for library in re.findall(r"^\s*mtllib\s+(.+)$", text, re.MULTILINE)[:1]:
            materials = _existing(folder, library.strip(), "material file", path).read_text(errors="replace")
            for material in re.split(r"^\s*newmtl\s+", materials, flags=re.MULTILINE)[1:]:
                name = material.partition("\n")[0].strip()
                picture = re.search(r"^\s*map_kd\s+(.+)$", material, re.MULTILINE | re.IGNORECASE)
                if picture and name in used:
                    pictures[name] = picture[1].strip()
    found = list(pictures.values())
    if kind == ".gltf":
        try:
            content = json.loads(path.read_text())
            entries = [entry for key in ("images", "buffers") for entry in content.get(key, [])]
            links = [entry["uri"] for entry in entries if "uri" in entry]
        except (ValueError, AttributeError, TypeError) as error:
            raise ValueError(f"{path} cannot be read as gltf: {error}") from error
        found += [unquote(link) for link in links if not link.startswith("data:")]
    if kind == ".ply":
        with path.open("rb") as file:
            header = file.read(1 << 16).partition(b"end_header")[0].decode(errors="replace")
        found += [name.strip() for name in re.findall(r"^comment TextureFile\s+(.+)$", header, re.MULTILINE)]
    for name in found:
        _existing(folder, name, "file", path)
    return pictures


def _existing(folder: Path, name: str, what: str, path: Path) -> Path:
    file = folder / name
    if not file.is_file():
        raise FileNotFoundError(f"{path} names the {what} {name}, which does not exist: put it into {folder}")
    return file


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.array(array, dtype=np.float32))
