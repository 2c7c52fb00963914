"""The base of attacks that walk step by step along some direction."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from ...functional.geometry import Norm
from .base import Attack, ObjectiveName
from .best import Best
from .checks import DEFAULT_EPS, Number, RandomStart, check_step_size, choose
from .first import First
from .prepare import BNMode
from .problem import Problem
from .transforms import Transform

Keep = Literal["last", "best", "first"]
Memory = dict[str, Tensor]
"""What a walk remembers from one step to the next, such as its momentum: one row a sample in each tensor."""


class Iterative(Attack):
    """A walk: ``steps`` times one step of ``step_size`` along a direction, and back into ball and box.

    A subclass sets :attr:`reach` and may override :meth:`direction`. Cost: ``steps`` forward and backward passes, and one
    forward pass for each restart. ``keep="best"`` adds one forward pass for the last iterate; the others are judged by the
    pass of their gradient, or, where that saw something else than the iterate itself, by one more forward pass a step.
    ``keep="first"`` judges all iterates but the last in the same way and adds no pass for that one; a sample that is broken
    leaves the batch, see :class:`First`, and costs nothing from then on.

    Args:
        eps: see :class:`Attack`, and so all others that are not named here.
        step_size: length of a step in the norm; None takes ``reach * eps / steps``.
        steps: number of steps.
        keep: which iterate to return. ``last``: the last. ``best``: the first that fools the network, else that with the
            largest objective. ``first``: the first that fools it, else the last; so the samples that stand are those of
            ``best``, for fewer passes. With ``best`` or ``first`` and a fixed ``step_size`` more steps never succeed less
            (with restarts too, if the random numbers belong to samples, as in an evaluation). In training ``first`` is
            the early-stopped PGD of friendly adversarial training (Zhang et al. 2020, arXiv 2002.11242, their tau = 0);
            nothing waits there: a device other than the CPU computes the whole batch, and so do all under a ``bn_mode``
            other than ``eval``, in which samples depend on each other.
        transforms: of the network's inputs and of gradients, in the order in which they are applied.
    """

    reach: float = 2.5
    """How far all steps go together, in units of eps, unless ``step_size`` is given."""

    def __init__(
        self,
        eps: Number | Tensor = DEFAULT_EPS,
        step_size: Number | None = None,
        steps: int = 10,
        *,
        norm: Norm = "linf",
        random_start: RandomStart = False,
        restarts: int = 1,
        targeted: bool = False,
        objective: ObjectiveName | None = None,
        keep: Keep = "last",
        transforms: Sequence[Transform] | None = None,
        bn_mode: BNMode = "eval",
        seed: int = 0,
    ) -> None:
        super().__init__(
            eps,
            norm=norm,
            random_start=random_start,
            restarts=restarts,
            targeted=targeted,
            objective=objective,
            bn_mode=bn_mode,
            seed=seed,
        )
        if not isinstance(steps, int) or steps < 1:
            raise ValueError(f"steps={steps} must be a whole number of at least 1")
        choose("keep", keep, ("last", "best", "first"))
        self.step_size = check_step_size(step_size)
        self.steps, self.keep = steps, keep
        self.transforms = tuple(transforms or ())

    @property
    def is_random(self) -> bool:
        return super().is_random or any(transform.is_random for transform in self.transforms)

    def step_length(self, problem: Problem) -> float | Tensor:
        """Length of a step in the norm, a number or (B, 1, 1, 1)."""
        return self.reach * problem.eps / self.steps if self.step_size is None else self.step_size

    def direction(self, problem: Problem, x_adv: Tensor, memory: Memory) -> tuple[Tensor, Tensor | None]:
        """Where to go from ``x_adv``, of any length, (B, C, H, W); and the logits of ``x_adv`` if they were seen, (B, K).

        Args:
            problem: what is attacked.
            x_adv: the iterate.
            memory: empty at the first step, and the same at all of them.
        """
        return self.gradient(problem, x_adv)

    def gradient(self, problem: Problem, x_adv: Tensor) -> tuple[Tensor, Tensor | None]:
        """Gradient of the objective at ``x_adv`` through all transforms, and the logits there unless they change the inputs.

        Args:
            problem: what is attacked.
            x_adv: pixels (B, C, H, W), or the batch n times over, (nB, C, H, W).
        """
        if not self.transforms:
            return problem.gradient_and_logits(x_adv)
        # Half precision is for the network.
        exactly = partial(torch.autocast, x_adv.device.type, enabled=False)
        with exactly():
            origin = x_adv.detach().requires_grad_()
            inputs = origin
            for transform in self.transforms:
                inputs = transform.inputs(inputs, problem)
        gradient, logits = problem.gradient_and_logits(inputs)
        with exactly():
            if inputs is not origin:
                gradient, logits = _through(inputs, origin, gradient), None
            for transform in self.transforms:
                gradient = transform.gradient(gradient)
        return gradient, logits

    def perturb(self, problem: Problem, x: Tensor, y: Tensor) -> Tensor:
        step, memory = self.step_length(problem), Memory()
        best = Best(problem) if self.keep == "best" else None
        x_adv = problem.random_start(self.random_start)
        if self.keep != "last":
            x_adv = problem.project(x_adv)  # since it may be returned, and TRADES' start may lie outside
        if self.keep == "first":
            return self._until_broken(problem, x_adv)
        for _ in range(self.steps):
            direction, logits = self.direction(problem, x_adv, memory)
            if best is not None:
                best.offer(x_adv, problem.logits(x_adv) if logits is None else logits)
            x_adv = problem.project(x_adv + step * problem.steepest(direction))
        if best is None:
            return x_adv
        best.offer(x_adv, problem.logits(x_adv))
        return best.x_adv

    def _until_broken(self, problem: Problem, start: Tensor) -> Tensor:
        # A part of a batch is made only where somebody has waited already.
        walk = First(problem, start, self.bn_mode == "eval" and (problem.careful or problem.ids is not None))
        memory = Memory()
        for _ in range(self.steps):
            part, x_adv = walk.problem, walk.x_adv
            direction, logits = self.direction(part, x_adv, memory)
            ahead = part.project(x_adv + self.step_length(part) * part.steepest(direction))
            walk.step(part.logits(x_adv) if logits is None else logits, ahead)
            if not walk.let_go(memory):
                break
        return walk.result()


def _through(inputs: Tensor, origin: Tensor, gradient: Tensor) -> Tensor:
    """Gradient with respect to ``origin`` (B, ...) of the mean over the copies of it that ``inputs`` (nB, ...) are."""
    copies = len(inputs) // len(origin)
    return torch.autograd.grad(inputs, origin, gradient / copies)[0]
