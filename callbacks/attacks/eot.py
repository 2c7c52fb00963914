"""EoT: an attack on the expected gradient of a randomised network."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .base import Attack
from .problem import Problem
from .wrapper import Wrapper


class EoT(Wrapper):
    """Expectation over transformation (Athalye et al. 2018, arXiv 1707.07397; as a wrapper of attacks 1802.00420).

    Wherever the wrapped attack asks for a gradient, a Jacobian or logits, it gets their mean over ``samples`` passes, each of
    which sees the network's randomness afresh. A network that draws from torch's global stream moves that stream. On a
    network without randomness the result is that of the attack alone. Cost: ``samples`` times the attack's own passes.

    Args:
        attack: any attack; its eps, norm, target, objective and seed hold.
        samples: passes that are averaged.
    """

    def __init__(self, attack: Attack, samples: int = 20) -> None:
        super().__init__(attack)
        if samples < 1:
            raise ValueError(f"samples={samples} must be at least 1")
        self.passes = samples  # `samples` counts those that were attacked

    def seen_by_attack(self, problem: Problem) -> Problem:
        return ExpectedProblem(problem, self.passes)


class ExpectedProblem(Problem):
    """A problem whose network is seen through the mean of several passes; it counts as spent what they are.

    Args:
        problem: the same problem with single passes.
        samples: number of passes.
    """

    def __init__(self, problem: Problem, samples: int) -> None:
        vars(self).update(vars(problem))
        self.passes = samples

    def logits(self, x_adv: Tensor) -> Tensor:
        return self._mean(lambda: (super(ExpectedProblem, self).logits(x_adv),))[0]

    def gradient_and_logits(self, x_adv: Tensor, objective: Callable[[Tensor], Tensor] | None = None) -> tuple[Tensor, Tensor]:
        gradient, logits = self._mean(lambda: super(ExpectedProblem, self).gradient_and_logits(x_adv, objective))
        return gradient, logits

    def jacobian(self, x_adv: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
        jacobian, logits = self._mean(lambda: super(ExpectedProblem, self).jacobian(x_adv, classes))
        return jacobian, logits

    def _mean(self, once: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        mean = once()
        for count in range(2, self.passes + 1):
            # A running mean of equal numbers is that number to the last bit, which their sum over their count is not.
            mean = tuple(torch.lerp(old, new, 1 / count) for old, new in zip(mean, once(), strict=True))
        return mean
