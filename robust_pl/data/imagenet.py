"""ImageNet itself, and parts of its classes."""

from __future__ import annotations

from functools import cached_property

from ..functional.class_groups import ClassGroups
from .image_files import ImageFiles
from .image_folder import ImageFolderDataModule
from .imagenet_sets import ImageNetSet, check_folders
from .label_maps import ClassesOf, class_number, classes_of, imagenet_wnids


class ImageNetDataModule(ImageFolderDataModule):
    """ImageNet (Russakovsky et al. 2015): ``train/<WordNet number>/*`` and ``val/<WordNet number>/*``, 1,000 classes.

    As :class:`ImageFolderDataModule`, whose arguments it has, but that classes are those of ImageNet, whatever is there: a test
    needs ``val`` alone. The 50,000 validation images, which come in one folder, must have been sorted into folders.

    Raises:
        FileNotFoundError: if a folder is missing or holds no images.
        ValueError: if the folders are not ImageNet's 1,000 classes, or an image cannot be read.
    """

    @cached_property
    def class_names(self) -> list[str]:  # type: ignore[override]
        return list(imagenet_wnids())

    def _files(self, part: str) -> ImageFiles:
        check_folders(self.data_dir / part, self.class_names, "ImageNet", f"put ImageNet's folders of classes into {part}")
        return super()._files(part)


class ImageNetSubsetDataModule(ImageNetSet):
    """Images of some of ImageNet's classes, to test a network that has all 1,000: Imagenette, or a part of ImageNet's ``val``.

    ``data_dir`` holds folders named by WordNet numbers, such as ``imagenette2/val``. The highest logit among the classes of the
    set counts, as for ImageNet-A.

    Args:
        data_dir: folder of the class folders; default the environment variable ROBUST_PL_DATA, else ``./data``.
        classes: the classes of which set are measured: with ``imagenet_a`` and ImageNet's ``val`` as ``data_dir``, accuracy is
            what that on ImageNet-A is to be compared with. Other folders are left aside. None takes all folders that there are.
        eval_batch_size: samples a batch.
        num_workers: processes that read ahead; None chooses, see :class:`ImageDataModule`.
        image_size: height and width that the network sees.
        resize: length of the shorter side before the cut in the middle.
        skip_damaged: leave out images that cannot be read, and report which, instead of refusing the first one that is met.

    Raises:
        FileNotFoundError: if there are no class folders or images.
        ValueError: if a folder is no class of ImageNet, or one of ``classes`` is missing.
    """

    title = "the subset of ImageNet"

    def __init__(
        self,
        data_dir: str | None = None,
        classes: ClassesOf | None = None,
        eval_batch_size: int = 128,
        num_workers: int | None = None,
        image_size: int = 224,
        resize: int = 256,
        skip_damaged: bool = False,
    ) -> None:
        super().__init__(data_dir, eval_batch_size, num_workers, image_size, resize, skip_damaged)
        self.classes = classes

    @cached_property
    def labels(self) -> dict[str, int]:
        if self.classes is not None:
            return {
                imagenet_wnids()[number]: label
                for label, numbers in enumerate(classes_of(self.classes).values())
                for number in numbers
            }
        found = self._folders()
        if unknown := [name for name in found if class_number(name) is None]:
            raise ValueError(
                f"{len(unknown)} folders of {self.root} are no classes of ImageNet, such as {unknown[0]!r}: name them by "
                "WordNet numbers such as n01440764"
            )
        return {name: label for label, name in enumerate(found)}

    @cached_property
    def class_names(self) -> list[str]:  # type: ignore[override]
        return list(self.labels) if self.classes is None else list(classes_of(self.classes))

    @cached_property
    def class_groups(self) -> ClassGroups:  # type: ignore[override]
        if self.classes is None:
            return ClassGroups([[number] for name in self.labels if (number := class_number(name)) is not None])
        return ClassGroups(list(classes_of(self.classes).values()))

    def _unknown(self, found: list[str]) -> list[str]:
        """ImageNet's other classes are left aside."""
        return [name for name in found if class_number(name) is None]
