"""Images written in a finite set of visual words, and read back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..functional.hashing import permutation

TrainingImages = Callable[[int], Tensor]
"""Gives at most so many training images, pixels (N, C, H, W) in [0, 1], spread over the training set."""
_CHUNK = 4_000_000
_PER_CODE = 100


class Discretizer(nn.Module, ABC):
    """Maps pixels (B, C, H, W) in [0, 1] to pixels of the same shape in [0, 1] that a finite code can express.

    No gradient goes through it, and nothing in it is trained by a method. Autocast is off inside: half precision would round
    away the tiny perturbations whose words are asked for. A subclass defines :meth:`discretize`, and
    :meth:`begin` if it has something to read or to learn before the first batch.
    """

    def begin(self, images: TrainingImages) -> None:
        """Get ready for training; called once, before a run's first step, and not in a test."""

    @abstractmethod
    def discretize(self, x: Tensor) -> Tensor:
        """The nearest expressible images, without a graph."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            return self.discretize(x).to(x.dtype)


class IdentityDiscretizer(Discretizer):
    """Every image is its own word: DAT without a code, an ablation."""

    def discretize(self, x: Tensor) -> Tensor:
        return x


class PatchCodebook(Discretizer):
    """Each square of pixels becomes the nearest of the ``codes`` squares that k-means found in training images.

    A stand-in of ours for a VQGAN where its weights are missing or images are too small for it; what is known of DAT with a
    VQGAN does not carry over. Lloyd's algorithm runs before the first step, on up to 100 squares for each code out of
    ``images`` training images, and is a function of them and the seed alone; a resumed run repeats it.

    Applying it twice is applying it once, so a perturbation of its images changes nothing until it takes a square over half of
    the way to another code. A VQGAN's images lie between its codes, and tiny perturbations of them flip words: what is tiny
    there must be large here, l2 budgets of about 2 and not 0.1 on CIFAR-10 with squares of 2 pixels.

    Cost: distances of each square to all codes, ``codes * C H W`` multiplications an image.

    Args:
        patch: side of the squares in pixels, which must divide those of the images.
        codes: number of codes, at least 2.
        images: training images to learn from.
        iterations: of Lloyd's algorithm.
        seed: of the squares it begins with.

    Raises:
        ValueError: if an argument is out of range, there are fewer squares than codes, or squares do not fill an image.
    """

    def __init__(self, patch: int = 4, codes: int = 512, images: int = 2000, iterations: int = 20, seed: int = 0) -> None:
        super().__init__()
        for name, value, least in (
            ("patch", patch, 1),
            ("codes", codes, 2),
            ("images", images, 1),
            ("iterations", iterations, 1),
        ):
            if value < least:
                raise ValueError(f"{name}={value} must be at least {least}")
        self.patch, self.images, self.iterations, self.seed, self.wanted = patch, images, iterations, seed, codes
        self.register_buffer("codes", torch.zeros(0))

    @torch.no_grad()
    def begin(self, images: TrainingImages) -> None:
        x = images(self.images).float()
        squares = self._squares(x)
        if len(squares) < self.wanted:
            raise ValueError(
                f"codes={self.wanted} is more than the {len(squares)} squares of {self.patch} pixels in {len(x)} training "
                "images: lower codes or patch, or raise images"
            )
        squares = squares[permutation(len(squares), self.seed)[: _PER_CODE * self.wanted].to(squares.device)]
        codes = squares[: self.wanted]
        for _ in range(self.iterations):
            word = nearest(squares, codes)
            counts = torch.zeros(len(codes), device=codes.device).index_add_(0, word, torch.ones_like(squares[:, 0]))
            sums = torch.zeros_like(codes).index_add_(0, word, squares)
            # A code that nothing is nearest to stays where it is.
            codes = torch.where(counts.unsqueeze(1) > 0, sums / counts.clamp_min(1).unsqueeze(1), codes)
        self.codes = codes

    def discretize(self, x: Tensor) -> Tensor:
        if not len(self.codes):
            raise ValueError("PatchCodebook has no codes yet: call begin(images) with a function that gives training images")
        words = nearest(self._squares(x.float()), self.codes)
        columns = self.codes[words].view(len(x), -1, self.codes.shape[1]).transpose(1, 2)
        return F.fold(columns, x.shape[2:], self.patch, stride=self.patch)

    def _squares(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (N, C * patch * patch)."""
        if x.shape[2] % self.patch or x.shape[3] % self.patch:
            raise ValueError(
                f"patch={self.patch} does not divide the sides of images {tuple(x.shape[2:])}: choose one that does"
            )
        return F.unfold(x, self.patch, stride=self.patch).transpose(1, 2).flatten(0, 1)


def nearest(vectors: Tensor, codes: Tensor) -> Tensor:
    """Position of the nearest code of each vector in squared Euclidean distance, (N, D) and (K, D) -> int64 (N,).

    Chunked, since all distances at once may not fit into memory; never in half precision, which takes near codes for one.
    """
    step = max(1, _CHUNK // len(codes))
    with torch.autocast(vectors.device.type, enabled=False):
        lengths = codes.square().sum(1)
        # The vector's own length is the same for all codes.
        return torch.cat([(lengths - 2 * part @ codes.T).argmin(1) for part in vectors.split(step)])
