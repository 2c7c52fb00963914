"""The pass at which a training attack took its gradient, for losses that compare with it: made once, differentiated twice."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from ...callbacks.attacks.base import Attack
from ...callbacks.attacks.fgsm import FGSM
from ...callbacks.attacks.ledger import Attacked
from ..base import Method
from ..example import Example


class KeptPass:
    """Logits with their graph, to be used once, and only while the weights are those that they were made with.

    Args:
        module: whose weights.
        logits: (B, K).
    """

    def __init__(self, module: nn.Module, logits: Tensor) -> None:
        self._logits: Tensor | None = logits
        self._versions = _versions(module)

    def take(self, module: nn.Module) -> Tensor | None:
        """The logits, which are then gone; None if they are, or if a weight has moved since."""
        logits, self._logits = self._logits, None
        return logits if self._versions == _versions(module) else None


@dataclass
class StartedExample(Example):
    """A batch with the point at which its attack took the gradient.

    Args:
        start: pixels (B, C, H, W) in [0, 1].
        gradient: of the attack's objective there, likewise.
        kept: the forward pass at the start, if a loss can use it.
    """

    start: Tensor | None = None
    gradient: Tensor | None = None
    kept: KeptPass | None = None


def run_from(
    method: Method, example: Example, eps: Tensor | None = None, start: Tensor | None = None, kept: bool = True
) -> StartedExample:
    """The batch after one call of a single-step attack.

    Args:
        method: whose attack; its pass at the start is kept where ``attack.bn_mode`` is ``train``, as that of a loss is.
        example: what ``method.clean`` made.
        eps: radius of each sample, (B, 1, 1, 1); None takes the attack's.
        start: where to begin, pixels (B, C, H, W) that may lie outside of the box; None leaves that to the attack.
        kept: whether the loss looks at the start again.
    """
    kept = kept and method.attack.bn_mode == "train"
    attacked: Attacked = method.run_attack(example, eps, start, keep_graph=kept)
    if attacked.first_logits is None:
        raise ValueError(
            f"{type(method).__name__} looks at the point at which its attack takes the gradient, and "
            f"{type(method.attack).__name__} takes none there: choose FGSM or NoisyFGSM"
        )
    x, y, index = example.x, example.y, example.index
    return StartedExample(
        x,
        y,
        index,
        attacked.x_adv.to(x.dtype),
        attacked.start.to(x.dtype),
        attacked.first_gradient,
        KeptPass(method, attacked.first_logits) if kept else None,
    )


def logits_at_start(method: Method, example: StartedExample) -> Tensor:
    """Logits (B, K) at the start, differentiable: the attack's own pass where its weights still hold, else another one.

    So a step costs one backward pass more for them and no forward pass. A weight perturbation, which asks for the loss at
    other weights, costs both.
    """
    logits = None if example.kept is None else example.kept.take(method)
    return method(example.start) if logits is None else logits


def check_given_start(attack: Attack, who: str, where: str) -> None:
    """Refuse an attack that would not begin where the method says.

    Args:
        attack: the training attack.
        who: the method's name.
        where: what it starts from, in words.

    Raises:
        TypeError: if it is no FGSM.
        ValueError: if it has a start of its own, or several.
    """
    if not isinstance(attack, FGSM):
        raise TypeError(f"attack is a {type(attack).__name__}: {who} takes FGSM, whose one step begins at {where}")
    if attack.norm != "linf":
        raise ValueError(f"attack.norm is {attack.norm!r} and {who} keeps signs of gradients: choose linf")
    if attack.random_start or attack.restarts > 1:
        raise ValueError(
            f"attack.random_start={attack.random_start!r} with restarts={attack.restarts}: {who} begins at {where}, so leave "
            "both out"
        )


def _versions(module: nn.Module) -> list[int]:
    return [parameter._version for parameter in module.parameters()]
