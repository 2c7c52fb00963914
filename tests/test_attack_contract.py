"""The contract of attacks, sentence by sentence (section 4 of the design).

What holds for each attack (the ball, the box, inference mode, random streams, bf16, counts) is in test_attacks.py.
"""

import re
import warnings
from functools import partial

import pytest
import torch
from torch import nn

from robust_pl.callbacks import FGSM, PGD, Attack
from robust_pl.callbacks.attacks.ledger import Attacked
from robust_pl.callbacks.attacks.problem import Objective
from robust_pl.functional import geometry, losses
from robust_pl.functional.gradients import input_gradient
from robust_pl.functional.ratio import Ratio
from robust_pl.nets import Frozen, Normalize


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """The tensors are tiny: threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def images(count=8, side=4, seed=0):
    x = torch.rand(count, 1, side, side, generator=torch.Generator().manual_seed(seed))
    return x, torch.arange(count) % 3


def normed(**bn):
    """BatchNorm in front, so that its statistics are those of the pixels; dropout and a linear head."""
    torch.manual_seed(0)
    return nn.Sequential(nn.BatchNorm2d(1, **bn), nn.Flatten(), nn.ReLU(), nn.Linear(16, 3))


@pytest.fixture
def net():
    with torch.random.fork_rng():
        return normed()


def statistics(module):
    return [module.running_mean.clone(), module.running_var.clone(), module.num_batches_tracked.clone()]


def same(left, right):
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


# "Inputs float in [0, 1], shape (B, C, H, W)" ---------------------------------------------------------------------


def refused(complaint, error=ValueError):
    """An error of one sentence that says ``complaint``."""
    return pytest.raises(error, match=complaint)


def one_sentence(caught):
    text = str(caught.value)
    assert "\n" not in text and 20 < len(text) < 300


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (lambda x: x * 255, r"FGSM was given images with values outside \[0, 1\].*255"),
        (lambda x: x - 0.5, r"outside \[0, 1\] or NaN \(from -0\.5"),
        (lambda x: x.index_fill(0, torch.tensor([3]), float("nan")), r"or NaN \(from nan"),
        (lambda x: x.index_fill(0, torch.tensor([3]), float("inf")), r"to inf"),
    ],
)
def test_images_outside_the_box_are_refused(spoil, complaint, net):
    x, y = images()
    x[0, 0, 0, 0], x[0, 0, 0, 1] = 0.0, 1.0
    with refused(complaint) as caught:
        FGSM()(net, spoil(x), y)
    assert "Normalize" in str(caught.value)  # and it says where the normalisation belongs
    one_sentence(caught)


@pytest.mark.parametrize(
    "x", [torch.zeros(8, 1, 4, 4, dtype=torch.uint8), torch.zeros(8, 16), torch.zeros(8, 1, 4, 4, 1), [[0.0]]]
)
def test_what_is_no_image_is_refused(x, net):
    with refused(r"x is .*an attack needs float pixels \(B, C, H, W\) in \[0, 1\]", TypeError) as caught:
        FGSM()(net, x, torch.zeros(8, dtype=torch.int64))
    one_sentence(caught)


def test_no_image_at_all_is_refused(net):
    x, y = images()
    with refused("x holds no image: an attack needs at least one") as caught:
        FGSM()(net, x[:0], y[:0])
    one_sentence(caught)


@pytest.mark.parametrize(
    ("y", "complaint"),
    [
        (torch.zeros(7, dtype=torch.int64), r"y is \(7,\) for 8 samples"),
        (torch.zeros(8, 1, 1, dtype=torch.int64), r"y is \(8, 1, 1\)"),
        (torch.tensor(3), r"y is \(\)"),
        ([0] * 8, "y is list"),
        (torch.zeros(8, dtype=torch.int32), r"dtype torch\.int32: labels are int64"),
        (torch.zeros(8), r"dtype torch\.float32: labels are int64"),
        (torch.zeros(8, 3, dtype=torch.int64), r"dtype torch\.int64.*float \(B, K\) if mixed"),
    ],
)
def test_labels_of_the_wrong_kind_are_refused(y, complaint, net):
    with refused(complaint, TypeError) as caught:
        FGSM()(net, images()[0], y)
    one_sentence(caught)


@pytest.mark.parametrize("label", [-1, 3, 100])
def test_labels_out_of_range_are_refused(label, net):
    x, y = images()
    y[5] = label
    with refused(r"labels run from .* and the network has 3 logits") as caught:
        FGSM()(net, x, y)
    assert str(label) in str(caught.value)
    one_sentence(caught)


def test_mixed_labels_of_another_number_of_classes_are_refused(net):
    x, _ = images()
    with refused("mixed labels have 4 classes and the logits 3"):
        FGSM()(net, x, torch.full((8, 4), 0.25))


# "eps in pixel units of that range, a number or a tensor (B, 1, 1, 1)"; "8/255 is accepted" -----------------------


@pytest.mark.parametrize("eps", ["8/255", 8 / 255, Ratio("8/255"), torch.tensor(8 / 255), torch.full((8, 1, 1, 1), 8 / 255)])
def test_eps_may_be_written_in_many_ways(eps, net):
    x, y = images()
    expected = FGSM()(net, x, y)
    assert torch.equal(FGSM(eps)(net, x, y), expected)
    assert torch.equal(FGSM(0.5)(net, x, y, eps=eps), expected)


def test_eps_keeps_its_text():
    assert str(PGD("8/255", "2/255").eps) == "8/255"
    assert str(PGD("8/255", "2/255").step_size) == "2/255"


@pytest.mark.parametrize("make", [FGSM, PGD])
@pytest.mark.parametrize(
    ("eps", "complaint"),
    [
        (-0.1, "eps=-0.1 must be a finite number of at least 0"),
        (float("nan"), "eps=nan must be a finite number"),
        (float("inf"), "eps=inf must be a finite number"),
        (8, r"eps=8 is above 1, and pixels lie in \[0, 1\]: did you mean 8/255"),
        (300, r"eps=300 is above 1, and pixels lie in \[0, 1\]$"),
        ("eight", "'eight' is not a number"),
        (torch.tensor([0.1, -0.1]).view(2, 1, 1, 1), "8/255"),
        (torch.tensor(float("nan")), "8/255"),
        (torch.tensor(8.0), "8/255"),
    ],
)
def test_radii_that_cannot_be_meant_are_refused(make, eps, complaint):
    with refused(complaint) as caught:
        make(eps)
    one_sentence(caught)


def test_radii_of_a_call_are_checked_too(net):
    x, y = images()
    with refused("did you mean 8/255"):
        FGSM()(net, x, y, eps=8)
    with refused("write 8/255"):
        FGSM()(net, x, y, eps=torch.full((8, 1, 1, 1), 8.0))


@pytest.mark.parametrize("shape", [(8,), (7, 1, 1, 1), (8, 1), (8, 1, 4, 4), (1, 8, 1, 1)])
def test_eps_of_the_wrong_shape_is_refused(shape, net):
    x, y = images()
    with refused(re.escape(f"eps has shape {shape}: per-sample eps for this batch is (8, 1, 1, 1)")) as caught:
        FGSM()(net, x, y, eps=torch.full(shape, 0.1))
    one_sentence(caught)


def test_a_very_large_l2_radius_warns():
    with pytest.warns(UserWarning, match="did you mean 128/255"):
        PGD(128, norm="l2")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        PGD(0.5, norm="l2")
        PGD(3, norm="l2")
        PGD(12, norm="l1")


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (partial(PGD, step_size=0), "step_size=0 must be above 0, such as 2/255"),
        (partial(PGD, step_size=-0.1), "step_size=-0.1 must be above 0"),
        (partial(FGSM, step_size="0/255"), "step_size=0/255 must be above 0"),
        (partial(FGSM, step_size=float("nan")), "step_size=nan must be above 0"),
        (partial(PGD, steps=0), "steps=0 must be a whole number of at least 1"),
        (partial(PGD, restarts=0), "restarts=0 must be at least 1"),
        (partial(FGSM, restarts=-1), "restarts=-1 must be at least 1"),
        (partial(PGD, norm="l3"), "norm='l3' is unknown: choose one of linf, l2, l1"),
        (partial(PGD, norm="Linf"), "norm='Linf' is unknown"),
        (partial(PGD, objective="cw"), "objective='cw' is unknown: choose one of ce, ce_hard, kl, margin"),
        (partial(PGD, bn_mode="test"), "bn_mode='test' is unknown: choose one of eval, train, train_no_track"),
        (
            partial(PGD, random_start="uniform"),
            "random_start='uniform' is unknown: choose True, False, 'normal' or 'bernoulli'",
        ),
        (partial(PGD, random_start=None), "random_start=None is unknown"),
        (partial(PGD, targeted=True, objective="kl"), "objective='kl' has no target to reach"),
    ],
)
def test_arguments_out_of_range_are_refused(make, complaint):
    with refused(re.escape(complaint)) as caught:
        make()
    one_sentence(caught)


# "sees a classifier that maps [0, 1] pixels to logits" ------------------------------------------------------------


class Returning(nn.Module):
    def __init__(self, make):
        super().__init__()
        self.make = make

    def forward(self, x):
        return self.make(x.flatten(1))


@pytest.mark.parametrize(
    ("make", "complaint", "error"),
    [
        (lambda z: z[:, :3].softmax(1), "looks like softmax", ValueError),
        (lambda z: z.sum(1), r"the network returned shape \(8,\) for 8 samples: logits are \(B, K\)", ValueError),
        (lambda z: z[:4, :3], r"shape \(4, 3\) for 8 samples", ValueError),
        (lambda z: z.view(8, 1, 4, 4), r"shape \(8, 1, 4, 4\)", ValueError),
        (lambda z: (z, z), "the network returned a tuple: an attack needs a tensor of logits", TypeError),
        (lambda z: {"logits": z}, "the network returned a dict", TypeError),
    ],
)
@pytest.mark.parametrize("attack", [FGSM(), PGD(objective="kl", random_start="normal")], ids=["ce", "kl"])
def test_outputs_that_are_no_logits_are_refused(attack, make, complaint, error):
    with refused(complaint, error) as caught:
        attack(Returning(make), *images())
    one_sentence(caught)


def test_logits_that_are_positive_or_sum_to_one_are_no_softmax():
    x, y = images()
    FGSM()(Returning(lambda z: z[:, :3]), x, y)  # positive
    FGSM()(Returning(lambda z: z[:, :3] - z[:, :3].mean(1, keepdim=True) + 1 / 3), x, y)  # sums to one
    FGSM()(Returning(lambda z: z[:, :3].log_softmax(1)), x, y)


# "One place prepares and restores everything" ---------------------------------------------------------------------


def test_everything_is_restored_after_an_error_too(net):
    net.train()
    x, y = images()
    for bn_mode in ("eval", "train", "train_no_track"):
        with pytest.raises(ValueError, match="outside"):
            FGSM(bn_mode=bn_mode)(net, x + 5, y)
        with pytest.raises(ValueError, match="left its ball"):
            Far(bn_mode=bn_mode)(net, x, y)
        assert all(m.training for m in net.modules())
        assert all(p.requires_grad for p in net.parameters())
        assert net[0].track_running_stats
        assert torch.is_grad_enabled()


class Watching(Attack):
    """Notes the state of the network while it is attacked."""

    def perturb(self, problem, x, y):
        modules = list(problem.model.modules())
        self.modes = [m.training for m in modules]
        self.required = [p.requires_grad for p in problem.model.parameters()]
        self.tensors = x, y
        self.grad_enabled, self.inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        problem.gradient(x)
        return x


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("bn_mode", ["eval", "train", "train_no_track"])
def test_the_network_while_it_is_attacked(bn_mode, before, net):
    """'leaves inference mode, enables grad, clones x and y, freezes parameters, sets the mode of every submodule'"""
    net.train(before)
    attack = Watching(bn_mode=bn_mode)
    x, y = images()
    with torch.inference_mode():
        x, y = x.clone(), y.clone()
        attack(net, x, y)
    assert set(attack.modes) == {bn_mode != "eval"}
    assert not any(attack.required)
    assert attack.grad_enabled and not attack.inference
    for mine, callers in zip(attack.tensors, (x, y), strict=True):
        assert torch.equal(mine, callers)
        assert not mine.is_inference()
        assert mine.data_ptr() != callers.data_ptr()
    assert [m.training for m in net.modules()] == [before] * 5
    assert net[0].track_running_stats


@pytest.mark.parametrize("before", [True, False])
def test_bn_mode_train_moves_statistics_once_a_forward_pass(before, net):
    """'bn_mode: eval, train, or train without updating statistics'"""
    net.train(before)
    x, y = images()
    PGD(eps=0.0, steps=5, random_start=False, bn_mode="train")(net, x, y)
    assert net[0].num_batches_tracked == 5
    # eps = 0: each pass sees x, and each moves the mean by a tenth of what is left.
    torch.testing.assert_close(net[0].running_mean, x.mean().view(1) * (1 - 0.9**5))
    assert net[0].training is before


@pytest.mark.parametrize("bn_mode", ["eval", "train_no_track"])
def test_other_modes_do_not_move_statistics(bn_mode, net):
    net.train()
    before = statistics(net[0])
    PGD(steps=5, bn_mode=bn_mode, objective="kl", restarts=2)(net, *images())
    assert same(statistics(net[0]), before)
    assert net[0].track_running_stats and net[0].training


def test_train_modes_use_the_statistics_of_the_batch(net):
    x, y = images()
    net.eval()
    by_running = net(x)
    net.train()
    net[0].momentum = 0.0  # look, but do not move
    by_batch = net(x)
    assert (by_running - by_batch).abs().max() > 0.1
    logits = {mode: FGSM(bn_mode=mode).run(net, x, y).first_logits for mode in ("eval", "train", "train_no_track")}
    torch.testing.assert_close(logits["eval"], by_running.detach())
    torch.testing.assert_close(logits["train"], by_batch.detach())
    torch.testing.assert_close(logits["train_no_track"], by_batch.detach())


def test_batchnorm_without_statistics_stays_without():
    net = normed(track_running_stats=False)
    for bn_mode in ("eval", "train", "train_no_track"):
        FGSM(bn_mode=bn_mode)(net, *images())
        assert net[0].track_running_stats is False and net[0].running_mean is None


class Pair(nn.Module):
    """A student beside a frozen teacher, and a part whose parameters are frozen by hand."""

    def __init__(self):
        super().__init__()
        self.student = normed()
        self.teacher = Frozen(normed())
        self.part = normed().requires_grad_(False).eval()

    def forward(self, x):
        return self.student(x) + self.teacher(x) + self.part(x)


@pytest.mark.parametrize("bn_mode", ["eval", "train", "train_no_track"])
def test_frozen_parts_stay_in_eval_mode(bn_mode):
    """'sets the mode of every submodule that is not frozen'"""
    pair = Pair()
    pair.student.train()
    before = statistics(pair.teacher.net[0]), statistics(pair.part[0])
    attack = Watching(bn_mode=bn_mode)
    attack(pair, *images())
    names = [name for name, _ in pair.named_modules()]
    modes = dict(zip(names, attack.modes, strict=True))
    assert {modes[n] for n in names if n.startswith(("teacher", "part"))} == {False}
    assert {modes[n] for n in names if n.startswith("student")} == {bn_mode != "eval"}
    assert same(statistics(pair.teacher.net[0]), before[0])
    assert same(statistics(pair.part[0]), before[1])
    assert pair.student[0].num_batches_tracked == (1 if bn_mode == "train" else 0)
    # Nothing that was frozen is thawed.
    assert [p.requires_grad for p in pair.part.parameters()] == [False] * 4
    assert [p.requires_grad for p in pair.teacher.parameters()] == [False] * 4
    assert [p.requires_grad for p in pair.student.parameters()] == [True] * 4


def test_frozen_parts_pass_gradients_to_the_input():
    teacher = Frozen(normed())
    x, y = images()
    assert (FGSM()(teacher, x, y) != x).any()


# "Gradients by one shared input_gradient" -------------------------------------------------------------------------


def test_loss_backward_leaks_and_an_attack_does_not(net):
    """'loss.backward() leaks into parameters and changes training under accumulate_grad_batches'"""
    x, y = images()
    losses.cross_entropy(net(x), y).mean().backward()  # the first micro-batch
    grads = [p.grad.clone() for p in net.parameters()]
    for attack in (FGSM(), PGD(steps=3, restarts=2, objective="kl", bn_mode="train_no_track")):
        attack(net, x, y)
        assert same([p.grad for p in net.parameters()], grads)
    input_gradient(net, x, lambda logits: losses.cross_entropy(logits, y), create_graph=True)
    assert same([p.grad for p in net.parameters()], grads)


def test_training_with_accumulation_is_that_of_the_same_fixed_examples():
    """Two micro-batches, attacked and accumulated, give the gradients of the same images without an attack."""
    x, y = images()

    def gradients(attack_between):
        with torch.random.fork_rng():
            net = normed().eval()
        for part in (slice(0, 4), slice(4, 8)):
            adversarial = attacked[part]
            if attack_between:
                assert torch.equal(FGSM()(net, x[part], y[part]), adversarial)
            losses.cross_entropy(net(adversarial), y[part]).mean().backward()
        return [p.grad for p in net.parameters()]

    with torch.random.fork_rng():
        attacked = FGSM()(normed(), x, y)
    assert same(gradients(True), gradients(False))


def test_input_gradient_by_hand():
    """logits = (x^2, 0): the objective is x^2, its gradient 2x."""
    x = torch.tensor([[0.5, 0.25]]).view(2, 1, 1, 1)
    square = Returning(lambda z: torch.cat([z * z, torch.zeros_like(z)], 1))
    gradient, logits = input_gradient(square, x, lambda logits: logits[:, 0])
    torch.testing.assert_close(gradient, 2 * x)
    torch.testing.assert_close(logits[:, 0], (x * x).flatten())
    assert not gradient.requires_grad and not logits.requires_grad
    assert not x.requires_grad
    with torch.no_grad():
        torch.testing.assert_close(input_gradient(square, x, lambda logits: logits[:, 0])[0], 2 * x)


def test_double_backward_by_hand():
    """'Double backward goes through the same function': with logit w * x^3 / 3, d/dw |d logit/dx|^2 = 2 w x^4."""
    w = nn.Parameter(torch.tensor(1.5, dtype=torch.float64))
    model = Returning(lambda z: w * z**3 / 3)
    x = torch.tensor([0.5, 0.8], dtype=torch.float64).view(2, 1, 1, 1)
    gradient, logits = input_gradient(model, x, lambda logits: logits.squeeze(1), create_graph=True)
    torch.testing.assert_close(gradient.detach(), 1.5 * x**2)
    assert logits.requires_grad  # the forward pass may be used for the loss, too
    (by_weight,) = torch.autograd.grad(gradient.square().sum(), w)
    torch.testing.assert_close(by_weight, (2 * 1.5 * x**4).sum())


def test_double_backward_agrees_with_finite_differences():
    """GradAlign's regulariser: one minus the cosine between the gradients at two points, differentiated by a weight."""
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(s, generator=generator, dtype=torch.float64) for s in ((6, 4), (3, 6)))
    x = torch.rand(2, 1, 2, 2, generator=generator, dtype=torch.float64)
    shifted, y = x + 0.05 * torch.randn(x.shape, generator=generator, dtype=torch.float64), torch.tensor([0, 2])

    def misalignment(weight):
        model = Returning(lambda z: torch.tanh(z @ weight.T) @ second.T)
        one, two = (
            input_gradient(model, point, lambda z: losses.cross_entropy(z, y), create_graph=True)[0].flatten(1)
            for point in (x, shifted)
        )
        return (1 - torch.cosine_similarity(one, two)).sum()

    assert misalignment(first) > 1e-4
    assert torch.autograd.gradcheck(misalignment, (first.requires_grad_(),))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_double_backward_refuses_compiled_networks(net):
    """'and refuses compiled networks, which cannot do it'"""
    x, y = images()
    compiled = torch.compile(net)  # nothing is compiled before the first call
    for model, name in ((compiled, "the network"), (nn.Sequential(compiled), "0")):
        with refused(f"{name} is compiled, and a compiled network cannot be differentiated twice") as caught:
            input_gradient(model, x, lambda z: losses.cross_entropy(z, y), create_graph=True)
        one_sentence(caught)


