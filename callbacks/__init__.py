"""Callbacks: attacks, evaluation and analysis. None of them asks which method runs."""

from .._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "APGD": "attacks.apgd",
        "Attack": "attacks.base",
        "FAB": "attacks.fab",
        "FGSM": "attacks.fgsm",
        "ImageGrid": "analysis.image_grid",
        "PGD": "attacks.pgd",
        "ProgressBar": "progress",
        "RobustEvaluation": "evaluation",
        "SignHunter": "attacks.signhunter",
        "SimBA": "attacks.simba",
    },
)
