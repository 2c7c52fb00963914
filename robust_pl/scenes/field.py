"""A radiance field in plain torch: density and colour on a grid, seen by volume rendering."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..functional.harmonics import harmonics
from ..trust import read_checkpoint
from .renderer import Views, focal_length, pixel_rays

SAMPLES = 1 << 17
"""About how many samples a CPU holds at a time: few enough for its caches."""
RAYS = 1 << 18
"""About how many rays a CPU holds at a time, of some 100 bytes."""
OPACITY = 100.0
"""Optical depth of the box's diagonal where softplus of the raw density is 1: opaque within a few cells."""
START = -4.0
"""Raw density at the start: mist, through which every cell is seen and learns."""
KEY = "radiance_field"
"""In a checkpoint: the arguments that its field is built from."""
PREFIX = "field."
"""In a checkpoint: what the names of the field's tensors begin with."""

Corner = tuple[float, float, float]


class RadianceField(nn.Module):
    """Density and colour on the nodes of a grid in a box, trilinear between them; a renderer, differentiable in all of it.

    Volume rendering of NeRF (Mildenhall et al. 2020, arXiv 2003.08934), on a grid without a network as in DVGO (Sun et al.
    2022, arXiv 2111.11215): a ray is cut where it enters and leaves the box and has S samples between, in the middle of equal
    steps of length delta:

        rgb = sum_i T_i (1 - exp(-sigma_i delta)) c_i,  T_i = exp(-delta sum_{j<i} sigma_j),  alpha = 1 - T_{S+1}

    sigma = 100 / diagonal of the box * softplus(raw) after interpolation, which makes sharper surfaces than before it; the
    colour is the sigmoid of spherical harmonics in the direction of the ray (Plenoxels, Fridovich-Keil et al. 2022, arXiv
    2112.05131).

    Work is spent where it shows, on packed samples: density is asked for in cells that are not empty, colour where light still
    comes through. Cells are empty where the density of the highest corner, which bounds it in between, times the diagonal of
    the box stays below ``empty``: by that much at most the optical depth of a ray is too low. Samples behind a transmittance
    of ``cutoff``, or that weigh less than cutoff / S, are not coloured: 2 * cutoff of a pixel at most. What is empty is worked
    out anew whenever the density was changed in place, by an optimizer say.

    No loop runs over pixels, rays or samples, only over chunks of rays with about 130,000 samples (4 million on a GPU). A GPU
    waits three times a chunk for the number of packed rays and samples.

    Args:
        image_size: height and width in pixels.
        fov_x: horizontal field of view in degrees; 39.6 is that of the NeRF synthetic scenes.
        resolution: nodes along the longest side of the box; the other sides have about the same spacing.
        low: corner of the box with the smallest x, y and z.
        high: the opposite corner.
        degree: of the spherical harmonics: 0 is the same colour from everywhere, 1 and 2 have sheen (4 and 9 coefficients).
        samples: S, along each ray. Twice ``resolution`` loses nothing; half of it is fast.
        near: nothing nearer to the camera is seen.
        empty: optical depth through the diagonal below which a cell is skipped; 0 skips none.
        cutoff: transmittance below which nothing is coloured; 0 colours all.

    Raises:
        ValueError: if an argument lies outside its range.
    """

    differentiable = True

    def __init__(
        self,
        image_size: tuple[int, int] = (64, 64),
        fov_x: float = 39.6,
        *,
        resolution: int = 64,
        low: Corner = (-1.0, -1.0, -1.0),
        high: Corner = (1.0, 1.0, 1.0),
        degree: int = 0,
        samples: int = 96,
        near: float = 0.0,
        empty: float = 0.01,
        cutoff: float = 1e-3,
    ) -> None:
        super().__init__()
        limits = {"resolution": (resolution, 2), "samples": (samples, 1), "near": (near, 0), "empty": (empty, 0)}
        for name, (value, least) in {**limits, "cutoff": (cutoff, 0)}.items():
            if value < least:
                raise ValueError(f"{name}={value} must be at least {least}")
        if min(image_size) < 1:
            raise ValueError(f"image_size={tuple(image_size)} must be at least 1 pixel high and wide")
        if any(a >= b for a, b in zip(low, high, strict=True)):
            raise ValueError(f"low={tuple(low)} must lie below high={tuple(high)} in x, y and z")
        focal_length(fov_x, 1)  # checks the range
        self.image_size, self.fov_x = (int(image_size[0]), int(image_size[1])), float(fov_x)
        self.low, self.high, self.degree, self.samples = tuple(map(float, low)), tuple(map(float, high)), degree, samples
        self.near, self.empty, self.cutoff = float(near), float(empty), float(cutoff)
        nodes = self._nodes(resolution)
        self.density = nn.Parameter(torch.full((1, 1, *nodes), START))
        self.color = nn.Parameter(torch.zeros(1, 3 * len(harmonics(torch.zeros(3, 0), degree)), *nodes))
        self._known: tuple[tuple[object, ...], Tensor] | None = None

    @classmethod
    def load(cls, path: str | Path, **changed: Any) -> RadianceField:
        """The field in a checkpoint of :class:`FieldFit`, or in what :meth:`save` wrote: fixed, ready to render.

        Args:
            path: the file.
            changed: arguments that should differ: ``image_size``, ``fov_x``, ``samples``, ``near``, ``empty``, ``cutoff``.

        Raises:
            FileNotFoundError: if there is none.
            ValueError: if it holds no field.
        """
        checkpoint = read_checkpoint(path)
        if KEY not in checkpoint:
            raise ValueError(
                f"{path} holds no radiance field: give a checkpoint of a FieldFit, such as runs/lego/checkpoints/best.ckpt"
            )
        field = cls(**{**checkpoint[KEY], **changed})
        tensors = checkpoint["state_dict"]
        try:
            field.load_state_dict({k.removeprefix(PREFIX): v for k, v in tensors.items() if k.startswith(PREFIX)})
        except RuntimeError as error:
            raise ValueError(f"{path} holds a field of another shape than it says: {' '.join(str(error).split())}") from error
        return field.eval().requires_grad_(False)

    def save(self, path: str | Path) -> None:
        """Write what :meth:`load` reads."""
        tensors = {PREFIX + name: value for name, value in self.state_dict().items()}
        torch.save({KEY: self.settings, "state_dict": tensors}, path)

    @property
    def settings(self) -> dict[str, Any]:
        """The arguments that build a field of this shape, plain numbers."""
        names = ("image_size", "fov_x", "resolution", "low", "high", "degree", "samples", "near", "empty", "cutoff")
        return {name: getattr(self, name) for name in names}

    @property
    def resolution(self) -> int:
        """Nodes along the longest side."""
        return max(self.density.shape[2:])

    @property
    def radius(self) -> float:
        """Of a sphere around the origin that holds every cell that is not empty; the whole box, where all are."""
        occupied = self.occupied() if self.occupied().any() else ~self.occupied()
        farthest = 0.0
        for axis, (low, high) in enumerate(zip(self.low, self.high, strict=True)):
            layers = occupied.movedim(2 - axis, 0).flatten(1).any(1)
            first, last = layers.nonzero().aminmax()
            step = (high - low) / len(layers)
            farthest += max(abs(low + int(first) * step), abs(low + (int(last) + 1) * step)) ** 2
        return farthest**0.5

    def fingerprint(self) -> str:
        """Sum of the grid and of all arguments, 32 hexadecimal digits."""
        found = hashlib.blake2b(repr(("RadianceField 1", sorted(self.settings.items()))).encode(), digest_size=16)
        for values in (self.density, self.color):
            found.update(values.detach().cpu().contiguous().numpy().tobytes())
        return found.hexdigest()

    def render(self, pose: Tensor) -> Views:
        """Images from poses camera-to-world (N, 4, 4), on their device; gradients flow to the poses and to the grid.

        Raises:
            ValueError: if the poses have another shape.
        """
        if pose.dim() != 3 or pose.shape[1:] != (4, 4):
            raise ValueError(f"pose has the shape {tuple(pose.shape)}: give (N, 4, 4)")
        height, width = self.image_size
        rays = RAYS if self.density.device.type == "cpu" else 32 * RAYS
        parts = [self._look(some) for some in pose.to(self.density).split(max(1, rays // (height * width)))]
        return Views(*(torch.cat(part).to(pose.device) for part in zip(*parts, strict=True)))

    def _look(self, pose: Tensor) -> Views:
        origin, direction = pixel_rays(pose, self.image_size, self.fov_x)
        rays = direction.flatten(1, 2)
        seen = self(origin.unsqueeze(1).expand_as(rays).flatten(0, 1), rays.flatten(0, 1))
        seen = seen.view(4, len(pose), *self.image_size).transpose(0, 1)
        return Views(seen[:, :3], seen[:, 3:])

    def forward(self, origin: Tensor, direction: Tensor, shift: Tensor | None = None) -> Tensor:
        """What rays see: rgb times alpha, and alpha, in [0, 1], (4, R).

        Args:
            origin: where they begin, (R, 3).
            direction: unit vectors (R, 3).
            shift: where in its step each sample lies, (R, S) in [0, 1]; the middle by default. Random ones in training keep
                steps from being seen.
        """
        begin, length = self._clip(origin, direction)
        hit = (length > 0).nonzero().squeeze(1)
        rays = [begin, length, *origin.unbind(1), *direction.unbind(1)]
        at_once = max(1, (SAMPLES if origin.device.type == "cpu" else 32 * SAMPLES) // self.samples)
        parts = [
            self._march(torch.stack([value.index_select(0, some) for value in rays]), None if shift is None else shift[some])
            for some in hit.split(at_once)
        ]
        return origin.new_zeros(4, len(origin)).index_copy(1, hit, torch.cat(parts, 1))

    def sigma(self, where: Tensor) -> Tensor:
        """Density (M,), per unit of length, at points (3, M) of the grid: -1 and 1 are the sides of the box."""
        return OPACITY / self.diagonal * F.softplus(_sampled(self.density, where).squeeze(0))

    def rgb(self, where: Tensor, direction: Tensor) -> Tensor:
        """Colours (3, M) in [0, 1] at points (3, M) of the grid, towards unit directions (3, M)."""
        values = _sampled(self.color, where)
        basis = harmonics(direction, self.degree)
        return (values.view(3, len(basis), -1) * basis).sum(1).sigmoid()

    @torch.no_grad()
    def occupied(self) -> Tensor:
        """Which cells between the nodes are not empty, bool (Z, Y, X) in which each side has one less than there are nodes."""
        stamp = (id(self.density), self.density.data_ptr(), self.density._version, self.low, self.high, self.empty)
        if self._known is None or self._known[0] != stamp:
            highest = self.density[0, 0]
            for axis in range(3):
                count = highest.shape[axis] - 1
                highest = torch.maximum(highest.narrow(axis, 0, count), highest.narrow(axis, 1, count))
            self._known = stamp, OPACITY * F.softplus(highest) >= self.empty
        return self._known[1]

    def refine(self, resolution: int) -> None:
        """Give the grid more nodes: the same field, ready to learn finer things. Its parameters are new ones."""
        nodes = self._nodes(resolution)
        for name in ("density", "color"):
            old = getattr(self, name)
            finer = F.interpolate(old.detach(), nodes, mode="trilinear", align_corners=True)
            setattr(self, name, nn.Parameter(finer.contiguous(), old.requires_grad))

    @property
    def diagonal(self) -> float:
        """Of the box."""
        return sum((b - a) ** 2 for a, b in zip(self.low, self.high, strict=True)) ** 0.5

    def _nodes(self, resolution: int) -> tuple[int, int, int]:
        """Along z, y and x, as the grid is stored."""
        sides = [b - a for a, b in zip(self.low, self.high, strict=True)]
        x, y, z = (max(2, round(side / max(sides) * (resolution - 1)) + 1) for side in sides)
        return z, y, x

    def _clip(self, origin: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
        """Where rays enter the box and how long they stay, (R,) each; a length of 0 or less misses it."""
        tiny = torch.finfo(direction.dtype).tiny ** 0.5
        slope = torch.where(direction.abs() < tiny, tiny, direction)
        low, high = ((origin.new_tensor(side) - origin) / slope for side in (self.low, self.high))
        begin = torch.minimum(low, high).amax(1).clamp(min=self.near)
        return begin, torch.maximum(low, high).amin(1) - begin

    def _march(self, rays: Tensor, shift: Tensor | None) -> Tensor:
        """What rays (8, R) see that hit the box, (4, R)."""
        begin, length, origin, direction = rays[:1].T, rays[1:2].T, rays[2:5], rays[5:]
        steps = torch.arange(self.samples, dtype=rays.dtype, device=rays.device) / self.samples
        within = steps + (0.5 if shift is None else shift) / self.samples
        distance = begin + length * within
        half = [(b - a) / 2 for a, b in zip(self.low, self.high, strict=True)]
        # Axis by axis: all samples of a ray lie side by side then.
        points = [
            (o - (low + side)).div(side).unsqueeze(1) + d.div(side).unsqueeze(1) * distance
            for o, d, low, side in zip(origin, direction, self.low, half, strict=True)
        ]
        where = torch.stack(points).flatten(1)
        kept = self._kept(where)
        inside = where.index_select(1, kept)
        delta = length / self.samples
        depth = _spread(self.sigma(inside), kept, distance) * delta
        passed = depth.cumsum(1)
        before = torch.exp(depth - passed)
        weight = before * -torch.expm1(-depth)
        shows = (weight > self.cutoff / self.samples) & (before > self.cutoff) if self.cutoff else weight >= 0
        shown = shows.flatten().index_select(0, kept).nonzero().squeeze(1)
        lit = kept.index_select(0, shown)
        ray = torch.div(lit, self.samples, rounding_mode="floor")
        colors = self.rgb(inside.index_select(1, shown), direction.index_select(1, ray))
        rgb = (_spread(colors, lit, distance) * weight).sum(-1)
        return torch.cat([rgb, -torch.expm1(-passed[:, -1:].T)]).clamp(max=1.0)

    @torch.no_grad()
    def _kept(self, where: Tensor) -> Tensor:
        """Numbers of the samples, of (3, M), that lie in cells which are not empty."""
        if not self.empty:
            return torch.arange(where.shape[1], device=where.device)
        cells = self.occupied().to(where.dtype)[None, None]
        return _sampled(cells, where, "nearest").squeeze(0).nonzero().squeeze(1)


def _sampled(grid: Tensor, where: Tensor, mode: str = "bilinear") -> Tensor:
    """Values (C, M) of a grid (1, C, Z, Y, X) at points (3, M): between its nodes, or of the cell."""
    points = where.T.view(1, 1, 1, -1, 3)
    found = F.grid_sample(grid, points, mode=mode, padding_mode="border", align_corners=mode == "bilinear")
    return found.view(grid.shape[1], -1)


def _spread(values: Tensor, place: Tensor, like: Tensor) -> Tensor:
    """Packed values (..., M) at their places among all samples, (..., R, S), 0 elsewhere."""
    everywhere = values.new_zeros(*values.shape[:-1], like.numel())
    return everywhere.index_copy(-1, place, values).view(*values.shape[:-1], *like.shape)
