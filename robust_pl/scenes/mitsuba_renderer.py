"""Meshes rendered by light transport through Mitsuba 3."""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .mesh import Mesh
from .renderer import Views, focal_length


class MitsubaRenderer:
    """A :class:`Mesh` rendered by Mitsuba 3 (extra ``mitsuba``, variant ``scalar_rgb``), with shadows and reflected light.

    The surface is diffuse and two-sided, light is that of :class:`MeshRasterizer`: a sky of even brightness ``ambient``, which
    is not seen itself, and a sun. Colours are taken as written. Poses are rendered one after the other on all processors, and
    the images are copied to their device. The same pose gives the same noise.

    Args:
        mesh: what is seen; faces with a texture take the mean of their colours times the texture.
        image_size: see :class:`MeshRasterizer`, and so all others.
        fov_x: horizontal field of view in degrees.
        samples: paths a pixel.
        bounces: how often light may be reflected; 1 is direct light alone.
        ambient: light from everywhere.
        directional: light from one side.
        light: where that comes from.

    Raises:
        ImportError: without mitsuba.
        ValueError: for a field of view outside of (0, 180), or less than one sample or bounce.
    """

    differentiable = False

    def __init__(
        self,
        mesh: Mesh,
        image_size: tuple[int, int] = (224, 224),
        fov_x: float = 39.6,
        *,
        samples: int = 16,
        bounces: int = 2,
        ambient: float = 0.5,
        directional: float = 0.5,
        light: tuple[float, float, float] = (0.4, -0.5, 0.8),
    ) -> None:
        if samples < 1 or bounces < 1:
            raise ValueError(f"samples={samples} and bounces={bounces} must be at least 1")
        focal_length(fov_x, 1)  # checks the range
        self.mesh, self.image_size, self.fov_x = mesh, image_size, fov_x
        self.samples, self.bounces = samples, bounces
        self.ambient, self.directional, self.light = ambient, directional, light
        self._mitsuba = _import()
        path = {"type": "path", "max_depth": bounces + 1, "hide_emitters": True}
        scene = {"type": "scene", "integrator": path, **_shapes(self._mitsuba, mesh)}
        if ambient > 0:  # a light of no strength would still get its share of the samples
            scene["sky"] = {"type": "constant", "radiance": {"type": "rgb", "value": float(ambient)}}
        if directional > 0:
            irradiance = {"type": "rgb", "value": float(np.pi * directional)}
            scene["sun"] = {"type": "directional", "direction": [-axis for axis in light], "irradiance": irradiance}
        self._scene = self._mitsuba.load_dict(scene)

    @property
    def radius(self) -> float:
        """Of a sphere around the origin that holds the mesh."""
        return self.mesh.radius

    def fingerprint(self) -> str:
        """Sum of the mesh, all arguments and Mitsuba's version."""
        what = (self._mitsuba.__version__, self.mesh.fingerprint(), *self.image_size, self.fov_x, self.samples, self.bounces)
        text = repr(("MitsubaRenderer 1", *what, self.ambient, self.directional, *self.light))
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    def render(self, pose: Tensor) -> Views:
        """Images from poses camera-to-world (N, 4, 4), on their device."""
        height, width = self.image_size
        images = np.empty((len(pose), height, width, 4), dtype=np.float32)
        for image, matrix in zip(images, pose.detach().cpu().double().numpy(), strict=True):
            image[:] = np.array(self._mitsuba.render(self._scene, sensor=self._sensor(matrix), seed=0))
        views = torch.from_numpy(images).to(pose.device).permute(0, 3, 1, 2).clamp(0.0, 1.0)
        return Views(views[:, :3].contiguous(), views[:, 3:].contiguous())

    def _sensor(self, pose: np.ndarray) -> Any:
        """A camera that looks along its own +z, with x to the left."""
        height, width = self.image_size
        return self._mitsuba.load_dict(
            {
                "type": "perspective",
                "fov": float(self.fov_x),
                "fov_axis": "x",
                "near_clip": 1e-3,
                "far_clip": 1e3,
                "to_world": self._mitsuba.ScalarTransform4f((pose * [-1.0, 1.0, -1.0, 1.0]).tolist()),
                "sampler": {"type": "independent", "sample_count": self.samples},
                "film": {
                    "type": "hdrfilm",
                    "width": width,
                    "height": height,
                    "pixel_format": "rgba",
                    "rfilter": {"type": "box"},
                },
            }
        )


def _import() -> Any:
    try:
        import mitsuba
    except ImportError as error:
        raise ImportError(f"MitsubaRenderer needs mitsuba: pip install 'robust_pl[mitsuba]' ({error})") from error
    if mitsuba.variant() is None:
        mitsuba.set_variant("scalar_rgb")
    return mitsuba


def _shapes(mitsuba: Any, mesh: Mesh) -> dict[str, Any]:
    """A shape for each texture, whose corners share no vertices; Mitsuba reads them from files."""
    shapes = {}
    with tempfile.TemporaryDirectory() as folder:
        for number in mesh.texture_of_face.unique().tolist():
            these = mesh.texture_of_face == number
            colors = mesh.colors[these].view(-1, 3)
            reflectance: dict[str, Any] = {"type": "mesh_attribute", "name": "vertex_color"}
            if number >= 0:
                picture = (mesh.textures[number] * colors.mean(0)).cpu().numpy()
                reflectance = {"type": "bitmap", "bitmap": mitsuba.Bitmap(picture), "raw": True}
            columns = [mesh.vertices[mesh.faces[these]].view(-1, 3), mesh.normals[these].reshape(-1, 3)]
            columns += [mesh.uv[these].reshape(-1, 2), colors]
            file = Path(folder) / f"{number + 1}.ply"
            _write_ply(file, torch.cat(columns, 1).cpu().numpy())
            bsdf = {"type": "twosided", "bsdf": {"type": "diffuse", "reflectance": reflectance}}
            shape = {"type": "ply", "filename": str(file), "flip_tex_coords": True, "bsdf": bsdf}
            shapes[f"surface{number + 1}"] = mitsuba.load_dict(shape)
    return shapes


def _write_ply(file: Path, corners: np.ndarray) -> None:
    """Corners (3 F, 11): place, normal, uv and colour, in floats as Mitsuba's reader asks."""
    names = ("x", "y", "z", "nx", "ny", "nz", "u", "v", "r", "g", "b")
    header = ["ply", "format binary_little_endian 1.0", f"element vertex {len(corners)}"]
    header += [f"property float {name}" for name in names]
    header += [f"element face {len(corners) // 3}", "property list uchar int vertex_indices", "end_header", ""]
    faces = np.empty(len(corners) // 3, dtype=[("count", "u1"), ("corner", "<i4", 3)])
    faces["count"], faces["corner"] = 3, np.arange(len(corners)).reshape(-1, 3)
    file.write_bytes("\n".join(header).encode() + corners.astype("<f4").tobytes() + faces.tobytes())
