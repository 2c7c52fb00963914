"""Stylised images: textures of others, shapes of their own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ..functional.moments import channel_moments, match_moments
from ..nets.style_transfer import StyleTransfer
from .augmentations import Augmentation, partners
from .hashing import integers, uniform
from .image_files import ENDINGS, read_image

_CHUNK = 16


class _Restyled(Augmentation):
    """What both ways of restyling share: which images, and whose label."""

    def __init__(self, alpha: float, probability: float, style_label: float) -> None:
        for name, value in (("alpha", alpha), ("probability", probability), ("style_label", style_label)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name}={value} is a share: choose from [0, 1]")
        self.alpha, self.probability, self.style_label = alpha, probability, style_label
        self.mixes_labels = style_label > 0

    def chosen(self, keys: Tensor) -> Tensor:
        """Which samples are restyled, bool (B,)."""
        return uniform(keys, 0) < self.probability

    def where_chosen(self, x: Tensor, y: Tensor, keys: Tensor, styled: Tensor, partner: Tensor) -> tuple[Tensor, Tensor]:
        """Restyled images and labels in the places of the chosen ones."""
        chosen = self.chosen(keys)
        if self.mixes_labels:
            share = (self.style_label * chosen).to(y.dtype).unsqueeze(1)
            y = (1 - share) * y + share * y[partner]
        return torch.where(chosen.view(-1, 1, 1, 1), styled, x), y


class Stylize(_Restyled):
    """Style transfer by AdaIN with the user's weights, see :class:`StyleTransfer`.

    With ``styles``, a folder of paintings, it is Stylized ImageNet (Geirhos et al. 2019, arXiv 1811.12231) made while
    training: ``probability: 1`` in place of SIN, 0.5 of the union of SIN and IN. The authors write 134 GB of stylised images
    once, each in one style; here each image has another style in each epoch. ``robust_pl.data.FolderUnion`` reads their files.

    Without ``styles`` the style is that of another image of the batch, and with ``style_label: 0.2`` its label is mixed in: the
    data of shape-texture debiased training (Li et al. 2021, arXiv 2010.05981), for which the authors take ``alpha: 0.5``. Their
    auxiliary BatchNorm for stylised images is left to the method.

    Images below about 64 pixels have too few places at ``relu4_1`` for statistics: 4 x 4 at 32 x 32.

    Cost: a pass through the encoder and one through the decoder for all images, chosen or not, and two through the encoder
    without ``styles``; at 224 pixels that is several times a ResNet-50's pass. Before the first batch, one pass through the
    encoder for each painting, of which moments alone are kept, 4 KB each.

    Args:
        encoder: file of the "normalised" VGG-19's weights.
        decoder: file of the decoder's weights.
        styles: folder of paintings, searched with its subfolders; None takes the other images of the batch.
        max_styles: so many of the paintings are used, spread evenly over their sorted names.
        style_size: they are cut to their middle square and resized to this many pixels.
        alpha: share of the style in the features, in [0, 1].
        probability: share of the samples that are stylised, in [0, 1].
        style_label: share of the style's label in the label, in [0, 1]; paintings have none.

    Raises:
        FileNotFoundError: if a file is missing, or the folder has no pictures.
        ValueError: if an argument is out of range, or a file is not what it should be.
    """

    def __init__(
        self,
        encoder: str,
        decoder: str,
        styles: str | None = None,
        max_styles: int = 1000,
        style_size: int = 224,
        alpha: float = 1.0,
        probability: float = 0.5,
        style_label: float = 0.0,
    ) -> None:
        super().__init__(alpha, probability, style_label)
        if styles is not None and style_label:
            raise ValueError(f"style_label={style_label} mixes in labels and paintings have none: leave styles or it out")
        for name, value in (("max_styles", max_styles), ("style_size", style_size)):
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        self.transfer = StyleTransfer(encoder, decoder)
        self.style_size = style_size
        self.files = [] if styles is None else _pictures(Path(styles).expanduser(), max_styles)
        self._paintings: tuple[Tensor, Tensor] | None = None

    def __call__(self, x: Tensor, y: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        if x.shape[1] != 3:
            raise ValueError(f"Stylize takes colour images and these have {x.shape[1]} channel(s): leave it out of augment")
        self.transfer.to(x.device)
        partner = partners(keys, 1)
        if self.files:
            painting = integers(keys, 2, len(self.files))
            mean, std = (moments[painting] for moments in self._moments_of_paintings(x.device))
        else:
            mean, std = (moments[partner] for moments in self.transfer.moments(x))
        return self.where_chosen(x, y, keys, self.transfer(x, mean, std, self.alpha).to(x.dtype), partner)

    def _moments_of_paintings(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if self._paintings is None:
            parts = []
            for first in range(0, len(self.files), _CHUNK):
                pictures = [_square(file, self.style_size) for file in self.files[first : first + _CHUNK]]
                parts.append(self.transfer.moments(torch.stack(pictures).to(device)))
            self._paintings = torch.cat([mean for mean, _ in parts]), torch.cat([std for _, std in parts])
        mean, std = self._paintings = tuple(moments.to(device) for moments in self._paintings)
        return mean, std


class PixelAdaIN(_Restyled):
    """Colour statistics of another image of the batch: AdaIN on pixels, without any network. Ours; it is no style transfer.

    Each channel gets the mean and the standard deviation of the partner's, and is cut to [0, 1]. It moves colour and contrast
    and leaves texture as it is, so nothing that is known of :class:`Stylize` may be expected of it.

    Args:
        alpha: share of the partner's statistics, in [0, 1].
        probability: share of the samples that are changed, in [0, 1].
        style_label: share of the partner's label in theirs, in [0, 1].

    Raises:
        ValueError: if an argument is out of range.
    """

    def __init__(self, alpha: float = 0.5, probability: float = 0.5, style_label: float = 0.0) -> None:
        super().__init__(alpha, probability, style_label)

    def __call__(self, x: Tensor, y: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        partner = partners(keys, 1)
        mean, std = (moments[partner] for moments in channel_moments(x))
        return self.where_chosen(x, y, keys, match_moments(x, mean, std, self.alpha).clamp(0, 1), partner)


def _pictures(folder: Path, most: int) -> list[Path]:
    found = sorted(p for p in folder.rglob("*") if p.suffix.lower() in ENDINGS) if folder.is_dir() else []
    if not found:
        raise FileNotFoundError(f"styles={folder} does not exist or holds no pictures ({', '.join(ENDINGS)}): name a folder")
    count = min(most, len(found))
    return [found[i * len(found) // count] for i in range(count)]


def _square(path: Path, size: int) -> Tensor:
    """The middle square, resized, (3, size, size) in [0, 1]."""
    image = ImageOps.fit(read_image(path), (size, size), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
