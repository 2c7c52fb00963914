"""One evaluation, one folder, which survives being killed at any moment.

::

    store.json                     what was asked: settings, attacks, sums of weights and of the checkpoint
    shards/00000000.safetensors    a finished batch: every column of the table, and the adversarial images of each attack
    parts/00000000/...             what is finished of a batch that is not
    fitted/NAME.safetensors        what an attack learned from training data
    predictions.csv, figures.json  the table of all samples and the figures over them, once all of them are finished
    SHA256SUMS                     sums of all of these files; ``sha256sum -c`` understands it

A batch is named by the position of its first sample. Nothing else tells where an evaluation stands, so going on is to
compute what is not there.
"""

from __future__ import annotations

import csv
import io
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from ..outcome import EvaluationAttack, Keeper, Outcome, Verdict, Watch
from .files import (
    clean_up,
    read_tensors,
    replacing,
    sha256_of_file,
    sha256_of_tensors,
    write,
    write_json,
    write_tensors,
)
from .lock import Lock

FORMAT = 2
ABOUT, TABLE, FIGURES, SUMS, LOCK = "store.json", "predictions.csv", "figures.json", "SHA256SUMS", "lock"
IMAGES = "x_adv/"
_UNIQUE = "give batches of (x, y, index) in which index is the position in the data set, and the same batches every time"


class Store:
    """Keeps the outcome of every sample of an evaluation.

    Args:
        folder: where; made if missing.
        request: all that determines the result, for JSON: an evaluation goes on only where the request is the same.
        notes: what else a reader should know of where it comes from, for JSON.
        images: whether adversarial images are kept.
        writer: whether this process may remove what others left behind: the first one.

    Raises:
        ValueError: if the folder holds another evaluation, one that is running, or files that are none.
    """

    def __init__(
        self,
        folder: Path,
        request: Mapping[str, Any],
        notes: Mapping[str, Any] | None = None,
        *,
        images: bool = True,
        writer: bool = True,
    ) -> None:
        self.folder, self.images = folder, images
        self._lock: Lock | None = None
        self._added: set[int] = set()
        request = json.loads(json.dumps(request))  # as it will be read
        if writer:
            self._claim(request, notes or {})

    def _claim(self, request: dict[str, Any], notes: Mapping[str, Any]) -> None:
        folder = self.folder
        about = folder / ABOUT
        if not about.exists() and folder.is_dir():
            foreign = [path.name for path in folder.iterdir() if path.name != LOCK and not path.name.startswith(ABOUT)]
            if foreign:
                raise ValueError(
                    f"{folder} has files such as {min(foreign)} and no {ABOUT}, so it is not ours: choose another "
                    "--evaluation.output_dir, a new or an empty folder, and nothing there is touched"
                )
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = Lock(folder / LOCK)
        try:
            self._begin_or_go_on(request, notes)
        except BaseException:
            self.close()
            raise

    def _begin_or_go_on(self, request: dict[str, Any], notes: Mapping[str, Any]) -> None:
        folder, about = self.folder, self.folder / ABOUT
        clean_up(folder)
        if not about.exists():
            write_json(about, {"format": FORMAT, "request": request, "notes": notes})
            return
        found = read_about(folder)
        if found.get("request") != request:
            raise ValueError(
                f"{folder} holds another evaluation ({difference(found.get('request'), request)}): "
                "choose another --evaluation.output_dir, and nothing there is touched"
            )

    def identify(self, **facts: Any) -> None:
        """Write down what is known once the network and the data are there, or compare it with what was written.

        Raises:
            ValueError: if they are not those that the evaluation began with.
        """
        about = read_about(self.folder)
        facts = json.loads(json.dumps(facts))
        if "facts" not in about:
            write_json(self.folder / ABOUT, {**about, "facts": facts})
        elif about["facts"] != facts:
            raise ValueError(
                f"{self.folder} holds an evaluation of another model or data set "
                f"({difference(about['facts'], facts)}): choose another --evaluation.output_dir, and nothing there is touched"
            )

    def finished(self) -> list[int]:
        """Positions of the first samples of the finished batches, ascending."""
        return sorted(int(path.stem) for path in (self.folder / "shards").glob("*.safetensors"))

    def follow(self, first: int, attack: str, watch: Watch | None = None) -> Keeper:
        """Who keeps what ``attack`` finishes on the batch that begins with the sample ``first``."""
        return _Parts(self.folder / "parts" / f"{first:08d}", attack, watch)

    def recall_fitted(self, name: str, attack: EvaluationAttack) -> bool:
        """Give an attack what it had learned from training data when :meth:`remember_fitted` was called, if it was."""
        path = self.folder / "fitted" / f"{name}.safetensors"
        if not path.exists():
            return False
        attack.load_fitted_state(read_tensors(path)[0])
        return True

    def remember_fitted(self, name: str, attack: EvaluationAttack) -> None:
        """Keep what an attack has learned from training data."""
        if state := attack.fitted_state():
            write_tensors(self.folder / "fitted" / f"{name}.safetensors", state, {})

    def add(self, x: Tensor, outcome: Outcome) -> None:
        """Keep a finished batch; ``x`` are its clean pixels."""
        first = int(outcome.index.min())
        if first in self._added:
            raise ValueError(f"two batches hold the sample at position {first}: {_UNIQUE}")
        self._added.add(first)
        tensors = outcome.columns()
        columns = list(tensors)
        seconds = {name: verdict.seconds for name, verdict in outcome.verdicts.items()}
        if self.images:
            tensors |= {IMAGES + name: verdict.attacked.x_adv for name, verdict in outcome.verdicts.items()}
        meta = {
            "columns": columns,
            "classes": outcome.logits.shape[1],
            "seconds": seconds,
            "data": sha256_of_data(x, outcome.y),
        }
        write_tensors(self.shard(first), tensors, meta)
        shutil.rmtree(self.folder / "parts" / f"{first:08d}", ignore_errors=True)

    def shard(self, first: int) -> Path:
        """File of a finished batch."""
        return self.folder / "shards" / f"{first:08d}.safetensors"

    def read(self, first: int, x: Tensor, y: Tensor) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Columns and meta of a finished batch with the clean pixels ``x`` and labels ``y``.

        Raises:
            ValueError: if they are not those of the batch that was evaluated, or the file is damaged.
        """
        columns, meta = read_tensors(self.shard(first), leave_out=IMAGES)
        if meta["data"] != sha256_of_data(x, y):
            raise ValueError(
                f"{self.shard(first)} was made from other images or labels: this store belongs to another data set; "
                "choose another folder, and nothing there is touched"
            )
        return columns, meta

    def columns(self) -> Iterator[tuple[dict[str, Tensor], dict[str, Any]]]:
        """Columns and meta of the finished batches, one at a time, so that memory does not grow with the data set."""
        for first in self.finished():
            yield read_tensors(self.shard(first), leave_out=IMAGES)

    def finish(self, figures: Mapping[str, float]) -> Path:
        """Write the table, the figures over all samples, and the sums; returns the path of the table.

        Raises:
            ValueError: if a sample is there twice, or a file is not what was written.
        """
        positions = []
        for first in self.finished():
            positions.append(read_tensors(self.shard(first))[0]["index"])  # all of it, so that its sums are looked at
        index, counts = torch.cat(positions).unique(return_counts=True) if positions else (torch.empty(0), torch.ones(1))
        if counts.max() > 1:
            raise ValueError(f"{self.folder} holds the sample at position {index[counts.argmax()]} twice: {_UNIQUE}")
        shutil.rmtree(self.folder / "parts", ignore_errors=True)
        with replacing(self.folder / TABLE) as file:
            write_table(file, self.columns())
        write_json(self.folder / FIGURES, dict(figures))
        seal(self.folder)
        return self.folder / TABLE

    def close(self) -> None:
        """Let others write here."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None


