"""NIM: momentum whose gradient is taken one step ahead."""

from __future__ import annotations

from torch import Tensor

from ...functional.perturbation import per_pixel
from .iterative import Memory
from .mim import MIM
from .problem import Problem


class NIM(MIM):
    """Nesterov iterative method, NI-FGSM (Lin et al. 2020, arXiv 1908.06281): :class:`MIM` that looks ahead.

    The gradient is taken at ``x_adv + step_size * decay * momentum``, not cut to ball or box, as public codes do. The paper
    treats linf; under l2 and l1 the step is spread over the pixels, so that the look-ahead is about as long as a step. With
    ``transforms=[ScaleCopies()]`` it is SI-NI-FGSM. Cost: that of :class:`MIM`, but ``keep="best"`` adds ``steps + 1``
    forward passes, since no gradient is taken at the iterates.

    Args:
        eps: see :class:`MIM`, and so all others.
    """

    def direction(self, problem: Problem, x_adv: Tensor, memory: Memory) -> tuple[Tensor, Tensor | None]:
        ahead = x_adv
        if "momentum" in memory:
            step = per_pixel(self.step_length(problem), x_adv, self.norm)
            ahead = x_adv + step * self.decay * memory["momentum"]
        direction, _ = super().direction(problem, ahead, memory)
        return direction, None
