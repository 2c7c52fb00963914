"""What a method keeps of each training sample, such as its last perturbation, shared out over processes."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..callbacks.checkpoints import SIDE_FILES, SIDE_FOLDER, find_side_file
from .ranks import of_all_ranks, sum_over_ranks
from .training_set import identity_of, sizes_of

Storage = Literal["float32", "bfloat16"]
_KEY, _META, _EPOCHS = "robust_pl_per_sample", "robust_pl", "epochs"


class PerSample:
    """Tensors of one shape for every training sample, found by the sample's index.

    Process r of W holds the samples with ``index % W == r``, wherever they are read in an epoch; batches are exchanged between
    processes, three collective calls to read and two to write, and nothing that waits. Of N samples of shape (C, H, W) a
    process holds ``columns * ceil(N / W) * C * H * W`` numbers on its device: one column of CIFAR-10 in float32 is 614 MB, of
    Tiny-ImageNet 4.9 GB; ``bfloat16`` halves that. N counts validation samples, too, since indices do.

    A checkpoint names files in the folder ``side_files`` of the run, one a process, which hold all of it; a run resumed on
    another number of processes shares them out anew. Each checkpoint has files of its own, of which those of one step are one
    on the disk, and all processes must see the folder. A process that is killed while it saves leaves files there that no
    checkpoint names.

    Args:
        columns: names of what is kept of each sample.
        storage: dtype that it is kept in.

    Raises:
        ValueError: if storage is unknown.
    """

    def __init__(self, columns: Sequence[str], storage: Storage = "float32") -> None:
        if storage not in get_args(Storage):
            raise ValueError(f"storage={storage!r} is unknown: choose one of {', '.join(get_args(Storage))}")
        self.columns, self.dtype = tuple(columns), getattr(torch, storage)
        # The last row of either is one that nobody reads.
        self._rows: Tensor | None = None
        self._epochs = torch.zeros(0)
        self._stray = torch.zeros(())
        self._samples, self._rank, self._ranks, self._batch = 0, 0, 1, 0
        self._trainer: Trainer | None = None
        self._identity: dict[str, Any] = {}
        self._written: tuple[int, Path | str] = (-1, "")
        self._resumed: Mapping[str, Any] | None = None

    # In a step -------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def read(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """What is kept of these samples, float32 (B, columns, C, H, W), and in which epoch each was written, int64 (B,).

        A sample that was never written is 0, with epoch -1. All processes must call this together.

        Args:
            index: int64 (B,).

        Raises:
            ValueError: if an index is not one of the training set; on a GPU, which would have to wait for that,
                :meth:`raise_if_stray` does.
        """
        wanted = self._of_all(index.where(index >= 0, self._samples), self._batch)
        self._stray |= (wanted >= self._samples).any()
        if index.device.type == "cpu":
            self.raise_if_stray()
        mine, rows = self._place(wanted)
        kept, epochs = self._rows[rows], self._epochs[rows].where(mine, -1)
        if self._ranks > 1:
            # Each process adds what it holds, and zeros for all others.
            own = slice(self._rank * self._batch, self._rank * self._batch + len(index))
            kept, epochs = sum_over_ranks(kept * _like(mine, kept))[own], sum_over_ranks(epochs + 1)[own] - 1
        return kept.float(), epochs

    @torch.no_grad()
    def write(self, index: Tensor, values: Tensor, epoch: int) -> None:
        """Keep ``values``, (B, columns, C, H, W), of these samples; of one that occurs several times the last counts.

        All processes must call this together, with no more samples than an optimizer step has.
        """
        size = self._batch * (self._trainer.accumulate_grad_batches if self._trainer is not None else 1)
        wanted = self._of_all(index, size)
        mine, rows = self._place(wanted)
        again = (wanted.unsqueeze(1) == wanted).triu(1).any(1)
        rows = torch.where(mine & ~again, rows, len(self._rows) - 1)
        self._rows.index_copy_(0, rows, self._of_all(values.to(self.dtype), size))
        self._epochs.index_fill_(0, rows, epoch)

    def raise_if_stray(self) -> None:
        """Report indices that are not of the training set; makes a GPU wait once."""
        if self._stray:
            self._stray.zero_()
            raise ValueError(
                f"the training data give indices outside of 0 to {self._samples - 1}, and have no other samples: yield (x, y, "
                "index) with the position of each sample in the data set"
            )

    # Around a run ----------------------------------------------------------------------------------------------------

    def open(self, trainer: Trainer, device: torch.device, who: str) -> None:
        """Make room for the training set of a run, and read what the checkpoint that it goes on from names.

        Raises:
            ValueError: if the size of the set or of its batches is unknown, or the checkpoint's files are missing, damaged, or
                of another data set, split or method.
        """
        samples, shape, self._batch = sizes_of(trainer, who)
        self._trainer, self._rank, self._ranks = trainer, trainer.global_rank, trainer.world_size
        self._identity, self._written = identity_of(trainer, samples, shape), (-1, "")
        self.reserve(samples, shape, device)
        if trainer.ckpt_path is not None and self._resumed is not None:
            self._load(trainer, self._resumed, who)
        self._resumed = None
        kept, size = " and ".join(self.columns), self._rows.numel() * self._rows.element_size()
        rank_zero_info(f"{who} keeps {kept} of {self._samples:,} samples: {size / 2**20:,.1f} MiB on {device} of each process")

    def reserve(self, samples: int, shape: Sequence[int], device: torch.device) -> None:
        """Make room for so many samples of this shape, (C, H, W), of which nothing is known."""
        self._samples, held = samples, -(-samples // self._ranks) + 1
        self._rows = torch.zeros(held, len(self.columns), *shape, dtype=self.dtype, device=device)
        self._epochs = torch.full((held,), -1, device=device)
        self._stray = torch.zeros((), dtype=torch.bool, device=device)

    def save(self, trainer: Trainer, checkpoint: dict[str, Any]) -> None:
        """Write the files that the checkpoint names; all processes must call this together."""
        if self._rows is None:
            return
        stem = of_all_ranks(f"{trainer.global_step:08d}-{secrets.token_hex(4)}")[0]
        names = [f"{stem}-{rank}of{self._ranks}.safetensors" for rank in range(self._ranks)]
        path = Path(trainer.default_root_dir) / SIDE_FOLDER / names[self._rank]
        path.parent.mkdir(parents=True, exist_ok=True)
        step, before = self._written
        try:
            # The best and the last checkpoint are often of one step.
            os.link(before if step == trainer.global_step else "", path)
        except OSError:
            self._write_file(path)
        self._written = trainer.global_step, path
        checkpoint[_KEY] = {"files": names}
        checkpoint.setdefault(SIDE_FILES, []).extend(names)

    def _write_file(self, path: Path) -> None:
        rows = self._rows[:-1].cpu()  # as a whole: a column by itself would first be copied on the device
        tensors = {name: rows[:, i].contiguous() for i, name in enumerate(self.columns)}
        tensors[_EPOCHS] = self._epochs[:-1].cpu()
        sums = {name: _sum(tensor) for name, tensor in tensors.items()}
        about = {**self._identity, "rank": self._rank, "ranks": self._ranks, "sums": sums}
        part = path.with_suffix(".part")
        try:
            save_file(tensors, part, {_META: json.dumps(about)})
            os.replace(part, path)
        except SafetensorError as error:  # such as a full disk
            raise OSError(f"{path} could not be written: {error}") from error
        finally:
            part.unlink(missing_ok=True)

    def resume(self, checkpoint: Mapping[str, Any]) -> None:
        """Go on where :meth:`save` was called, once :meth:`open` knows the data."""
        self._resumed = checkpoint.get(_KEY, {})

    def _load(self, trainer: Trainer, saved: Mapping[str, Any], who: str) -> None:
        if not saved:
            raise ValueError(
                f"{trainer.ckpt_path} names no files of what {who} keeps of each sample: it is of another method; start a new "
                "run from its weights with --model.init_args.weights"
            )
        for name in saved["files"]:
            path = find_side_file(trainer, name)
            try:
                with safe_open(path, "pt") as file:
                    about = json.loads((file.metadata() or {})[_META])
                    self._check(path, about, set(file.keys()), who)
                    tensors = {key: file.get_tensor(key) for key in (*self.columns, _EPOCHS)}
                for key, tensor in tensors.items():
                    if _sum(tensor) != about["sums"][key]:
                        raise KeyError(f"{key} is not what was written")
            except (SafetensorError, KeyError, json.JSONDecodeError) as error:
                raise ValueError(
                    f"{path} is damaged ({error}): start a new run from the checkpoint's weights with --model.init_args.weights"
                ) from error
            epochs = tensors.pop(_EPOCHS)
            index = torch.arange(len(epochs)) * about["ranks"] + about["rank"]
            here = (index % self._ranks == self._rank) & (index < self._samples)
            rows = (index[here] // self._ranks).to(self._rows.device)
            self._epochs[rows] = epochs[here].to(self._epochs)
            for i, column in enumerate(self.columns):
                self._rows[rows, i] = tensors[column][here].to(self._rows)

    def _check(self, path: Path, about: dict[str, Any], names: set[str], who: str) -> None:
        if names != {*self.columns, _EPOCHS}:
            kept = ", ".join(sorted(names - {_EPOCHS}))
            raise ValueError(
                f"{path} keeps {kept} of each sample and {who} {', '.join(self.columns)}: resume the method it is of"
            )
        of_file = {key: value for key, value in about.items() if key not in ("rank", "ranks", "sums")}
        differ = sorted(key for key in {*of_file, *self._identity} if of_file.get(key) != self._identity.get(key))
        if differ:
            found = ", ".join(f"{key} {of_file.get(key)} and not {self._identity.get(key)}" for key in differ)
            raise ValueError(
                f"{path} belongs to another training set or split ({found}): resume with the data, val_size, val_split and "
                "seed of the run, or start a new one from its weights with --model.init_args.weights"
            )

    # Which rows ------------------------------------------------------------------------------------------------------

    def _place(self, wanted: Tensor) -> tuple[Tensor, Tensor]:
        """Which of ``wanted`` are held here, and in which row each is; all others are in the row that nobody reads."""
        mine = (wanted >= 0) & (wanted < self._samples) & (wanted % self._ranks == self._rank)
        return mine, torch.where(mine, wanted // self._ranks, len(self._rows) - 1)

    def _of_all(self, values: Tensor, size: int) -> Tensor:
        """The batches of all processes one after the other, each filled up to ``size`` by -1."""
        if self._ranks == 1:
            return values
        if len(values) > size:
            raise ValueError(f"a batch of {len(values)} samples is larger than the loader's batch_size, which makes {size}")
        filled = values.new_full((size, *values.shape[1:]), -1)
        filled[: len(values)] = values
        everyone = [torch.empty_like(filled) for _ in range(self._ranks)]
        torch.distributed.all_gather(everyone, filled)
        return torch.cat(everyone)


def _like(mask: Tensor, tensor: Tensor) -> Tensor:
    return mask.view(-1, *[1] * (tensor.dim() - 1)).to(tensor.dtype)


def _sum(tensor: Tensor) -> int:
    """Cheap beside reading the tensor, and another one if a byte of it changes."""
    return int(tensor.flatten().view(torch.int16).sum(dtype=torch.int64))
