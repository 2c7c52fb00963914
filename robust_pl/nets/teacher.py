"""A network that a student learns from."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from .frozen import Frozen

Precision = Literal["float32", "bfloat16", "float16"]


class Teacher(Frozen):
    """A trained network that stays as it is while a student learns from it; its logits come in float32 or wider.

    Methods wrap the network that they are given, so a config names this class only to change a setting:
    ``teacher: {class_path: Teacher, init_args: {net: {class_path: TrainedNet, init_args: {source: runs/x}}, cache: true}}``.
    In eval mode, in no optimizer, average or checkpoint, see :class:`Frozen`.

    Args:
        net: maps pixels in [0, 1], (B, C, H, W), to logits (B, K); changed in place, and not copied.
        precision: what it computes in; half precision takes half the memory, and on a GPU less time.
        cache: ask it for all clean images when the first of them is needed, and look its logits up from then on. Possible where
            the data module does not augment. Takes N * K * 4 bytes for N training images.

    Raises:
        ValueError: if the precision is unknown.
    """

    def __init__(self, net: nn.Module, precision: Precision = "float32", cache: bool = False) -> None:
        if precision not in get_args(Precision):
            raise ValueError(f"precision={precision!r} is unknown: choose one of {', '.join(get_args(Precision))}")
        super().__init__(net if precision == "float32" else net.to(getattr(torch, precision)))
        self.precision, self.cache = precision, cache

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, K) of pixels (B, C, H, W); gradients flow into the pixels."""
        first = next((p for p in self.net.parameters() if p.is_floating_point()), x)
        logits = self.net(x.to(first.dtype))
        return logits.to(torch.promote_types(logits.dtype, torch.float32))


def as_teacher(net: nn.Module) -> Teacher:
    """The network as a teacher, if it is none yet."""
    return net if isinstance(net, Teacher) else Teacher(net)
