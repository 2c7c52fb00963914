"""DAT: discrete adversarial training."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD

from ...callbacks.attacks.base import Attack
from ...callbacks.attacks.fgsm import FGSM
from ...nets.discretizer import Discretizer
from ...nets.frozen import Frozen
from ..base import Method, OptimizerFactory
from ..example import Example
from ..fast.crafting import draws_of, radius_of
from ..samples import training_samples
from ..schedules import Schedule


class DAT(Method):
    """Discrete adversarial training (Mao et al. 2022, arXiv 2209.07735): an attack that changes visual words, not noise.

    With Q a discretizer that stays as it is, x_q = Q(x) is attacked on its pixels, and the network is trained on what is left
    of the perturbation in the code: CE(f(x), y) + CE(f(Q(x_q + delta)), y). No gradient goes through Q: that of the pixels of
    x_q stands for it, which is the straight-through step of the paper, and is what the authors' code does. The aim is accuracy
    on clean images and under natural shifts; no adversarial robustness is claimed.

    Without an attack it is the authors': one l2 step of 0.1 in a ball of 0.1, in train mode. That is tiny, and acts through the
    words that it flips. In train mode the attack's pass moves BatchNorm's running statistics, where there are any: give an
    attack with ``bn_mode: eval`` or ``train_no_track`` if it should not. With probability ``random_start``, one coin for each
    batch and process, it starts on the sphere around x_q instead of at x_q, in a random direction. Mixed labels are attacked as
    they are. The authors attack in float32 under AMP; here the attack runs in the precision of the run.

    ``train/discrete_change``, the mean change of a pixel from Q(x) to Q(x_q + delta), says whether the attack moves any word:
    where it stays at 0, the budget is too small for the discretizer.

    Their discretizer is a :class:`robust_pl.nets.VQGAN`, whose weights the user must have. :class:`PatchCodebook` needs none
    and is a stand-in of ours, :class:`IdentityDiscretizer` an ablation; results with them say nothing of the paper's.

    Cost: the attack's passes, two forward and two backward passes, and two passes through Q: 3 + 3 a step by default.

    Args:
        net: see :class:`Method`.
        discretizer: Q; it is read or learnt before the first step, and is not kept in checkpoints.
        attack: on l2 where ``random_start`` has a meaning, without a random start of its own.
        random_start: probability in [0, 1].
        optimizer: see :class:`Method`, and so all others.

    Raises:
        TypeError: if ``discretizer`` is none.
        ValueError: if ``random_start`` is no probability, or the attack cannot start where it says.
    """

    def __init__(
        self,
        net: nn.Module,
        discretizer: Discretizer,
        attack: Attack | None = None,
        random_start: float = 0.8,
        optimizer: OptimizerFactory = lambda params: SGD(params, lr=0.1, momentum=0.9, weight_decay=5e-4),
        schedule: Schedule | None = None,
        weights: str | None = None,
        num_classes: int = 10,
    ) -> None:
        super().__init__(net, attack, optimizer, schedule, weights, num_classes)
        if not isinstance(discretizer, Discretizer):
            raise TypeError(f"discretizer is a {type(discretizer).__name__}: take VQGAN, PatchCodebook or IdentityDiscretizer")
        if not 0 <= random_start <= 1:
            raise ValueError(f"random_start={random_start} is a probability: choose from [0, 1]")
        attack = self.attack
        if random_start and (not attack.takes_start or attack.norm != "l2" or attack.random_start or attack.restarts > 1):
            raise ValueError(
                f"random_start={random_start} begins on the sphere of l2, and attack is a {type(attack).__name__} with "
                f"norm={attack.norm!r}, random_start={attack.random_start!r} and restarts={attack.restarts}: take FGSM with "
                "norm l2 and neither, or set the method's random_start to 0"
            )
        self.discretizer = Frozen(discretizer)
        self.random_start = random_start

    @staticmethod
    def default_attack() -> FGSM:
        return FGSM(0.1, 0.1, norm="l2", bn_mode="train")

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage == "fit":
            self.discretizer.net.begin(self._training_images)

    def craft(self, batch: tuple[Tensor, ...], eps: Tensor | None = None) -> Example:
        example = self.clean(batch)
        discrete = replace(example, x=self.discretizer(example.x))
        attacked = self.run_attack(discrete, eps, self._start(discrete.x, eps) if self.random_start else None)
        x_adv = self.discretizer(attacked.x_adv.to(example.x.dtype))
        if self._trainer is not None:
            self.log("train/discrete_change", (x_adv - discrete.x).abs().mean(), batch_size=len(x_adv))
        return replace(example, x_adv=x_adv)

    def loss(self, example: Example) -> Tensor:
        return F.cross_entropy(self(example.x), example.y) + F.cross_entropy(self(example.x_adv), example.y)

    def _start(self, x: Tensor, eps: Tensor | None) -> Tensor:
        """x, or for the whole batch a point on the sphere around each, cut to the box."""
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        draws = draws_of(self, "start", x.device)
        moves = draws.few(x[:1], 1).view(1, 1, 1, 1) < self.random_start
        direction = F.normalize(draws.normal(x).flatten(1)).view_as(x)
        return (x + moves * radius_of(self, x, eps) * direction).clamp(0.0, 1.0)

    def _training_images(self, count: int) -> Tensor:
        batches = training_samples(self.trainer, count, min(count, 500), torch.device("cpu"))
        return torch.cat([x for x, _, _ in batches])
