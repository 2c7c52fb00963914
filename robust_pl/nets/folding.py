"""The same network in less time, for attacks: in eval mode BatchNorm is folded into the convolution before it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.modules.module import _has_any_global_hook

from ..functional.gradients import compiled_parts
from .epilogue import Shifted
from .folded_layers import FoldedLayers
from .looking import Plan, look_again, look_at

__all__ = ["Folded", "Plan", "look_at"]
_TRIES = 2


class Folded:
    """A network as an attack asks it: the same logits but for rounding, with BatchNorm folded and channels last.

    The network is not changed and no module is replaced: while it runs, each convolution that one BatchNorm alone reads takes
    weights with that BatchNorm in them, and the BatchNorm passes on what it gets. Which they are is seen once for each network
    and shape of images, see :func:`look_at`. In every pass the result of such a convolution can be read by its own BatchNorm
    alone, and a pass in which somebody else asks for it is run again as it is. Left as they are: convolutions and BatchNorms
    of other classes than torch's own, in train mode, parametrised or with hooks (but those that say
    ``hook.counts_only = True``); and networks that are compiled, sharded, replicated, or recompute activations in their
    backward pass.

    Weights that are replaced or change in place are folded anew; where they are written through ``.data``, make one for each
    call of an attack, or :meth:`refresh` it. It costs no pass, and a copy of the convolutions' weights as long as it lives; the
    first for a network costs what :func:`look_at` does.

    Args:
        model: maps pixels (B, C, H, W) to logits (B, K).
        fold: fold BatchNorm.
        channels_last: show the network images in channels-last memory format, if it takes them.
        late_bias: leave the bias to the ReLU that follows, see :class:`robust_pl.nets.epilogue.Shifted`. It takes the host
            longer and the device less long, so it is for what is recorded once and replayed.
    """

    def __init__(self, model: nn.Module, *, fold: bool = True, channels_last: bool = True, late_bias: bool = False) -> None:
        self.model, self.channels_last, self.late_bias = model, channels_last, late_bias
        self.fold = fold and not compiled_parts(model) and not any(isinstance(p, DTensor) for p in model.parameters())
        self.layers: FoldedLayers | None = None
        self._plan: Plan | None = None
        self._tries = _TRIES

    def __call__(self, x: Tensor) -> Tensor:
        """Logits (B, K) of pixels (B, C, H, W)."""
        plan = look_at(self.model, x)
        shown = x.contiguous(memory_format=torch.channels_last) if self.channels_last and plan.channels_last else x
        if self.fold and self._tries and plan.pairs and not _has_any_global_hook():
            logits = self._folded(plan, shown)
            if logits is not None:
                return logits
            self._tries -= 1
            if self._tries:
                look_again(self.model, x)
        return self._as_it_is(x, shown, plan)

    def refresh(self) -> None:
        """Fold the weights as they are now into the tensors that are in use."""
        if self.layers is not None:
            self.layers.refresh()

    def _folded(self, plan: Plan, x: Tensor) -> Tensor | None:
        """None if the network went another way; an error of its own is heard again when it runs as it is."""
        if self.layers is None or self._plan is not plan:
            found = [(conv(), norm(), tuple(way() for way in on_the_way)) for conv, norm, on_the_way in plan.pairs]
            pairs = [(conv, norm, on_the_way) for conv, norm, on_the_way in found if None not in (conv, norm, *on_the_way)]
            self._plan, self.layers = plan, FoldedLayers(pairs, self.channels_last, self.late_bias)
        try:
            with self.layers.at_work():
                logits = self.model(x)
                return logits.whole() if type(logits) is Shifted else logits
        except Exception:
            return None

    def _as_it_is(self, x: Tensor, shown: Tensor, plan: Plan) -> Tensor:
        if shown is x:
            return self.model(x)
        try:
            return self.model(shown)
        except RuntimeError as error:
            if "view" not in str(error) and "contiguous" not in str(error):
                raise
        plan.channels_last = False  # on this way through its layers it wants them contiguous
        return self.model(x)
