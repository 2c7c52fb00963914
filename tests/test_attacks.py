"""What holds for every attack, in one table; and what the gradient attacks reach where the answer is known."""

import copy
import random
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from robust_pl.callbacks import FGSM, PGD, Attack
from robust_pl.callbacks.attacks.draws import CHUNK, SampleDraws, StreamDraws, seed_from
from robust_pl.callbacks.attacks.minimal import MinimalNormAttack
from robust_pl.callbacks.attacks.problem import Objective
from robust_pl.functional import geometry, losses
from robust_pl.nets import Normalize
from tests.attack_table import ATTACKS, SLOW

CLASSES = 3
every_attack = pytest.mark.parametrize(
    "make", [pytest.param(make, id=name, marks=[pytest.mark.slow] if name in SLOW else []) for name, make in ATTACKS]
)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """The tensors are tiny: threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# A small task -----------------------------------------------------------------------------------------------------


def network(dtype=torch.float32):
    """Convolutions with BatchNorm, on images (1, 8, 8)."""
    return nn.Sequential(
        Normalize([0.5], [0.25]),
        nn.Conv2d(1, 8, 3, 2, 1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, 1, 1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(128, CLASSES),
    ).to(dtype)


def samples(count, seed):
    """Three templates and noise."""
    generator = torch.Generator().manual_seed(7)
    templates = 0.35 + 0.3 * torch.rand(CLASSES, 1, 8, 8, generator=generator)
    generator.manual_seed(seed)
    y = torch.arange(count) % CLASSES
    noise = 0.12 * torch.randn(count, 1, 8, 8, generator=generator)
    return (templates[y] + noise).clamp(0, 1), y


@pytest.fixture(scope="module")
def trained():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = network()
    x, y = samples(192, seed=1)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    for _ in range(25):
        optimizer.zero_grad()
        losses.cross_entropy(net(x), y).mean().backward()
        optimizer.step()
    optimizer.zero_grad()
    return net.eval()


@pytest.fixture
def net(trained):
    return copy.deepcopy(trained)


@pytest.fixture
def batch():
    return samples(30, seed=2)


def linear(weight, bias=None):
    """Logits ``weight`` (K, D) times the pixels plus ``bias`` (K,)."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], dtype=weight.dtype)
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(torch.zeros(len(weight)) if bias is None else bias)
    return nn.Sequential(nn.Flatten(), layer)


def goal(attack, y):
    """Labels as an evaluation passes them: those to reach if the attack is targeted."""
    return attack.aim(y, CLASSES, torch.arange(len(y)))


def assert_inside(x_adv, x, eps, norm):
    assert x_adv.shape == x.shape
    assert torch.isfinite(x_adv).all()
    assert x_adv.min() >= 0 and x_adv.max() <= 1
    excess = geometry.size(x_adv.double() - x.double(), norm) - torch.as_tensor(eps).double().flatten()
    assert excess.max() <= 2e-6


# Every attack -----------------------------------------------------------------------------------------------------


@every_attack
def test_result_is_inside_ball_and_box(make, net, batch):
    attack, (x, y) = make(), batch
    x = x.clone()
    x[:3] = x[:3].round()  # black and white images, at the corners of the box
    x_adv = attack(net, x, goal(attack, y))
    assert_inside(x_adv, x, attack.eps, attack.norm)
    assert x_adv.dtype == torch.float32
    assert not x_adv.requires_grad
    assert (geometry.size(x_adv - x, attack.norm) > 0).all()  # and it moves


@every_attack
def test_eps_of_each_sample(make, net, batch):
    attack, (x, y) = make(), batch
    eps = attack.eps * torch.linspace(0, 1, len(x)).view(-1, 1, 1, 1)
    x_adv = attack(net, x, goal(attack, y), eps=eps)
    assert_inside(x_adv, x, eps, attack.norm)
    assert torch.equal(x_adv[0], x[0])
    moved = geometry.size(x_adv - x, attack.norm) > 0
    # A minimal perturbation is all or nothing: a small ball may hold none.
    assert moved[15 if isinstance(attack, MinimalNormAttack) else 1 :].all()


