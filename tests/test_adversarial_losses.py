"""Losses of MART, FR, SAR, GradAlign and FGSM-LAW against plain Python arithmetic, to 1e-8."""

from __future__ import annotations

import cmath
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from robust_pl.functional.losses import frequency_regularization, mart, spectral_distance
from robust_pl.functional.regularizers import gradient_alignment, lipschitz, relaxed_labels

CLEAN = [[1.0, -0.5, 0.25], [0.3, 2.0, -1.0]]
ADV = [[0.2, 0.4, -0.3], [1.5, 0.1, 0.6]]


def tensor(rows: list[list[float]]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def softmax(row: list[float]) -> list[float]:
    total = sum(math.exp(v) for v in row)
    return [math.exp(v) / total for v in row]


def mart_by_hand(clean: list[list[float]], adv: list[list[float]], y: list[int], beta: float) -> float:
    boosted, weighted = [], []
    for c, a, label in zip(clean, adv, y, strict=True):
        p, q = softmax(c), softmax(a)
        wrong = max(v for k, v in enumerate(q) if k != label)
        boosted.append(-math.log(q[label]) - math.log(1.0001 - wrong + 1e-12))
        kl = sum(pi * (math.log(pi) - math.log(qi + 1e-12)) for pi, qi in zip(p, q, strict=True))
        weighted.append(kl * (1.0000001 - p[label]))
    return sum(boosted) / len(y) + beta * sum(weighted) / len(y)


@pytest.mark.parametrize("y", [[0, 1], [2, 0]])
def test_mart_by_hand(y: list[int]) -> None:
    found = mart(tensor(CLEAN), tensor(ADV), torch.tensor(y), beta=5.0)
    assert found.shape == () and found.dtype == torch.float64
    assert found.item() == pytest.approx(mart_by_hand(CLEAN, ADV, y, 5.0), abs=1e-10)


def test_mart_of_mixed_labels_takes_the_largest() -> None:
    mixed = tensor([[0.7, 0.2, 0.1], [0.1, 0.3, 0.6]])
    assert torch.equal(
        mart(tensor(CLEAN), tensor(ADV), mixed, 5.0), mart(tensor(CLEAN), tensor(ADV), torch.tensor([0, 2]), 5.0)
    )


def test_marts_gradient_flows_through_both_branches_and_the_weight() -> None:
    clean, adv = tensor(CLEAN).requires_grad_(), tensor(ADV).requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: mart(a, b, torch.tensor([0, 1]), 5.0), (clean, adv))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    """A sure and wrong network: in half precision 1.0001 - q is 0, and its logarithm infinite."""
    adv = torch.tensor([[12.0, -12.0, -12.0]], dtype=dtype)
    assert mart(adv, adv, torch.tensor([1]), 5.0).isfinite()
    for mode in ("batch2d", "class1d"):
        assert frequency_regularization(adv, adv + 1, mode).dtype == torch.float32


def dft(row: list[complex]) -> list[complex]:
    n = len(row)
    return [sum(v * cmath.exp(-2j * cmath.pi * k * i / n) for i, v in enumerate(row)) for k in range(n)]


def spectrum_by_hand(rows: list[list[float]], mode: str) -> list[complex]:
    along_classes = [dft([complex(v) for v in row]) for row in rows]
    if mode == "class1d":
        return [v for row in along_classes for v in row]
    columns = [dft([row[k] for row in along_classes]) for k in range(len(rows[0]))]
    return [v for column in columns for v in column]


@pytest.mark.parametrize("mode", ["batch2d", "class1d"])
def test_frequency_regularization_by_hand(mode: str) -> None:
    a, b = spectrum_by_hand(CLEAN, mode), spectrum_by_hand(ADV, mode)
    parts = [abs((u - v).real) for u, v in zip(a, b, strict=True)] + [abs((u - v).imag) for u, v in zip(a, b, strict=True)]
    found = frequency_regularization(tensor(CLEAN), tensor(ADV), mode)
    assert found.shape == () and found.dtype == torch.float64
    assert found.item() == pytest.approx(sum(parts) / len(parts), abs=1e-10)


def test_frequency_regularization_is_that_of_the_batch_unless_told_otherwise() -> None:
    two = frequency_regularization(tensor(CLEAN), tensor(ADV))
    assert two.item() == frequency_regularization(tensor(CLEAN), tensor(ADV), "batch2d").item()
    assert two.item() != pytest.approx(frequency_regularization(tensor(CLEAN), tensor(ADV), "class1d").item(), abs=1e-3)


