"""DeepAugment's idea with the user's network: images go through an image-to-image network with distorted weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from ..nets.frozen import Frozen
from ..nets.weights import load_weights
from .augmentations import Augmentation
from .hashing import hash_keys, integers, uniform


class DistortedNet(Augmentation):
    """DeepAugment (Hendrycks et al. 2021, arXiv 2006.16241) while training, by an image-to-image network of the user's.

    The authors send ImageNet once through EDSR, a super-resolution network, and once through a compressing autoencoder, whose
    weights and activations they distort at random and anew about every 20 images, and train on the three sets together; their
    files are read by :class:`FolderUnion`. Here each batch is shared out over a few distorted copies of the network; no weights
    come with this library.

    A copy has ``operations`` distortions in turn, each on a random share of the kernels of each convolution: they are mirrored,
    turned by 90 degrees, negated, set to zero, reduced to their largest entry, multiplied by random signs, by a random mask or
    by U(0.5, 1.5), or blurred. This is the authors' list as far as it concerns kernels, reconstructed from a description:
    distortions of activations are missing, and the shares are ours.

    Copies belong to the batch, drawn from its first sample's key: another batch size gives other images.

    Cost: as many small passes through the network as there are copies, together one for each image, chosen or not.

    Args:
        net: maps pixels (B, C, H, W) in [0, 1] to such of any height and width; resized back and cut to [0, 1]. It is not
            trained, and stays in eval mode.
        weights: file of its weights, as it is or under ``ROBUST_PL_DATA``; None leaves them as they are.
        copies: distorted networks for each batch, at least 1.
        operations: distortions in a row, at least 1.
        share: the most of the kernels of a convolution that one distortion changes, in [0, 1]; each copy draws its own below.
        probability: share of the samples that are changed, in [0, 1].

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if an argument is out of range, or the network has no convolution.
    """

    def __init__(
        self,
        net: nn.Module,
        weights: str | None = None,
        copies: int = 4,
        operations: int = 3,
        share: float = 0.3,
        probability: float = 0.5,
    ) -> None:
        for name, value in (("copies", copies), ("operations", operations)):
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        for name, value in (("share", share), ("probability", probability)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name}={value} must lie in [0, 1]")
        self.kernels = [n for n, p in net.named_parameters() if p.dim() == 4]
        if not self.kernels:
            raise ValueError(f"net is a {type(net).__name__} without convolutions, whose kernels could be distorted")
        if weights is not None:
            load_weights(net, weights)
        self.net = Frozen(net)
        self.copies, self.operations, self.share, self.probability = copies, operations, share, probability

    @torch.no_grad()
    def __call__(self, x: Tensor, y: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        self.net.to(x.device)
        parts = x.chunk(self.copies)
        outputs = [
            functional_call(self.net.net, self.distorted(hash_keys(keys[0], 1, copy)), (part,))
            for copy, part in enumerate(parts)
        ]
        out = torch.cat(outputs)
        if out.shape[:2] != x.shape[:2]:
            raise ValueError(f"net maps {tuple(x.shape)} to {tuple(out.shape)}: each image must become one of as many channels")
        if out.shape != x.shape:
            out = F.interpolate(out, x.shape[2:], mode="bilinear", antialias=True)
        chosen = uniform(keys, 0) < self.probability
        return torch.where(chosen.view(-1, 1, 1, 1), out.clamp(0, 1).to(x.dtype), x), y

    def distorted(self, key: Tensor) -> dict[str, Tensor]:
        """The kernels of one copy, by name.

        Args:
            key: int64 ().
        """
        kernels = {name: self.net.net.get_parameter(name) for name in self.kernels}
        for turn in range(self.operations):
            kind = integers(hash_keys(key, turn), 0, len(_OPERATIONS))
            for place, (name, weight) in enumerate(kernels.items()):
                own = hash_keys(key, turn, place)
                share = self.share * uniform(own, 0)
                picked = uniform(own, 2 + torch.arange(len(weight) * weight.shape[1], device=own.device)) < share
                noise = uniform(hash_keys(own, 1), torch.arange(weight.numel(), device=own.device)).to(weight.dtype)
                # All are computed and one is taken, so that no device waits for the draw.
                options = torch.stack([operation(weight, noise.view_as(weight)) for operation in _OPERATIONS])
                changed = options.index_select(0, kind.view(1)).squeeze(0)
                kernels[name] = torch.where(picked.view(*weight.shape[:2], 1, 1), changed, weight)
        return kernels


def _largest(weight: Tensor, noise: Tensor) -> Tensor:
    flat = weight.flatten(2)
    place = flat.abs().argmax(2, keepdim=True)
    return torch.zeros_like(flat).scatter(2, place, flat.gather(2, place)).view_as(weight)


def _blurred(weight: Tensor, noise: Tensor) -> Tensor:
    return F.avg_pool2d(F.pad(weight, (1, 1, 1, 1)), 3, 1)


def _turned(weight: Tensor, noise: Tensor) -> Tensor:
    return weight.rot90(1, (2, 3)) if weight.shape[2] == weight.shape[3] else weight.flip(2, 3)


_OPERATIONS: list[Callable[[Tensor, Tensor], Tensor]] = [
    lambda weight, noise: weight.flip(3),
    lambda weight, noise: weight.flip(2),
    _turned,
    lambda weight, noise: -weight,
    lambda weight, noise: torch.zeros_like(weight),
    _largest,
    lambda weight, noise: weight * (noise - 0.5).sign(),
    lambda weight, noise: weight * (noise < 0.5),
    lambda weight, noise: weight * (0.5 + noise),
    _blurred,
]
"""Each maps kernels (D, C, h, w), and numbers from U[0, 1) of their shape, to other kernels."""
