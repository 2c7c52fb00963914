"""Signs that a network hides its gradients rather than being robust."""

from ..._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "Flag": "flag",
        "as_json": "flag",
        "as_table": "flag",
        "masking_flags": "audit",
    },
)
