"""WiSE-FT."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...callbacks.attacks.base import Attack
from ...callbacks.attacks.draws import SampleDraws
from ...callbacks.attacks.prepare import evaluating
from ...functional.weight_interpolation import TENTHS, check_alphas, diagonal_fisher, interpolate_state_dicts
from ...nets.averages import tensors_of
from ...nets.trajectory import Sample, read_trajectory
from ..averaging.assembled import Assembled
from ..averaging.ingredients import write
from ..interpolation import show
from ..samples import training_samples

Weights = dict[str, Tensor]
_CHUNK = 16


class WiSEFT(Assembled):
    """WiSE-FT (Wortsman et al. 2022, arXiv 2109.01903): the weights half-way between a network and its fine-tuning.

    ``theta(alpha) = (1 - alpha) theta_0 + alpha theta_1`` over all tensors, heads and running statistics included: what
    fine-tuning lost under shift comes back, and most of what it gained stays. theta_1 must have been fine-tuned from theta_0,
    and both have the same classes in the same order; between networks of different training the average means nothing. The
    same serves between a clean network and its adversarial fine-tuning.

    alpha is 0.5 unless told otherwise. Held-out accuracy at all of ``alphas`` is printed, kept in the checkpoint and, with
    ``alpha=None``, decides, the first of equals: on validation samples of the fine-tuning, which must be among neither
    network's training samples. Test sets under shift decide nothing:
    :class:`robust_pl.callbacks.WeightInterpolation` measures all of ``alphas`` there.

    With ``fisher`` both ends are weighed, weight by weight, by their Fisher information, as
    :func:`robust_pl.functional.weight_interpolation.interpolate_state_dicts` says; labels are drawn from each network's own
    predictions. BatchNorm's statistics are computed again, which the authors, whose networks have none, do not.

    Cost: no training; for each of ``alphas`` the validation samples once, and of BatchNorm's statistics ``batches`` forward
    passes, and the attack's passes of both; ``2 fisher`` forward and backward passes and ``2 fisher`` forward ones.

    Args:
        tuned: reference to theta_1, ``PATH`` or ``PATH#ema``.
        start: to theta_0; None takes the network as it is built, such as a pretrained pair of encoders.
        attack: under which accuracy counts, and BatchNorm's statistics are computed again; None is about clean images.
        alpha: share of theta_1; None takes the best of ``alphas``.
        alphas: to be measured on validation samples; none of them where there are no such samples.
        fisher: training samples on which Fisher information is measured; 0 weighs all alike.
        batches: for BatchNorm's statistics, training batches of each process; 0 interpolates those of both ends instead.
        net: see :class:`Method`, and so all others.

    Raises:
        ValueError: if an argument is out of its range, something is not of ``net``, or None is to be chosen without samples.
    """

    def __init__(
        self,
        net: nn.Module,
        tuned: str,
        start: str | None = None,
        attack: Attack | None = None,
        alpha: float | None = 0.5,
        alphas: Sequence[float] = TENTHS,
        fisher: int = 0,
        batches: int = 100,
        num_classes: int = 10,
    ) -> None:
        super().__init__(net, attack, batches, num_classes)
        check_alphas(alphas if alpha is None else [alpha, *alphas])
        if fisher < 0:
            raise ValueError(f"fisher={fisher} is a number of samples: choose at least 0")
        self.start, self.tuned, self.alpha, self.alphas, self.fisher = start, tuned, alpha, list(alphas), fisher

    def check(self) -> None:
        built = {name: tensor.cpu().clone() for name, tensor in tensors_of(self.net).items()} if self.start is None else None
        sources: list[Any] = [self.start if built is None else built, self.tuned]
        self._ends: list[Sample] = list(read_trajectory(sources).of(self.net))

    def assemble(self) -> dict[str, Any]:
        start, end = ({name: t.to(self.device) for name, t in sample.items()} for sample in self._ends)
        fisher = None if self.fisher == 0 else (self._fisher(start), self._fisher(end))
        has_samples = bool(self.trainer.val_dataloaders)
        scores = [self._score(start, end, alpha, fisher) for alpha in self.alphas] if has_samples or self.alpha is None else []
        chosen = self.alphas[scores.index(max(scores))] if self.alpha is None else self.alpha
        self._go_to(start, end, chosen, fisher)
        if scores:
            rows = [(f"{a:g}", f"{s:.2%}", "taken" if a == chosen else "") for a, s in zip(self.alphas, scores, strict=True)]
            kind = "clean" if self.attack is None else "attacked"
            show(self.trainer, f"Held-out accuracy, {kind}, from theta_0 (0) to theta_1 (1):", ("alpha", "accuracy", ""), rows)
        labels = ["the network as built" if self.start is None else self._ends[0].label, self._ends[1].label]
        return {"ends": labels, "alpha": chosen, "alphas": self.alphas, "scores": scores}

    def refresh_statistics(self) -> None:
        """Nothing to do: they are computed with the weights that are taken."""

    def _score(self, start: Weights, end: Weights, alpha: float, fisher: tuple[Weights, Weights] | None) -> float:
        self._go_to(start, end, alpha, fisher)
        return self.held_out_accuracy()

    def _go_to(self, start: Weights, end: Weights, alpha: float, fisher: tuple[Weights, Weights] | None) -> None:
        write(self.net, interpolate_state_dicts(start, end, alpha, fisher).items())
        if 0 < alpha < 1:  # either end has its own
            super().refresh_statistics()

    def _fisher(self, weights: Weights) -> Weights:
        """Fisher information at these weights, the same on every process."""
        write(self.net, weights.items())
        with evaluating(self):
            return diagonal_fisher(self.net, self._labelled(), _CHUNK)

    def _labelled(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Training samples with labels drawn from what the network says of them."""
        for x, _, index in training_samples(self.trainer, self.fisher, _CHUNK, self.device):
            with torch.no_grad():
                yield x, drawn_labels(self.net(x), index)


def drawn_labels(logits: Tensor, index: Tensor) -> Tensor:
    """A class of each sample, (B,), drawn by the probabilities that its logits (B, K) give; always the same for its index."""
    reached = logits.double().softmax(1).cumsum(1)
    draws = SampleDraws(("label",), index).few(logits, 1)
    return (reached < draws * reached[:, -1:]).sum(1)
