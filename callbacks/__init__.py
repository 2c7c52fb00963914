"""Callbacks: attacks, evaluation and analysis. None of them asks which method runs."""

from .._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "APGD": "attacks.apgd",
        "Attack": "attacks.base",
        "AutoAttack": "attacks.autoattack",
        "BIM": "attacks.bim",
        "Bandits": "attacks.bandits",
        "CWLinf": "attacks.cw_linf",
        "DIM": "attacks.dim",
        "DiverseInputs": "attacks.transforms",
        "EoT": "attacks.eot",
        "FAB": "attacks.fab",
        "FGSM": "attacks.fgsm",
        "ImageGrid": "analysis.image_grid",
        "MIM": "attacks.mim",
        "NES": "attacks.nes",
        "NIM": "attacks.nim",
        "PGD": "attacks.pgd",
        "ProgressBar": "progress",
        "QueryNet": "attacks.querynet",
        "RobustEvaluation": "evaluation",
        "RobustnessCurve": "analysis.robustness_curve",
        "ScaleCopies": "attacks.transforms",
        "SignHunter": "attacks.signhunter",
        "SIM": "attacks.sim",
        "SimBA": "attacks.simba",
        "Smoothing": "attacks.transforms",
        "Square": "attacks.square",
        "TIM": "attacks.tim",
        "TransferEvaluation": "attacks.transfer",
        "VMIM": "attacks.vmim",
        "VNIM": "attacks.vnim",
    },
)
