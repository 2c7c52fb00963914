"""A network that is measured on groups of its classes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..functional.class_groups import ClassGroups


def group_classes(model: nn.Module, groups: ClassGroups) -> RemovableHandle:
    """From now on every call of the model gives the logits of the groups; remove the handle to end that.

    It is a hook, so that the model, its weights and the names of its tensors stay what they are, and that attacks, accuracy,
    analyses and checks all see the same logits, whatever the model's own forward is.
    """
    return model.register_forward_hook(lambda module, inputs, logits: groups(logits))


@contextmanager
def grouped(model: nn.Module, groups: ClassGroups | None) -> Iterator[None]:
    """While this lasts, the model gives the logits of the groups; None leaves it as it is."""
    handle = None if groups is None else group_classes(model, groups)
    try:
        yield
    finally:
        if handle is not None:
            handle.remove()


class GroupedNet(nn.Module):
    """A network of many classes as one of groups of them, for code that holds no data module.

    Args:
        net: maps pixels (B, C, H, W) to logits (B, K).
        groups: numbers of the classes of each group.

    Raises:
        ValueError: as :class:`robust_pl.functional.class_groups.ClassGroups`.
    """

    def __init__(self, net: nn.Module, groups: list[list[int]]) -> None:
        super().__init__()
        self.net, self.groups = net, ClassGroups(groups)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, G)."""
        return self.groups(self.net(x))
