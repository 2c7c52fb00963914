"""AdvProp and Fast AdvProp: what is attacked, which BatchNorms an image goes through, and which gradients come of it."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer
from torch import Tensor, nn

from robust_pl.callbacks import AWP, BIM, EMA, FGSM, PGD, NoisyFGSM
from robust_pl.evaluation.loading import load_model
from robust_pl.methods import AdvProp, FastAdvProp
from robust_pl.methods.natural import fast_adv_prop
from robust_pl.nets import DualBatchNorm, DualNet, SmallCNN

from .conftest import CONFIGS
from .test_methods import QUIET, loader, sgd


def dual(**arguments: Any) -> DualNet:
    """A network whose halves differ in everything."""
    torch.manual_seed(0)
    net = DualNet(SmallCNN(width=4), **arguments)
    for layer in (m for m in net.modules() if isinstance(m, DualBatchNorm)):
        for half in (layer.clean, layer.adv):
            for tensor in (half.weight.data, half.bias.data, half.running_mean, half.running_var):
                tensor.copy_(torch.rand(len(tensor)) + 0.5)
    return net


def batch(n: int = 10, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n, 1, 8, 8, generator=generator), torch.randint(10, (n,), generator=generator), torch.arange(n)


def randomise(net: nn.Module, half: str) -> None:
    for name, tensor in net.state_dict().items():
        if f".{half}." in name and tensor.is_floating_point():
            tensor.copy_(torch.rand(tensor.shape) + 0.5)


def statistics(net: nn.Module, half: str) -> list[Tensor]:
    return [b.clone() for name, b in net.named_buffers() if f".{half}.running" in name]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_a_trained_network_is_trained_on() -> None:
    """One that came in eval mode would learn no statistics."""
    net = DualNet(SmallCNN(width=4).eval())
    assert all(module.training for module in net.modules())


@pytest.mark.parametrize("training", [True, False])
def test_an_image_takes_one_route_and_the_other_has_no_say(training: bool) -> None:
    net, x = dual().train(training), batch()[0]
    main = net(x)
    assert torch.equal(main, net.net(x))
    with net.through("aux"):
        aux = net(x)
    randomise(net, "adv")
    assert torch.equal(net(x), main)
    with net.through("aux"):
        assert not torch.equal(net(x), aux)
    swapped = dual(route="aux").train(training)
    assert torch.equal(swapped(x), aux)
    with swapped.through("main"):
        assert torch.equal(swapped(x), main)


def test_the_attack_aims_at_random_classes_through_the_auxiliary_half() -> None:
    x, y, index = batch(400)
    method = AdvProp(dual(), PGD(0.1, 0.02, steps=3, random_start=False, targeted=True), optimizer=sgd)
    target = method._targets(method.clean((x, y, index)))
    offsets = torch.bincount((target - y) % 10, minlength=10)
    assert len(offsets) == 10 and offsets.min() > 20, "every class, the true one among them"
    found = method.craft((x, y, index)).x_adv
    assert method.net.net.layers[1].routing.weight == 0.0
    for route, alike in (("aux", True), ("main", False)):
        with method.net.through(route):
            expected = PGD(0.1, 0.02, steps=3, random_start=False, targeted=True)(method.net, x, target)
        assert torch.equal(found, expected) == alike
    main = AdvProp(dual(), PGD(0.1, 0.02, steps=3, random_start=False, targeted=True), attack_route="main", optimizer=sgd)
    assert torch.equal(main.craft((x, y, index)).x_adv, expected)
    untargeted = AdvProp(dual(), FGSM(0.1), optimizer=sgd).craft((x, y, index)).x_adv
    with method.net.through("aux"):
        assert torch.equal(untargeted, FGSM(0.1)(method.net, x, y))


def test_starts_and_budget() -> None:
    """A step too small to be seen leaves the start; clean starts are as many as asked for."""
    x, y, index = batch(1000)
    method = AdvProp(dual(), PGD(0.2, 1e-9, steps=1, targeted=True), clean_start=0.3, optimizer=sgd)
    moved = (method.craft((x, y, index)).x_adv - x).abs().amax((1, 2, 3))
    assert 0.25 < (moved < 1e-6).float().mean() < 0.35
    assert (moved[moved > 1e-6] > 0.1).all() and moved.max() <= 0.2 + 1e-6
    again = (method.craft((x, y, index)).x_adv - x).abs().amax((1, 2, 3)) < 1e-6
    assert not torch.equal(again, moved < 1e-6), "another draw in the next step"
    default = AdvProp(dual(), optimizer=sgd).craft((x, y, index)).x_adv
    assert (default - x).abs().max() <= 1 / 255 + 1e-6 and default.min() >= 0 and default.max() <= 1
    assert all(p.grad is None for p in method.parameters())


def test_the_loss_is_the_mean_over_both_halves_each_normalised_by_itself() -> None:
    x, y, index = batch(7)
    method = AdvProp(dual().double(), PGD(0.1, steps=2, targeted=True), optimizer=sgd)
    method.train()
    x = x.double()
    example, net = method.craft((x, y, index)), deepcopy(method.net)
    loss = method.loss(example)
    with net.through("main"):
        clean = F.cross_entropy(net(x), y)
    with net.through("aux"):
        attacked = F.cross_entropy(net(example.x_adv), y)
    assert torch.allclose(loss, (clean + attacked) / 2, atol=1e-12)
    for name, tensor in method.net.state_dict().items():
        assert torch.allclose(tensor, net.state_dict()[name]), name


def test_clean_images_move_the_main_statistics_alone_and_averages_hold_both() -> None:
    given = batch(8, seed=9)[0]

    class Given(AdvProp):
        def craft(self, batch: Any, eps: Any = None) -> Any:
            example = super().craft(batch, eps)
            example.x_adv = given
            return example

    found = []
    for seed in (1, 2):
        method, ema = Given(dual(), optimizer=sgd), EMA(0.5)
        Trainer(max_epochs=1, limit_val_batches=0, callbacks=[ema], **QUIET).fit(method, loader(n=8, seed=seed))
        found.append(method.net)
        averaged = {name: t for name, t in ema.weights.items() if ".adv." in name and "tracked" not in name}
        assert len(averaged) == 4 * 4
        own = method.state_dict()
        assert all(not torch.equal(t, own[name]) for name, t in averaged.items())
    first, second = found
    assert same(statistics(first, "adv"), statistics(second, "adv"))
    assert not same(statistics(first, "clean"), statistics(second, "clean"))


# Fast AdvProp --------------------------------------------------------------------------------------------------------


def fast(**arguments: Any) -> FastAdvProp:
    return FastAdvProp(dual(), FGSM(0.1, 0.07, random_start=True), **{"optimizer": still, **arguments})


def still(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.0)


@pytest.mark.parametrize(
    ("share", "size", "attacked"), [(0.8, 320, 64), (0.8, 10, 2), (0.8, 2, 1), (0.5, 7, 3), (0.01, 4, 3), (0.99, 4, 1)]
)
def test_how_many_are_attacked(share: float, size: int, attacked: int) -> None:
    assert fast(clean_share=share).attacked(size) == attacked


class Gradients(FastAdvProp):
    """Keeps the gradients that the optimizer sees, and what was trained on."""

    def craft(self, batch: Any, eps: Any = None) -> Any:
        self.example = super().craft(batch, eps)
        return self.example

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        super().on_before_optimizer_step(optimizer)
        self.seen = {name: p.grad.clone() for name, p in self.net.named_parameters()}


@pytest.mark.parametrize("callbacks", [[], [AWP(1e-12)]], ids=["reused", "passed again"])
def test_gradients_are_divided_by_the_images_that_a_weight_has_seen(callbacks: list[Any]) -> None:
    """By hand, pass by pass, on a copy: 8 clean images, 2 at the start and 2 at the end of the attack."""
    net = dual().double()
    method = Gradients(deepcopy(net), FGSM(0.1, 0.07, random_start=True), optimizer=still)
    data = loader(n=10, batch_size=10)
    data.dataset.tensors = (data.dataset.tensors[0].double(), data.dataset.tensors[1])
    x, y = data.dataset.tensors
    Trainer(max_epochs=1, limit_val_batches=0, callbacks=callbacks, **QUIET).fit(method, data)
    example = method.example
    net.train()
    for route, images, labels, weight in (
        ("main", x[:8], y[:8], 1.0),
        ("aux", example.start, y[8:], 0.5),
        ("aux", example.x_adv, example.y_adv, 0.5),
    ):
        with net.through(route):
            (weight * F.cross_entropy(net(images), labels, reduction="sum")).backward()
    for name, parameter in net.named_parameters():
        seen = 8 if ".clean." in name else 2 if ".adv." in name else 10
        assert torch.allclose(method.seen[name], parameter.grad / seen, atol=1e-9), name
    if not callbacks:
        for name, buffer in net.named_buffers():
            assert torch.allclose(buffer, method.net.get_buffer(name)), name


def test_the_attack_steps_from_a_random_start_along_the_sign() -> None:
    x, y, index = batch(50)
    method = fast()
    method.train()
    net = deepcopy(method.net)
    example = method.craft((x, y, index))
    assert ((example.start - x[-10:]).abs().amax((1, 2, 3)) > 0.08).all()
    start = example.start.clone().requires_grad_()
    net.train()
    with net.through("aux"):
        (gradient,) = torch.autograd.grad(F.cross_entropy(net(start), y[-10:], reduction="sum"), start)
    ends = (example.start + 0.07 * gradient.sign()).clamp(x[-10:] - 0.1, x[-10:] + 0.1).clamp(0, 1)
    pairs = torch.cdist(example.x_adv.flatten(1), ends.flatten(1)).argmin(1)
    assert sorted(pairs.tolist()) == list(range(10)) and pairs.tolist() != list(range(10)), "shuffled"
    assert torch.allclose(example.x_adv, ends[pairs], atol=1e-6) and torch.equal(example.y_adv, y[-10:][pairs])
    assert all(p.grad is None for p in method.parameters())


def test_shuffling_goes_over_all_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes, each asked for its share of the same twelve rows."""
    rows, method = torch.arange(12.0).view(12, 1, 1, 1), fast()
    monkeypatch.setattr(fast_adv_prop, "_of_all", lambda t: rows.to(t.dtype).view(12, *[1] * (t.dim() - 1)))
    found = []
    for rank in (0, 1):
        monkeypatch.setattr(FastAdvProp, "global_rank", rank)
        x, y = method._shuffled(rows[6 * rank : 6 * rank + 6], torch.arange(6))
        assert x.flatten().tolist() == y.tolist()
        found.append(y)
    assert sorted(torch.cat(found).tolist()) == list(range(12))
    assert 0 < (found[0] < 6).sum() < 6


