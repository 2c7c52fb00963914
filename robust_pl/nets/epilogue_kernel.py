"""The kernel of :mod:`robust_pl.nets.epilogue`; importing it takes Triton, which comes with torch for CUDA."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 2048


@triton.jit
def _bias_relu(first, second, bias, out, count, channels, TWO: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    value = tl.load(first + at, mask=inside).to(tl.float32) + tl.load(bias + at % channels, mask=inside).to(tl.float32)
    if TWO:
        value += tl.load(second + at, mask=inside).to(tl.float32)
    # NaN stays NaN, so that a broken network does not look sound.
    tl.store(out + at, tl.where(value < 0, 0.0, value), mask=inside)


def bias_relu(parts: tuple[Tensor, ...], bias: Tensor, out: Tensor) -> None:
    """Write the positive part of the sum of one or two parts and a bias (C,) into ``out``; all (B, C, H, W), channels last."""
    count = out.numel()
    _bias_relu[(triton.cdiv(count, _BLOCK),)](
        parts[0], parts[-1], bias, out, count, out.shape[1], TWO=len(parts) == 2, BLOCK=_BLOCK, num_warps=8
    )
