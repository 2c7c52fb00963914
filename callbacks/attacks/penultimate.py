"""What the last linear layer of a network reads."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ...functional.gradients import compiled_parts


class Penultimate:
    """Features and logits of a classifier from one forward pass.

    The last layer is the linear one whose output are the logits, found anew in each pass, so that wrappers and further
    networks inside of a module do not matter.

    Args:
        model: maps pixels to logits.
        layer: name of the last layer, as in ``named_modules()`` or its ending; needed where what the last linear layer
            returns is changed once more.

    Raises:
        ValueError: if no layer, or more than one, has that name, or the network is compiled, which hides its layers.
    """

    def __init__(self, model: nn.Module, layer: str | None = None) -> None:
        if compiled := compiled_parts(model):
            raise ValueError(
                f"{compiled[0]} is compiled, and a compiled network does not show the features that are compared: switch "
                "torch.compile off"
            )
        self.model, self.layer = model, layer
        if layer is None:
            self.layers = [m for m in model.modules() if isinstance(m, nn.Linear)]
            return
        named = dict(model.named_modules())
        found = [layer] if layer in named else [name for name in named if name.endswith(f".{layer}")]
        if len(found) != 1:
            raise ValueError(f"layer={layer!r} names {len(found)} layers of the network: write one as in named_modules()")
        self.layers = [named[found[0]]]

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Features (B, D) and logits (B, K).

        Raises:
            ValueError: if no linear layer returns the logits.
        """
        seen: list[tuple[Tensor, Any]] = []
        hooks = [layer.register_forward_hook(lambda _, given, out: seen.append((given[0], out))) for layer in self.layers]
        try:
            logits = self.model(x)
        finally:
            for hook in hooks:
                hook.remove()
        for features, output in reversed(seen):
            if self.layer is not None or output is logits:
                return features.flatten(1).to(logits.dtype), logits
        raise ValueError(
            "no linear layer of the network returns its logits, so which features to compare is unknown: name the last layer "
            "with layer=, as in named_modules()"
        )
