"""Random image-to-image networks as an augmentation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .augmentations import Augmentation
from .hashing import hash_keys, uniform

_BLOCKS, _SCALE, _KERNEL = 4, 4, 3


class Noise2Net(Augmentation):
    """Noise2Net (Hendrycks et al. 2021, arXiv 2006.16241): images go through random networks, a new one for each.

    Four residual blocks, ``x + eps * block(x)``, where a block is a Res2Net bottleneck: a 1 x 1 convolution to four groups of
    ``hidden`` channels, a convolution on each of the first three in turn, each of which also sees the one before, and a 1 x 1
    convolution back. Every convolution is followed by a normalisation of each channel over the image, so that a block's output
    has mean 0 and deviation 1 whatever its weights are. Weights, ``eps`` and the size of each kernel, 1 or 3, come from the
    sample's key: U(-1, 1), U(max_eps / 2, max_eps) and one half each.

    It is what the authors offer where DeepAugment's trained networks are not at hand, not DeepAugment itself, which is
    :class:`DistortedNet` with one of them, or :class:`FolderUnion` on files. What differs from their code: the three
    convolutions dilate by 1, 2 and 3, which they draw once an epoch; each image has kernel sizes and an ``eps`` of its own;
    whether an image is changed is drawn, where they take the first half of each batch; the result is cut to [0, 1].

    Cost: for each image, chosen or not, about 7,300 * 4 multiplications a pixel with 3 channels, and as many random numbers
    once. One grouped convolution runs all networks of a batch.

    Args:
        max_eps: largest weight of a block in units of ``std``, at least 0.
        probability: share of the samples that are changed, in [0, 1].
        hidden: channels of each of the four groups.
        std: what a deviation of 1 is in pixels; the authors perturb images that were divided by ImageNet's deviation.

    Raises:
        ValueError: if an argument is out of range.
    """

    def __init__(self, max_eps: float = 0.75, probability: float = 0.5, hidden: int = 16, std: float = 0.225) -> None:
        if max_eps < 0 or std < 0:
            raise ValueError(f"max_eps={max_eps} and std={std} must be at least 0")
        if not 0 <= probability <= 1:
            raise ValueError(f"probability={probability} must lie in [0, 1]")
        if hidden < 1:
            raise ValueError(f"hidden={hidden} must be at least 1")
        self.max_eps, self.probability, self.hidden, self.std = max_eps, probability, hidden, std

    def __call__(self, x: Tensor, y: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        eps = (self.max_eps * self.std * (1 + uniform(keys, 1)) / 2).to(x.dtype).view(-1, 1, 1, 1)
        out = x
        for block in range(_BLOCKS):
            out = out + eps * self.block(out, hash_keys(keys, 2, block))
        chosen = uniform(keys, 0) < self.probability
        return torch.where(chosen.view(-1, 1, 1, 1), out.clamp(0, 1), x), y

    def block(self, x: Tensor, keys: Tensor) -> Tensor:
        """One random bottleneck for each image, (B, C, H, W) -> (B, C, H, W), every channel of mean 0 and deviation 1."""
        channels, hidden = x.shape[1], self.hidden
        groups = _convolve(x, _weights(keys, 0, (_SCALE * hidden, channels, 1, 1), x)).relu().chunk(_SCALE, 1)
        done, seen = [], groups[0]
        for place in range(_SCALE - 1):
            weight = _weights(keys, 2 + 2 * place, (hidden, hidden, _KERNEL, _KERNEL), x)
            small = uniform(keys, 3 + 2 * place) < 0.5
            # Made there: a number written into a tensor on a device would be copied to it.
            middle = (torch.arange(_KERNEL**2, device=x.device) == _KERNEL**2 // 2).view(_KERNEL, _KERNEL).to(weight.dtype)
            weight = torch.where(small.view(-1, 1, 1, 1, 1), weight * middle, weight)
            seen = _convolve(seen if not done else seen + groups[place], weight, dilation=place + 1).relu()
            done.append(seen)
        return _convolve(torch.cat([*done, groups[-1]], 1), _weights(keys, 1, (channels, _SCALE * hidden, 1, 1), x))


def _weights(keys: Tensor, draw: int, shape: tuple[int, ...], like: Tensor) -> Tensor:
    """U(-1, 1) for each key, (B, *shape)."""
    count = torch.Size(shape).numel()
    numbers = uniform(hash_keys(keys, draw).unsqueeze(1), torch.arange(count, device=keys.device))
    return (2 * numbers - 1).to(like.dtype).view(-1, *shape)


def _convolve(x: Tensor, weight: Tensor, dilation: int = 1) -> Tensor:
    """Each image with kernels of its own, (B, C, H, W) and (B, D, C, k, k) -> (B, D, H, W), then normalised by channel."""
    batch, planes, size = *weight.shape[:2], weight.shape[-1]
    if size == 1:  # for which grouped convolutions are slow on CPUs
        out = weight.flatten(2) @ x.flatten(2)
    else:
        flat = x.reshape(1, -1, *x.shape[2:])
        out = F.conv2d(flat, weight.flatten(0, 1), padding=dilation * (size // 2), dilation=dilation, groups=batch)
    return F.instance_norm(out.view(batch, planes, *x.shape[2:]))
