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
from ..track import log_rows

_INCIDENTAL = ("name", "folder")


class Analysis(Callback, ABC):
    """Base of analyses that look at a frozen network on test images: a callback that is also a plain callable.

    A subclass defines :meth:`look`, which is shown each batch and keeps, by :meth:`keep`, what it saw of each sample and, by
    :meth:`add`, sums over samples; and :meth:`conclude`, which makes a :class:`robust_pl.report.Record` of all that was kept.
    The network is in eval mode; only what runs under ``torch.enable_grad`` has gradients.

    As a callable, ``analysis(model, batches)`` returns the record for batches of (x, y) or (x, y, index). As a callback it
    looks at the test set and writes ``analysis/<folder of the test>/<name>.json`` into the run folder, and beside it a PNG of
    its curves and maps, which loggers get, too; the figures are logged as ``test/<name>_<figure>``. Several processes share the
    samples; a test that goes on after a kill looks at the finished batches, too. Averaged weights are not looked at.

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
            self._kept.setdefault(key, []).append(value.detach().cpu())

    def add(self, **sums: Tensor) -> None:
        """Add to sums over all samples. They stay on the device, so that nothing waits."""
        for key, value in sums.items():
            # MPS has no float64.
            value = value.detach().to(torch.float32 if value.device.type == "mps" else torch.float64)
            self._sums[key] = self._sums[key] + value if key in self._sums else value

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
        self.record = self._concluded([(self._kept, self._sums, self.forwards)], None)
        return self.record

    # Inside ----------------------------------------------------------------------------------------------------------

    def _forget(self) -> None:
        self._kept: dict[str, list[Tensor]] = {}
        self._sums: dict[str, Tensor] = {}
        self._seen, self.forwards, self.seconds = 0, 0, 0.0

    @contextmanager
    def _watching(self, model: nn.Module) -> Iterator[None]:
        began = time.perf_counter()
        with torch.inference_mode(False), prepared(model, "eval"):
            yield
        self.seconds += time.perf_counter() - began

    def _see(self, model: nn.Module, batch: Any) -> None:
        x, y = batch[0], batch[1]
        index = batch[2] if len(batch) > 2 else torch.arange(self._seen, self._seen + len(x))
        self._seen += len(x)
        index = index.cpu()
        if self.samples is not None:
            wanted = (index < self.samples).nonzero().squeeze(1)
            x, y, index = x[wanted.to(x.device)], y[wanted.to(y.device)], index[wanted]
        if len(x):
            self.keep(index=index)
            # Tensors of inference mode cannot take part in gradients.
            self.look(model, x.clone() if x.is_inference() else x, y.clone() if y.is_inference() else y, index)

    def _concluded(self, parts: list[tuple[dict[str, list[Tensor]], dict[str, Tensor], int]], data: Any) -> Record | None:
        columns: dict[str, list[Tensor]] = {}
        sums: dict[str, Tensor] = {}
        for kept, added, _ in parts:
            for key, values in kept.items():
                columns.setdefault(key, []).extend(values)
            for key, value in added.items():
                sums[key] = sums[key] + value.cpu().double() if key in sums else value.cpu().double()
        if not columns:
            raise ValueError(f"{type(self).__name__} saw no sample: give it a test set, and samples of at least 1")
        kept = {key: torch.cat(values) for key, values in columns.items()}
        order = kept["index"].argsort()
        kept = {key: value[order] if len(value) == len(order) else value for key, value in kept.items()}
        record = self.conclude(kept, sums)
        about = {
            "data": None if data is None else type(data).__name__,
            "samples": len(order),
            "forwards_per_sample": sum(part[2] for part in parts) / len(order),
            "seconds": round(self.seconds, 2),
            "settings": self.settings(),
        }
        return dataclasses.replace(record, about={**about, **record.about})

    # Lightning's side ------------------------------------------------------------------------------------------------

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._forget()
        self.record = None
        self.begin(pl_module, trainer.datamodule)

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        with trainer.precision_plugin.val_step_context(), self._watching(pl_module), torch.no_grad():
            self._see(pl_module, batch)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._catch_up(trainer, pl_module)
        own = (self._kept, {key: value.cpu() for key, value in self._sums.items()}, self.forwards)
        parts: list[Any] = [own]
        if trainer.world_size > 1:
            parts = [None] * trainer.world_size
            torch.distributed.all_gather_object(parts, own)
        self.record = self._concluded(parts, trainer.datamodule)
        log_rows(pl_module, "test", {f"{self.name}_{key}": value for key, value in self.record.figures.items()})
        if trainer.is_global_zero:
            self._write(trainer, self.record)

    def _catch_up(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The batches that an earlier, interrupted test finished were not shown to this callback."""
        data = trainer.datamodule
        finished = [first for c in trainer.callbacks if isinstance(c, RobustEvaluation) for first in c.finished]
        for first in sorted(finished)[trainer.global_rank :: trainer.world_size]:
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
        stores = [c.tracks[0].folder for c in trainer.callbacks if isinstance(c, RobustEvaluation)]
        test = next((store.name for store in stores if store is not None), "test")
        return Path(trainer.default_root_dir) / "analysis" / test
