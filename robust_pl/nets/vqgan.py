"""A VQGAN's encoder, code and decoder, with weights that the user has."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from .discretizer import Discretizer, TrainingImages, nearest
from .reference import find_file
from .weights import fill, read_tensors, rename

_GROUPS = 32


class VQGAN(Discretizer):
    """VQGAN (Esser et al. 2021, arXiv 2012.09841) as a discretizer: encoder, nearest codes, decoder; it is never trained here.

    z = Enc(2 x - 1) is projected by a 1 x 1 convolution, each of its places becomes the nearest of the codes in squared
    Euclidean distance, and another 1 x 1 convolution and the decoder give pixels, cut to [-1, 1] and mapped back to [0, 1]. The
    defaults are the one that DAT takes: it reduces sides by 8 to a code of 16,384 words of 4 numbers, trained on OpenImages.
    The other public one, of ImageNet, has ``codes: 1024, code_dim: 256, z_channels: 256, multipliers: [1, 1, 2, 2, 4]`` and
    reduces by 16. Tensor names are those of the public checkpoints, whose discriminator and perceptual loss are left out.

    Images should be of about the size it was trained on, 256 pixels: one of 32 becomes 4 x 4 words, and is not recognised.

    The file is read before the first step of a training; testing needs none.

    Args:
        weights: file of the weights, as it is or under ``ROBUST_PL_DATA``.
        codes: number of words.
        code_dim: numbers in each.
        z_channels: channels that the encoder ends and the decoder begins with.
        channels: of the first level.
        multipliers: channels of each level in units of that; sides are halved between levels. Attention is in the last one.
        blocks: residual blocks of a level of the encoder; the decoder has one more.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged or of another network, channels are no multiple of 32, or sides cannot be halved so often.
    """

    def __init__(
        self,
        weights: str,
        codes: int = 16_384,
        code_dim: int = 4,
        z_channels: int = 4,
        channels: int = 128,
        multipliers: Sequence[int] = (1, 2, 2, 4),
        blocks: int = 2,
    ) -> None:
        super().__init__()
        if channels % _GROUPS:
            raise ValueError(f"channels={channels} must be a multiple of {_GROUPS}, the groups that are normalised together")
        if not multipliers or min(multipliers) < 1:
            raise ValueError(f"multipliers={list(multipliers)} must name one number of at least 1 for each level")
        self.weights, self.halvings = weights, len(multipliers) - 1
        widths = [channels * m for m in multipliers]
        self.encoder = Encoder(channels, widths, blocks, z_channels)
        self.decoder = Decoder(widths, blocks + 1, z_channels)
        self.quantize = nn.Module()
        self.quantize.embedding = nn.Embedding(codes, code_dim)
        self.quant_conv = nn.Conv2d(z_channels, code_dim, 1)
        self.post_quant_conv = nn.Conv2d(code_dim, z_channels, 1)

    def begin(self, images: TrainingImages) -> None:
        path = find_file(self.weights)
        fill(self, rename(read_tensors(path), {"loss.": None}), str(path))

    def discretize(self, x: Tensor) -> Tensor:
        if x.shape[1] != 3 or any(side % 2**self.halvings for side in x.shape[2:]):
            raise ValueError(f"VQGAN takes colour images with sides that {2**self.halvings} divides, not {tuple(x.shape[1:])}")
        z = self.quant_conv(self.encoder(2 * x - 1)).movedim(1, -1)
        words = nearest(z.flatten(0, 2).float(), self.quantize.embedding.weight.float())
        code = self.quantize.embedding(words).view(*z.shape).movedim(-1, 1)
        return (self.decoder(self.post_quant_conv(code)).float().clamp(-1, 1) + 1) / 2


class Encoder(nn.Module):
    """Pixels in [-1, 1], (B, 3, H, W), to (B, z_channels, H / f, W / f)."""

    def __init__(self, channels: int, widths: Sequence[int], blocks: int, z_channels: int) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3, channels, 3, padding=1)
        self.down = nn.ModuleList()
        planes = channels
        for level, width in enumerate(widths):
            last = level == len(widths) - 1
            self.down.append(Level(planes, width, blocks, last))
            if not last:
                self.down[-1].downsample = Downsample(width)
            planes = width
        self.mid = Middle(planes)
        self.norm_out = _norm(planes)
        self.conv_out = nn.Conv2d(planes, z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        z = self.conv_in(x)
        for level in self.down:
            z = level(z)
            if hasattr(level, "downsample"):
                z = level.downsample(z)
        return self.conv_out(F.silu(self.norm_out(self.mid(z))))


class Decoder(nn.Module):
    """(B, z_channels, H, W) to about [-1, 1], (B, 3, f H, f W); level 0 is that of full size, as in the files."""

    def __init__(self, widths: Sequence[int], blocks: int, z_channels: int) -> None:
        super().__init__()
        planes = widths[-1]
        self.conv_in = nn.Conv2d(z_channels, planes, 3, padding=1)
        self.mid = Middle(planes)
        levels = []
        for level in range(len(widths) - 1, -1, -1):
            levels.insert(0, Level(planes, widths[level], blocks, level == len(widths) - 1))
            if level:
                levels[0].upsample = Upsample(widths[level])
            planes = widths[level]
        self.up = nn.ModuleList(levels)
        self.norm_out = _norm(planes)
        self.conv_out = nn.Conv2d(planes, 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        z = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            z = level(z)
            if hasattr(level, "upsample"):
                z = level.upsample(z)
        return self.conv_out(F.silu(self.norm_out(z)))


class Level(nn.Module):
    """Residual blocks of one size, with attention behind each where asked for."""

    def __init__(self, in_planes: int, planes: int, blocks: int, attention: bool) -> None:
        super().__init__()
        self.block = nn.ModuleList(ResidualBlock(in_planes if i == 0 else planes, planes) for i in range(blocks))
        self.attn = nn.ModuleList(Attention(planes) for _ in range(blocks if attention else 0))

    def forward(self, z: Tensor) -> Tensor:
        for number, block in enumerate(self.block):
            z = block(z)
            if len(self.attn):
                z = self.attn[number](z)
        return z


class Middle(nn.Module):
    """Two residual blocks around attention."""

    def __init__(self, planes: int) -> None:
        super().__init__()
        self.block_1, self.attn_1, self.block_2 = (
            ResidualBlock(planes, planes),
            Attention(planes),
            ResidualBlock(planes, planes),
        )

    def forward(self, z: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(z)))


class ResidualBlock(nn.Module):
    """Two normalised and activated 3 x 3 convolutions beside a shortcut."""

    def __init__(self, in_planes: int, planes: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = _norm(in_planes), nn.Conv2d(in_planes, planes, 3, padding=1)
        self.norm2, self.conv2 = _norm(planes), nn.Conv2d(planes, planes, 3, padding=1)
        if in_planes != planes:
            self.nin_shortcut = nn.Conv2d(in_planes, planes, 1)

    def forward(self, z: Tensor) -> Tensor:
        out = self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(z))))))
        return out + (self.nin_shortcut(z) if hasattr(self, "nin_shortcut") else z)


class Attention(nn.Module):
    """Attention of all places to all, with one head, beside a shortcut."""

    def __init__(self, planes: int) -> None:
        super().__init__()
        self.norm = _norm(planes)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(planes, planes, 1) for _ in range(4))

    def forward(self, z: Tensor) -> Tensor:
        normed = self.norm(z)
        q, k, v = (layer(normed).flatten(2).transpose(1, 2) for layer in (self.q, self.k, self.v))
        seen = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        return z + self.proj_out(seen.reshape(z.shape))


class Downsample(nn.Module):
    """A 3 x 3 convolution of stride 2 that pads to the right and below alone."""

    def __init__(self, planes: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(planes, planes, 3, stride=2)

    def forward(self, z: Tensor) -> Tensor:
        return self.conv(F.pad(z, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Every pixel four times, then a 3 x 3 convolution."""

    def __init__(self, planes: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(planes, planes, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        return self.conv(F.interpolate(z, scale_factor=2.0, mode="nearest"))


def _norm(planes: int) -> nn.GroupNorm:
    return nn.GroupNorm(_GROUPS, planes, eps=1e-6)
