"""What an evaluation asks of attacks, and what it learns of each sample: the same with and without a Trainer."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch import Callback
from torch import Tensor, nn

from ..functional import geometry
from ..functional.geometry import NORMS, Norm
from ..functional.losses import cross_entropy
from ..metrics.scoreboard import CLEAN, WORST, Scoreboard
from .attacks.ledger import Attacked, Passes, Progress
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
    def run(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        *,
        index: Tensor | None = None,
        progress: Progress | None = None,
    ) -> Attacked:
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

    def fitted_state(self) -> dict[str, Tensor]:
        """What :meth:`fit` learned, so that an evaluation that is stopped need not fit again; empty fits again."""
        return {}

    def load_fitted_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on with what :meth:`fitted_state` gave."""

    @property
    def must_fit(self) -> bool:
        """Whether the class defines :meth:`fit`."""
        return type(self).fit is not EvaluationAttack.fit


@dataclass(frozen=True)
class Verdict:
    """What one attack did to a batch.

    Args:
        prediction: class that the network says under the attack (B,).
        attacked: what the attack found and spent.
        sizes: norm -> size of the perturbation that the network saw (B,), in all three norms.
        seconds: time spent on the batch.
    """

    prediction: Tensor
    attacked: Attacked
    sizes: dict[str, Tensor]
    seconds: float

    def columns(self) -> dict[str, Tensor]:
        """One number a sample under each name."""
        passes = {"forwards": self.attacked.forward_passes.of_each, "backwards": self.attacked.backward_passes.of_each}
        parts = {f"robust_{part}": stands for part, stands in self.attacked.robust.items()}
        return {"prediction": self.prediction, **self.sizes, **passes, **parts}

    def tensors(self) -> dict[str, Tensor]:
        """All of it but the time, as tensors that can be stored."""
        return {**self.columns(), "x_adv": self.attacked.x_adv}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], seconds: float) -> Verdict:
        """What :meth:`tensors` gave, put together again."""
        robust = {key.removeprefix("robust_"): value for key, value in tensors.items() if key.startswith("robust_")}
        passes = (Passes.of(tensors["forwards"]), Passes.of(tensors["backwards"]))
        attacked = Attacked(tensors["x_adv"], *passes, robust=robust)
        return cls(tensors["prediction"], attacked, {norm: tensors[norm] for norm in NORMS}, seconds)


@dataclass
class Outcome:
    """What happened to each sample of a batch.

    Args:
        index: position in the data set (B,).
        y: labels (B,).
        logits: clean logits (B, K).
        verdicts: name of the attack -> what it did.
    """

    index: Tensor
    y: Tensor
    logits: Tensor
    verdicts: dict[str, Verdict] = field(default_factory=dict)

    @property
    def predictions(self) -> dict[str, Tensor]:
        """Name of the attack, or ``clean`` -> predicted class (B,)."""
        return {CLEAN: self.logits.argmax(1), **{name: verdict.prediction for name, verdict in self.verdicts.items()}}

    def columns(self) -> dict[str, Tensor]:
        """The batch as columns of a table: label, clean prediction and its confidence, clean loss; for each attack
        ``right_`` (whether the sample stands), ``prediction_``, ``linf_``, ``l2_``, ``l1_``, ``forwards_``, ``backwards_``
        and, after each part of an attack, ``robust_<attack>_<part>``.
        """
        logits = self.logits.float()
        columns = {
            "index": self.index,
            "label": self.y,
            "prediction": logits.argmax(1),
            "confidence": logits.softmax(1).amax(1),
            "loss": cross_entropy(logits, self.y),
        }
        for name, verdict in self.verdicts.items():
            columns[f"right_{name}"] = verdict.prediction == self.y
            for key, column in verdict.columns().items():
                kind, _, part = key.partition("_")
                columns[f"{kind}_{name}_{part}" if part else f"{kind}_{name}"] = column
        return columns


def check_index(index: Any, samples: int) -> Tensor:
    """Positions of a batch as its loader gave them.

    Raises:
        ValueError: if they are none.
    """
    if isinstance(index, Tensor) and not index.is_floating_point() and index.shape == (samples,):
        return index
    what = f"{index.dtype} {tuple(index.shape)}" if isinstance(index, Tensor) else type(index).__name__
    raise ValueError(
        f"the third part of a batch of {samples} samples is {what}: give the position of each sample in its data set, "
        "int64 (B,), or batches of (x, y) alone"
    )


Watch = Callable[[str, int, float], None]
"""Told which part of an attack runs, how many samples still stand, and which share of the part is done."""


class Keeper(Progress):
    """A :class:`Progress` that also keeps the verdict of a whole attack. This one keeps nothing.

    Args:
        watch: told how far the attack is.
    """

    def __init__(self, watch: Watch | None = None) -> None:
        self.watch = watch

    def show(self, part: str, standing: int, done: float) -> None:
        if self.watch is not None:
            self.watch(part, standing, done)

    def recall_verdict(self) -> Verdict | None:
        """What :meth:`remember_verdict` was given in an interrupted evaluation of the same batch; None if nothing."""
        return None

    def remember_verdict(self, verdict: Verdict) -> None:
        """Keep the verdict of a finished attack."""


Follow = Callable[[str], Keeper]


def attack_batch(
    model: nn.Module,
    attacks: Mapping[str, EvaluationAttack],
    x: Tensor,
    y: Tensor,
    index: Tensor,
    logits: Tensor | None = None,
    follow: Follow | None = None,
) -> Outcome:
    """Run every attack on one batch and judge its result by one more forward pass.

    Args:
        model: maps pixels to logits.
        attacks: by name; their random numbers belong to the samples in ``index``.
        x: pixels (B, C, H, W) in [0, 1].
        y: labels (B,).
        index: position of each sample in its data set (B,).
        logits: clean logits if they are known already.
        follow: gives, by the name of the attack, who keeps what is finished and shows how far it is.
    """
    with torch.no_grad():
        logits = model(x) if logits is None else logits
    outcome = Outcome(index, y, logits)
    for name, attack in attacks.items():
        attack.name = name
        keeper = follow(name) if follow else Keeper()
        verdict = keeper.recall_verdict()
        if verdict is None:
            keeper.show(name, len(x), 0.0)
            verdict = _judge(model, attack, x, y, index, logits.shape[1], keeper)
            keeper.remember_verdict(verdict)
        outcome.verdicts[name] = verdict
    return outcome


def _judge(
    model: nn.Module, attack: EvaluationAttack, x: Tensor, y: Tensor, index: Tensor, classes: int, keeper: Keeper
) -> Verdict:
    began = _now(x.device)
    aim = attack.aim(y, classes, index)
    attacked = attack.run(model, x, aim, index=index, progress=keeper)
    seconds = _now(x.device) - began
    seen = attacked.x_adv.to(x.dtype)
    with torch.no_grad():
        prediction = model(seen).argmax(1)
    # Of what the network saw: in bf16 that is rounded.
    delta = seen.to(attacked.x_adv.dtype) - x
    return Verdict(prediction, attacked, {norm: geometry.size(delta, norm) for norm in NORMS}, seconds)


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
    cost = {name: (v.attacked.forwards, v.attacked.backwards, v.seconds) for name, v in outcome.verdicts.items()}
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
