"""What an evaluation asks of attacks, and what it learns of each sample: the same with and without a Trainer."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch import Callback
from torch import Tensor, nn

from ..functional import geometry
from ..functional.geometry import Norm
from ..functional.losses import cross_entropy
from ..metrics.scoreboard import CLEAN, WORST, Scoreboard
from .attacks.ledger import Attacked
from .attacks.prepare import prepared


class EvaluationAttack(Callback, ABC):
    """What an evaluation asks of an attack; :class:`robust_pl.callbacks.Attack` is its implementation."""

    name: str | None = None
    """Key of the metrics, ``acc_<name>``; the command line sets it to the key of the ``attacks`` map."""
    stages: tuple[str, ...] = ("validate", "test", "predict")
    """Where the callback takes part."""
    fitted: bool = False
    """Whether an evaluation need not call :meth:`fit` again."""

    norm: Norm

    @abstractmethod
    def run(self, model: nn.Module, x: Tensor, y: Tensor, *, index: Tensor | None = None) -> Attacked:
        """Attack a batch whose samples stand at ``index`` of their data set."""

    @abstractmethod
    def aim(self, y: Tensor, num_classes: int, index: Tensor) -> Tensor:
        """Labels to pass to :meth:`run` for the true labels ``y``."""

    def fit(self, model: nn.Module, data: Iterable[Any]) -> None:
        """Look at training data before an evaluation; only attacks that must, such as universal ones, define it.

        Args:
            model: the network that will be attacked: in eval mode, with frozen parameters and gradients on.
            data: batches of (x, y) or (x, y, index).
        """

    def fit_to(self, model: nn.Module, data: Iterable[Any]) -> None:
        """Call :meth:`fit` with the network prepared as for an attack."""
        with prepared(model, "eval"):
            self.fit(model, data)

    @property
    def must_fit(self) -> bool:
        """Whether the class defines :meth:`fit`."""
        return type(self).fit is not EvaluationAttack.fit


@dataclass
class Outcome:
    """What happened to each sample of a batch.

    Args:
        index: position in the data set (B,).
        y: labels (B,).
        logits: clean logits (B, K).
        predictions: name of the attack, or ``clean`` -> predicted class (B,).
        attacked: name of the attack -> what it found and spent.
        norms: name of the attack -> size of the perturbation in the attack's norm (B,).
        seconds: name of the attack -> time spent on this batch.
    """

    index: Tensor
    y: Tensor
    logits: Tensor
    predictions: dict[str, Tensor]
    attacked: dict[str, Attacked] = field(default_factory=dict)
    norms: dict[str, Tensor] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def columns(self) -> dict[str, Tensor]:
        """The batch as columns of a table."""
        confidence = self.logits.float().softmax(1).amax(1)
        columns = {
            "index": self.index,
            "label": self.y,
            "prediction": self.predictions[CLEAN],
            "confidence": confidence,
        }
        for name, norms in self.norms.items():
            columns[f"prediction_{name}"] = self.predictions[name]
            columns[f"norm_{name}"] = norms
        return columns


def attack_batch(
    model: nn.Module,
    attacks: Mapping[str, EvaluationAttack],
    x: Tensor,
    y: Tensor,
    index: Tensor,
    logits: Tensor | None = None,
) -> Outcome:
    """Run every attack on one batch and judge its result by one more forward pass.

    Args:
        model: maps pixels to logits.
        attacks: by name; their random numbers belong to the samples in ``index``.
        x: pixels (B, C, H, W) in [0, 1].
        y: labels (B,).
        index: position of each sample in its data set (B,).
        logits: clean logits if they are known already.
    """
    with torch.no_grad():
        logits = model(x) if logits is None else logits
    outcome = Outcome(index, y, logits, {CLEAN: logits.argmax(1)})
    for name, attack in attacks.items():
        attack.name = name
        began = _now(x.device)
        attacked = attack.run(model, x, attack.aim(y, logits.shape[1], index), index=index)
        outcome.seconds[name] = _now(x.device) - began
        seen = attacked.x_adv.to(x.dtype)
        with torch.no_grad():
            outcome.predictions[name] = model(seen).argmax(1)
        outcome.attacked[name] = attacked
        # Of what the network saw: in bf16 that is rounded.
        outcome.norms[name] = geometry.size(seen.to(attacked.x_adv.dtype) - x, attack.norm)
    return outcome


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def score(board: Scoreboard, outcome: Outcome) -> None:
    """Add a batch to the counts."""
    y, classes = outcome.y, outcome.logits.shape[1]
    if y.min() < 0 or y.max() >= classes:
        raise ValueError(
            f"labels run from {y.min().item()} to {y.max().item()} and the network has {classes} logits: labels must lie in "
            "[0, num_classes); check the data"
        )
    right = {name: prediction == y for name, prediction in outcome.predictions.items()}
    cost = {name: (a.forwards, a.backwards, outcome.seconds[name]) for name, a in outcome.attacked.items()}
    board.update(y, right, cost, cross_entropy(outcome.logits.float(), y))


def check_names(names: Sequence[str]) -> None:
    """Refuse names of attacks that would hide each other in the report.

    Raises:
        ValueError: if two attacks share a name, or one takes a name that the report uses itself.
    """
    for name in names:
        if name in (CLEAN, WORST):
            raise ValueError(f"an attack is named {name!r}, which the report uses itself: choose another name")
        if names.count(name) > 1:
            raise ValueError(f"two attacks are named {name!r}: give each its own name, since it is the metric's name")
        if not name.replace("_", "").replace("-", "").isalnum():
            raise ValueError(f"an attack is named {name!r}: use letters, digits, - and _, since it becomes acc_<name>")
