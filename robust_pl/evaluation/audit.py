"""Check an evaluation from what it left on disk, image by image."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from ..callbacks.attacks.checks import outside_ball, outside_box
from ..callbacks.attacks.prepare import evaluating
from ..callbacks.store.files import read_tensors, sha256_of_file
from ..callbacks.store.identity import replay, sha256_of_weights
from ..callbacks.store.store import FIGURES, IMAGES, LOCK, SUMS, TABLE, Store, read_about, sha256_of_data, write_table
from ..functional import geometry
from ..functional.geometry import NORMS
from ..functional.ratio import Ratio
from ..metrics.scoreboard import Scoreboard, as_metrics

Read = Callable[[Tensor], tuple[Tensor, Tensor]]
_TOLERANCE = 1e-5


@dataclass
class Audit:
    """What an audit looked at, and what it found wrong; ``print`` it for a table.

    Args:
        folder: of the evaluation.
        checked: what was looked at -> how often.
        problems: what was looked at -> sentences.
        skipped: what could not be looked at, and why.
    """

    folder: Path
    checked: dict[str, int] = field(default_factory=dict)
    problems: dict[str, list[str]] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether nothing was found wrong."""
        return not any(self.problems.values())

    def check(self, what: str, problem: str | None = None, count: int = 1) -> None:
        """Note that ``what`` was looked at ``count`` times, and what was wrong with it."""
        self.checked[what] = self.checked.get(what, 0) + count
        if problem:
            self.problems.setdefault(what, []).append(problem)

    def __str__(self) -> str:
        table = Table(title=f"audit of {self.folder}: {'passed' if self.passed else 'FAILED'}", title_justify="left")
        for name in ("what", "checked", "wrong"):
            table.add_column(name, justify="left" if name == "what" else "right")
        for what, count in self.checked.items():
            table.add_row(what, str(count), str(len(self.problems.get(what, ()))))
        console = Console(width=110)
        with console.capture() as capture:
            console.print(table)
            for what, problems in self.problems.items():
                for problem in problems[:10]:
                    console.print(f"{what}: {problem}", highlight=False, markup=False)
                if len(problems) > 10:
                    console.print(f"{what}: and {len(problems) - 10} more", highlight=False)
            for reason in self.skipped:
                console.print(f"not checked: {reason}", highlight=False, markup=False)
        return capture.get()


