"""The extreme views that a viewpoint attack wrote, as a test set."""

from __future__ import annotations

from functools import cached_property
from typing import Literal

from .base import ImageDataModule
from .images import Images
from .view_images import ViewImages


class ExtremeViewsDataModule(ImageDataModule):
    """Images that a test with a viewpoint attack wrote, for other networks: how well the viewpoints transfer.

    ``data_dir`` is the attack's folder, such as ``runs/standard/viewpoints/test_gmvfool``, with ``views.csv``. It serves as
    ImageNet-V does for ViewFool; there is nothing to train on. ``test_set.rows`` holds viewpoint and object of each image.

    Args:
        data_dir: the folder.
        kind: ``sample`` for the views drawn from the found distributions, ``worst`` for the worst one of each object.
        eval_batch_size: samples a batch.
        num_workers: processes that read ahead.
        num_classes: of the network; None takes the names of classes that the folder holds.

    Raises:
        FileNotFoundError: if the table or an image is missing.
        ValueError: if the folder names no classes and ``num_classes`` is not given, or does not hold all labels.
    """

    def __init__(
        self,
        data_dir: str,
        kind: Literal["sample", "worst"] = "sample",
        eval_batch_size: int = 128,
        num_workers: int = 0,
        num_classes: int | None = None,
    ) -> None:
        super().__init__(data_dir, eval_batch_size, eval_batch_size, num_workers, val_size=0, augment=False)
        self.kind, self._classes = kind, num_classes

    @cached_property
    def class_names(self) -> list[str]:  # type: ignore[override]
        """As the folder has them, else numbers."""
        images = self._images
        names = images.about.get("class_names")
        if names is None and self._classes is None:
            raise ValueError(f"{self.data_dir} names no classes: set num_classes to how many the network has")
        if names is None or (self._classes is not None and self._classes != len(names)):
            names = [str(i) for i in range(self._classes or 0)]
        if (largest := int(images.labels.max())) >= len(names):
            raise ValueError(f"{self.data_dir} has the label {largest}: num_classes={len(names)} must be above it")
        return list(names)

    @cached_property
    def image_shape(self) -> tuple[int, int, int]:  # type: ignore[override]
        height, width = self._images.about["image_size"]
        return 3, height, width

    @cached_property
    def _images(self) -> ViewImages:
        return ViewImages(self.data_dir, self.kind)

    def load_train(self) -> Images:
        raise ValueError("extreme views are a test set and nothing to train or validate on: use robust-pl test")

    def load_test(self) -> ViewImages:
        return self._images
