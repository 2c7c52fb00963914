"""Scikit-learn's handwritten digits: a real data set of 1,797 images that needs no download."""

from __future__ import annotations

from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from .augment import shift_by_one
from .augmentations import Augmentation
from .base import ImageDataModule, ValSplit
from .images import ImagesInMemory

_TEST_SIZE, _TEST_SEED, _FOLDS = 360, 0, 5


class DigitsDataModule(ImageDataModule):
    """1,797 digits of 8 x 8 pixels, one channel (Alpaydin and Kaynak 1998), for tests and first experiments.

    The set has no official split: 360 digits, stratified by class and the same for every ``seed``, are the test set;
    1,437 remain for training and validation. Pixels are 0..16, divided by 16. Augmentation shifts by up to one pixel.
    With ``fold`` the test set is one of five that together hold every digit once, so that five runs test all 1,797.

    Args:
        data_dir: unused; the digits come with scikit-learn.
        batch_size: training samples a step and a process.
        eval_batch_size: samples a batch of validation, test and predict; default ``batch_size``.
        num_workers: processes that read ahead.
        val_size: validation samples, as a fraction of the training set or a number; 0 for none.
        seed: of the split into training and validation, the order and the augmentation.
        augment: whether training samples are shifted; or a list of augmentations instead, see :class:`ImageDataModule`.
        drop_last: leave out the last incomplete training step of an epoch.
        fold: 0 to 4: test on that fifth of all digits, stratified by class and the same for every ``seed``, and train and
            validate on the rest. None takes the split above.
        val_split: ``random`` validation samples, drawn by ``seed``, or the ``last`` ones of the digits that are no test set.

    Raises:
        ValueError: if an argument is out of range.
    """

    class_names = [str(digit) for digit in range(10)]  # noqa: RUF012
    image_shape = (1, 8, 8)

    def __init__(
        self,
        data_dir: str | None = None,
        batch_size: int = 128,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        val_size: int | float = 0.1,
        seed: int = 0,
        augment: bool | list[Augmentation] = False,
        drop_last: bool = True,
        fold: int | None = None,
        val_split: ValSplit = "random",
    ) -> None:
        super().__init__(data_dir, batch_size, eval_batch_size, num_workers, val_size, seed, augment, drop_last, val_split)
        if fold is not None and (type(fold) is not int or not 0 <= fold < _FOLDS):
            raise ValueError(f"fold must be one of 0 to {_FOLDS - 1}, or null for the usual split, not {fold!r}")
        self.fold = fold

    @cached_property
    def positions(self) -> tuple[Tensor, Tensor]:
        """Ascending positions, among scikit-learn's 1,797 digits, of those to train on and of those of the test set,
        int64 (N,) each; a batch's ``index`` counts within one of them.
        """
        from sklearn.model_selection import StratifiedKFold, train_test_split

        labels = _load_digits()[1]
        everyone = np.arange(len(labels))
        if self.fold is None:
            parts = train_test_split(everyone, test_size=_TEST_SIZE, random_state=_TEST_SEED, stratify=labels)
        else:
            folds = StratifiedKFold(_FOLDS, shuffle=True, random_state=_TEST_SEED)
            parts = list(folds.split(everyone, labels))[self.fold]
        train, test = (torch.from_numpy(np.sort(part)) for part in parts)
        return train, test

    @cached_property
    def _parts(self) -> tuple[ImagesInMemory, ImagesInMemory]:
        pixels, labels = _load_digits()
        images, targets = torch.from_numpy(pixels).to(torch.uint8).view(-1, *self.image_shape), torch.from_numpy(labels)
        train, test = (ImagesInMemory(images[part], targets[part], shift_by_one, white=16) for part in self.positions)
        return train, test

    def load_train(self) -> ImagesInMemory:
        return self._parts[0]

    def load_test(self) -> ImagesInMemory:
        return self._parts[1]


def _load_digits() -> tuple[np.ndarray, np.ndarray]:
    """Pixels (1797, 64) in 0..16 and labels. Scikit-learn takes long to import, hence here and not above."""
    from sklearn.datasets import load_digits

    return load_digits(return_X_y=True)
