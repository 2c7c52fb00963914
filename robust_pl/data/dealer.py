"""Evaluation chunks that are handed to whichever process is free."""

from __future__ import annotations

from collections.abc import Iterator

from torch.distributed import distributed_c10d


class Dealer:
    """Hands out the chunks of an evaluation to processes as they ask for them.

    How long an attack takes depends on how many samples of a chunk still stand, which nobody knows before. So process r of W
    begins with chunk r, as ever, and then takes the next one that nobody has: all are busy until there is none left, and wait
    for each other no longer than one chunk takes, or two where workers read one ahead. Which process takes a chunk changes no
    result. The processes share one counter in the key-value store that ``torch.distributed`` was started with: one small
    request a chunk, and nothing that waits for another process.
    """

    def __init__(self) -> None:
        self.place = -1
        """Position of the chunk that this process was handed last, or, where none is left, of the last one of all; chunks
        before it are done or at work."""
        self._round: str | None = None

    def begin(self, name: str) -> None:
        """Deal out all chunks once, to whoever iterates next.

        Args:
            name: the same on all processes, and never used before.
        """
        self._round, self.place = f"robust_pl/chunks/{name}", -1

    def deal(self, chunks: int, rank: int, world_size: int) -> Iterator[int]:
        """Positions in ``range(chunks)`` for this process, ascending: r, r + W, ... where nobody called :meth:`begin`."""
        key, self._round = self._round, None
        if key is None:
            yield from range(rank, chunks, world_size)
            return
        place = rank
        while place < chunks:
            self.place = place
            yield place
            place = world_size - 1 + distributed_c10d._get_default_store().add(key, 1)
        self.place = chunks - 1
