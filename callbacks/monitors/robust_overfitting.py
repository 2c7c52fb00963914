"""Robust overfitting: what the best epoch had and the last one lost."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from ..attacks.prepare import evaluating
from ..outcome import EvaluationAttack, attack_batch
from .compute import not_training
from .probe import ProbeSet, log_figures


class RobustOverfitting(Callback):
    """Reports how much robustness a run loses after its best epoch (Rice et al. 2020, arXiv 2002.11569).

    After every validation it takes the validation's metric, and the accuracy on a fixed set of training samples in the worst
    case over the attacks that run in validation, both from the network in eval mode. Logged as ``monitor/ro_...``: ``val``,
    ``train``, ``gap`` = train - val, ``best`` and ``best_epoch`` of the validation so far, and ``lost`` = best - val. At the
    end it prints a line; :attr:`history` holds all of it. The best epoch is chosen by held-out samples, so test both
    ``best.ckpt`` and ``last.ckpt`` to report what was lost on the test set.

    Costs one forward pass and what the attacks cost, a sample and validation; :class:`ComputeMonitor` counts it as evaluation.

    Args:
        monitor: metric of the validation, the higher the better.
        samples: size of the set of training samples, spread over the training set; without augmentation where the data module
            is one of ours.
        patience: stop the run after so many validations without a new best; None never does.

    Raises:
        ValueError: if an argument is out of range, or the validation does not log the metric.
    """

    def __init__(self, monitor: str = "val/acc_worst", samples: int = 500, patience: int | None = None) -> None:
        for name, value in (("samples", samples), ("patience", 1 if patience is None else patience)):
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        self.monitor, self.samples, self.patience = monitor, samples, patience
        self.history: list[dict[str, float]] = []
        self._probe = ProbeSet(samples)

    @property
    def best(self) -> dict[str, float] | None:
        """The entry of :attr:`history` with the highest ``val``, the first of them; None before there is any."""
        return max(self.history, key=lambda entry: entry["val"], default=None)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._probe.read(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._probe.collect(batch)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        if self.monitor not in trainer.callback_metrics:
            known = sorted(name for name in trainer.callback_metrics if name.startswith("val"))
            raise ValueError(f"monitor={self.monitor!r} is not logged in validation: choose one of {', '.join(known)}")
        val = float(trainer.callback_metrics[self.monitor])
        train = self._train_accuracy(trainer, pl_module)
        entry = {"epoch": trainer.current_epoch, "step": trainer.global_step, "val": val, "train": train, "gap": train - val}
        self.history.append(entry)
        best = self.best
        figures = {"ro_best": best["val"], "ro_best_epoch": best["epoch"], "ro_lost": best["val"] - val}
        log_figures(trainer, "monitor", {f"ro_{key}": entry[key] for key in ("val", "train", "gap")} | figures)
        waited = len(self.history) - 1 - self.history.index(best)
        if self.patience is not None and waited >= self.patience:
            trainer.should_stop = True

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.history and trainer.is_global_zero:
            best, last = self.best, self.history[-1]
            print(
                f"Robust overfitting: {self.monitor} {best['val']:.2%} at best (epoch {best['epoch']}), {last['val']:.2%} at "
                f"the end (epoch {last['epoch']}): {100 * (best['val'] - last['val']):.2f} points lost; {last['train']:.2%} on "
                f"training samples, a gap of {100 * last['gap']:.2f} points"
            )

    def state_dict(self) -> dict[str, Any]:
        return {"history": [dict(entry) for entry in self.history]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.history = [dict(entry) for entry in state_dict["history"]]

    def _train_accuracy(self, trainer: Trainer, pl_module: LightningModule) -> float:
        """Share of the training samples, over all processes, that are right on the image and under each attack."""
        found = [c for c in trainer.callbacks if isinstance(c, EvaluationAttack) and "validate" in c.stages]
        attacks = {a.name or type(a).__name__.lower(): a for a in found if not a.must_fit}
        counts = torch.zeros(2, device=pl_module.device)
        dtype = next(pl_module.parameters()).dtype
        plugin = trainer.precision_plugin
        with not_training(trainer), evaluating(pl_module), plugin.val_step_context(), torch.no_grad():
            for x, y, index in self._probe.chunks(pl_module.device, dtype):
                predictions = attack_batch(pl_module, attacks, x, y, index).predictions.values()
                right = torch.stack([prediction == y for prediction in predictions]).all(0)
                counts += torch.stack([right.sum(), torch.tensor(len(y), device=right.device)])
        right, samples = trainer.strategy.reduce(counts, reduce_op="sum").tolist()
        return right / max(samples, 1.0)