# "objective: null on an attack means the method's own inner objective" --------------------------------------------


class Noting:
    """An objective that counts its calls: pushes the second logit up."""

    def __init__(self):
        self.seen = []

    def __call__(self, logits, teacher):
        self.seen.append((logits.shape, teacher.shape))
        return (logits * teacher).sum(1)


def test_without_an_objective_the_callers_is_maximised(net):
    net.eval()
    x, y = images()
    teacher, noting = torch.tensor([[0.0, 1.0, 0.0]]).repeat(8, 1), Noting()
    attacked = FGSM(0.1).run(net, x, y, objective=Objective(noting, (teacher,)))
    assert noting.seen == [((8, 3), (8, 3))]
    gradient, _ = input_gradient(net, x, lambda logits: logits[:, 1])
    torch.testing.assert_close(attacked.x_adv, geometry.project(x + 0.1 * gradient.sign(), x, 0.1, "linf"))


def test_a_named_objective_wins_over_the_callers(net):
    x, y = images()
    noting = Noting()
    teacher = torch.zeros(8, 3)
    named = FGSM(0.1, objective="ce").run(net, x, y, objective=Objective(noting, (teacher,)))
    assert noting.seen == []
    assert torch.equal(named.x_adv, FGSM(0.1)(net, x, y))


