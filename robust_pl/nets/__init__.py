"""Networks: classifiers that map pixels in [0, 1] to logits."""

from .._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "Frozen": "frozen",
        "ImageClassifier": "classifier",
        "Normalize": "normalize",
        "PreActResNet18": "preact_resnet",
        "ResNet18": "resnet",
        "ResNet20": "resnet_cifar",
        "ResNet2B": "resnet2b",
        "ResNet32": "resnet_cifar",
        "ResNet44": "resnet_cifar",
        "ResNet56": "resnet_cifar",
        "SmallCNN": "small_cnn",
        "TimmModel": "timm_model",
        "WeightsReport": "weights",
        "WideResNet": "wide_resnet",
        "load_weights": "weights",
        "pretrained": "zoo",
    },
)