@every_attack
def test_eps_of_each_sample_at_construction(make, net, batch):
    x, y = batch
    eps = make().eps * torch.linspace(0, 1, len(x)).view(-1, 1, 1, 1)
    attack = type(make())(eps, **make.keywords)
    assert_inside(attack(net, x, goal(attack, y)), x, eps, attack.norm)


@every_attack
@pytest.mark.parametrize("zero", [0, 0.0, "0/255", torch.tensor(0.0), torch.zeros(30, 1, 1, 1)], ids=repr)
def test_eps_zero_returns_the_input(make, zero, net, batch):
    attack, (x, y) = make(), batch
    assert torch.equal(attack(net, x, goal(attack, y), eps=zero), x)


@every_attack
def test_the_network_is_left_as_it_was(make, net, batch):
    """Modes, requires_grad, gradients, running statistics, buffers and weights."""
    attack, (x, y) = make(), batch
    net.train()
    net[5].eval()  # modes may be mixed
    net[4].weight.requires_grad_(False)
    net[1].weight.grad = torch.full_like(net[1].weight, 0.5)

    def state():
        return (
            [m.training for m in net.modules()],
            [getattr(m, "track_running_stats", None) for m in net.modules()],
            [p.requires_grad for p in net.parameters()],
            [None if p.grad is None else p.grad.tolist() for p in net.parameters()],
            [(name, b.tolist()) for name, b in net.named_buffers()],
            [p.tolist() for p in net.parameters()],
        )

    before = state()
    attack(net, x, goal(attack, y))
    assert state() == before


@every_attack
def test_global_random_streams_are_untouched(make, net, batch):
    attack, (x, y) = make(), batch

    def streams():
        numpy = np.random.get_state()
        return torch.get_rng_state().tolist(), numpy[1].tolist(), numpy[2:], random.getstate()

    before = streams()
    attack(net, x, goal(attack, y))
    attack.run(net, x, goal(attack, y), index=torch.arange(len(x)))
    assert streams() == before


@every_attack
def test_global_seeds_do_not_matter(make, net, batch):
    attacks, (x, y) = (make(), make()), batch
    results = []
    for attack, seed in zip(attacks, (0, 1), strict=True):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            results.append(attack(net, x, goal(attack, y)))
    assert torch.equal(*results)


@every_attack
@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_works_where_gradients_are_off(make, mode, net, batch):
    expected = make()(net, batch[0], goal(make(), batch[1]))
    with mode():
        x, y = batch[0].clone(), goal(make(), batch[1]).clone()  # inference tensors in inference mode, labels included
        assert x.is_inference() == y.is_inference() == (mode is torch.inference_mode)
        found = make()(net, x, y)
        assert torch.is_inference_mode_enabled() == (mode is torch.inference_mode)
        assert not torch.is_grad_enabled()
    assert torch.equal(found, expected)
    assert all(p.requires_grad for p in net.parameters())


@every_attack
def test_autocast_keeps_the_ball(make, net, batch):
    attack, (x, y) = make(), batch
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert net(x).dtype == torch.bfloat16
        x_adv = attack(net, x, goal(attack, y))
    assert x_adv.dtype == torch.float32
    assert_inside(x_adv, x, attack.eps, attack.norm)
    assert (x_adv != x).any()


@every_attack
def test_bf16_images_keep_the_ball(make, net, batch):
    """The perturbation is kept in float32; the network sees the dtype of the images."""
    attack, (x, y) = make(), batch
    x, seen = x.bfloat16(), []
    net.bfloat16().register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].dtype))
    x_adv = attack(net, x, goal(attack, y))
    assert set(seen) == {torch.bfloat16}
    assert x_adv.dtype == torch.float32
    assert_inside(x_adv, x.float(), attack.eps, attack.norm)
    assert (x_adv != x).any()


