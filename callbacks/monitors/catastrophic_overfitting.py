"""Catastrophic overfitting: a network that single steps no longer harm, and several steps break."""

from __future__ import annotations

from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from ..attacks.base import Attack
from ..attacks.checks import Number, check_eps, choose
from ..attacks.prepare import evaluating
from .compute import not_training
from .probe import ProbeSet, log_figures
from .signals import SIGNALS, co_figures, co_sums
from .snapshot import Snapshot

Action = Literal["warn", "stop", "rollback"]
ACTIONS: tuple[str, ...] = ("warn", "stop", "rollback")


class CatastrophicOverfitting(Callback):
    """Watches for catastrophic overfitting (Wong et al. 2020, arXiv 2001.03994) on a fixed set of training samples.

    In eval mode it takes the accuracy under FGSM without random start and under PGD, the cosine between input gradients at a
    sample and at a random point of its ball (Andriushchenko and Flammarion 2020, arXiv 2007.02617; here that point lies in the
    pixel range, too), and asks whether the network takes FGSM's perturbation itself for the class that it was made for, alone
    on grey and on an image of another class (self-information, He et al. 2023, arXiv 2302.11963; that paper has the idea, the
    procedure is ours). There is an event when any of these rules, each switched off by None, begins to hold:

    - ``drop``: PGD accuracy fell by more than this since the last look, Fast-AT's rule with 0.2 an epoch;
    - ``gap``: FGSM minus PGD accuracy is above this and FGSM accuracy rose (ours). In large balls single steps miss much even
      before a collapse: a CNN trained by FGSM on the digits at eps=0.2 reaches 0.25 so; take 0.4 there;
    - ``cosine``: below this; 0.2 is ours, a sound network is known from memory to have 0.6 to 0.9;
    - ``above_clean``: FGSM minus clean accuracy is above this (ours);
    - ``ratio``: FGSM over clean accuracy is above this, FGSM-LAW's rule (Jia et al. 2024, arXiv 2308.11443). It depends on the
      data, 0.82 on CIFAR-10, so it is off by default;
    - ``self_information``: that share of perturbations is taken for their class, alone or on another image (0.5 is ours).

    It ends when none holds and the gap is closed, and may recur. Logged as ``monitor/co_...`` at every look, with the number of
    ``events``. A run in which it only warns ends with the same weights, bit for bit, as one without it. Costs steps + 5 forward
    and steps + 1 backward passes a sample and look: 3,840 + 2,816 with the defaults; :class:`ComputeMonitor` tells them apart.

    Args:
        every_n_steps: look after every so many optimizer steps; None looks at the end of every epoch.
        samples: size of the fixed set, spread over the training set, without augmentation where the data module is one of ours.
        eps: radius; None takes that of the training attack, and so its norm, else linf.
        steps: of PGD, each of eps / 4.
        smoothing: weight of the past in an exponential average of every signal, in [0, 1); 0 takes each look as it is.
        drop: see above, and so ``gap``, ``cosine``, ``above_clean``, ``ratio``, ``self_information``.
        gap: see above.
        cosine: see above.
        above_clean: see above.
        ratio: see above.
        self_information: see above.
        action: at an event ``warn`` prints a line, ``stop`` ends the run, ``rollback`` goes back to the weights and optimizer
            state of the last good look, which it holds in memory; the learning rate goes on. Weight averages are not turned
            back. A resumed run takes the weights it resumes from for good ones, unless it was in an event.
        step_factor: the step size of the training attack is multiplied by this at each rollback; 1 leaves it.
        max_rollbacks: after so many rollbacks the next one also ends the run; 0 goes back and stops at the first event.

    Raises:
        ValueError: if an argument is out of range, or there is neither eps nor a training attack with a number as its radius.
    """

    def __init__(
        self,
        every_n_steps: int | None = None,
        samples: int = 256,
        eps: Number | None = None,
        steps: int = 10,
        smoothing: float = 0.0,
        drop: float | None = 0.2,
        gap: float | None = 0.25,
        cosine: float | None = 0.2,
        above_clean: float | None = 0.02,
        ratio: float | None = None,
        self_information: float | None = 0.5,
        action: Action = "warn",
        step_factor: float = 0.5,
        max_rollbacks: int = 3,
    ) -> None:
        for name, value, least in (
            ("every_n_steps", 1 if every_n_steps is None else every_n_steps, 1),
            ("samples", samples, 2),
            ("steps", steps, 1),
            ("max_rollbacks", max_rollbacks, 0),
        ):
            if value < least:
                raise ValueError(f"{name}={value} must be at least {least}")
        if not 0 <= smoothing < 1:
            raise ValueError(f"smoothing={smoothing} must lie in [0, 1): 0 switches it off")
        if not 0 < step_factor <= 1:
            raise ValueError(f"step_factor={step_factor} must lie in (0, 1]: 1 leaves the step size as it is")
        choose("action", action, ACTIONS)
        self.every_n_steps, self.samples, self.steps = every_n_steps, samples, steps
        self.eps = None if eps is None else check_eps(eps, "linf")
        self.smoothing, self.action = smoothing, action
        self.drop, self.gap, self.cosine = drop, gap, cosine
        self.above_clean, self.ratio, self.self_information = above_clean, ratio, self_information
        self.step_factor, self.max_rollbacks = step_factor, max_rollbacks
        self.figures: dict[str, float] = {}
        self.events = self.rollbacks = 0
        self.overfit = False
        self._probe = ProbeSet(samples)
        self._good: tuple[Snapshot, dict[str, float]] | None = None
        self._looked_at = -1
        self._scaled = self._resumed_scale = 1.0

    def rules(self, now: dict[str, float], before: dict[str, float]) -> list[str]:
        """Names of the rules that hold, given the signals of this look and of the last one (empty at the first)."""
        rose = now["fgsm"] > before.get("fgsm", -1.0)
        above = {
            "drop": before.get("pgd", 0.0) - now["pgd"],
            "gap": now["gap"] if rose else 0.0,
            "cosine": now.get("cosine", 1.0),
            "above_clean": now["fgsm"] - now["clean"],
            "ratio": now.get("ratio", 0.0),
            "self_information": max(now["self_alone"], now.get("self_other", 0.0)),
        }
        bounds = {name: getattr(self, name) for name in above if getattr(self, name) is not None}
        return [n for n, bound in bounds.items() if (above[n] < bound if n == "cosine" else above[n] > bound)]

    def look(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure, judge and act; all processes together."""
        eps, norm = self._ball(pl_module)
        sums = torch.zeros(SIGNALS, device=pl_module.device)
        plugin = trainer.precision_plugin
        with not_training(trainer), evaluating(pl_module), plugin.val_step_context(), torch.no_grad():
            dtype = next(pl_module.parameters()).dtype
            for x, y, index in self._probe.chunks(pl_module.device, dtype):
                sums += co_sums(pl_module, x, y, index, eps=eps, norm=norm, step_size=eps / 4, steps=self.steps)
        before, found, kept = self.figures, co_figures(trainer, sums), self.smoothing
        if not found:
            return
        self.figures = {key: kept * before.get(key, value) + (1 - kept) * value for key, value in found.items()}
        held = self.rules(self.figures, before)
        was, still_open = self.overfit, self.gap is not None and self.figures["gap"] > self.gap
        self.overfit = bool(held) or (was and still_open)
        if self.overfit and not was:
            self.events += 1
        log_figures(trainer, "monitor", {f"co_{key}": value for key, value in (self.figures | self._state()).items()})
        if self.overfit and not was:
            self._act(trainer, pl_module, held)
        elif not self.overfit and self.action == "rollback":
            self._good = Snapshot(trainer, pl_module), self.figures

    def _state(self) -> dict[str, float]:
        return {"overfit": float(self.overfit), "events": float(self.events), "rollbacks": float(self.rollbacks)}

    def _act(self, trainer: Trainer, pl_module: LightningModule, held: list[str]) -> None:
        now = self.figures
        said = ", ".join(f"{key} {now[key]:.3g}" for key in ("clean", "fgsm", "pgd", "cosine", "self_alone") if key in now)
        line = f"Catastrophic overfitting at step {trainer.global_step} ({', '.join(held)}; {said}), event {self.events}"
        if self.action == "rollback" and self._good is not None:
            line += f": back to step {self._good[0].step}"
            self._go_back(trainer, pl_module)
            if self.rollbacks > self.max_rollbacks:
                trainer.should_stop = True
            elif self.step_factor < 1:
                self._scale(pl_module, self.step_factor)
                line += f" with a step size of {pl_module.attack.step_size:.4g}"
        elif self.action != "warn":
            trainer.should_stop = True
        if trainer.is_global_zero:
            print(line + (": the run stops" if trainer.should_stop else ""))

    def _go_back(self, trainer: Trainer, pl_module: LightningModule) -> None:
        snapshot, self.figures = self._good
        snapshot.restore(trainer, pl_module)
        self.rollbacks += 1
        self.overfit = False

    def _scale(self, pl_module: LightningModule, factor: float) -> None:
        attack = pl_module.attack
        if attack.step_size is None:
            attack.step_size = getattr(attack, "reach", 1.0) * attack.eps / getattr(attack, "steps", 1)
        attack.step_size = attack.step_size * factor
        self._scaled *= factor

    def _ball(self, pl_module: LightningModule) -> tuple[float, Any]:
        attack = getattr(pl_module, "attack", None)
        attack = attack if isinstance(attack, Attack) else None
        eps = self.eps if self.eps is not None else getattr(attack, "eps", None)
        if not isinstance(eps, float | int):
            raise ValueError("eps=None needs a training attack with a number as its radius: give CatastrophicOverfitting eps")
        return float(eps), "linf" if attack is None else attack.norm

    # Lightning's hooks -----------------------------------------------------------------------------------------------

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._ball(pl_module)
        can_scale = hasattr(getattr(pl_module, "attack", None), "step_size")
        if self.action == "rollback" and self.step_factor < 1 and not can_scale:
            raise ValueError(f"step_factor={self.step_factor} needs a training attack with a step_size: set step_factor=1")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._probe.read(trainer)
        self._looked_at = trainer.global_step
        if self._resumed_scale != 1:  # the attack is as the config has it
            self._scaled, factor = 1.0, self._resumed_scale
            self._scale(pl_module, factor)
            self._resumed_scale = 1.0
        if self.action == "rollback" and self.figures and not self.overfit:
            self._good = Snapshot(trainer, pl_module), self.figures

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._probe.collect(batch)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        every, step = self.every_n_steps, trainer.global_step
        if every is not None and step // every > self._looked_at // every:
            self._looked_at = step
            self.look(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.every_n_steps is None:
            self.look(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        counts = {"events": self.events, "rollbacks": self.rollbacks, "overfit": self.overfit, "scaled": self._scaled}
        return {**counts, "figures": dict(self.figures)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.events, self.rollbacks, self.overfit = (state_dict[k] for k in ("events", "rollbacks", "overfit"))
        self._resumed_scale, self.figures = state_dict["scaled"], dict(state_dict["figures"])
