"""Learning-rate schedules that know how long the run is, so that ``max_epochs`` is said once."""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Literal

from torch.optim import Optimizer
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    LambdaLR,
    LinearLR,
    LRScheduler,
    MultiStepLR,
    OneCycleLR,
    SequentialLR,
)

Interval = Literal["step", "epoch"]


class Schedule(ABC):
    """Builds a PyTorch scheduler for a run of a given length.

    ``interval`` says whether the scheduler moves after every optimizer step or after every epoch.
    """

    interval: Interval = "epoch"
    uses_length: bool = True
    """Whether a run of another length has another schedule."""

    def length(self, run: int) -> int:
        """Steps or epochs that it is laid over in a run of so many: as many, unless it is given a length of its own.

        Raises:
            ValueError: if its own does not reach to the run's end.
        """
        return run

    @abstractmethod
    def build(self, optimizer: Optimizer, length: int) -> LRScheduler:
        """A scheduler for ``length`` steps or epochs, whichever ``interval`` names."""


class MultiStep(Schedule):
    """Drops of the learning rate, as in Rice et al. 2020: by 10 at half and at three quarters of the run.

    Args:
        milestones: where to drop, as fractions of the run in (0, 1), or as epochs if above 1.
        gamma: factor of each drop.
        interval: ``epoch``, or ``step`` to place fractional drops inside an epoch.

    Raises:
        ValueError: if fractions and epochs are mixed, or milestones do not rise.
    """

    def __init__(self, milestones: Sequence[float] = (0.5, 0.75), gamma: float = 0.1, interval: Interval = "epoch") -> None:
        if list(milestones) != sorted(milestones) or any(m <= 0 for m in milestones):
            raise ValueError(f"milestones={list(milestones)} must rise from above 0")
        self.fractions = all(m < 1 for m in milestones)
        if not self.fractions and not all(m >= 1 and float(m).is_integer() for m in milestones):
            raise ValueError(f"milestones={list(milestones)} mix fractions of the run and epochs: use one of them")
        if not self.fractions and interval == "step":
            raise ValueError("milestones in epochs need interval='epoch'")
        self.uses_length = self.fractions
        self.milestones, self.gamma, self.interval = list(milestones), gamma, interval

    def build(self, optimizer: Optimizer, length: int) -> LRScheduler:
        at = [round(m * length) if self.fractions else int(m) for m in self.milestones]
        return MultiStepLR(optimizer, at, self.gamma)


class Cosine(Schedule):
    """Cosine decay to ``final_lr`` after an optional linear warm-up.

    Args:
        warmup: fraction of the run in [0, 1) that the learning rate takes to rise to the optimizer's.
        final_lr: learning rate at the end.
        interval: ``step`` or ``epoch``.

    Raises:
        ValueError: if warmup is not in [0, 1).
    """

    def __init__(self, warmup: float = 0.0, final_lr: float = 0.0, interval: Interval = "step") -> None:
        if not 0 <= warmup < 1:
            raise ValueError(f"warmup={warmup} is a fraction of the run: choose from [0, 1)")
        self.warmup, self.final_lr, self.interval = warmup, final_lr, interval

    def build(self, optimizer: Optimizer, length: int) -> LRScheduler:
        rise = round(self.warmup * length)
        decay = CosineAnnealingLR(optimizer, max(length - rise, 1), self.final_lr)
        if not rise:
            return decay
        # The rise ends at the first step of the decay, which has the full rate.
        start = LinearLR(optimizer, start_factor=1 / (rise + 1), total_iters=rise)
        return SequentialLR(optimizer, [start, decay], [rise])