@every_attack
def test_float64_stays_float64(make, net, batch):
    attack, (x, y) = make(), batch
    x_adv = attack(net.double(), x.double(), goal(attack, y))
    assert x_adv.dtype == torch.float64
    assert_inside(x_adv, x.double(), attack.eps, attack.norm)


@every_attack
def test_seeds_reproduce(make, net, batch):
    x, y = batch
    y = goal(make(), y)
    first, again, other = make(seed=3)(net, x, y), make(seed=3)(net, x, y), make(seed=4)(net, x, y)
    assert torch.equal(first, again)
    assert torch.equal(first, other) == (not make().is_random)


@every_attack
def test_the_stream_advances_between_calls_and_resumes(make, net, batch):
    attack, (x, y) = make(), batch
    y = goal(attack, y)
    first = attack(net, x, y)
    saved = attack.training_state()
    second = attack(net, x, y)
    assert torch.equal(first, second) == (not attack.is_random)
    resumed = make()
    resumed.load_training_state(saved)
    assert torch.equal(resumed(net, x, y), second)
    assert resumed.training_state() == attack.training_state()


@every_attack
def test_processes_start_at_different_points(make, net, batch):
    x, y = batch
    y = goal(make(), y)
    zero, one = (make().run(net, x, y, rank=rank).x_adv for rank in (0, 1))
    assert torch.equal(make()(net, x, y), zero)
    assert torch.equal(zero, one) == (not make().is_random)


@every_attack
def test_the_attack_succeeds(make, net, batch):
    attack, (x, y) = make(), batch
    aim = goal(attack, y)
    clean = net(x)
    attacked = net(attack(net, x, aim))
    right = (attacked.argmax(1) == y).float().mean()
    assert (clean.argmax(1) == y).float().mean() > 0.9
    if attack.targeted:
        assert (clean.argmax(1) == aim).float().mean() < 0.1
        assert (attacked.argmax(1) == aim).float().mean() > 0.9
    elif attack.objective == "kl":
        assert losses.kl_divergence(attacked, clean).mean() > 1.0
        assert right < 0.8
    else:
        assert (losses.margin(attacked, y) > losses.margin(clean, y)).float().mean() > 0.9
        assert right < 0.8


