"""One writer at a time."""

from __future__ import annotations

from pathlib import Path

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]


class Lock:
    """Holds a file as long as this process lives; the system lets go of it even where the process is killed.

    Args:
        path: of the file, made if missing.

    Raises:
        ValueError: if another process holds it.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("w")
        if fcntl is None:
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._file.close()
            raise ValueError(
                f"another process is evaluating into {path.parent}: wait for it, or choose another --evaluation.output_dir"
            ) from error

    def release(self) -> None:
        """Let go."""
        self._file.close()
