"""FGSM-PGI, FGSM-MEP-CS and FGSM-PCO: their steps by hand, and where each sample's attack begins."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from robust_pl.callbacks import FGSM, PGD, ComputeMonitor
from robust_pl.methods import FGSMMEPCS, FGSMPCO, FGSMPGI, FGSMRSCS, PGDAT, ConvergeSmooth
from robust_pl.methods.fast.prior import PriorGuided
from robust_pl.nets import SmallCNN

from .test_methods import QUIET, loader, sgd

EPS, CLASSES, SHAPE = 0.1, 3, (1, 4, 4)
KINDS: tuple[type[PriorGuided], ...] = (FGSMPGI, FGSMMEPCS, FGSMPCO)


def tiny() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 6), nn.Tanh(), nn.Linear(6, CLASSES)).double()


def batch(n: int = 6, smoothed: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(n, *SHAPE, generator=generator, dtype=torch.float64)  # some of it near the box's sides
    y = torch.arange(n) % CLASSES
    return x, F.one_hot(y, CLASSES).double() * 0.6 + 0.4 / CLASSES if smoothed else y, torch.arange(n)


def build(kind: type[PriorGuided], **more: Any) -> Any:
    """A method that knows nothing of its samples yet."""
    attack = more.pop("attack", None) or FGSM(EPS, bn_mode="train")
    method = kind(tiny(), attack, **{"num_classes": CLASSES, "optimizer": sgd, **more})
    method.per_sample.reserve(20, SHAPE, torch.device("cpu"))
    return method


def given(method: Any, values: Tensor) -> None:
    """Let this be what is kept of the first samples, (n, columns, 1, 4, 4)."""
    method.per_sample.write(torch.arange(len(values)), values, 0)


def boxed(point: Tensor, x: Tensor, eps: float | Tensor = EPS) -> Tensor:
    return (x + (point - x).clamp(-eps, eps)).clamp(0.0, 1.0)


def gradient_at(net: nn.Module, point: Tensor, y: Tensor) -> Tensor:
    point = point.clone().requires_grad_()
    return torch.autograd.grad(F.cross_entropy(net(point), y), point)[0]


def prior(columns: int, n: int = 6) -> Tensor:
    """Perturbations and momenta of the sizes that they have, exact in float32."""
    generator = torch.Generator().manual_seed(1)
    kept = torch.rand(n, columns, *SHAPE, generator=generator) * 2 - 1
    kept[:, 0] *= EPS
    kept[:, 1:] *= 0.02
    return kept


def gradients(loss: Tensor, net: nn.Module) -> Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(net.parameters()))])


@pytest.mark.parametrize("smoothed", [False, True])
def test_pgi_by_hand(smoothed: bool) -> None:
    method, net, (x, y, index) = build(FGSMPGI, lmbda=7.0, decay=0.3), tiny(), batch(smoothed=smoothed)
    kept = prior(2)
    given(method, kept)
    delta, momentum = kept.double().unbind(1)
    start = (x + delta).clamp(0, 1)
    assert not torch.equal(start, x + delta)
    gradient = gradient_at(net, start, y)
    new_momentum = gradient / gradient.abs().sum() + 0.3 * momentum
    assert (new_momentum.sign() != gradient.sign()).any()
    x_adv = boxed(x + delta + EPS * gradient.sign(), x)
    stored = boxed(x + delta + EPS * new_momentum.sign(), x) - x

    example = method.craft((x, y, index))
    assert torch.equal(example.start, start) and torch.allclose(example.x_adv, x_adv, atol=1e-12)
    assert torch.allclose(example.prior[:, 0], stored, atol=1e-12)
    assert torch.allclose(example.prior[:, 1], new_momentum, atol=1e-12) and new_momentum.abs().max() > 0.01
    loss = method.loss(example)
    z0, z = net(start), net(x_adv)
    expected = F.cross_entropy(z, y) + 7.0 * ((z - z0) ** 2).sum() / (6 * CLASSES)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-12)
    assert torch.allclose(gradients(loss, method.net), gradients(expected, net), atol=1e-12)

    method.after_step(example)
    again = method.craft((x, y, index))
    assert torch.allclose(again.start, (x + stored).clamp(0, 1), atol=1e-7)


def test_the_next_epoch_goes_on_with_its_momentum() -> None:
    """Two steps, the second of which sees the first one's momentum and none of its trained perturbation."""
    method, net, (x, y, index) = build(FGSMPGI), tiny(), batch()
    delta, momentum = torch.zeros_like(x), torch.zeros_like(x)
    given(method, torch.stack([delta, momentum], 1))
    for _ in range(3):
        gradient = gradient_at(net, (x + delta).clamp(0, 1), y)
        momentum = gradient / gradient.abs().sum() + 0.3 * momentum
        delta = boxed(x + delta + EPS * momentum.sign(), x) - x
        example = method.craft((x, y, index))
        method.after_step(example)
    assert torch.allclose(example.prior[:, 0], delta, atol=1e-6) and torch.allclose(example.prior[:, 1], momentum, atol=1e-6)


