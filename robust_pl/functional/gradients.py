"""The one way in which this library asks for a gradient with respect to the input."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


def compiled_parts(model: nn.Module) -> list[str]:
    """Names of what is compiled in a network, be it wrapped by ``torch.compile`` or compiled in place."""
    return [name or "the network" for name, module in model.named_modules() if _is_compiled(module)]


def _is_compiled(module: nn.Module) -> bool:
    in_place = module._compiled_call_impl  # what replays CUDA graphs there runs the network as it is wherever it must
    return hasattr(module, "_orig_mod") or (in_place is not None and not getattr(in_place, "replays", False))


def refuse_compiled(model: nn.Module) -> None:
    """Refuse a network that is compiled where one forward pass is to be differentiated twice.

    Raises:
        ValueError: naming what is compiled.
    """
    compiled = compiled_parts(model)
    if compiled:
        raise ValueError(
            f"{compiled[0]} is compiled, and a compiled network cannot be differentiated twice: "
            "switch torch.compile off for methods that need double backward, or use a forward pass again"
        )


def input_gradient(
    model: Callable[[Tensor], Tensor],
    x: Tensor,
    objective: Callable[[Tensor], Tensor],
    *,
    create_graph: bool = False,
    keep_graph: bool = False,
) -> tuple[Tensor, Tensor]:
    """Gradient of ``objective(model(x)).sum()`` with respect to ``x`` alone: one forward and one backward pass.

    Uses ``torch.autograd.grad``, so that nothing is added to the gradients of the parameters.

    Args:
        model: maps (B, C, H, W) to logits (B, K).
        x: pixels (B, C, H, W).
        objective: maps logits (B, K) to one value a sample, (B,).
        create_graph: keep the graph, so that the gradient can itself be differentiated (GradAlign, say).
        keep_graph: keep that of the logits, so that a loss can use the same forward pass.

    Returns:
        The gradient (B, C, H, W) in the dtype of ``x``, and the logits (B, K), detached unless a graph is kept.

    Raises:
        ValueError: if a graph is kept of a compiled network, which cannot be differentiated twice.
    """
    if (create_graph or keep_graph) and isinstance(model, nn.Module):
        refuse_compiled(model)
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        logits = model(x)
        (gradient,) = torch.autograd.grad(
            objective(logits).sum(), x, retain_graph=create_graph or keep_graph, create_graph=create_graph
        )
    return gradient, logits if create_graph or keep_graph else logits.detach()
