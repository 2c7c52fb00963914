"""The box of camera parameters that viewpoints are drawn from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from ..functional.viewpoints import azimuth_and_elevation, camera_to_world, cancelled_distance, log_tanh_slope

Parameter = Literal["gamma", "theta", "phi", "r", "x", "y"]
NAMES: tuple[str, ...] = get_args(Parameter)
ANGLES: tuple[Parameter, ...] = ("gamma", "theta", "phi")
POSITION: tuple[Parameter, ...] = ("r", "x", "y")
Range = tuple[float, float]


class ViewSpace:
    """Viewpoints v = (gamma, theta, phi, r, x, y) of ViewFool (Dong et al. 2022, arXiv 2210.03895), each in a range.

    ``theta`` is the azimuth, ``phi`` the angle from the pole, ``gamma`` a tilt, in degrees; ``r`` the distance, ``x`` and ``y``
    the shift of the camera in its plane, in units of the scene. See
    :func:`robust_pl.functional.viewpoints.camera_to_world`. Only the ``active`` ones vary; the others stay at ``fixed``. The D
    active ones are v = a * tanh(u) + b of unbounded numbers u, with b the middle of a range and a half of its width.

    Args:
        gamma: lowest and highest value, and so all others; those of the authors by default.
        theta: in degrees.
        phi: in degrees; 0 looks down from the pole.
        r: distance.
        x: shift to the right.
        y: shift upwards.
        active: ``all``, ``angles`` (with r at 4, no shift), ``position`` (at phi 45 degrees, theta and gamma 0), or names.
        fixed: values of the parameters that are not active, by name, instead of those.
        normalize_radius: None leaves the camera at the distance that was drawn. 1.5 is what VIAT's released code does, on which
            the published numbers of ImageNet-V+ depend: a camera at distance d stands at 1.5 * d / sqrt(d^2 + 1), so that ``r``
            moves it by 1.7 % at most. Another number takes the place of 1.5.

    Raises:
        ValueError: if a range is empty, a name unknown, or nothing is active.
    """

    def __init__(
        self,
        gamma: Range = (-30.0, 30.0),
        theta: Range = (-180.0, 180.0),
        phi: Range = (-70.0, 70.0),
        r: Range = (3.0, 5.0),
        x: Range = (-0.5, 0.5),
        y: Range = (-0.5, 0.5),
        active: Literal["all", "angles", "position"] | Sequence[Parameter] = "all",
        fixed: dict[Parameter, float] | None = None,
        normalize_radius: float | None = None,
    ) -> None:
        self.ranges: dict[str, Range] = dict(zip(NAMES, (gamma, theta, phi, r, x, y), strict=True))
        for name, (low, high) in self.ranges.items():
            if not low < high:
                raise ValueError(
                    f"{name}=({low}, {high}) must rise: to hold it still leave it out of active and name it in fixed"
                )
        if r[0] <= 0:
            raise ValueError(f"r={r} is a distance and must lie above 0")
        if normalize_radius is not None and not 0 < normalize_radius < math.inf:
            raise ValueError(f"normalize_radius={normalize_radius} must lie above 0, such as 1.5, or be None")
        self.normalize_radius = normalize_radius
        groups: dict[str, tuple[str, ...]] = {"all": NAMES, "angles": ANGLES, "position": POSITION}
        named = groups.get(active, (active,)) if isinstance(active, str) else tuple(active)
        fixed = dict(fixed or {})
        unknown = [name for name in (*named, *fixed) if name not in NAMES]
        if unknown or not named:
            said = unknown[0] if unknown else active
            raise ValueError(f"{said!r} is no viewpoint parameter: choose all, angles, position, or of {', '.join(NAMES)}")
        if both := [name for name in named if name in fixed]:
            raise ValueError(f"{both[0]} is both active and fixed: take it out of one of them")
        self.active: tuple[str, ...] = tuple(name for name in NAMES if name in named)
        usual = {"gamma": 0.0, "theta": 0.0, "phi": 45.0, "r": 4.0, "x": 0.0, "y": 0.0}
        self.fixed: dict[str, float] = {name: fixed.get(name, usual[name]) for name in NAMES if name not in named}
        self._columns = [NAMES.index(name) for name in self.active]
        bounds = torch.tensor([self.ranges[name] for name in self.active], dtype=torch.float64)
        self._half, self._middle = (bounds[:, 1] - bounds[:, 0]) / 2, bounds.mean(1)

    @classmethod
    def around(cls, pose: Tensor, margin: float = 10.0) -> ViewSpace:
        """Upright views from where cameras stand that look at the origin: what a field fitted to their photos can show.

        Elsewhere a field holds what no photo has seen, and an attack would find that instead of a weakness of the network.
        ``theta`` fills the smallest arc that holds all cameras, ``phi`` and ``r`` their ranges; tilt and shift stay at 0.

        Args:
            pose: camera-to-world (N, 4, 4), such as ``PosedPhotosDataModule.poses``.
            margin: degrees beyond the outermost cameras.
        """
        azimuth, elevation = azimuth_and_elevation(pose.double())
        theta, phi, away = (azimuth + 90).sort().values, 90 - elevation, pose[:, :3, 3].double().norm(dim=1)
        gap, place = torch.cat([theta[1:] - theta[:-1], theta[:1] + 360 - theta[-1:]]).max(0)
        arc = 360 - float(gap) + 2 * margin
        first = (float(theta[(int(place) + 1) % len(theta)]) - margin + 180) % 360 - 180
        if arc > 360 - 1e-3:
            first, arc = -180.0, 360.0
        return cls(
            theta=(first, first + arc),
            phi=(max(0.0, float(phi.min()) - margin), min(180.0, float(phi.max()) + margin)),
            r=(float(away.min()) * 0.999, float(away.max()) * 1.001),
            active=["theta", "phi", "r"],
            fixed={"gamma": 0.0, "x": 0.0, "y": 0.0},
        )

    @property
    def dim(self) -> int:
        """Number D of active parameters."""
        return len(self.active)

    def squash(self, u: Tensor) -> Tensor:
        """Viewpoints (..., 6) of unbounded numbers (..., D)."""
        return self._whole(self._half.to(u) * u.tanh() + self._middle.to(u))

    def unsquash(self, view: Tensor) -> Tensor:
        """Unbounded numbers (..., D) of viewpoints (..., 6) inside the ranges."""
        share = (view[..., self._columns] - self._middle.to(view)) / self._half.to(view)
        return share.atanh()

    def log_abs_det(self, u: Tensor) -> Tensor:
        """Log |dv / du| of :meth:`squash`, (...,): the sum over active parameters of log a + log(1 - tanh(u)^2)."""
        return (self._half.to(u).log() + log_tanh_slope(u)).sum(-1)

    @property
    def log_volume(self) -> float:
        """Entropy of the uniform distribution over the active ranges, in nats, with angles in degrees."""
        return float((2 * self._half).log().sum())

    def uniform(self, numbers: Tensor) -> Tensor:
        """Viewpoints (..., 6) spread uniformly over the ranges, of numbers (..., D) from U[0, 1)."""
        return self._whole(self._half.to(numbers) * (2 * numbers - 1) + self._middle.to(numbers))

    def contains(self, view: Tensor) -> Tensor:
        """Whether viewpoints (..., 6) lie in the ranges of the active parameters, bool (...,)."""
        away = (view[..., self._columns] - self._middle.to(view)).abs()
        return (away <= self._half.to(view) * (1 + 1e-6)).all(-1)

    def to_matrix(self, view: Tensor) -> Tensor:
        """Poses camera-to-world (..., 4, 4) of viewpoints (..., 6)."""
        pose = camera_to_world(view)
        if self.normalize_radius is None:
            return pose
        away = pose[..., :3, 3].norm(dim=-1, keepdim=True)
        pose[..., :3, 3] = pose[..., :3, 3] / away * cancelled_distance(away, self.normalize_radius)
        return pose

    @property
    def distances(self) -> Range:
        """Smallest and largest distance of an unshifted camera from the origin."""
        low, high = self.ranges["r"] if "r" in self.active else (self.fixed["r"],) * 2
        if self.normalize_radius is None:
            return low, high
        low, high = cancelled_distance(torch.tensor([low, high], dtype=torch.float64), self.normalize_radius).tolist()
        return low, high

    def check_outside(self, radius: float, what: str = "the object") -> None:
        """Refuse ranges in which a camera could stand inside a sphere around the origin that holds the object.

        Raises:
            ValueError: naming the distance.
        """
        nearest = self.distances[0]
        if nearest > radius:
            return
        begins, remedy = f"r begins at {nearest:g}", f"let ViewSpace.r begin above {radius:g}"
        if self.normalize_radius is not None:
            begins, remedy = (
                f"normalize_radius={self.normalize_radius:g} puts cameras at {nearest:g}",
                "raise it, or leave it out",
            )
        raise ValueError(
            f"{begins} and {what} reaches {radius:g} from the origin: the camera would stand inside, so {remedy}, or scale the "
            "scene down"
        )

    def check_in_picture(self, radius: float, fov_x: float, image_size: tuple[int, int], what: str = "the object") -> None:
        """Refuse ranges in which a sphere around the origin that holds the object may leave the picture altogether.

        Shifts do that from near. Parts of an object may be cut off; in the ranges of ViewFool they are, where it is as large as
        a sphere of radius 1.

        Raises:
            ValueError: naming the shift.
        """
        height, width = image_size
        across = math.tan(math.radians(fov_x) / 2)
        low, high = self.ranges["r"] if "r" in self.active else (self.fixed["r"],) * 2
        for name, slope in (("x", across), ("y", across * height / width)):
            farthest = max(map(abs, self.ranges[name])) if name in self.active else abs(self.fixed[name])
            for r in (low, high):
                scale, away = 1.0, math.hypot(r, farthest)
                if self.normalize_radius is not None:
                    scale = float(cancelled_distance(torch.tensor(away), self.normalize_radius)) / away
                if scale * (farthest - slope * r) > radius * math.hypot(1, slope):
                    raise ValueError(
                        f"{name} reaches {farthest:g} at r={r:g}, from where {what}, which reaches {radius:g} from the origin, "
                        f"is not in the picture: narrow ViewSpace.{name}, or raise r"
                    )

    def _whole(self, active: Tensor) -> Tensor:
        """All six parameters, of the active ones (..., D)."""
        view = active.new_tensor([self.fixed.get(name, math.nan) for name in NAMES]).expand(*active.shape[:-1], 6).clone()
        view[..., self._columns] = active
        return view
