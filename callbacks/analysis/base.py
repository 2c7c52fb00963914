"""What analyses of a network on a test set have in common."""

from __future__ import annotations

import dataclasses
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from torch import Tensor, nn

from ...report.plots import save
from ...report.record import Record
from ...report.record_plot import plot_record
from ..attacks.checks import check_count
from ..attacks.prepare import prepared
from ..evaluation import RobustEvaluation
from ..store.files import write
from ..store.identity import describe
from ..track import log_rows, on_first
from .seen import Seen, SeenFiles, store_of_test

_INCIDENTAL = ("name", "folder")


class Analysis(Callback, ABC):
    """Base of analyses that look at a frozen network on test images: a callback that is also a plain callable.

    A subclass defines :meth:`look`, which is shown each batch and keeps, by :meth:`keep`, what it saw of each sample and, by
    :meth:`add`, sums over samples; and :meth:`conclude`, which makes a :class:`robust_pl.report.Record` of all that was kept.
    The network is in eval mode; only what runs under ``torch.enable_grad`` has gradients.

    As a callable, ``analysis(model, batches)`` returns the record for batches of (x, y) or (x, y, index). As a callback it
    looks at the test set and writes ``analysis/<folder of the test>/<name>.json`` into the run folder, and beside it a PNG of
    its curves and maps, which loggers get, too; the figures are logged as ``test/<name>_<figure>``. Several processes share the
    samples. What was seen of a batch is kept beside the test's store until the test is over, so that one which goes on after a
    kill looks at no batch twice. Averaged weights are not looked at.

    Args:
        samples: only those at a position in the test set below this are looked at; None for all.
        name: of figures and files; None takes the class's.
        folder: where a run's files go; None takes the place above.

    Raises:
        ValueError: if an argument is out of its range.
    """

    record: Record | None = None
    """What the last test, or call, found."""

    def __init__(self, samples: int | None = None, name: str | None = None, folder: str | None = None) -> None:
        if samples is not None:
            check_count("samples", samples)
        self.samples, self.folder = samples, folder
        self.name = name or type(self).__name__.lower()
        self._forget()

    def begin(self, model: nn.Module, data: Any) -> None:
        """Before the first batch; ``data`` is the data module, or None. Refuse here what cannot be looked at."""

    @abstractmethod
    def look(self, model: nn.Module, x: Tensor, y: Tensor, index: Tensor) -> None:
        """See pixels x in [0, 1] (B, C, H, W), classes y (B,), and positions in the test set (B,)."""

    @abstractmethod
    def conclude(self, kept: dict[str, Tensor], sums: dict[str, Tensor]) -> Record:
        """The record of all samples.

        Args:
            kept: what :meth:`keep` was given, (N, ...) in the order of the test set, on the CPU; ``index`` is always there.
            sums: what :meth:`add` was given, summed, float64 on the CPU.
        """

    def keep(self, **columns: Tensor) -> None:
        """Keep something of each sample of the batch, (B, ...)."""
        for key, value in columns.items():
            self._now.kept.setdefault(key, []).append(value.detach().cpu())

    def add(self, **sums: Tensor) -> None:
        """Add to sums over all samples. They stay on the device, so that nothing waits."""
        for key, value in sums.items():
            # MPS has no float64.
            value = value.detach().to(torch.float32 if value.device.type == "mps" else torch.float64)
            self._now.sums[key] = self._now.sums[key] + value if key in self._now.sums else value

    @property
    def forwards(self) -> int:
        """Passes spent so far, summed over samples; what :meth:`look` spends past :meth:`ask` it adds here."""
        return self._past.forwards + self._now.forwards

    @forwards.setter
    def forwards(self, passes: int) -> None:
        self._now.forwards = passes - self._past.forwards

    def ask(self, model: nn.Module, x: Tensor) -> Tensor:
        """Logits of the network, a forward pass that is counted."""
        self.forwards += len(x)
        return model(x)

    def settings(self) -> dict[str, Any]:
        """Class and settings, as far as they change what is found."""
        return {key: value for key, value in describe(self).items() if key not in _INCIDENTAL}

    def __call__(self, model: nn.Module, batches: Iterable[Any]) -> Record:
        """Look at batches of (x, y) or (x, y, index).

        Raises:
            ValueError: if there is no sample.
        """
        self._forget()
        self.begin(model, None)
        with self._watching(model), torch.no_grad():
            for batch in batches:
                self._see(model, batch)
        self._put_by()
        self.record = self._concluded([self._past], None)
        return self.record

    # Inside ----------------------------------------------------------------------------------------------------------

    def _forget(self) -> None:
        self._now, self._past = Seen(), Seen()  # since the last file was written, on the device; and before, on the CPU
        self._files: SeenFiles | None = None
        self._found: frozenset[int] = frozenset()
        self._shown = 0

    def _put_by(self) -> Seen:
        """What was seen since the last call; it is of the past now."""
        seen, self._now = self._now.on_cpu(), Seen()
        self._past.include(seen)
        return seen

    @contextmanager
    def _watching(self, model: nn.Module) -> Iterator[None]:
        began = time.perf_counter()
        with torch.inference_mode(False), prepared(model, "eval"):
            yield
        self._now.seconds += time.perf_counter() - began

    def _see(self, model: nn.Module, batch: Any) -> None:
        x, y = batch[0], batch[1]
        index = self._positions(batch)
        if self.samples is not None:
            wanted = (index < self.samples).nonzero().squeeze(1)
            x, y, index = x[wanted.to(x.device)], y[wanted.to(y.device)], index[wanted]
        if len(x):
            self.keep(index=index)
            # Tensors of inference mode cannot take part in gradients.
            self.look(model, x.clone() if x.is_inference() else x, y.clone() if y.is_inference() else y, index)

    def _positions(self, batch: Any) -> Tensor:
        """Of the samples of a batch in the test set; those of (x, y) are counted. On the CPU."""
        self._shown += len(batch[0])
        return batch[2].cpu() if len(batch) > 2 else torch.arange(self._shown - len(batch[0]), self._shown)

    def _concluded(self, parts: list[Seen], data: Any) -> Record:
        seen = Seen.of(parts)
        if not seen.kept:
            raise ValueError(f"{type(self).__name__} saw no sample: give it a test set, and samples of at least 1")
        kept = {key: torch.cat(values) for key, values in seen.kept.items()}
        order = kept["index"].argsort()
        kept = {key: value[order] if len(value) == len(order) else value for key, value in kept.items()}
        record = self.conclude(kept, seen.sums)
        about = {
            "data": None if data is None else type(data).__name__,
            "samples": len(order),
            "forwards_per_sample": seen.forwards / len(order),
            "seconds": round(max(part.seconds for part in parts), 2),
            "settings": self.settings(),
        }
        return dataclasses.replace(record, about={**about, **record.about})

    # Lightning's side ------------------------------------------------------------------------------------------------

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._forget()
        self.record = None
        self.begin(pl_module, trainer.datamodule)
        self._files = files = SeenFiles.of_test(trainer, self.name, self.settings())
        if files is not None:
            # Every process must know them: any may be given a batch that was seen but not finished.
            self._found = frozenset(on_first(trainer, files.found))
            for first in sorted(self._found)[trainer.global_rank :: trainer.world_size]:
                self._past.include(files.read(first))

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        first = None if self._files is None else int(batch[2].min())
        if first in self._found:
            return
        with trainer.precision_plugin.val_step_context(), self._watching(pl_module), torch.no_grad():
            self._see(pl_module, batch)
        if first is not None and self._now.kept:
            self._files.write(first, self._put_by())

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._catch_up(trainer, pl_module)
        self._put_by()
        parts: list[Any] = [self._past]
        if trainer.world_size > 1:
            parts = [None] * trainer.world_size
            torch.distributed.all_gather_object(parts, self._past)
        self.record = self._concluded(parts, trainer.datamodule)
        log_rows(pl_module, "test", {f"{self.name}_{key}": value for key, value in self.record.figures.items()})
        if trainer.is_global_zero:
            self._write(trainer, self.record)

    def _catch_up(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Batches that an earlier, interrupted test finished were not shown to this callback; most of them it has in files."""
        data, evaluations = trainer.datamodule, [c for c in trainer.callbacks if isinstance(c, RobustEvaluation)]
        if not hasattr(data, "leave_out"):
            return
        if not any(evaluation.tracks[0].is_open for evaluation in evaluations):
            self._files = None  # the test is over, and has removed them
        finished = {first for evaluation in evaluations for first in evaluation.finished} - self._found
        finished = sorted(first for first in finished if self.samples is None or first < self.samples)
        for first in finished[trainer.global_rank :: trainer.world_size]:
            index = torch.arange(first, min(first + data.eval_batch_size, len(data.test_set)))
            x, y = (part.to(pl_module.device) for part in data.test_set.read(index, None))
            x = trainer.precision_plugin.convert_input(x)  # as Lightning does with the others
            self.on_test_batch_end(trainer, pl_module, None, (x, y, index), 0)

    def _write(self, trainer: Trainer, record: Record) -> None:
        folder = self._place(trainer)
        figure = plot_record(record)
        if figure is not None:
            picture = save(figure, folder / f"{self.name}.png")
            for logger in trainer.loggers:
                if hasattr(logger, "log_image"):
                    logger.log_image(f"test/{self.name}", [picture])
        write(folder / f"{self.name}.json", record.as_json().encode())

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.record is not None and trainer.is_global_zero:
            path = os.path.relpath(self._place(trainer) / f"{self.name}.json")
            Console(soft_wrap=True).print(f"{self.record.title}: {path}", markup=False)

    def _place(self, trainer: Trainer) -> Path:
        if self.folder:
            return Path(self.folder)
        store = store_of_test(trainer)
        return Path(trainer.default_root_dir) / "analysis" / ("test" if store is None else store.name)
