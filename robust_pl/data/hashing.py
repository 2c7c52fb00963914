"""Random numbers of data: the functions of :mod:`robust_pl.functional.hashing`, and what they are drawn for."""

from __future__ import annotations

from ..functional.hashing import hash_keys as hash_keys
from ..functional.hashing import integers as integers
from ..functional.hashing import normal as normal
from ..functional.hashing import permutation as permutation
from ..functional.hashing import permuted as permuted
from ..functional.hashing import seed_from as seed_from
from ..functional.hashing import uniform as uniform

SPLIT, ORDER, AUGMENT, EXTRA, MIX, VERSIONS = 1, 2, 3, 4, 5, 6
"""Purposes: the second part of every key, so that the split, the order, the augmentation and so on are independent."""
