"""Broken defences raise the flags that they should, honest networks none, and each check measures what it says."""

from __future__ import annotations

import copy
import json
import random

import pytest
import torch
from rich.console import Console
from torch import nn

from robust_pl.evaluation.masking import Flag, as_json, as_table, masking_flags
from robust_pl.evaluation.masking.strength import _not_stronger
from tests.masking_zoo import BROKEN, EPS, HONEST, Around, NoGradient, digits, honest

NAMES = [
    "randomized",
    "softmax_output",
    "batch_dependent",
    "train_mode",
    "runtime_optimisation",
    "zero_gradient",
    "gradient_mismatch",
    "piecewise_constant",
    "single_step_beats_iterative",
    "more_steps_not_stronger",
    "larger_eps_not_stronger",
    "unbounded_attack_fails",
    "black_box_beats_white_box",
    "binarization",
]
FAST = {"quantised_input", "train_mode_batchnorm", "mlp_pgd_at", "linear_pgd_at"}


def each(networks):
    """A few of them in every run, all of them in the slow one."""
    return [pytest.param(name, id=name, marks=() if name in FAST else pytest.mark.slow) for name in networks]


def test_images(count=100):
    x, y = digits("test")
    return x[:count], y[:count]


test_images.__test__ = False


def raised(flags):
    return {flag.name for flag in flags if flag.raised}


def weak(net, count=40, **settings):
    """All flags of a short audit: 4 steps, 10 queries and no binarization."""
    settings = {"eps": EPS, "steps": 4, "queries": 10, "binarization": False} | settings
    return {flag.name: flag for flag in masking_flags(net, *test_images(count), **settings)}


@pytest.fixture(scope="module")
def net():
    return honest("linear_pgd_at")


# The two lists --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", each(HONEST))
def test_honest_networks_are_not_flagged(name):
    flags = masking_flags(honest(name), *test_images(), eps=HONEST[name][1])
    assert [flag.name for flag in flags] == NAMES
    assert all(flag.value is not None for flag in flags)
    assert not raised(flags), [flag.message for flag in flags if flag.raised]


@pytest.mark.parametrize("name", each(BROKEN))
def test_broken_defences_are_flagged(name):
    make, expected = BROKEN[name]
    flags = masking_flags(make().eval(), *test_images(), eps=EPS)
    assert expected <= raised(flags)
    assert all(flag.value is not None for flag in flags)  # every check could be made on it


@pytest.mark.slow
def test_l2():
    x, y = test_images()
    assert not raised(masking_flags(honest("mlp_pgd_at"), x, y, eps=0.5, norm="l2"))
    assert "black_box_beats_white_box" in raised(masking_flags(BROKEN["jpeg"][0](), x, y, eps=2.0, norm="l2"))


# What is promised of every call ---------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_flags_and_random_streams_stay(net):
    noisy = Around(net, lambda x: x + 0.1 * torch.randn_like(x))
    before = torch.get_rng_state(), random.getstate()
    first, second = weak(noisy, seed=3), weak(noisy, seed=3)
    assert first == second
    assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[1]
    assert weak(noisy, seed=4)["randomized"].value != first["randomized"].value


def test_batches_do_not_matter(net):
    by_batch = [weak(net, batch_size=size, binarization=True) for size in (7, 40)]
    for name in set(by_batch[0]) - {"randomized", "batch_dependent"}:  # which look at one batch
        assert by_batch[0][name].value == pytest.approx(by_batch[1][name].value, abs=1e-4), name


def test_the_network_is_left_as_it_was(net):
    model = nn.Sequential(net, nn.Dropout(0.5)).train()
    model[0][1].eval()
    state = [module.training for module in model.modules()], [p.requires_grad for p in model.parameters()]
    with torch.inference_mode():
        flags = weak(model)
    assert state == ([module.training for module in model.modules()], [p.requires_grad for p in model.parameters()])
    assert all(p.grad is None for p in model.parameters())
    assert not flags["randomized"].raised and not flags["train_mode"].raised  # it was looked at in eval mode


def test_stated_cost(net):
    """Counted over a run in which nothing is broken, as docs/masking_flags.md adds it up."""
    passes = {"forward": 0, "gradient": 0}

    def count(x):
        passes["gradient" if x.requires_grad else "forward"] += len(x)
        return x

    x, y = test_images(40)
    x, y = x[right := net(x).argmax(1) == y], y[right]
    masking_flags(Around(net, count), x, y, eps=1e-6, steps=20, queries=300)
    n, p = len(x), 32
    attacks = {"FGSM": 1, "PGD-20": 20, "margin": 20, "PGD-60": 60, "2 eps": 20, "4 eps": 20, "unbounded": 40}
    assert passes["gradient"] == n * (2 + sum(attacks.values())) + p * (1 + 20)
    unjudged = 1 + 1 + 5 + 2 + 1  # to see that it works, clean, randomized, batch_dependent, runtime_optimisation
    points = int(0.8 * 64)  # of 59, since the features are the 64 pixels
    assert passes["forward"] == n * (unjudged + len(attacks) + 300 + 1) + p * (60 + 9 + 1 + points + 20 + 1)


def test_json_and_table(net):
    flags = list(weak(Around(net, after=lambda z: z.softmax(1))).values())
    assert [Flag(**entry) for entry in json.loads(json.dumps(as_json(flags), allow_nan=False))] == flags
    console = Console(width=200)
    with console.capture() as capture:
        console.print(as_table(flags))
    rows = [line for line in capture.get().splitlines() if any(name in line for name in NAMES)]
    assert "softmax_output" in rows[0] and "yes" in rows[0]  # those that are raised come first
    assert len(rows) == len(flags)