@pytest.mark.parametrize("active", [False, True])
def test_mep_cs_by_hand(active: bool) -> None:
    """Attack and what is kept as in FGSM-PGI, on labels of 0.6; the benign loss is that of clean pixels."""
    stages = [-2, 9] if active else [0, 9]
    method = build(FGSMMEPCS, smoothing=ConvergeSmooth(0.03, stages=stages), label_factor=0.6)
    net, (x, y, index) = tiny(), batch()
    target = torch.full((6, CLASSES), 0.2, dtype=torch.float64).scatter(1, y.unsqueeze(1), 0.6)
    kept = prior(2)
    given(method, kept)
    delta, momentum = kept.double().unbind(1)
    gradient = gradient_at(net, (x + delta).clamp(0, 1), target)
    new_momentum = gradient / gradient.abs().sum() + 0.3 * momentum
    x_adv = boxed(x + delta + EPS * gradient.sign(), x)
    stored = boxed(x + delta + EPS * new_momentum.sign(), x) - x

    for previous, sign in ((0.0, 1), (5.0, -1)):
        method.smoothing.previous.fill_(previous)
        example = method.craft((x, y, index))
        assert torch.allclose(example.x_adv, x_adv, atol=1e-12) and example.kept is None
        assert torch.allclose(example.prior, torch.stack([stored, new_momentum], 1), atol=1e-12)
        loss = method.loss(example)
        expected = F.cross_entropy(net(x_adv), target)
        if active:
            expected = expected + sign * F.cross_entropy(net(x), target)
        assert loss.item() == pytest.approx(expected.item(), abs=1e-12)
        assert torch.allclose(gradients(loss, method.net), gradients(expected, net), atol=1e-12)


@pytest.mark.parametrize("attached", [False, True])
@pytest.mark.parametrize("smoothed", [False, True])
def test_pco_by_hand(attached: bool, smoothed: bool) -> None:
    method = build(FGSMPCO, overstep=1.5, lmbda=10.0, attached_confidence=attached)
    net, (x, y, index) = tiny(), batch(smoothed=smoothed)
    kept = prior(1)
    given(method, kept)
    delta = kept[:, 0].double()
    start = (x + delta).clamp(0, 1)
    new = boxed(x + delta + EPS * gradient_at(net, start, y).sign(), x) - x
    beyond = x + 1.5 * new
    assert beyond.min() < 0 and beyond.max() > 1 and (beyond - x).abs().max() > 1.4 * EPS

    example = method.craft((x, y, index))
    assert torch.allclose(example.x_adv - x, new, atol=1e-12)
    loss = method.loss(example)
    z0 = net(start)
    right = batch()[1]
    c = torch.stack([1 - z0[i].softmax(0)[right[i]] for i in range(6)]).view(-1, 1, 1, 1)
    c = c if attached else c.detach()
    z, z1 = net(c * start + (1 - c) * beyond), net(x + new)
    size = 6 * CLASSES
    gap = ((z1 - z0) ** 2).sum() / size - ((z1 - z) ** 2).sum() / size
    expected = F.cross_entropy(z, y) + 10.0 * gap.abs()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-12)
    assert torch.allclose(gradients(loss, method.net), gradients(expected, net), atol=1e-12)
    method.after_step(example)
    assert torch.allclose(method.craft((x, y, index)).start, (x + new).clamp(0, 1), atol=1e-7)


def test_an_attached_confidence_changes_the_gradient_alone() -> None:
    losses, found = [], []
    for attached in (False, True):
        method = build(FGSMPCO, attached_confidence=attached)
        given(method, prior(1))
        loss = method.loss(method.craft(batch()))
        losses.append(loss.item())
        found.append(gradients(loss, method.net))
    assert losses[0] == losses[1] and (found[0] - found[1]).abs().max() > 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_unknown_samples_begin_at_corners_of_their_own_stream(kind: type[PriorGuided]) -> None:
    x, y, index = batch(20)
    x = 0.3 + 0.4 * x
    before = torch.get_rng_state()
    method = build(kind)
    first, second = method.craft((x, y, index)), method.craft((x, y, index))
    assert torch.equal(torch.get_rng_state(), before)
    for example in (first, second):
        delta = example.start - x
        assert torch.allclose(delta.abs(), torch.full_like(delta, EPS)) and 0.4 < (delta > 0).double().mean() < 0.6
    assert not torch.equal(first.start, second.start)
    assert torch.equal(build(kind).craft((x, y, index)).start, first.start)
    other = build(kind, attack=FGSM(EPS, bn_mode="train", seed=1)).craft((x, y, index))
    assert not torch.equal(other.start, first.start)


