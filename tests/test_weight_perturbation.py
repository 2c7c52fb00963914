"""Weight perturbations: pencil calculations, weights that come back, and one attack a step."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from robust_pl.callbacks import AWP, MARWP, PGD, RWP, SAM, FriendlySAM, WeightPerturbation
from robust_pl.callbacks.weights.rwp import filter_norms
from robust_pl.methods import PGDAT, Example, Method
from robust_pl.nets import SmallCNN

QUIET: dict[str, Any] = {
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
    "accelerator": "cpu",
    "limit_val_batches": 0,
}
LR, DECAY = 0.1, 0.01
START, FACTORS = torch.tensor([3.0, 4.0], dtype=torch.float64), torch.tensor([1.0, 2.0], dtype=torch.float64)
BUILDERS: dict[str, Callable[[], WeightPerturbation]] = {
    "AWP": lambda: AWP(0.05),
    "SAM": lambda: SAM(0.1),
    "ASAM": lambda: SAM(0.5, adaptive=True),
    "FriendlySAM": lambda: FriendlySAM(0.1),
    "RWP": lambda: RWP(0.05),
    "mRWP": lambda: RWP(0.05, mix=0.5),
    "MARWP": lambda: MARWP(0.05),
}


class Bowl(nn.Module):
    """Two weights a and b, as a matrix of two dimensions; the logits are (a * x, b * x)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([[3.0], [4.0]], dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)[:, :1] @ self.weight.T


class Quadratic(Method):
    """Loss (a^2 + 2 b^2) / 2 times the mean of x, so the gradient is x * (a, 2 b)."""

    def __init__(self) -> None:
        super().__init__(Bowl(), optimizer=lambda p: torch.optim.SGD(p, lr=LR, weight_decay=DECAY), num_classes=2)
        self._checked = {True, False}

    def loss(self, example: Example) -> Tensor:
        a, b = self.net.weight.flatten()
        return (a.square() + 2 * b.square()) / 2 * example.x.mean()


def fit_quadratic(perturbation: WeightPerturbation, scales: list[float]) -> Tensor:
    x = torch.tensor(scales, dtype=torch.float64).view(-1, 1, 1, 1)
    method = Quadratic()
    data = DataLoader(TensorDataset(x, torch.zeros(len(x), dtype=torch.int64)), 1)
    Trainer(max_epochs=1, callbacks=[perturbation], precision="64-true", **QUIET).fit(method, data)
    return method.net.weight.detach().flatten()


def test_awp_by_pencil() -> None:
    # w = (3, 4), |w| = 5; g = (3, 8), |g| = sqrt(73); v = 0.1 * 5 * g / |g|
    v = [0.5 * 3 / math.sqrt(73), 0.5 * 8 / math.sqrt(73)]
    moved = [3 + v[0], 4 + v[1]]
    expected = [w - LR * (factor * m + DECAY * m) for w, m, factor in zip((3, 4), moved, (1, 2), strict=True)]
    assert fit_quadratic(AWP(0.1), [1.0]).tolist() == pytest.approx(expected, abs=1e-12)


def test_sam_by_pencil() -> None:
    moved = [3 + 0.5 * 3 / math.sqrt(73), 4 + 0.5 * 8 / math.sqrt(73)]
    expected = [w - LR * (factor * m + DECAY * w) for w, m, factor in zip((3, 4), moved, (1, 2), strict=True)]
    assert fit_quadratic(SAM(0.5), [1.0]).tolist() == pytest.approx(expected, abs=1e-8)


def test_adaptive_sam_by_pencil() -> None:
    # |w| g = (9, 32), w^2 g = (27, 128)
    length = math.sqrt(9**2 + 32**2)
    moved = [3 + 0.5 * 27 / length, 4 + 0.5 * 128 / length]
    expected = [w - LR * (factor * m + DECAY * w) for w, m, factor in zip((3, 4), moved, (1, 2), strict=True)]
    assert fit_quadratic(SAM(0.5, adaptive=True), [1.0]).tolist() == pytest.approx(expected, abs=1e-8)


