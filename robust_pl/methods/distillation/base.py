"""The base of robust distillation: it asks the teachers, and a subclass says what the student learns from their answers."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.optim import SGD

from ...callbacks.attacks.base import Attack
from ...callbacks.attacks.checks import choose
from ...callbacks.monitors.compute import not_training
from ...functional.distillation import KL_REDUCTIONS, KLReduction, reduce_kl
from ...nets.teacher import Teacher, as_teacher
from ..base import Method, OptimizerFactory
from ..example import Example
from ..schedules import Schedule
from .cache import cacheable, cached_logits
from .igdm import IGDM
from .inspection import inspect_teachers


@dataclass
class TaughtExample(Example):
    """A batch with what the robust teacher says of it; no gradient flows into the teacher.

    Args:
        teacher_logits: of clean pixels, (B, K).
        teacher_logits_adv: of attacked pixels, (B, K).
        teacher_logits_away: of 2x - x_adv, (B, K), for IGDM.
    """

    teacher_logits: Tensor | None = None
    teacher_logits_adv: Tensor | None = None
    teacher_logits_away: Tensor | None = None


class Distillation(Method):
    """Learn from a trained teacher. A subclass defines :meth:`distil` and says which logits it needs for that.

    Teachers are asked while a batch is made, in :meth:`clean` and :meth:`craft`, and never by the loss: a weight perturbation
    that asks for the loss again asks no teacher. Before the training they are looked at on at most 256 images, those of the
    validation where there are some: one that has other classes or expects normalised pixels is refused, one that lacks what the
    method learns from it (robustness, accuracy) is warned about with the figure that was measured.

    Args:
        net: the student.
        teacher: maps pixels in [0, 1] to logits (B, K): a ``TrainedNet`` (a run, a checkpoint, a file of weights, a public
            name), a ``TimmModel``, a ``Teacher`` round any of them. Frozen in place; in no optimizer, average or checkpoint.
        attack: see :class:`Method`, and so all others that are not named here.
        igdm: an addition to the loss, see :class:`IGDM`; None adds nothing.
        kl_reduction: of every divergence: ``batchmean``, or ``mean`` over batch and classes as in most authors' codes, which is
            K times smaller.

    Raises:
        ValueError: if an argument is out of range; before the first step, if a teacher does not fit the data.
    """

    asks_clean: bool = True
    """Whether the robust teacher is asked for clean pixels."""
    asks_adversarial: bool = False
    """Whether the robust teacher is asked for attacked pixels, after the attack."""
    student_sees_clean: bool = True
    """Whether the loss needs the student's logits of clean pixels; if not, that pass is spared."""

    def __init__(
        self,
        net: nn.Module,
        teacher: nn.Module,
        attack: Attack | None = None,
        igdm: IGDM | None = None,
        kl_reduction: KLReduction = "batchmean",
        optimizer: OptimizerFactory = lambda params: SGD(params, lr=0.1, momentum=0.9, weight_decay=2e-4),
        schedule: Schedule | None = None,
        weights: str | None = None,
        num_classes: int = 10,
    ) -> None:
        super().__init__(net, attack, optimizer, schedule, weights, num_classes)
        choose("kl_reduction", kl_reduction, KL_REDUCTIONS)
        self.teacher = as_teacher(teacher)
        self.igdm, self.kl_reduction = igdm, kl_reduction
        self._cached: dict[str, Tensor] = {}

    @abstractmethod
    def distil(self, example: TaughtExample, logits_adv: Tensor, logits: Tensor | None) -> Tensor:
        """The training loss, a scalar, from the student's logits of attacked and (None unless asked for) of clean pixels."""

    def expectations(self) -> dict[str, str]:
        """What the method learns from each teacher, by attribute: ``robustness`` or ``accuracy``."""
        return {"teacher": "robustness"}

    # What subclasses build on ----------------------------------------------------------------------------------------

    def reduce(self, each: Tensor) -> Tensor:
        """Divergences of samples (B, ...) as one number (...), see ``kl_reduction``."""
        return reduce_kl(each, self.num_classes, self.kl_reduction)

    def student_logits(self, example: TaughtExample) -> tuple[Tensor, Tensor | None]:
        """The student's logits of attacked and of clean pixels, each normalised by its own batch."""
        logits_adv = self(example.x_adv)
        return logits_adv, self(example.x) if self.student_sees_clean else None

    def ask(self, name: str, x: Tensor, index: Tensor | None = None) -> Tensor:
        """Logits (B, K) of a teacher, without a graph.

        Args:
            name: of the attribute that holds it.
            x: pixels (B, C, H, W).
            index: of clean pixels (B,), which may have been asked before; None for others.
        """
        teacher: Teacher = getattr(self, name)
        if index is not None and teacher.cache:
            if name not in self._cached:
                self._cached[name] = cached_logits(self.trainer, teacher, self.device)
            return self._cached[name][index]
        with torch.no_grad():
            return teacher(x)

    def lr_factor(self) -> float:
        """Learning rate in units of that at the start, at most 1: the rates of balances and temperatures follow it."""
        group = self.optimizers().param_groups[0]
        first = group.get("initial_lr", group["lr"])
        return min(1.0, float(group["lr"] / first)) if first else 1.0

    # A step ----------------------------------------------------------------------------------------------------------

    def clean(self, batch: tuple[Tensor, ...]) -> TaughtExample:
        example = TaughtExample(**vars(super().clean(batch)))
        if not self.asks_clean:
            return example
        return replace(example, teacher_logits=self.ask("teacher", example.x, example.index))

    def craft(self, batch: tuple[Tensor, ...], eps: Tensor | None = None) -> TaughtExample:
        example = super().craft(batch, eps)
        if self.asks_adversarial or self.igdm is not None:
            example = replace(example, teacher_logits_adv=self.ask("teacher", example.x_adv))
        if self.igdm is not None:
            example = replace(example, teacher_logits_away=self.ask("teacher", 2 * example.x - example.x_adv))
        return example

    def loss(self, example: TaughtExample) -> Tensor:
        logits_adv, logits = self.student_logits(example)
        loss = self.distil(example, logits_adv, logits)
        if self.igdm is None:
            return loss
        away = self(2 * example.x - example.x_adv)
        return loss + self.igdm.loss(self, logits_adv, away, example.teacher_logits_adv, example.teacher_logits_away)

    # Lightning's hooks -----------------------------------------------------------------------------------------------

    @property
    def teachers(self) -> dict[str, Teacher]:
        """All teachers, by attribute."""
        return {name: module for name, module in self.named_children() if isinstance(module, Teacher)}

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage != "fit":
            return
        if self.attack is None:
            raise ValueError(f"{type(self).__name__} needs a training attack: set attack, such as PGD")
        if self.igdm is not None and self.trainer.max_epochs in (None, -1):
            raise ValueError("IGDM's weight grows over the run: set trainer.max_epochs")
        of_nets = [id(self.net), *(id(teacher.net) for teacher in self.teachers.values())]
        if len(set(of_nets)) < len(of_nets):
            raise ValueError("a teacher is the student itself, or two teachers are one network: pass a network for each")
        for name, teacher in self.teachers.items():
            if teacher.cache:
                cacheable(name, self.trainer.datamodule)

    def on_fit_start(self) -> None:
        super().on_fit_start()
        # Lightning's, of networks left in eval mode by mistake; teachers are meant to be.
        warnings.filterwarnings("ignore", message=r"Found \d+ module\(s\) in eval mode at the start of training")
        with not_training(self.trainer):
            inspect_teachers(self.trainer, self.teachers, self.expectations(), self.attack, self.num_classes)
        self._cached.clear()
