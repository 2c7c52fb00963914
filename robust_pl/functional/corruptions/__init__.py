"""The common corruptions of Hendrycks and Dietterich (2019, arXiv 1903.12261), on batches of tensors.

:func:`corrupt` makes one of the 15 of the benchmark, or of the 4 beside it, at a severity from 1 to 5.
"""

from ..._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "BENCHMARK": "tables",
        "CORRUPTIONS": "tables",
        "EXTRA": "tables",
        "SEVERITIES": "tables",
        "corrupt": "apply",
        "table_for": "apply",
    },
)
