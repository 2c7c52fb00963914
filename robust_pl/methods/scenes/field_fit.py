"""Fit a radiance field to photos with poses."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from PIL import Image
from torch import Tensor
from torch.optim import Adam, Optimizer
from torchmetrics.image import PeakSignalNoiseRatio

from ...data.posed_photos import Rays
from ...scenes.field import KEY, RadianceField
from ..base import OptimizerFactory
from ..schedules import Schedule


class FieldFit(LightningModule):
    """Fits a :class:`RadianceField` to the rays of photos, from coarse to fine, and renders the photos held out.

    The loss is the squared error of colours in front of a random grey background, of which the mean over all greys b in [0, 1]
    is taken in closed form, so that neither the photo's alpha nor the background can be painted into the scene: with the
    errors d of premultiplied colours and a of alpha,

        E_b (d - a b)^2 = (d - a / 2)^2 + a^2 / 12,

    plus total variation, the mean squared difference between neighbouring nodes of the raw grids, which fills in what no photo
    shows (as in DVGO, Sun et al. 2022, arXiv 2111.11215, and Plenoxels). The grid begins at ``start_resolution`` and is
    interpolated to a finer one at fractions of the run, up to the field's own; the optimizer then forgets its moments.
    Samples are jittered within their steps by draws that are a function of the batch's key.

    Validation renders whole photos over white and logs ``val/psnr``, the mean over photos in dB, and writes photo and
    rendering, side by side, to ``images/held_out_epochN.png`` in the run's folder. The checkpoint is read by
    :meth:`RadianceField.load`. One process, without accumulation of gradients.

    Args:
        field: what is fitted, at its final resolution.
        optimizer: makes the optimizer from the grids; None takes Adam with a learning rate of 0.1 and betas of 0.9 and 0.99.
        schedule: of the learning rate; None keeps it constant.
        tv_density: weight of the total variation of the raw density.
        tv_color: weight of that of the raw colour.
        start_resolution: nodes along the longest side at the start; at most the field's own.
        refine_at: fractions of the run at which the grid gets finer, by the same factor each.

    Raises:
        ValueError: if a weight is negative, or the resolutions or fractions do not rise.
    """

    monitor = "val/psnr"

    def __init__(
        self,
        field: RadianceField,
        optimizer: OptimizerFactory | None = None,
        schedule: Schedule | None = None,
        tv_density: float = 1e-4,
        tv_color: float = 1e-3,
        start_resolution: int = 32,
        refine_at: Sequence[float] = (0.15, 0.3, 0.5),
    ) -> None:
        super().__init__()
        if tv_density < 0 or tv_color < 0:
            raise ValueError(f"tv_density={tv_density} and tv_color={tv_color} must not lie below 0")
        if not 2 <= start_resolution <= field.resolution:
            raise ValueError(f"start_resolution={start_resolution} must lie between 2 and the field's {field.resolution}")
        if list(refine_at) != sorted(refine_at) or not all(0 < at < 1 for at in refine_at):
            raise ValueError(f"refine_at={list(refine_at)} are fractions of the run: they must rise from above 0 to below 1")
        self.field, self.tv_density, self.tv_color = field, tv_density, tv_color
        self._optimizer, self._schedule, self.refine_at = optimizer, schedule, tuple(refine_at)
        growth = field.resolution / start_resolution
        stages = len(self.refine_at)
        self.resolutions = [round(start_resolution * growth ** (i / max(1, stages))) for i in range(stages + 1)]
        self.resolutions[-1] = field.resolution
        field.refine(self.resolutions[0])
        self.psnr = PeakSignalNoiseRatio(data_range=1.0, dim=(1, 2, 3), reduction="elementwise_mean")
        self._pictures: list[Tensor] = []

    def setup(self, stage: str) -> None:
        if self.trainer.world_size > 1:
            raise ValueError("FieldFit runs in one process: set trainer.devices to 1")
        if self.trainer.accumulate_grad_batches != 1:
            raise ValueError("accumulate_grad_batches would draw the same rays again: raise data.batch_size instead")

    def configure_optimizers(self) -> Any:
        grids = [self.field.density, self.field.color]
        optimizer = Adam(grids, lr=0.1, betas=(0.9, 0.99)) if self._optimizer is None else self._optimizer(grids)
        if self._schedule is None:
            return optimizer
        by_step = self._schedule.interval == "step"
        length = self._schedule.length(self._steps() if by_step else self.trainer.max_epochs)
        scheduler = self._schedule.build(optimizer, length)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": self._schedule.interval}}

    def on_train_batch_start(self, batch: Rays, batch_idx: int) -> None:
        passed = self.global_step / self._steps()
        resolution = self.resolutions[sum(passed >= at for at in self.refine_at)]
        if resolution != self.field.resolution:
            self.field.refine(resolution)
            _replace(self.optimizers(use_pl_optimizer=False), [self.field.density, self.field.color])

    def training_step(self, batch: Rays, batch_idx: int) -> Tensor:
        generator = torch.Generator(batch.origin.device).manual_seed(batch.key)
        shape = (len(batch.origin), self.field.samples)
        shift = torch.rand(shape, generator=generator, device=batch.origin.device)
        seen = self.field(batch.origin, batch.direction, shift)
        colors, alpha = seen[:3] - batch.rgb.T, seen[3] - batch.alpha
        squares = (colors - alpha / 2).square() + alpha.square() / 12
        error = squares.mean()
        self.log("train/psnr", -10 * error.detach().log10(), prog_bar=True)
        smooth = self.tv_density * total_variation(self.field.density) + self.tv_color * total_variation(self.field.color)
        self.log("train/loss", error + smooth)
        return error + smooth

    def validation_step(self, batch: Rays, batch_idx: int) -> None:
        seen = self.field(batch.origin, batch.direction)
        photo, view = (
            batch.image(rgb + (1 - alpha)).clamp(0, 1).unsqueeze(0)
            for rgb, alpha in ((batch.rgb.T, batch.alpha), (seen[:3], seen[3]))
        )
        self.psnr.update(view, photo)
        self._pictures.append(torch.cat([photo, view], 3)[0].cpu())

    test_step = validation_step

    def on_validation_epoch_end(self) -> None:
        self._report("val", f"held_out_epoch{self.current_epoch:03d}.png")

    def on_test_epoch_end(self) -> None:
        self._report("test", "held_out_test.png")

    def _report(self, stage: str, name: str) -> None:
        self.log(f"{stage}/psnr", self.psnr.compute(), prog_bar=True)
        self.psnr.reset()
        pictures, self._pictures = self._pictures, []
        if self.trainer.sanity_checking:
            return
        folder = Path(self.trainer.default_root_dir) / "images"
        folder.mkdir(parents=True, exist_ok=True)
        _sheet(pictures).save(folder / name)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint[KEY] = self.field.settings

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if KEY not in checkpoint:
            raise ValueError("the checkpoint holds no radiance field: give one of a FieldFit")
        self.field.refine(checkpoint[KEY]["resolution"])

    def _steps(self) -> int:
        steps = self.trainer.estimated_stepping_batches
        if steps in (-1, float("inf")):
            raise ValueError("a fit needs to know how long it is: set trainer.max_epochs")
        return int(steps)


def total_variation(grid: Tensor) -> Tensor:
    """Mean squared difference between neighbours of a grid (1, C, Z, Y, X), over its three axes."""
    return sum(grid.diff(dim=axis).square().mean() for axis in (2, 3, 4))


def _replace(optimizer: Optimizer, parameters: list[Tensor]) -> None:
    """Let the optimizer go on with other parameters, of which it knows nothing yet."""
    new = iter(parameters)
    for group in optimizer.param_groups:
        group["params"] = [next(new) for _ in group["params"]]
    optimizer.state.clear()


def _sheet(pictures: list[Tensor]) -> Image.Image:
    """Pictures (3, H, W) one below the other, in columns of about the same height as the sheet's width."""
    columns = max(1, round((sum(p.shape[1] for p in pictures) / max(p.shape[2] for p in pictures)) ** 0.5))
    rows = -(-len(pictures) // columns)
    height, width = (max(p.shape[axis] for p in pictures) for axis in (1, 2))
    sheet = torch.ones(3, rows * height, columns * width)
    for number, picture in enumerate(pictures):
        top, left = number // columns * height, number % columns * width
        sheet[:, top : top + picture.shape[1], left : left + picture.shape[2]] = picture
    return Image.fromarray((sheet * 255).round().byte().permute(1, 2, 0).numpy())
