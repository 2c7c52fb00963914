"""Errors under a wave of one frequency, for each frequency."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...data.hashing import hash_keys, uniform
from ...functional.fourier_basis import directions, fourier_basis
from ...functional.spectra import radii
from ...nets.folding import Folded
from ...report.record import HeatMap, Lines, Record
from ..attacks.checks import check_count
from .base import Analysis

_SIGNS = 0xF0
# The caches of a CPU hold no more.
_BATCH = {"cpu": 64}


class FourierHeatMap(Analysis):
    """Error rate under each wave of the Fourier basis (Yin et al. 2019, arXiv 1906.08988), as a map; (0, 0) is in the centre.

    A wave of unit l2 norm, times ``norm`` and a random sign for each image, channel and wave, is added to every channel, and
    pixels are clamped to [0, 1], which is ours. The signs are functions of the seed and the sample's position in the test set.
    (u, v) and (-u, -v) are one wave, asked once: 481 forward passes a sample for the central 31 x 31 frequencies of 32 x 32
    pixels, 514 for all, and two without a wave. Waves and images run side by side in one batch.

    Figures: ``mean`` error, that over the frequencies up to and above half of the largest (``low``, ``high``), and ``clean``.

    Args:
        size: the map is size x size; None takes all frequencies.
        norm: l2 norm of what is added to each channel, in pixel units: 4 for images of 32 pixels, 15.7 for 224 (both as the
            paper has them, from memory), which is 1/8 and 0.07 for a pixel on average.
        batch_size: images in one forward pass; None takes 64 on a CPU and 512 elsewhere.
        seed: of the signs.
        samples: see :class:`Analysis`; the paper's maps take 1,000 and more.
        name: likewise.
        folder: likewise.

    Raises:
        ValueError: if an argument is out of its range, or the map is larger than the images.
    """

    def __init__(
        self,
        size: int | None = 31,
        norm: float = 4.0,
        batch_size: int | None = None,
        seed: int = 0,
        samples: int | None = 1000,
        name: str | None = None,
        folder: str | None = None,
    ) -> None:
        if size is not None:
            check_count("size", size)
        if batch_size is not None:
            check_count("batch_size", batch_size)
        if not 0 < norm < float("inf"):
            raise ValueError(f"norm={norm} must be a finite number above 0, such as 4 for images of 32 pixels")
        self.size, self.norm, self.batch_size, self.seed = size, float(norm), batch_size, seed
        super().__init__(samples, name, folder)

    def look(self, model: nn.Module, x: Tensor, y: Tensor, index: Tensor) -> None:
        height, width = x.shape[-2:]
        if self.size is not None and self.size > min(height, width):
            raise ValueError(
                f"size={self.size} is more than images of {height} x {width} have: choose at most {min(height, width)}, "
                "or null for all frequencies"
            )
        bins, _ = directions(height, width, self.size or height, self.size or width)
        logits = self.ask(model, x)
        fast = Folded(model)
        wrong = torch.zeros(len(bins), dtype=torch.int64, device=x.device)
        for some in torch.arange(len(bins) * len(x)).split(self.batch_size or _BATCH.get(x.device.type, 512)):
            wave, image = some // len(x), some % len(x)
            first, last = int(wave[0]), int(wave[-1]) + 1
            waves = self.norm * fourier_basis(bins[first:last], height, width, x.device)
            # The sign belongs to the wave, the sample and the channel, not to the batch.
            keys = hash_keys(self.seed, _SIGNS, bins[wave, 0] * width + bins[wave, 1], index[image])
            signs = torch.where(uniform(keys[:, None], torch.arange(x.shape[1])) < 0.5, -1.0, 1.0).to(x.device)
            wave, image = wave.to(x.device), image.to(x.device)
            moved = x[image].float() + signs[..., None, None] * waves[wave - first][:, None]
            missed = self.ask(fast, moved.clamp_(0, 1).to(x.dtype)).argmax(1) != y[image]
            wrong.index_add_(0, wave, missed.long())
        shape = len(x) * torch.tensor([height, width], device=x.device)
        self.add(wrong=wrong, clean=(logits.argmax(1) != y).sum(), shape=shape)

    def conclude(self, kept: dict[str, Tensor], sums: dict[str, Tensor]) -> Record:
        samples = len(kept["index"])
        height, width = (sums["shape"] / samples).round().long().tolist()
        bins, which = directions(height, width, self.size or height, self.size or width)
        error = (sums["wrong"] / samples)[which]
        rows, columns = error.shape
        top, left = height // 2 - rows // 2, width // 2 - columns // 2
        radius = radii(height, width)[top : top + rows, left : left + columns]
        low = radius <= radius[rows // 2].max() / 2
        rings = radius.round().long()
        profile = [error[rings == k].mean().item() if (rings == k).any() else None for k in range(int(rings.max()) + 1)]
        figures = {
            "clean": (sums["clean"] / samples).item(),
            "mean": error.mean().item(),
            "low": error[low].mean().item(),
            "high": error[~low].mean().item() if (~low).any() else error.mean().item(),
        }
        axes = [list(range(-(n // 2), n - n // 2)) for n in (rows, columns)]
        curve = Lines(
            "Error rate by distance from the centre",
            "cycles an image",
            "error rate",
            list(range(len(profile))),
            {"with a wave": profile, "without": [figures["clean"]] * len(profile)},
            share=True,
        )
        title = f"Error rate under a wave of l2 norm {self.norm:g} a channel"
        labels = ("cycles over the width", "cycles over the height")
        picture = HeatMap(title, *labels, axes[1], axes[0], error.tolist(), share=True, value_label="error rate")
        return Record(
            "FourierHeatMap",
            self.name,
            "Sensitivity to single frequencies",
            figures,
            lines=[curve],
            maps=[picture],
            about={"waves": len(bins)},
            notes=["Pixels are clamped to [0, 1]. (0, 0), a change of brightness, is in the centre."],
        )
