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
from ..callbacks.store.files import sha256_of_tensors
from ..data import ImageDataModule
from .ranks import of_all_ranks, sum_over_ranks

Storage = Literal["float32", "bfloat16"]
_KEY, _META = "robust_pl_per_sample", "robust_pl"


class PerSample:
    """Tensors of one shape for every training sample, found by the sample's index.

    Process r of W holds the samples with ``index % W == r``, wherever they are read in an epoch; batches are exchanged between
    processes, two collective calls a step and nothing that waits. Of N samples of shape (C, H, W) a process holds
    ``columns * ceil(N / W) * C * H * W`` numbers on its device: one column of CIFAR-10 in float32 is 614 MB, of Tiny-ImageNet
    4.9 GB; ``bfloat16`` halves that. A sample that was not written since the start, or since :meth:`forget`, is not known.

    A checkpoint names files in the folder ``side_files`` of the run, one a process, which hold all of it; a run resumed on
    another number of processes shares them out anew.

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
        self._rows: dict[str, Tensor] = {}
        self._known = torch.zeros(0)
        self._rank, self._ranks, self._batch = 0, 1, 0
        self._token: str | None = None
        self._identity: dict[str, Any] = {}
        self._resumed: dict[str, Any] | None = None

    # In a step -------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def read(self, index: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """What is kept of these samples, float32 (B, C, H, W) by column, and whether each is known, bool (B, 1, 1, 1).

        Args:
            index: int64 (B,); all processes must call this together.
        """
        wanted = self._of_all(index)
        mine, rows = self._place(wanted)
        found = {"known": self._known[rows], **{name: self._rows[name][rows].float() for name in self.columns}}
        if self._ranks > 1:
            own = slice(self._rank * self._batch, self._rank * self._batch + len(index))
            # Each process adds what it holds, and zeros for all others.
            found = {name: sum_over_ranks(t * _like(mine, t))[own] for name, t in found.items()}
        known = found.pop("known").view(-1, 1, 1, 1) > 0
        return found, known

    @torch.no_grad()
    def write(self, index: Tensor, values: Mapping[str, Tensor]) -> None:
        """Keep ``values``, (B, C, H, W) by column, of these samples; all processes must call this together."""
        wanted = self._of_all(index)
        mine, rows = self._place(wanted)
        # Those of other processes go to a row of their own that nobody reads.
        rows = torch.where(mine, rows, len(self._known) - 1)
        for name in self.columns:
            self._rows[name].index_copy_(0, rows, self._of_all(values[name].to(self.dtype)))
        self._known.index_fill_(0, rows, 1.0)

    def forget(self) -> None:
        """No sample is known from here on."""
        self._known.zero_()

    # Around a run ----------------------------------------------------------------------------------------------------

    def open(self, trainer: Trainer, device: torch.device, who: str) -> None:
        """Make room for the training set of a run, and read what its checkpoint names.

        Raises:
            ValueError: if the size of the set or of its batches is unknown, or the checkpoint's files are missing, damaged, or
                of another data set, split or method.
        """
        samples, shape, self._batch = _sizes(trainer, who)
        self._rank, self._ranks = trainer.global_rank, trainer.world_size
        self._identity = _identity(trainer, samples)
        held = -(-samples // self._ranks) + 1  # and one that nobody reads
        self._rows = {name: torch.zeros(held, *shape, dtype=self.dtype, device=device) for name in self.columns}
        self._known = torch.zeros(held, device=device)
        resumed, self._resumed = self._resumed, None
        if resumed is not None:
            self._load(trainer, resumed, who)
        self._token = of_all_ranks(self._token or secrets.token_hex(4))[0]
        size = sum(t.numel() * t.element_size() for t in self._rows.values())
        kept = " and ".join(self.columns)
        rank_zero_info(f"{who} keeps {kept} of {samples:,} samples: {size / 2**20:,.0f} MiB on {device} of each process")

    def save(self, trainer: Trainer, checkpoint: dict[str, Any]) -> None:
        """Write the files that the checkpoint names; all processes must call this together."""
        if not self._rows:
            return
        stem = f"{self._token}-{trainer.global_step:08d}"
        names = [f"{stem}-{rank}of{self._ranks}.safetensors" for rank in range(self._ranks)]
        path = Path(trainer.default_root_dir) / SIDE_FOLDER / names[self._rank]
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        held = len(self._known) - 1
        tensors = {name: tensor[:held].cpu().contiguous() for name, tensor in self._rows.items()}
        about = {**self._identity, "rank": self._rank, "ranks": self._ranks, "step": trainer.global_step}
        save_file({**tensors, "known": self._known[:held].cpu()}, part, {_META: json.dumps(about)})
        os.replace(part, path)
        checkpoint[_KEY] = {"token": self._token, "files": names}
        checkpoint.setdefault(SIDE_FILES, []).extend(names)

    def resume(self, checkpoint: Mapping[str, Any]) -> None:
        """Go on where :meth:`save` was called, once :meth:`open` knows the data."""
        self._resumed = checkpoint.get(_KEY)

    def _load(self, trainer: Trainer, saved: Mapping[str, Any], who: str) -> None:
        self._token = saved["token"]
        for name in saved["files"]:
            path = find_side_file(trainer, name)
            try:
                with safe_open(path, "pt") as file:
                    about = json.loads((file.metadata() or {})[_META])
                    self._check(path, about, sorted(file.keys()), who)
                    known = file.get_tensor("known")
                    index = torch.arange(len(known)) * about["ranks"] + about["rank"]
                    here = (index % self._ranks == self._rank) & (index < about["samples"])
                    rows = (index[here] // self._ranks).to(self._known.device)
                    self._known[rows] = known[here].to(self._known)
                    for column in self.columns:
                        self._rows[column][rows] = file.get_tensor(column)[here].to(self._rows[column])
            except (SafetensorError, KeyError, json.JSONDecodeError) as error:
                raise ValueError(
                    f"{path} is damaged ({error}): start a new run from the checkpoint's weights with --model.init_args.weights"
                ) from error

    def _check(self, path: Path, about: dict[str, Any], names: list[str], who: str) -> None:
        if names != sorted([*self.columns, "known"]):
            kept = ", ".join(name for name in names if name != "known")
            raise ValueError(
                f"{path} keeps {kept} of each sample and {who} {', '.join(self.columns)}: resume the method it is of"
            )
        differ = [key for key, value in self._identity.items() if about.get(key) != value]
        if differ:
            was, now = ({key: known.get(key) for key in differ} for known in (about, self._identity))
            raise ValueError(
                f"{path} belongs to another training set or split ({was}, this run has {now}): resume with the data, val_size, "
                "val_split and seed of the run, or start a new one from its weights with --model.init_args.weights"
            )

    # Which rows ------------------------------------------------------------------------------------------------------

    def _place(self, wanted: Tensor) -> tuple[Tensor, Tensor]:
        """Which of ``wanted`` are held here, and in which row each would be."""
        mine = (wanted >= 0) & (wanted % self._ranks == self._rank)
        return mine, torch.where(mine, wanted // self._ranks, 0)

    def _of_all(self, values: Tensor) -> Tensor:
        """The batches of all processes one after the other, each filled up to one size by -1."""
        if self._ranks == 1:
            return values
        if len(values) > self._batch:
            raise ValueError(f"a batch of {len(values)} samples is larger than the loader's batch_size {self._batch}")
        filled = values.new_full((self._batch, *values.shape[1:]), -1)
        filled[: len(values)] = values
        everyone = [torch.empty_like(filled) for _ in range(self._ranks)]
        torch.distributed.all_gather(everyone, filled)
        return torch.cat(everyone)


def _like(mask: Tensor, tensor: Tensor) -> Tensor:
    return mask.view(-1, *[1] * (tensor.dim() - 1))


def _sizes(trainer: Trainer, who: str) -> tuple[int, tuple[int, ...], int]:
    """Samples of the training set, shape of each, and samples in a batch of one process."""
    data = trainer.datamodule
    if isinstance(data, ImageDataModule):
        return len(data.train_images()), tuple(data.image_shape), data.batch_size
    loader = trainer.train_dataloader
    dataset = getattr(loader, "dataset", None)
    if not hasattr(dataset, "__len__") or getattr(loader, "batch_size", None) is None:
        raise ValueError(
            f"{who} keeps something of every training sample and must know how many there are: pass an ImageDataModule, or a "
            "DataLoader with a batch_size over a dataset that has a length"
        )
    return len(dataset), tuple(dataset[0][0].shape), loader.batch_size


def _identity(trainer: Trainer, samples: int) -> dict[str, Any]:
    """What tells the training samples of one run from those of another."""
    data = trainer.datamodule
    if not isinstance(data, ImageDataModule):
        return {"samples": samples}
    x, y = data.train_set.read(torch.arange(min(16, len(data.train_set))), None)
    return {
        "data": type(data).__name__,
        "samples": samples,
        "first_16": sha256_of_tensors({"x": x, "y": y})[:16],
        "split": sha256_of_tensors({"train": data.split[0]})[:16],
    }
