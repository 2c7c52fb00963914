"""NuAT and GAT: distances, attack and loss by hand, which batches are guided, weights by epoch, and what a step costs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, Trainer
from torch import Tensor, nn

from robust_pl.callbacks import FGSM
from robust_pl.functional.output_distances import nuclear_distance, softmax_distance
from robust_pl.methods import GAT, Example, NuAT
from robust_pl.methods.fast.guided_fgsm import GuidedFGSM
from robust_pl.nets import SmallCNN

from .test_methods import QUIET, loader, sgd
from .test_resume import LAST, assert_same_weights

EPS = 0.1


def nuat(net: nn.Module | None = None, epoch: int = 1, **more: Any) -> NuAT:
    """With a weight of 1.5 in the epoch that it is in."""
    method = NuAT(net or SmallCNN(width=4), bernoulli(), **{"lmbda": 3.0, "rise_epochs": 2, "optimizer": sgd, **more})
    return in_epoch(method, epoch)


def gat(net: nn.Module | None = None, epoch: int = 1, **more: Any) -> GAT:
    return in_epoch(GAT(net or SmallCNN(width=4), bernoulli(), **{"lmbda": 1.5, "optimizer": sgd, **more}), epoch)


def bernoulli() -> FGSM:
    return FGSM(EPS, random_start="bernoulli")


def in_epoch(method: Any, epoch: int, **trainer: Any) -> Any:
    method.trainer = Trainer(**QUIET, **trainer)
    method.trainer.fit_loop.epoch_progress.current.completed = epoch
    return method


def batch(n: int = 8, labels: str = "hard") -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(n, 1, 8, 8, generator=generator, dtype=torch.float64)
    y = torch.randint(10, (n,), generator=generator)
    if labels == "smooth":
        y = 0.6 * F.one_hot(y, 10).double() + 0.04
    return x, y, torch.arange(n)


def nuclear_by_eigenvalues(a: Tensor, b: Tensor) -> Tensor:
    """The sum of square roots of the eigenvalues of M^T M, by the batch; exact where no value is 0, as with 16 features."""
    m = a - b
    return torch.linalg.eigvalsh(m.T @ m).clamp_min(0).sqrt().sum() / len(a)


def squares_by_sample(a: Tensor, b: Tensor) -> Tensor:
    return sum(((p.exp() / p.exp().sum() - q.exp() / q.exp().sum()) ** 2).sum() for p, q in zip(a, b, strict=True)) / len(a)


BY_HAND: list[Any] = [pytest.param(nuat, nuclear_by_eigenvalues, id="NuAT"), pytest.param(gat, squares_by_sample, id="GAT")]


def cross_entropy_by_hand(logits: Tensor, y: Tensor) -> Tensor:
    y = y if y.is_floating_point() else F.one_hot(y, 10)
    return -(y * logits.log_softmax(1)).sum(1).mean()


def test_distances_by_hand() -> None:
    m = torch.tensor([[3.0, 0.0], [0.0, -4.0], [0.0, 0.0]])
    base = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    assert nuclear_distance(base + m, base).item() == pytest.approx(7)
    # Outputs (0.5, 0.5) and (0.25, 0.75) in one of two samples: 2 * 0.25^2 / 2.
    a, b = torch.zeros(2, 2), torch.tensor([[0.0, 0.0], [0.0, torch.tensor(3.0).log()]])
    assert softmax_distance(a, b).item() == pytest.approx(0.0625)


@pytest.mark.parametrize("distance", [nuclear_distance, softmax_distance])
def test_distances_of_half_precision_are_of_single(distance: Callable[[Tensor, Tensor], Tensor]) -> None:
    a, b = (torch.randn(16, 10, generator=torch.Generator().manual_seed(i)).bfloat16() for i in (0, 1))
    with torch.autocast("cpu", torch.bfloat16):
        found = distance(a, b)
    assert found.dtype == torch.float32 and found.item() == pytest.approx(distance(a.double(), b.double()).item(), rel=1e-6)


def test_the_nuclear_norms_gradient_is_bounded_where_singular_values_are_zero_or_alike() -> None:
    for m in (torch.zeros(8, 4), torch.eye(8)[:, :4], torch.ones(8, 4)):
        a = m.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(nuclear_distance(a, torch.zeros(8, 4)), a)
        assert gradient.isfinite().all() and torch.linalg.matrix_norm(gradient, 2) < 1 + 1e-5


@pytest.mark.parametrize("labels", ["hard", "smooth"])
@pytest.mark.parametrize(("build", "distance"), BY_HAND)
def test_the_loss_by_hand(build: Callable[..., GuidedFGSM], distance: Callable[[Tensor, Tensor], Tensor], labels: str) -> None:
    torch.manual_seed(0)
    method = build(SmallCNN(width=8)).double()  # in train mode, in which outputs of a new network differ more
    method.net.linear.weight.data *= 10
    x, y, index = batch(16, labels)
    x_adv = (x + EPS * torch.randn_like(x).sign()).clamp(0, 1)
    found = torch.autograd.grad(method.loss(Example(x, y, index, x_adv)), list(method.parameters()))
    clean, adv = method.net(x), method.net(x_adv)
    expected = cross_entropy_by_hand(clean, y) + 1.5 * distance(clean, adv)
    assert method.loss(Example(x, y, index, x_adv)).item() == pytest.approx(expected.item(), abs=1e-10)
    for a, b in zip(found, torch.autograd.grad(expected, list(method.parameters())), strict=True):
        assert torch.allclose(a, b, atol=1e-8)
    assert distance(clean, adv) > 1e-3


@pytest.mark.parametrize("labels", ["hard", "smooth"])
@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize(("build", "distance"), BY_HAND)
def test_the_attack_by_hand(
    build: Callable[..., GuidedFGSM], distance: Callable[[Tensor, Tensor], Tensor], guided: bool, labels: str
) -> None:
    """z in train mode, the rest in eval mode; one step from x +- eps / 2; the distance in every other batch."""
    torch.manual_seed(0)
    method = build(SmallCNN(width=8), lmbda=60.0).double()  # so that the distance decides about some signs
    x, y, index = batch(16, labels)
    weight = method.weight()
    with torch.no_grad():
        for _ in range(3):
            method.net(x)  # so that statistics of BatchNorm are not those of the batch
        clean = method.net(x)
    state = {k: v.clone() for k, v in method.state_dict().items()}
    method.on_train_batch_start(None, 3 if guided else 2)
    attacked = method.run_attack(Example(x, y, index))
    assert torch.allclose((attacked.start - x).abs()[(x > EPS) & (x < 1 - EPS)], torch.tensor(EPS / 2).double())

    method.load_state_dict(state)
    start = attacked.start.clone().requires_grad_()
    if guided:
        with torch.no_grad():
            method.net(x)  # as the attack's look at x moves the statistics
    method.net.eval()
    logits = method.net(start)
    cost = cross_entropy_by_hand(logits, y)
    plain = torch.autograd.grad(cost, start, retain_graph=True)[0]
    both = torch.autograd.grad(cost + weight * distance(clean, logits), start)[0]
    assert (plain.sign() != both.sign()).float().mean() > 0.02, "the test must be able to fail"
    expected = both if guided else plain
    assert torch.allclose(attacked.first_gradient / len(x), expected, atol=1e-9)
    moved = (attacked.start + EPS * expected.sign()).clamp(0, 1)
    by_hand = torch.minimum(torch.maximum(moved, x - EPS), x + EPS).clamp(0, 1)
    assert torch.allclose(attacked.x_adv, by_hand, atol=1e-12)


def test_only_the_look_at_clean_images_is_in_train_mode() -> None:
    for batch_idx, moves in ((0, 0), (1, 1), (2, 0), (3, 1)):
        method = gat().double().train()
        method.on_train_batch_start(None, batch_idx)
        method.craft(batch())
        layer = next(m for m in method.modules() if isinstance(m, nn.BatchNorm2d))
        assert layer.num_batches_tracked == moves and all(m.training for m in method.modules())


def test_weights_by_epoch() -> None:
    assert [nuat(epoch=e, lmbda=4.0, rise_epochs=4).weight() for e in range(6)] == pytest.approx([0, 1, 2, 3, 4, 4])
    whole = [in_epoch(NuAT(SmallCNN(), lmbda=4.0), e, max_epochs=8).weight() for e in (0, 1, 7, 8)]
    assert whole == pytest.approx([0, 0.5, 3.5, 4])
    assert [gat(epoch=e, lmbda=10.0, step_up_after=2).weight() for e in range(5)] == [10, 10, 10, 40, 40]
    assert gat(epoch=1000, step_up_after=None).weight() == 1.5
    assert [gat(epoch=e, step_up_after=0, factor=2.0).weight() for e in (0, 1)] == [1.5, 3]


def test_a_reference_batch_takes_the_size_of_the_batch_out() -> None:
    logits, logits_adv = (torch.randn(16, 10, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    twice = [t.repeat(2, 1) for t in (logits, logits_adv)]  # every singular value times sqrt(2)
    plain, fair = nuat(), nuat(reference_batch=16)
    assert plain.distance(*twice) / plain.distance(logits, logits_adv) == pytest.approx(0.5**0.5)
    assert fair.distance(*twice).item() == pytest.approx(fair.distance(logits, logits_adv).item())
    assert fair.distance(logits, logits_adv).item() == pytest.approx(plain.distance(logits, logits_adv).item())


class Passes(nn.Module):
    """A network that counts its forward passes and the backward passes through its outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.net = SmallCNN(10, width=4)
        self.forwards = self.backwards = 0

    def forward(self, x: Tensor) -> Tensor:
        self.forwards += 1
        logits = self.net(x)
        if logits.requires_grad:
            logits.register_hook(self._backward)
        return logits

    def _backward(self, _: Tensor) -> None:
        self.backwards += 1


