"""Networks: classifiers that map pixels in [0, 1] to logits."""

from .._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "AdaptiveDualNet": "adaptive_dual_net",
        "DMPreActResNet18": "dm_wide_resnet",
        "DMWideResNet": "dm_wide_resnet",
        "DualBatchNorm": "dual_norm",
        "Frozen": "frozen",
        "ImageClassifier": "classifier",
        "MixedClassifier": "mixed",
        "Normalize": "normalize",
        "PreActResNet18": "preact_resnet",
        "Pretrained": "public",
        "RoutedNet": "routed",
        "ResNet18": "resnet",
        "ResNet20": "resnet_cifar",
        "ResNet2B": "resnet2b",
        "ResNet32": "resnet_cifar",
        "ResNet44": "resnet_cifar",
        "ResNet50": "resnet",
        "ResNet56": "resnet_cifar",
        "SmallCNN": "small_cnn",
        "Standardize": "normalize",
        "TimmModel": "timm_model",
        "TrainedNet": "trained",
        "WeightsReport": "weights",
        "WideResNet": "wide_resnet",
        "dual_batch_norm": "dual_norm",
        "load_weights": "weights",
        "pretrained": "zoo",
        "read_trajectory": "trajectory",
    },
)
