"""Every attack of the library, with arguments for images (1, 8, 8) of three classes; the contract tests run all of them.

AutoAttack and TransferEvaluation, for which a part of the contract holds, are in test_composed_attacks.py.
"""

from copy import copy
from functools import partial

from robust_pl.callbacks import (
    APGD,
    BIM,
    CWL2,
    DIM,
    FAB,
    FGSM,
    FGUAP,
    MIM,
    NES,
    NIM,
    PGD,
    SIM,
    TIM,
    UAP,
    VMIM,
    VNIM,
    Bandits,
    CRAttack,
    CWLinf,
    DeepFool,
    DiverseInputs,
    DominantPatterns,
    EoT,
    NoisyFGSM,
    QueryNet,
    ScaleCopies,
    SignHunter,
    SimBA,
    Smoothing,
    Square,
    UnanimousFGSM,
    ZeroedFGSM,
)


class EoTPGD(EoT):
    """With the radius first, as the tests give it to all attacks."""

    def __init__(self, eps, *, samples, **arguments):
        super().__init__(PGD(eps, **arguments), samples)


class NoisyInside(NoisyFGSM):
    """With a part of the radius for its eps, so that noise and step together lie in the ball that the tests measure."""

    stays_within = 1.0

    def perturb(self, problem, x, y):
        problem = copy(problem)
        problem.eps = problem.eps / (self.k + 1)
        return super().perturb(problem, x, y)


QUERYNET = {"n_surrogates": 2, "width": 2, "first_steps": 10, "fit_steps": 2, "batch_size": 16, "min_picks": 2}