class PassesOfBatches(Callback):
    """What each batch cost."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, int]] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        pl_module.net.forwards = pl_module.net.backwards = 0

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        self.seen.append((pl_module.net.forwards, pl_module.net.backwards))


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("build", [nuat, gat])
def test_passes_of_even_and_odd_batches(build: Callable[..., GuidedFGSM], accumulate: int) -> None:
    """Batches are counted anew in each epoch, and are counted also where several make one step."""
    method, passes = build(Passes()), PassesOfBatches()
    method._checked = {True, False}  # the look at the first batch of a run
    trainer = Trainer(max_epochs=2, limit_val_batches=0, accumulate_grad_batches=accumulate, callbacks=[passes], **QUIET)
    trainer.fit(method, loader(40))
    assert passes.seen == [(3, 3), (4, 3), (3, 3), (4, 3), (3, 3)] * 2
    assert (method.attack.forwards, method.attack.backwards) == (2 * 7 * 8, 2 * 5 * 8)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["NuAT", "GAT"])
def test_resumed_in_the_middle_of_an_epoch(robust_pl: Callable[..., None], tiny: Path, method: str) -> None:
    """An odd number of batches an epoch, and a checkpoint after an odd number of them."""
    attack = ("--model.init_args.attack", "FGSM", "--model.init_args.attack.init_args.random_start", "bernoulli")
    common = ("fit", "-c", tiny, "--model", method, *attack, "--trainer.max_epochs", 2, "--run.save_every_n_steps", 3)
    more = ("--model.init_args.step_up_after", 0) if method == "GAT" else ()
    robust_pl(*common, *more, "--run.name", "whole")
    with pytest.raises(RuntimeError, match="crash"):
        robust_pl(*common, *more, "--run.name", "stopped", "--trainer.callbacks+=tests.stopper.CrashAfterBatch")
    saved = torch.load(f"runs/stopped/{LAST}", weights_only=True)
    assert saved["global_step"] % 11 == 3, "the checkpoint must lie inside an epoch"
    robust_pl(*common, *more, "--ckpt_path", f"runs/stopped/{LAST}", "--run.name", "resumed")
    assert_same_weights(Path("runs/whole", LAST), Path("runs/resumed", LAST))


def test_default_attacks_are_the_papers() -> None:
    for method in (NuAT(SmallCNN()), GAT(SmallCNN())):
        attack = method.attack
        assert (attack.eps, attack.step_size, attack.random_start, attack.bn_mode) == (8 / 255, None, "bernoulli", "eval")
    assert (NuAT(SmallCNN()).lmbda, GAT(SmallCNN()).lmbda, GAT(SmallCNN()).step_up_after) == (4, 10, 85)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: NuAT(SmallCNN(), lmbda=-1), "lmbda=-1"),
        (lambda: NuAT(SmallCNN(), rise_epochs=0), "rise_epochs=0"),
        (lambda: NuAT(SmallCNN(), reference_batch=0), "reference_batch=0"),
        (lambda: GAT(SmallCNN(), lmbda=-1), "lmbda=-1"),
        (lambda: GAT(SmallCNN(), step_up_after=-1), "step_up_after=-1"),
        (lambda: GAT(SmallCNN(), factor=0), "factor=0"),
        (lambda: GAT(SmallCNN(), FGSM(objective="ce_hard")), "attack.objective='ce_hard' would take the place"),
    ],
)
def test_bad_arguments(build: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_nuat_must_know_how_long_the_run_is() -> None:
    for more, message in (({}, "set rise_epochs or trainer.max_epochs"), ({"rise_epochs": 2}, None)):
        trainer = Trainer(max_steps=1, limit_val_batches=0, **QUIET)
        method = NuAT(SmallCNN(width=4), bernoulli(), optimizer=sgd, **more)
        if message is None:
            trainer.fit(method, loader())
            continue
        with pytest.raises(ValueError, match=message):
            trainer.fit(method, loader())
