"""Accuracy over the radius of an attack."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from ...report.curve import Curve
from ...report.plots import plot_curves, save
from ..attacks.base import Attack
from ..attacks.checks import Number, check_eps
from ..evaluation import RobustEvaluation


class RobustnessCurve(Callback):
    """Attacks the first samples of the test set at several radii; a curve as PNG, as JSON and in wandb.

    A sample that is broken at one radius counts as broken at all larger ones, since the smaller ball lies in them. The JSON and
    a dashed line also hold the raw accuracy at each radius alone. If that rises by more than one per cent, the attack failed
    where it should have been stronger, a sign of gradient masking (Carlini et al. 2019, arXiv 1902.06705): the plot marks the
    place and there is a warning. Radius 0 is always there.

    Cost: on each of the samples, for every radius what the attack costs and one forward pass, and one for radius 0.

    Args:
        attack: its own ``eps`` is not used. Leave its ``step_size`` to the attack, so that it grows with the radius.
        eps: radii in units of the pixel range [0, 1], such as ``[2/255, 4/255, 8/255]``.
        samples: only samples whose position in the test set is below this are attacked.
        name: of the curve in the legend, and of its files.
        folder: where they go; None takes ``images`` in the trainer's root folder.

    Raises:
        ValueError: if there is no radius or one is given twice, or the attack must see training data first.
    """

    def __init__(
        self,
        attack: Attack,
        eps: list[Number],
        samples: int = 1000,
        name: str = "robustness_curve",
        folder: str | None = None,
    ) -> None:
        if not eps or len(set(map(float, eps))) < len(eps):
            raise ValueError(f"eps={eps} must name at least one radius, and each once")
        if samples < 1:
            raise ValueError(f"samples={samples} must be at least 1")
        if attack.must_fit:
            raise ValueError(f"{type(attack).__name__} must see training data first, which RobustnessCurve does not show it")
        radii = sorted(check_eps(radius, attack.norm) for radius in eps)
        self.attack, self.samples, self.name, self.folder = attack, samples, name, folder
        self.eps = [radius for radius in radii if radius > 0]
        self.curve: Curve | None = None
        self._seen = 0
        self._verdicts: list[tuple[list[int], list[list[bool]]]] = []

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._seen, self._verdicts, self.curve = 0, [], None

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        x, y = batch[0], batch[1]
        index = batch[2] if len(batch) > 2 else torch.arange(self._seen, self._seen + len(x))
        self._seen += len(x)
        wanted = (index < self.samples).nonzero().squeeze(1)
        if len(wanted):
            x, y, index = x[wanted.to(x.device)], y[wanted.to(x.device)], index[wanted]
            with trainer.precision_plugin.val_step_context(), torch.no_grad():
                self._verdicts.append((index.tolist(), self._attack(pl_module, x, y, index).tolist()))

    def _attack(self, model: LightningModule, x: Tensor, y: Tensor, index: Tensor) -> Tensor:
        """Whether each sample is right at radius 0 and at each of the others: bool (B, 1 + radii)."""
        logits = model(x)
        right = [logits.argmax(1) == y]
        aim = self.attack.aim(y, logits.shape[1], index)
        for radius in self.eps:
            x_adv = self.attack.run(model, x, aim, eps=radius, index=index).x_adv
            right.append(model(x_adv.to(x.dtype)).argmax(1) == y)
        return torch.stack(right, 1)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._catch_up(trainer, pl_module)
        verdicts = self._verdicts
        if trainer.world_size > 1:
            gathered: list[Any] = [None] * trainer.world_size
            torch.distributed.all_gather_object(gathered, verdicts)
            verdicts = [part for parts in gathered for part in parts]
        right = {i: row for indices, rows in verdicts for i, row in zip(indices, rows, strict=True)}
        if not trainer.is_global_zero:
            return
        if not right:
            warnings.warn(f"no curve: the test set has no sample at a position below samples={self.samples}", stacklevel=2)
            return
        norm = self.attack.norm
        self.curve = Curve.of(self.name, norm, [0.0, *self.eps], [right[i] for i in sorted(right)])
        if self.curve.rises:
            warnings.warn(
                f"{type(self.attack).__name__} finds less at a larger radius: the accuracy rises at eps="
                f"{', '.join(f'{eps:.4g}' for eps in self.curve.rises)}, a sign of gradient masking or of a weak attack",
                stacklevel=2,
            )
        self._write(trainer, self.curve)

    def _catch_up(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The batches that an earlier, interrupted test finished were not shown to this callback."""
        data = trainer.datamodule
        finished = [first for c in trainer.callbacks if isinstance(c, RobustEvaluation) for first in c.finished]
        for first in sorted(finished)[trainer.global_rank :: trainer.world_size]:
            index = torch.arange(first, min(first + data.eval_batch_size, len(data.test_set)))
            x, y = (part.to(pl_module.device) for part in data.test_set.read(index, None))
            self.on_test_batch_end(trainer, pl_module, None, (x, y, index), 0)

    def _write(self, trainer: Trainer, curve: Curve) -> None:
        folder = Path(self.folder or Path(trainer.default_root_dir) / "images")
        title = f"Robust accuracy over the radius of {type(self.attack).__name__}"
        picture = save(plot_curves([curve], title), folder / f"{self.name}.png")
        (folder / f"{self.name}.json").write_text(json.dumps(curve.as_dict(), indent=2) + "\n")
        for logger in trainer.loggers:
            if hasattr(logger, "log_image"):
                logger.log_image(f"test/{self.name}", [picture])
