"""How sure an accuracy is."""

from __future__ import annotations

from statistics import NormalDist

_Z = NormalDist().inv_cdf(0.975)


def interval(right: int, total: int) -> tuple[float, float]:
    """95 % score interval of a share (Wilson 1927), both ends in [0, 1].

    It says how far the accuracy on all images of the same kind may lie from that on these; it knows nothing of a stronger
    attack.

    Args:
        right: how many of them.
        total: number of samples, at least 1.

    Raises:
        ValueError: if ``right`` does not lie in [0, total], or there is no sample.
    """
    if total < 1 or not 0 <= right <= total:
        raise ValueError(f"right={right} of total={total} is no share: right must lie in [0, total], and total be at least 1")
    share, extra = right / total, _Z**2 / total
    middle = (share + extra / 2) / (1 + extra)
    half = _Z * (share * (1 - share) / total + extra / (4 * total)) ** 0.5 / (1 + extra)
    # At the ends the two terms are equal, and rounding must not push the share out of its interval.
    return (0.0 if right == 0 else middle - half), (1.0 if right == total else middle + half)