class OneCycle(Schedule):
    """One cycle up and down (Smith and Topin 2017, arXiv 1708.07120), as PyTorch's ``OneCycleLR`` makes it.

    The learning rate starts at max_lr / 25, is max_lr after ``pct_start`` of the cycle, and ends at max_lr / 250,000.

    Args:
        max_lr: peak; None takes the optimizer's learning rate.
        pct_start: fraction of the cycle spent rising.
        anneal_strategy: ``cos`` or ``linear``.
        interval: ``step``, or ``epoch`` to keep the rate over each epoch.
        cycle_momentum: also move the momentum (Adam's first beta) against the rate: 0.95 at the start, 0.85 at the peak, 0.95
            at the end, whatever the optimizer was given. False leaves it as it is.
        total_steps: length of the cycle, in steps or epochs as ``interval`` says, where it is not that of the run, which may
            then end within the cycle; None lays it over the whole run.

    Raises:
        ValueError: if total_steps is not positive or less than the run has, or the optimizer has no momentum to cycle.
    """

    def __init__(
        self,
        max_lr: float | None = None,
        pct_start: float = 0.3,
        anneal_strategy: Literal["cos", "linear"] = "cos",
        interval: Interval = "step",
        cycle_momentum: bool = False,
        total_steps: int | None = None,
    ) -> None:
        if total_steps is not None and total_steps < 1:
            raise ValueError(f"total_steps={total_steps} is the length of the cycle in {interval}s: give at least 1, or null")
        self.max_lr, self.pct_start, self.interval = max_lr, pct_start, interval
        self.anneal_strategy: Literal["cos", "linear"] = anneal_strategy
        self.cycle_momentum, self.total_steps = cycle_momentum, total_steps

    def length(self, run: int) -> int:
        if self.total_steps is not None and self.total_steps < run:
            raise ValueError(
                f"total_steps={self.total_steps} of OneCycle ends before the run, which has {run} {self.interval}s: give at "
                "least as many, or leave it out to lay the cycle over the whole run"
            )
        return run if self.total_steps is None else self.total_steps

    def build(self, optimizer: Optimizer, length: int) -> LRScheduler:
        if self.cycle_momentum and not {"momentum", "betas"} & optimizer.defaults.keys():
            raise ValueError(
                f"cycle_momentum=True moves a momentum, and {type(optimizer).__name__} has none: set it to False, or take an "
                "optimizer such as SGD"
            )
        # Lightning doubts that anyone means to keep its rate over an epoch.
        warnings.filterwarnings("ignore", message="A `OneCycleLR` scheduler is using 'interval': 'epoch'")
        peak = self.max_lr or [group["lr"] for group in optimizer.param_groups]
        # A rise that is over at the first step would be one of no steps, by whose number PyTorch divides.
        pct_start = math.nextafter(self.pct_start, 0) if self.pct_start * length == 1 else self.pct_start
        return OneCycleLR(
            optimizer,
            peak,
            total_steps=length,
            pct_start=pct_start,
            anneal_strategy=self.anneal_strategy,
            cycle_momentum=self.cycle_momentum,
        )


class SlowStartFastDecay(Schedule):
    """Slow start, fast decay: for adversarial fine-tuning (Jeddi et al. 2020, arXiv 2012.13628), step by step.

    The learning rate rises linearly from ``start`` times the optimizer's to the optimizer's own over the share ``warmup`` of
    the run, then decays exponentially to ``end`` times it: a high rate at once would destroy what the network has learned, a
    low one throughout would not make it robust. The exact curve is a reconstruction: we know the paper's description of its
    shape and not its numbers, so this form and its defaults are ours.

    Args:
        warmup: share of the run in [0, 1) that the rise takes.
        start: first learning rate, as a fraction of the optimizer's.
        end: learning rate that the decay would reach at the end of the run, as a fraction of the optimizer's.

    Raises:
        ValueError: if warmup is not in [0, 1), or start or end not in (0, 1].
    """

    interval: Interval = "step"

    def __init__(self, warmup: float = 0.25, start: float = 0.1, end: float = 1e-4) -> None:
        if not 0 <= warmup < 1:
            raise ValueError(f"warmup={warmup} is a share of the run: choose from [0, 1)")
        for name, value in (("start", start), ("end", end)):
            if not 0 < value <= 1:
                raise ValueError(f"{name}={value} is a fraction of the optimizer's learning rate: choose from (0, 1]")
        self.warmup, self.start, self.end = warmup, start, end

    def build(self, optimizer: Optimizer, length: int) -> LRScheduler:
        rise = self.warmup * length

        def factor(step: int) -> float:
            if step < rise:
                return self.start + (1 - self.start) * step / rise
            return self.end ** ((step - rise) / (length - rise))

        return LambdaLR(optimizer, factor)


class TorchSchedule(Schedule):
    """Any scheduler of ``torch.optim.lr_scheduler`` that does not need to know the length of the run.

    Args:
        scheduler: its class path and arguments, but for the optimizer.
        interval: ``step`` or ``epoch``.
    """

    uses_length = False

    def __init__(self, scheduler: Callable[[Optimizer], LRScheduler], interval: Interval = "epoch") -> None:
        self.scheduler, self.interval = scheduler, interval

    def build(self, optimizer: Optimizer, length: int) -> LRScheduler:
        return self.scheduler(optimizer)
