"""Data modules: where the files are and how a sample is read. They know nothing of methods or attacks."""

from .._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "AugMixChains": "augmix",
        "AugMixOperation": "augmix",
        "Augmentation": "augmentations",
        "CropAndFlip": "augmentations",
        "CutMix": "mixing",
        "Cutout": "augmentations",
        "ExtraDataMixture": "extra_data",
        "ImageDataModule": "base",
        "DigitsDataModule": "digits",
        "CIFAR10DataModule": "cifar",
        "CIFAR100DataModule": "cifar",
        "ExtremeViewsDataModule": "extreme_views",
        "HeldOut": "held_out",
        "ImageFolderDataModule": "image_folder",
        "ImageNetVDataModule": "imagenet_v",
        "LabelSmoothing": "mixing",
        "PosedPhotosDataModule": "posed_photos",
        "MixedChains": "mixed_chains",
        "MultiViewDataModule": "multi_view",
        "ProceduralViewsDataModule": "procedural_views",
        "RandAugment": "rand_augment",
        "TinyImageNetDataModule": "tiny_imagenet",
        "ViewImages": "view_images",
        "ViewTable": "view_table",
        "DistortedNet": "distorted_net",
        "Noise2Net": "noise2net",
        "PixelAdaIN": "stylize",
        "Stylize": "stylize",
    },
)
