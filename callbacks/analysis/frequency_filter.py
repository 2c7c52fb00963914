"""Accuracy when only low, or only high, frequencies are left."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...functional.spectra import high_pass, low_pass
from ...report.record import Cell, Lines, Record, Sheet
from ..attacks.base import Attack
from ..attacks.checks import check_count
from .base import Analysis
from .under_attack import attack_name, check_attack, under_attack


class FrequencyFilter(Analysis):
    """Accuracy on low-pass and high-pass filtered images, clean and attacked (Huang et al. 2022, arXiv 2212.12732, table 1).

    The low pass keeps the centred r x r block of each channel's spectrum, the high pass all but that and the mean, without
    which an image would lie around 0 and lose half of itself; both are clamped to [0, 1], which is ours. An even r covers the
    frequencies -r/2 ... r/2 - 1, of which -r/2 counts half. Attacks see the unfiltered image: what they find is filtered
    afterwards, so the figures do not say what an attacker that knows of the filter would reach.

    Figures: ``low_<r>`` and ``high_<r>``, and the same with ``_adv`` under the attack. A network that relies on low frequencies
    loses little by the low pass. Costs one forward pass a sample for each filter and size, twice with an attack, which costs
    its own passes, too.

    Args:
        attack: whose images are filtered, too; None takes clean images alone.
        sizes: r in bins; None takes eighths of the shorter side: 32, 28, ..., 4 for images of 32 pixels.
        samples: see :class:`Analysis`.
        name: likewise.
        folder: likewise.

    Raises:
        ValueError: if a size is given twice or does not fit the images, or the attack must see training data first.
    """

    def __init__(
        self,
        attack: Attack | None = None,
        sizes: list[int] | None = None,
        samples: int | None = None,
        name: str | None = None,
        folder: str | None = None,
    ) -> None:
        if sizes is not None:
            if not sizes or len(set(sizes)) < len(sizes):
                raise ValueError(f"sizes={sizes} must name at least one window, and each once, such as [32, 16, 8]")
            for size in sizes:
                check_count("sizes", size)
        self.attack = check_attack(attack, "FrequencyFilter")
        self.sizes = None if sizes is None else sorted(sizes, reverse=True)
        super().__init__(samples, name, folder)

    def look(self, model: nn.Module, x: Tensor, y: Tensor, index: Tensor) -> None:
        sizes = self._for(*x.shape[-2:])
        logits = self.ask(model, x)
        inputs = [x]
        if self.attack is not None:
            inputs.append(under_attack(self, self.attack, model, x, y, index, logits.shape[1]))
        right = [logits.argmax(1) == y, *(self._right(model, x_adv, x.dtype, y) for x_adv in inputs[1:])]
        for image in inputs:
            for passes in (low_pass, high_pass):
                right += [self._right(model, passes(image, size), x.dtype, y) for size in sizes]
        self.keep(right=torch.stack(right, 1))
        self.add(shape=len(x) * torch.tensor(x.shape[-2:], device=x.device))

    def _right(self, model: nn.Module, pixels: Tensor, dtype: torch.dtype, y: Tensor) -> Tensor:
        return self.ask(model, pixels.clamp(0, 1).to(dtype)).argmax(1) == y

    def _for(self, height: int, width: int) -> list[int]:
        side = min(height, width)
        if self.sizes is None:
            return sorted({max(1, round(side * k / 8)) for k in range(1, 9)}, reverse=True)
        if self.sizes[0] > side:
            raise ValueError(
                f"sizes={self.sizes} holds a window that images of {height} x {width} do not: choose at most {side}"
            )
        return self.sizes

    def conclude(self, kept: dict[str, Tensor], sums: dict[str, Tensor]) -> Record:
        sizes = self._for(*(sums["shape"] / len(kept["index"])).round().long().tolist())
        names = ["clean"] if self.attack is None else ["clean", attack_name(self.attack)]
        accuracy = kept["right"].double().mean(0).tolist()
        whole, filtered = accuracy[: len(names)], accuracy[len(names) :]
        rows: list[list[Cell]] = []
        figures = {"whole": whole[0], **({"whole_adv": whole[1]} if len(whole) > 1 else {})}
        curves: dict[str, dict[str, list[float | None]]] = {"low": {}, "high": {}}
        for place, (name, unfiltered) in enumerate(zip(names, whole, strict=True)):
            for band, kind in enumerate(curves):
                begin = (2 * place + band) * len(sizes)
                values = filtered[begin : begin + len(sizes)]
                curves[kind][name] = values
                rows.append([f"{kind} pass", name, unfiltered, *values])
                figures |= {f"{kind}_{r}{'_adv' * place}": value for r, value in zip(sizes, values, strict=True)}
        rows.sort(key=lambda row: row[0], reverse=True)
        titles = {"low": "Accuracy with the central r x r frequencies alone", "high": "Accuracy without the central r x r"}
        return Record(
            "FrequencyFilter",
            self.name,
            "Accuracy by frequencies",
            figures,
            [Sheet("accuracy by filter", ["filter", "input", "unfiltered", *(f"r = {r}" for r in sizes)], rows, share=True)],
            [Lines(titles[kind], "r in cycles an image", "accuracy", sizes, of, share=True) for kind, of in curves.items()],
            notes=[
                "Attacks see the unfiltered image. Filtered pixels are clamped to [0, 1].",
                "The high pass keeps each channel's mean.",
                "An even r covers -r/2 ... r/2 - 1 cycles along each axis, of which -r/2 counts half.",
            ],
        )
