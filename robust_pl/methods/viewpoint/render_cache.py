"""Renders that are used again."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class RenderCache:
    """A fixed number of views of each object, rendered when first asked for and kept as 8-bit pixels.

    Takes ``objects * views * 3 * H * W`` bytes on the device. What is returned is always the 8-bit value, so that a render that
    is made again after a restart is the same.

    Args:
        objects: number of them, N.
        views: of each.
        image_size: height and width.
        device: where the pixels are kept.
    """

    def __init__(self, objects: int, views: int, image_size: tuple[int, int], device: torch.device) -> None:
        self._pixels = torch.zeros(objects, views, 3, *image_size, dtype=torch.uint8, device=device)
        self._known = torch.zeros(objects, views, dtype=torch.bool)

    def images(self, which: Tensor, number: Tensor, render: Callable[[Tensor], Tensor]) -> tuple[Tensor, int]:
        """Pixels float32 (M, 3, H, W) in [0, 1] of view ``number`` (M,) of object ``which`` (M,), and how many were rendered.

        Args:
            which: int64, on the CPU, so that nobody waits for the device; and ``number`` likewise.
            number: of the view.
            render: pixels of the given rows of ``which``, int64.
        """
        missing = (~self._known[which, number]).nonzero().squeeze(1)
        if len(missing):
            pixels = render(missing).mul(255).round().to(torch.uint8)
            self._pixels[which[missing], number[missing]] = pixels
            self._known[which[missing], number[missing]] = True
        return self._pixels[which, number].float().div(255), len(missing)

    def forget(self, stale: Tensor) -> None:
        """Render those views anew that are asked for next; bool (N, views)."""
        self._known &= ~stale
