"""What a viewpoint attack found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from ...functional.viewpoints import azimuth_and_elevation
from ...scenes.scene_set import SceneSet
from .distribution import UniformViews, ViewDistribution

_AZIMUTH_BIN, _ELEVATION_BIN = 30.0, 15.0


@dataclass(frozen=True)
class Found:
    """Distributions of viewpoints for N objects, and S fresh views from each.

    Args:
        distribution: found for each object.
        labels: their classes, int64 (N,).
        target: classes that were to be reached, (N,), or None.
        history: mean and largest fitness of the candidates of each iteration, (N, iterations, 2); fitness is the cross-entropy,
            or minus that of the target.
        u: fresh views from the distributions, (N, S, D).
        loss: cross-entropy there, (N, S).
        prediction: class that the network says there, int64 (N, S).
        center_prediction: at the means of the components, (N, K); without columns if the distribution has none.
        worst_u: the view of the highest fitness among all that were rendered, (N, D).
        worst_fitness: there, (N,).
        worst_loss: cross-entropy there, (N,).
        worst_prediction: there, int64 (N,).
        settings: class and settings of the attack, for JSON.
        sample_seed: with which the fresh views were drawn: ``distribution.sample(S, sample_seed)``.
        renders: rendered and classified views of all objects, those from the found distributions included.
        seconds: that took, added up over processes.
    """

    distribution: ViewDistribution | UniformViews
    labels: Tensor
    target: Tensor | None
    history: Tensor
    u: Tensor
    loss: Tensor
    prediction: Tensor
    center_prediction: Tensor
    worst_u: Tensor
    worst_fitness: Tensor
    worst_loss: Tensor
    worst_prediction: Tensor
    settings: dict[str, Any]
    sample_seed: int
    renders: int
    seconds: float

    @property
    def ids(self) -> list[str]:
        """Names of the objects."""
        return self.distribution.ids

    @property
    def view(self) -> Tensor:
        """The fresh viewpoints, (N, S, 6), in degrees and units of the scene."""
        return self.distribution.space.squash(self.u)

    @property
    def worst_view(self) -> Tensor:
        """The worst viewpoint of each object, (N, 6)."""
        return self.distribution.space.squash(self.worst_u)

    @property
    def accuracy_of_each(self) -> Tensor:
        """Share of the fresh views of each object that the network gets right, (N,)."""
        return (self.prediction == self.labels.unsqueeze(1)).float().mean(1)

    @property
    def accuracy_of_classes(self) -> dict[int, float]:
        """Mean of :attr:`accuracy_of_each` over the objects of each class that has some, by label."""
        classes = self.labels.unique().tolist()
        return {label: self.accuracy_of_each[self.labels == label].mean().item() for label in classes}

    @property
    def renders_per_second(self) -> float:
        """Rendered and classified views a second, of one process."""
        return self.renders / max(self.seconds, 1e-9)

    @property
    def coverage(self) -> float:
        """Mean number of fields of 30 x 15 degrees of the view sphere, of 144, that hold a fresh view of an object."""
        azimuth, elevation = azimuth_and_elevation(self.distribution.space.to_matrix(self.view))
        column = ((azimuth + 180) / _AZIMUTH_BIN).long().clamp(0, 11)
        row = ((elevation + 90) / _ELEVATION_BIN).long().clamp(0, 11)
        held = torch.zeros(len(self.ids), 144).scatter_(1, 12 * row + column, 1.0)
        return held.sum(1).mean().item()

    def worst_images(self, scenes: SceneSet) -> Tensor:
        """The worst view of each object, rendered again: pixels (N, 3, H, W) in [0, 1]."""
        return self.images(scenes, torch.arange(len(self.ids)), self.worst_view)

    def images(self, scenes: SceneSet, which: Tensor, view: Tensor) -> Tensor:
        """What the network saw of objects ``which`` (M,) from viewpoints (M, 6): pixels (M, 3, H, W) in [0, 1].

        Args:
            scenes: the objects, as the attack had them.
            which: int64, on the device that renders.
            view: in degrees and units of the scene, on that device.
        """
        return scenes.images(which, self.distribution.space.to_matrix(view))

    def figures(self, name: str) -> dict[str, float]:
        """The figures over all objects, by the names under which they are logged."""
        found = {
            f"worst_view_{name}": (self.worst_prediction == self.labels).float().mean().item(),
            f"renders_per_second_{name}": self.renders_per_second,
        }
        if self.u.shape[1]:
            relative = self.distribution.entropy() - self.distribution.space.log_volume
            found |= {
                f"acc_{name}": self.accuracy_of_each.mean().item(),
                f"worst_class_{name}": min(self.accuracy_of_classes.values()),
                f"view_loss_{name}": self.loss.mean().item(),
                f"entropy_{name}": relative.mean().item(),
                f"coverage_{name}": self.coverage,
            }
        if self.center_prediction.shape[1]:
            right = (self.center_prediction == self.labels.unsqueeze(1)).float()
            found[f"center_acc_{name}"] = right.mean().item()
        if self.target is not None:
            found[f"reached_{name}"] = (self.prediction == self.target.unsqueeze(1)).float().mean().item()
        return found


def as_table(figures: Mapping[str, Mapping[str, float]], objects: int, title: str) -> Table:
    """Figures of attacks, by the attack's name, as people read them."""
    table = Table(title=f"{title}: viewpoints of {objects} objects", title_justify="left")
    table.add_column("attack", no_wrap=True)
    headings: Sequence[tuple[str, str, str]] = (
        ("acc", "accuracy", ".2%"),
        ("center_acc", "at centers", ".2%"),
        ("worst_view", "at worst view", ".2%"),
        ("view_loss", "loss", ".3f"),
        ("entropy", "entropy", ".2f"),
        ("coverage", "fields", ".1f"),
        ("renders_per_second", "renders a second", ".0f"),
    )
    for _, heading, _ in headings:
        table.add_column(heading, justify="right")
    for name, of in figures.items():
        cells = [format(of[f"{key}_{name}"], shown) if f"{key}_{name}" in of else "" for key, _, shown in headings]
        table.add_row(name, *cells)
    return table
