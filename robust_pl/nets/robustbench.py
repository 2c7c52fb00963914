"""Networks as RobustBench names them (Croce et al. 2021, arXiv:2010.09670): which architecture and which normalisation."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

from torch import nn

from .dm_wide_resnet import DMPreActResNet18, DMWideResNet
from .normalize import Standardize
from .preact_resnet import PreActResNet18
from .resnet import ResNet18, ResNet50
from .wide_resnet import WideResNet

CLASSES = {"cifar10": 10, "cifar100": 100}
DEFAULT = "cifar10/Linf"

RENAMED: dict[str, str | None] = {
    "sub_block1.": None,  # a stage that TRADES' code builds and never uses
    "model_preact_hl1.": None,  # the first layers of Andriushchenko & Flammarion once more
    "mu": "normalize.mean",
    "sigma": "normalize.std",
}
"""Names in RobustBench's files -> ours; see :func:`robust_pl.nets.weights.rename`."""

NORMALIZATIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "half": {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)},
    "cifar10": {"mean": (0.4914, 0.4822, 0.4465), "std": (0.2471, 0.2435, 0.2616)},
    "cifar10_rounded": {"mean": (0.491, 0.482, 0.447), "std": (0.247, 0.243, 0.262)},
    "cifar10_small_std": {"mean": (0.4914, 0.4822, 0.4465), "std": (0.2023, 0.1994, 0.2010)},
    "cifar10_exact": {
        "mean": (0.4913997551666284, 0.48215855929893703, 0.4465309133731618),
        "std": (0.24703225141799082, 0.24348516474564, 0.26158783926049628),
    },
    "cifar100": {"mean": (0.5071, 0.4865, 0.4409), "std": (0.2673, 0.2564, 0.2762)},
    "cifar100_chen": {"mean": (0.5071, 0.4867, 0.4408), "std": (0.2675, 0.2565, 0.2761)},
    "cifar100_exact": {
        "mean": (0.5070751592371323, 0.48654887331495095, 0.4409178433670343),
        "std": (0.2673342858792401, 0.2564384629170883, 0.27615047132568404),
    },
}


class Entry(NamedTuple):
    """How one of RobustBench's networks is built.

    Args:
        net: the class.
        arguments: of the class, beside classes and normalisation.
        normalization: key of :data:`NORMALIZATIONS`, or ``per_image``.
        part: key of the file under which the network lies, where a file holds several.
    """

    net: type[nn.Module]
    arguments: dict[str, Any]
    normalization: str = "none"
    part: str | None = None

    def build(self, num_classes: int) -> nn.Module:
        """The network with fresh weights."""
        if self.normalization == "per_image":
            net = self.net(num_classes=num_classes, **self.arguments)
            net.normalize = Standardize()
            return net
        return self.net(num_classes=num_classes, **self.arguments, **NORMALIZATIONS[self.normalization])


def _wide(depth: int, widen_factor: int, normalization: str = "none") -> Entry:
    return Entry(WideResNet, {"depth": depth, "widen_factor": widen_factor}, normalization)


def _dm(normalization: str, depth: int, widen_factor: int) -> Entry:
    return Entry(DMWideResNet, {"depth": depth, "widen_factor": widen_factor}, normalization)


_dm10, _dm100 = partial(_dm, "cifar10"), partial(_dm, "cifar100")
_dm10_r18, _dm100_r18 = (Entry(DMPreActResNet18, {}, normalization) for normalization in ("cifar10", "cifar100"))
_r18 = Entry(ResNet18, {})
_WONG = {"variant": "wong2020"}