def seal(folder: Path) -> None:
    """Write the sums of all files; whoever adds a file to a finished evaluation seals it again."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in (SUMS, LOCK))
    lines = [f"{sha256_of_file(path)}  {path.relative_to(folder).as_posix()}\n" for path in paths]
    write(folder / SUMS, "".join(lines).encode())


class _Parts(Keeper):
    """What one attack has finished on a batch that is not finished."""

    def __init__(self, folder: Path, attack: str, watch: Watch | None) -> None:
        super().__init__(watch)
        self.folder, self.attack = folder, attack

    def recall(self, part: str) -> dict[str, Tensor] | None:
        path = self._path(f"part-{part}")
        return read_tensors(path)[0] if path.exists() else None

    def remember(self, part: str, found: dict[str, Tensor]) -> None:
        write_tensors(self._path(f"part-{part}"), found, {})

    def recall_verdict(self) -> Verdict | None:
        path = self._path("verdict")
        if not path.exists():
            return None
        tensors, meta = read_tensors(path)
        return Verdict.of(tensors, meta["seconds"])

    def remember_verdict(self, verdict: Verdict) -> None:
        write_tensors(self._path("verdict"), verdict.tensors(), {"seconds": verdict.seconds})

    def _path(self, what: str) -> Path:
        return self.folder / f"{self.attack}.{what}.safetensors"


def sha256_of_data(x: Tensor, y: Tensor) -> str:
    """Sum of the clean pixels and labels of a batch."""
    return sha256_of_tensors({"x": x, "y": y})


def write_table(file: IO[bytes], batches: Iterable[tuple[dict[str, Tensor], dict[str, Any]]]) -> None:
    """CSV of columns and meta, one row a sample."""
    header: list[str] = []
    text = io.TextIOWrapper(file, newline="")
    writer = csv.writer(text)
    for columns, meta in batches:
        if not header:
            header = meta["columns"]
            writer.writerow(header)
        whole = [columns[name].int() if columns[name].dtype == torch.bool else columns[name] for name in header]
        writer.writerows(zip(*(column.tolist() for column in whole), strict=True))
    text.flush()
    text.detach()


def read_about(folder: Path) -> dict[str, Any]:
    """What ``store.json`` says.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is damaged or of a later format.
    """
    path = folder / ABOUT
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no {ABOUT}: name the folder of an evaluation, such as runs/NAME/test")
    try:
        about = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged ({error}): the evaluation cannot go on; move the folder away") from error
    if about.get("format") != FORMAT:
        raise ValueError(f"{path} is of format {about.get('format')} and this version reads {FORMAT}: use another version")
    return about


def difference(there: Any, here: Any, where: str = "") -> str:
    """The first place where two JSON values differ, in words."""
    if isinstance(there, dict) and isinstance(here, dict):
        for key in [*there, *(k for k in here if k not in there)]:
            if there.get(key) != here.get(key):
                return difference(there.get(key), here.get(key), f"{where}.{key}" if where else str(key))
    return f"{where}: {there!r} there, {here!r} here"
