"""CW-L2 and DeepFool against the distances of linear networks, which are known, and their passes against hand counts."""

from functools import partial

import pytest
import torch
from torch import nn

from robust_pl.callbacks import CWL2, DeepFool
from robust_pl.functional import geometry, losses

DUAL = {"l2": 2, "linf": 1}
quick = partial(CWL2, steps=200, step_size=0.005, binary_search_steps=6, initial_const=0.1)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """The tensors are tiny: threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Linear(nn.Module):
    """Logits ``weight`` (K, D) times the pixels about grey."""

    def __init__(self, weight):
        super().__init__()
        self.weight = weight

    def forward(self, x):
        return (x.flatten(1) - 0.5) @ self.weight.T


class Curved(nn.Module):
    """Two layers, so that no single step arrives."""

    def __init__(self, classes=4):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.first = torch.randn(20, 48, generator=generator, dtype=torch.float64)
        self.second = torch.randn(classes, 20, generator=generator, dtype=torch.float64)

    def forward(self, x):
        return torch.tanh((x.flatten(1) - 0.5) @ self.first.T) @ self.second.T


def plane(classes, count=12, seed=0):
    """A linear network, images far from the edges of the box and not too near to a boundary, and their labels."""
    generator = torch.Generator().manual_seed(seed)
    model = Linear(torch.randn(classes, 48, generator=generator, dtype=torch.float64))
    x = 0.35 + 0.3 * torch.rand(20 * count, 3, 4, 4, generator=generator, dtype=torch.float64)
    y = model(x).argmax(1)
    far = distance(model, x, y, "l2") > 0.04
    return model, x[far][:count], y[far][:count]


def curved():
    model = Curved()
    x = 0.2 + 0.6 * torch.rand(16, 3, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return model, x, model(x).argmax(1)


def distances(model, x, y, norm):
    """(z_y - z_k) / ||w_y - w_k||_q of every class k, infinite for the label, (B, K)."""
    logits, weight = model(x), model.weight
    lead = logits.gather(1, y.unsqueeze(1)) - logits
    steepness = (weight[y].unsqueeze(1) - weight).norm(p=DUAL[norm], dim=2)
    return torch.where(steepness > 0, lead / steepness, float("inf"))


def distance(model, x, y, norm):
    """To the nearest boundary, (B,)."""
    return distances(model, x, y, norm).amin(1)


# On linear networks -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overshoot", [0.02, 0.1])
@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("classes", [2, 3, 5])
def test_deepfool_is_exact_up_to_its_overshoot(classes, norm, overshoot):
    model, x, y = plane(classes)
    found = DeepFool(norm=norm, overshoot=overshoot).run(model, x, y)
    torch.testing.assert_close(found.norms, (1 + overshoot) * distance(model, x, y, norm))
    assert (model(found.x_adv).argmax(1) != y).all()
    # By hand: the clean pass, one linearisation of every class, and one look at where it led.
    assert (found.forwards, found.backwards) == (3 * len(x), classes * len(x))


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_cw_comes_within_two_per_cent(classes):
    """Of the boundary to the runner-up, towards which its objective pulls; mostly that is the nearest."""
    model, x, y = plane(classes)
    found = quick().run(model, x, y)
    options = distances(model, x, y, "l2")
    nearest = options.amin(1)
    runner_up = options.gather(1, model(x).topk(2).indices[:, 1:]).squeeze(1)
    assert (runner_up == nearest).sum() >= 8
    assert (found.norms > nearest).all()
    assert (found.norms < 1.02 * runner_up).all()
    assert (model(found.x_adv).argmax(1) != y).all()


def test_cw_reaches_a_target_at_its_distance():
    model, x, y = plane(2)
    found = quick(targeted=True).run(model, x, 1 - y)
    ratio = found.norms / distance(model, x, y, "l2")
    assert ratio.min() > 1 and ratio.max() < 1.02
    assert (model(found.x_adv).argmax(1) == 1 - y).all()


def test_kappa_is_the_lead_of_the_wrong_logit():
    """On two classes the distance is (lead + kappa) / ||w||."""
    model, x, y = plane(2)
    kappa, slope = 1.5, (model.weight[0] - model.weight[1]).norm()
    found = quick(kappa=kappa).run(model, x, y)
    assert losses.margin(model(found.x_adv), y).min() > kappa
    ratio = found.norms / (distance(model, x, y, "l2") + kappa / slope)
    assert ratio.min() > 1 and ratio.max() < 1.02


@pytest.mark.parametrize("make", [DeepFool, partial(DeepFool, norm="linf"), partial(quick, steps=100)])
def test_a_radius_is_a_verdict_at_that_radius(make):
    model, x, y = plane(3)
    free = make().run(model, x, y)
    order = free.norms.sort().values
    eps = ((order[5] + order[6]) / 2).item()
    bound = make(eps).run(model, x, y)
    inside = free.norms <= eps
    assert inside.sum() == 6
    assert torch.equal(bound.x_adv[inside], free.x_adv[inside])
    assert torch.equal(bound.x_adv[~inside], x[~inside])


def test_cw_finds_its_way_out_of_black_and_white():
    """Where every pixel starts on tanh's plateau, a loss that does not move yet must not stop the sample."""
    model = Linear(torch.tensor([[1.0], [-1.0]]).repeat(1, 48).double() / 48)
    x = torch.ones(2, 3, 4, 4, dtype=torch.float64)
    x[1, 0] = 0.0
    y = torch.zeros(2, dtype=torch.int64)
    found = CWL2(steps=600, step_size=0.02, binary_search_steps=4, initial_const=10.0).run(model, x, y)
    # All pixels, or those that are not black, fall evenly until their mean is grey.
    expected = torch.tensor([0.5 * 48**0.5, 0.25 * 32**0.5], dtype=torch.float64)
    torch.testing.assert_close(found.norms, expected, rtol=0.02, atol=0)


