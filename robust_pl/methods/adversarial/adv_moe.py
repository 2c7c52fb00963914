"""AdvMoE: adversarial training of mixture-of-experts CNNs."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from typing import Any, Literal, get_args

import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from ...callbacks.attacks.base import Attack
from ...callbacks.attacks.checks import check_kl
from ...callbacks.attacks.pgd import PGD
from ...callbacks.attacks.prepare import prepared
from ...callbacks.attacks.problem import Objective
from ...functional.losses import hard, trades, wide
from ...functional.moe import class_balance, entropy_balance, routed_divergence, router_loss, switch_balance
from ...nets.experts import MoENet
from ..base import Method, OptimizerFactory
from ..example import Example
from ..schedules import Schedule

Balance = Literal["class_mod", "entropy", "switch"]


class AdvMoE(Method):
    """AdvMoE (Zhang et al. 2023, arXiv 2308.10110): experts and router of a mixture-of-experts CNN are trained in turns.

    For each batch: attack; step the experts on CE + beta * KL(clean || adversarial), as TRADES does; attack again, now with the
    new experts; step the router on alpha * balance + beta * KL(clean || adversarial) of its scores. Either step leaves the
    weights of the other part alone, whose optimizer is another one. The attack maximises KL of logits plus KL of scores, from
    the clean ones, which stay fixed; an attack that names an objective of its own keeps it. Losses, order and the defaults of
    alpha and beta are those of the authors' code after its last commit; its first one had CE + alpha * KL for the router.

    Differences: the clean targets of the attack come from the network in the attack's mode, where the authors take the scores
    in train mode and attack in eval mode. The experts' step forwards the router without its gradients, which the authors
    compute and throw away.

    ``balance`` is what keeps the experts in use: ``class_mod`` (published) asks for expert y mod N, so that the classes are
    dealt out beforehand; ``entropy`` for an even mean gate of the batch; ``switch`` is the load-balancing loss of the Switch
    Transformer. The last two are ours, and weaker: nothing in the router's loss then says which image is whose, and equal
    scores for all images minimise it. On the digits ``switch`` left one expert without images in eval mode, and an attack
    flipped a third of the gates of ``entropy`` (one seed). Both are taken over each process's own images.

    A batch is one step for schedules, ``max_steps``, averages of weights and ``trainer.global_step``. On several processes
    choose ``trainer.strategy=ddp_find_unused_parameters_true``, since each step leaves the other part's weights unused.

    Cost: two attacks, each with one more forward pass for the clean targets, two forward and two backward passes of the
    network, and as many of the router alone: 8 + 6, and 2 + 2 of the router, with the default attack of two steps. TRADES with
    this attack spends 5 + 4.

    Args:
        net: the network with its router.
        attack: PGD of 2 steps of 5/255 from x + 0.001 * N(0, 1) by default.
        alpha: weight of the router's balance.
        beta: weight of the KL term of experts and of the router.
        balance: ``class_mod``, ``entropy`` or ``switch``.
        optimizer: makes both optimizers.
        schedule: of both learning rates; see :class:`Method`, and so all others.

    Raises:
        ValueError: if a weight is negative, the balance is unknown, ``class_mod`` leaves an expert without a class, or the
            attack begins at x, where a divergence has no gradient.
        TypeError: if the network is no mixture of experts.
    """

    refuses_perturbation = "it steps experts and router in turns, each after an attack and by a loss of its own"

    def __init__(
        self,
        net: MoENet,
        attack: Attack | None = None,
        alpha: float = 6.0,
        beta: float = 6.0,
        balance: Balance = "class_mod",
        optimizer: OptimizerFactory = lambda params: SGD(params, lr=0.1, momentum=0.9, weight_decay=5e-4),
        schedule: Schedule | None = None,
        weights: str | None = None,
        num_classes: int = 10,
    ) -> None:
        super().__init__(net, attack, optimizer, schedule, weights, num_classes)
        if not isinstance(net, MoENet):
            raise TypeError(f"net is a {type(net).__name__}: AdvMoE trains a mixture of experts, such as MoEResNet18")
        for name, value in (("alpha", alpha), ("beta", beta)):
            if value < 0:
                raise ValueError(f"{name}={value} must be at least 0")
        if balance not in get_args(Balance):
            raise ValueError(f"balance={balance!r} is unknown: choose one of {', '.join(get_args(Balance))}")
        if balance == "class_mod" and net.experts > num_classes:
            raise ValueError(
                f"balance='class_mod' deals {num_classes} classes out to {net.experts} experts, so that some get none: lower "
                "net.experts, or choose 'entropy' or 'switch'"
            )
        if self.attack.objective is None:
            check_kl(self.attack.random_start, self.attack.targeted)
        self.alpha, self.beta = alpha, beta
        self.balance: Balance = balance
        self.automatic_optimization = False

    @staticmethod
    def default_attack() -> PGD:
        return PGD(step_size=5 / 255, steps=2, random_start="normal")

    @cached_property
    def with_scores(self) -> _WithScores:
        """What is attacked, made once, since an attack looks at a network that it has not seen before."""
        return _WithScores(self.net)

    def craft(self, batch: tuple[Tensor, ...], eps: Tensor | None = None) -> Example:
        """Attack logits and scores together."""
        if self.attack.objective is not None:
            return super().craft(batch, eps)
        example, both = self.clean(batch), self.with_scores
        with prepared(both, self.attack.bn_mode), torch.no_grad():
            clean = wide(both(example.x)).split([self.num_classes, self.net.experts], 1)
        attacked = self.attack.run(
            both,
            example.x,
            hard(example.y),  # mixed labels would not fit the columns of scores
            eps=eps,
            objective=Objective(routed_divergence, clean),
            rank=self.global_rank,
            careful=example.x.device.type == "cpu",
        )
        return replace(example, x_adv=attacked.x_adv.to(example.x.dtype))

    def loss(self, example: Example) -> Tensor:
        """The experts' loss, which the router's weights have no gradient of."""
        x, x_adv, net = example.x, example.x_adv, self.net
        with torch.no_grad():
            scores, scores_adv = net.signals(x), net.signals(x_adv)
        return trades(net.routed(x, scores), net.routed(x_adv, scores_adv), example.y, self.beta)

    def router_loss(self, example: Example) -> Tensor:
        """The router's loss, a scalar function of the router's weights and the example alone."""
        scores, scores_adv = self.net.signals(example.x), self.net.signals(example.x_adv)
        if self.balance == "class_mod":
            balance = class_balance(scores, example.y)
        else:
            balance = entropy_balance(scores) if self.balance == "entropy" else switch_balance(scores)
        return router_loss(scores, scores_adv, balance, self.alpha, self.beta)

    def training_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> None:
        self._check_first(batch)
        experts, router = self.optimizers()
        self._turn(experts, self.loss, batch, "train/loss")
        # Unwrapped, so that Lightning counts one step a batch: each weight moves once in it.
        example = self._turn(router.optimizer, self.router_loss, batch, "train/router_loss")
        ends_epoch = self.trainer.is_last_batch or batch_idx + 1 >= self.trainer.num_training_batches
        for config in self.trainer.lr_scheduler_configs:
            if config.interval == "step" or ends_epoch:
                config.scheduler.step()
        self.after_step(example)

    def _turn(
        self, optimizer: Optimizer, loss_of: Callable[[Example], Tensor], batch: tuple[Tensor, ...], name: str
    ) -> Example:
        example = self.craft(batch)
        loss = loss_of(example)
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        self.log(name, loss.detach(), prog_bar=name == "train/loss", on_step=True, batch_size=len(example.x))
        return example

    def trained_parameters(self) -> list[Any]:
        """Those of the experts, and of all that they share; the router has an optimizer of its own."""
        router = {id(p) for p in self.net.router.parameters()}
        return [p for p in super().trained_parameters() if id(p) not in router]

    def configure_optimizers(self) -> list[Any]:
        experts = super().configure_optimizers()
        router = self._optimizer([p for p in self.net.router.parameters() if p.requires_grad])
        if self._schedule is None:
            return [experts, router]
        scheduler = {"scheduler": self._schedule.build(router, self._length), "interval": self._schedule.interval}
        return [experts, {"optimizer": router, "lr_scheduler": scheduler}]

    def setup(self, stage: str) -> None:
        super().setup(stage)
        # Lightning's checkpoints would like to keep the weights from before a step, which resuming has no use for.
        warnings.filterwarnings("ignore", message="Using ModelCheckpoint with manual optimization")
        strategy = self.trainer.strategy
        several = isinstance(strategy, DDPStrategy) and self.trainer.world_size > 1
        if stage == "fit" and several and not strategy._ddp_kwargs.get("find_unused_parameters", False):
            raise ValueError(
                "each step of AdvMoE leaves some weights unused: set trainer.strategy=ddp_find_unused_parameters_true"
            )


class _WithScores(nn.Module):
    """Logits and the router's scores side by side: (B, K + N)."""

    def __init__(self, net: MoENet) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        scores = self.net.signals(x)
        return torch.cat([self.net.routed(x, scores), scores], 1)
