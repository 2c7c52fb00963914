"""More work never finds less, at one seed, also for attacks that have no ``keep="best"`` and ask for gradients.

Iterative attacks are in test_iterative_attacks.py and query attacks beside their tests. Not steps of APGD and CW-L2: both make
plans for the number of steps that they are given, so more of them is another walk and not a longer one.
"""

from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import nn

from robust_pl.callbacks import APGD, CWL2, FAB, DeepFool

MINIMAL = [
    ("deepfool", DeepFool, "steps", (1, 2, 3, 5, 20)),
    ("deepfool_linf", partial(DeepFool, norm="linf"), "steps", (1, 2, 3, 5, 20)),
    ("fab", partial(FAB, None, n_targets=None), "steps", (1, 2, 5, 10, 20)),
    ("fab_t_l2", partial(FAB, None, norm="l2", n_targets=2), "steps", (1, 2, 5, 10, 20)),
    ("fab_t_l1", partial(FAB, None, norm="l1", n_targets=2), "steps", (1, 2, 5, 10, 20)),
    ("fab_targets", partial(FAB, None, steps=10), "n_targets", (1, 2, 3)),
    ("cw_l2", partial(CWL2, steps=40, step_size=0.02, initial_const=0.1), "binary_search_steps", (1, 2, 4, 6)),
]


@pytest.fixture(scope="module")
def task():
    """A curved network in float64, and its own labels."""
    with torch.random.fork_rng():
        torch.manual_seed(2)
        net = nn.Sequential(nn.Conv2d(1, 6, 3, 2, 1), nn.Tanh(), nn.Flatten(), nn.Linear(96, 24), nn.Tanh(), nn.Linear(24, 5))
        x = torch.rand(24, 1, 8, 8, dtype=torch.float64)
    net = net.double().requires_grad_(False)
    return net, x, net(x).argmax(1)


@pytest.mark.parametrize(("make", "field", "values"), [pytest.param(*row, id=name) for name, *row in MINIMAL])
def test_the_smallest_perturbation_grows_no_larger(make, field, values, task):
    net, x, y = task
    norms = []
    for value in values:
        found = make(**{field: value}).run(net, x, y, index=torch.arange(len(x)))
        norms.append(torch.where(net(found.x_adv).argmax(1) != y, found.norms, float("inf")))
    for fewer, more in pairwise(norms):
        assert (more <= fewer * (1 + 1e-9)).all()
    assert norms[-1].isfinite().all() and (norms[-1] < norms[0]).any()


@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.02), ("l2", 0.12), ("l1", 0.9)])
@pytest.mark.parametrize("loss", ["ce", "dlr", "dlr-targeted"])
def test_restarts_of_apgd_lose_no_success(norm, eps, loss, task):
    net, x, y = task
    fooled = [
        net(
            APGD(eps, norm=norm, loss=loss, steps=5, restarts=restarts, n_targets=2)
            .run(net, x, y, index=torch.arange(24))
            .x_adv
        )
        .argmax(1)
        .ne(y)
        for restarts in (1, 2, 5)
    ]
    assert (fooled[0] <= fooled[1]).all() and (fooled[1] <= fooled[2]).all()
    assert fooled[0].any() and not fooled[-1].all()


@pytest.mark.parametrize("loss", ["ce", "dlr-targeted"])
def test_a_larger_ball_of_apgd_breaks_no_fewer(loss, task):
    net, x, y = task
    fooled = [
        net(APGD(eps, loss=loss, steps=20, n_targets=2).run(net, x, y, index=torch.arange(24)).x_adv)
        .argmax(1)
        .ne(y)
        .sum()
        .item()
        for eps in (0.0, 0.01, 0.03, 0.1, 0.3)
    ]
    assert fooled == sorted(fooled) and fooled[0] == 0 and fooled[-1] == 24