def test_the_callers_objective_may_be_a_name(net):
    x, y = images()
    for name in ("ce", "margin", "kl"):
        by_caller = PGD(0.1, steps=2, random_start="normal").run(net, x, y, objective=name)
        by_name = PGD(0.1, steps=2, random_start="normal", objective=name).run(net, x, y)
        assert torch.equal(by_caller.x_adv, by_name.x_adv)
        assert by_caller.forwards == by_name.forwards == 8 * (3 if name == "kl" else 2)
    assert torch.equal(FGSM().run(net, x, y, objective=None).x_adv, FGSM(objective="ce")(net, x, y))


def test_rows_of_an_objective_follow_the_samples():
    objective = Objective(lambda logits, a, b: logits[:, 0] * a + b, (torch.arange(4.0), torch.arange(4.0) * 10))
    logits = torch.ones(4, 1)
    assert objective(logits).tolist() == [0.0, 11.0, 22.0, 33.0]
    kept = torch.tensor([3, 1])
    assert objective.rows(kept)(logits[kept]).tolist() == [33.0, 11.0]


# "Internally an attack may return more than x_adv" ----------------------------------------------------------------


def test_run_says_where_it_started_and_what_it_spent(net):
    net.eval()
    x, y = images()
    plain = FGSM(0.1).run(net, x, y)
    assert isinstance(plain, Attacked)
    assert torch.equal(plain.start, x)
    torch.testing.assert_close(plain.first_logits, net(x).detach())
    assert not plain.first_logits.requires_grad
    assert (plain.forwards, plain.backwards) == (8, 8)

    attacked = PGD(0.1, steps=4).run(net, x, y)
    assert 0.05 < (attacked.start - x).abs().max() <= 0.1 + 1e-6
    torch.testing.assert_close(attacked.first_logits, net(attacked.start).detach())
    assert (attacked.forwards, attacked.backwards) == (32, 32)
    # "callers get x_adv"
    assert torch.equal(PGD(0.1, steps=4)(net, x, y), attacked.x_adv)


