"""Bandits-TD: a gradient estimate that is learnt over the steps, on tiles."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ...functional.geometry import Norm, steepest
from .checks import DEFAULT_EPS, Number, check_step_size, choose
from .prepare import BNMode
from .problem import Problem
from .query import QueryAttack, QueryObjective, Search, always


class Bandits(QueryAttack):
    """Bandits-TD (Ilyas et al. 2019, arXiv 1807.07978): score-based ascent along a prior that every two queries improve.

    The prior p is a coarse gradient (C, ``prior_size``, ``prior_size``) that starts at 0. Each iteration asks for the loss at
    x + fd_eta * q / |q| for the enlarged q = p + exploration * u and q = p - exploration * u, u Gaussian with an expected
    length of about one; the difference over (fd_eta * exploration) times u moves p by ``prior_lr``, and x steps along the
    enlarged p. Under linf p stays in (-1, 1) and moves by exponentiated gradient (it is kept as its inverse tanh, in which
    that is addition and never overflows), under l2 by addition. As in public codes the probes may leave ball and box by
    fd_eta (in l2).

    The defaults of ``prior_lr``, ``exploration``, ``fd_eta`` and ``objective`` are our own: among the best of a dozen on 24
    images of CIFAR-10 and a ResNet-20 at 8/255 and 400 queries, where cross-entropy, as published, fooled fewer, since it is
    flat where the network is sure. The authors' ImageNet setting is 100, 1.0, 0.1 with 50 tiles for linf at 0.05, and 0.001,
    0.01, 0.01 for l2 at 5.0; their code gives that 0.001 as 0.1, since it multiplies the estimate of the paper's algorithm by
    ``exploration`` once more.

    Cost: one forward pass at x, and 3 an iteration, as often as ``n_queries`` allows and until the first success. The third
    is the look whether the new image is a success, which published figures leave out: they count 2. No backward pass.

    Args:
        step_size: length of a step in the norm; None takes eps / 5 for linf and eps / 10 for l2, the ratios of the authors.
        prior_size: tiles a side, at most the image's; None takes one tile a pixel.
        prior_lr: step of the prior.
        exploration: how far from the prior the probes look.
        fd_eta: how far from x the probes are, in l2.
        n_queries: most queries of a sample, at least 1.
        eps: see :class:`Attack`, and so all others.
        norm: ``linf`` or ``l2``.
        objective: ``margin``, or ``ce`` as published.
    """

    def __init__(
        self,
        eps: Number | Tensor = DEFAULT_EPS,
        step_size: Number | None = None,
        prior_size: int | None = 20,
        prior_lr: float = 0.003,
        exploration: float = 0.1,
        fd_eta: Number = 0.1,
        *,
        norm: Norm = "linf",
        n_queries: int = 10000,
        targeted: bool = False,
        objective: QueryObjective = "margin",
        bn_mode: BNMode = "eval",
        seed: int = 0,
    ) -> None:
        choose("norm", norm, ("linf", "l2"))
        if prior_size is not None and (not isinstance(prior_size, int) or prior_size < 1):
            raise ValueError(f"prior_size={prior_size} must be a whole number of at least 1, or None for one tile a pixel")
        for field, value in (("prior_lr", prior_lr), ("exploration", exploration), ("fd_eta", fd_eta)):
            if not 0 < value < float("inf"):
                raise ValueError(f"{field}={value} must be a finite number above 0, such as 0.1")
        super().__init__(
            eps, n_queries=n_queries, norm=norm, targeted=targeted, objective=objective, bn_mode=bn_mode, seed=seed
        )
        self.step_size = check_step_size(step_size)
        self.prior_size, self.prior_lr, self.exploration, self.fd_eta = prior_size, prior_lr, exploration, fd_eta

    def perturb(self, problem: Problem, x: Tensor, y: Tensor) -> Tensor:
        search = Search(problem, x, self.n_queries)
        search.kept["learnt"] = x.new_zeros(*x.shape[:2], *self.tiles(x))
        while search.goes_on(3):
            part, x_adv = search.problem, search.x_best
            self.learn(search)
            step = part.eps / (5 if self.norm == "linf" else 10) if self.step_size is None else self.step_size
            direction = part.steepest(F.interpolate(self.prior(search), x.shape[2:]))
            search.offer(part.project(x_adv + step * direction), always)
        return search.result()

    def tiles(self, x: Tensor) -> tuple[int, int]:
        """Tiles along rows and columns.

        Raises:
            ValueError: if the images have fewer pixels.
        """
        height, width = x.shape[2:]
        if self.prior_size is None:
            return height, width
        if self.prior_size > min(height, width):
            raise ValueError(
                f"prior_size={self.prior_size} is larger than the {height}x{width} images: set prior_size to at most "
                f"{min(height, width)}, or None for one tile a pixel"
            )
        return self.prior_size, self.prior_size

    def prior(self, search: Search) -> Tensor:
        """The coarse gradient (n, C, t, t)."""
        return search.kept["learnt"].tanh() if self.norm == "linf" else search.kept["learnt"]

    def learn(self, search: Search) -> None:
        """Two queries, after which the prior knows the gradient better."""
        x_adv, prior = search.x_best, self.prior(search)
        u = search.problem.draws.normal(prior) / math.sqrt(prior[0].numel())
        probes = torch.cat([prior + self.exploration * u, prior - self.exploration * u])
        directions = steepest(F.interpolate(probes, x_adv.shape[2:]), "l2")
        ahead, behind = search.ask(x_adv.repeat(2, 1, 1, 1) + self.fd_eta * directions)
        slope = (ahead - behind) / (self.fd_eta * self.exploration)
        search.kept["learnt"] = search.kept["learnt"] + self.prior_lr * slope.view(-1, 1, 1, 1) * u
