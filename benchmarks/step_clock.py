"""How long the steps of a training take on their device, and what a matrix product reaches there."""

from __future__ import annotations

import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch.profiler import ProfilerActivity, profile

SKIP = {"cuda": 8, "cpu": 1}
"""First steps that do not count, such as those in which convolution algorithms are tried out."""


class Clock(Callback):
    """Seconds between the starts of neighbouring steps; may watch the kernels of the last three."""

    def __init__(self, device: torch.device, steps: int, trace: Path | None) -> None:
        self.device, self.skip, self.trace = device, SKIP[device.type], trace
        self.last = max(steps + self.skip - 3, 0)
        self.marks: list[Any] = []
        self.profiler: profile | None = None

    def mark(self) -> None:
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            gaps = [a.elapsed_time(b) / 1000 for a, b in zip(self.marks, self.marks[1:], strict=False)]
        else:
            gaps = [b - a for a, b in zip(self.marks, self.marks[1:], strict=False)]
        return gaps[self.skip :]

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if self.trace is not None and len(self.marks) == self.last:
            kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.device.type == "cuda" else [])]
            self.profiler = profile(activities=kinds).__enter__()
        self.mark()

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        self.mark()
        if self.profiler is not None and self.trace is not None:
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            self.profiler.__exit__(None, None, None)
            by = "self_device_time_total" if self.device.type == "cuda" else "self_cpu_time_total"
            self.trace.write_text(self.profiler.key_averages().table(sort_by=by, row_limit=25, max_name_column_width=90))


def matrix_rate(device: torch.device, size: int = 8192) -> float:
    """Operations a second of a bf16 matrix product on random data; the median of ten."""
    size = size if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    clock = Clock(device, 0, None)
    for _ in range(10 + SKIP[device.type]):
        clock.mark()
        a @ b
    clock.mark()
    return 2 * size**3 / median(clock.seconds())