def test_binarization_can_be_left_out_or_given_features(net):
    assert list(weak(net)) == NAMES[:-1]
    assert weak(net, binarization=True)["binarization"].value == 1
    assert weak(net, binarization=True, features=lambda x: x.flatten(1).detach())["binarization"].value == 0
    flag = weak(net, binarization=True, features=lambda x: 0 * x.flatten(1)[:, :3])["binarization"]
    assert flag.value is None and not flag.raised and "32 of 32 samples discarded" in flag.message


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [({"eps": 0}, "eps=0"), ({"eps": 8}, "8/255"), ({"norm": "l0"}, "norm='l0'"), ({"norm": "l1"}, "norm='l1' cannot")],
)
def test_bad_arguments(net, settings, complaint):
    with pytest.raises(ValueError, match=complaint):
        weak(net, **settings)


def test_mixed_labels_are_refused(net):
    x, y = test_images(20)
    with pytest.raises(ValueError, match=r"y has shape \(20, 10\): the audit needs classes"):
        masking_flags(net, x, nn.functional.one_hot(y, 10).float(), eps=EPS)


def test_labels_that_never_fit(net):
    x, _ = test_images(20)
    with pytest.raises(ValueError, match="none of 20 samples"):
        masking_flags(net, x, (net(x).argmax(1) + 1) % 10, eps=EPS)


# Single checks ---------------------------------------------------------------------------------------------------------


def test_autograd_in_a_forward_pass_is_seen_under_any_name(net):
    from torch.autograd import grad
    from torch.func import grad as functional_grad

    def by_name(x):
        with torch.enable_grad():
            z = x.detach().requires_grad_()
            return x + 0 * grad(z.square().sum(), z)[0]

    def by_backward(x):
        with torch.enable_grad():
            z = x.detach().requires_grad_()
            z.square().sum().backward()
        return x + 0 * z.grad

    def by_func(x):
        with torch.enable_grad():
            return x + 0 * functional_grad(lambda z: z.square().sum())(x.detach())

    for before in (by_name, by_backward, by_func):
        flag = weak(Around(net, before))["runtime_optimisation"]
        assert flag.raised and flag.value == 1
    engine = torch.autograd._engine_run_backward
    weak(net)
    assert torch.autograd._engine_run_backward is engine


def test_differences_of_a_wrong_gradient(net):
    """Autograd sees half of the derivative: |g - 2g| / |2g| = 1/2."""
    half = Around(net, lambda x: 0.5 * x + 0.5 * x.detach())
    assert weak(half)["gradient_mismatch"].value == pytest.approx(0.5, abs=0.01)
    assert weak(net)["gradient_mismatch"].value < 0.001


def test_zero_gradients_are_counted(net):
    """The gradient is cut for every sample whose first class wins."""
    x, y = test_images(40)

    def cut(x):
        return torch.where((x[:, :, 4:5, 4:5] > 0.5), x, x.detach())

    right = net(x).argmax(1) == y
    dead = (x[:, 0, 4, 4] <= 0.5) & right
    assert 0 < dead.sum() < right.sum()
    assert weak(Around(net, cut))["zero_gradient"].value == pytest.approx((dead.sum() / right.sum()).item())


def test_half_precision_is_not_taken_for_quantisation(net):
    flags = weak(Around(net, after=lambda z: z.bfloat16()))
    assert flags["piecewise_constant"].value is None and not flags["piecewise_constant"].raised
    assert flags["gradient_mismatch"].value is None and not flags["gradient_mismatch"].raised


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_no_check_fails_on_a_network_of_another_precision(net, dtype):
    """It is fed with its own precision."""
    seen, other = set(), copy.deepcopy(net).to(dtype)
    other.register_forward_pre_hook(lambda _, inputs: seen.add(inputs[0].dtype))
    x, y = test_images(40)
    settings = {"eps": EPS, "steps": 4, "queries": 10}
    found = {flag.name: flag for flag in masking_flags(other, x.to(dtype), y, **settings)}
    assert seen == {dtype}
    for flag in masking_flags(net, x, y, **settings):
        assert "failed" not in found[flag.name].message
        assert found[flag.name].raised == flag.raised


def test_a_network_without_linear_layer_is_not_binarized():
    class Convolution(nn.Conv2d):
        def forward(self, x):
            return super().forward(x).flatten(1)

    torch.manual_seed(0)
    flag = weak(Convolution(1, 10, 8), binarization=True)["binarization"]
    assert flag.value is None and not flag.raised and "features=" in flag.message


def test_a_network_that_fails_under_attack_is_flagged(net):
    def refuse(x):
        if torch.is_grad_enabled() and x.requires_grad:
            raise RuntimeError("no gradients here\nat all")
        return x

    flags = weak(Around(net, refuse))
    assert flags["zero_gradient"] == Flag(
        "zero_gradient", True, None, None, "the check failed on this network: no gradients here"
    )
    assert not flags["randomized"].raised


def test_a_network_cut_off_from_its_input_can_be_attacked(net):
    flags = weak(NoGradient(net))
    assert flags["zero_gradient"].value == 1
    assert flags["single_step_beats_iterative"].value == 0  # neither moves


def test_chance_between_two_attacks():
    """4 of 100 more stand: raised where no sample went the other way, not where 20 did."""
    weaker, stronger = torch.zeros(100, dtype=torch.bool), torch.zeros(100, dtype=torch.bool)
    stronger[:5] = True
    flag = _not_stronger("x", ("a", weaker), ("b", stronger))
    assert flag.raised and flag.value == 0.05 and flag.threshold == pytest.approx(2 * 5**0.5 / 100)
    weaker[50:60] = stronger[60:70] = True
    flag = _not_stronger("x", ("a", weaker), ("b", stronger))
    assert not flag.raised and flag.value == 0.05 and flag.threshold == pytest.approx(0.1)
