"""Weights between two networks, plain or weighted by Fisher information (WiSE-FT, Wortsman et al. 2022, arXiv 2109.01903)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

FLOOR = 1e-8
"""Smallest Fisher information of a weight."""
TENTHS = tuple(i / 10 for i in range(11))
"""The authors' sweep: 0, 0.1, ..., 1."""
_COUNTER = "num_batches_tracked"


def interpolate_state_dicts(
    start: Mapping[str, Tensor],
    end: Mapping[str, Tensor],
    alpha: float,
    fisher: tuple[Mapping[str, Tensor], Mapping[str, Tensor]] | None = None,
) -> dict[str, Tensor]:
    """``(1 - alpha) * start + alpha * end`` for every tensor: parameters, heads and running statistics.

    With Fisher information F0 and F1 of both, each at least 1e-8, a weight is
    ``((1 - alpha) F0 start + alpha F1 end) / ((1 - alpha) F0 + alpha F1)``; names without it are interpolated plainly. At 0
    and 1 it is either end, bit for bit. Half precision comes out as float32. Integers, such as BatchNorm's counters, are the
    end's. A prefix ``module.`` of DataParallel is taken off all names.

    Args:
        start: name -> tensor, of alpha = 0.
        end: of alpha = 1.
        alpha: in [0, 1].
        fisher: of start and of end, name -> squared gradients in the tensor's shape.

    Raises:
        ValueError: if alpha is outside of [0, 1], or the two differ in a name or a shape: they then are of different networks,
            whose average means nothing.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha={alpha} lies outside of the two networks: choose from [0, 1]")
    start, end = _plain(start), _plain(end)
    for name in (*start, *end):
        if (name in start) != (name in end):
            there, lacks = ("start", "end") if name in start else ("end", "start")
            if name.endswith(_COUNTER):
                continue
            raise ValueError(f"{name} is in {there} and not in {lacks}: interpolate weights of one network alone")
        if start[name].shape != end[name].shape:
            raise ValueError(
                f"{name} has shape {tuple(start[name].shape)} in start and {tuple(end[name].shape)} in end: interpolate "
                "weights of one network alone"
            )
    return {name: _between(name, start.get(name, tensor), tensor, alpha, fisher) for name, tensor in end.items()}


def check_alphas(alphas: Sequence[float]) -> None:
    """Refuse what does not lie between two networks.

    Raises:
        ValueError: naming it.
    """
    wrong = next((alpha for alpha in alphas if not 0 <= alpha <= 1), None)
    if not alphas or wrong is not None:
        raise ValueError(f"alphas={list(alphas)} must be numbers in [0, 1], at least one: such as [0, 0.5, 1]")


def _plain(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    return {name.removeprefix("module."): tensor for name, tensor in tensors.items()}


def _between(
    name: str, start: Tensor, end: Tensor, alpha: float, fisher: tuple[Mapping[str, Tensor], Mapping[str, Tensor]] | None
) -> Tensor:
    if not end.is_floating_point():
        return end.clone()
    wide = torch.promote_types(torch.promote_types(start.dtype, end.dtype), torch.float32)
    start, end = start.to(end.device, wide), end.to(wide)
    if fisher is None or name not in fisher[0] or name not in fisher[1]:
        return torch.lerp(start, end, alpha)
    of_start, of_end = (f[name].to(end.device, wide).clamp_min(FLOOR) for f in fisher)
    return torch.lerp(start, end, alpha * of_end / ((1 - alpha) * of_start + alpha * of_end))


def diagonal_fisher(net: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], chunk: int = 16) -> dict[str, Tensor]:
    """Mean over samples of the squared gradient of log p(label | x) by each trainable parameter, float32 by name.

    With labels drawn from the network's own prediction this is the diagonal of its Fisher information; with those of the data
    the empirical one. Cost: one forward and one backward pass a sample, ``chunk`` of them at once, which takes that many
    copies of the gradients.

    Args:
        net: in the mode in which it is to be measured, which must be eval where there is BatchNorm.
        batches: of (x, label), label int64 (B,).
        chunk: samples that are differentiated together.

    Raises:
        ValueError: if there is no sample, or the network cannot be differentiated sample by sample.
    """
    parameters = {name: p.detach() for name, p in net.named_parameters() if p.requires_grad}
    sums = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in parameters.items()}

    def loss(parameters: dict[str, Tensor], x: Tensor, label: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(net, parameters, (x.unsqueeze(0),)), label.unsqueeze(0))

    gradients, count = vmap(grad(loss), in_dims=(None, 0, 0)), 0
    for x, label in batches:
        for some, labels in zip(x.split(chunk), label.split(chunk), strict=True):
            try:
                found = gradients(parameters, some, labels)
            except RuntimeError as error:
                reason = str(error).split("\n")[0]
                raise ValueError(
                    f"{type(net).__name__} cannot be differentiated sample by sample for Fisher information ({reason}): leave "
                    "it out, or freeze what is not trained"
                ) from error
            for name, gradient in found.items():
                sums[name] += gradient.float().square().sum(0)
        count += len(x)
    if not count:
        raise ValueError("Fisher information needs at least one sample: give some batches")
    return {name: total / count for name, total in sums.items()}