MODELS: dict[str, dict[str, Entry]] = {
    "cifar10/Linf": {
        "Addepalli2021Towards_RN18": _r18,
        "Addepalli2021Towards_WRN34": _wide(34, 10),
        "Addepalli2022Efficient_RN18": _r18,
        "Addepalli2022Efficient_WRN_34_10": _wide(34, 10),
        "Andriushchenko2020Understanding": Entry(PreActResNet18, _WONG, part="last"),
        "Bartoldson2024Adversarial_WRN-82-8": _dm10(82, 8),
        "Bartoldson2024Adversarial_WRN-94-16": _dm10(94, 16),
        "Carmon2019Unlabeled": _wide(28, 10),
        "Chen2020Efficient": _wide(34, 10, "cifar10"),
        "Chen2021LTD_WRN34_10": _wide(34, 10),
        "Chen2021LTD_WRN34_20": _wide(34, 20),
        "Chen2024Data_WRN_34_10": _wide(34, 10),
        "Chen2024Data_WRN_34_20": _wide(34, 20),
        "Cui2020Learnable_34_10": _wide(34, 10),
        "Cui2020Learnable_34_20": _wide(34, 20),
        "Cui2023Decoupled_WRN-28-10": _dm10(28, 10),
        "Cui2023Decoupled_WRN-34-10": _wide(34, 10),
        "Ding2020MMA": _wide(28, 4, "per_image"),
        "Engstrom2019Robustness": Entry(ResNet50, {}, "cifar10_small_std"),
        "Gowal2020Uncovering_28_10_extra": _dm10(28, 10),
        "Gowal2020Uncovering_34_20": _dm10(34, 20),
        "Gowal2020Uncovering_70_16": _dm10(70, 16),
        "Gowal2020Uncovering_70_16_extra": _dm10(70, 16),
        "Gowal2021Improving_28_10_ddpm_100m": _dm10(28, 10),
        "Gowal2021Improving_70_16_ddpm_100m": _dm10(70, 16),
        "Gowal2021Improving_R18_ddpm_100m": _dm10_r18,
        "Hendrycks2019Using": _wide(28, 10, "half"),
        "Huang2020Self": _wide(34, 10),
        "Jia2022LAS-AT_34_10": _wide(34, 10),
        "Jia2022LAS-AT_70_16": _wide(70, 16),
        "Pang2022Robustness_WRN28_10": _dm10(28, 10),
        "Pang2022Robustness_WRN70_16": _dm10(70, 16),
        "Rade2021Helper_R18_ddpm": _dm10_r18,
        "Rade2021Helper_R18_extra": _dm10_r18,
        "Rade2021Helper_ddpm": _dm10(28, 10),
        "Rade2021Helper_extra": _dm10(34, 10),
        "Rebuffi2021Fixing_106_16_cutmix_ddpm": _dm10(106, 16),
        "Rebuffi2021Fixing_28_10_cutmix_ddpm": _dm10(28, 10),
        "Rebuffi2021Fixing_70_16_cutmix_ddpm": _dm10(70, 16),
        "Rebuffi2021Fixing_70_16_cutmix_extra": _dm10(70, 16),
        "Rebuffi2021Fixing_R18_ddpm": _dm10_r18,
        "Rice2020Overfitting": _wide(34, 20, "cifar10"),
        "Sehwag2020Hydra": _wide(28, 10),
        "Sehwag2021Proxy": _wide(34, 10),
        "Sehwag2021Proxy_R18": _r18,
        "Sitawarin2020Improving": _wide(34, 10),
        "Sridhar2021Robust": _wide(28, 10),
        "Sridhar2021Robust_34_15": _wide(34, 15),
        "Standard": _wide(28, 10),
        "Wang2020Improving": _wide(28, 10),
        "Wang2023Better_WRN-28-10": _dm10(28, 10),
        "Wang2023Better_WRN-70-16": _dm10(70, 16),
        "Wong2020Fast": Entry(PreActResNet18, _WONG, "cifar10"),
        "Wu2020Adversarial": _wide(34, 10),
        "Wu2020Adversarial_extra": _wide(28, 10),
        "Xu2023Exploring_WRN-28-10": _dm10(28, 10),
        "Zhang2019Theoretically": _wide(34, 10),
        "Zhang2019You": _wide(34, 10),
        "Zhang2020Attacks": _wide(34, 10),
        "Zhang2020Geometry": _wide(28, 10),
    },
    "cifar10/L2": {
        "Augustin2020Adversarial": Entry(ResNet50, {}, "cifar10_exact"),
        "Augustin2020Adversarial_34_10": _wide(34, 10, "cifar10_exact"),
        "Augustin2020Adversarial_34_10_extra": _wide(34, 10, "cifar10_exact"),
        "Ding2020MMA": _wide(28, 4, "per_image"),
        "Engstrom2019Robustness": Entry(ResNet50, {}, "cifar10_small_std"),
        "Gowal2020Uncovering": _dm10(70, 16),
        "Gowal2020Uncovering_extra": _dm10(70, 16),
        "Rade2021Helper_R18_ddpm": _dm10_r18,
        "Rebuffi2021Fixing_28_10_cutmix_ddpm": _dm10(28, 10),
        "Rebuffi2021Fixing_70_16_cutmix_ddpm": _dm10(70, 16),
        "Rebuffi2021Fixing_70_16_cutmix_extra": _dm10(70, 16),
        "Rebuffi2021Fixing_R18_cutmix_ddpm": _dm10_r18,
        "Rice2020Overfitting": Entry(PreActResNet18, {}, "cifar10"),
        "Rony2019Decoupling": _wide(28, 10, "cifar10_rounded"),
        "Sehwag2021Proxy": _wide(34, 10),
        "Sehwag2021Proxy_R18": _r18,
        "Standard": _wide(28, 10),
        "Wang2023Better_WRN-28-10": _dm10(28, 10),
        "Wang2023Better_WRN-70-16": _dm10(70, 16),
        "Wu2020Adversarial": _wide(34, 10),
    },
    "cifar100/Linf": {
        "Addepalli2021Towards_PARN18": Entry(PreActResNet18, {}),
        "Addepalli2021Towards_WRN34": _wide(34, 10),
        "Addepalli2022Efficient_RN18": _r18,
        "Addepalli2022Efficient_WRN_34_10": _wide(34, 10),
        "Chen2020Efficient": _wide(34, 10, "cifar100_chen"),
        "Chen2021LTD_WRN34_10": _wide(34, 10),
        "Chen2024Data_WRN_34_10": _wide(34, 10),
        "Cui2020Learnable_34_10_LBGAT0": _wide(34, 10),
        "Cui2020Learnable_34_10_LBGAT6": _wide(34, 10),
        "Cui2020Learnable_34_10_LBGAT9_eps_8_255": _wide(34, 10),
        "Cui2020Learnable_34_20_LBGAT6": _wide(34, 20),
        "Cui2023Decoupled_WRN-28-10": _dm100(28, 10),
        "Cui2023Decoupled_WRN-34-10": _wide(34, 10),
        "Cui2023Decoupled_WRN-34-10_autoaug": _wide(34, 10),
        "Gowal2020Uncovering": _dm100(70, 16),
        "Gowal2020Uncovering_extra": _dm100(70, 16),
        "Hendrycks2019Using": _wide(28, 10, "half"),
        "Jia2022LAS-AT_34_10": _wide(34, 10),
        "Jia2022LAS-AT_34_20": _wide(34, 20),
        "Pang2022Robustness_WRN28_10": _dm100(28, 10),
        "Pang2022Robustness_WRN70_16": _dm100(70, 16),
        "Rade2021Helper_R18_ddpm": _dm100_r18,
        "Rebuffi2021Fixing_28_10_cutmix_ddpm": _dm100(28, 10),
        "Rebuffi2021Fixing_70_16_cutmix_ddpm": _dm100(70, 16),
        "Rebuffi2021Fixing_R18_ddpm": _dm100_r18,
        "Rice2020Overfitting": Entry(PreActResNet18, {}, "cifar100_exact"),
        "Sehwag2021Proxy": _wide(34, 10),
        "Sitawarin2020Improving": _wide(34, 10),
        "Wang2023Better_WRN-28-10": _dm100(28, 10),
        "Wang2023Better_WRN-70-16": _dm100(70, 16),
        "Wu2020Adversarial": _wide(34, 10, "cifar100_exact"),
    },
}

