"""Random numbers that are a function of their names: (seed, purpose, epoch, sample), never of a stream's history.

A stream must be replayed to resume in the middle of an epoch and depends on the order of the samples, the workers and
the ranks; a hash depends on none of them. The mixing function is that of SplitMix64 (Steele et al. 2014).
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def _signed(value: int) -> int:
    """A 64-bit pattern as the int64 that holds it."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


_GAMMA = _signed(0x9E3779B97F4A7C15)
_MIX1 = _signed(0xBF58476D1CE4E5B9)
_MIX2 = _signed(0x94D049BB133111EB)
_TURNS = 6
_BELOW_ONE = 1 - 2.0**-24


def _shift(z: Tensor, bits: int) -> Tensor:
    """Logical right shift: torch's own keeps the sign."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _mix(z: Tensor) -> Tensor:
    z = (z ^ _shift(z, 30)) * _MIX1
    z = (z ^ _shift(z, 27)) * _MIX2
    return z ^ _shift(z, 31)


def hash_keys(*parts: int | Tensor) -> Tensor:
    """Mix integers into one int64 key, over the broadcast shape of the parts; their order matters."""
    key = torch.zeros((), dtype=torch.int64)
    for part in parts:
        key = _mix(key + torch.as_tensor(part, dtype=torch.int64) + _GAMMA)
    return key


def seed_from(*parts: int | str) -> int:
    """A seed of 63 bits from whatever names the draw; the same on every machine and in every process."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little") >> 1


def uniform(keys: Tensor, draw: int | Tensor) -> Tensor:
    """Float64 in [0, 1) of the keys' shape: the draw of that number of each key, independent of its other draws."""
    return _shift(hash_keys(keys, draw), 11).to(torch.float64) * 2.0**-53


def integers(keys: Tensor, draw: int, high: int) -> Tensor:
    """Int64 in [0, high) of the keys' shape."""
    return (uniform(keys, draw) * high).to(torch.int64)


def normal(keys: Tensor, draw: int | Tensor) -> Tensor:
    """Float32 N(0, 1) of the keys' shape; no further than 5.5 from 0, as far as float32 tells numbers from 1."""
    return torch.erfinv((2 * uniform(keys, draw) - 1).float().clamp(-_BELOW_ONE, _BELOW_ONE)) * 2**0.5


def permutation(n: int, *parts: int) -> Tensor:
    """Int64 (n,): a permutation of 0..n-1 that is a function of the parts only."""
    return hash_keys(*parts, torch.arange(n)).argsort(stable=True)


def permuted(position: Tensor, n: int, *parts: int | Tensor) -> Tensor:
    """Where a permutation of 0..n-1, a function of the parts only, sends the positions; it is never written out.

    A Feistel network permutes the smallest square power of two that holds n, and what falls outside goes through it again
    until it falls inside (Black and Rogaway 2002). So a few of many millions cost no more than a few.
    """
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    key, mask = hash_keys(*parts), (1 << half) - 1

    def once(z: Tensor) -> Tensor:
        left, right = z >> half, z & mask
        for turn in range(_TURNS):
            left, right = right, left ^ (hash_keys(key, turn, right) & mask)
        return (left << half) | right

    z = once(position)
    while (outside := z >= n).any():
        z = torch.where(outside, once(z), z)
    return z
