"""ConvergeSmooth: when a benign loss is added, subtracted or left, over epochs and restarts; and FGSM-RS-CS by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from robust_pl.callbacks import SAM, NoisyFGSM
from robust_pl.data import DigitsDataModule
from robust_pl.methods import FGSMMEPCS, FGSMRSCS, ConvergeSmooth
from robust_pl.nets import SmallCNN

from .test_methods import QUIET, loader, sgd

EPS, CLASSES = 0.1, 3


def epoch_of(smooth: ConvergeSmooth, epoch: int, *batches: list[float]) -> list[float]:
    """Weights that the batches of an epoch get."""
    weights = []
    for losses in batches:
        judged = smooth.judge(torch.tensor(losses), epoch)
        assert judged.shape == (1, 3) and judged[0, :2].tolist() == pytest.approx([sum(losses), len(losses)])
        smooth.add(judged, epoch)
        weights.append(judged[0, 2].item())
    return weights


def test_batches_beside_the_epoch_before_by_hand() -> None:
    smooth = ConvergeSmooth(gamma=0.1, weight=2.0)
    assert epoch_of(smooth, 0, [1.0, 2.0], [0.05]) == [2.0, 0.0]  # beside 0
    # The mean over samples is 3.05 / 3 = 1.0167: the smaller last batch counts by its size.
    assert epoch_of(smooth, 1, [1.1, 1.1], [1.13], [0.92], [0.9]) == [0.0, 2.0, 0.0, -2.0]
    assert smooth.previous.item() == pytest.approx(3.05 / 3) and smooth.rise.item() == pytest.approx(3.05 / 3)
    mean = (2.2 + 1.13 + 0.92 + 0.9) / 5
    assert epoch_of(smooth, 2, [mean + 0.09], [mean + 0.11], [mean - 0.11]) == [0.0, 2.0, -2.0]
    assert smooth.previous.item() == pytest.approx(mean) and smooth.rise.item() == pytest.approx(mean - 3.05 / 3)


@pytest.mark.parametrize(("rise", "threshold"), [(0.5, 0.1), (0.06, 0.06), (0.01, 0.025), (-0.3, 0.025)])
def test_the_threshold_is_the_rise_cut_to_its_bounds(rise: float, threshold: float) -> None:
    smooth = ConvergeSmooth(gamma=0.1, ratio=4.0)
    epoch_of(smooth, 0, [1.0])
    epoch_of(smooth, 1, [1.0 + rise])
    near, far = 1 + rise + threshold - 0.002, 1 + rise + threshold + 0.002
    assert epoch_of(smooth, 2, [near], [far]) == [0.0, 1.0]
    constant = ConvergeSmooth(gamma=0.1)
    epoch_of(constant, 0, [1.0])
    epoch_of(constant, 1, [1.0 + rise])
    assert epoch_of(constant, 2, [1 + rise + 0.098], [1 + rise + 0.102]) == [0.0, 1.0]


def test_when_it_is_on() -> None:
    smooth = ConvergeSmooth()
    assert [e for e in range(120) if smooth.active(e)] == [*range(2, 99), 102, 103, 107, 108]
    assert [e for e in range(20) if ConvergeSmooth(stages=[0, 20]).active(e)] == list(range(2, 19))
    assert [e for e in range(9) if ConvergeSmooth(stages=[0, 5, 9], stride=0).active(e)] == [1, 2, 3, 4, 6, 7, 8]


def test_judging_moves_nothing_and_a_state_dict_goes_on_anywhere() -> None:
    smooth = ConvergeSmooth(gamma=0.1)
    epoch_of(smooth, 0, [1.0, 3.0])
    before = {k: v.clone() for k, v in smooth.state_dict().items()}
    for epoch in (0, 1):
        smooth.judge(torch.tensor([5.0]), epoch)
    assert all(torch.equal(before[k], v) for k, v in smooth.state_dict().items())
    for losses in ([2.5], [1.5]):  # at the end of an epoch, and in the middle of one
        other = ConvergeSmooth(gamma=0.1)
        other.load_state_dict(smooth.state_dict())
        assert epoch_of(other, 1, losses, [2.0]) == epoch_of(smooth, 1, losses, [2.0])
        assert all(torch.equal(v, other.state_dict()[k]) for k, v in smooth.state_dict().items())


def test_an_epoch_in_which_nothing_was_seen_does_not_count() -> None:
    smooth = ConvergeSmooth(gamma=0.1)
    epoch_of(smooth, 0, [1.0])
    assert epoch_of(smooth, 4, [1.05]) == [0.0] and smooth.previous.item() == 1.0
    fresh = ConvergeSmooth(gamma=0.1)
    assert epoch_of(fresh, 3, [1.05]) == [1.0] and fresh.previous.item() == 0.0


def test_sums_stay_wide_where_the_module_is_in_half_precision() -> None:
    smooth = ConvergeSmooth().to(torch.bfloat16)
    for _ in range(300):
        smooth.add(smooth.judge(torch.ones(128, dtype=torch.bfloat16), 0), 0)
    assert smooth.sums.tolist() == [38400.0, 38400.0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"gamma": -0.1}, "gamma=-0.1 must be at least 0"),
        ({"ratio": 0.5}, "ratio=0.5 must be at least 1"),
        ({"weight": -1}, "weight=-1"),
        ({"stride": -1}, "stride=-1"),
        ({"stages": [5]}, r"stages=\[5\] must be rising"),
        ({"stages": [0, 100, 100]}, r"stages=\[0, 100, 100\] must be rising"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ConvergeSmooth(**arguments)
    with pytest.raises(ValueError, match="label_factor=0"):
        FGSMRSCS(SmallCNN(width=2), label_factor=0)


def tiny() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 6), nn.Tanh(), nn.Linear(6, CLASSES)).double()


def gradients(loss: Tensor, net: nn.Module) -> Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(net.parameters()))])


@pytest.mark.parametrize("smoothed", [False, True])
@pytest.mark.parametrize(("stages", "previous", "weight"), [([0, 9], 0.0, 0), ([-2, 9], 0.0, 1), ([-2, 9], 5.0, -1)])
def test_rs_cs_by_hand(smoothed: bool, stages: list[int], previous: float, weight: int) -> None:
    method = FGSMRSCS(tiny(), NoisyFGSM(EPS, k=1.0), ConvergeSmooth(stages=stages), label_factor=0.6, num_classes=CLASSES)
    method.smoothing.previous.fill_(previous)
    generator, net = torch.Generator().manual_seed(0), tiny()
    x = torch.rand(6, 1, 4, 4, generator=generator, dtype=torch.float64)
    hard = torch.arange(6) % CLASSES
    y = F.one_hot(hard, CLASSES).double() * 0.6 + 0.4 / CLASSES if smoothed else hard
    example = method.craft((x, y, torch.arange(6)))
    start = example.start.clone()
    assert (start - x).abs().max() <= EPS and (start - x).abs().max() > 0.9 * EPS and start.min() >= 0 and start.max() <= 1
    point = start.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(net(point), y), point)  # of labels as they are
    x_adv = (start + EPS * gradient.sign()).clamp(0, 1)
    assert torch.allclose(example.x_adv, x_adv, atol=1e-12) and (x_adv - x).abs().max() > 1.5 * EPS

    one_hot = F.one_hot(hard, CLASSES).double()
    before = one_hot * 0.6 + 0.4 / CLASSES if smoothed else one_hot
    target = 0.6 * before + 0.4 * (1 - before) / (CLASSES - 1)
    loss = method.loss(example)
    expected = F.cross_entropy(net(x_adv), target) + weight * F.cross_entropy(net(start), target)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)
    assert torch.allclose(gradients(loss, method.net), gradients(expected, net), atol=1e-12)
    assert example.judged[0, 2].item() == (weight or 1)  # which is not used where the smoothing is off
    assert example.judged[0, 0].item() == pytest.approx(6 * F.cross_entropy(net(start), target).item(), rel=1e-6)


def test_defaults_are_the_authors() -> None:
    attack = FGSMRSCS(SmallCNN(width=2)).attack
    assert isinstance(attack, NoisyFGSM) and (attack.eps, attack.k, attack.step_size, attack.bn_mode) == (
        8 / 255,
        1.0,
        None,
        "train",
    )


def test_a_decision_holds_where_a_perturbation_of_weights_asks_again() -> None:
    torch.manual_seed(0)
    method = FGSMRSCS(SmallCNN(width=2), NoisyFGSM(EPS, k=1.0), ConvergeSmooth(stages=[-2, 9]), optimizer=sgd)
    example = method.craft(next(iter(loader())))
    method.loss(example)
    judged = example.judged.clone()
    assert judged[0, 2] == 1
    with torch.no_grad():
        for parameter in method.parameters():
            parameter.mul_(3)
        method.smoothing.previous.fill_(100.0)
    method.loss(example)
    assert torch.equal(example.judged, judged)


class Judged(Callback):
    """What each step judged."""

    def __init__(self, method: Any) -> None:
        self.seen: list[Tensor] = []
        after = method.after_step

        def watched(example: Any) -> None:
            self.seen.append(example.judged.clone())
            after(example)

        method.after_step = watched

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.sums = pl_module.smoothing.sums.clone()


@pytest.mark.parametrize("perturbed", [False, True])
def test_an_epochs_mean_is_that_of_its_samples(perturbed: bool) -> None:
    torch.manual_seed(0)
    method = FGSMRSCS(SmallCNN(width=2), NoisyFGSM(EPS, k=1.0), optimizer=sgd)
    judged = Judged(method)
    settings = {**QUIET, "max_epochs": 2, "limit_val_batches": 0, "accumulate_grad_batches": 2}
    Trainer(callbacks=[judged, *([SAM(0.1)] if perturbed else [])], **settings).fit(method, loader(28))
    assert [len(step) for step in judged.seen] == [2, 2, 2, 2]
    first, second = torch.cat(judged.seen[:2]), torch.cat(judged.seen[2:])
    assert first[:, 1].tolist() == [8, 8, 8, 4]
    assert torch.allclose(judged.sums, second[:, :2].sum(0)) and method.smoothing.epoch == 1
    assert method.smoothing.previous.item() == pytest.approx((first[:, 0].sum() / 28).item(), rel=1e-6)


class StopAt(Callback):
    """Save after so many steps, and stop."""

    def __init__(self, step: int, path: Any) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)
            trainer.should_stop = True


@pytest.mark.parametrize("kind", [FGSMRSCS, FGSMMEPCS])
@pytest.mark.parametrize("stop", [8, 12, 15])
def test_resumed_equals_uninterrupted(kind: Any, stop: int, tmp_path: Any) -> None:
    """At the end of an epoch, and in the middle of one that is smoothed."""

    def fit(seed: int, callbacks: list[Callback], ckpt_path: Any = None) -> Any:
        torch.manual_seed(seed)
        method = kind(SmallCNN(width=2), smoothing=ConvergeSmooth(0.01, stages=[0, 9], stride=0), optimizer=sgd)
        settings = {**QUIET, "max_epochs": 5, "limit_train_batches": 4, "limit_val_batches": 0, "default_root_dir": tmp_path}
        trainer = Trainer(callbacks=callbacks, **settings)
        data = DigitsDataModule(batch_size=300, drop_last=False)
        trainer.fit(method, data, ckpt_path=ckpt_path, weights_only=None if ckpt_path is None else True)
        return method

    whole = fit(0, [])
    fit(0, [StopAt(stop, tmp_path / "stopped.ckpt")])
    resumed = fit(1, [], tmp_path / "stopped.ckpt")
    for (name, a), b in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert whole.smoothing.previous > 0 and whole.smoothing.sums[1] == 1200
    if kind is FGSMMEPCS:
        everyone = torch.arange(1437)
        for a, b in zip(whole.per_sample.read(everyone), resumed.per_sample.read(everyone), strict=True):
            assert torch.equal(a, b)


def test_labels_as_given_without_a_factor() -> None:
    method = FGSMRSCS(tiny(), NoisyFGSM(EPS, k=1.0), num_classes=CLASSES)
    x = torch.rand(4, 1, 4, 4, dtype=torch.float64)
    soft = torch.tensor([[0.2, 0.5, 0.3]] * 4, dtype=torch.float64)
    example = method.craft((x, soft))
    assert method.loss(example).item() == pytest.approx(F.cross_entropy(method(example.x_adv), soft).item(), abs=1e-12)


def test_a_users_own_pairs_are_enough() -> None:
    data = DataLoader(TensorDataset(*loader().dataset.tensors), 8)
    method = FGSMRSCS(SmallCNN(width=2), optimizer=sgd)
    Trainer(max_epochs=1, limit_val_batches=0, **QUIET).fit(method, data)
    assert method.smoothing.sums[1] == len(data.dataset)
