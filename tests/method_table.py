"""Every method, small enough for a test: what the composition tests run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from robust_pl.callbacks import FGSM, PGD, NoisyFGSM, UnanimousFGSM, ZeroedFGSM
from robust_pl.data import PixelAdaIN
from robust_pl.functional.criticality import Criticality
from robust_pl.methods import (
    AAER,
    ABSLD,
    AFA,
    APR,
    ARD,
    AWMTARD,
    BMTARD,
    DAT,
    ELLE,
    ELLEA,
    FGSMAT,
    FGSMCUAP,
    FGSMFUAP,
    FGSMLAW,
    FGSMMEPCS,
    FGSMPCO,
    FGSMPGI,
    FGSMRSCS,
    FGSMUAP,
    FR,
    GAT,
    IAD,
    IADII,
    IGDM,
    LIET,
    LPFT,
    MART,
    MTARD,
    NFGSM,
    PGDAT,
    RSLAD,
    SAR,
    SSAT,
    TRADES,
    TWA,
    AdaAD,
    AdaIAD,
    AdaptiveSmoothing,
    AdversarialFineTuning,
    AdvMoE,
    AdvProp,
    AugMax,
    AugMix,
    ConvergeSmooth,
    FastAdvProp,
    FastAT,
    FreeAT,
    GradAlign,
    GreedySoup,
    LayerwiseTWA,
    LearnedSoup,
    MEHLSoup,
    Method,
    MultiGrad,
    NuAT,
    PeerAiD,
    PubDef,
    RiFT,
    RobustWeightSignature,
    ShapeTexture,
    StandardTraining,
    SubspaceAT,
    UniformSoup,
    WiSEFT,
    ZeroGrad,
)
from robust_pl.nets import (
    AdaptiveDualNet,
    AWNet,
    DualNet,
    MixedClassifier,
    MoESmallCNN,
    PatchCodebook,
    SmallCNN,
    TrainedNet,
)

EPS = 0.1


def sgd(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.05, momentum=0.9)


def still(params: Any) -> torch.optim.Optimizer:
    """An optimizer that moves nothing."""
    return torch.optim.SGD(params, lr=0.0)


def net() -> SmallCNN:
    return SmallCNN(width=4)


def teacher(folder: Path) -> TrainedNet:
    return TrainedNet(str(folder / "base"))


@dataclass(frozen=True)
class Case:
    """One method.

    Args:
        build: makes it from an optimizer's factory and a folder that holds the run ``base``, see ``ingredients``.
        refuses: callbacks, by class name, that it cannot be combined with; part of the reason that it gives.
        moves: whether it changes weights beside the optimizer's step, such as a start from somewhere else.
        accumulates: whether ``accumulate_grad_batches`` is possible; else part of the reason that it gives.
        replays: how often it crafts for one batch.
        strategy: on several processes.
        trains: whether its epochs train; else the network is put together at once, and how that resumes is tested elsewhere.
    """

    build: Callable[[Any, Path], Method]
    refuses: dict[str, str] | None = None
    moves: bool = False
    accumulates: str | None = None
    trains: bool = True
    strategy: str = "ddp"
    replays: int = 1


ASSEMBLED = dict.fromkeys(("AWP", "SAM"), "takes no gradient step") | {"EMA": "moves no weights"}
METHODS: dict[str, Case] = {
    "StandardTraining": Case(lambda optimizer, _: StandardTraining(net(), optimizer=optimizer)),
    "AdvProp": Case(lambda optimizer, _: AdvProp(DualNet(net()), PGD(EPS, steps=2, targeted=True), optimizer=optimizer)),
    "AugMix": Case(lambda optimizer, _: AugMix(net(), optimizer=optimizer)),
    "APR, attacked": Case(lambda optimizer, _: APR(net(), FGSM(EPS, random_start=True), optimizer=optimizer)),
    "FastAdvProp": Case(lambda optimizer, _: FastAdvProp(DualNet(net()), FGSM(EPS, random_start=True), optimizer=optimizer)),
    "PGDAT": Case(lambda optimizer, _: PGDAT(net(), PGD(EPS, steps=2), optimizer)),
    "TRADES": Case(lambda optimizer, _: TRADES(net(), PGD(EPS, steps=2, random_start="normal"), optimizer=optimizer)),
    "MART": Case(lambda optimizer, _: MART(net(), PGD(EPS, steps=2, random_start="normal"), optimizer=optimizer)),
    "FastAT": Case(lambda optimizer, _: FastAT(net(), optimizer=optimizer)),
    "FGSMAT": Case(lambda optimizer, _: FGSMAT(net(), optimizer=optimizer)),
    "NFGSM": Case(lambda optimizer, _: NFGSM(net(), NoisyFGSM(EPS), optimizer)),
    "ZeroGrad": Case(lambda optimizer, _: ZeroGrad(net(), ZeroedFGSM(EPS), optimizer)),
    "MultiGrad": Case(lambda optimizer, _: MultiGrad(net(), UnanimousFGSM(EPS), optimizer)),
    "AAER": Case(lambda optimizer, _: AAER(net(), NoisyFGSM(EPS), optimizer=optimizer)),
    "ELLE": Case(lambda optimizer, _: ELLE(net(), FGSM(EPS, bn_mode="train"), lmbda=1.0, optimizer=optimizer)),
    "ELLEA": Case(lambda optimizer, _: ELLEA(net(), FGSM(EPS, bn_mode="train"), sensitivity=0.0, optimizer=optimizer)),
    "GradAlign": Case(lambda optimizer, _: GradAlign(net(), FGSM(EPS, bn_mode="train"), optimizer=optimizer)),
    "NuAT": Case(lambda optimizer, _: NuAT(net(), FGSM(EPS, random_start="bernoulli"), optimizer=optimizer)),
    "GAT": Case(lambda optimizer, _: GAT(net(), FGSM(EPS, random_start="bernoulli"), step_up_after=0, optimizer=optimizer)),
    "SSAT": Case(
        lambda optimizer, _: SSAT(net(), FGSM(EPS, 1.25 * EPS, random_start=True, bn_mode="train"), optimizer=optimizer)
    ),
    "FGSMPGI": Case(lambda optimizer, _: FGSMPGI(net(), FGSM(EPS, bn_mode="train"), optimizer=optimizer)),
    "FGSMPCO": Case(
        lambda optimizer, _: FGSMPCO(net(), FGSM(EPS, bn_mode="train"), attached_confidence=True, optimizer=optimizer)
    ),
    "FGSMMEPCS": Case(
        lambda optimizer, _: FGSMMEPCS(
            net(), FGSM(EPS, bn_mode="train"), ConvergeSmooth(stages=[0, 9], stride=0), label_factor=0.6, optimizer=optimizer
        ),
    ),
    "FGSMRSCS": Case(
        lambda optimizer, _: FGSMRSCS(
            net(), NoisyFGSM(EPS, k=1.0), ConvergeSmooth(stages=[0, 9], stride=0), label_factor=0.6, optimizer=optimizer
        ),
    ),
    "FGSMLAW": Case(lambda optimizer, _: FGSMLAW(net(), optimizer=optimizer)),
    "FGSMLAW, start": Case(lambda optimizer, _: FGSMLAW(net(), reference="start", optimizer=optimizer)),
    "FGSMUAP": Case(lambda optimizer, _: FGSMUAP(net(), FGSM(EPS, bn_mode="train"), uap_eps=1.25 * EPS, optimizer=optimizer)),
    "FGSMCUAP": Case(lambda optimizer, _: FGSMCUAP(net(), FGSM(EPS, bn_mode="train"), uap_eps=1.25 * EPS, optimizer=optimizer)),
    "FGSMFUAP": Case(
        lambda optimizer, _: FGSMFUAP(net(), FGSM(EPS, bn_mode="train"), clusters=4, uap_eps=1.25 * EPS, optimizer=optimizer),
    ),
    "LIET": Case(lambda optimizer, _: LIET(net(), FGSM(EPS, bn_mode="train"), lmbda=10, optimizer=optimizer)),
    "FR": Case(lambda optimizer, _: FR(net(), PGD(EPS, steps=2), optimizer=optimizer)),
    "SAR": Case(lambda optimizer, _: SAR(net(), PGD(EPS, steps=2), optimizer=optimizer)),
    "AdversarialFineTuning": Case(
        lambda optimizer, folder: AdversarialFineTuning(net(), PGD(EPS, steps=2), optimizer, weights=str(folder / "base")),
        moves=True,
    ),
    "RiFT": Case(
        lambda optimizer, folder: RiFT(
            net(),
            PGD(EPS, steps=2),
            criticality=Criticality(epochs=1),
            samples=32,
            interpolations=1,
            optimizer=optimizer,
            weights=str(folder / "base"),
        ),
        moves=True,
    ),
    "ARD": Case(
        lambda optimizer, folder: ARD(net(), teacher(folder), PGD(EPS, steps=2), alpha=0.9, temperature=5, optimizer=optimizer),
    ),
    "IAD": Case(lambda optimizer, folder: IAD(net(), teacher(folder), PGD(EPS, steps=2), begin=1, optimizer=optimizer)),
    "IADII": Case(
        lambda optimizer, folder: IADII(
            net(), teacher(folder), teacher(folder), PGD(EPS, steps=2), begin=1, optimizer=optimizer
        ),
    ),
    "AdaAD": Case(
        lambda optimizer, folder: AdaAD(net(), teacher(folder), PGD(EPS, steps=2, random_start="normal"), optimizer=optimizer),
    ),
    "AdaAD, IGDM": Case(
        lambda optimizer, folder: AdaAD(
            net(), teacher(folder), PGD(EPS, steps=2, random_start="normal"), igdm=IGDM(), optimizer=optimizer
        ),
    ),
    "AdaIAD": Case(
        lambda optimizer, folder: AdaIAD(
            net(), teacher(folder), PGD(EPS, steps=2, random_start="normal"), temperature=5, begin=1, optimizer=optimizer
        ),
    ),
    "PeerAiD": Case(
        lambda optimizer, _: PeerAiD(net(), net(), PGD(EPS, steps=2, random_start="normal"), optimizer=optimizer),
    ),
    "PubDef": Case(
        lambda optimizer, folder: PubDef(
            net(),
            {name: TrainedNet(str(folder / "base")) for name in ("a", "b")},
            PGD(EPS, steps=2),
            optimizer=optimizer,
        ),
    ),
    "SubspaceAT": Case(
        lambda optimizer, folder: SubspaceAT(net(), str(folder / "base"), PGD(EPS, steps=2), dim=2, optimizer=optimizer),
        moves=True,
    ),
    "TWA": Case(lambda optimizer, folder: TWA(net(), str(folder / "base"), optimizer=optimizer, batches=0), moves=True),
    "LayerwiseTWA": Case(
        lambda optimizer, folder: LayerwiseTWA(net(), str(folder / "base"), PGD(EPS, steps=2), optimizer=optimizer, batches=0),
        refuses=dict.fromkeys(("AWP", "SAM"), "its steps move coefficients") | {"EMA": "moves no weights"},
        moves=True,
    ),
    "LearnedSoup": Case(
        lambda optimizer, folder: LearnedSoup(net(), str(folder / "base"), PGD(EPS, steps=2), optimizer=optimizer),
        refuses=dict.fromkeys(("AWP", "SAM"), "its steps move coefficients") | {"EMA": "moves no weights"},
        moves=True,
    ),
    "MEHLSoup": Case(
        lambda optimizer, folder: MEHLSoup(net(), str(folder / "base"), models=2, epochs=1, layer_size=0, optimizer=optimizer),
        refuses=dict.fromkeys(("AWP", "SAM"), "its steps move coefficients") | {"EMA": "moves no weights"},
        moves=True,
    ),
    "FreeAT": Case(
        lambda optimizer, _: FreeAT(net(), FGSM(EPS), replays=2, optimizer=optimizer),
        refuses=dict.fromkeys(("AWP", "SAM"), "cannot be combined with FreeAT"),
        replays=2,
        accumulates="not supported for manual optimization",
    ),
    "AdvMoE": Case(
        lambda optimizer, _: AdvMoE(
            MoESmallCNN(width=8, router_width=4), PGD(EPS, steps=2, random_start="normal"), optimizer=optimizer
        ),
        refuses=dict.fromkeys(("AWP", "SAM"), "cannot be combined with AdvMoE"),
        replays=2,
        accumulates="not supported for manual optimization",
        strategy="ddp_find_unused_parameters_true",
    ),
    "AFA": Case(
        lambda optimizer, _: AFA(
            AdaptiveDualNet(net(), in_channels=1), PGD(EPS, steps=2), adaptive_share=0.5, optimizer=optimizer
        ),
        strategy="ddp_find_unused_parameters_true",
    ),
    "RSLAD": Case(
        lambda optimizer, folder: RSLAD(
            net(), TrainedNet(str(folder / "base")), PGD(EPS, steps=2, random_start="normal"), igdm=IGDM(), optimizer=optimizer
        ),
    ),
    "MTARD": Case(
        lambda optimizer, folder: MTARD(
            net(), *[TrainedNet(str(folder / "base")) for _ in range(2)], PGD(EPS, steps=2), optimizer=optimizer
        ),
    ),
    "BMTARD": Case(
        lambda optimizer, folder: BMTARD(
            net(),
            *[TrainedNet(str(folder / "base")) for _ in range(2)],
            PGD(EPS, steps=2),
            temperature_rate=0.1,
            optimizer=optimizer,
        ),
    ),
    "ABSLD": Case(
        lambda optimizer, folder: ABSLD(
            net(), TrainedNet(str(folder / "base")), PGD(EPS, steps=2, random_start="normal"), optimizer=optimizer
        ),
    ),
    "AWMTARD": Case(
        lambda optimizer, folder: AWMTARD(
            AWNet(net(), in_channels=1, width=4, dim=8),
            TrainedNet(str(folder / "base")),
            TrainedNet(str(folder / "base")),
            PGD(EPS, steps=2, random_start="normal"),
            optimizer=optimizer,
        ),
    ),
    "AdaptiveSmoothing": Case(
        lambda optimizer, folder: AdaptiveSmoothing(
            MixedClassifier(
                TrainedNet(str(folder / "base")),
                TrainedNet(str(folder / "base")),
                standard_taps=["layers.5"],
                robust_taps=["layers.5"],
                in_channels=1,
                image_size=8,
            ),
            PGD(EPS, steps=2),
            optimizer=optimizer,
        ),
    ),
    "AugMax": Case(lambda optimizer, _: AugMax(DualNet(net()), steps=2, optimizer=optimizer)),
    "DAT": Case(lambda optimizer, _: DAT(net(), PatchCodebook(patch=4, codes=8, images=50), optimizer=optimizer)),
    "ShapeTexture": Case(lambda optimizer, _: ShapeTexture(DualNet(net()), PixelAdaIN(style_label=0.2), optimizer=optimizer)),
    "UniformSoup": Case(lambda _, folder: UniformSoup(net(), str(folder / "base"), batches=1), ASSEMBLED, True, trains=False),
    "LPFT": Case(lambda optimizer, _: LPFT(net(), strengths=[0.1], samples=200, optimizer=optimizer), moves=True),
    "WiSEFT": Case(
        lambda _, folder: WiSEFT(net(), str(folder / "base"), alphas=[0.0, 1.0], batches=1), ASSEMBLED, True, trains=False
    ),
    "GreedySoup": Case(lambda _, folder: GreedySoup(net(), str(folder / "base"), batches=1), ASSEMBLED, True, trains=False),
    "RobustWeightSignature": Case(
        lambda _, folder: RobustWeightSignature(
            net(), *[str(folder / "base" / "checkpoints" / "last.ckpt")] * 2, tuned=str(folder / "base"), batches=1
        ),
        ASSEMBLED,
        True,
        trains=False,
    ),
}
