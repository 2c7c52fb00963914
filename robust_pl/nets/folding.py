"""The same classifier, faster: for attacks, which ask a network in eval mode thousands of times."""

from __future__ import annotations

from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

_KNOWN = ("torch.nn.modules.", "robust_pl.nets.", "torchvision.models.", "torchvision.ops.", "timm.")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_TOLERANCE = 1e-5
_METHODS = "robust_pl.methods.base"


class Folded(nn.Module):
    """A copy of a network with BatchNorm folded into the convolutions before it, fed with channels last.

    Args:
        net: the copy.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.contiguous(memory_format=torch.channels_last))


def folded(model: nn.Module, x: Tensor, logits: Tensor, *, fold: bool = True) -> nn.Module:
    """A copy of ``model`` that gives the same logits in less time, or ``model`` itself where that is not certain.

    Only networks whose modules are all known (those of torch, torchvision, timm and this library), in eval mode and without
    hooks, are copied: what a user's own module does beside its arithmetic must go on happening. The copy must agree on ``x``
    to 1e-5 of the largest logit. It costs one pass over the first image and one over ``x``, with the copy.

    Args:
        model: maps pixels (B, C, H, W) to logits (B, K), in eval mode.
        x: a few images (B, C, H, W).
        logits: of ``model`` at ``x``, (B, K).
        fold: also fold BatchNorm; False changes the memory format only.
    """
    if type(model).forward.__module__ == _METHODS and not _is_special(model):
        model = model.net
    if not all(_is_plain(module) for module in model.modules()):
        return model
    net = deepcopy(model)
    with torch.no_grad():
        if fold:
            for conv, norm in _pairs(net, x[:1]):
                _replace(net, norm, nn.Identity())
                _replace(net, conv, fuse_conv_bn_eval(conv, norm))
        faster = Folded(net.requires_grad_(False)).eval()
        found = faster(x)
    close = (found - logits).abs().max() <= _TOLERANCE * logits.abs().max().clamp_min(1.0)
    return faster if close else model


def _is_special(module: nn.Module) -> bool:
    return "forward" in vars(module) or any(getattr(module, hooks) for hooks in _HOOKS) or hasattr(module, "parametrizations")


def _is_plain(module: nn.Module) -> bool:
    # A trailing dot, so that a module called timm_of_mine is not taken for timm.
    return f"{type(module).__module__}.".startswith(_KNOWN) and not module.training and not _is_special(module)


def _pairs(net: nn.Module, x: Tensor) -> list[tuple[nn.Conv2d, nn.BatchNorm2d]]:
    """Convolutions and the BatchNorm that takes what they return, where each runs once."""
    made_by: dict[int, nn.Module] = {}
    kept: list[Tensor] = []  # so that no two tensors share an id
    calls: dict[nn.Module, int] = {}
    pairs: list[tuple[nn.Conv2d, nn.BatchNorm2d]] = []

    def note(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        calls[module] = calls.get(module, 0) + 1
        if type(module) is nn.Conv2d:
            kept.append(output)
            made_by[id(output)] = module
        elif id(inputs[0]) in made_by and module.track_running_stats:
            pairs.append((made_by[id(inputs[0])], module))

    layers = [module for module in net.modules() if type(module) in (nn.Conv2d, nn.BatchNorm2d)]
    hooks = [layer.register_forward_hook(note) for layer in layers]
    net(x)
    for hook in hooks:
        hook.remove()
    return [(conv, norm) for conv, norm in pairs if calls[conv] == calls[norm] == 1]


def _replace(net: nn.Module, old: nn.Module, new: nn.Module) -> None:
    for parent in net.modules():
        for name, child in parent.named_children():
            if child is old:
                setattr(parent, name, new)