@every_attack
def test_a_larger_ball_never_fools_less(make):
    """On two classes and a linear network."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(2, 16, generator=generator)
    x = 0.3 + 0.4 * torch.rand(200, 1, 4, 4, generator=generator)
    attack, model = make(), linear(weight, -(weight * 0.5).sum(1))
    largest = {"linf": 0.1, "l2": 0.5, "l1": 1.0}[attack.norm]
    y = model(x).argmax(1)
    aim = attack.aim(y, 2, torch.arange(200))
    fooled = [
        (model(make()(model, x, aim, eps=largest * part)).argmax(1) != y).sum().item()
        for part in (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)
    ]
    assert fooled == sorted(fooled)
    assert fooled[0] == 0
    # The divergence grows on both sides: half of the samples become surer.
    assert fooled[-1] > (80 if attack.objective == "kl" else 180)


@every_attack
def test_the_input_is_not_written_to(make, net, batch):
    attack, (x, y) = make(), batch
    y = goal(attack, y)
    before = x.clone(), y.clone()
    results = [attack(net, x, y), attack(net, x, y, eps=0)]
    assert torch.equal(x, before[0]) and torch.equal(y, before[1])
    for x_adv in results:
        x_adv.fill_(0.5)  # the result is the caller's own
    assert torch.equal(x, before[0])


@every_attack
def test_with_an_index_batches_order_and_subset_do_not_matter(make, net, batch):
    attack, (x, y) = make(), batch
    if attack.bn_mode != "eval":
        pytest.skip("BatchNorm ties the samples of a batch together")
    if not attack.per_sample:
        pytest.skip("the samples of a batch learn from each other")
    net, x, y = net.double(), x.double(), goal(attack, y)
    index = torch.arange(len(x)) * 7 + 5  # not a range, and over several chunks
    assert len(torch.unique(index // CHUNK)) > 5
    whole = attack.run(net, x, y, index=index).x_adv
    again = attack.run(net, x, y, index=index).x_adv  # calls before do not matter
    assert torch.equal(again, whole)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    shuffled = make().run(net, x[order], y[order], index=index[order]).x_adv
    torch.testing.assert_close(shuffled, whole[order], atol=1e-9, rtol=0)
    parts = [make().run(net, x[s], y[s], index=index[s], rank=3).x_adv for s in (order[:1], order[1:20], order[20:])]
    torch.testing.assert_close(torch.cat(parts), whole[order], atol=1e-9, rtol=0)


@every_attack
def test_with_an_index_the_seed_and_the_name_tell_attacks_apart(make, net, batch):
    x, y = batch
    index, y = torch.arange(len(x)), goal(make(), y)
    results = [make(seed=seed).run(net, x, y, index=index).x_adv for seed in (0, 1)]
    named = make()
    named.name = "another"
    results.append(named.run(net, x, y, index=index).x_adv)
    for other in results[1:]:
        assert torch.equal(results[0], other) == (not make().is_random)


class Counting(nn.Module):
    """Counts the samples that pass forwards and backwards."""

    def __init__(self, net):
        super().__init__()
        self.net, self.forwards, self.backwards = net, 0, 0

    def forward(self, x):
        self.forwards += len(x)
        logits = self.net(x)
        if logits.requires_grad:
            logits.register_hook(self._count)
        return logits

    def _count(self, gradient):
        self.backwards += len(gradient)


@every_attack
def test_reported_passes_are_those_that_the_network_saw(make, net, batch):
    attack, (x, y) = make(), batch
    model, y = Counting(net), goal(attack, y)
    first = attack.run(model, x, y)
    assert (first.forwards, first.backwards) == (model.forwards, model.backwards)
    assert first.forwards > 0
    attack(model, x[:7], y[:7])
    assert (attack.forwards, attack.backwards) == (model.forwards, model.backwards)
    assert (attack.calls, attack.samples) == (2, len(x) + 7)


@every_attack
def test_mixed_labels_of_one_class_are_labels(make, net, batch):
    attack, (x, y) = make(), batch
    y = goal(attack, y)
    mixed = torch.nn.functional.one_hot(y, CLASSES).float()
    torch.testing.assert_close(make()(net, x, mixed), attack(net, x, y), atol=1e-6, rtol=0)


@every_attack
def test_a_batch_of_one(make, net, batch):
    attack, (x, y) = make(), batch
    x_adv = attack(net, x[:1], goal(attack, y)[:1])
    assert_inside(x_adv, x[:1], attack.eps, attack.norm)


# Draws ------------------------------------------------------------------------------------------------------------


def test_seeds_are_the_same_on_every_machine():
    assert seed_from(0) == 2631537505891389924
    assert seed_from(0, "PGD", 1) == 5234230741831372691
    assert len({seed_from(0, 1), seed_from(1, 0), seed_from("0", 1), seed_from(0, 1, 0), seed_from(0)}) == 5
    assert all(0 <= seed_from(i) < 2**63 for i in range(1000))


@pytest.mark.parametrize("kind", ["uniform", "normal"])
def test_sample_draws_belong_to_samples(kind):
    like = torch.empty(40, 2, 3, 3)

    def draw(index, key=(0, "pgd", 0), times=1):
        draws = SampleDraws(key, index)
        for _ in range(times):
            numbers = getattr(draws, kind)(like[: len(index)])
        return numbers

    index = torch.arange(40) * 3
    whole = draw(index)
    assert whole.shape == like.shape
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))[:25]
    assert torch.equal(draw(index[order]), whole[order])
    assert torch.equal(draw(index[7:8]), whole[7:8])
    assert torch.equal(draw(torch.tensor([5, 5]))[0], draw(torch.tensor([5, 5]))[1])
    assert len(torch.unique(whole.flatten(1), dim=0)) == 40  # no two samples share numbers
    others = [draw(index, key) for key in ((1, "pgd", 0), (0, "x", 0), (0, "pgd", 1))]
    for other in (*others, draw(index, times=2)):
        assert (other != whole).flatten(1).any(1).all()


@pytest.mark.parametrize("source", [SampleDraws((0,), torch.arange(500)), StreamDraws(0, torch.device("cpu"))])
def test_draws_have_the_right_distribution(source):
    like = torch.empty(500, 1, 8, 8)
    uniform, normal = source.uniform(like), source.normal(like)
    assert uniform.min() >= 0 and uniform.max() < 1
    assert uniform.mean().item() == pytest.approx(0.5, abs=0.01)
    assert uniform.var().item() == pytest.approx(1 / 12, rel=0.03)
    assert normal.mean().item() == pytest.approx(0.0, abs=0.02)
    assert normal.var().item() == pytest.approx(1.0, rel=0.03)
    assert source.uniform(like.double()[:2]).dtype == torch.float64


# Known answers ----------------------------------------------------------------------------------------------------


@pytest.fixture
def plane():
    """Two classes and a linear network in float64, images far from the edges of the box; w = w_1 - w_0."""
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(2, 48, generator=generator, dtype=torch.float64)
    x = 0.4 + 0.2 * torch.rand(10, 3, 4, 4, generator=generator, dtype=torch.float64)
    y = torch.arange(10) % 2
    sign = torch.where(y == 0, 1.0, -1.0).double().view(-1, 1, 1, 1)
    return linear(weight), x, y, sign * (weight[1] - weight[0]).view(1, 3, 4, 4)


@pytest.mark.parametrize("objective", ["ce", "margin"])
@pytest.mark.parametrize("make", [partial(FGSM, 0.1), partial(PGD, 0.1), partial(PGD, 0.1, random_start=False)])
def test_linf_reaches_the_worst_case_of_a_linear_network(make, objective, plane):
    """max of w.d over |d|_inf <= eps is eps * |w|_1, at d = eps * sign(w)."""
    model, x, y, w = plane
    x_adv = make(objective=objective)(model, x, y)
    torch.testing.assert_close(x_adv, x + 0.1 * w.sign())
    rise = losses.margin(model(x_adv), y) - losses.margin(model(x), y)
    torch.testing.assert_close(rise, 0.1 * w.flatten(1).abs().sum(1))


@pytest.mark.parametrize("objective", ["ce", "margin"])
@pytest.mark.parametrize("make", [partial(FGSM, 0.3), partial(PGD, 0.3, random_start=False)])
def test_l2_reaches_the_worst_case_of_a_linear_network(make, objective, plane):
    """max of w.d over |d|_2 <= eps is eps * |w|_2, at d = eps * w / |w|_2."""
    model, x, y, w = plane
    x_adv = make(norm="l2", objective=objective)(model, x, y)
    torch.testing.assert_close(x_adv, x + 0.3 * w / w.flatten(1).norm(dim=1).view(-1, 1, 1, 1))


def test_l2_from_a_random_start_comes_close(plane):
    model, x, y, w = plane
    x_adv = PGD(0.3, steps=40, norm="l2")(model, x, y)
    rise = losses.margin(model(x_adv), y) - losses.margin(model(x), y)
    best = 0.3 * w.flatten(1).norm(dim=1)
    assert (rise <= best * (1 + 1e-9)).all()
    assert (rise >= 0.98 * best).all()


def test_l1_reaches_the_worst_case_of_a_linear_network(plane):
    """max of w.d over |d|_1 <= eps is eps * |w|_inf: all of it in one pixel."""
    model, x, y, w = plane
    x_adv = FGSM(0.3, norm="l1")(model, x, y)
    rise = losses.margin(model(x_adv), y) - losses.margin(model(x), y)
    torch.testing.assert_close(rise, 0.3 * w.flatten(1).abs().amax(1))


def test_the_box_cuts_the_worst_case(plane):
    model, x, y, w = plane
    x = x.round()
    torch.testing.assert_close(PGD(0.1)(model, x, y), (x + 0.1 * w.sign()).clamp(0, 1))


def test_targeted_is_the_opposite_direction(plane):
    model, x, y, w = plane
    towards = FGSM(0.1, targeted=True)(model, x, y)  # the label to reach is the right one
    torch.testing.assert_close(towards, x - 0.1 * w.sign())
    torch.testing.assert_close(FGSM(0.1, targeted=True)(model, x, 1 - y), FGSM(0.1)(model, x, y))


@pytest.mark.parametrize("objective", ["ce", "margin"])
def test_targeted_reaches_every_target_on_an_easy_network(objective):
    """Three classes by three pixels."""
    model = linear(10 * torch.eye(3))
    x = torch.full((3, 1, 1, 3), 0.5) + 0.05 * torch.eye(3).view(3, 1, 1, 3)
    for target in range(3):
        aim = torch.full((3,), target)
        x_adv = PGD(0.1, steps=5, targeted=True, objective=objective)(model, x, aim)
        assert model(x_adv).argmax(1).tolist() == [target] * 3


def test_fgsm_takes_its_step_size(plane):
    model, x, y, w = plane
    torch.testing.assert_close(FGSM(0.1, step_size=0.03)(model, x, y), x + 0.03 * w.sign())
    torch.testing.assert_close(FGSM(0.1, step_size=0.5)(model, x, y), x + 0.1 * w.sign())  # projected


def test_pgd_walks_step_by_step(plane):
    """Without a random start, three steps of 0.02 are 0.06; the default step is 2.5 * eps / steps."""
    model, x, y, w = plane
    still = partial(PGD, 0.1, random_start=False)
    torch.testing.assert_close(still(step_size=0.02, steps=3)(model, x, y), x + 0.06 * w.sign())
    starts = [still(steps=5).run(model, x, y, eps=e).x_adv for e in (0.1, torch.full((10, 1, 1, 1), 0.1))]
    torch.testing.assert_close(*starts)
    seen = []
    hook = model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach().clone()))
    still(steps=10)(model, x, y)
    hook.remove()
    torch.testing.assert_close(seen[1], x + 0.025 * w.sign())
    torch.testing.assert_close(seen[2], x + 0.050 * w.sign())
    assert len(seen) == 10


@pytest.mark.parametrize(
    ("objective", "expected"),
    [
        ("ce", lambda p, q, y, w: (q - y) @ w),
        ("kl", lambda p, q, y, w: (q - p) @ w),
        ("margin", lambda p, q, y, w: w[(q - 2 * y).argmax(1)] - y @ w),
    ],
)
def test_one_step_follows_the_gradient_of_the_objective(objective, expected):
    """By hand on a linear network of three classes, with p and q the softmax at x and at the start."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    x = 0.4 + 0.2 * torch.rand(5, 1, 2, 2, generator=generator, dtype=torch.float64)
    y = torch.tensor([0, 1, 2, 0, 1])
    model = linear(weight)
    attack = PGD(0.1, step_size=0.01, steps=1, norm="l2", random_start="normal", objective=objective)
    attacked = attack.run(model, x, y)
    assert 1e-4 < (attacked.start - x).abs().mean() < 2e-3  # x + 0.001 * N(0, 1)
    torch.testing.assert_close(attacked.first_logits, model(attacked.start).detach())
    p, q = model(x).softmax(1), attacked.first_logits.softmax(1)
    gradient = expected(p, q, torch.nn.functional.one_hot(y, 3).double(), weight).detach()
    step = 0.01 * gradient / gradient.norm(dim=1, keepdim=True)
    torch.testing.assert_close(attacked.x_adv, attacked.start + step.view_as(x))