def test_deepfool_stays_in_the_box_and_goes_round_it():
    """Half of the direction is shut: the first step gets half of the way, and each further one half of the rest."""
    model = Linear(torch.tensor([[1.0], [-1.0]]).repeat(1, 2).double())
    x = torch.tensor([[0.0, 0.8]], dtype=torch.float64).view(1, 1, 1, 2)
    x[0, 0, 0, 0] = 0.3
    y = torch.zeros(1, dtype=torch.int64)
    easy = DeepFool().run(model, x, y)
    torch.testing.assert_close(easy.x_adv.flatten(), torch.tensor([0.249, 0.749], dtype=torch.float64))
    x[0, 0, 0, 0], x[0, 0, 0, 1] = 0.01, 0.999
    hard = DeepFool().run(model, x, y)
    assert (hard.x_adv >= 0).all() and model(hard.x_adv).argmax() == 1


# On curved ones ---------------------------------------------------------------------------------------------------


def test_deepfool_overshoots_the_sum_of_its_steps_once():
    """By hand, with autograd: r grows by the step at x + 1.02 r; nothing is stretched twice."""
    model, x, y = curved()
    found = DeepFool().run(model, x, y)
    assert found.backward_passes.of_each.max() > 4  # some took more than one step
    for image, label, result in zip(x, y, found.x_adv, strict=True):
        r = torch.zeros_like(image)
        while model((image + 1.02 * r)[None]).argmax() == label:
            at = image + 1.02 * r
            z = model(at[None])[0]
            w = torch.autograd.functional.jacobian(lambda v: model(v[None])[0], at)
            options = [((z[k] - z[label]).abs() / (w[k] - w[label]).norm(), k) for k in range(4) if k != label]
            length, k = min(options)
            r = r + length * (w[k] - w[label]) / (w[k] - w[label]).norm()
        torch.testing.assert_close(result, image + 1.02 * r)


def test_deepfool_lets_each_sample_go_when_it_fools():
    model, x, y = curved()
    y = y.clone()
    y[0] = (y[0] + 1) % 4  # misclassified already
    found = DeepFool(candidates=3).run(model, x, y)
    steps = found.backward_passes.of_each // 3
    assert steps[0] == 0 and torch.equal(found.x_adv[0], x[0])
    assert 1 <= steps[1:].min() < steps[1:].max()
    assert torch.equal(found.forward_passes.of_each, 1 + 2 * steps)


def test_deepfool_gives_the_clean_image_back_where_it_did_not_arrive():
    model, x, y = curved()
    short, long = DeepFool(steps=1, overshoot=0.0).run(model, x, y), DeepFool().run(model, x, y)
    arrived = model(short.x_adv).argmax(1) != y
    assert 0 < arrived.sum() < len(x)
    assert torch.equal(short.x_adv[~arrived], x[~arrived])
    assert (model(long.x_adv).argmax(1) != y).all()


def test_deepfool_looks_at_its_candidates_only():
    """With two candidates the nearest boundary is missed where it is not that of the runner-up."""
    weight = torch.tensor([[1.0, 0.0], [0.9, 0.0], [0.0, 9.0]], dtype=torch.float64)
    x = torch.tensor([0.9, 0.51], dtype=torch.float64).view(1, 1, 1, 2)
    model, y = Linear(weight), torch.tensor([0])
    assert model(x)[0].tolist() == pytest.approx([0.4, 0.36, 0.09])
    assert DeepFool().run(model, x, y).norms.item() == pytest.approx(1.02 * 0.31 / 82**0.5)
    with_two = DeepFool(candidates=2).run(model, x, y).x_adv.flatten()
    assert with_two[1] == 0.51 and with_two[0] < 0.5


def test_deepfool_leaves_a_tie_and_passes_over_a_dead_class():
    dead = Linear(torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]], dtype=torch.float64))
    x = torch.tensor([0.7, 0.7], dtype=torch.float64).view(1, 1, 1, 2)  # all three tie; the second never comes apart
    found = DeepFool().run(dead, x, torch.tensor([0]))
    assert dead(found.x_adv).argmax() == 2
    assert 0 < found.norms.item() < 3e-4