def test_each_sample_has_its_own_radius() -> None:
    method, (x, y, index) = build(FGSMPGI), batch()
    x = 0.3 + 0.4 * x
    eps = torch.linspace(0.01, 0.06, 6, dtype=torch.float64).view(-1, 1, 1, 1)
    example = method.craft((x, y, index), eps)
    assert torch.allclose((example.start - x).abs(), eps.expand_as(x))
    for found in (example.x_adv - x, example.prior[:, 0]):
        assert (found.abs() <= eps + 1e-9).all() and (found.abs().flatten(1).amax(1) - eps.flatten()).abs().max() < 1e-9


def test_where_all_gradients_are_zero_nothing_breaks() -> None:
    method, (x, y, index) = build(FGSMPGI), batch()
    given(method, torch.zeros(6, 2, *SHAPE))
    for parameter in method.net.parameters():
        nn.init.zeros_(parameter)
    example = method.craft((x, y, index))
    assert torch.equal(example.x_adv, x) and not example.prior.any()


class Starts(Callback):
    """How much of each epoch's starts are corners, which those of samples that nothing is kept of are."""

    def __init__(self) -> None:
        self.seen: dict[int, list[float]] = {}

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        attack, run = pl_module.attack, type(pl_module.attack).run

        def watched(model: Any, x: Tensor, *rest: Any, start: Tensor, **more: Any) -> Any:
            corner = ((start - x).abs() - EPS).abs() < 1e-6
            self.seen.setdefault(trainer.current_epoch, []).append(corner.flatten(1).all(1).double().mean().item())
            return run(attack, model, x, *rest, start=start, **more)

        attack.run = watched


def inner(n: int = 24) -> DataLoader[Any]:
    """Away from the box, so that a corner is a corner."""
    x, y = loader(n).dataset.tensors
    return DataLoader(TensorDataset(0.3 + 0.4 * x, y, torch.arange(n)), 8)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("reset_every", "corners"), [(None, {0}), (2, {0, 2, 4}), (1, {0, 1, 2, 3, 4})])
def test_perturbations_are_forgotten_every_so_many_epochs(
    kind: type[PriorGuided], reset_every: int | None, corners: set[int]
) -> None:
    torch.manual_seed(0)
    starts = Starts()
    # Half of a step, so that an attack from a corner rarely ends in one.
    method = kind(SmallCNN(width=2), FGSM(EPS, EPS / 2, bn_mode="train"), reset_every=reset_every, optimizer=sgd)
    Trainer(max_epochs=5, limit_val_batches=0, callbacks=[starts], **QUIET).fit(method, inner())
    assert {epoch for epoch, shares in starts.seen.items() if min(shares) == 1} == corners
    assert all(max(shares) == 0 for epoch, shares in starts.seen.items() if epoch not in corners)


@pytest.mark.parametrize("kind", KINDS)
def test_batches_without_indices_are_refused_before_anything_is_trained(kind: type[PriorGuided]) -> None:
    method = build(kind).float()
    before = [p.detach().clone() for p in method.parameters()]
    x, y, _ = batch()
    data = DataLoader(TensorDataset(x.float(), y), 3)
    with pytest.raises(ValueError, match=rf"{kind.__name__} keeps a perturbation of each training sample and the batches have"):
        Trainer(max_epochs=1, limit_val_batches=0, **QUIET).fit(method, data)
    assert all(torch.equal(a, b) for a, b in zip(before, method.parameters(), strict=True))