def test_a_mixed_label_pulls_away_from_both_classes():
    weight = torch.eye(3, dtype=torch.float64)
    x, mixed = torch.full((1, 1, 1, 3), 0.5, dtype=torch.float64), torch.tensor([[0.5, 0.5, 0.0]], dtype=torch.float64)
    x_adv = FGSM(0.1)(linear(weight), x, mixed)
    torch.testing.assert_close(x_adv.flatten(), torch.tensor([0.4, 0.4, 0.6], dtype=torch.float64))


# Restarts ---------------------------------------------------------------------------------------------------------


class Bumpy(nn.Module):
    """Two classes; the objective has many local maxima in each pixel, so that the start decides."""

    def forward(self, x):
        waves = torch.cos(60 * (x - 0.13)) + 2 * (x - 0.5)
        height = waves.flatten(1).sum(1)
        return torch.stack([torch.full_like(height, 2.6), height], 1)


@pytest.fixture
def bumps():
    x = torch.rand(60, 1, 1, 3, generator=torch.Generator().manual_seed(1))
    return Bumpy(), x, torch.zeros(60, dtype=torch.int64)


@pytest.mark.parametrize("index", [None, torch.arange(60)], ids=["stream", "index"])
def test_restarts_are_never_worse_and_keep_what_fools(bumps, index):
    model, x, y = bumps
    once = PGD(0.15, 0.01, steps=8).run(model, x, y, index=index)
    fooled, counts = losses.margin(model(once.x_adv), y) > 0, []
    assert 0 < fooled.sum() < 50
    for restarts in (2, 4, 8):
        more = PGD(0.15, 0.01, steps=8, restarts=restarts).run(model, x, y, index=index)
        value = losses.margin(model(more.x_adv), y)
        assert torch.equal(more.x_adv[fooled], once.x_adv[fooled])
        assert (value >= losses.margin(model(once.x_adv), y)).all()
        assert_inside(more.x_adv, x, 0.15, "linf")
        counts.append((value > 0).sum().item())
    assert fooled.sum().item() < counts[0] <= counts[1] <= counts[2]


