"""Distributions of viewpoints: a Gaussian mixture for each object, behind tanh."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ...scenes.view_space import ViewSpace
from ..store.files import read_tensors, write_tensors
from .draws import ObjectDraws

Mixture = Literal["joint", "per_dim"]
MIXTURES: tuple[str, ...] = get_args(Mixture)
FORMAT = "robust_pl view distribution 1"
TENSORS = ("weights", "mean", "sigma")
_AT_ONCE = 1 << 22
"""About how many numbers to hold at a time, samples times components."""


class ViewDistribution:
    """A mixture of K Gaussians over the D unbounded coordinates u of a :class:`ViewSpace`, one for each of N objects.

    A viewpoint is v = a * tanh(u) + b. In a ``joint`` mixture a draw takes all of its coordinates from one component, as the
    equations of GMVFool have it (Ruan et al. 2023, arXiv 2307.10235); in a ``per_dim`` mixture each coordinate chooses its own,
    as its code does: a product of D mixtures of one dimension, so up to K^D places.

    Args:
        weights: of the components, sum to 1: (N, K) if joint, (N, K, D) if per_dim.
        mean: of u, (N, K, D).
        sigma: standard deviation of u, above 0, (N, K, D).
        space: what u means.
        ids: names of the objects, unique.
        mixture: ``joint`` or ``per_dim``.
        settings: how it was found, for JSON.

    Raises:
        ValueError: if shapes or values do not fit together.
    """

    def __init__(
        self,
        weights: Tensor,
        mean: Tensor,
        sigma: Tensor,
        space: ViewSpace,
        ids: Sequence[str],
        mixture: Mixture = "joint",
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        if mixture not in MIXTURES:
            raise ValueError(f"mixture={mixture!r} is unknown: choose one of {', '.join(MIXTURES)}")
        if mean.dim() != 3 or mean.shape[0] != len(ids) or mean.shape[2] != space.dim or not mean.shape[1]:
            raise ValueError(
                f"mean has shape {tuple(mean.shape)} for {len(ids)} objects and {space.dim} active parameters: it must be "
                "(N, K, D)"
            )
        shape = mean.shape if mixture == "per_dim" else mean.shape[:2]
        if weights.shape != shape or sigma.shape != mean.shape:
            raise ValueError(
                f"weights {tuple(weights.shape)} and sigma {tuple(sigma.shape)} do not fit mean {tuple(mean.shape)}: "
                f"mixture={mixture!r} has weights {tuple(shape)} and sigma {tuple(mean.shape)}"
            )
        if len(set(ids)) < len(ids):
            raise ValueError("an object is in the distribution twice: ids must be unique")
        if not (mean.isfinite().all() and sigma.isfinite().all() and (sigma > 0).all()):
            raise ValueError("mean and sigma must be finite, and sigma above 0")
        if not (weights >= 0).all() or not torch.allclose(weights.sum(1), torch.ones_like(weights.sum(1)), atol=1e-4):
            raise ValueError("the weights of an object's components must be at least 0 and sum to 1")
        self.weights, self.mean, self.sigma = weights, mean, sigma
        self.space, self.ids, self.mixture = space, list(ids), mixture
        self.settings = dict(settings or {})

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def components(self) -> int:
        """K."""
        return self.mean.shape[1]

    @property
    def center(self) -> Tensor:
        """Viewpoints at the means of the components, (N, K, 6)."""
        return self.space.squash(self.mean)

    def sample(self, count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
        """``count`` draws for each object: u (N, count, D) and viewpoints (N, count, 6).

        They are a function of the seed and the object's id, so the same whichever objects are beside it. Components are drawn
        stratified, each its share of times to within one.
        """
        draws = ObjectDraws(seed, self.ids, self.mean.device)
        chosen = draws.components("components", self._wide(), count).expand(-1, -1, self.space.dim)
        noise = draws.normal("views", count, self.space.dim)
        u = self.mean.gather(1, chosen) + self.sigma.gather(1, chosen) * noise
        return u, self.space.squash(u)

    def log_prob(self, u: Tensor) -> Tensor:
        """Log density of the viewpoints of u (N, S, D), with respect to v in degrees and units of the scene: (N, S)."""
        away = (u.unsqueeze(2) - self.mean.unsqueeze(1)) / self.sigma.unsqueeze(1)
        of_each = -0.5 * away.square() - self.sigma.log().unsqueeze(1) - 0.5 * math.log(2 * math.pi)
        log_weights = self.weights.log().unsqueeze(1)
        if self.mixture == "joint":
            log_u = (log_weights + of_each.sum(-1)).logsumexp(2)
        else:
            log_u = (log_weights + of_each).logsumexp(2).sum(-1)
        return log_u - self.space.log_abs_det(u)

    def entropy(self, samples: int = 1000) -> Tensor:
        """Entropy of the viewpoints in nats, (N,), by Monte Carlo with fixed draws; at most ``space.log_volume``."""
        at_once = max(1, _AT_ONCE // (samples * self.mean[0].numel()))
        parts = [self.of(self.ids[begin : begin + at_once]) for begin in range(0, len(self), at_once)]
        return torch.cat([-part.log_prob(part.sample(samples)[0]).mean(1) for part in parts])

    def of(self, ids: Sequence[str]) -> ViewDistribution:
        """The distributions of these objects, in this order.

        Raises:
            ValueError: if one is not there.
        """
        place = {name: i for i, name in enumerate(self.ids)}
        if missing := [name for name in ids if name not in place]:
            known = ", ".join(self.ids[:5]) + (", ..." if len(self) > 5 else "")
            raise ValueError(
                f"the distribution holds no object {missing[0]!r}, only {known}: attack it without a start first, or check the "
                "ids"
            )
        rows = torch.tensor([place[name] for name in ids], device=self.mean.device)
        parts = (self.weights[rows], self.mean[rows], self.sigma[rows])
        return ViewDistribution(*parts, self.space, ids, self.mixture, self.settings)

    def to(self, device: torch.device | str) -> ViewDistribution:
        """The same on another device."""
        parts = (self.weights.to(device), self.mean.to(device), self.sigma.to(device))
        return ViewDistribution(*parts, self.space, self.ids, self.mixture, self.settings)

    def tensors(self) -> dict[str, Tensor]:
        """Weights, mean and sigma."""
        return {name: getattr(self, name) for name in TENSORS}

    def save(self, path: str | Path) -> None:
        """Write a safetensors file with ids, space and settings, in one step."""
        meta = {
            "format": FORMAT,
            "ids": self.ids,
            "space": space_record(self.space),
            "mixture": self.mixture,
            "settings": self.settings,
        }
        write_tensors(Path(path), self.tensors(), meta)

    @classmethod
    def load(cls, path: str | Path) -> ViewDistribution:
        """Read what :meth:`save` wrote.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it is damaged or holds something else.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"no view distribution at {path}: attacks write distribution.safetensors into their folder")
        tensors, meta = read_tensors(Path(path))
        if meta.get("format") != FORMAT:
            raise ValueError(f"{path} holds no view distribution but {meta.get('format')!r}")
        space = space_of_record(meta["space"])
        return cls(*(tensors[name] for name in TENSORS), space, meta["ids"], meta["mixture"], meta["settings"])

    def _wide(self) -> Tensor:
        """Weights (N, K, 1) if joint, (N, K, D) if per_dim."""
        return self.weights.unsqueeze(2) if self.mixture == "joint" else self.weights


