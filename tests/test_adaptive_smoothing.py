"""Adaptive smoothing: the mix in numbers, what attacks see of it, and what a run trains, keeps and loads."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits as bce

from robust_pl import load_model
from robust_pl.callbacks import FGSM, PGD
from robust_pl.methods import AdaptiveSmoothing, Example
from robust_pl.methods.adversarial.adaptive_smoothing import _mix_and_decision
from robust_pl.nets import MixedClassifier, SmallCNN
from robust_pl.nets.mixed import mix

from .conftest import TINY
from .test_methods import QUIET, loader, sgd


def pair() -> tuple[SmallCNN, SmallCNN]:
    torch.manual_seed(0)
    return SmallCNN(width=4), SmallCNN(width=6)


def mixed(**arguments: object) -> MixedClassifier:
    given = {"standard_taps": ["layers.5"], "robust_taps": ["layers.5"], "width": 4, "in_channels": 1, "image_size": 8}
    return MixedClassifier(*pair(), **{**given, **arguments})


def test_the_mix_of_probabilities_by_hand() -> None:
    torch.manual_seed(0)
    g, h = 5 * torch.randn(3, 4, dtype=torch.float64), 5 * torch.randn(3, 4, dtype=torch.float64)
    for alpha in (torch.tensor(0.3, dtype=torch.float64), torch.tensor([[0.0], [0.5], [1.0]], dtype=torch.float64)):
        expected = ((1 - alpha) * g.softmax(1) + alpha * h.softmax(1)).log()
        assert torch.allclose(mix(g, h, alpha.log(), (1 - alpha).log()), expected, atol=1e-8, rtol=0)
    # Where probabilities underflow their logarithms are still right.
    far = torch.tensor([[0.0, -500.0]])
    half = torch.tensor(0.5).log()
    assert torch.allclose(mix(far, far, half, half), far, atol=1e-5)


def test_a_fixed_alpha_needs_no_network() -> None:
    x = torch.rand(3, 1, 8, 8, dtype=torch.float64)
    for alpha in (0.0, 0.7, 1.0):
        net = mixed(alpha=alpha).double()
        g, h = net.standard(x), net.robust(x)
        expected = ((1 - alpha) * (1.2 * g).softmax(1) + alpha * (0.5 * h).softmax(1)).log()
        assert torch.allclose(net(x), expected, atol=1e-8, rtol=0) and net.mixer is None
        (gradient,) = torch.autograd.grad(net(x.requires_grad_())[:, 0].sum(), x)
        assert gradient.isfinite().all() and gradient.abs().max() > 0
        x = x.detach()


def test_alpha_in_train_and_eval_mode_by_hand() -> None:
    x, net = torch.rand(5, 1, 8, 8, dtype=torch.float64), mixed(alpha_range=(0.2, 0.6)).double()
    g, h = (1.2 * net.standard(x)).softmax(1), (0.5 * net.robust(x)).softmax(1)
    net.train()
    assert not net.standard.net.training and not net.robust.net.layers[1].training
    raw = net.mixer.linear(
        torch.cat([b(t) for b, t in zip(net.mixer.branches, [g.log(), h.log(), *taps(net, x)], strict=True)], 1)
    )
    clamped = raw.clamp(raw.mean() - 0.6 * raw.std(), raw.mean() + 0.6 * raw.std())
    gamma = 2 * (clamped - clamped.mean()) / (clamped.var(correction=0) + 1e-5).sqrt() + 0.4
    out, found = net.parts(x)
    assert torch.allclose(found, gamma.squeeze(1), atol=1e-8, rtol=0)
    alpha = gamma.sigmoid()
    assert torch.allclose(out, ((1 - alpha) * g + alpha * h).log(), atol=1e-8, rtol=0)
    net.eval()
    out, gamma = net.parts(x)
    norm = net.mixer.norm
    assert torch.allclose(
        gamma, (2 * (raw - norm.running_mean) / (norm.running_var + 1e-5).sqrt() + 1.3).squeeze(1), atol=1e-8, rtol=0
    )
    alpha = 0.2 + 0.4 * gamma.sigmoid()[:, None]
    assert torch.allclose(out, ((1 - alpha) * g + alpha * h).log(), atol=1e-8, rtol=0)


def taps(net: MixedClassifier, x: Tensor) -> list[Tensor]:
    return [frozen.net.layers[:6](x) for frozen in (net.standard, net.robust)]


def test_attacks_see_the_mixing_network() -> None:
    """The gradient by the image is that of finite differences, and not that of a fixed alpha."""
    net = mixed(alpha_range=(0.0, 1.0), eval_shift=0.0).double().eval()
    x = torch.rand(2, 1, 8, 8, dtype=torch.float64)
    for frozen in (net.standard, net.robust):
        nn.init.normal_(frozen.net.linear.weight, std=5.0)  # sure, and of different classes
    with torch.no_grad():  # and a decision that neither image saturates
        net.mixer.norm.running_mean.fill_(net.parts(x)[1].mean() / net.scale)
        assert net.parts(x)[1].abs().max() < 3

    def output(x: Tensor) -> Tensor:
        return net(x)[:, 3].sum()

    (gradient,) = torch.autograd.grad(output(x.requires_grad_()), x)
    x, h, direction = x.detach(), 1e-6, torch.randn_like(x)
    measured = (output(x + h * direction) - output(x - h * direction)) / (2 * h)
    assert torch.allclose((gradient * direction).sum(), measured, rtol=1e-5)
    alpha = net.parts(x)[1].sigmoid().detach()[:, None]
    x.requires_grad_()
    parts = 1.2 * net.standard(x), 0.5 * net.robust(x)
    (fixed,) = torch.autograd.grad(mix(*parts, alpha.log(), (1 - alpha).log())[:, 3].sum(), x)
    assert (gradient - fixed).norm() > 0.05 * gradient.norm()


def test_loss_and_objective_by_hand() -> None:
    method = AdaptiveSmoothing(mixed(), FGSM(eps=0.1), bce=1.5, ce=0.5, product=0.3).double()
    torch.manual_seed(1)
    x, x_adv = torch.rand(2, 3, 1, 8, 8, dtype=torch.float64)
    y = torch.tensor([1, 2, 3])
    method.train()
    out, gamma = deepcopy(method.net).parts(torch.cat([x, x_adv]))
    found = method.loss(Example(x, y, torch.arange(3), x_adv))
    total = 0.0
    for i in range(6):
        decision = -torch.log(gamma[i].sigmoid() if i >= 3 else 1 - gamma[i].sigmoid())
        mistake = -out[i, y[i % 3]]
        total += (1.5 * decision + 0.5 * mistake + 0.3 * decision * mistake) / 6
    assert torch.allclose(found, total, atol=1e-8, rtol=0)
    share = torch.tensor([0.0, 0.2, 0.4], dtype=torch.float64)
    value = _mix_and_decision(torch.cat([out[:3], gamma[:3, None]], 1), y, share)
    fooling = bce(gamma[:3], torch.ones(3, dtype=torch.float64), reduction="none")
    expected = (1 - share) * -out[torch.arange(3), y] + share * fooling
    assert torch.allclose(value, expected, atol=1e-8, rtol=0)


def test_a_step_attacks_and_trains_the_mixing_network_alone() -> None:
    method = AdaptiveSmoothing(mixed(), PGD(eps=0.1, steps=3), optimizer=sgd)
    method._checked = {True, False}
    before, seen = deepcopy(method.net), []
    method.net.robust.register_forward_hook(lambda module, inputs, _: seen.append(len(inputs[0])))
    sizes = []

    def craft(batch: tuple[Tensor, ...], original: Callable[..., Example] = method.craft) -> Example:
        example = original(batch)
        sizes.extend((example.x_adv - example.x).abs().amax((1, 2, 3)).tolist())
        return example

    method.craft = craft
    Trainer(max_epochs=1, limit_val_batches=0, **QUIET).fit(method, loader())
    assert seen == [8, 8, 8, 16] * 3
    assert method.attack.forwards == method.attack.backwards == 3 * 24
    assert max(sizes) <= 0.11 + 1e-6 and min(sizes) >= 0.04 - 1e-6 and max(sizes) - min(sizes) > 0.04
    for name in ("standard", "robust"):
        old, new = getattr(before, name).net.state_dict(), getattr(method.net, name).net.state_dict()
        assert all(torch.equal(old[key], new[key]) for key in old)
    assert not torch.equal(before.mixer.linear.weight, method.net.mixer.linear.weight)
    assert all(key.startswith("net.mixer.") for key in method.state_dict())
    trained = {p for group in method.trainer.optimizers[0].param_groups for p in group["params"]}
    assert trained == set(method.net.mixer.parameters())


def test_mixed_labels_and_bf16() -> None:
    x, y = next(iter(loader()))
    data = [(x, torch.eye(10)[y], torch.arange(8))]
    method = AdaptiveSmoothing(mixed(), PGD(eps=0.1, steps=1), optimizer=sgd)
    loader_of_one = torch.utils.data.DataLoader(data, batch_size=None)
    Trainer(max_epochs=1, limit_val_batches=0, precision="bf16-mixed", **QUIET).fit(method, loader_of_one)
    with torch.autocast("cpu", torch.bfloat16):
        assert method.net(x).dtype == torch.float32


CONFIG = TINY.replace("class_path: PGDAT", "class_path: AdaptiveSmoothing").replace(
    """      class_path: SmallCNN
      init_args: {width: 4}