def test_an_attack_without_gradients_has_no_start(net):
    class Still(Attack):
        def perturb(self, problem, x, y):
            return x

    x, y = images()
    attacked = Still().run(net, x, y)
    assert attacked.start is None and attacked.first_logits is None
    assert (attacked.forwards, attacked.backwards) == (0, 0)
    assert torch.equal(attacked.x_adv, x)


# "a newcomer writes one perturb(...) (FGSM: about 13 lines)" ------------------------------------------------------


class MyFGSM(Attack):
    """One signed step, as a user would write it."""

    def perturb(self, problem, x, y):
        gradient = problem.gradient(x)
        return problem.project(x + problem.eps * gradient.sign())


class MyNoise(Attack):
    """The best of a few random points: no gradient."""

    def perturb(self, problem, x, y):
        best, value = x, problem.objective(problem.logits(x))
        for _ in range(10):
            candidate = problem.random_start(True)
            new = problem.objective(problem.logits(candidate))
            best = torch.where((new > value).view(-1, 1, 1, 1), candidate, best)
            value = torch.maximum(value, new)
        return best


def test_an_attack_of_a_user_works(net):
    x, y = images()
    assert torch.equal(MyFGSM("8/255")(net, x, y), FGSM("8/255")(net, x, y))
    attack = MyNoise(0.2, objective="margin", seed=3)
    attacked = attack.run(net, x, y, index=torch.arange(8))
    assert (losses.margin(net(attacked.x_adv), y) > losses.margin(net(x), y)).float().mean() > 0.5
    assert (attacked.forwards, attacked.backwards) == (8 * 11, 0)
    assert geometry.size(attacked.x_adv - x, "linf").max() <= 0.2 + 1e-6
    twice = MyNoise(0.2, restarts=3, seed=3).run(net, x, y)
    assert twice.forwards >= 8 * 12
    assert attack.state_key == "MyNoise[None]"


