"""ZeroGrad's attack: one step from a random start that leaves out the pixels with the smallest gradients."""

from __future__ import annotations

import math

from torch import Tensor

from .base import Attack, ObjectiveName
from .checks import DEFAULT_EPS, Number, check_step_size
from .prepare import BNMode
from .problem import Problem


class ZeroedFGSM(Attack):
    """The training attack of ZeroGrad (Golgooni et al. 2021, arXiv 2103.15476): FGSM without small gradients, linf.

    From x + U(-eps, eps), cut to the box, it steps by step_size * sign(g) where |g| is at least the q-quantile of the sample's
    |g| over channels and pixels, and is projected onto ball and box. At the default step of 2 eps every entry that is kept ends
    at x +- eps, and every other one keeps its random start. Where the quantile lies between two entries the larger one is
    taken: the entries kept are those that ``torch.quantile``, which interpolates, keeps. Cost: one forward and one backward
    pass.

    Args:
        eps: radius.
        q: share of the entries that do not step. The authors take 0.35 on CIFAR-10, 0.45 on CIFAR-100 and 0.7 on SVHN; long
            runs need more.
        step_size: length of the step; None takes 2 eps.
        objective: see :class:`Attack`, and so all others.

    Raises:
        ValueError: if q is not in [0, 1).
    """

    def __init__(
        self,
        eps: Number | Tensor = DEFAULT_EPS,
        q: float = 0.35,
        step_size: Number | None = None,
        *,
        objective: ObjectiveName | None = None,
        bn_mode: BNMode = "train",
        seed: int = 0,
    ) -> None:
        super().__init__(eps, random_start=True, objective=objective, bn_mode=bn_mode, seed=seed)
        if not 0 <= q < 1:
            raise ValueError(f"q={q} is the share of the entries that do not step: choose from [0, 1)")
        self.q, self.step_size = q, check_step_size(step_size)

    def perturb(self, problem: Problem, x: Tensor, y: Tensor) -> Tensor:
        start = problem.random_start(self.random_start)
        gradient = problem.gradient(start)
        step = 2 * problem.eps if self.step_size is None else self.step_size
        return problem.project(start + step * gradient.sign() * self._large(gradient))

    def _large(self, gradient: Tensor) -> Tensor:
        """Which entries step, bool (B, C, H, W)."""
        size = gradient.abs()
        flat = size.flatten(1)
        rank = math.ceil(self.q * (flat.shape[1] - 1) - 1e-9)  # 0.55 * 20 is above 11
        # kthvalue is refused on GPUs that are asked to be deterministic, torch.quantile for large batches, and sort is slow.
        smallest = flat.topk(flat.shape[1] - rank, dim=1, sorted=False).values.amin(1)
        return size >= smallest.view(-1, 1, 1, 1)
