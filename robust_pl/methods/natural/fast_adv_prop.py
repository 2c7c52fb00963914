"""Fast AdvProp."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import SGD

from ...callbacks.attacks.draws import StreamDraws, seed_from
from ...callbacks.attacks.fgsm import FGSM
from ...callbacks.attacks.prepare import prepared
from ...functional.geometry import project, steepest
from ...nets.dual_net import DualNet
from ...nets.dual_norm import DualBatchNorm
from ..base import Method, OptimizerFactory
from ..example import Example
from ..fast.crafting import draws_of, radius_of
from ..schedules import Schedule
from .adv_prop import check_dual
from .known_loss import KnownLoss


@dataclass
class SplitExample(Example):
    """A batch whose last images are attacked; ``x_adv`` holds these alone, in another order, (n, C, H, W).

    Args:
        y_adv: labels of ``x_adv``.
        start: where the attack took its gradient, in the order of ``x``, (n, C, H, W).
        known: cross-entropy there, summed, with its gradients by the weights.
    """

    y_adv: Tensor | None = None
    start: Tensor | None = None
    known: KnownLoss | None = None


class FastAdvProp(Method):
    """Fast AdvProp (Mei et al. 2022, arXiv 2204.09838): AdvProp at 1.2 times the cost of plain training.

    Of a batch of B images c = ``clean_share`` B train as they are, through the main BatchNorms. The other a = B - c are
    attacked, untargeted and with one step from a random point of the ball, and train twice with weight 1/2, through the
    auxiliary ones: at the attack's start and at its end, in another order, on several processes over all of them. The backward
    pass at the start gives the gradient by the pixels and those by the weights. Losses are summed,

        S = sum_c CE(x) + 1/2 sum_a CE(start) + 1/2 sum_a CE(x_adv),

    and the gradient of each weight is divided by the images that it has seen, by weight: those of shared weights by B, those
    of the main BatchNorms by c, those of the auxiliary ones by a, just before the optimizer's step. A weight perturbation sees
    the gradients of S / B. The step's loss is S / B.

    A batch is not repeated, so ``batch_size`` counts both parts: the authors' 320 are 256 + 64, and they shorten 105 epochs to
    88 to stay at the cost of plain training. Evaluation takes the main BatchNorms, see :class:`robust_pl.nets.DualNet`.

    Cost: in units of a forward and a backward pass over the batch, c / B + 2 a / B: 1.2 with four fifths clean. With AWP, SAM
    and the like the start is passed again at their weights, as the other images are.

    Args:
        net: a network in a DualNet.
        attack: gives ``eps`` and ``step_size`` (eps by default) on linf; the pass is the method's own, in train mode, so its
            ``bn_mode`` means nothing here. FGSM with both 1/255 by default.
        clean_share: of each batch.
        optimizer: see :class:`Method`, and so all others.

    Raises:
        TypeError: if the network is no DualNet, or the attack no FGSM.
        ValueError: if ``clean_share`` is not in (0, 1), the attack asks for what one pass cannot do or, in a step, a batch has
            a single image.
    """

    def __init__(
        self,
        net: DualNet,
        attack: FGSM | None = None,
        clean_share: float = 0.8,
        optimizer: OptimizerFactory = lambda params: SGD(params, lr=0.1, momentum=0.9, weight_decay=1e-4),
        schedule: Schedule | None = None,
        weights: str | None = None,
        num_classes: int = 10,
    ) -> None:
        super().__init__(net, attack, optimizer, schedule, weights, num_classes)
        check_dual(net, "Fast AdvProp")
        _check(self.attack)
        if not 0 < clean_share < 1:
            raise ValueError(f"clean_share={clean_share} leaves one of the BatchNorms without images: choose from (0, 1)")
        self.clean_share = clean_share
        self._shares: list[float] = []

    @staticmethod
    def default_attack() -> FGSM:
        return FGSM(1 / 255, 1 / 255, random_start=True, bn_mode="train")

    def attacked(self, batch_size: int) -> int:
        """How many images of a batch are attacked: the nearest to its share, at least one, and never all."""
        if batch_size < 2:
            raise ValueError(
                "a batch of 1 image cannot be split into clean and attacked ones: raise data.init_args.batch_size, or set "
                "data.init_args.drop_last to true"
            )
        return min(max(1, batch_size - round(self.clean_share * batch_size)), batch_size - 1)

    def craft(self, batch: tuple[Tensor, ...], eps: Tensor | None = None) -> SplitExample:
        example, attack = self.clean(batch), self.attack
        count = self.attacked(len(example.x))
        x, y = example.x[-count:], example.y[-count:]
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        radius = radius_of(self, x, None if eps is None else eps[-count:])
        start = x + radius * (2 * draws_of(self, "start", x.device).uniform(x) - 1)
        start = start.clamp(0.0, 1.0).to(example.x.dtype)
        known, gradient = self._differentiate(start, y)
        step = radius if attack.step_size is None else attack.step_size
        x_adv = project(start.to(x.dtype) + step * steepest(gradient.to(x.dtype), "linf"), x, radius, "linf")
        x_adv, y_adv = self._shuffled(x_adv.to(example.x.dtype), y)
        attack.calls += 1  # which keys the draws, and is in the checkpoint
        attack.samples, attack.forwards, attack.backwards = (
            total + count for total in (attack.samples, attack.forwards, attack.backwards)
        )
        return SplitExample(example.x, example.y, example.index, x_adv, y_adv, start, known)

    def loss(self, example: SplitExample) -> Tensor:
        clean = len(example.x) - len(example.x_adv)
        with self.net.through("main"):
            loss = F.cross_entropy(self(example.x[:clean]), example.y[:clean], reduction="sum")
        with self.net.through("aux"):
            at_start = None if example.known is None else example.known.take()
            if at_start is None:
                at_start = F.cross_entropy(self(example.start), example.y[clean:], reduction="sum")
            attacked = F.cross_entropy(self(example.x_adv), example.y_adv, reduction="sum")
        return (loss + 0.5 * at_start + 0.5 * attacked) / len(example.x)

    def training_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> Tensor:
        self._shares.append(self.attacked(len(batch[0])) / len(batch[0]))
        return super().training_step(batch, batch_idx)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        share = sum(self._shares) / len(self._shares)
        self._shares.clear()
        for half, of_it in (("clean", 1 - share), ("adv", share)):
            layers = [getattr(m, half) for m in self.net.modules() if isinstance(m, DualBatchNorm)]
            gradients = [p.grad for layer in layers for p in layer.parameters() if p.grad is not None]
            if gradients:
                torch._foreach_mul_(gradients, 1 / of_it)

    def _differentiate(self, start: Tensor, y: Tensor) -> tuple[KnownLoss, Tensor]:
        """The loss at the start through the auxiliary BatchNorms, and its gradient by the pixels: one pass for both."""
        parameters = [p for p in self.net.parameters() if p.requires_grad]
        start = start.detach().requires_grad_()
        with prepared(self, "train", frozen=False), self.net.through("aux"):
            loss = F.cross_entropy(self(start), y, reduction="sum")
            gradient, *of_weights = torch.autograd.grad(loss, [start, *parameters], allow_unused=True)
        return KnownLoss(loss, parameters, of_weights), gradient

    def _shuffled(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """As many samples as before, drawn without repetition from those of all processes.

        Those that a BatchNorm sees together are then others than at the attack's start.
        """
        rank, count = self.global_rank, len(x)
        draws = StreamDraws(seed_from(self.attack.seed, self.attack.calls, "shuffle"), x.device)
        x, y = _of_all(x), _of_all(y)
        order = draws.few(x[:1], len(x)).squeeze(0).argsort()[rank * count : (rank + 1) * count]
        return x[order], y[order]


def _of_all(tensor: Tensor) -> Tensor:
    """The rows of all processes, of which each has as many."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)


def _check(attack: FGSM) -> None:
    if not isinstance(attack, FGSM):
        raise TypeError(f"attack is a {type(attack).__name__}: Fast AdvProp takes FGSM, whose eps and step_size it uses")
    wrong = {
        "targeted": (attack.targeted, "the pass trains with the true labels, too: set it to false"),
        "norm": (attack.norm != "linf", "the step goes along signs: choose linf"),
        "random_start": (attack.random_start is not True, "the step begins at a random point of the ball: set it to true"),
        "restarts": (attack.restarts > 1, "there is one pass: set it to 1"),
        "objective": (attack.objective not in (None, "ce"), "one pass serves weights and pixels: choose 'ce'"),
    }
    for field, (refused, remedy) in wrong.items():
        if refused:
            raise ValueError(f"attack.{field}={getattr(attack, field)!r} has no place in Fast AdvProp, where {remedy}")