def test_an_attack_without_perturb_is_no_attack():
    class Empty(Attack):
        pass

    with pytest.raises(TypeError, match="perturb"):
        Empty()


# "checks on return that the result is finite, inside the ball and inside the box" ---------------------------------


class Far(Attack):
    def perturb(self, problem, x, y):
        return (x + 1.5 * problem.eps * (x < 0.5)).clamp(0, 1)


class Outside(Attack):
    def perturb(self, problem, x, y):
        return x + problem.eps


class Undefined(Attack):
    def perturb(self, problem, x, y):
        return torch.where(x > x.mean(), x, float("nan"))


class LateFar(Attack):
    """Fine at first, and too far in its second try."""

    tries = 0

    def perturb(self, problem, x, y):
        self.tries += 1
        return x if self.tries == 1 else 1 - x


BROKEN = [
    (Far, "Far left its ball"),
    (Outside, r"Outside returned values outside \[0, 1\] or NaN"),
    (Undefined, r"Undefined returned values outside \[0, 1\] or NaN"),
]


@pytest.mark.parametrize(("attack", "complaint"), BROKEN)
def test_a_broken_attack_is_named(attack, complaint, net):
    x, y = images()
    x[0] = 1.0
    with refused(complaint) as caught:
        attack(0.1)(net, x, y)
    assert "problem.project" in str(caught.value)
    one_sentence(caught)