class UniformViews:
    """Viewpoints spread uniformly over a space: what an attack that does not search has in place of a mixture.

    Args:
        space: whose ranges they fill.
        ids: names of the N objects.
    """

    def __init__(self, space: ViewSpace, ids: Sequence[str]) -> None:
        self.space, self.ids = space, list(ids)

    def sample(self, count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
        """``count`` draws for each object: u (N, count, D) and viewpoints (N, count, 6)."""
        numbers = ObjectDraws(seed, self.ids).uniform("uniform views", count, self.space.dim)
        # An end of a range would be at infinity.
        u = (2 * numbers.double().clamp(1e-6, 1 - 1e-6) - 1).atanh().float()
        return u, self.space.squash(u)

    def tensors(self) -> dict[str, Tensor]:
        """Nothing: the space says it all."""
        return {}

    def entropy(self) -> Tensor:
        """Entropy of the viewpoints in nats, (N,)."""
        return torch.full((len(self.ids),), self.space.log_volume)


def space_record(space: ViewSpace) -> dict[str, Any]:
    """A space for JSON. Equal records are equal spaces: ranges of what is not active do not matter."""
    return {
        "ranges": {name: [float(end) for end in space.ranges[name]] for name in space.active},
        "active": list(space.active),
        "fixed": {name: float(value) for name, value in space.fixed.items()},
    } | ({} if space.normalize_radius is None else {"normalize_radius": float(space.normalize_radius)})


def space_of_record(record: Mapping[str, Any]) -> ViewSpace:
    """The space that :func:`space_record` wrote down."""
    ranges = {name: tuple(ends) for name, ends in record["ranges"].items()}
    return ViewSpace(**ranges, active=record["active"], fixed=record["fixed"], normalize_radius=record.get("normalize_radius"))
