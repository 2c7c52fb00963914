"""Which band of spatial frequency a network recognises images by."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from ...data.label_maps import sixteen_classes
from ...functional.bands import (
    add_inside,
    band_centres,
    band_count,
    band_noise,
    fit_channel,
    low_contrast_grey,
    thresholds,
)
from ...functional.class_groups import ClassGroups
from ...report.record import HeatMap, Lines, Record, Sheet
from ..attacks.checks import check_count
from ..attacks.draws import SampleDraws
from .base import Analysis

_DOUBLING = 1e-6
_IMAGENET = 1000


class CriticalBandMasking(Analysis):
    """Noise in one octave band at a time, and the channel that it shows (Subramanian et al. 2023, arXiv 2309.13190).

    Images become grey, of mean 0.449 and a fifth of their contrast; Gaussian noise in one band of a Laplacian pyramid is added,
    where the sum would leave [0, 1] the image moves by what brings it 0.1 inside. For each band the threshold counts the levels
    of noise, from the strongest, at which the accuracy is not above ``criterion``; a Gaussian over the bands is fitted to it.

    Figures: ``bandwidth`` (full width at half of the maximum, octaves), ``centre`` (cycles an image), ``peak_sensitivity``
    (2^(peak - levels): 1 where the weakest noise fails), ``quiet`` and ``original``, the accuracies without noise on grey and
    on unchanged images. The first three are missing where no Gaussian can be fitted: no band fails, all do, or all alike; a
    network of ``quiet`` below the criterion fails everywhere, so lower it, to half of ``quiet``, say, and state that.

    Humans are known, from memory, to have a channel of about one octave, networks of two to four. The paper's are 7 bands of
    224 pixels and the 16 classes of Geirhos et al. 2019; here the classes are the network's own unless ``sixteen`` is set, and
    a smaller image has a band less for each halving. Each image has one draw of noise, a function of seed and position in the
    test set, which all bands and levels share. Costs bands x levels + 2 forward passes a sample: 30 at 7 bands, 22 for images
    of 32 pixels.

    Args:
        noise: standard deviations of the noise before it is filtered, each twice the one before.
        contrast: of the grey images.
        mean: their mean.
        margin: see above.
        criterion: accuracy in (0, 1).
        bands: number of octaves, 3 at least; None takes as many as halvings to 2 pixels, 7 at most.
        seed: of the noise.
        sixteen: ask which of the 16 classes of Geirhos et al. an image is of, by the mean probability of their members among
            ImageNet's 1,000, which labels and logits must be of; images of other classes are left out.
        samples: see :class:`Analysis`.
        name: likewise.
        folder: likewise.

    Raises:
        ValueError: if an argument is out of its range, the images are too small for the bands, or ``sixteen`` is set for a
            network of other classes than ImageNet's.
    """

    def __init__(
        self,
        noise: tuple[float, ...] = (0.02, 0.04, 0.08, 0.16),
        contrast: float = 0.2,
        mean: float = 0.449,
        margin: float = 0.1,
        criterion: float = 0.5,
        bands: int | None = None,
        seed: int = 0,
        sixteen: bool = False,
        samples: int | None = 1000,
        name: str | None = None,
        folder: str | None = None,
    ) -> None:
        noise = tuple(noise)
        if not noise or noise[0] <= 0 or any(abs(b / a - 2) > _DOUBLING for a, b in pairwise(noise)):
            raise ValueError(
                f"noise={noise} must begin above 0 and double from one to the next, since the sensitivity is counted in "
                "doublings, such as (0.02, 0.04, 0.08, 0.16)"
            )
        for field, value in (("contrast", contrast), ("mean", mean), ("criterion", criterion)):
            if not 0 < value < 1:
                raise ValueError(f"{field}={value} must lie between 0 and 1")
        if not 0 <= margin < 0.5:
            raise ValueError(f"margin={margin} must lie in [0, 0.5)")
        if bands is not None:
            check_count("bands", bands)
            if bands < 3:
                raise ValueError(f"bands={bands} are too few for a Gaussian of three parameters: choose at least 3")
        self.noise, self.contrast, self.mean, self.margin = noise, contrast, mean, margin
        self.criterion, self.bands, self.seed = criterion, bands, seed
        self.sixteen = sixteen
        self._groups = ClassGroups(list(sixteen_classes().values()), "mean") if sixteen else None
        super().__init__(samples, name, folder)

    def look(self, model: nn.Module, x: Tensor, y: Tensor, index: Tensor) -> None:
        height, width = x.shape[-2:]
        bands = self.bands or band_count(height, width)
        if bands < 3 or min(height, width) < 2**bands:
            raise ValueError(
                f"bands={bands} need images of {2 ** max(bands, 3)} pixels a side, not {height} x {width}: use larger images"
                + (" or fewer bands" if bands > 3 else "")
            )

        if self._groups is not None:
            y = self._labels(y)
            wanted = (y >= 0).nonzero().squeeze(1)
            x, y, index = x[wanted], y[wanted], index[wanted.cpu()]
            if not len(x):
                return

        def right(pixels: Tensor) -> Tensor:
            logits = self.ask(model, pixels.to(x.dtype))
            if self._groups is not None and logits.shape[1] != _IMAGENET:
                raise ValueError(
                    f"sixteen=True needs the logits of ImageNet's {_IMAGENET} classes and the network gives {logits.shape[1]}: "
                    "leave it out"
                )
            return (logits if self._groups is None else self._groups(logits)).argmax(1) == y

        grey = low_contrast_grey(x, self.contrast, self.mean)
        draws = SampleDraws((self.seed, "bands"), index)
        bands_of_noise = band_noise(draws.normal(grey), bands)
        found = [right(x), right(grey.clamp(0, 1).expand_as(x))]
        for level in self.noise:
            found += [right(add_inside(grey, level * one, self.margin).expand_as(x)) for one in bands_of_noise]
        self.keep(right=torch.stack(found, 1))
        self.add(shape=len(x) * torch.tensor([height, width], device=x.device))

    def _labels(self, y: Tensor) -> Tensor:
        """Which of the sixteen classes labels of ImageNet belong to, -1 for none."""
        if int(y.max()) >= _IMAGENET:
            raise ValueError(f"sixteen=True needs labels of ImageNet's {_IMAGENET} classes and there is {int(y.max())}")
        table = torch.full((_IMAGENET,), -1)
        for label, members in enumerate(self._groups.groups):
            table[members] = label
        return table.to(y.device)[y]

    def conclude(self, kept: dict[str, Tensor], sums: dict[str, Tensor]) -> Record:
        if "right" not in kept:
            raise ValueError("no image is of one of the sixteen classes: use ImageNet's labels, or leave sixteen out")
        right = kept["right"].double().mean(0)
        height, width = (sums["shape"] / len(kept["right"])).round().long().tolist()
        bands, levels = self.bands or band_count(height, width), len(self.noise)
        centres = band_centres(height, width, bands)
        accuracy = right[2:].view(levels, bands)
        counts = thresholds(accuracy, self.criterion)
        channel = fit_channel(counts, levels)
        figures = {"original": right[0].item(), "quiet": right[1].item()}
        notes = [
            f"A level of noise fails at an accuracy of at most {self.criterion:.0%}; bands share one draw of noise an image."
        ]
        curves = {"measured": [float(count) for count in counts]}
        if channel is None:
            which = "all levels fail in all bands" if (counts == levels).all() else "all bands have one threshold"
            which = "no band fails" if (counts == 0).all() else which
            notes.append(f"No channel is fitted, since {which}: change criterion={self.criterion} or the noise.")
        else:
            figures |= {
                "bandwidth": channel.bandwidth,
                "centre": centres[0] * 2**channel.centre,
                "peak_sensitivity": channel.peak_sensitivity,
            }
            curves["fitted Gaussian"] = [channel.at(band) for band in range(bands)]
        places = [f"{centre:g}" for centre in centres]
        title = f"Accuracy by band and noise; {figures['quiet']:.1%} without noise"
        strengths = [f"{level:g}" for level in self.noise]
        return Record(
            "CriticalBandMasking",
            self.name,
            "Critical-band masking",
            figures,
            [Sheet("accuracy", ["noise", *places], [[s, *a] for s, a in zip(strengths, accuracy.tolist(), strict=True)], True)],
            [Lines("Levels of noise that fail", "centre of the band, cycles an image", "levels", places, curves)],
            [HeatMap(title, "centre of the band, cycles an image", "noise", places, strengths, accuracy.tolist(), share=True)],
            about={"bands": bands, "classes": "sixteen" if self.sixteen else "the network's own", "images": len(kept["right"])},
            notes=notes,
        )