def test_indices_of_another_set_are_refused() -> None:
    x, y, index = batch()
    for wrong in (index + 1, index - 1):
        data = DataLoader(TensorDataset(x.float(), y, wrong), 3)
        with pytest.raises(ValueError, match="indices outside of 0 to 5"):
            Trainer(max_epochs=1, limit_val_batches=0, **QUIET).fit(build(FGSMPGI).float(), data)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"attack": PGD(EPS)},
            TypeError,
            "attack is a PGD: FGSMPGI takes FGSM, whose one step begins at",
        ),
        ({"attack": FGSM(EPS, random_start=True)}, ValueError, "attack.random_start=True"),
        ({"reset_every": 0}, ValueError, "reset_every=0 must be a whole number of at least 1"),
        ({"storage": "int8"}, ValueError, "storage='int8' is unknown: choose one of float32, bfloat16"),
        ({"lmbda": -1.0}, ValueError, "lmbda=-1.0 must be at least 0"),
        ({"decay": -0.1}, ValueError, "decay=-0.1 must be at least 0"),
        ({"label_factor": 1 / CLASSES}, ValueError, r"label_factor=0.33\d* is the label of the right class"),
        ({"label_factor": 1.5}, ValueError, "label_factor=1.5"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build(FGSMPGI, **arguments)


@pytest.mark.parametrize(
    ("build_it", "message"),
    [
        (lambda: build(FGSMPCO, overstep=-1.0), "overstep=-1.0"),
        (lambda: build(FGSMPCO, lmbda=-1.0), "lmbda=-1.0"),
        (lambda: build(FGSMMEPCS, decay=-1.0), "decay=-1.0"),
    ],
)
def test_bad_arguments_of_the_others(build_it: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_it()


def test_defaults_are_the_papers() -> None:
    method = FGSMPGI(SmallCNN())
    attack = method.attack
    assert (attack.eps, attack.step_size, attack.random_start, attack.bn_mode) == (8 / 255, None, False, "train")
    assert (method.lmbda, method.decay, method.reset_every, method.label_factor) == (10.0, 0.3, 40, None)
    pco = FGSMPCO(SmallCNN())
    assert (pco.overstep, pco.lmbda, pco.reset_every, pco.attached_confidence) == (1.5, 10.0, None, False)
    smoothing = FGSMMEPCS(SmallCNN()).smoothing
    assert (smoothing.gamma, smoothing.ratio, smoothing.weight, smoothing.stages) == (0.03, 1.0, 1.0, (0, 100, 105, 110))


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_and_smoothed_labels_train(kind: type[PriorGuided]) -> None:
    seed_everything(0, verbose=False)
    x, y, index = inner().dataset.tensors
    soft = F.one_hot(y, 10) * 0.6 + 0.04
    for precision in ("bf16-mixed", "bf16-true"):
        method = kind(SmallCNN(width=2), FGSM(EPS, bn_mode="train"), label_factor=0.6, storage="bfloat16", optimizer=sgd)
        data = DataLoader(TensorDataset(x, soft, index), 8)
        Trainer(max_epochs=2, limit_val_batches=0, precision=precision, **QUIET).fit(method, data)
        assert all(p.isfinite().all() for p in method.parameters())
        kept, epochs = method.per_sample.read(index)
        assert (epochs == 1).all() and kept[:, 0].abs().max() <= EPS * 1.02 and kept[:, 0].abs().mean() > EPS / 10


def test_with_nothing_kept_and_no_weight_pgi_is_fgsm_at_from_its_start() -> None:
    """The loss is cross-entropy alone, the start a corner: the step of any method from there."""
    method, (x, y, index) = build(FGSMPGI, lmbda=0.0), batch()
    example = method.craft((x, y, index))
    other = PGDAT(tiny(), FGSM(EPS, bn_mode="train"), num_classes=CLASSES)
    delta = (example.start - x).sign() * EPS  # exact where the box did not cut
    attacked = other.run_attack(other.clean((x, y, index)), start=example.start)
    inside = (example.start > 0) & (example.start < 1)
    assert torch.equal(attacked.x_adv[inside], example.x_adv[inside]) and inside.any() and delta.abs().max() == EPS
    assert method.loss(example).item() == pytest.approx(F.cross_entropy(other(example.x_adv), y).item(), abs=1e-12)


@pytest.mark.parametrize(
    ("kind", "more", "passes"),
    [
        (FGSMPGI, {}, (2, 1, 2)),
        (FGSMPCO, {}, (3, 1, 3)),
        (FGSMMEPCS, {"smoothing": ConvergeSmooth(stages=[-2, 9])}, (3, 1, 2)),
        (FGSMMEPCS, {}, (3, 1, 1)),
        (FGSMRSCS, {"smoothing": ConvergeSmooth(stages=[-2, 9])}, (2, 1, 2)),
        (FGSMRSCS, {}, (2, 1, 1)),
    ],
)
def test_passes_of_a_step(kind: Any, more: dict[str, Any], passes: tuple[int, int, int]) -> None:
    """Forward ones, backward ones to the pixels alone, and backward ones to the weights, as the run itself counts them."""
    monitor = ComputeMonitor(show=False)
    method = kind(SmallCNN(width=2), optimizer=sgd, **more)
    method._checked = {True}
    Trainer(max_epochs=1, limit_val_batches=0, callbacks=[monitor], **QUIET).fit(method, inner())
    counted = monitor.totals(method.trainer, torch.device("cpu"))["networks"]["net"]["training"]
    assert (counted["forwards"], counted["input_backwards"], counted["weight_backwards"]) == tuple(24 * n for n in passes)