def audit(
    folder: str | Path,
    model: nn.Module,
    read: Read,
    *,
    autocast: AbstractContextManager[Any] | None = None,
    watch: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> Audit:
    """Re-read everything that an evaluation stored, run the model again on every image, and compare.

    Looks at the sums of all files, the network's weights, clean pixels and labels, each adversarial image (finite, in ball
    and box), every prediction and size, every accuracy, and the table. Costs one forward pass for each stored image.

    Args:
        folder: of a finished evaluation.
        model: that was evaluated, on the device where it shall run; evaluated in eval mode and left as it was.
        read: positions (B,) of samples -> clean pixels (B, C, H, W) and labels (B,).
        autocast: what surrounded the network, if it ran in another precision than that of its weights.
        watch: is given the batches, for a progress bar.

    Raises:
        FileNotFoundError: if the folder holds no evaluation.
        ValueError: if the evaluation is not finished.
    """
    folder = Path(folder)
    about = read_about(folder)
    if not (folder / SUMS).is_file():
        raise ValueError(f"{folder} holds an evaluation that is not finished: start it again with the same command")
    found = Audit(folder)
    _check_files(found)
    facts = about.get("facts", {})
    same = facts.get("weights") == sha256_of_weights(model)
    found.check("weights", None if same else "the network's weights are not those that were evaluated")
    store = Store(folder, {}, writer=False)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    board: Scoreboard | None = None
    threats = facts.get("threats", {})
    with evaluating(model), torch.no_grad(), autocast or nullcontext():
        for first in watch(store.finished()):
            try:
                tensors, meta = read_tensors(store.shard(first))
            except ValueError as error:
                found.check("shards", str(error))
                continue
            found.check("shards")
            _Batch(found, tensors, meta, threats, device).check(model, read)
            board = board or Scoreboard(list(meta["seconds"]), meta["classes"])
            replay(board, tensors, meta["seconds"], torch.device("cpu"))
    if board is None:
        found.check("shards", "there is none")
    else:
        _check_figures(found, as_metrics(board.rows()))
        _check_table(found, store)
    return found


def _check_files(found: Audit) -> None:
    """Every file against its sum."""
    listed: dict[str, str] = {}
    text = (found.folder / SUMS).read_bytes().decode(errors="replace")
    for number, line in enumerate(text.removesuffix("\n").split("\n"), 1):
        digest, _, name = line.partition("  ")
        if len(digest) != 64 or not name:
            found.check("files", f"line {number} of {SUMS} is not a sum and a name")
        else:
            listed[name] = digest
    if not text.endswith("\n"):
        found.check("files", f"{SUMS} does not end with a line's end: it may be cut off")
    for name, digest in listed.items():
        path = found.folder / name
        problem = None
        if not path.is_file():
            problem = f"{name} is missing"
        elif sha256_of_file(path) != digest:
            problem = f"{name} is not the file that was written: its SHA-256 differs from {SUMS}"
        found.check("files", problem)
    for path in sorted(found.folder.rglob("*")):
        name = path.relative_to(found.folder).as_posix()
        if path.is_file() and name not in (SUMS, LOCK) and name not in listed:
            found.check("files", f"{name} is not listed in {SUMS}")


class _Batch:
    """The checks of one stored batch."""

    def __init__(
        self,
        found: Audit,
        tensors: Mapping[str, Tensor],
        meta: Mapping[str, Any],
        threats: Mapping[str, Mapping[str, Any]],
        device: torch.device,
    ) -> None:
        self.found, self.tensors, self.meta, self.threats, self.device = found, tensors, meta, threats, device
        self.index, self.label = tensors["index"], tensors["label"]

    def check(self, model: nn.Module, read: Read) -> None:
        """Compare with what the data and the network say today."""
        x, y = read(self.index)
        self._same("labels", self.label, y)
        if sha256_of_data(x, y) != self.meta["data"]:
            self.found.check("clean images", f"those of samples {self._name()} are not those that were evaluated")
        else:
            self.found.check("clean images", count=len(x))
        self._same("clean predictions", self.tensors["prediction"], self._predict(model, x))
        for attack in self.meta["seconds"]:
            self._check_attack(model, attack, x)

    def _check_attack(self, model: nn.Module, attack: str, x: Tensor) -> None:
        column = {kind: self.tensors[f"{kind}_{attack}"] for kind in ("right", "prediction", *NORMS)}
        self._same(f"{attack}: verdicts", column["right"], column["prediction"] == self.label)
        self._check_parts(attack, column["right"])
        if IMAGES + attack not in self.tensors:
            reason = f"images of {attack}, which were not kept (evaluation.save_adversarial)"
            if reason not in self.found.skipped:
                self.found.skipped.append(reason)
            return
        x_adv = self.tensors[IMAGES + attack]
        finite = bool(x_adv.isfinite().all())
        self.found.check(f"{attack}: finite", None if finite else f"samples {self._name()} hold NaN", count=len(x_adv))
        outside = bool(outside_box(x_adv))
        self.found.check(f"{attack}: in the box", f"samples {self._name()} leave [0, 1]" if outside else None, len(x_adv))
        seen = x_adv.to(x.dtype)
        for norm in NORMS:
            sizes = geometry.size(seen - x, norm)
            close = torch.isclose(sizes, column[norm], rtol=_TOLERANCE, atol=_TOLERANCE)
            self._all(f"{attack}: {norm} sizes", close, "other than stored")
        threat = self.threats.get(attack, {})
        if threat.get("eps") is not None:
            sizes = geometry.size(seen - x, threat["norm"])
            too_large = outside_ball(sizes, Ratio(threat["eps"]), threat["norm"])
            problem = f"samples {self._name()}: up to {sizes.max():.6g}, allowed {threat['eps']}" if too_large else None
            self.found.check(f"{attack}: in the ball", problem, len(x_adv))
        self._same(f"{attack}: predictions", column["prediction"], self._predict(model, seen))

    def _check_parts(self, attack: str, right: Tensor) -> None:
        """What stands after a later part has stood before."""
        prefix = f"robust_{attack}_"
        parts = [self.tensors[name] for name in self.meta["columns"] if name.startswith(prefix)]
        for before, after in pairwise(parts):
            self._all(f"{attack}: parts", before | ~after, "stand again after a later part")

    def _predict(self, model: nn.Module, x: Tensor) -> Tensor:
        return model(x.to(self.device)).argmax(1).cpu()

    def _same(self, what: str, stored: Tensor, computed: Tensor) -> None:
        self._all(what, stored == computed, "other than stored")

    def _all(self, what: str, right: Tensor, complaint: str) -> None:
        wrong = self.index[~right].tolist()
        shown = ", ".join(map(str, wrong[:8])) + (", ..." if len(wrong) > 8 else "")
        self.found.check(what, f"samples {shown}: {complaint}" if wrong else None, len(right))

    def _name(self) -> str:
        return f"{int(self.index.min())} to {int(self.index.max())}"


def _check_figures(found: Audit, figures: Mapping[str, float]) -> None:
    try:
        stored = json.loads((found.folder / FIGURES).read_text())
    except (OSError, ValueError) as error:
        found.check("figures", f"{FIGURES} cannot be read: {error}")
        return
    for name in sorted({*stored, *figures}):
        if name.startswith("seconds_"):
            continue  # several processes count those of the slowest
        here, there = figures.get(name), stored.get(name)
        same = here is not None and there is not None and abs(here - there) <= _TOLERANCE
        found.check("figures", None if same else f"{name} is {here} and {FIGURES} says {there}")


def _check_table(found: Audit, store: Store) -> None:
    """The table, written once more, equals the one that is there."""
    file = io.BytesIO()
    try:
        write_table(file, store.columns())
        same = (found.folder / TABLE).read_bytes() == file.getvalue()
    except (ValueError, OSError) as error:
        found.check("table", str(error))
        return
    found.check("table", None if same else f"{TABLE} does not say what the shards say")


def evaluations(folder: Path) -> Iterator[Path]:
    """Folders of the evaluations in a run's folder, or that folder itself.

    Raises:
        FileNotFoundError: if there is none.
    """
    found = [folder] if (folder / "store.json").is_file() else sorted(p.parent for p in folder.glob("*/store.json"))
    if not found:
        raise FileNotFoundError(f"{folder} holds no evaluation: name a run that was tested, such as runs/quickstart")
    yield from found
