"""DuBIN: half of a block's first normalisation looks at one image alone, and all BatchNorms are doubled."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from .dual_net import DualNet, Route

_FIRST_OF_BLOCKS = ("*layer1.*.bn1", "*layer2.*.bn1", "*layer3.*.bn1")


class DuBINNet(DualNet):
    """A network with the normalisation of AugMax (Wang et al. 2021, arXiv 2110.13771), DuBIN.

    In the first three stages, the first normalisation of each residual block is an InstanceNorm for one half of its channels,
    shared by both routes, and a BatchNorm for the others, as in IBN-Net (Pan et al. 2018, arXiv 1807.09441). Then every
    BatchNorm is doubled, see :class:`DualNet`. ``{class_path: DuBINNet, init_args: {net: {class_path: ResNet18}}}``.

    Args:
        net: has BatchNorms; trained weights stay in both halves, but it is another network than before.
        route: see :class:`DualNet`.
        halved: names of the BatchNorms that are halved, with ``*`` for any part; the default fits ResNets' ``layer1.0.bn1``.

    Raises:
        ValueError: if no BatchNorm has such a name, or the route is unknown.
    """

    def __init__(self, net: nn.Module, route: Route = "main", halved: Sequence[str] = _FIRST_OF_BLOCKS) -> None:
        norms = {name: m for name, m in net.named_modules() if isinstance(m, nn.BatchNorm2d)}
        found = [name for name in norms if any(fnmatchcase(name, pattern) for pattern in halved)]
        if not found:
            there = ", ".join(norms) or "none"
            raise ValueError(f"halved={list(halved)} fits no BatchNorm2d of {type(net).__name__} (there: {there}): name some")
        for name in found:
            net.set_submodule(name, InstanceBatchNorm(norms[name]))
        super().__init__(net, route)


class InstanceBatchNorm(nn.Module):
    """InstanceNorm with scale and shift for the first half of the channels, BatchNorm for the others.

    Args:
        norm: whose weights both begin with; of an odd number of channels the BatchNorm has one more.

    Raises:
        ValueError: if it has fewer than two channels, or no scale and shift.
    """

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        self.half, rest = norm.num_features // 2, norm.num_features - norm.num_features // 2
        if not self.half or not norm.affine:
            raise ValueError(f"{norm} cannot be halved: it needs two channels, and affine=True")
        self.instance = nn.InstanceNorm2d(self.half, norm.eps, affine=True)
        self.batch = nn.BatchNorm2d(rest, norm.eps, norm.momentum, track_running_stats=norm.track_running_stats)
        for name, tensor in norm.state_dict().items():
            if tensor.dim():
                getattr(self.batch, name).data.copy_(tensor[self.half :])
                if name in ("weight", "bias"):
                    getattr(self.instance, name).data.copy_(tensor[: self.half])
        self.to(norm.weight.device)

    def forward(self, z: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        return torch.cat([self.instance(z[:, : self.half]), self.batch(z[:, self.half :])], 1)