NOT_BUILT = {
    "Amini2024MeanSparse_Ra_WRN_70_16": "MeanSparse networks",
    "Amini2024MeanSparse_S-WRN-70-16": "MeanSparse networks",
    "Amini2024MeanSparse_S-WRN-94-16": "MeanSparse networks",
    "Bai2023Improving_edm": "mixtures of networks",
    "Bai2023Improving_trades": "mixtures of networks",
    "Bai2024MixedNUTS": "mixtures of networks",
    "Chen2020Adversarial": "ensembles",
    "Dai2021Parameterizing": "PSSiLU activations",
    "Debenedetti2022Light_XCiT-L12": "XCiT",
    "Debenedetti2022Light_XCiT-M12": "XCiT",
    "Debenedetti2022Light_XCiT-S12": "XCiT",
    "Huang2021Exploring": "WideResNet-34-R",
    "Huang2021Exploring_ema": "WideResNet-34-R",
    "Huang2022Revisiting_WRN-A4": "WideResNet-A4",
    "Kang2021Stable": "neural ODE blocks",
    "Pang2020Boosting": "hypersphere embeddings",
    "Peng2023Robust": "RaWideResNet",
    "Sehwag2021Proxy_ResNest152": "ResNeSt-152",
}
"""Names of RobustBench whose architecture is not among ours -> what that is."""


def find(name: str) -> tuple[str, Entry] | None:
    """``Name`` or ``dataset/threat/Name`` -> the full one and how it is built; None if RobustBench has no such network.

    A bare name is that of CIFAR-10 under Linf, else that of the only table that has it.

    Raises:
        ValueError: if several other tables have a bare name, or its architecture is not among ours.
    """
    table, _, bare = name.rpartition("/")
    if bare in NOT_BUILT:
        raise ValueError(f"{name} uses {NOT_BUILT[bare]}, which robust_pl does not build: load it with RobustBench's own code")
    tables = [table] if table else [t for t in MODELS if bare in MODELS[t]]
    if len(tables) > 1 and DEFAULT not in tables:
        raise ValueError(f"{name} is ambiguous: write {' or '.join(f'{t}/{name}' for t in tables)}")
    chosen = DEFAULT if DEFAULT in tables else next(iter(tables), "")
    entry = MODELS.get(chosen, {}).get(bare)
    return None if entry is None else (f"{chosen}/{bare}", entry)