def test_a_step_costs_a_fifth_more_than_plain_training() -> None:
    method, forwards, backwards = fast(), [], []
    method._checked = {True, False}
    method.net.net.register_forward_hook(lambda _, x, out: forwards.append(len(out)))
    method.net.net.linear.register_full_backward_hook(lambda _, given, out: backwards.append(len(out[0])))
    Trainer(max_epochs=1, limit_val_batches=0, **QUIET).fit(method, loader(n=30, batch_size=10))
    assert sum(forwards) == sum(backwards) == 1.2 * 30
    assert method.attack.forwards == method.attack.backwards == 6


def test_a_known_loss_serves_once_and_not_at_other_weights() -> None:
    x, y, index = batch()
    method = fast()
    example = method.craft((x, y, index))
    assert example.known.take() is not None and example.known.take() is None
    example = method.craft((x, y, index))
    with torch.no_grad():
        next(method.net.parameters()).add_(0.1)
    assert example.known.take() is None


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: DualNet(nn.Sequential(nn.Linear(2, 2))), ValueError, "no BatchNorm"),
        (lambda: DualNet(SmallCNN(), route="adv"), ValueError, "route='adv' is unknown"),
        (lambda: AdvProp(SmallCNN()), TypeError, "net is a SmallCNN: AdvProp trains"),
        (lambda: FastAdvProp(SmallCNN()), TypeError, "net is a SmallCNN: Fast AdvProp trains"),
        (lambda: AdvProp(dual(), attack_route="both"), ValueError, "attack_route='both'"),
        (lambda: AdvProp(dual(), clean_start=1.5), ValueError, "clean_start=1.5"),
        (lambda: AdvProp(dual(), PGD(norm="l2")), ValueError, "norm='l2'"),
        (lambda: AdvProp(dual(), PGD(random_start="normal")), ValueError, "random_start='normal'"),
        (lambda: AdvProp(dual(), PGD(restarts=2)), ValueError, "attack.restarts=2"),
        (lambda: FastAdvProp(dual(), PGD()), TypeError, "takes FGSM"),
        (lambda: FastAdvProp(dual(), NoisyFGSM()), TypeError, "takes FGSM"),
        (lambda: FastAdvProp(dual(), FGSM()), ValueError, "attack.random_start=False"),
        (lambda: FastAdvProp(dual(), FGSM(random_start=True, targeted=True)), ValueError, "attack.targeted=True"),
        (lambda: FastAdvProp(dual(), clean_share=1.0), ValueError, "clean_share=1.0"),
        (lambda: fast().attacked(1), ValueError, "a batch of 1 image"),
    ],
)
def test_bad_arguments(build: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build()


def test_attacks_that_can_be_told_nothing_are_fine_without_mixed_starts() -> None:
    assert AdvProp(dual(), BIM(0.1, steps=2, targeted=True)).attack.steps == 2
    assert AdvProp(dual(), PGD(0.1, norm="l2"), clean_start=0.0).attack.norm == "l2"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adv_prop", "fast_adv_prop"])
def test_the_command_line(name: str, robust_pl: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trained, tested on either route, and loaded as the network that evaluation takes."""
    monkeypatch.chdir(tmp_path)
    robust_pl("fit", "-c", CONFIGS / f"digits/{name}.yaml", "--trainer.max_epochs", "2", "--run.name", "run")
    checkpoint = "runs/run/checkpoints/best.ckpt"
    robust_pl("test", "--ckpt_path", checkpoint)
    robust_pl("test", "--ckpt_path", checkpoint, "--model.init_args.net.init_args.route", "aux")
    net, x = load_model(checkpoint), batch()[0]
    assert isinstance(net, DualNet)
    with net.through("main"):
        assert torch.equal(net(x), net.net(x))
