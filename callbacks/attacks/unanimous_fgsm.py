"""MultiGrad's attack: one step along those signs of the gradient on which several random points of the ball agree."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import Attack, ObjectiveName
from .checks import DEFAULT_EPS, Number, check_count
from .prepare import BNMode
from .problem import Problem


class UnanimousFGSM(Attack):
    """The training attack of MultiGrad (Golgooni et al. 2021, arXiv 2103.15476): FGSM where gradients agree, linf.

    With G the sum of sign(g_n) over gradients at ``starts`` points x + U(-eps, eps), each cut to the box, the result is
    x + eps * sign(G) where |G| >= 2 * agree - starts, which is where ``agree`` signs of ``starts`` are the same, and x
    elsewhere, cut to the box. The authors' code steps by 2 eps from x and clips to eps, which is the same. All starts go
    through the network as one batch of ``starts`` * B, the parallel form of their code: BatchNorm in train mode normalises by
    all of them and moves its statistics once. Cost: ``starts`` forward and as many backward passes.

    Args:
        eps: radius.
        starts: random points of each sample; the authors take 3.
        agree: how many signs must be the same; None asks for all.
        objective: see :class:`Attack`, and so all others.

    Raises:
        ValueError: if starts is no whole number of at least 1, or agree is not above half of it and at most all of it.
    """

    def __init__(
        self,
        eps: Number | Tensor = DEFAULT_EPS,
        starts: int = 3,
        agree: int | None = None,
        *,
        objective: ObjectiveName | None = None,
        bn_mode: BNMode = "train",
        seed: int = 0,
    ) -> None:
        super().__init__(eps, random_start=True, objective=objective, bn_mode=bn_mode, seed=seed)
        check_count("starts", starts)
        if agree is not None and not starts < 2 * agree <= 2 * starts:
            raise ValueError(
                f"agree={agree} is how many of {starts} signs are the same: choose more than half, or null for all"
            )
        self.starts, self.agree = starts, agree

    def perturb(self, problem: Problem, x: Tensor, y: Tensor) -> Tensor:
        points = torch.cat([problem.random_start(self.random_start) for _ in range(self.starts)])
        votes = problem.gradient(points).sign().view(self.starts, *x.shape).sum(0)
        agree = self.starts if self.agree is None else self.agree
        agreed = votes.abs() >= 2 * agree - self.starts
        return problem.project(x + problem.eps * votes.sign() * agreed)