def test_friendly_sam_by_pencil_over_three_steps() -> None:
    rho, sigma, lmbda = 0.5, 0.7, 0.6
    w, mean = [3.0, 4.0], None
    for scale in (1.0, 2.0, 0.5):
        g = [scale * w[0], scale * 2 * w[1]]
        d = g if mean is None else [gi - sigma * mi for gi, mi in zip(g, mean, strict=True)]
        mean = g if mean is None else [lmbda * mi + (1 - lmbda) * gi for mi, gi in zip(mean, g, strict=True)]
        length = math.hypot(*d)
        moved = [wi + rho * di / length for wi, di in zip(w, d, strict=True)]
        g = [scale * moved[0], scale * 2 * moved[1]]
        w = [wi - LR * (gi + DECAY * wi) for wi, gi in zip(w, g, strict=True)]
    assert fit_quadratic(FriendlySAM(rho, sigma, lmbda), [1.0, 2.0, 0.5]).tolist() == pytest.approx(w, abs=1e-8)


def test_friendly_sam_without_sigma_is_sam() -> None:
    assert torch.equal(fit_quadratic(FriendlySAM(0.5, sigma=0), [1.0, 2.0]), fit_quadratic(SAM(0.5), [1.0, 2.0]))


def test_directions_that_cancel_do_not_move() -> None:
    sam = FriendlySAM(0.5, sigma=1.0, lmbda=0.0)
    weight = nn.Parameter(torch.ones(2, 1))
    for expected in (0.5, 0.0):
        weight.grad = torch.ones(2, 1)
        offset = sam.offsets({"weight": weight})[0]
        assert offset.norm().item() == pytest.approx(expected, abs=1e-6) and offset.isfinite().all()


def test_mixed_random_perturbation_by_pencil() -> None:
    """On a quadratic the mixed gradient is that at w + mix * e."""
    noise = torch.randn(2, 1, generator=torch.Generator().manual_seed(_rwp_seed()), dtype=torch.float64)
    moved = START * (1 + 0.1 * 0.25 * noise.flatten())
    gradient = moved * FACTORS + DECAY * START
    expected = START - LR * gradient
    assert torch.allclose(fit_quadratic(RWP(0.1, mix=0.25), [1.0]), expected, atol=1e-12, rtol=0)


def test_random_perturbation_by_pencil() -> None:
    noise = torch.randn(2, 1, generator=torch.Generator().manual_seed(_rwp_seed()), dtype=torch.float64)
    moved = START * (1 + 0.1 * noise.flatten())
    expected = START - LR * (moved * FACTORS + DECAY * START)
    assert torch.allclose(fit_quadratic(RWP(0.1), [1.0]), expected, atol=1e-12, rtol=0)


def _rwp_seed() -> int:
    from robust_pl.callbacks.attacks.draws import seed_from

    return seed_from(0, "rwp", 0)


def test_marwp_lowers_the_noise_of_filters_with_large_gradients() -> None:
    perturbation = MARWP(eta=0.5, beta=0.9)
    weight = nn.Parameter(torch.zeros(2, 3))
    for gradient in ([[1.0, 2.0, 2.0], [0.0, 0.0, 0.0]], [[1.0, 0.0, 0.0], [0.0, 0.0, 2.0]]):
        weight.grad = torch.tensor(gradient)
        perturbation.observe({"w": weight})
    squares = [0.9 * 9 + 1, 4.0]
    expected = [1 / math.sqrt(1 + 0.5 * s) for s in squares]
    assert perturbation.scale("w", torch.zeros(2, 3)).flatten().tolist() == pytest.approx(expected)


def test_noise_is_relative_to_filters() -> None:
    assert filter_norms(torch.tensor([[3.0, 4.0], [0.0, 2.0]])).flatten().tolist() == [5.0, 2.0]
    assert filter_norms(torch.tensor([3.0, 4.0])).tolist() == [5.0]


def loader(n: int = 24, batch_size: int = 8) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.rand(n, 1, 8, 8, generator=generator), torch.randint(10, (n,), generator=generator)
    return DataLoader(TensorDataset(x, y), batch_size)


