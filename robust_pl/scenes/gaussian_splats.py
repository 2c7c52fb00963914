"""Scenes of 3D Gaussians, rendered by gsplat on a GPU."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .renderer import Views, focal_length

_FIRST = ("x", "y", "z", "opacity", "scale_0", "scale_1", "scale_2", "rot_0", "rot_1", "rot_2", "rot_3")
_BASE = ("f_dc_0", "f_dc_1", "f_dc_2")
_TYPES = {"float": "<f4", "float32": "<f4", "double": "<f8", "float64": "<f8", "uchar": "u1", "uint8": "u1", "int": "<i4"}


class GaussianSplats:
    """3D Gaussian splatting (Kerbl et al. 2023, arXiv 2308.04079) of a fitted scene, through gsplat (extra ``gsplat``).

    The file is the PLY that the authors' code and gsplat's trainer write; its world is taken as it is, with the object at the
    origin and z up. gsplat renders on an NVIDIA GPU alone: reading the file is tested, rendering was written by gsplat's
    documentation and has not been run.

    Args:
        path: binary little-endian PLY with ``x y z``, ``opacity`` (before the sigmoid), ``scale_0..2`` (logarithms),
            ``rot_0..3`` (quaternion, real part first), ``f_dc_0..2`` and, for sheen, ``f_rest_...``.
        image_size: height and width in pixels.
        fov_x: horizontal field of view in degrees.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is another kind of file or has no Gaussians.
        ImportError: on rendering without gsplat.
    """

    differentiable = True

    def __init__(self, path: str | Path, image_size: tuple[int, int] = (224, 224), fov_x: float = 39.6) -> None:
        focal_length(fov_x, 1)  # checks the range
        self.image_size, self.fov_x = image_size, float(fov_x)
        columns = _read_ply(Path(path))
        if missing := [name for name in (*_FIRST, *_BASE) if name not in columns]:
            raise ValueError(f"{path} holds no 3D Gaussians: it lacks the property {missing[0]}")
        values = torch.tensor(np.stack([columns[name] for name in _FIRST], 1), dtype=torch.float32)
        if not len(values):
            raise ValueError(f"{path} holds no Gaussians")
        self.means, self.opacities = values[:, :3], values[:, 3].sigmoid()
        self.scales, self.quats = values[:, 4:7].exp(), F.normalize(values[:, 7:], dim=1)
        rest = sorted((name for name in columns if name.startswith("f_rest_")), key=lambda name: int(name[7:]))
        harmonics = [columns[name] for name in (*_BASE, *rest)]
        self.colors = _by_harmonic(torch.tensor(np.stack(harmonics, 1), dtype=torch.float32))

    @property
    def radius(self) -> float:
        """Of a sphere around the origin that holds the centres of all Gaussians."""
        return float(self.means.norm(dim=1).max())

    def fingerprint(self) -> str:
        """Sum of the Gaussians and of all arguments, 32 hexadecimal digits."""
        found = hashlib.blake2b(repr(("GaussianSplats 1", self.image_size, self.fov_x)).encode(), digest_size=16)
        for values in (self.means, self.opacities, self.scales, self.quats, self.colors):
            found.update(values.cpu().contiguous().numpy().tobytes())
        return found.hexdigest()

    def render(self, pose: Tensor) -> Views:
        """Images from poses camera-to-world (N, 4, 4), on their device, which must be a GPU."""
        gsplat = _import()
        height, width = self.image_size
        names = ("means", "quats", "scales", "opacities", "colors")
        scene = {name: getattr(self, name).to(pose.device) for name in names}
        focal = focal_length(self.fov_x, width)
        lens = pose.new_tensor([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1]], dtype=torch.float32)
        # gsplat's cameras look along +z with y down.
        to_camera = torch.linalg.inv(pose.float() * pose.new_tensor([1, -1, -1, 1], dtype=torch.float32))
        rgb, alpha, _ = gsplat.rasterization(
            **scene,
            viewmats=to_camera,
            Ks=lens.expand(len(pose), 3, 3),
            width=width,
            height=height,
            sh_degree=round(self.colors.shape[1] ** 0.5) - 1,
        )
        return Views(rgb.permute(0, 3, 1, 2).clamp(0, 1), alpha.permute(0, 3, 1, 2).clamp(0, 1))


def _import() -> Any:
    try:
        import gsplat
    except ImportError as error:
        raise ImportError(f"GaussianSplats needs gsplat and a GPU: pip install 'robust_pl[gsplat]' ({error})") from error
    return gsplat


def _by_harmonic(columns: Tensor) -> Tensor:
    """Coefficients (G, K, 3): a file has the three of degree 0, and then all others of red, of green and of blue."""
    base, rest = columns[:, :3], columns[:, 3:]
    others = rest.view(len(columns), 3, -1).transpose(1, 2) if rest.shape[1] else rest.view(len(columns), 0, 3)
    return torch.cat([base.unsqueeze(1), others], 1)


def _read_ply(path: Path) -> dict[str, np.ndarray]:
    """Properties of the vertices of a binary PLY."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: give the PLY of a scene of 3D Gaussians")
    content = path.read_bytes()
    head, found, body = content.partition(b"end_header\n")
    lines = [line.split() for line in head.decode("ascii", "replace").splitlines()]
    if not found or lines[:1] != [["ply"]] or ["format", "binary_little_endian", "1.0"] not in lines:
        raise ValueError(f"{path} is no binary little-endian PLY")
    elements = [line for line in lines if line[:1] == ["element"]]
    properties = [line for line in lines if line[:1] == ["property"]]
    if len(elements) != 1 or elements[0][1] != "vertex" or any(line[1] not in _TYPES for line in properties):
        raise ValueError(f"{path} holds more than plain vertices: give the PLY of a scene of 3D Gaussians")
    layout = np.dtype([(line[2], _TYPES[line[1]]) for line in properties])
    count = int(elements[0][2])
    if len(body) < count * layout.itemsize:
        raise ValueError(f"{path} is cut off: it says {count} vertices")
    table = np.frombuffer(body, layout, count)
    return {name: table[name] for name in table.dtype.names or ()}
