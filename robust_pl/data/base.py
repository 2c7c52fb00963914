"""The base of every image data module: splits, loaders, ranks and seeds."""

from __future__ import annotations

import inspect
import os
from abc import ABC, abstractmethod
from collections.abc import Collection
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal, get_args
from weakref import WeakSet

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.core.mixins.hparams_mixin import HyperparametersMixin, _given_hyperparameters
from lightning.pytorch.utilities.parsing import collect_init_args
from torch import Tensor

from ..functional.class_groups import ClassGroups
from .augmentations import AsUsual, Augmentation, augmented
from .dealer import Dealer
from .hashing import SPLIT, permutation
from .images import Batch, Images
from .loaders import EvalLoader, TrainLoader, TrainOrder
from .reading import BatchReader, chosen_workers
from .resident import Residence, ResidentImages

_PLAIN = (bool, int, float, str, type(None))
ValSplit = Literal["random", "last"]


class ImageDataModule(LightningDataModule, ABC):
    """Images in batches ``(x, y, index)``; a subclass says where the files are and how a sample is read.

    ``x`` is float32 (B, C, H, W) in [0, 1], never normalised; ``y`` int64 (B,); ``index`` int64 (B,), the position in
    the original training or test set. The validation set is drawn from the training set by ``seed``, not stratified, or is
    the end of it; it is never from the test set. Order and augmentation are functions of the seed, the epoch and the sample
    alone: of no global random stream, worker, rank or restart. The loaders share the samples out over ranks themselves,
    whatever ``Trainer(use_distributed_sampler=...)`` says, and resume in the middle of an epoch.

    A subclass defines ``class_names``, ``image_shape``, ``load_train`` and ``load_test``.

    Args:
        data_dir: folder of the files; default the environment variable ROBUST_PL_DATA, else ``./data``.
        batch_size: training samples a step and a process.
        eval_batch_size: samples a batch of validation, test and predict; default ``batch_size``.
        num_workers: processes that read ahead; 0 reads in the training process. None chooses: 0 for sets held in memory, else
            this process' share of the machine's cores, at most 8.
        val_size: validation samples, as a fraction of the training set or a number; 0 for none.
        seed: of the split, the order and the augmentation.
        augment: whether training samples get the set's usual augmentation; or a list of augmentations instead, such as
            :class:`robust_pl.data.CutMix`, which work on whole batches on the training device, one after the other;
            :class:`robust_pl.data.AsUsual` in it keeps the usual one.
        drop_last: leave out the last incomplete training step of an epoch.
        val_split: which samples are held out for validation: ``random`` ones, drawn by ``seed``, or the ``last`` ones of the
            training set, whatever the seed. The last ones of a set that is sorted by class are those of few classes.

    Raises:
        ValueError: if an argument is out of range.
    """

    class_names: list[str]
    image_shape: tuple[int, int, int]
    resident: bool | None = None
    """Whether sets of 8-bit pixels are copied to the training device, and batches made there. None does so on a CUDA device of
    whose free memory a set takes at most a quarter; what is read from files never is. Not an argument, since no result depends
    on it: the callback ``Speed`` sets it."""
    class_groups: ClassGroups | None = None
    """Where the set has other classes than the networks that it tests: which of theirs each of its classes is. Evaluation then
    sees the logits of the groups alone, so that attacks, accuracies and predictions are all about the classes of the set."""

    def __init__(
        self,
        data_dir: str | None = None,
        batch_size: int = 128,
        eval_batch_size: int | None = None,
        num_workers: int | None = None,
        val_size: int | float = 0.1,
        seed: int = 0,
        augment: bool | list[Augmentation] = True,
        drop_last: bool = True,
        val_split: ValSplit = "random",
    ) -> None:
        super().__init__()
        live: list[str] = []
        if _given_hyperparameters.get() is None:
            # A config is all plain words. What code built must not go into a checkpoint, nor be copied.
            for arguments in collect_init_args(inspect.currentframe(), [], classes=(HyperparametersMixin,)):
                live += [name for name, value in arguments.items() if not isinstance(value, _PLAIN)]
        self.save_hyperparameters(ignore=live)
        # A small set may have fewer chunks than there are processes.
        self.allow_zero_length_dataloader_with_multiple_devices = True
        self.data_dir = Path(data_dir or os.environ.get("ROBUST_PL_DATA") or "data").expanduser()
        self.batch_size = batch_size
        self.eval_batch_size = batch_size if eval_batch_size is None else eval_batch_size
        self.num_workers, self.val_size, self.seed = num_workers, val_size, seed
        self.augment, self.drop_last, self.val_split = augment, drop_last, val_split
        self._train_loader: TrainLoader | None = None
        self._left_out: dict[str, Any] = {}
        self._dealer: Dealer | None = None
        self._resumed: dict[str, Any] | None = None
        self._residence, self._readers, self._ahead = Residence(), WeakSet[BatchReader](), 0
        for name, least in (("batch_size", 1), ("eval_batch_size", 1), ("num_workers", 0), ("seed", 0)):
            if (given := getattr(self, name)) is not None and given < least:
                raise ValueError(f"{name} must be at least {least}, not {getattr(self, name)}")
        if not isinstance(augment, bool) and not all(isinstance(one, Augmentation) for one in augment):
            raise TypeError(f"augment={augment!r} must be true, false, or a list of augmentations such as CropAndFlip")
        if val_size < 0 or (isinstance(val_size, float) and val_size >= 1):
            raise ValueError(f"val_size must be a fraction in [0, 1) or a whole number of samples, not {val_size}")
        if val_split not in get_args(ValSplit):
            raise ValueError(f"val_split={val_split!r} is unknown: choose one of {', '.join(get_args(ValSplit))}")

    @abstractmethod
    def load_train(self) -> Images:
        """The whole training set, validation samples included."""

    @abstractmethod
    def load_test(self) -> Images:
        """The test set."""

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def net_classes(self) -> int:
        """Logits of a network that is trained or tested on the set: not ``num_classes`` where there are groups of classes."""
        return self.num_classes

    @property
    def in_channels(self) -> int:
        return self.image_shape[0]

    @property
    def augments_as_usual(self) -> bool:
        """Whether training samples get the set's usual augmentation as they are read, alone or before others."""
        return self.augment if isinstance(self.augment, bool) else any(isinstance(one, AsUsual) for one in self.augment)

    @cached_property
    def train_set(self) -> Images:
        return self.load_train()

    @cached_property
    def test_set(self) -> Images:
        return self.load_test()

    @cached_property
    def split(self) -> tuple[Tensor, Tensor]:
        """Ascending positions of the training and of the validation samples, int64 (N,) each; disjoint."""
        n = len(self.train_set)
        n_val = self.val_size if isinstance(self.val_size, int) else round(self.val_size * n)
        if n_val >= n:
            raise ValueError(f"val_size={self.val_size} leaves nothing to train on: the training set has {n} samples")
        return self.divide(torch.arange(n), n_val, SPLIT)

    def divide(self, index: Tensor, count: int, *parts: int) -> tuple[Tensor, Tensor]:
        """Ascending positions without ``count`` of them, and those: drawn by (seed, parts), or the last; int64 (N,) each."""
        kept = len(index) - count
        if self.val_split == "last":
            return index[:kept], index[kept:]
        order = index[permutation(len(index), self.seed, *parts)]
        return order[count:].sort().values, order[:count].sort().values

    def setup(self, stage: str) -> None:
        """Read the sets that the stage needs, so that a missing file is reported before anything runs."""
        _ = self.split if stage in ("fit", "validate") else self.test_set

    def teardown(self, stage: str) -> None:
        """Give back the device's memory, and stop the workers."""
        self._residence.clear()
        for reader in self._readers:
            reader.close()

    def on_exception(self, exception: BaseException) -> None:
        """Likewise: Lightning calls no ``teardown`` of what an error or Ctrl-C ends, and a notebook lives on."""
        self.teardown("")

    def train_dataloader(self) -> TrainLoader:
        trainer = self.trainer
        order = self.train_order(*self._rank_and_world_size(), fixed=trainer is not None and trainer.overfit_batches > 0)
        progress = None if trainer is None else lambda: (trainer.current_epoch, trainer.fit_loop.batch_idx + 1)
        images, workers = self._placed(self.train_images())
        ahead = [] if isinstance(self.augment, bool) else list(takewhile(lambda one: one.in_blocks, self.augment))
        self._ahead = len(ahead) if isinstance(images, ResidentImages) else 0
        then = self._augmented_ahead if self._ahead else None
        loader = TrainLoader(images, order, self.augments_as_usual, workers, progress, then)
        if self._resumed is not None:
            loader.load_state_dict(self._resumed)
            self._resumed = None
        self._train_loader = loader
        self._adopt(loader.reader)
        return loader

    def train_order(self, rank: int, world_size: int, fixed: bool) -> TrainOrder:
        """Which samples are trained on, in which order; see :class:`TrainOrder`."""
        return TrainOrder(self.split[0], self.batch_size, self.seed, rank, world_size, self.drop_last, fixed)

    def train_images(self) -> Images:
        """Where they are read."""
        return self.train_set

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Augment a training batch on its device, where ``augment`` is a list."""
        if isinstance(self.augment, bool) or not self.trainer.training or self._train_loader is None:
            return batch
        return self._augmented(batch, self._train_loader.epoch, slice(self._ahead, None))

    def _augmented_ahead(self, block: Batch, epoch: int) -> Batch:
        return self._augmented(block, epoch, slice(self._ahead)) if self.trainer.training else block

    def _augmented(self, batch: Batch, epoch: int, which: slice) -> Batch:
        return augmented(batch, self.augment, self.num_classes, self.seed, epoch, which)

    def state_dict(self) -> dict[str, Any]:
        """Position in the epoch. Lightning restores a loader's own state only if it has not been asked for before, and
        a schedule that needs the length of the run asks for it.
        """
        return {} if self._train_loader is None else {"train": self._train_loader.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._resumed = state_dict.get("train")

    def val_dataloader(self) -> EvalLoader | list[EvalLoader]:
        """The validation batches; an empty list, which Lightning understands, if ``val_size`` is 0."""
        index = self.split[1]
        return self._eval_loader(self.train_set, index, "val") if len(index) else []

    def test_dataloader(self) -> EvalLoader:
        return self._test_loader("test")

    def leave_out(self, finished: Collection[int], limit: int | float = 1.0) -> None:
        """Leave finished batches out of test and predict, see :class:`EvalLoader`."""
        self._left_out = {"finished": frozenset(finished), "limit": limit}

    def predict_dataloader(self) -> EvalLoader:
        """The test set."""
        return self._test_loader("predict")

    @property
    def dealt(self) -> int:
        """Chunks of an evaluation that are handed out, as far as this process knows; 0 without a dealer."""
        return 0 if self._dealer is None else self._dealer.place + 1

    def deal(self, dealer: Dealer) -> None:
        """Let the dealer hand out the chunks of evaluations from now on, see :class:`EvalLoader`."""
        self._dealer = dealer

    def _test_loader(self, stage: str) -> EvalLoader:
        return self._eval_loader(self.test_set, torch.arange(len(self.test_set)), stage, **self._left_out)

    def _eval_loader(self, images: Images, index: Tensor, stage: str, **left_out: Any) -> EvalLoader:
        rank, world_size = self._rank_and_world_size()
        limit = getattr(self.trainer, f"limit_{stage}_batches", 1.0)
        # Which samples a part of them leaves out would depend on who took which chunk.
        dealer = self._dealer if world_size > 1 and isinstance(limit, float) and limit == 1 else None
        images, workers = self._placed(images)
        loader = EvalLoader(images, index, self.eval_batch_size, rank, world_size, workers, dealer=dealer, **left_out)
        self._adopt(loader.reader)
        return loader

    def _adopt(self, reader: BatchReader) -> None:
        """Close it after the run; have it copy batches to a CUDA device."""
        self._readers.add(reader)
        if self.trainer is not None and self.trainer.strategy.root_device.type == "cuda":
            reader.device = self.trainer.strategy.root_device

    def _placed(self, images: Images) -> tuple[Images, int]:
        """The set, or its copy on the training device, and how many workers read it."""
        if self.trainer is not None:
            images = self._residence.place(images, self.trainer.strategy.root_device, self.resident)
        processes = None if self.trainer is None else self.trainer.num_devices
        return images, chosen_workers(images, processes) if self.num_workers is None else self.num_workers

    def _rank_and_world_size(self) -> tuple[int, int]:
        return (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)