def test_l2_between_spectra_is_l2_between_outputs() -> None:
    """Parseval: 10 and 160 times the squared difference for B = 16, K = 10, here over twice as many parts."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(16, 10, generator=generator, dtype=torch.float64) for _ in range(2))
    plain = (a - b).square().mean().item()
    assert spectral_distance(a, b, "class1d", "l2").item() == pytest.approx(10 / 2 * plain, abs=1e-10)
    assert spectral_distance(a, b, "batch2d", "l2").item() == pytest.approx(160 / 2 * plain, abs=1e-10)


def test_cosine_between_spectra_by_hand() -> None:
    expected = []
    for c, a in zip(CLEAN, ADV, strict=True):
        u, v = (spectrum_by_hand([row], "class1d") for row in (c, a))
        dot = sum(s.real * t.real + s.imag * t.imag for s, t in zip(u, v, strict=True))
        lengths = [math.sqrt(sum(abs(s) ** 2 for s in w)) for w in (u, v)]
        expected.append(1 - dot / (lengths[0] * lengths[1]))
    found = spectral_distance(tensor(CLEAN), tensor(ADV), "class1d", "cosine")
    assert found.item() == pytest.approx(sum(expected) / 2, abs=1e-10)


def test_gradient_alignment_by_hand() -> None:
    a = tensor([[3.0, 4.0], [1.0, 0.0], [0.0, 0.0]])
    b = tensor([[4.0, 3.0], [0.0, 2.0], [1.0, 1.0]])
    # cosines 24/25 and 0; the third has a zero gradient and does not count
    assert gradient_alignment(a, b).item() == pytest.approx((1 / 25 + 1) / 2, abs=1e-10)


def test_gradient_alignment_of_nothing_is_zero_with_a_finite_gradient() -> None:
    a = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    value = gradient_alignment(torch.ones(2, 3, dtype=torch.float64), a)
    (gradient,) = torch.autograd.grad(value, a)
    assert value == 0 and torch.equal(gradient, torch.zeros(2, 3, dtype=torch.float64))


def test_gradient_alignment_of_tiny_gradients() -> None:
    """Input gradients of a trained network are small: their product underflows in float32."""
    a = torch.tensor([[3.0, 4.0]]) * 1e-30
    b = torch.tensor([[4.0, 3.0]]) * 1e-30
    assert gradient_alignment(a, b).item() == pytest.approx(1 / 25, abs=1e-5)


def test_the_derivative_of_gradient_alignment() -> None:
    a = tensor([[3.0, 4.0], [1.0, 0.5]])
    b = tensor([[4.0, 3.0], [0.2, 2.0]]).requires_grad_()
    assert torch.autograd.gradcheck(lambda t: gradient_alignment(a, t), (b,))


def test_lipschitz_by_hand() -> None:
    def mse(a: list[list[float]], b: list[list[float]]) -> float:
        pairs = [(u - v) ** 2 for s, t in zip(a, b, strict=True) for u, v in zip(s, t, strict=True)]
        return sum(pairs) / len(pairs)

    x, x_ref = [[0.1, 0.9], [0.5, 0.4]], [[0.2, 0.8], [0.5, 0.6]]
    features, features_ref = [[0.0, 1.0], [2.0, 0.5]], [[0.3, 1.0], [1.0, 0.5]]
    outputs = mse([softmax(r) for r in ADV], [softmax(r) for r in CLEAN])
    inner = mse([softmax(r) for r in features], [softmax(r) for r in features_ref])
    found = lipschitz(*map(tensor, (ADV, features, CLEAN, features_ref, x, x_ref)), c=0.125)
    assert found.item() == pytest.approx((outputs + inner) / (mse(x, x_ref) + 0.125), abs=1e-10)


def test_relaxed_labels_by_hand() -> None:
    found = relaxed_labels(torch.tensor([1, 0]), 4, 0.7)
    assert found.tolist() == [pytest.approx([0.1, 0.7, 0.1, 0.1]), pytest.approx([0.7, 0.1, 0.1, 0.1])]
    # 0.7 y + 0.1 (1 - y)
    found = relaxed_labels(tensor([[0.2, 0.5, 0.2, 0.1]]), 4, 0.7, torch.float64)
    assert found.tolist() == [pytest.approx([0.22, 0.4, 0.22, 0.16], abs=1e-15)]


@pytest.mark.parametrize(("classes", "right"), [(10, 0.4), (100, 0.364), (200, 0.362)])
def test_labels_smoothed_twice_are_those_of_the_public_benchmark(classes: int, right: float) -> None:
    smoothed = F.one_hot(torch.tensor([3]), classes).double() * 0.6 + 0.4 / classes
    found = relaxed_labels(smoothed, classes, 0.6, torch.float64)
    assert found[0, 3].item() == pytest.approx(right, abs=5e-4) and found.sum().item() == pytest.approx(1)
    assert found[0, :3].tolist() == pytest.approx([(1 - found[0, 3].item()) / (classes - 1)] * 3)
