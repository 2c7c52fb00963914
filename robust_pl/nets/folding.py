"""The same classifier, faster: for attacks, which ask a network in eval mode thousands of times."""

from __future__ import annotations

from collections import Counter
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
    to 1e-5 of the largest logit. It costs a forward and a backward pass over the first image and a
    forward pass over ``x``, with the copy.

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
    if fold:
        for conv, norm in _pairs(net, x[:1]):
            _replace(net, norm, nn.Identity())
            _replace(net, conv, fuse_conv_bn_eval(conv, norm))
    with torch.no_grad():
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
    """Convolutions and the BatchNorm that takes what they return, where each runs once and nobody else reads it.

    In one pass, BatchNorm gets what the convolution returned, and everybody else the same plus a stranger, who is zero: the
    logits have a gradient with respect to it if there is anybody else.
    """
    made: dict[int, tuple[nn.Conv2d, Tensor, Tensor, int]] = {}
    calls: Counter[nn.Module] = Counter()
    pairs: list[tuple[nn.Conv2d, nn.BatchNorm2d]] = []
    strangers: list[Tensor] = []

    def after_conv(conv: nn.Conv2d, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        calls[conv] += 1
        strangers.append(torch.zeros_like(output).requires_grad_())
        shown = output + strangers[-1]
        made[id(shown)] = conv, output, shown, shown._version  # holding them, so that no two share an id
        return shown

    def before_norm(norm: nn.BatchNorm2d, inputs: tuple[Tensor, ...]) -> Tensor | None:
        calls[norm] += 1
        conv, output, shown, version = made.get(id(inputs[0]), (None, None, None, 0))
        if conv is None or shown._version != version or not norm.track_running_stats:
            return None
        pairs.append((conv, norm))
        return output

    hooks = [m.register_forward_hook(after_conv) for m in net.modules() if type(m) is nn.Conv2d]
    hooks += [m.register_forward_pre_hook(before_norm) for m in net.modules() if type(m) is nn.BatchNorm2d]
    with torch.enable_grad():
        logits = net(x)
        reached = (
            torch.autograd.grad(logits.sum(), strangers, allow_unused=True) if logits.requires_grad else [None] * len(made)
        )
    for hook in hooks:
        hook.remove()
    read = {conv for (conv, *_), gradient in zip(made.values(), reached, strict=True) if gradient is not None}
    return [(conv, norm) for conv, norm in pairs if conv not in read and calls[conv] == calls[norm] == 1]


def _replace(net: nn.Module, old: nn.Module, new: nn.Module) -> None:
    for parent in net.modules():
        for name, child in parent.named_children():
            if child is old:
                setattr(parent, name, new)
