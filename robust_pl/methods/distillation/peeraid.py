"""PeerAiD: adversarial distillation from a peer that learns beside the student."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD

from ...callbacks.attacks.base import Attack
from ...callbacks.attacks.checks import choose
from ...callbacks.attacks.pgd import PGD
from ...callbacks.attacks.prepare import evaluating
from ...callbacks.attacks.problem import Objective
from ...functional.distillation import KL_REDUCTIONS, KLReduction, distillation, reduce_kl
from ...functional.losses import kl_divergence, wide
from ..base import Method, OptimizerFactory
from ..example import Example
from ..schedules import Schedule


@dataclass
class PeerExample(Example):
    """A batch with what the peer says of it.

    Args:
        peer_logits: of the peer on clean pixels in eval mode, (B, K), without gradient.
    """

    peer_logits: Tensor | None = None


class PeerAiD(Method):
    """PeerAiD (Jung, Jang, Song, Lee 2024, arXiv 2403.06668): a peer P learns beside the student S, on the student's attacks.

    A trained teacher is robust against attacks on itself, and less so against those on a student. The peer starts from scratch
    and sees nothing but the student's adversarial images x', so it becomes good at those. With T the ``temperature`` and t2
    the ``peer_temperature``, and KL(target || prediction) between softmaxes at the temperature in front of it::

        L = peer_ce * CE(P(x'), y) + peer_kl * t2^2 * KL(S(x') || P(x'))
            + ce * CE(S(x'), y) + distillation * T^2 * KL(P(x') || S(x')) + consistency * T^2 * KL(S(x) || S(x'))

    The paper's letters for these weights are g1, g2, l1, l2, l3. As in the authors' code only the peer's logits are detached,
    in the student's own term; through the target of ``peer_kl`` and through that of ``consistency`` the gradient flows into the
    student. The attack starts at x + 0.001 * N(0, 1) and ascends KL(P(x) || S(x')), with the peer in eval mode.

    One optimizer moves both networks, as the authors' two do at equal settings. Both are in checkpoints and averages; the
    network that is evaluated, attacked and exported is the student, and ``weights`` are its. The authors compute S(x') twice in
    train mode, here it is computed once: BatchNorm's statistics move once less a step. They average the student's weights from
    the first drop of the learning rate on; that is the callback ``SWA``. Report raw and averaged weights: part of the gain is
    its.

    Cost: the attack's passes, one forward pass of the peer, and two forward and two backward passes of the student and one of
    the peer: 12 + 12 of the student and 2 + 1 of the peer with PGD-10. Without ``consistency`` one each less of the student.

    Args:
        peer: a network with the same classes, trained from its initial weights; the authors take the student's architecture.
        attack: PGD-10 at 8/255 from x + 0.001 * N(0, 1) by default.
        temperature: T; 5 for the authors' CIFAR-10 and CIFAR-100, 1 for TinyImageNet.
        peer_temperature: t2.
        peer_ce: g1.
        peer_kl: g2; 0.1 for the authors' CIFAR-10, 1 for CIFAR-100, 100 for TinyImageNet.
        ce: l1; 0.035 for TinyImageNet.
        distillation: l2; 35 for TinyImageNet.
        consistency: l3; 20 for TinyImageNet.
        kl_reduction: ``mean`` over samples and classes, for which the weights above are, or ``batchmean``, K times that.
        net: the student; see :class:`Method`, and so all others.

    Raises:
        ValueError: if a temperature is not positive, a weight is negative, a network has nothing to learn from, both are one
            network, or the peer's classes are others.
    """

    def __init__(
        self,
        net: nn.Module,
        peer: nn.Module,
        attack: Attack | None = None,
        temperature: float = 5.0,
        peer_temperature: float = 1.0,
        peer_ce: float = 1.0,
        peer_kl: float = 0.1,
        ce: float = 0.0,
        distillation: float = 1.0,
        consistency: float = 1.0,
        kl_reduction: KLReduction = "mean",
        optimizer: OptimizerFactory = lambda params: SGD(params, lr=0.1, momentum=0.9, weight_decay=2e-4),
        schedule: Schedule | None = None,
        weights: str | None = None,
        num_classes: int = 10,
    ) -> None:
        super().__init__(net, attack, optimizer, schedule, weights, num_classes)
        if peer is net:
            raise ValueError("peer and net are one network, which cannot teach itself: pass two")
        for name, value in (("temperature", temperature), ("peer_temperature", peer_temperature)):
            if value <= 0:
                raise ValueError(f"{name}={value} must be above 0")
        choose("kl_reduction", kl_reduction, KL_REDUCTIONS)
        of_peer = {"peer_ce": peer_ce, "peer_kl": peer_kl}
        of_student = {"ce": ce, "distillation": distillation, "consistency": consistency}
        for name, value in (of_peer | of_student).items():
            if value < 0:
                raise ValueError(f"{name}={value} must be at least 0")
        for who, parts in (("peer", of_peer), ("student", of_student)):
            if not any(parts.values()):
                raise ValueError(f"{' and '.join(parts)} are 0, so the {who} learns nothing: set one of them above 0")
        self.peer = peer
        self.temperature, self.peer_temperature = temperature, peer_temperature
        self.peer_ce, self.peer_kl = peer_ce, peer_kl
        self.ce, self.distillation, self.consistency = ce, distillation, consistency
        self.kl_reduction: KLReduction = kl_reduction

    @staticmethod
    def default_attack() -> PGD:
        return PGD(random_start="normal")

    def clean(self, batch: tuple[Tensor, ...]) -> PeerExample:
        """The batch, with the peer's logits, from which the attack leads the student away."""
        example = super().clean(batch)
        with torch.no_grad(), evaluating(self.peer):
            peer_logits = wide(self.peer(example.x))
        return PeerExample(example.x, example.y, example.index, peer_logits=peer_logits)

    def attack_objective(self, example: PeerExample) -> Objective:
        return Objective(kl_divergence, (example.peer_logits,))

    def loss(self, example: PeerExample) -> Tensor:
        student, peer = self(example.x_adv), self.peer(example.x_adv)
        loss = self.peer_ce * F.cross_entropy(peer, example.y) + self.ce * F.cross_entropy(student, example.y)
        loss = loss + self.peer_kl * self._kl(peer, student, self.peer_temperature)
        loss = loss + self.distillation * self._kl(student, peer.detach(), self.temperature)
        if self.consistency:
            loss = loss + self.consistency * self._kl(student, self(example.x), self.temperature)
        return loss

    def _kl(self, logits: Tensor, target: Tensor, temperature: float) -> Tensor:
        """t^2 KL(target || logits) at temperature t, with the gradient of both."""
        return reduce_kl(distillation(logits, target, temperature), self.num_classes, self.kl_reduction)

    def _check_first(self, batch: tuple[Tensor, ...]) -> None:
        first = self.training and True not in self._checked
        super()._check_first(batch)
        if first:
            with torch.no_grad(), evaluating(self.peer):
                logits = self.peer(batch[0][:2])
            if logits.shape[1:] != (self.num_classes,):
                raise ValueError(
                    f"the peer returns logits of shape {tuple(logits.shape)} for two images, and there are {self.num_classes} "
                    "classes: set the peer's num_classes to that of the data"
                )