def test_restarts_with_eps_and_objectives_of_each_sample(bumps):
    model, x, y = bumps
    eps = torch.linspace(0, 0.15, 60).view(-1, 1, 1, 1)
    reference = torch.zeros(60, 2)
    reference[:, 0] = torch.linspace(0, 5, 60)
    for objective in (None, Objective(losses.kl_divergence, (reference,))):
        x_adv = PGD(0.15, 0.01, steps=4, restarts=3).run(model, x, y, eps=eps, objective=objective).x_adv
        assert_inside(x_adv, x, eps, "linf")


class Scripted(Attack):
    """Returns one prepared image a try, and notes where a random start would have been."""

    def __init__(self, script, restarts):
        super().__init__(0.5, objective="ce", restarts=restarts)
        self.script, self.starts = list(script), []

    def perturb(self, problem, x, y):
        self.starts.append(problem.random_start(True))
        return torch.tensor(self.script[len(self.starts) - 1]).expand_as(x)


@pytest.mark.parametrize("restarts", [1, 2, 3])
def test_what_fools_beats_what_has_the_larger_objective(restarts):
    """By hand, three pixels as logits and label 0: the second try fools with a lower cross-entropy than the others."""
    surest, fools, unsure = [1.0, 0.9, 0.9], [0.8, 0.85, 0.0], [1.0, 0.95, 0.95]
    model, x, y = linear(torch.eye(3) * 4), torch.full((1, 1, 1, 3), 0.5), torch.zeros(1, dtype=torch.int64)
    entropies = [losses.cross_entropy(4 * torch.tensor([z]), y).item() for z in (fools, surest, unsure)]
    assert entropies == sorted(entropies)
    x_adv = Scripted([surest, fools, unsure], restarts)(model, x, y)
    assert x_adv.flatten().tolist() == pytest.approx(surest if restarts == 1 else fools)
    # Where nothing fools, the larger objective stays.
    for script in ([surest, unsure, surest], [unsure, surest, surest]):
        x_adv = Scripted(script, 3)(model, x, y)
        assert x_adv.flatten().tolist() == pytest.approx(unsure)


