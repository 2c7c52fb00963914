"""Accuracy over the view sphere."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from ...report.plots import save
from ...report.view_bins import HEADINGS, ViewBins
from ...report.view_sphere import plot_view_sphere
from ...scenes.orbit import orbit
from ...scenes.scene_set import SceneSet
from ..attacks.checks import check_count
from ..attacks.prepare import prepared
from ..store.files import write
from ..track import log_rows
from ..viewpoints.base import ViewpointAttack
from ..viewpoints.places import places_of


class ViewSphere(Callback):
    """Looks at every test object from all around at the end of a test; a heat map of the accuracy as PNG, its fields as CSV.

    The objects are the ``test_scenes`` of the data module, as viewpoint attacks have them. The camera is upright, in the middle
    of each field of the sphere, and sees the object in the middle of the image, before the background that attacks put there.
    What viewpoint attacks of the same test found is drawn over the map. It logs ``test/view_mean``, the accuracy over the
    sphere, in which fields count by their area, and ``test/view_worst_bin``, that of the worst field.

    Cost: ``azimuths * elevations`` renders and forward passes for each object, 144 by default. Several processes share them.

    Args:
        azimuths: fields around the object.
        elevations: fields from the lowest to the highest elevation.
        elevation: lowest and highest, in degrees above the horizon; all by default, also from below.
        distance: of the camera; None takes the middle of the range in the data module's ``view_space``, or 4.
        batch_size: views rendered and classified at once.
        name: first part of the figures' names and of the files'.
        folder: where the files go; None takes ``images`` in the trainer's root folder.

    Raises:
        ValueError: if an argument is out of its range.
    """

    bins: ViewBins | None = None
    """What the last test saw."""

    def __init__(
        self,
        azimuths: int = 12,
        elevations: int = 12,
        elevation: tuple[float, float] = (-90.0, 90.0),
        distance: float | None = None,
        batch_size: int = 256,
        name: str = "view",
        folder: str | None = None,
    ) -> None:
        for field, value in (("azimuths", azimuths), ("elevations", elevations), ("batch_size", batch_size)):
            check_count(field, value)
        low, high = elevation
        if not -90 <= low < high <= 90:
            raise ValueError(f"elevation=({low}, {high}) must rise and lie in [-90, 90] degrees, such as (-90, 90)")
        if distance is not None and distance <= 0:
            raise ValueError(f"distance={distance} must be above 0")
        self.azimuths, self.elevations, self.elevation, self.distance = azimuths, elevations, (low, high), distance
        self.batch_size, self.name, self.folder = batch_size, name, folder

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "test":
            return
        data = trainer.datamodule
        scenes = getattr(data, "test_scenes", None)
        if scenes is None:
            raise ValueError(
                f"{type(data).__name__} offers no test_scenes, which ViewSphere renders: use a data module with scenes, or "
                "leave ViewSphere out"
            )
        if self._distance(trainer) <= scenes.radius:
            raise ValueError(
                f"distance={self._distance(trainer):g} lies inside of an object, which reaches {scenes.radius:g} from the "
                "origin: choose a larger distance"
            )

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        scenes: SceneSet = trainer.datamodule.test_scenes
        columns, rows = self.azimuths, self.elevations
        azimuth = (torch.arange(columns) + 0.5) * (360 / columns) - 180
        elevation = (torch.arange(rows) + 0.5) * ((self.elevation[1] - self.elevation[0]) / rows) + self.elevation[0]
        elevation, azimuth = (grid.flatten() for grid in torch.meshgrid(elevation, azimuth, indexing="ij"))
        poses = orbit(azimuth, elevation, self._distance(trainer)).to(pl_module.device)
        own = torch.arange(trainer.global_rank, len(scenes), trainer.world_size)
        with trainer.precision_plugin.val_step_context(), prepared(pl_module, "eval"), torch.no_grad():
            right = self._look(pl_module, scenes, own, poses)
        right = trainer.strategy.reduce(right, reduce_op="sum").cpu()
        total = torch.full_like(right, len(scenes))
        verdicts = [counts.view(rows, columns).numpy() for counts in (total, right)]
        edges = ViewBins.count([], [], [], columns, rows, self.elevation)
        self.bins = ViewBins(edges.azimuth, edges.elevation, *verdicts)
        worst = float(self.bins.accuracy[self.bins.worst])
        log_rows(pl_module, "test", {f"{self.name}_mean": self.bins.mean, f"{self.name}_worst_bin": worst})

    def _look(self, model: LightningModule, scenes: SceneSet, objects: Tensor, poses: Tensor) -> Tensor:
        """How many of the objects the network gets right from each pose (P, 4, 4), int64 (P,)."""
        device, dtype = poses.device, next((p.dtype for p in model.parameters()), torch.float32)
        labels = scenes.labels.to(device)
        right = torch.zeros(len(poses), dtype=torch.int64, device=device)
        if not len(objects):  # more processes than objects
            return right
        which = objects.to(device).repeat_interleave(len(poses))
        place = torch.arange(len(poses), device=device).repeat(len(objects))
        for some, at in zip(which.split(self.batch_size), place.split(self.batch_size), strict=True):
            # A pose in half precision would be off by degrees.
            with torch.autocast(device.type, enabled=False):
                images = scenes.images(some, poses[at])
            right.index_add_(0, at, (model(images.to(dtype)).argmax(1) == labels[some]).long())
        return right

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """By now every attack has found what it finds, wherever it stands among the callbacks."""
        if self.bins is None or not trainer.is_global_zero:
            return
        attacks = [c for c in trainer.callbacks if isinstance(c, ViewpointAttack) and "test" in c.stages]
        overlays = {attack.name: places_of(attack.found.distribution) for attack in attacks if attack.found is not None}
        folder = Path(self.folder or Path(trainer.default_root_dir) / "images")
        text = io.StringIO()
        writer = csv.writer(text)
        writer.writerow(HEADINGS)
        writer.writerows(self.bins.rows())
        write(folder / f"{self.name}_sphere.csv", text.getvalue().encode())
        figure = plot_view_sphere(self.bins, overlays, f"Accuracy by viewpoint, {len(trainer.datamodule.test_scenes)} objects")
        picture = save(figure, folder / f"{self.name}_sphere.png")
        for logger in trainer.loggers:
            if hasattr(logger, "log_image"):
                logger.log_image(f"test/{self.name}_sphere", [picture])

    def _distance(self, trainer: Trainer) -> float:
        if self.distance is not None:
            return self.distance
        space = getattr(trainer.datamodule, "view_space", None)
        return 4.0 if space is None else sum(space.distances) / 2
