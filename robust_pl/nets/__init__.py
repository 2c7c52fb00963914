"""Networks: classifiers that map pixels in [0, 1] to logits."""

from .._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "Frozen": "frozen",
        "Normalize": "normalize",
        "SmallCNN": "small_cnn",
    },
)