@pytest.mark.parametrize("index", [None, torch.arange(4)], ids=["stream", "index"])
def test_each_restart_begins_elsewhere(index):
    model = linear(torch.ones(2, 3), torch.tensor([100.0, 0.0]))
    attack = Scripted([[0.5]] * 4, restarts=4)
    attack.run(model, torch.full((4, 1, 1, 3), 0.5), torch.zeros(4, dtype=torch.int64), index=index)
    starts = torch.cat(attack.starts).flatten(1)
    assert len(torch.unique(starts, dim=0)) == len(starts) == 16


def test_restarts_of_a_targeted_attack_stop_where_the_target_is_reached(bumps):
    model, x, y = bumps
    towards = partial(PGD, 0.15, 0.01, steps=8, targeted=True)
    aim = torch.ones_like(y)
    once, more = (towards(restarts=n)(model, x, aim) for n in (1, 6))
    reached = model(once).argmax(1) == 1
    assert torch.equal(more[reached], once[reached])
    assert (model(more).argmax(1) == 1).sum() > reached.sum()


# Passes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "forwards", "backwards"),
    [
        (partial(FGSM), 1, 1),
        (partial(FGSM, objective="kl", random_start="normal"), 2, 1),
        (partial(FGSM, random_start=True, restarts=3), 3 + 3, 3),
        (partial(PGD), 10, 10),
        (partial(PGD, steps=4), 4, 4),
        (partial(PGD, steps=4, objective="margin"), 4, 4),
        (partial(PGD, steps=4, objective="kl"), 4 + 1, 4),
        (partial(PGD, steps=4, restarts=3), 3 * (4 + 1), 3 * 4),
        (partial(PGD, steps=4, restarts=2, objective="kl"), 2 * (4 + 1) + 1, 2 * 4),
    ],
)
def test_passes_by_hand_where_nothing_is_fooled(make, forwards, backwards):
    x, y = torch.rand(6, 1, 2, 2, generator=torch.Generator().manual_seed(0)), torch.zeros(6, dtype=torch.int64)
    model = Counting(linear(torch.ones(2, 4), torch.tensor([100.0, 0.0])))
    attacked = make().run(model, x, y)
    assert (attacked.forwards, attacked.backwards) == (6 * forwards, 6 * backwards)
    assert (model.forwards, model.backwards) == (6 * forwards, 6 * backwards)


