"""Data modules: where the files are and how a sample is read. They know nothing of methods or attacks."""

from .._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "Augmentation": "augmentations",
        "CropAndFlip": "augmentations",
        "CutMix": "mixing",
        "Cutout": "augmentations",
        "ExtraDataMixture": "extra_data",
        "ImageDataModule": "base",
        "DigitsDataModule": "digits",
        "CIFAR10DataModule": "cifar",
        "CIFAR100DataModule": "cifar",
        "HeldOut": "held_out",
        "ImageFolderDataModule": "image_folder",
        "LabelSmoothing": "mixing",
        "ProceduralViewsDataModule": "procedural_views",
        "RandAugment": "rand_augment",
        "TinyImageNetDataModule": "tiny_imagenet",
        "ViewImages": "view_images",
        "ViewTable": "view_table",
    },
)
