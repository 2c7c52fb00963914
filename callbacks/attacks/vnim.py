"""VNIM: variance tuning and look-ahead together."""

from __future__ import annotations

from .nim import NIM
from .vmim import VMIM


class VNIM(NIM, VMIM):
    """Variance-tuned Nesterov momentum, VNI-FGSM (Wang and He 2021, arXiv 2103.15571): :class:`VMIM` that looks ahead.

    Gradient and neighbours are those of the point ahead, see :class:`NIM`. Cost: that of :class:`VMIM`, but ``keep="best"``
    adds ``steps + 1`` forward passes.

    Args:
        eps: see :class:`VMIM`, and so all others.
    """
