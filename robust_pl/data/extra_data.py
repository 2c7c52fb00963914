"""Real and generated samples in every batch."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from .base import ImageDataModule
from .extra_images import ExtraImages, open_extra, pseudo_labels
from .hashing import EXTRA, MIX, ORDER, hash_keys, permutation, permuted
from .images import EightBitImages, Images, ImagesInMemory
from .loaders import TrainOrder


class ExtraDataMixture(ImageDataModule):
    """Data with generated samples added to the training (Gowal et al. 2021, arXiv 2110.09468; Wang et al. 2023, 2302.04638).

    Every training batch holds ``round(fraction * batch_size)`` generated samples and real ones for the rest, in random order.
    An epoch is as long as without them, rounded up to whole batches, so that at a fraction of 0.7 it sees three tenths of the
    real samples, drawn anew without replacement, and more generated ones. Those are also drawn anew in each epoch: different
    from each other while the file holds as many, where the authors draw with replacement inside an epoch, too. All batches
    are full, and ranks share them out without overlap. The ``index`` of a generated sample is its position in the file plus
    the size of the real training set, validation samples included.

    Splits, validation, test, batch sizes, workers and augmentation are those of ``data``; its ``drop_last`` has no meaning
    here. Its usual augmentation is also that of the generated images where it holds its images in memory; others need
    ``augment: false`` or a list. The file is mapped into memory, not read: memory grows with the real samples alone. A CUDA
    device on which both fit keeps a copy of both, see ``resident`` of :class:`ImageDataModule`.

    Args:
        data: the real samples.
        extra: a .npz file, a folder of .npy files, or a .npy file, as it is or under ``data_dir``, with ``image`` uint8
            (N, H, W, C) or (N, C, H, W) and ``label`` (N,); see :func:`robust_pl.data.extra_images.open_extra`. A compressed
            .npz is unpacked beside itself once.
        fraction: share of generated samples in each batch, in [0, 1].
        teacher: labels the generated images by its predictions, which replace labels in the file and are kept beside it; it
            maps pixels in [0, 1] to logits. None takes the labels in the file.
        seed: of splits, order and augmentation; None takes that of ``data``.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if an argument is out of range, or the file does not fit the data.
    """

    def __init__(
        self,
        data: ImageDataModule,
        extra: str,
        fraction: float = 0.7,
        teacher: nn.Module | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__(
            str(data.data_dir),
            data.batch_size,
            data.eval_batch_size,
            data.num_workers,
            data.val_size,
            data.seed if seed is None else seed,
            data.augment,
            data.drop_last,
            data.val_split,
        )
        if not 0 <= fraction <= 1:
            raise ValueError(f"fraction={fraction} is a share of generated samples: choose from [0, 1]")
        self.data, self.extra, self.fraction, self.teacher = data, extra, fraction, teacher
        data.seed = self.seed

    @property
    def class_names(self) -> list[str]:  # type: ignore[override]
        return self.data.class_names

    @property
    def image_shape(self) -> tuple[int, int, int]:  # type: ignore[override]
        return self.data.image_shape

    def prepare_data(self) -> None:
        self.data.prepare_data()
        if self.trainer is not None and self.trainer.state.fn == "fit":
            _ = self.extra_set  # one process unpacks and labels, and the others find what it left

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage == "fit":
            _ = self.extra_set

    def load_train(self) -> Images:
        return self.data.train_set

    def load_test(self) -> Images:
        return self.data.test_set

    @cached_property
    def split(self) -> tuple[Tensor, Tensor]:
        """That of the real samples."""
        return self.data.split

    @cached_property
    def extra_set(self) -> ExtraImages:
        """The generated samples."""
        if self.augments_as_usual and not isinstance(self.train_set, ImagesInMemory):
            raise ValueError(
                f"{type(self.data).__name__} augments images as it decodes files, which generated ones are not: set its "
                "augment to false or to a list of augmentations"
            )
        path = Path(self.extra).expanduser()
        images, labels = open_extra(path if path.exists() else self.data_dir / path)
        if self.teacher is not None:
            device = "cpu" if self.trainer is None else self.trainer.strategy.root_device
            sizes = self.image_shape, self.num_classes, self.eval_batch_size
            labels = pseudo_labels(images, self.teacher, *sizes, device)
        if labels is None:
            raise ValueError(f"{images.path} has no labels beside it: add them, or name a teacher that predicts them")
        augment = self.train_set.augment if isinstance(self.train_set, ImagesInMemory) else None
        return ExtraImages(images, labels, self.image_shape, self.num_classes, augment)

    def train_order(self, rank: int, world_size: int, fixed: bool) -> MixedOrder:
        sizes = len(self.train_set), len(self.extra_set)
        return MixedOrder(self.split[0], *sizes, self.fraction, self.batch_size, self.seed, rank, world_size, fixed)

    def train_images(self) -> Images:
        return RealAndExtra(self.train_set, self.extra_set)


class MixedOrder(TrainOrder):
    """Training batches of real and generated samples, a function of (seed, epoch) only.

    Args:
        index: int64 (N,), positions of the real training samples.
        first: position of the first generated sample.
        count: number of generated samples.
        fraction: share of generated samples in a batch.
        batch_size: samples a rank and a step.
        seed: of the order.
        rank: this process, in ``range(world_size)``.
        world_size: number of processes.
        fixed: use the order of epoch 0 always.

    Raises:
        ValueError: if there is not enough for a single step.
    """

    def __init__(
        self,
        index: Tensor,
        first: int,
        count: int,
        fraction: float,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        fixed: bool = False,
    ) -> None:
        super().__init__(index, batch_size, seed, rank, world_size, drop_last=False, fixed=fixed)
        self.batch_size, self.first, self.count = batch_size, first, count
        self.generated = round(fraction * batch_size)
        self.real = batch_size - self.generated
        # As many as without generated samples, or fewer where the real ones of an epoch would not last.
        self.steps = min(-(-len(index) // self.step), len(index) // max(self.real * world_size, 1))
        if not self.steps:
            raise ValueError(
                f"{len(index)} real training samples do not fill one step of batch_size={batch_size} with fraction={fraction} "
                f"in {world_size} process(es): lower batch_size"
            )

    planned_by = (*TrainOrder.planned_by, "generated ones of a process' batch", "generated samples")

    @property
    def plan(self) -> list[int]:
        return [*super().plan, self.generated, self.count]

    def batches(self, epoch: int) -> list[Tensor]:
        """Positions of each batch of this rank, int64 (B,) each."""
        order = permutation(len(self.index), self.seed, ORDER, epoch)
        real = self.index[order[self._mine(self.real)]]
        draw = self._mine(self.generated)
        generated = permuted(draw % self.count, self.count, self.seed, EXTRA, epoch, draw // self.count)
        batches = torch.cat([real, self.first + generated], 1)
        mixed = hash_keys(self.seed, MIX, epoch, self._mine(self.batch_size)).argsort(dim=1, stable=True)
        return list(batches.gather(1, mixed))

    def _mine(self, size: int) -> Tensor:
        """Which of an epoch's draws are of this rank, (steps, size): step after step, and in a step rank after rank."""
        return torch.arange(self.steps * self.world_size * size).view(self.steps, self.world_size, size)[:, self.rank]


class RealAndExtra(Images):
    """Real images, and behind them generated ones.

    Args:
        real: at the positions from 0.
        extra: at those from ``len(real)``.
    """

    def __init__(self, real: Images, extra: Images) -> None:
        self.real, self.extra = real, extra

    def __len__(self) -> int:
        return len(self.real) + len(self.extra)

    def parts(self) -> list[EightBitImages] | None:
        real, extra = self.real.parts(), self.extra.parts()
        return None if real is None or extra is None else real + extra

    def read(self, index: Tensor, keys: Tensor | None) -> tuple[Tensor, Tensor]:
        generated = index >= len(self.real)
        places, xs, ys = [], [], []
        for images, mine, first in ((self.real, ~generated, 0), (self.extra, generated, len(self.real))):
            if mine.any():
                x, y = images.read(index[mine] - first, None if keys is None else keys[mine])
                places.append(mine.nonzero().squeeze(1))
                xs.append(x)
                ys.append(y)
        back = torch.cat(places).argsort()
        return torch.cat(xs)[back], torch.cat(ys)[back]