class Watch(Callback):
    """The weights that each step's first and last forward passes see, and those that it leaves."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.statistics = [b.clone() for n, b in pl_module.named_buffers() if "num_batches" in n]


class Spy(PGDAT):
    """Counts attacks and losses."""

    def __init__(self, lr: float = 0.1) -> None:
        super().__init__(SmallCNN(width=4), PGD(steps=2), optimizer=lambda p: torch.optim.SGD(p, lr=lr))
        self.crafted = self.losses = self.after = 0
        self._checked = {True, False}

    def craft(self, batch: Any) -> Example:
        self.crafted += 1
        return super().craft(batch)

    def loss(self, example: Example) -> Tensor:
        self.losses += 1
        return super().loss(example)

    def after_step(self, example: Example) -> None:
        self.after += 1
        self.size = len(example.x)


@pytest.mark.parametrize("name", BUILDERS)
def test_weights_come_back_bit_for_bit(name: str) -> None:
    torch.manual_seed(0)
    method = Spy(lr=0.0)
    before = {key: p.detach().clone() for key, p in method.named_parameters()}
    Trainer(max_epochs=1, callbacks=[BUILDERS[name]()], **QUIET).fit(method, loader())
    for key, parameter in method.named_parameters():
        assert torch.equal(parameter, before[key]), key


@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.parametrize("accumulate", [1, 3])
def test_one_attack_a_batch_and_one_update_of_the_state_a_step(name: str, accumulate: int) -> None:
    perturbation = BUILDERS[name]()
    method, watch = Spy(), Watch()
    trainer = Trainer(max_epochs=1, callbacks=[perturbation, watch], accumulate_grad_batches=accumulate, **QUIET)
    trainer.fit(method, loader())
    passes = 1 if isinstance(perturbation, RWP) and perturbation.mix == 1 else 2
    assert (method.crafted, method.losses) == (3, 3 * passes)
    assert (method.after, method.size) == (3 // accumulate, 8 * accumulate)
    assert all(count == 3 for count in watch.statistics), "BatchNorm's statistics move once a batch"


@pytest.mark.parametrize("name", BUILDERS)
def test_accumulated_micro_batches_equal_the_whole_batch(name: str) -> None:
    class Plain(Method):
        def loss(self, example: Example) -> Tensor:
            return F.cross_entropy(self(example.x), example.y)

    class NoNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 10))

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

    found = []
    for size, accumulate in ((24, 1), (8, 3)):
        torch.manual_seed(0)
        method = Plain(NoNorm(), optimizer=lambda p: torch.optim.SGD(p, lr=0.5)).double()
        x, y = loader().dataset.tensors
        data = DataLoader(TensorDataset(x.double(), y), size)
        trainer = Trainer(
            max_epochs=3, callbacks=[BUILDERS[name]()], accumulate_grad_batches=accumulate, precision="64-true", **QUIET
        )
        trainer.fit(method, data)
        found.append(torch.cat([p.detach().flatten() for p in method.parameters()]))
    assert torch.allclose(*found, atol=1e-12, rtol=0)
    torch.manual_seed(0)
    assert (found[0] - torch.cat([p.detach().double().flatten() for p in NoNorm().parameters()])).abs().max() > 1e-3


def test_before_start_epoch_a_step_is_an_ordinary_one() -> None:
    found = []
    for callbacks in ([], [AWP(start_epoch=1)]):
        torch.manual_seed(0)
        method = Spy()
        Trainer(max_epochs=1, callbacks=callbacks, **QUIET).fit(method, loader())
        found.append((method.losses, torch.cat([p.detach().flatten() for p in method.parameters()])))
    assert found[0][0] == found[1][0] == 3 and torch.equal(found[0][1], found[1][1])


def test_gradient_clipping_sees_the_final_gradient_alone() -> None:
    class Norm(Callback):
        def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
            self.calls = getattr(self, "calls", 0) + 1

    norm = Norm()
    Trainer(max_epochs=1, callbacks=[SAM(), norm], gradient_clip_val=0.1, **QUIET).fit(Spy(), loader())
    assert norm.calls == 3


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: AWP(gamma=0), "gamma=0"),
        (lambda: SAM(rho=-1), "rho=-1"),
        (lambda: FriendlySAM(lmbda=1.0), "lmbda=1.0"),
        (lambda: RWP(mix=0), "mix=0"),
        (lambda: RWP(sigma=0), "sigma=0"),
        (lambda: MARWP(beta=1.0), "beta=1.0"),
        (lambda: AWP(start_epoch=-1), "start_epoch=-1"),
    ],
)
def test_bad_arguments(build: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


class Foreign(LightningModule):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        raise AssertionError("never trained")

    def configure_optimizers(self) -> None:
        return None


class Refuses(Spy):
    refuses_perturbation = "it steps the weights itself"


@pytest.mark.parametrize(
    ("method", "callbacks", "precision", "message"),
    [
        (Spy(), [AWP(), SAM()], "32-true", "AWP and SAM"),
        (Foreign(), [AWP()], "32-true", "AWP cannot be combined with Foreign"),
        (Refuses(), [RWP()], "32-true", "it steps the weights itself"),
        (Spy(), [SAM()], "16-true", "bf16-mixed"),
    ],
)
def test_what_cannot_be_combined_is_refused_before_training(
    method: LightningModule, callbacks: list[Callback], precision: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Trainer(max_epochs=1, callbacks=callbacks, precision=precision, **QUIET).fit(method, loader())
