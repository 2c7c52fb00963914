"""ConvergeSmooth."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from typing_extensions import Self

from ...functional.losses import cross_entropy, wide
from ..ranks import sum_over_ranks


@dataclass
class Judged:
    """What a batch adds whose benign loss is weighed.

    Args:
        judged: (1, 3), see :meth:`ConvergeSmooth.judge`; written where the loss is first asked, at the weights of the step.
    """

    judged: Tensor | None = None


class ConvergeSmooth(nn.Module):
    """ConvergeSmooth (Zhao et al. 2023, ICCV): the benign loss of a batch is kept close to its mean in the epoch before.

    A method adds w * l to its loss, where l is its benign loss: w is ``weight`` where l lies more than a threshold above the
    mean of the epoch before, minus ``weight`` where it lies more than that below it, which then is gradient ascent on l, and 0
    in between. The threshold is the rise of the mean over the last two epochs, cut to [gamma / ratio, gamma]; with the authors'
    ratio of 1 it is gamma. Means are over all samples of an epoch, as they came by, and l decides with its mean over all
    processes. State moves once an epoch, is equal on all processes and part of the checkpoint.

    It is off in the first and the last ``stride`` epochs of a stage and one more at the start: from start + stride + 1 to
    end - stride - 1. Stages are the stretches between drops of the learning rate, where losses jump; before them there is no
    mean yet to compare with. The authors' end where their rate drops, at 100 and 105 of 110 epochs, and a public benchmark has
    left them there for a schedule of 100 epochs without drops (Pan and Yao 2026, arXiv 2604.22853): set them for your own.

    Args:
        gamma: threshold, in nats; 0.03 is the authors' choice. The loss of a batch varies by about as much by chance alone.
        ratio: gamma over the smallest threshold, at least 1.
        weight: of the benign loss.
        stages: first epochs of the stages, and the end of the last one.
        stride: epochs left out at either end of a stage.

    Raises:
        ValueError: if an argument is out of its range.
    """

    previous: Tensor
    rise: Tensor
    sums: Tensor
    epoch: Tensor

    def __init__(
        self,
        gamma: float = 0.03,
        ratio: float = 1.0,
        weight: float = 1.0,
        stages: Sequence[int] = (0, 100, 105, 110),
        stride: int = 1,
    ) -> None:
        super().__init__()
        for field, value, least in (("gamma", gamma, 0), ("ratio", ratio, 1), ("weight", weight, 0), ("stride", stride, 0)):
            if value < least:
                raise ValueError(f"{field}={value} must be at least {least}")
        if len(stages) < 2 or any(end <= start for start, end in pairwise(stages)):
            raise ValueError(f"stages={list(stages)} must be rising epochs, of which the last is the end: such as [0, 100]")
        self.gamma, self.ratio, self.weight, self.stages, self.stride = gamma, ratio, weight, tuple(stages), stride
        self.register_buffer("previous", torch.zeros((), dtype=torch.float32))
        self.register_buffer("rise", torch.zeros((), dtype=torch.float32))
        # Of the running epoch: benign losses and samples.
        self.register_buffer("sums", torch.zeros(2, dtype=torch.float32))
        self.register_buffer("epoch", torch.zeros((), dtype=torch.int64))

    def active(self, epoch: int) -> bool:
        """Whether benign losses are added in this epoch; else there is no need for their graph."""
        return any(start + self.stride < epoch < end - self.stride for start, end in pairwise(self.stages))

    def term(self, example: Judged, logits: Callable[[], Tensor], y: Tensor, epoch: int) -> Tensor | float:
        """What the loss of a batch adds: w times its mean benign loss, which is judged where it is first asked for.

        Args:
            example: the batch.
            logits: gives its benign logits (B, K); not asked where nothing comes of them.
            y: labels (B,), or (B, K).
            epoch: the running one.
        """
        active = self.active(epoch)
        if not active and example.judged is not None:
            return 0.0
        with torch.set_grad_enabled(active and torch.is_grad_enabled()):
            benign = cross_entropy(wide(logits()), y)
        if example.judged is None:
            example.judged = self.judge(benign, epoch)
        return example.judged[0, 2] * benign.mean() if active else 0.0

    def judge(self, benign: Tensor, epoch: int) -> Tensor:
        """What a batch weighs: (1, 3) with the sum of its benign losses over all processes, the samples in it, and w.

        All processes must call this together.

        Args:
            benign: losses of this process, (B,).
            epoch: the running one.
        """
        benign = benign.detach().to(self.sums.dtype)
        sums = sum_over_ranks(torch.stack([benign.sum(), torch.full_like(benign[0], len(benign))]))
        previous, rise, _ = self._as_of(epoch)
        above = sums[0] / sums[1] - previous
        sign = above.sign().where(above.abs() > rise.clamp(self.gamma / self.ratio, self.gamma), 0.0)
        return torch.cat([sums, self.weight * sign.view(1)]).unsqueeze(0)

    def add(self, judged: Tensor, epoch: int) -> None:
        """Once a step: count its batches, (n, 3) as :meth:`judge` returned them."""
        previous, rise, sums = self._as_of(epoch)
        self.previous.copy_(previous)
        self.rise.copy_(rise)
        self.sums.copy_(sums + judged[:, :2].sum(0))
        self.epoch.fill_(epoch)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        for name in ("previous", "rise", "sums"):  # in a run of precision bf16-true, sums of an epoch would stand still
            self._buffers[name] = self._buffers[name].float()
        return self

    def _as_of(self, epoch: int) -> tuple[Tensor, Tensor, Tensor]:
        """The mean of the epoch before, its rise, and the sums of this one. It does not move, so that it can be asked at any
        time, in a run resumed anywhere.
        """
        ended = (self.epoch != epoch) & (self.sums[1] > 0)
        mean = self.sums[0] / self.sums[1].clamp_min(1)
        return (
            mean.where(ended, self.previous),
            (mean - self.previous).where(ended, self.rise),
            self.sums.where(~ended, 0.0),
        )
