"""Dynamic networks for the tests of their checks: honest ones, and ones whose gates are broken on purpose."""

from __future__ import annotations

import copy
from functools import cache

import torch
from torch import Tensor, nn

from robust_pl.nets import AWNet, DualBatchNorm, RoutedNet, SmallCNN

from .masking_zoo import EPS, honest, train


def small_aw_net() -> AWNet:
    """Its two BatchNorms differ, so that training has a use for the shares."""
    net = AWNet(SmallCNN(width=12), in_channels=1, width=8, dim=16)
    for module in net.modules():
        if isinstance(module, DualBatchNorm):
            nn.init.uniform_(module.adv.weight, 0.5, 1.5)
            nn.init.uniform_(module.adv.bias, -0.5, 0.5)
    return net


class SoftMixture(RoutedNet):
    """A mixture of two experts, whose logits are weighed by a softmax of a router's scores."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([SmallCNN(width=8), SmallCNN(width=8)])
        self.router = SmallCNN(num_classes=2, width=4)

    def signals(self, x: Tensor) -> Tensor:
        return self.router(x).softmax(1)

    def routed(self, x: Tensor, signals: Tensor) -> Tensor:
        return sum(weight.unsqueeze(1) * expert(x) for weight, expert in zip(signals.T, self.experts, strict=True))


HONEST = {
    "aw_net_pgd_at": lambda: train(small_aw_net, 0, 8, EPS),
    "aw_net_standard": lambda: train(small_aw_net, 1, 8),
    "soft_mixture_pgd_at": lambda: train(SoftMixture, 2, 8, EPS),
    "soft_mixture_standard": lambda: train(SoftMixture, 3, 8),
}


@cache
def dynamic(name: str) -> RoutedNet:
    return HONEST[name]()


def broken(kind: type[AWNet], name: str = "aw_net_pgd_at") -> AWNet:
    """The weights of an honest network in a class that breaks something."""
    net = copy.deepcopy(dynamic(name))
    net.__class__ = kind
    return net


# Broken gates ---------------------------------------------------------------------------------------------------------


class DetachedInForward(AWNet):
    def forward(self, x: Tensor) -> Tensor:
        return self.routed(x, self.signals(x).detach())


class DetachedInRouted(AWNet):
    def routed(self, x: Tensor, signals: Tensor, share: float | None = None) -> Tensor:
        return super().routed(x, signals.detach(), share)


class ShareDetachedInRouted(AWNet):
    """One signal of all."""

    def routed(self, x: Tensor, signals: Tensor, share: float | None = None) -> Tensor:
        return super().routed(x, torch.cat([signals[:, :-1], signals[:, -1:].detach()], 1), share)


class Thresholds(AWNet):
    """Gates of 0 and 2, nothing between."""

    def signals(self, x: Tensor) -> Tensor:
        said = super().signals(x)
        return torch.cat([2 * (said[:, :-1] > said[:, :-1].median()).float(), (said[:, -1:] > 0.5).float()], 1)


class OneThreshold(AWNet):
    """The last gate alone is a hard one."""

    def signals(self, x: Tensor) -> Tensor:
        said = super().signals(x)
        return torch.cat([said[:, :-2], (x.mean((1, 2, 3)) > 0.3).float().unsqueeze(1), said[:, -1:]], 1)


class OtherForward(AWNet):
    """Goes forward with gates that its router never says."""

    def forward(self, x: Tensor) -> Tensor:
        return self.routed(x, 0.5 * self.signals(x))


class BatchLevelShare(AWNet):
    """One p for all of a batch."""

    def signals(self, x: Tensor) -> Tensor:
        said = super().signals(x)
        return torch.cat([said[:, :-1], said[:, -1:].mean().expand(len(x), 1)], 1)


class PerBatchRows(AWNet):
    """One row of signals for all images."""

    def signals(self, x: Tensor) -> Tensor:
        return super().signals(x).mean(0, keepdim=True)


class SteepSwitch(RoutedNet):
    """Rolls the classes where the image is a little brighter: a gate that has a derivative, which is 0 in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.net = honest("cnn_pgd_at")

    def signals(self, x: Tensor) -> Tensor:
        return x.mean((1, 2, 3)).unsqueeze(1)

    def routed(self, x: Tensor, signals: Tensor) -> Tensor:
        # Ink is a third of a digit: pixels that rise by 0.1 wherever they can go beyond 0.38.
        open_ = (5000 * (signals - 0.38)).sigmoid()
        logits = self.net(x)
        return (1 - open_) * logits + open_ * logits.roll(1, 1)


class Trembling(RoutedNet):
    """Scales all logits by a gate that trembles: predictions stay, gradients follow the trembling."""

    def __init__(self) -> None:
        super().__init__()
        self.net = honest("cnn_standard")

    def signals(self, x: Tensor) -> Tensor:
        return (3000 * x.mean((1, 2, 3))).sin().unsqueeze(1)

    def routed(self, x: Tensor, signals: Tensor) -> Tensor:
        return (1 + 0.3 * signals) * self.net(x)


CUT = {
    DetachedInForward: "detach no gates in forward",
    DetachedInRouted: "do not detach them in routed",
    ShareDetachedInRouted: "do not detach them in routed",
    Thresholds: "do not detach or round",
    OneThreshold: "1 of 61 signals change with the image",
    OtherForward: "leave forward as RoutedNet has it",
    PerBatchRows: "return one row for each",
}


class UntrainedButAwake(DetachedInForward):
    """For configs: gates that follow the image before any training."""

    def __init__(self, in_channels: int = 1, num_classes: int = 10) -> None:
        super().__init__(SmallCNN(num_classes, width=4), in_channels, width=4, dim=8)
        for linear in (*self.router.heads, self.router.adversarial):
            nn.init.normal_(linear.weight)