def test_cw_beats_deepfool_on_a_curved_network():
    model, x, y = curved()
    cw, deepfool = quick().run(model, x, y), DeepFool().run(model, x, y)
    assert (model(cw.x_adv).argmax(1) != y).all()
    assert (cw.norms < deepfool.norms).double().mean() > 0.8
    assert cw.norms.mean() < 0.99 * deepfool.norms.mean()


def test_cw_counts_its_passes():
    """By hand: the clean pass, then one pass each way for each step of each search; misclassified samples cost one look."""
    model, x, y = curved()
    y = y.clone()
    y[3] = (y[3] + 1) % 4
    found = CWL2(steps=7, binary_search_steps=3, abort_early=False).run(model, x, y)
    expected = torch.full((16,), 21)
    expected[3] = 0
    assert torch.equal(found.backward_passes.of_each, expected)
    assert torch.equal(found.forward_passes.of_each, expected + 1)
    assert torch.equal(found.x_adv[3], x[3])


def test_cw_stops_each_sample_where_its_loss_stalls():
    model, x, y = curved()
    patient, hasty = (quick(abort_early=early).run(model, x, y) for early in (False, True))
    spent = hasty.backward_passes.of_each
    assert (patient.backward_passes.of_each == 6 * 200).all()
    assert spent.max() < 1200 and len(spent.unique()) > 3
    torch.testing.assert_close(hasty.norms, patient.norms, rtol=0.03, atol=0)
    alone = quick().run(model, x[5:6], y[5:6])  # nobody else's loss matters
    torch.testing.assert_close(alone.x_adv, hasty.x_adv[5:6])
    assert alone.backwards == spent[5]


def test_cw_searches_the_constant_of_each_sample():
    """Three search steps from 1e-3 stop at 0.1, which is enough where the network is steep, and not where it is flat."""
    steep, flat = (Linear(torch.tensor([[s], [-s]], dtype=torch.float64).repeat(1, 48)) for s in (1.0, 1e-3))
    x = torch.full((1, 3, 4, 4), 0.51, dtype=torch.float64)
    y = torch.tensor([0])
    short = partial(CWL2, steps=100, binary_search_steps=3)
    assert steep(short()(steep, x, y)).argmax() == 1
    assert torch.equal(short()(flat, x, y), x)
    # ||x_adv - x|| = 0.01 * sqrt(48) needs c > 2 * that / ||w||, about 10.
    enough = short(binary_search_steps=7)
    assert flat(enough(flat, x, y)).argmax() == 1


def test_one_adam_step_by_hand():
    """Adam's first step has length step_size in every w: x_adv = (tanh(w + 0.1) + 1) / 2, away from the gradient."""
    model = Linear(torch.tensor([[1.0, -2.0], [0.0, 0.0]], dtype=torch.float64))
    x = torch.tensor([0.8, 0.6], dtype=torch.float64).view(1, 1, 1, 2)
    seen = []
    model.register_forward_pre_hook(lambda _, given: seen.append(given[0].detach().flatten()))
    CWL2(steps=2, step_size=0.1, binary_search_steps=1)(model, x, torch.tensor([0]))
    w = torch.atanh((2 * x.flatten() - 1) * 0.999999)
    away = torch.tensor([-1.0, 1.0], dtype=torch.float64)
    torch.testing.assert_close(seen[0], x.flatten())
    torch.testing.assert_close(seen[1], (w.tanh() + 1) / 2)
    torch.testing.assert_close(seen[2], ((w + 0.1 * away).tanh() + 1) / 2, rtol=0, atol=1e-5)


# The rest ---------------------------------------------------------------------------------------------------------


def test_rho_adv_by_hand():
    """(5 / 10 + 1 / 2) / 2, and (4 / 8 + 1 / 2) / 2 by the largest pixel."""
    x = torch.tensor([[6.0, 8.0], [2.0, 0.0]]).view(2, 1, 1, 2)
    delta = torch.tensor([[3.0, 4.0], [0.0, 1.0]]).view(2, 1, 1, 2)
    assert geometry.rho_adv(x + delta, x).item() == pytest.approx(0.5)
    assert geometry.rho_adv(x + 2 * delta, x, "linf").item() == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (partial(DeepFool, norm="l1"), "norm='l1' is unknown: choose one of l2, linf"),
        (partial(DeepFool, steps=0), "steps=0 must be a whole number of at least 1"),
        (partial(DeepFool, overshoot=-0.1), "overshoot=-0.1 must be a finite number of at least 0"),
        (partial(DeepFool, candidates=1), "candidates=1 must be at least 2"),
        (partial(CWL2, steps=0), "steps=0 must be a whole number of at least 1"),
        (partial(CWL2, binary_search_steps=0), "binary_search_steps=0 must be a whole number of at least 1"),
        (partial(CWL2, initial_const=0.0), "initial_const=0.0 must be above 0"),
        (partial(CWL2, kappa=-1.0), "kappa=-1.0 must be a finite number of at least 0"),
        (partial(CWL2, step_size=0), "step_size=0 must be above 0"),
    ],
)
def test_arguments_out_of_range_are_refused(make, complaint):
    with pytest.raises(ValueError, match=complaint):
        make()
