"""AugMax."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import SGD

from ...callbacks.attacks.prepare import prepared
from ...data.augmix import AugMixChains
from ...data.mixed_chains import MixedChains, mixed
from ...functional.hashing import hash_keys, uniform
from ...functional.losses import cross_entropy, hard
from ...functional.output_distances import jensen_shannon
from ...nets.dual_net import DualNet
from ..base import Method, OptimizerFactory
from ..example import Example
from ..schedules import Schedule
from .adv_prop import check_dual
from .augmented import version_keys

_FIRST, _SECOND, _START = 11, 12, 13


@dataclass
class AugMaxExample(Example):
    """A batch with its worst mixtures, ``x_adv``, and with random ones.

    Args:
        x_mix: pixels (B, C, H, W) in [0, 1].
    """

    x_mix: Tensor | None = None


class AugMax(Method):
    """AugMax (Wang et al. 2021, arXiv 2110.13771): AugMix whose mixing weights are chosen against the network.

    Each image becomes (1 - m) x + m * sum_i softmax(q)_i chain_i(x), where the chains are AugMix's. They stay, and m in [0, 1]
    and q move up the cross-entropy by ``steps`` steps of ``step_size`` along the signs of the gradient, from m, q ~ U(0, 1), in
    eval mode. A sample stops at the ``tau``-th step that finds it misclassified, before it is moved. With p, p_max and p_mix
    the outputs on the clean image, on this one and on an ordinary mixture of other chains,

        CE(p, y) + weight * JSD(p, p_max, p_mix).

    The network has two sets of BatchNorms: the adversarial mixture goes through the auxiliary ones, also while it is looked
    for, clean images and ordinary mixtures through the main ones, which are evaluated. The authors' network is a
    :class:`robust_pl.nets.DuBINNet`. They stop a batch once all of its samples have; here such steps change nothing.

    What is drawn is a function of ``seed``, the epoch and the sample's index; for a loader without indices of the batch's and
    the sample's place instead.

    Cost: ``steps`` forward and backward passes, and one of each on three times the batch: 8 + 8 a step; and two mixtures of
    chains, on the device.

    Args:
        net: a network in a DualNet, such as DuBINNet.
        chains: what is mixed; None takes AugMix's of severity 3, three chains of one to three operations.
        steps: of the search, at least 1; 5 is the default of the authors' code, and their README takes 10.
        step_size: of each, in units of m and of q.
        tau: visits to a wrong prediction that a sample may make, at least 1; None never stops.
        weight: of the divergence; the authors take 10 on CIFAR-10 and Tiny ImageNet, 1 for ResNet-18 on CIFAR-100 and 12 on
            ImageNet.
        seed: of the chains and starts; None takes that of the data module.
        optimizer: see :class:`Method`, and so all others.

    Raises:
        TypeError: if the network is no DualNet.
        ValueError: if an argument is out of range; before training, if gradients would be of half precision.
    """

    def __init__(
        self,
        net: DualNet,
        chains: MixedChains | None = None,
        steps: int = 5,
        step_size: float = 0.1,
        tau: int | None = 1,
        weight: float = 10.0,
        seed: int | None = None,
        optimizer: OptimizerFactory = lambda params: SGD(params, lr=0.1, momentum=0.9, weight_decay=5e-4),
        schedule: Schedule | None = None,
        weights: str | None = None,
        num_classes: int = 10,
    ) -> None:
        super().__init__(net, None, optimizer, schedule, weights, num_classes)
        check_dual(net, "AugMax")
        if steps < 1:
            raise ValueError(f"steps={steps} must be at least 1")
        if tau is not None and tau < 1:
            raise ValueError(f"tau={tau} must be at least 1, or none to never stop")
        for name, value in (("step_size", step_size), ("weight", weight)):
            if value < 0:
                raise ValueError(f"{name}={value} must be at least 0")
        self.chains = AugMixChains() if chains is None else chains
        self.steps, self.step_size, self.tau, self.weight, self.seed = steps, step_size, tau, weight, seed

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage == "fit" and str(self.trainer.precision) in ("16-mixed", "16-true"):
            raise ValueError("precision 16 rounds small gradients of mixing weights to 0: choose precision bf16-mixed or 32")

    def craft(self, batch: tuple[Tensor, ...], eps: Tensor | None = None) -> AugMaxExample:
        example = self.clean(batch)
        x, y = example.x, example.y
        keys = version_keys(self, self.seed, batch)
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            x_mix, _ = self.chains(x, y, hash_keys(keys, _SECOND))
            chains = self.chains.chains(x, y, hash_keys(keys, _FIRST))
        m, q = self.search(x, y, chains, *self.start(hash_keys(keys, _START)))
        return AugMaxExample(x, y, example.index, mixture(x, chains, m, q), x_mix)

    def start(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        """M (B,) and q (width, B), float32 in [0, 1)."""
        q = uniform(keys, torch.arange(1, self.chains.width + 1, device=keys.device).unsqueeze(1))
        return uniform(keys, 0).float(), q.float()

    def search(self, x: Tensor, y: Tensor, chains: Tensor, m: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        """The worst m and q that are found from those given.

        Args:
            x: pixels (B, C, H, W).
            y: labels (B,), or (B, K) if mixed.
            chains: (width, B, C, H, W).
            m: (B,).
            q: (width, B).
        """
        left = torch.full_like(m, torch.inf if self.tau is None else self.tau)
        with prepared(self, "eval"), self.net.through("aux"):
            for _ in range(self.steps):
                m, q = m.detach().requires_grad_(), q.detach().requires_grad_()
                logits = self(mixture(x, chains, m, q))
                rise_m, rise_q = torch.autograd.grad(cross_entropy(logits, y).sum(), (m, q))
                left = left - (logits.argmax(1) != hard(y)).to(left)
                step = self.step_size * (left > 0)
                m, q = (m + step * rise_m.sign()).clamp(0, 1), q + step * rise_q.sign()
        return m.detach(), q.detach()

    def loss(self, example: AugMaxExample) -> Tensor:
        x, x_mix, x_adv = example.x, example.x_mix, example.x_adv
        with self.net.routing.split(2 * len(x)):
            clean, mix, worst = self(torch.cat([x, x_mix, x_adv])).chunk(3)
        return F.cross_entropy(clean, example.y) + self.weight * jensen_shannon(clean, worst, mix)


def mixture(x: Tensor, chains: Tensor, m: Tensor, q: Tensor) -> Tensor:
    """``(1 - m) x + m * sum_i softmax(q)_i chains_i``, (B, C, H, W); m is (B,) and q (width, B)."""
    return mixed(x, chains, q.softmax(0).to(x.dtype), m.to(x.dtype))