@pytest.mark.parametrize(("norm", "eps"), [("l2", 0.3), ("l1", 0.5)])
def test_other_balls_are_checked_too(norm, eps, net):
    class Slightly(Attack):
        factor = 1.01

        def perturb(self, problem, x, y):
            step = torch.zeros_like(x)
            step[:, :, 0, 0] = self.factor * eps
            return x + step

    x, y = images()
    x = x / 2
    with refused("Slightly left its ball"):
        Slightly(eps, norm=norm)(net, x, y)
    Slightly.factor = 1.0
    Slightly(eps, norm=norm)(net, x, y)
    # Only one sample leaves its own ball.
    radii = torch.full((8, 1, 1, 1), eps)
    Slightly(eps, norm=norm)(net, x, y, eps=radii)
    radii[5] = 0.9 * eps
    with refused("Slightly left its ball"):
        Slightly(eps, norm=norm)(net, x, y, eps=radii)


def test_restarts_are_checked_too(net):
    x, _ = images()
    y = net.eval()(x).argmax(1)  # nothing is fooled by x itself, so there is a second try
    LateFar(0.01)(net, x, y)
    with refused("LateFar left its ball"):
        LateFar(0.01, restarts=2)(net, x, y)


# "careful: check now. False puts the checks of values off" --------------------------------------------------------


