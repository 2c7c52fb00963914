"""SSAT."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim import SGD

from ...callbacks.attacks.base import Attack
from ...callbacks.attacks.checks import check_count
from ...callbacks.attacks.fgsm import FGSM
from ...callbacks.attacks.prepare import prepared
from ...functional.losses import hard
from ..adversarial.pgd_at import PGDAT
from ..base import OptimizerFactory
from ..example import Example
from ..schedules import Schedule


class SSAT(PGDAT):
    """Stable single-step adversarial training (Kim et al. 2020, arXiv 2010.01799): the smallest share of the step that fools.

    Where training collapses, parts of the step fool the network while the whole of it does not. With c = checkpoints and
    delta = x_fgsm - x, where x_fgsm is the attack's result, a sample trains with cross-entropy on x + (k / c) delta for the
    smallest k in 1, ..., c - 1 that is misclassified in eval mode, on x_fgsm where none is, and on x where the attack's start
    was misclassified already. Mixed labels count as their largest entry in these questions.

    Without an attack it takes that of :class:`FastAT`, 8/255 with a step of 10/255 from a random start in train mode.
    Perturbations shrink where the network is fooled early: expect high clean accuracy, and PGD to promise more than AutoAttack
    finds. The authors' code asks only for the samples that are not decided yet; here all samples are asked at once, so that a
    GPU need not wait for the answers.

    Cost: two forward and two backward passes a step, and c - 1 forward passes in eval mode, which count as the attack's.

    Args:
        checkpoints: c, into how many parts the step is cut; the authors take 3.
        inference_batch: how many images the network sees at once in eval mode; at least one batch.
        net: see :class:`Method`, and so all others.

    Raises:
        ValueError: if checkpoints is below 2 or inference_batch below 1, or the attack takes no gradient at its start.
    """

    def __init__(
        self,
        net: nn.Module,
        attack: Attack | None = None,
        checkpoints: int = 3,
        inference_batch: int = 1024,
        optimizer: OptimizerFactory = lambda params: SGD(params, lr=0.1, momentum=0.9, weight_decay=5e-4),
        schedule: Schedule | None = None,
        weights: str | None = None,
        num_classes: int = 10,
    ) -> None:
        super().__init__(net, attack, optimizer, schedule, weights, num_classes)
        check_count("checkpoints", checkpoints)
        check_count("inference_batch", inference_batch)
        if checkpoints == 1:
            raise ValueError("checkpoints=1 cuts the step nowhere, so there is none to look at: choose 2 or more")
        self.checkpoints, self.inference_batch = checkpoints, inference_batch

    @staticmethod
    def default_attack() -> FGSM:
        return FGSM(8 / 255, 10 / 255, random_start=True, bn_mode="train")

    def craft(self, batch: tuple[Tensor, ...], eps: Tensor | None = None) -> Example:
        example = self.clean(batch)
        attacked = self.run_attack(example, eps)
        if attacked.first_logits is None:
            raise ValueError(f"SSAT asks what the attack's start was taken for, and {type(self.attack).__name__} has none")
        x, y = example.x.to(attacked.x_adv.dtype), hard(example.y)
        shares = torch.arange(1, self.checkpoints + 1, device=x.device, dtype=x.dtype) / self.checkpoints
        fools = torch.ones(len(shares), len(x), dtype=torch.uint8, device=x.device)  # the whole step is the last resort
        fools[:-1] = self._predicted(example, attacked.x_adv, shares[:-1]) != y
        share = shares[fools.argmax(0)].where(attacked.first_logits.argmax(1) == y, 0.0)
        example.x_adv = torch.lerp(x, attacked.x_adv, share.view(-1, 1, 1, 1)).to(example.x.dtype)
        return example

    def _predicted(self, example: Example, x_fgsm: Tensor, shares: Tensor) -> Tensor:
        """Classes (n, B) of the points at ``shares`` (n,) of the way from x to x_fgsm, in eval mode."""
        x, found = example.x.to(x_fgsm.dtype), []
        with prepared(self, "eval"), torch.no_grad():
            for part in shares.split(max(1, self.inference_batch // len(x))):
                points = torch.lerp(x, x_fgsm, part.view(-1, 1, 1, 1, 1)).flatten(0, 1)
                found.append(self(points.to(example.x.dtype)).argmax(1).view(len(part), -1))
                self.attack.forwards += len(points)
        return torch.cat(found)