""",
    """      class_path: MixedClassifier
      init_args:
        standard: {class_path: TrainedNet, init_args: {source: runs/standard}}
        robust: {class_path: TrainedNet, init_args: {source: runs/robust}}
        standard_taps: [layers.5]
        robust_taps: [layers.5]
        width: 4
        image_size: 8
""",
)


@pytest.mark.slow
def test_resumed_equals_uninterrupted_and_loads_its_networks_again(robust_pl: Callable[..., None], tiny: Path) -> None:
    for name, method in (("standard", "StandardTraining"), ("robust", "PGDAT")):
        robust_pl("fit", "-c", tiny, "--model", method, "--trainer.max_epochs", 1, "--run.name", name)
    Path("mixed.yaml").write_text(CONFIG)
    robust_pl("fit", "-c", "mixed.yaml", "--run.name", "whole")
    robust_pl("fit", "-c", "mixed.yaml", "--run.name", "part", "--trainer.callbacks+=tests.stopper.StopAfterEpoch")
    robust_pl("fit", "-c", "mixed.yaml", "--ckpt_path", "runs/part/checkpoints/last.ckpt")
    whole, resumed = (
        torch.load(f"runs/{name}/checkpoints/last.ckpt", weights_only=True)["state_dict"] for name in ("whole", "part")
    )
    assert whole.keys() == resumed.keys() and all(key.startswith("net.mixer.") for key in whole)
    for name, value in whole.items():
        assert torch.equal(value, resumed[name]), name
    net, x = load_model("runs/whole/checkpoints/last.ckpt"), torch.rand(3, 1, 8, 8)
    assert torch.equal(net.standard(x), load_model("runs/standard")(x))
    assert torch.equal(net.robust(x), load_model("runs/robust")(x))
    assert torch.equal(net.mixer.linear.weight, whole["net.mixer.linear.weight"])
    fixed = ("--model.init_args.net.init_args.alpha", 0.9)
    with pytest.raises(SystemExit):
        robust_pl("fit", "-c", "mixed.yaml", *fixed)
    robust_pl("test", "-c", "mixed.yaml", *fixed, "--run.name", "fixed")
    shutil.rmtree("runs")


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: mixed(alpha=1.5), ValueError, "alpha=1.5"),
        (lambda: mixed(alpha_range=(0.9, 0.8)), ValueError, "must rise"),
        (lambda: mixed(robust_scale=0.0), ValueError, "robust_scale=0.0"),
        (lambda: mixed(standard_taps=["layers.99"]), ValueError, "no module 'layers.99' to tap"),
        (lambda: MixedClassifier(SmallCNN(10), SmallCNN(5), in_channels=1), ValueError, "10 logits and robust 5"),
        (lambda: AdaptiveSmoothing(SmallCNN()), TypeError, "MixedClassifier"),
        (lambda: AdaptiveSmoothing(mixed(), bce=-1), ValueError, "bce=-1"),
    ],
)
def test_bad_arguments(build: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build()


def test_a_step_costs_what_its_docstring_says() -> None:
    """The attack's steps and two passes, each through both networks; backward passes to the weights end at the mixing one."""
    net, calls = mixed(), {"standard": 0, "robust": 0}
    for name in calls:
        getattr(net, name).register_forward_hook(lambda _, x, __, name=name: calls.update({name: calls[name] + len(x[0])}))
    method = AdaptiveSmoothing(net, PGD(0.1, steps=3), optimizer=sgd)
    method._checked = {True, False}
    Trainer(max_epochs=1, limit_val_batches=0, **QUIET).fit(method, loader())
    assert calls == {"standard": 24 * (3 + 2), "robust": 24 * (3 + 2)}  # clean and attacked samples go in one batch
    assert (method.attack.forwards, method.attack.backwards) == (3 * 24, 3 * 24)
    assert all(p.grad is None for frozen in (net.standard, net.robust) for p in frozen.parameters())
