"""A network with two sets of BatchNorms, of which a sample goes through one."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Literal, get_args

from torch import Tensor, nn

from .dual_norm import Routing, dual_batch_norm

Route = Literal["main", "aux"]


class DualNet(nn.Module):
    """Any network with a main BatchNorm for clean images and an auxiliary one for attacked ones (AdvProp, arXiv 1911.09665).

    ``{class_path: DualNet, init_args: {net: {class_path: ResNet18}}}``. Everything but the BatchNorms is shared. Outside of
    :meth:`through` and of ``routing.split``, in train and in eval mode alike, samples take ``route``: with ``main`` the network
    that is evaluated is the one that AdvProp's papers report. Testing once more with ``aux``
    (``--model.init_args.net.init_args.route aux``) shows the other one as a diagnostic; it costs that test and no training.

    Args:
        net: has BatchNorms, each of which is replaced in place by a :class:`DualBatchNorm` that starts with its weights twice;
            to begin with a trained network give ``{class_path: TrainedNet, init_args: {source: RUN}}``. In a config it needs
            ``num_classes`` and ``in_channels`` of its own where they are not its defaults.
        route: BatchNorms that a sample takes: ``main``, which are ``clean`` in the state dict, or ``aux``, which are ``adv``.

    Raises:
        ValueError: if the network has no BatchNorm, or the route is unknown.
    """

    def __init__(self, net: nn.Module, route: Route = "main") -> None:
        super().__init__()
        check_route("route", route)
        self.routing: Routing = dual_batch_norm(net)
        self.routing.weight = _SHARES[route]
        self.net = net.train()  # in eval mode no statistics would be learned

    def through(self, route: Route) -> AbstractContextManager[None]:
        """All samples go through these BatchNorms; the statistics of the others stay."""
        check_route("route", route)
        return self.routing.use(_SHARES[route])

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, K) of pixels (B, C, H, W)."""
        return self.net(x)

    def forward_features(self, x: Tensor) -> Tensor:
        """Features before the last linear layer (B, D), where the network gives them."""
        return self.net.forward_features(x)


def check_route(field: str, route: str) -> None:
    """Refuse what is no route.

    Raises:
        ValueError: naming the field.
    """
    if route not in get_args(Route):
        raise ValueError(f"{field}={route!r} is unknown: choose main or aux")


_SHARES: dict[str, float] = {"main": 0.0, "aux": 1.0}
