"""A network that takes part in a computation but never in the training: a teacher, a surrogate."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class Frozen(nn.Module):
    """Keep a network as it is: in eval mode, without parameter gradients, and out of checkpoints.

    Whatever ``train`` is called on a module that holds it, BatchNorm and dropout inside stay in eval mode. Gradients
    with respect to the *input* still flow, so it can be attacked. Its tensors are left out of ``state_dict`` (it was
    loaded from its own file and is again when a run resumes), and a strict load of the holder does not ask for them.

    Args:
        net: the network; it is changed in place (``requires_grad`` off, eval mode) and not copied.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net.requires_grad_(False)
        self.train()
        self.register_state_dict_post_hook(_leave_out)
        self.register_load_state_dict_pre_hook(_fill_in)

    def train(self, mode: bool = True) -> Frozen:
        """Stay in eval mode, whatever ``mode`` says."""
        return super().train(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def forward_features(self, x: Tensor) -> Tensor:
        """The network's own features, where it offers them."""
        return self.net.forward_features(x)


def _leave_out(module: nn.Module, state_dict: dict[str, Any], prefix: str, _: Any) -> None:
    for name in [name for name in state_dict if name.startswith(prefix + "net.")]:
        del state_dict[name]


def _fill_in(module: Frozen, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    # Strict loading asks for every tensor: answer with the ones it has.
    for name, tensor in module.net.state_dict().items():
        state_dict.setdefault(f"{prefix}net.{name}", tensor)
