"""Accuracy on the way from one network's weights to another's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ...functional.weight_interpolation import TENTHS, check_alphas, interpolate_state_dicts
from ...nets.averages import tensors_of
from ...nets.trajectory import read_trajectory
from ...report.record import Lines, Record, Sheet
from .base import Analysis


class WeightInterpolation(Analysis):
    """Accuracy at theta(alpha) = (1 - alpha) theta_0 + alpha theta_1 (WiSE-FT, Wortsman et al. 2022, arXiv 2109.01903).

    theta_1 is the network that is tested, theta_0 the one that it was fine-tuned from. A test on the usual test set and one on
    a shifted set give the two accuracies of each alpha that belong together. BatchNorm's running statistics are interpolated,
    too; :class:`robust_pl.methods.WiSEFT`, which writes the network of one alpha, can compute them again. Afterwards the
    weights are as before, bit for bit.

    Cost: for each alpha a forward pass a sample and a copy of the weights a batch; two copies of them in memory.

    Args:
        start: reference to theta_0, ``PATH`` or ``PATH#ema``.
        alphas: from 0 to 1.
        samples: see :class:`Analysis`, and so all others.

    Raises:
        ValueError: if an argument is out of its range or, before the first batch, ``start`` is of another network.
    """

    def __init__(
        self,
        start: str,
        alphas: Sequence[float] = TENTHS,
        samples: int | None = None,
        name: str | None = None,
        folder: str | None = None,
    ) -> None:
        super().__init__(samples, name, folder)
        check_alphas(alphas)
        self.start, self.alphas = start, list(alphas)

    def begin(self, model: nn.Module, data: Any) -> None:
        (sample,) = read_trajectory([self.start]).of(model)
        own = tensors_of(model)
        start = {name: sample[name].to(own[name].device) for name in sample}
        end = {name: own[name].clone() for name in start}
        # What is the same in both is left alone, so that what depends on it is not computed again, such as embeddings of texts.
        moves = [name for name in start if not torch.equal(start[name].to(end[name].dtype), end[name])]
        self._start, self._end = ({name: tensors[name] for name in moves} for tensors in (start, end))
        self._normalises = any(isinstance(module, _BatchNorm) for module in model.modules())

    def look(self, model: nn.Module, x: Tensor, y: Tensor, index: Tensor) -> None:
        own, right = tensors_of(model), []
        try:
            for alpha in self.alphas:
                for name, tensor in interpolate_state_dicts(self._start, self._end, alpha).items():
                    own[name].copy_(tensor)
                right.append(self.ask(model, x).argmax(1) == y)
        finally:
            for name, tensor in self._end.items():
                own[name].copy_(tensor)
        self.keep(right=torch.stack(right, 1))

    def conclude(self, kept: dict[str, Tensor], sums: dict[str, Tensor]) -> Record:
        accuracy = kept["right"].double().mean(0).tolist()
        curve = Lines(
            "Accuracy between two networks",
            "alpha (0: start, 1: tested)",
            "accuracy",
            self.alphas,
            {"accuracy": accuracy},
            True,
        )
        rows: list[list[Any]] = [[f"{alpha:g}", value] for alpha, value in zip(self.alphas, accuracy, strict=True)]
        notes = ["To choose alpha by these figures is to choose on the test set."]
        if self._normalises:
            notes.append("BatchNorm's running statistics are interpolated, not computed again for each alpha.")
        return Record(
            kind=type(self).__name__,
            name=self.name,
            title="Weights between two networks",
            figures={f"acc_{alpha:.2f}": value for alpha, value in zip(self.alphas, accuracy, strict=True)},
            sheets=[Sheet("Accuracy", ["alpha", "accuracy"], rows, share=True)],
            lines=[curve],
            notes=notes,
        )
