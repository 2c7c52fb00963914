"""ARD, IAD-I, IAD-II, AdaAD, AdaIAD and IGDM: losses by pencil, who is asked what and when, and where attacks climb."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn

from robust_pl.callbacks import PGD
from robust_pl.functional.distillation import introspection, trust
from robust_pl.functional.losses import kl_divergence
from robust_pl.methods import ARD, IAD, IADII, IGDM, RSLAD, AdaAD, AdaIAD, Distillation
from robust_pl.methods.distillation.joint_attack import disagreement

from .test_methods import QUIET, Counted, loader, sgd

K = 3


class Linear(nn.Module):
    """Three logits, linear in the four pixels of an image."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(2 * torch.randn(4, K, generator=generator, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.weight


def build(kind: type[Distillation], attack: PGD | None = None, **more: Any) -> Any:
    if kind is IADII:
        more["clean_teacher"] = Linear(2)
    attack = attack or PGD(0.1, 0.03, 2, random_start=False)
    return kind(Linear(0), Linear(1), attack=attack, optimizer=sgd, num_classes=K, **more)


def batch() -> tuple[Tensor, Tensor, Tensor]:
    x = torch.rand(4, 1, 2, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return x, torch.tensor([0, 2, 1, 2]), torch.arange(4)


def softmax(row: list[float], t: float = 1.0) -> list[float]:
    total = sum(math.exp(v / t) for v in row)
    return [math.exp(v / t) / total for v in row]


def kl(target: list[float], prediction: list[float], t: float = 1.0) -> float:
    pairs = zip(softmax(target, t), softmax(prediction, t), strict=True)
    return t * t * sum(p * math.log(p / q) for p, q in pairs)


def ce(logits: list[float], y: int) -> float:
    return -math.log(softmax(logits)[y])


Row = tuple[list[float], list[float], list[float], list[float], list[float], int]


def by_hand(method: Distillation, example: Any, each: Callable[..., float]) -> float:
    """The mean of ``each(s, a, t, ta, ca, y)``: student, teacher and clean teacher, on clean and attacked pixels, and label."""
    with torch.no_grad():
        x, x_adv, clean_teacher = example.x, example.x_adv, Linear(2)
        columns = [method.net(x), method.net(x_adv), method.teacher(x), method.teacher(x_adv), clean_teacher(x_adv), example.y]
    rows = list(zip(*(column.tolist() for column in columns), strict=True))
    return sum(each(*row) for row in rows) / len(rows)


def alpha(ta: list[float], y: int, beta: float) -> float:
    return softmax(ta)[y] ** beta


CASES: dict[str, tuple[type[Distillation], dict[str, Any], Callable[..., float]]] = {
    "ARD": (ARD, {}, lambda s, a, t, ta, ca, y: kl(t, a, 30)),
    "ARD, labels": (
        ARD,
        {"alpha": 0.7, "temperature": 5.0},
        lambda s, a, t, ta, ca, y: 0.7 * kl(t, a, 5) + 0.3 * ce(s, y),
    ),
    "ARD, mean": (
        ARD,
        {"alpha": 0.7, "temperature": 5.0, "kl_reduction": "mean"},
        lambda s, a, t, ta, ca, y: 0.7 * kl(t, a, 5) / K + 0.3 * ce(s, y),
    ),
    "IAD": (
        IAD,
        {"begin": 0, "beta": 0.4},
        lambda s, a, t, ta, ca, y: kl(t, a) + (1 - alpha(ta, y, 0.4)) * kl(s, a),
    ),
    "IAD, the equation": (
        IAD,
        {"begin": 0, "beta": 0.4, "alpha": 0.8, "temperature": 2.0, "weight_teacher": True},
        lambda s, a, t, ta, ca, y: (
            0.8 * (alpha(ta, y, 0.4) * kl(t, a, 2) + (1 - alpha(ta, y, 0.4)) * kl(s, a)) + 0.2 * ce(s, y)
        ),
    ),
    "IAD, mean": (
        IAD,
        {"begin": 0, "alpha": 0.8, "kl_reduction": "mean"},
        lambda s, a, t, ta, ca, y: 0.8 * (kl(t, a) + (1 - alpha(ta, y, 0.1)) * kl(s, a)) / K + 0.2 * ce(s, y),
    ),
    "IAD before": (IAD, {"temperature": 2.0}, lambda s, a, t, ta, ca, y: kl(t, a, 2)),
    "IADII": (
        IADII,
        {"begin": 0, "beta": 0.4},
        lambda s, a, t, ta, ca, y: (
            0.25 * ce(a, y) + 0.5 * (alpha(ta, y, 0.4) * kl(ta, a) + (1 - alpha(ta, y, 0.4)) * kl(s, a)) + 0.25 * kl(ca, a)
        ),
    ),
    "IADII at a temperature": (
        IADII,
        {"begin": 0, "beta": 0.4, "temperature": 3.0, "robust_share": 0.3, "clean_share": 0.6},
        lambda s, a, t, ta, ca, y: (
            0.1 * ce(a, y)
            + 0.3 * (alpha(ta, y, 0.4) * kl(ta, a, 3) + 9 * (1 - alpha(ta, y, 0.4)) * kl(s, a))
            + 0.6 * kl(ca, a, 3)
        ),
    ),
    "IADII before": (
        IADII,
        {"kl_reduction": "mean"},
        lambda s, a, t, ta, ca, y: 0.25 * ce(a, y) + (0.5 * kl(ta, a) + 0.25 * kl(ca, a)) / K,
    ),
    "AdaAD": (AdaAD, {}, lambda s, a, t, ta, ca, y: kl(ta, a)),
    "AdaAD, clean": (AdaAD, {"alpha": 0.6}, lambda s, a, t, ta, ca, y: 0.6 * kl(ta, a) + 0.4 * kl(t, s)),
    "AdaIAD": (
        AdaIAD,
        {"begin": 0, "alpha": 0.8},
        lambda s, a, t, ta, ca, y: 0.8 * (kl(ta, a, 30) + (1 - alpha(ta, y, 0.1)) * kl(s, a)) + 0.2 * ce(s, y),
    ),
    "AdaIAD, weighted": (
        AdaIAD,
        {"begin": 0, "beta": 0.4, "temperature": 2.0, "weight_teacher": True},
        lambda s, a, t, ta, ca, y: alpha(ta, y, 0.4) * kl(ta, a, 2) + (1 - alpha(ta, y, 0.4)) * kl(s, a),
    ),
    "AdaIAD before": (AdaIAD, {}, lambda s, a, t, ta, ca, y: kl(ta, a, 30)),
}


@pytest.mark.parametrize("name", CASES)
def test_losses_by_hand(name: str) -> None:
    kind, arguments, each = CASES[name]
    method = build(kind, **arguments)
    example = method.craft(batch())
    found = method.loss(example)
    assert found.shape == () and found.item() == pytest.approx(by_hand(method, example, each), abs=1e-8)


def test_trust_by_hand() -> None:
    logits = torch.tensor([[1.0, -0.5, 0.25], [0.3, 2.0, -1.0]], dtype=torch.float64)
    expected = [softmax(logits[0].tolist())[2] ** 0.1, softmax(logits[1].tolist())[1] ** 0.1]
    assert trust(logits, torch.tensor([2, 1]), 0.1).tolist() == pytest.approx(expected, abs=1e-12)
    mixed = torch.tensor([[0.1, 0.2, 0.7], [0.0, 0.6, 0.4]], dtype=torch.float64)
    assert trust(logits, mixed, 0.1).tolist() == pytest.approx(expected, abs=1e-12)
    # The card of beta = 0.1: trust stays high.
    half = torch.tensor([[0.0, 0.0]], dtype=torch.float64)
    assert trust(half, torch.tensor([0]), 0.1).item() == pytest.approx(0.5**0.1) and 0.5**0.1 > 0.93
    # Certainly wrong: no trust, and no NaN.
    assert trust(torch.tensor([[0.0, 1e6]]), torch.tensor([0]), 0.1).item() == 0.0
    assert introspection(logits, logits.flip(1), torch.ones(2)).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("kind", [IAD, IADII, AdaIAD])
def test_the_students_own_target_is_detached_on_demand(kind: type[Distillation]) -> None:
    gradients = []
    for detach_self in (False, True):
        method = build(kind, begin=0, beta=1.0, detach_self=detach_self)
        method.loss(method.craft(batch())).backward()
        gradients.append(method.net.weight.grad)
        assert method.teacher.net.weight.grad is None
    assert (gradients[0] - gradients[1]).abs().max() > 1e-3


def test_the_joint_attack_goes_through_both_networks() -> None:
    """One step by hand: the gradient of KL(T(x) || S(x)) with respect to x, through the teacher as well."""
    method = build(AdaAD, attack=PGD(0.1, 0.03, 1, random_start=False))
    x, *_ = batch()
    inputs = x.clone().requires_grad_()
    teacher, student = method.teacher(inputs).log_softmax(1), method.net(inputs).log_softmax(1)
    (uphill,) = torch.autograd.grad((teacher.exp() * (teacher - student)).sum(), inputs)
    p, q = teacher.exp(), student.exp()
    through_student = ((q - p) @ method.net.weight.T).view_as(x)
    assert (uphill.sign() != through_student.sign()).any(), "the teacher's part matters here"
    crafted = method.craft(batch())
    assert torch.allclose(crafted.x_adv, (x + 0.03 * uphill.sign()).clamp(0, 1), atol=1e-12)
    with torch.no_grad():
        columns = torch.cat([method.net(x), method.teacher(x)], 1)
        assert torch.allclose(disagreement(columns), kl_divergence(method.net(x), method.teacher(x)), atol=1e-12)


def test_the_joint_attack_finds_more_disagreement_than_one_on_labels() -> None:
    found = []
    for objective in (None, "ce"):
        method = build(AdaAD, attack=PGD(0.1, steps=10, random_start="normal", objective=objective))
        example = method.craft(batch())
        with torch.no_grad():
            found.append(kl_divergence(method(example.x_adv), method.teacher(example.x_adv)))
    assert (found[0] >= found[1] - 1e-4).all() and found[0].mean() > 1.1 * found[1].mean()


def test_whether_the_joint_attack_fools_is_a_matter_of_the_student() -> None:
    """keep='best' asks for that: columns of the teacher must not look like wrong classes."""
    method = build(AdaAD, attack=PGD(0.1, 0.03, 4, random_start=False, keep="best"))
    x, _, index = batch()
    with torch.no_grad():
        y = method.net(x).argmax(1)
        example = method.craft((x, y, index))
        fooled = method.net(example.x_adv).argmax(1) != y
        far = kl_divergence(method.net(example.x_adv), method.teacher(example.x_adv))
        near = kl_divergence(method.net(x), method.teacher(x))
    assert (~fooled).any() and (far[~fooled] > near[~fooled]).all()


def test_a_radius_for_each_sample_and_mixed_labels() -> None:
    method = build(AdaIAD, begin=0)
    x, y, index = batch()
    eps = torch.tensor([0.0, 0.01, 0.05, 0.1], dtype=torch.float64).view(-1, 1, 1, 1)
    mixed = 0.9 * nn.functional.one_hot(y, K).double() + 0.1 / K
    example = method.craft((x, mixed, index), eps)
    assert ((example.x_adv - x).abs().amax((1, 2, 3)) <= eps.flatten() + 1e-9).all() and torch.equal(example.x_adv[0], x[0])
    assert method.loss(example).isfinite()


@pytest.mark.parametrize(
    ("kind", "arguments", "before", "after"),
    [
        # Forward passes of the student beside the attack's and of the teachers beside the attack's, a step.
        (ARD, {}, (1, 1, 0), (1, 1, 0)),
        (ARD, {"alpha": 0.5}, (2, 1, 0), (2, 1, 0)),
        (IAD, {"begin": 1}, (1, 1, 0), (2, 2, 0)),
        (IADII, {"begin": 1}, (1, 1, 1), (2, 1, 1)),
        (AdaAD, {}, (1, 1, 0), (1, 1, 0)),
        (AdaAD, {"alpha": 0.5}, (2, 2, 0), (2, 2, 0)),
        (AdaIAD, {"begin": 1}, (1, 1, 0), (2, 1, 0)),
        (ARD, {"igdm": IGDM()}, (2, 3, 0), (2, 3, 0)),
        (AdaAD, {"igdm": IGDM()}, (2, 2, 0), (2, 2, 0)),
    ],
)
def test_passes_of_student_and_teachers(
    kind: type[Distillation], arguments: dict[str, Any], before: tuple[int, int, int], after: tuple[int, int, int]
) -> None:
    net, teacher, clean_teacher, steps = Counted(), Counted(), Counted(), 3
    if kind is IADII:
        arguments = arguments | {"clean_teacher": clean_teacher}
    method = kind(net, teacher, attack=PGD(0.1, steps=steps, random_start="normal"), optimizer=sgd, **arguments)
    method._checked = {True, False}
    seen = []

    def count(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def step(*given: Any) -> Tensor:
            start = net.forwards, teacher.forwards, clean_teacher.forwards
            loss = original(*given)
            end = net.forwards, teacher.forwards, clean_teacher.forwards
            seen.append(tuple(b - a for a, b in zip(start, end, strict=True)))
            return loss

        return step

    method.training_step = count(method.training_step)
    Trainer(max_epochs=2, limit_train_batches=1, limit_val_batches=0, **QUIET).fit(method, loader())
    joint = steps if kind in (AdaAD, AdaIAD) else 0
    for found, expected in zip(seen, (before, after), strict=True):
        assert found == (expected[0] + steps, expected[1] + joint, expected[2])
    assert teacher.for_training == clean_teacher.for_training == 0


def test_igdm_by_hand_grows_with_the_epoch() -> None:
    found = []
    for igdm in (None, IGDM(2.0)):
        method = build(RSLAD, igdm=igdm)
        example = method.craft(batch())
        method._trainer = _At(3, 10)
        found.append(method.loss(example).item())

    def each(s: list[float], a: list[float], t: list[float], ta: list[float], ca: list[float], y: int) -> float:
        # Linear networks: f(x + d) - f(x - d) = 2 (f(x + d) - f(x)).
        return kl([2 * (p - q) for p, q in zip(ta, t, strict=True)], [2 * (p - q) for p, q in zip(a, s, strict=True)])

    assert found[1] - found[0] == pytest.approx(2.0 * 3 / 10 * by_hand(method, example, each), abs=1e-8)
    assert torch.allclose(example.teacher_logits_away, method.teacher(2 * example.x - example.x_adv))


def test_igdm_needs_an_end() -> None:
    method = build(RSLAD, igdm=IGDM())
    with pytest.raises(ValueError, match=r"grows over the run: set trainer\.max_epochs"):
        Trainer(max_epochs=-1, max_steps=1, **QUIET).fit(method, loader())


class _At:
    """A trainer at some epoch."""

    def __init__(self, epoch: int, of: int) -> None:
        self.current_epoch, self.max_epochs = epoch, of


def test_introspection_begins_at_its_epoch() -> None:
    method = build(IAD, begin=2, beta=0.4)
    example = replace(method.craft(batch()), teacher_logits_adv=method.ask("teacher", batch()[0]))
    losses = []
    for epoch in range(4):
        method._trainer = _At(epoch, 10)
        losses.append(method.loss(example).item())
    assert losses[0] == losses[1] < losses[2] == losses[3]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: build(ARD, alpha=1.5), r"alpha=1.5 is a share"),
        (lambda: build(ARD, temperature=0), "temperature=0 must be above 0"),
        (lambda: build(IAD, beta=-0.1), "beta=-0.1 must be at least 0"),
        (lambda: build(IAD, begin=-1), "begin=-1 must be at least 0"),
        (lambda: build(IADII, robust_share=0.8, clean_share=0.7), r"robust_share \+ clean_share=1.5"),
        (lambda: build(AdaAD, alpha=-1), "alpha=-1 is a share"),
        (lambda: build(AdaIAD, temperature=-2.0), "temperature=-2.0 must be above 0"),
        (lambda: IGDM(-1), "alpha=-1 must be at least 0"),
    ],
)
def test_bad_arguments(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
