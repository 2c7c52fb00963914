"""Dynamic networks under evaluation: which ones a model calls, and whether gradients reach their gates."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..nets.routed import RoutedNet
from .attacks.prepare import evaluating, prepared

_IMAGES = 8
_SAME, _SAME_COARSE = 1e-3, 0.1
_NUDGE, _CHANGED, _PLACES = 0.05, 1e-3, (0.0, 0.25, 0.5, 0.75, 1.0)
_TURN, _TURNED = 1e-3, 1e-5


def refuse_cut_gates(model: nn.Module, x: Tensor) -> None:
    """Refuse a model whose gates are cut off from gradients, before an attack runs that would overstate its robustness.

    Looks at every dynamic network (:class:`robust_pl.nets.RoutedNet`) that the model calls, on the first 8 images; others cost
    nothing.

    Args:
        model: any classifier; looked at in eval mode and left as it was.
        x: pixels (B, C, H, W).

    Raises:
        ValueError: if the gradient of ``forward`` is not that of ``routed(x, signals(x))``, or one of these cuts it.
    """
    problems = gate_problems(model, x)
    if problems:
        raise ValueError(f"{problems[0]}; gradient attacks would not see the gates, and robust accuracy would be overstated")


def gate_problems(model: nn.Module, x: Tensor) -> list[str]:
    """What is wrong with the gates of a model, one sentence each; see :func:`refuse_cut_gates`."""
    if not _dynamic(model):
        return []
    with prepared(model, "eval"), eagerly(x):
        calls = _calls(model, x[:_IMAGES].detach().clone())
        return [f"{type(net).__name__}: {problem}" for net, z in calls.items() for problem in _problems(net, z)]


def called_routed_nets(model: nn.Module, x: Tensor) -> list[RoutedNet]:
    """The dynamic networks that a forward pass on two of the images (B, C, H, W) calls, the model or parts of it.

    A teacher that a method holds beside its network is none of them. Costs one forward pass if there is any, else none.
    """
    if not _dynamic(model):
        return []
    with evaluating(model), torch.no_grad(), eagerly(x):
        return list(_calls(model, x[:2]))


@contextmanager
def eagerly(x: Tensor) -> Iterator[None]:
    """Full precision and nothing compiled, since compiled networks do not see hooks; random streams are put back."""
    with (
        torch.autocast(x.device.type, enabled=False),
        torch.random.fork_rng(range(torch.cuda.device_count()) if x.is_cuda else []),
        torch.compiler.set_stance("force_eager"),
    ):
        yield


def _dynamic(model: nn.Module) -> list[RoutedNet]:
    return [module for module in model.modules() if isinstance(module, RoutedNet)]


def _calls(model: nn.Module, x: Tensor) -> dict[RoutedNet, Tensor]:
    """Dynamic networks that are called, and what with at first."""
    found: dict[RoutedNet, Tensor] = {}

    def note(net: nn.Module, given: tuple[Tensor, ...]) -> None:
        found.setdefault(net, given[0].detach())

    hooks = [net.register_forward_pre_hook(note) for net in _dynamic(model)]
    try:
        model(x)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _problems(net: RoutedNet, z: Tensor) -> Iterator[str]:
    """What is wrong with one dynamic network at its inputs ``z`` (B, ...)."""
    same = _SAME if z.dtype in (torch.float32, torch.float64) else _SAME_COARSE
    pixels = z.clone().requires_grad_()
    signals = _seeded(net.signals, pixels)
    if signals.dim() != 2 or len(signals) != len(z):
        yield f"signals(x) has shape {tuple(signals.shape)} for {len(z)} images: return one row for each, (B, S)"
        return
    if not signals.requires_grad:
        yield "signals(x) has no gradient with respect to x: do not detach or round what the router says"
        return
    logits, whole = _seeded(net.routed, pixels, signals), _seeded(net, pixels)
    away = _relative(whole, logits)
    if away > same:
        yield f"forward(x) is not routed(x, signals(x)), from which it is {away:.1%} away: leave forward as RoutedNet has it"
    along = torch.randn_like(logits)
    through, parts = (_gradient(outputs, along, pixels) for outputs in (whole, logits))
    away = _relative(through, parts)
    if away > same:
        yield f"the gradient of forward(x) is {away:.1%} away from that of routed(x, signals(x)): detach no gates in forward"
    if stuck := _without_gradient(net, z, signals.detach()):
        yield (
            f"{stuck} of {signals.shape[1]} signals change with the image and have no gradient with respect to it: let the "
            "router say them smoothly, or pass gradients straight through where it rounds"
        )
    if _unfelt(net, z, signals.detach(), along):
        yield "some signals move the logits of routed(x, signals) and get no gradient from them: do not detach them in routed"


def _without_gradient(net: RoutedNet, z: Tensor, signals: Tensor) -> int:
    """Number of signals that change on some way from the images, though their derivative is 0 for every image all along.

    The ways lead to images nearby, to other images, and to noise, where also a router that is sure of these changes its mind.
    """
    still = torch.ones(signals.shape[1], dtype=torch.bool, device=z.device)
    changed = torch.zeros_like(still)
    for goal in (z + _NUDGE * torch.randn_like(z).sign(), z.roll(1, 0), torch.rand_like(z)):
        for place in _PLACES:
            still &= (_derivative(net, z.lerp(goal, place), goal - z) == 0).all(0)
        changed |= (_seeded(net.signals, goal).detach() - signals).abs().amax(0) > _CHANGED
    return int((changed & still).sum())


def _derivative(net: RoutedNet, z: Tensor, direction: Tensor) -> Tensor:
    """Derivative of each signal along a direction, (B, S): a backward pass is linear in its seed, so differentiate by that."""
    z = z.clone().requires_grad_()
    signals = _seeded(net.signals, z)
    seed = torch.ones_like(signals, requires_grad=True)
    (gradient,) = torch.autograd.grad(signals, z, seed, create_graph=True)
    if not gradient.requires_grad:
        return torch.zeros_like(signals)
    return torch.autograd.grad((gradient * direction).sum(), seed, allow_unused=True, materialize_grads=True)[0]


def _unfelt(net: RoutedNet, z: Tensor, signals: Tensor, along: Tensor) -> bool:
    """Whether turning up the signals that get no gradient from the logits moves these, and turning them down does, too.

    Both, since a hard choice of the highest ones changes where two are equal and one of them is turned up.
    """
    turned = signals.clone().requires_grad_()
    logits = _seeded(net.routed, z, turned)
    unfelt = (_gradient(logits, along, turned) == 0).all(0)
    up, down = ((_seeded(net.routed, z, signals + side * _TURN * unfelt) - logits).detach().abs().amax(1) for side in (1, -1))
    scale = logits.detach().abs().amax(1).clamp_min(1e-12)
    return bool((torch.minimum(up, down) > _TURNED * scale).any())


def _seeded(function: Callable[..., Tensor], *given: Tensor) -> Tensor:
    # A network that draws random numbers draws the same ones each time.
    torch.manual_seed(0)
    return function(*given)


def _gradient(outputs: Tensor, along: Tensor, inputs: Tensor) -> Tensor:
    if not outputs.requires_grad:
        return torch.zeros_like(inputs)
    (gradient,) = torch.autograd.grad(
        (outputs * along).sum(), inputs, retain_graph=True, allow_unused=True, materialize_grads=True
    )
    return gradient


def _relative(a: Tensor, b: Tensor) -> float:
    """Largest distance of two rows in units of the longer one."""
    a, b = a.detach().flatten(1).float(), b.detach().flatten(1).float()
    return ((a - b).norm(dim=1) / torch.maximum(a.norm(dim=1), b.norm(dim=1)).clamp_min(1e-12)).max().item()