def test_restarts_run_only_on_samples_that_stand():
    """Two of six samples are misclassified from the beginning; they cost one try and its judgement."""
    x = torch.full((6, 1, 2, 2), 0.5)
    y = torch.tensor([0, 0, 0, 0, 1, 1])
    model = Counting(linear(torch.ones(2, 4), torch.tensor([100.0, 0.0])))
    attacked = PGD(steps=4, restarts=3).run(model, x, y)
    assert attacked.forwards == model.forwards == 6 * 5 + 2 * 4 * 5
    assert attacked.backwards == model.backwards == 6 * 4 + 2 * 4 * 4


def test_restarts_stop_when_nothing_stands():
    x, y = torch.full((6, 1, 2, 2), 0.5), torch.ones(6, dtype=torch.int64)
    model = Counting(linear(torch.ones(2, 4), torch.tensor([100.0, 0.0])))
    attacked = PGD(steps=4, restarts=50).run(model, x, y)
    assert attacked.forwards == model.forwards == 6 * 5


# Aim --------------------------------------------------------------------------------------------------------------


def test_an_evaluation_aims_at_a_random_other_class():
    y, index = torch.arange(2000) % 5, torch.arange(2000)
    assert FGSM().aim(y, 5, index) is y
    aim = FGSM(targeted=True).aim(y, 5, index)
    assert (aim != y).all() and aim.dtype == torch.int64
    assert aim.min() == 0 and aim.max() == 4
    shifts = torch.bincount((aim - y) % 5, minlength=5)
    assert shifts[0] == 0 and shifts[1:].min() > 400  # 500 expected
    order = torch.randperm(2000, generator=torch.Generator().manual_seed(0))[:100]
    assert torch.equal(FGSM(targeted=True).aim(y[order], 5, index[order]), aim[order])
    assert not torch.equal(FGSM(targeted=True, seed=1).aim(y, 5, index), aim)
