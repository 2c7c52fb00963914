"""Natural shifts of ImageNet as test sets: V2, A, R, Sketch, Stylized, ObjectNet and E."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import ClassVar

from ..functional.class_groups import ClassGroups
from .imagenet_sets import ImageNetSet
from .label_maps import ClassesOf, classes_of, imagenet_wnids


class _AllClasses(ImageNetSet):
    """A set of ImageNet's 1,000 classes, in folders named by WordNet numbers."""

    @cached_property
    def labels(self) -> dict[str, int]:
        return {wnid: label for label, wnid in enumerate(imagenet_wnids())}

    @cached_property
    def class_names(self) -> list[str]:  # type: ignore[override]
        """WordNet numbers."""
        return list(imagenet_wnids())


class _SomeClasses(ImageNetSet):
    """A set of some of ImageNet's classes: the highest of their logits counts."""

    classes: ClassVar[ClassesOf]

    @cached_property
    def class_names(self) -> list[str]:  # type: ignore[override]
        """Folders."""
        return list(classes_of(self.classes))

    @cached_property
    def labels(self) -> dict[str, int]:
        return {folder: label for label, folder in enumerate(self.class_names)}

    @cached_property
    def class_groups(self) -> ClassGroups:  # type: ignore[override]
        return ClassGroups(list(classes_of(self.classes).values()))


class ImageNetV2DataModule(_AllClasses):
    """ImageNet-V2 (Recht et al. 2019, arXiv 1902.10811): 10,000 new images in folders ``0`` to ``999``, numbers of classes.

    They are put in order as numbers, not as words. The three versions (matched frequency, threshold 0.7, top images) have the
    same form; where ``data_dir`` holds several, name the one.
    """

    title = "ImageNet-V2"
    usual = ("imagenetv2-matched-frequency-format-val", "imagenetv2-matched-frequency")

    @cached_property
    def labels(self) -> dict[str, int]:
        return {str(number): number for number in range(1000)}


class ImageNetADataModule(_SomeClasses):
    """ImageNet-A (Hendrycks et al. 2021, arXiv 1907.07174): 7,500 photos that a ResNet-50 gets wrong, of 200 classes.

    The highest of the 200 classes' logits counts. Photos were chosen by that network, so accuracies around its own, about 2 %,
    do not compare with those on other sets.
    """

    title = "ImageNet-A"
    usual = ("imagenet-a",)
    classes = "imagenet_a"


class ImageNetRDataModule(_SomeClasses):
    """ImageNet-R (Hendrycks et al. 2021, arXiv 2006.16241): 30,000 drawings, toys, graffiti and so on, of 200 classes.

    The highest of the 200 classes' logits counts; they are others than those of ImageNet-A.
    """

    title = "ImageNet-R"
    usual = ("imagenet-r",)
    classes = "imagenet_r"


class ImageNetSketchDataModule(_AllClasses):
    """ImageNet-Sketch (Wang et al. 2019, arXiv 1905.13549): 50,889 black and white sketches of ImageNet's 1,000 classes."""

    title = "ImageNet-Sketch"
    usual = ("sketch", "imagenet-sketch")


class StylizedImageNetDataModule(_AllClasses):
    """Stylized ImageNet's validation images (Geirhos et al. 2019, arXiv 1811.12231), of ImageNet's 1,000 classes.

    The set is made by its authors' code from ImageNet and paintings; nobody gives it out. Folders are those of ImageNet.
    """

    title = "Stylized ImageNet"
    usual = ("stylized-imagenet/val", "stylized_imagenet/val")


class ObjectNetDataModule(_SomeClasses):
    """ObjectNet (Barbu et al. 2019): photos from unusual sides, in unusual places, of the 113 classes that ImageNet has, too.

    The red border, 2 pixels wide, is cut off, as its authors ask. The highest logit among the 125 classes of ImageNet that are
    in one of the 113 classes counts, as in Taori et al. 2020 (arXiv 2007.00644); a class is right if any of its members wins.
    Folders of the other 200 objects are left aside.

    Public codes also map folders by the numbers of the ObjectNet challenge. Those count classes in the order of their names,
    not in that of their folders; the two differ for 41 of the 113 classes.
    """

    title = "ObjectNet"
    usual = ("objectnet-1.0/images", "images")
    classes = "objectnet"
    border = 2

    def _unknown(self, found: list[str]) -> list[str]:
        """None: ObjectNet has 200 objects that ImageNet has not."""
        return []


class ImageNetEDataModule(_AllClasses):
    """ImageNet-E (Li et al. 2023, arXiv 2303.17096): validation images whose background, size, place or direction was edited.

    The measure is the drop: accuracy on the original images minus that on the edited ones, see
    :func:`robust_pl.metrics.effective_robustness.accuracy_drop`; so test twice, once for each folder. Folders of classes are
    those of ImageNet; classes without an image may be missing. How the archive names its folders was not verified: give the one
    to test.

    Args:
        data_dir: folder that holds those of the edits and of the original images.
        edit: name of the folder below it; empty if ``data_dir`` holds the class folders itself.
        eval_batch_size: samples a batch.
        num_workers: processes that read ahead; None chooses, see :class:`ImageDataModule`.
        image_size: height and width that the network sees.
        resize: length of the shorter side before the cut in the middle.
        skip_damaged: leave out images that cannot be read, and report which, instead of refusing the first one that is met.

    Raises:
        FileNotFoundError: if there are no class folders or images.
        ValueError: if a folder is no class of ImageNet.
    """

    title = "ImageNet-E"

    def __init__(
        self,
        data_dir: str | None = None,
        edit: str = "",
        eval_batch_size: int = 128,
        num_workers: int | None = None,
        image_size: int = 224,
        resize: int = 256,
        skip_damaged: bool = False,
    ) -> None:
        super().__init__(data_dir, eval_batch_size, num_workers, image_size, resize, skip_damaged)
        self.edit = edit

    @property
    def root(self) -> Path:
        return self.data_dir / self.edit

    @cached_property
    def labels(self) -> dict[str, int]:
        numbers = {wnid: label for label, wnid in enumerate(imagenet_wnids())}
        return {name: numbers.get(name, -1) for name in self._folders()}

    def _unknown(self, found: list[str]) -> list[str]:
        return [name for name in found if self.labels[name] < 0]
