"""Train on the validation part of a data module, which an earlier run did not train on."""

from __future__ import annotations

from functools import cached_property

from torch import Tensor

from .base import ImageDataModule, ValSplit
from .hashing import SPLIT
from .images import Images


class HeldOut(ImageDataModule):
    """The validation samples of ``data`` in two parts: one to learn from, such as coefficients of a soup, and one to select by.

    A run that chooses among the networks of an earlier run, or learns their shares in an average, should not do so on samples
    that they were trained on. ``seed`` also becomes that of ``data``, since it says which samples are held out: it must be
    that of the earlier run. Tests are on the test set of ``data``. The part to learn from may be small: an epoch needs at
    least one batch of ``batch_size`` samples.

    Args:
        data: what the earlier run was fitted on, with the same ``val_size`` and ``val_split``.
        batch_size: samples a step and a process; None takes that of ``data``.
        eval_batch_size: samples a batch of validation and test; None takes that of ``data``.
        num_workers: processes that read ahead; None chooses, see :class:`ImageDataModule`.
        val_size: samples to select by, as a fraction of the held-out ones or a number; the others are learned from.
        seed: of the split, the order and the augmentation, here and in ``data``.
        augment: whether the samples that are learned from are augmented; None does as ``data``.
        drop_last: leave out the last incomplete step of an epoch.
        val_split: which of the held-out samples to select by: ``random`` ones, drawn by ``seed``, or the ``last``.

    Raises:
        ValueError: if ``data`` holds nothing out, or an argument is out of range.
    """

    def __init__(
        self,
        data: ImageDataModule,
        batch_size: int | None = None,
        eval_batch_size: int | None = None,
        num_workers: int | None = None,
        val_size: int | float = 1 / 3,
        seed: int = 0,
        augment: bool | None = None,
        drop_last: bool = True,
        val_split: ValSplit = "random",
    ) -> None:
        batch_size = data.batch_size if batch_size is None else batch_size
        eval_batch_size = data.eval_batch_size if eval_batch_size is None else eval_batch_size
        augment = data.augment if augment is None else augment
        folder = str(data.data_dir)
        super().__init__(folder, batch_size, eval_batch_size, num_workers, val_size, seed, augment, drop_last, val_split)
        self.hparams.pop("data", None)  # a live object must not go into checkpoints
        self.data = data
        data.seed = seed
        if not data.val_size:
            raise ValueError(
                "val_size=0 of the inner data holds nothing out: set it to that of the run that trained without it"
            )

    @property
    def class_names(self) -> list[str]:  # type: ignore[override]
        return self.data.class_names

    @property
    def image_shape(self) -> tuple[int, int, int]:  # type: ignore[override]
        return self.data.image_shape

    def prepare_data(self) -> None:
        self.data.prepare_data()

    def load_train(self) -> Images:
        return self.data.train_set

    def load_test(self) -> Images:
        return self.data.test_set

    @cached_property
    def split(self) -> tuple[Tensor, Tensor]:
        """Ascending positions, in the training set, of the samples to learn from and of those to select by, int64 (N,) each."""
        held = self.data.split[1]
        count = self.val_size if isinstance(self.val_size, int) else round(self.val_size * len(held))
        if count >= len(held):
            raise ValueError(f"val_size={self.val_size} leaves nothing to learn from: {len(held)} samples are held out")
        return self.divide(held, count, SPLIT, 1)
