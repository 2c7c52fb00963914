"""Every attack of the library, with arguments for images (1, 8, 8) of three classes; the contract tests run all of them."""

from functools import partial

from robust_pl.callbacks import APGD, FGSM, PGD, SignHunter, SimBA

# Arguments that tests override (seed) are left out.
ATTACKS = [
    ("apgd", partial(APGD, 0.1, steps=10)),
    ("apgd_l2", partial(APGD, 1.0, norm="l2", steps=10, restarts=2)),
    ("apgd_l1", partial(APGD, 6.0, norm="l1", steps=10)),
    ("apgd_l1_largereps", partial(APGD, 6.0, norm="l1", steps=10, use_largereps=True, eot_iter=2)),
    ("fgsm", partial(FGSM, 0.1)),
    ("fgsm_l2", partial(FGSM, 1.0, norm="l2")),
    ("fgsm_l1", partial(FGSM, 6.0, norm="l1", random_start=True)),
    ("fgsm_fast", partial(FGSM, 0.1, step_size=0.125, random_start=True)),
    ("pgd", partial(PGD, 0.1, steps=3)),
    ("pgd_l2", partial(PGD, 1.0, steps=3, norm="l2")),
    ("pgd_l1", partial(PGD, 6.0, steps=8, norm="l1")),
    ("pgd_trades", partial(PGD, 0.1, 0.04, steps=4, random_start="normal", objective="kl")),
    ("pgd_margin_restarts", partial(PGD, 0.1, steps=3, objective="margin", restarts=2)),
    ("pgd_targeted", partial(PGD, 0.2, steps=3, targeted=True)),
    ("pgd_no_track", partial(PGD, 0.1, steps=3, bn_mode="train_no_track")),
    ("signhunter", partial(SignHunter, 0.1, n_queries=80)),
    ("simba", partial(SimBA, 1.0, n_queries=150)),
    ("simba_linf", partial(SimBA, 0.1, norm="linf", n_queries=150, objective="margin")),
    ("simba_dct", partial(SimBA, 1.0, n_queries=150, freq_dims=4)),
]
