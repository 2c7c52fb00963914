"""Accuracy over the radius of an attack."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn

from ...report.curve import Curve, curve_record
from ...report.plots import plot_curves, save
from ...report.record import Record
from ..attacks.base import Attack
from ..attacks.checks import Number, check_eps
from .base import Analysis
from .under_attack import check_attack


class RobustnessCurve(Analysis):
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
        super().__init__(samples, name, folder)
        self.attack = check_attack(attack, type(self).__name__)
        radii = sorted(check_eps(radius, attack.norm) for radius in eps)
        self.eps = [radius for radius in radii if radius > 0]
        self.curve: Curve | None = None

    def look(self, model: nn.Module, x: Tensor, y: Tensor, index: Tensor) -> None:
        logits = self.ask(model, x)
        right = [logits.argmax(1) == y]
        aim = self.attack.aim(y, logits.shape[1], index)
        for radius in self.eps:
            found = self.attack.run(model, x, aim, eps=radius, index=index)
            self.forwards += found.forwards
            right.append(self.ask(model, found.x_adv.to(x.dtype)).argmax(1) == y)
        self.keep(right=torch.stack(right, 1))

    def conclude(self, kept: dict[str, Tensor], sums: dict[str, Tensor]) -> Record:
        self.curve = Curve.of(self.name, self.attack.norm, [0.0, *self.eps], kept["right"].tolist())
        return curve_record(self.name, self.curve)

    def _write(self, trainer: Trainer, record: Record) -> None:
        """In a form of its own, which says how many samples stand where."""
        if self.curve.rises:
            warnings.warn(
                f"{type(self.attack).__name__} finds less at a larger radius: the accuracy rises at eps="
                f"{', '.join(f'{eps:.4g}' for eps in self.curve.rises)}, a sign of gradient masking or of a weak attack",
                stacklevel=2,
            )
        folder, title = self._place(trainer), f"Robust accuracy over the radius of {type(self.attack).__name__}"
        picture = save(plot_curves([self.curve], title), folder / f"{self.name}.png")
        (folder / f"{self.name}.json").write_text(json.dumps(self.curve.as_dict(), indent=2) + "\n")
        for logger in trainer.loggers:
            if hasattr(logger, "log_image"):
                logger.log_image(f"test/{self.name}", [picture])

    def _place(self, trainer: Trainer) -> Path:
        return Path(self.folder or Path(trainer.default_root_dir) / "images")
