"""The peak of memory that training alone takes."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

ON_CUDA = "tensors on one GPU during training (torch.cuda.max_memory_allocated)"
OF_PROCESS = "the whole process in main memory during training, libraries and data included"
OF_PROCESS_AT_ALL_TIMES = "the whole process in main memory at any time, libraries, data and validation included"
MIXED = "parts of the run on other devices or systems, whose peaks do not compare"
_CLEAR, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


class PeakMemory:
    """Bytes at the peak of all stretches between :meth:`begin` and :meth:`read`; what happens between stretches leaves no mark.

    On CUDA these are the bytes that PyTorch's allocator gave out on this device, as others report them; its reserve, and what
    the driver takes, is more. On a CPU they are resident pages of this process, and not those of its workers: what lies in
    memory anyway is most of it, so differences between methods say more than the figures. Linux can forget an old peak; where
    the system cannot, the figure is that of the process since its start, and :attr:`of` says so. Each stretch begins by
    forgetting the device's or the process's former peak, which whoever else reads it must know.

    Args:
        device: of the training.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.peak: int | None = None
        """Bytes; None where nothing was measured yet, or the device tells nothing."""
        self.of: str | None = None
        """What the peak is one of."""
        if device.type == "cuda":
            self.of = ON_CUDA
        elif device.type == "cpu" and (self._forget() or _of_process() is not None):
            self.of = OF_PROCESS if self._forget() else OF_PROCESS_AT_ALL_TIMES

    def begin(self) -> None:
        """A stretch begins."""
        if self.of == ON_CUDA:
            torch.cuda.reset_peak_memory_stats(self.device)
        elif self.of == OF_PROCESS:
            self._forget()

    def read(self) -> None:
        """A stretch ends, or goes on."""
        now = None
        if self.of == ON_CUDA:
            now = torch.cuda.max_memory_allocated(self.device)
        elif self.of is not None:
            now = _since_forgotten() if self.of == OF_PROCESS else _of_process()
        if now is not None:
            self.peak = max(now, self.peak or 0)

    @staticmethod
    def _forget() -> bool:
        try:
            _CLEAR.write_text("5")
        except OSError:
            return False
        return _since_forgotten() is not None


def over_runs(before: Mapping[str, Any], peak: int | None, of: str | None) -> dict[str, Any]:
    """``peak_memory`` and ``peak_memory_of`` of a run that was resumed: the higher one, where both are peaks of one thing.

    Args:
        before: those of the run until then; a checkpoint of an older version has none, which does not count.
        peak: of the run since.
        of: what it is one of.
    """
    known, known_of = before.get("peak_memory"), before.get("peak_memory_of", of)
    if known_of != of:
        return {"peak_memory": None, "peak_memory_of": MIXED}
    return {"peak_memory": max((n for n in (known, peak) if n is not None), default=None), "peak_memory_of": of}


def _since_forgotten() -> int | None:
    """Highest number of resident bytes since the last one was forgotten, where this is Linux."""
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), None)


def _of_process() -> int | None:
    """Highest number of resident bytes since the process began, where the system tells."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
