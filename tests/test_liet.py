"""LIET: its step by hand, its patterns, and the labels that it smooths at random."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from robust_pl.callbacks import FGSM, PGD, NoisyFGSM
from robust_pl.data import DigitsDataModule
from robust_pl.functional.output_distances import jensen_shannon
from robust_pl.functional.smoothing import randomly_smoothed
from robust_pl.methods import LIET
from robust_pl.nets import SmallCNN

from .test_composition import assert_equal, trainer_for
from .test_methods import QUIET, Counted, loader, sgd

EPS, CLASSES, SIDE = 0.1, 3, 16


def tiny() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(SIDE**2, 6), nn.Tanh(), nn.Linear(6, CLASSES)).double()


def batch(n: int = 6, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(n, 1, SIDE, SIDE, generator=generator, dtype=torch.float64)
    return x, torch.arange(n) % CLASSES, torch.arange(n)


def build(attack: Any = None, net: nn.Module | None = None, **more: Any) -> LIET:
    """In the second of four epochs."""
    attack = FGSM(EPS, bn_mode="train") if attack is None else attack
    method = LIET(tiny() if net is None else net, attack, optimizer=sgd, **{"num_classes": CLASSES, **more}).double()
    method.trainer = Trainer(max_epochs=4, **QUIET)
    method.trainer.fit_loop.epoch_progress.current.completed = 1
    method.trainer.fit_loop.epoch_progress.current.processed = 1
    return method


def gradient_at(net: nn.Module, point: Tensor, y: Tensor) -> Tensor:
    point = point.clone().requires_grad_()
    return torch.autograd.grad(F.cross_entropy(net(point), y), point)[0]


# Functions --------------------------------------------------------------------------------------------------------------


def test_random_smoothing_by_hand() -> None:
    noise = torch.tensor([[0.9, 0.1, 0.3], [0.5, 0.5, 0.0]], dtype=torch.float64)
    expected = torch.tensor([[0.4, 0.15, 0.45], [0.6, 0.4, 0.0]], dtype=torch.float64)
    found = randomly_smoothed(torch.tensor([0, 1]), noise, 0.6)
    assert torch.allclose(found, expected, atol=1e-9)
    mixed = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.5, 0.4]])
    assert torch.equal(randomly_smoothed(mixed, noise, 0.6), found)
    assert torch.equal(randomly_smoothed(torch.tensor([0, 1]), noise, 0.0), F.one_hot(torch.tensor([0, 1]), 3).double())
    nothing = randomly_smoothed(torch.tensor([2]), torch.zeros(1, 3), 0.6)
    assert torch.allclose(nothing, torch.tensor([[0.3, 0.3, 0.4]]))


def test_jensen_shannon_by_hand() -> None:
    p = torch.tensor([[0.5, 0.25, 0.25], [0.2, 0.3, 0.5]], dtype=torch.float64)
    q = torch.tensor([[0.1, 0.6, 0.3], [0.2, 0.3, 0.5]], dtype=torch.float64)
    expected = 0.0
    for a, b in zip(p.tolist(), q.tolist(), strict=True):
        for u, v in zip(a, b, strict=True):
            m = (u + v) / 2
            expected += (u * math.log(u / m) + v * math.log(v / m)) / 2 / 2  # mean over two samples
    assert jensen_shannon(p.log(), q.log() + 3).item() == pytest.approx(expected, abs=1e-12)
    assert jensen_shannon(q.log(), p.log()).item() == pytest.approx(expected, abs=1e-12)


def test_jensen_shannon_where_probabilities_underflow() -> None:
    a = torch.tensor([[0.0, 2000.0, -500.0]], requires_grad=True)
    b = torch.tensor([[2000.0, 0.0, -500.0]], requires_grad=True)
    divergence = jensen_shannon(a, b)
    divergence.backward()
    assert divergence.item() == pytest.approx(math.log(2), abs=1e-6)
    assert a.grad.isfinite().all() and b.grad.isfinite().all()
    assert jensen_shannon(a.detach().bfloat16(), b.detach().bfloat16()).dtype == torch.float32


def test_the_gradient_of_jensen_shannon_flows_through_both_sides() -> None:
    a, b = (torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i in range(2))
    assert torch.autograd.gradcheck(jensen_shannon, (a.requires_grad_(), b.requires_grad_()))


# A step -----------------------------------------------------------------------------------------------------------------


def test_patterns_are_signs_of_the_gradients_of_grey_images() -> None:
    method, net = build(smoothing=0.0), tiny()
    method.craft(batch())
    expected = gradient_at(net, torch.full((CLASSES, 1, SIDE, SIDE), 0.5, dtype=torch.float64), torch.arange(CLASSES)).sign()
    assert torch.equal(method.patterns.signs, expected) and (expected != 0).all()
    assert len({tuple(pattern.flatten().tolist()) for pattern in expected}) == CLASSES


def test_a_step_by_hand() -> None:
    """Without noise the start is the pattern itself, plus or minus."""
    method, net = build(mask_min=0.0, mask_max=0.0, lmbda=100.0, smoothing=0.6), tiny()
    x, y, index = batch()
    sides = set()
    for _ in range(8):
        example = method.craft((x, y, index))
        shift = EPS * method.patterns.signs[y]
        starts = {side: (x + side * shift).clamp(0, 1) for side in (-1, 1)}
        side = next(side for side, start in starts.items() if torch.allclose(example.start, start, atol=1e-12))
        sides.add(side)
        # Of smoothed labels the gradient is (softmax - label) @ W: the attack's own labels are not kept, its gradient is.
        moved = starts[side] + EPS * example.gradient.sign()
        x_adv = (x + (moved - x).clamp(-EPS, EPS)).clamp(0, 1)
        assert torch.allclose(example.x_adv, x_adv, atol=1e-12)
        p, q = net(starts[side]).softmax(1), net(x_adv).softmax(1)
        m = (p + q) / 2
        divergence = ((p * (p / m).log()).sum(1) + (q * (q / m).log()).sum(1)).mean() / 2
        expected = -(example.soft * q.log()).sum(1).mean() + 100.0 * 2 / 4 * divergence
        assert method.loss(example).item() == pytest.approx(expected.item(), abs=1e-10)
    assert sides == {-1, 1}


def test_the_attack_without_smoothing_takes_the_gradient_of_the_label() -> None:
    method, net = build(smoothing=0.0), tiny()
    x, y, index = batch()
    example = method.craft((x, y, index))
    assert torch.allclose(example.gradient / len(x), gradient_at(net, example.start, y), atol=1e-12)
    assert torch.equal(example.soft, F.one_hot(y, CLASSES).double()) and torch.equal(example.y, y)


def test_labels_are_smoothed_anew_for_each_gradient() -> None:
    method, net = build(smoothing=0.6), tiny()
    x, y, index = batch()
    seen = [method.craft((x, y, index)) for _ in range(2)]
    for example in seen:
        assert torch.allclose(example.soft.gather(1, y.unsqueeze(1)), torch.full((len(y), 1), 0.4, dtype=torch.float64))
        assert torch.allclose(example.soft.sum(1), torch.ones(len(y), dtype=torch.float64))
        # The attack's labels are others than those of the loss.
        assert not torch.allclose(example.gradient / len(x), gradient_at(net, example.start, example.soft), rtol=0.01)
    assert not torch.allclose(seen[0].soft, seen[1].soft)
    one_hot = F.one_hot(y, CLASSES).double()
    mixed = build(smoothing=0.6).craft((x, 0.6 * one_hot + 0.4 / CLASSES, index))
    assert torch.equal(mixed.soft, seen[0].soft) and torch.equal(mixed.x_adv, seen[0].x_adv)


def test_the_attacks_labels_are_smoothed_by_as_much() -> None:
    """Its gradient is J^T (softmax - label) for each sample, with J the Jacobian of the logits: so it tells its label."""
    method, net = build(smoothing=0.6), tiny()
    x, y, index = batch()
    example = method.craft((x, y, index))
    for start, gradient, right in zip(example.start, example.gradient, y.tolist(), strict=True):
        jacobian = torch.autograd.functional.jacobian(lambda image: net(image[None])[0], start).flatten(1)
        error = torch.linalg.lstsq(jacobian.T, gradient.flatten().unsqueeze(1)).solution.squeeze(1)
        label = net(start[None]).softmax(1)[0] - error
        assert label[right].item() == pytest.approx(0.4, abs=1e-6) and label.sum().item() == pytest.approx(1, abs=1e-6)
        others = torch.cat([label[:right], label[right + 1 :]])
        assert (others > 0).all() and others.max() > 0.301  # not alike


def noise_share(method: LIET) -> float:
    """How many entries of a start are those of no pattern, far from the box."""
    x, y, index = batch()
    x = 0.4 + 0.2 * x
    shift = method.craft((x, y, index)).start - x
    return ((shift.abs() - EPS).abs() > 1e-9).double().mean().item()


def test_one_share_a_batch_is_replaced_by_noise() -> None:
    shares = [noise_share(build(attack=FGSM(EPS, bn_mode="train", seed=seed))) for seed in range(40)]
    assert 0.08 < min(shares) < 0.2 and 0.4 < max(shares) < 0.52 and 0.25 < sum(shares) / 40 < 0.35
    assert noise_share(build(mask_min=1.0, mask_max=1.0)) == 1.0 and noise_share(build(mask_min=0.0, mask_max=0.0)) == 0.0


def test_ball_and_box_with_fgsm_and_the_box_alone_with_noisy_fgsm() -> None:
    x, y, index = batch()
    example = build(mask_min=1.0, mask_max=1.0).craft((x, y, index))
    assert (example.start - x).abs().max() <= EPS and (example.x_adv - x).abs().max() <= EPS + 1e-12
    example = build(NoisyFGSM(EPS, k=2.0), mask_min=1.0, mask_max=1.0).craft((x, y, index))
    start, moved = (example.start - x).abs(), (example.x_adv - x).abs()
    assert EPS < start.max() <= 2 * EPS + 1e-12 and 2 * EPS < moved.max() <= 3 * EPS + 1e-12
    assert torch.allclose(example.x_adv, (example.start + EPS * example.gradient.sign()).clamp(0, 1), atol=1e-12)
    assert example.start.min() >= 0 and example.start.max() <= 1


def test_each_sample_may_have_its_own_eps() -> None:
    method, (x, y, index) = build(mask_min=0.0, mask_max=0.0), batch()
    eps = torch.linspace(0.01, 0.2, len(x), dtype=torch.float64).view(-1, 1, 1, 1)
    example = method.craft((x, y, index), eps)
    shift = example.start - x
    assert torch.allclose(shift.abs().amax((1, 2, 3)), eps.flatten()) and ((example.x_adv - x).abs() <= eps + 1e-12).all()


# A run ------------------------------------------------------------------------------------------------------------------


class Greys(Callback):
    """The batches in which patterns were found, and the weight of the divergence in each."""

    def __init__(self) -> None:
        self.batches: list[tuple[int, int]] = []
        self.weights: list[float] = []
        self.found: Tensor | None = None

    def on_train_batch_end(self, trainer: Trainer, pl_module: LIET, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.found is None or not torch.equal(pl_module.patterns.signs, self.found):
            self.batches.append((trainer.current_epoch, batch_idx))
            self.found = pl_module.patterns.signs.clone()
        self.weights.append(pl_module.weight())


def small(**more: Any) -> LIET:
    return LIET(SmallCNN(width=4), FGSM(EPS, bn_mode="train"), optimizer=sgd, **more)


def test_patterns_are_found_anew_in_the_first_of_so_many_batches() -> None:
    torch.manual_seed(0)
    greys = Greys()
    method = small(update_every=3, lmbda=12.0)
    settings = {**QUIET, "max_epochs": 2, "limit_train_batches": 5, "limit_val_batches": 0}
    Trainer(callbacks=[greys], **settings).fit(method, loader(n=40))
    assert greys.batches == [(0, 0), (0, 3), (1, 0), (1, 3)]
    assert greys.weights == [6.0] * 5 + [12.0] * 5


def test_a_step_costs_what_the_docstring_says() -> None:
    torch.manual_seed(0)
    net = Counted(8)
    method = LIET(net, FGSM(EPS, bn_mode="train"), update_every=2, optimizer=sgd)
    method._checked = {True, False}
    Trainer(**{**QUIET, "max_epochs": 1, "limit_val_batches": 0}).fit(method, loader())
    greys = 2  # ten grey images each, in batches 0 and 2, counted in eights
    assert net.forwards == 3 * 2 + greys and net.for_training == 3 * 2
    assert method.attack.forwards == method.attack.backwards == 24 + 10 * greys


def test_grey_images_leave_no_trace() -> None:
    torch.manual_seed(0)
    method = small().train()
    statistics = method.net.layers[1].running_mean.clone()
    method._find_patterns(torch.rand(2, 1, 8, 8), _Even())
    assert torch.equal(method.net.layers[1].running_mean, statistics)
    assert all(module.training for module in method.modules()) and all(p.grad is None for p in method.parameters())


class _Even:
    """Draws one half."""

    def uniform(self, like: Tensor) -> Tensor:
        return torch.full_like(like, 0.5)


def test_resumed_in_the_middle_of_an_epoch_it_goes_on_bit_for_bit(tmp_path: Path) -> None:
    class Stop(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: LIET, outputs: Any, batch: Any, batch_idx: int) -> None:
            if trainer.global_step == 5:  # between patterns
                trainer.save_checkpoint(tmp_path / "stopped.ckpt")
                trainer.should_stop = True
                trainer.limit_train_batches = 0

    def run(*callbacks: Callback, ckpt_path: Path | None = None, seed: int = 0) -> Trainer:
        torch.manual_seed(seed)
        trainer = trainer_for(list(callbacks), max_epochs=2, limit_train_batches=8, default_root_dir=tmp_path)
        trainer.fit(small(update_every=3), DigitsDataModule(batch_size=8), ckpt_path=ckpt_path, weights_only=True)
        return trainer

    run().save_checkpoint(tmp_path / "whole.ckpt")
    run(Stop())
    run(ckpt_path=tmp_path / "stopped.ckpt", seed=1).save_checkpoint(tmp_path / "resumed.ckpt")
    whole, resumed = (torch.load(tmp_path / f"{name}.ckpt", weights_only=True) for name in ("whole", "resumed"))
    assert torch.load(tmp_path / "stopped.ckpt", weights_only=True)["global_step"] == 5 and whole["global_step"] == 16
    for key in ("state_dict", "optimizer_states", "global_step"):
        assert_equal(whole[key], resumed[key], key)


def test_checkpoints(tmp_path: Path) -> None:
    settings = {**QUIET, "limit_val_batches": 0}
    method = small()
    trainer = Trainer(max_epochs=1, **settings)
    trainer.fit(method, loader())
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    fresh = small()
    trainer = Trainer(callbacks=[PGD(EPS, steps=1)], **QUIET)
    trainer.test(fresh, loader(), ckpt_path=tmp_path / "x.ckpt", weights_only=True, verbose=False)
    assert torch.equal(fresh.patterns.signs, method.patterns.signs)
    other = LIET(SmallCNN(7, width=4), FGSM(EPS, bn_mode="train"), optimizer=sgd, num_classes=7)
    with pytest.raises(ValueError, match="holds patterns of 10 classes and num_classes is 7"):
        Trainer(max_epochs=2, **settings).fit(other, loader(), ckpt_path=tmp_path / "x.ckpt", weights_only=True)


def test_images_of_two_sizes_are_refused() -> None:
    method = small()
    method.craft(next(iter(loader())))
    larger = next(iter(DataLoader(TensorDataset(torch.rand(8, 1, 12, 12), torch.arange(8)), 8)))
    with pytest.raises(ValueError, match=r"patterns are of images \(1, 8, 8\) and these are \(1, 12, 12\)"):
        method.craft(larger)


def test_the_number_of_epochs_must_be_known() -> None:
    with pytest.raises(ValueError, match=r"set trainer\.max_epochs"):
        Trainer(max_steps=2, **QUIET).fit(small(), loader())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"lmbda": -1}, ValueError, "lmbda=-1"),
        ({"smoothing": 1.0}, ValueError, "smoothing=1.0"),
        ({"mask_min": 0.6}, ValueError, "mask_min=0.6 and mask_max=0.5"),
        ({"mask_max": 1.5}, ValueError, "mask_max=1.5"),
        ({"update_every": 0}, ValueError, "update_every=0"),
        ({"attack": PGD(EPS)}, TypeError, "attack is a PGD: LIET takes FGSM"),
        ({"attack": FGSM(EPS, random_start=True)}, ValueError, "random_start=True"),
        ({"attack": FGSM(EPS, objective="margin")}, ValueError, "objective='margin'"),
        ({"attack": NoisyFGSM(EPS, k=0.5)}, ValueError, r"attack\.k=0\.5"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        LIET(SmallCNN(width=4), **arguments)


def test_default_settings_are_the_papers() -> None:
    method = LIET(SmallCNN(width=4))
    assert (method.attack.eps, method.attack.bn_mode, method.lmbda, method.smoothing) == (8 / 255, "train", 100.0, 0.6)
    assert (method.mask_min, method.mask_max, method.update_every) == (0.1, 0.5, 20)