@pytest.mark.parametrize(("attack", "complaint"), BROKEN)
def test_checks_may_be_put_off(attack, complaint, net):
    x, y = images()
    x[0] = 1.0
    attack = attack(0.1)
    attack.run(net, x, y, careful=False)  # says nothing yet
    with refused(complaint):
        attack.raise_if_violated()
    attack.raise_if_violated()  # said once


def test_images_outside_the_box_are_reported_later(net):
    x, y = images()
    attack = FGSM()
    attack.run(net, x * 255, y, careful=False)
    attack.run(net, x, y, careful=False)  # a good batch does not hide the bad one
    with refused(r"FGSM was given images with values outside \[0, 1\]"):
        attack.raise_if_violated()


def test_nothing_is_reported_where_all_is_well(net):
    attack = PGD(steps=2)
    attack.raise_if_violated()
    attack.run(net, *images(), careful=False)
    attack.raise_if_violated()


@pytest.mark.parametrize("norm", geometry.NORMS)
def test_careful_or_not_the_result_is_the_same(norm, net):
    x, y = images()
    careful, careless = (PGD(0.5, steps=3, norm=norm).run(net, x, y, careful=c).x_adv for c in (True, False))
    assert torch.equal(careful, careless)


# "the network runs in the dtype and autocast of the surrounding run" ----------------------------------------------