# Arguments that tests override (seed) are left out.
SLOW = {"querynet", "querynet_l2", "cw_l2_targeted"}  # run by the slow suite
ATTACKS = [
    ("apgd", partial(APGD, 0.1, steps=10)),
    ("apgd_l2", partial(APGD, 1.0, norm="l2", steps=10, restarts=2)),
    ("apgd_l1", partial(APGD, 6.0, norm="l1", steps=10)),
    ("apgd_l1_largereps", partial(APGD, 6.0, norm="l1", steps=10, use_largereps=True, eot_iter=2)),
    ("bim", partial(BIM, 0.1, steps=3)),
    ("bim_l2_best", partial(BIM, 1.0, 0.4, steps=4, norm="l2", keep="best")),
    ("cr", partial(CRAttack, 0.1, steps=12, cycle=6, rounds=2)),
    ("cw_linf", partial(CWLinf, 0.1, steps=3)),
    ("cw_linf_targeted", partial(CWLinf, 0.2, steps=5, kappa=1.0, targeted=True, restarts=2)),
    ("cw_l2", partial(CWL2, 3.0, steps=60, step_size=0.2, binary_search_steps=2, initial_const=1.0)),
    (
        "cw_l2_targeted",
        partial(
            CWL2,
            4.0,
            steps=50,
            step_size=0.2,
            binary_search_steps=2,
            initial_const=10.0,
            kappa=0.1,
            abort_early=False,
            targeted=True,
        ),
    ),
    ("deepfool", partial(DeepFool, 2.0, steps=20)),
    ("deepfool_linf", partial(DeepFool, 0.4, steps=20, overshoot=0.05, candidates=2, norm="linf")),
    ("dim", partial(DIM, 0.1, steps=4)),
    ("dim_l2_best", partial(DIM, 1.0, 0.5, steps=4, norm="l2", resize_rate=1.5, keep="best")),
    ("dts_mim", partial(MIM, 0.1, steps=4, transforms=[ScaleCopies(3), DiverseInputs(1.3), Smoothing(3)])),
    ("eot", partial(EoTPGD, 0.1, steps=3, samples=2)),
    ("mim", partial(MIM, 0.1, steps=3)),
    ("mim_l2", partial(MIM, 1.0, steps=3, norm="l2", decay=0.5)),
    ("nim", partial(NIM, 0.1, steps=3)),
    ("nim_l2_best", partial(NIM, 1.0, steps=3, norm="l2", keep="best")),
    ("sim", partial(SIM, 0.1, steps=3, copies=3)),
    ("tim", partial(TIM, 0.1, steps=3, kernel_size=3)),
    ("unanimous_fgsm", partial(UnanimousFGSM, 0.1, agree=2, bn_mode="eval")),
    ("vmim", partial(VMIM, 0.1, steps=3, neighbours=7)),
    ("vmim_l2", partial(VMIM, 1.0, steps=3, norm="l2", neighbours=3)),
    ("vnim", partial(VNIM, 0.1, steps=3, neighbours=3)),
    ("zeroed_fgsm", partial(ZeroedFGSM, 0.1, bn_mode="eval")),
    ("pgd_best", partial(PGD, 0.1, steps=3, keep="best")),
    ("pgd_first", partial(PGD, 0.1, steps=3, keep="first")),
    ("vnim_l2_first", partial(VNIM, 1.0, steps=3, norm="l2", neighbours=2, keep="first")),
    ("fab", partial(FAB, 0.4, steps=10, n_targets=None)),
    ("fab_t_l2", partial(FAB, 2.0, norm="l2", steps=10, n_targets=1)),
    ("fab_t_l1", partial(FAB, 12.0, norm="l1", steps=20, n_targets=1)),
    ("fgsm", partial(FGSM, 0.1)),
    ("fgsm_l2", partial(FGSM, 1.0, norm="l2")),
    ("fgsm_l1", partial(FGSM, 6.0, norm="l1", random_start=True)),
    ("fgsm_fast", partial(FGSM, 0.1, step_size=0.125, random_start=True)),
    ("n_fgsm", partial(NoisyInside, 0.2, k=0.25, bn_mode="eval")),
    ("pgd", partial(PGD, 0.1, steps=3)),
    ("pgd_l2", partial(PGD, 1.0, steps=3, norm="l2")),
    ("pgd_l1", partial(PGD, 6.0, steps=8, norm="l1")),
    ("pgd_trades", partial(PGD, 0.1, 0.04, steps=4, random_start="normal", objective="kl")),
    ("pgd_margin_restarts", partial(PGD, 0.1, steps=3, objective="margin", restarts=2)),
    ("pgd_targeted", partial(PGD, 0.2, steps=3, targeted=True)),
    ("pgd_no_track", partial(PGD, 0.1, steps=3, bn_mode="train_no_track")),
    ("querynet", partial(QueryNet, 0.1, n_queries=12, p_init=0.4, rescale_schedule=True, **QUERYNET)),
    ("querynet_l2", partial(QueryNet, 1.0, norm="l2", n_queries=12, p_init=0.4, **QUERYNET)),
    ("signhunter", partial(SignHunter, 0.1, n_queries=80)),
    ("simba", partial(SimBA, 1.0, n_queries=150)),
    ("simba_linf", partial(SimBA, 0.1, norm="linf", n_queries=150, objective="margin")),
    ("simba_dct", partial(SimBA, 1.0, n_queries=150, freq_dims=4)),
    ("square", partial(Square, 0.1, n_queries=100, reach_border=True)),
    ("square_l2", partial(Square, 1.0, norm="l2", n_queries=100, reach_border=True)),
    ("square_l1", partial(Square, 6.0, norm="l1", n_queries=100, reach_border=True, objective="ce")),
    (
        "square_targeted_restarts",
        partial(Square, 0.2, n_queries=60, reach_border=True, restarts=2, rescale_schedule=True, targeted=True),
    ),
    ("nes", partial(NES, 0.1, directions=10, sigma=0.1, n_queries=220, objective="ce")),
    ("nes_l2", partial(NES, 1.0, 0.3, directions=5, sigma=0.1, norm="l2", n_queries=80)),
    ("bandits", partial(Bandits, 0.1, 0.01, prior_size=4, n_queries=120)),
    ("bandits_l2", partial(Bandits, 1.0, prior_size=4, n_queries=80, norm="l2", objective="ce")),
]

# Attacks that look at training data first; what holds for them is in test_universal_attacks.py.
MUST_FIT = [
    ("dominant_patterns", partial(DominantPatterns, 0.2, epochs=5)),
    ("fg_uap", partial(FGUAP, 0.2, epochs=5)),
    ("fg_uap_l2", partial(FGUAP, 1.5, epochs=5, norm="l2", target=1)),
    ("uap", partial(UAP, 0.2, epochs=2)),
    ("uap_l2", partial(UAP, 1.5, epochs=2, together=16, norm="l2")),
]
