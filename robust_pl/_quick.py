"""Import large packages in less time."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quickly(package: str) -> Iterator[None]:
    """Do not look for garbage while a package is imported for the first time, and never again among what was there then.

    PyTorch and Lightning make some 700,000 objects, and Python's search for cycles among them, which finds next to nothing,
    takes about a quarter of their import; each later search of everything takes as long as half of them. Only for a process
    that is ours, such as the command line: garbage in cycles that is there when this ends is never freed.

    Args:
        package: nothing happens where it has been imported already, or where the collector is off.
    """
    if package in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