def test_autocast_inside_is_that_of_outside(net):
    seen = []
    net.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    x, y = images()
    PGD(steps=2)(net, x, y)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        attacked = PGD(steps=2, objective="margin").run(net, x, y)
        assert torch.is_autocast_enabled("cpu")
    assert seen == [torch.float32] * 2 + [torch.bfloat16] * 2
    assert attacked.first_logits.dtype == torch.float32  # objectives are computed in float32
    assert attacked.x_adv.dtype == torch.float32


def test_weights_still_train_after_an_attack_under_autocast(net):
    """Autocast caches the weights that it cast; the frozen ones of the attack must not be reused."""
    x, y = images()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        x_adv = FGSM()(net, x, y)
        losses.cross_entropy(net(x_adv).float(), y).mean().backward()
    assert all(p.grad is not None for p in net.parameters())
    assert net[3].weight.grad.abs().max() > 0


# "Normalisation belongs to the network" ---------------------------------------------------------------------------


def test_eps_is_in_pixels_whatever_the_normalisation(net):
    x, y = images()
    normalised = nn.Sequential(Normalize([0.5], [0.1]), net).eval()
    delta = FGSM("8/255")(normalised, 0.2 + 0.6 * x, y) - (0.2 + 0.6 * x)
    torch.testing.assert_close(delta.abs().max().item(), 8 / 255, atol=1e-6, rtol=0)


# "Several callbacks of one class with state need distinct state keys" ---------------------------------------------


def test_named_attacks_have_keys_of_their_own():
    attacks = [PGD(steps=2), PGD(steps=2), FGSM()]
    for attack, name in zip(attacks, ("weak", "strong", "weak"), strict=True):
        attack.name = name
    assert [a.state_key for a in attacks] == ["PGD[weak]", "PGD[strong]", "FGSM[weak]"]


def test_a_trainer_takes_two_attacks_of_one_class_and_evaluates_them():
    from lightning.pytorch import Trainer

    from robust_pl.callbacks import RobustEvaluation

    attacks = [PGD(steps=2), PGD(steps=4)]
    for attack, name in zip(attacks, ("weak", "strong"), strict=True):
        attack.name = name
    trainer = Trainer(callbacks=attacks, logger=False, enable_checkpointing=False, accelerator="cpu")
    for attack in attacks:
        attack.setup(trainer, None, "test")
    assert sum(isinstance(c, RobustEvaluation) for c in trainer.callbacks) == 1
