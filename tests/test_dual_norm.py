"""Dual BatchNorm: which half sees what, what mixing does, and that AFA trains each half with its own images."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor, nn

from robust_pl import load_model
from robust_pl.callbacks import EMA, PGD
from robust_pl.methods import AFA, Cosine, MultiStep
from robust_pl.methods.adversarial.afa import _TwoStages
from robust_pl.nets import AdaptiveDualNet, DualBatchNorm, PreActResNet18, SmallCNN, dual_batch_norm
from robust_pl.nets.dual_norm import settled

from .test_methods import QUIET, loader, rates, sgd


def randomised(net: nn.Module, seed: int = 0) -> nn.Module:
    """All affine parameters and statistics of its BatchNorms differ."""
    torch.manual_seed(seed)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight.data, module.bias.data, module.running_mean, module.running_var):
                tensor.copy_(torch.rand_like(tensor) + 0.5)
    return net


def statistics(net: nn.Module, half: str) -> list[Tensor]:
    return [b.clone() for name, b in net.named_buffers() if f".{half}." in name]


def changed(before: list[Tensor], after: list[Tensor]) -> set[bool]:
    return {not torch.equal(a, b) for a, b in zip(before, after, strict=True)}


@pytest.mark.parametrize("training", [False, True])
def test_each_half_alone_is_the_plain_network_with_its_statistics(training: bool) -> None:
    """Bit for bit, whether the weight is a number or a tensor."""
    clean, x = randomised(SmallCNN(width=4)).train(training), torch.rand(6, 1, 8, 8)
    net = deepcopy(clean)
    routing = dual_batch_norm(net)
    randomised(net, seed=1)
    adv = deepcopy(clean)
    for name, module in adv.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            module.load_state_dict(net.get_submodule(name).adv.state_dict())
            net.get_submodule(name).clean.load_state_dict(clean.get_submodule(name).state_dict())
    for weight, plain in ((0.0, clean), (1.0, adv)):
        for given in (weight, torch.full((6,), weight)):
            with routing.use(given):
                found = net(x)
            assert torch.equal(found, deepcopy(plain)(x))
            if training:
                break  # a tensor runs both halves, and the second call would see moved statistics
    assert not torch.equal(clean(x), adv(x))
    assert routing.weight == 0.0


def test_mixing_by_hand() -> None:
    """One layer in float64, a weight of its own for each sample, and the gradient that flows into it."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.BatchNorm1d(3)).double()
    routing = dual_batch_norm(net)
    layer = net[0]
    layer.adv.running_mean.copy_(torch.tensor([1.0, 2.0, 3.0]))
    layer.adv.running_var.copy_(torch.tensor([4.0, 1.0, 0.25]))
    layer.adv.weight.data.copy_(torch.tensor([1.0, -1.0, 2.0]))
    net.eval()
    z, w = torch.randn(4, 3, dtype=torch.float64), torch.tensor([0.0, 0.25, 0.5, 1.0], dtype=torch.float64, requires_grad=True)
    with routing.use(w):
        found = net(z)
    eps = 1e-5
    clean = z / (1 + eps) ** 0.5
    scale = layer.adv.weight.detach() / (layer.adv.running_var + eps).sqrt()
    adv = (z - layer.adv.running_mean) * scale
    expected = w.detach()[:, None] * adv + (1 - w.detach()[:, None]) * clean
    assert torch.allclose(found, expected, atol=1e-12, rtol=0)
    (gradient,) = torch.autograd.grad(found.sum(), w)
    assert torch.allclose(gradient, (adv - clean).sum(1), atol=1e-12, rtol=0)
    with routing.use(0.25):
        assert torch.allclose(net(z), 0.25 * adv + 0.75 * clean, atol=1e-12, rtol=0)


def test_a_split_batch_is_two_batches() -> None:
    net = PreActResNet18().train()
    routing, x = dual_batch_norm(net), torch.rand(5, 3, 8, 8)
    whole, parts = deepcopy(net), deepcopy(net)  # copies have a routing of their own
    assert next(m for m in whole.modules() if isinstance(m, DualBatchNorm)).routing is not routing
    routing_of = {id(n): next(m for m in n.modules() if isinstance(m, DualBatchNorm)).routing for n in (whole, parts)}
    with routing_of[id(whole)].split(3):
        found = whole(x)
    with routing_of[id(parts)].use(0.0):
        first = parts(x[:3])
    with routing_of[id(parts)].use(1.0):
        second = parts(x[3:])
    assert torch.allclose(found, torch.cat([first, second]), atol=1e-5)
    for name, buffer in whole.named_buffers():
        assert torch.allclose(buffer, parts.get_buffer(name), atol=1e-6), name


def test_a_half_that_is_not_asked_does_not_move() -> None:
    net = SmallCNN(width=4).train()
    routing, x = dual_batch_norm(net), torch.rand(8, 1, 8, 8)
    for weight, moves in ((0.0, "clean"), (1.0, "adv")):
        stays = {"clean": "adv", "adv": "clean"}[moves]
        before = {half: statistics(net, half) for half in ("clean", "adv")}
        with routing.use(weight):
            net(x).sum().backward()
        assert changed(before[moves], statistics(net, moves)) == {True}
        assert changed(before[stays], statistics(net, stays)) == {False}
    before = {half: statistics(net, half) for half in ("clean", "adv")}
    with settled(net), routing.use(torch.rand(8)):
        net(x)
    assert all(changed(before[half], statistics(net, half)) == {False} for half in before)
    assert all(m.training for m in net.modules())


def test_synchronised_batchnorm_replaces_both_halves() -> None:
    """Each with its own weights and statistics, and both still routed."""
    net, x = randomised(AdaptiveDualNet(SmallCNN(width=4), in_channels=1)).eval(), torch.rand(2, 1, 8, 8)
    before, outputs = deepcopy(net.state_dict()), {}
    for weight in (0.0, 1.0):
        with net.pinned(weight):
            outputs[weight] = net(x)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(net).eval()
    layers = [m for m in converted.modules() if isinstance(m, DualBatchNorm)]
    assert len(layers) == 4 and all(isinstance(h, nn.SyncBatchNorm) for m in layers for h in (m.clean, m.adv))
    after = converted.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    assert not torch.equal(outputs[0.0], outputs[1.0])
    for weight, expected in outputs.items():
        with converted.pinned(weight):
            assert torch.allclose(converted(x), expected, atol=1e-6)
    with converted.pinned(torch.tensor([0.0, 1.0])):
        assert torch.allclose(converted(x), torch.stack([outputs[0.0][0], outputs[1.0][1]]), atol=1e-6)


def test_an_average_of_weights_holds_both_halves() -> None:
    """Weights and running statistics of each half follow its own, by hand."""

    class ByHand(Callback):
        def __init__(self) -> None:
            self.average: dict[str, Tensor] = {}

        def on_train_batch_end(self, trainer: Trainer, module: AFA, *_: Any) -> None:
            step = trainer.global_step - 1
            decay = min(0.5, (1 + step) / (10 + step))
            for name, tensor in module.state_dict().items():
                if tensor.is_floating_point():
                    self.average[name] = decay * self.average[name] + (1 - decay) * tensor

        def on_train_start(self, trainer: Trainer, module: AFA) -> None:
            self.average = {name: t.clone() for name, t in module.state_dict().items()}

    torch.manual_seed(0)
    net = randomised(AdaptiveDualNet(SmallCNN(width=4), in_channels=1, width=4)).double()
    method, by_hand, ema = AFA(net, PGD(eps=0.2, steps=1), optimizer=sgd, adaptive_share=0.0), ByHand(), EMA(0.5)
    data = loader()
    data.dataset.tensors = (data.dataset.tensors[0].double(), data.dataset.tensors[1])
    Trainer(max_epochs=1, limit_val_batches=0, callbacks=[ema, by_hand], **QUIET).fit(method, data)
    halves = [name for name in method.state_dict() if (".clean." in name or ".adv." in name) and "tracked" not in name]
    assert len(halves) == 4 * 2 * 4
    for name in halves:
        assert torch.allclose(ema.weights[name], by_hand.average[name], atol=1e-12, rtol=0), name
        assert not torch.equal(ema.weights[name], method.state_dict()[name]), name
    with ema.applied(method):
        routings = {m.routing for m in method.net.modules() if isinstance(m, DualBatchNorm)}
        assert routings == {method.net.routing}


def test_attacks_see_the_predictor() -> None:
    """The gradient by the image is that of finite differences through the predicted weight, and not that of a fixed one."""
    torch.manual_seed(0)
    net = AdaptiveDualNet(SmallCNN(width=4), in_channels=1, width=4)
    randomised(net).double().eval()
    nn.init.normal_(net.predictor.linear.weight)
    x = torch.rand(2, 1, 8, 8, dtype=torch.float64)

    def output(x: Tensor) -> Tensor:
        return net(x).logsumexp(1).sum()

    (gradient,) = torch.autograd.grad(output(x.requires_grad_()), x)
    direction = torch.randn_like(x)
    x, h = x.detach(), 1e-6
    measured = (output(x + h * direction) - output(x - h * direction)) / (2 * h)
    assert torch.allclose((gradient * direction).sum(), measured, rtol=1e-5)
    with net.pinned(net.weight(x).detach()):
        (fixed,) = torch.autograd.grad(output(x.requires_grad_()), x)
    assert not torch.allclose(gradient, fixed, rtol=1e-3)


class Seen(AFA):
    """Records what it trains on."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.strengths: list[Tensor | None] = []

    def after_step(self, example: Any) -> None:
        self.strengths.append(example.strength)
        if example.strength is not None:
            assert ((example.x_adv - example.x).abs().amax((1, 2, 3)) <= example.strength.flatten() + 1e-6).all()


def afa(**arguments: Any) -> Seen:
    torch.manual_seed(0)
    net = AdaptiveDualNet(SmallCNN(width=4), in_channels=1, width=4)
    return Seen(net, PGD(eps=0.2, steps=2), optimizer=sgd, **arguments)


def test_stages() -> None:
    """Stage 1 moves each half with its own images; stage 2 moves the predictor alone, at radii from 0 to eps."""

    class Watch(Callback):
        def __init__(self) -> None:
            self.states: list[dict[str, Tensor]] = []

        def on_train_epoch_start(self, trainer: Trainer, module: AFA) -> None:
            self.states.append(deepcopy(module.net.state_dict()))

        on_train_end = on_train_epoch_start

    watch, method = Watch(), afa(adaptive_share=0.5, clean_share=0.25, adaptive_lr=10.0)
    Trainer(max_epochs=2, limit_val_batches=0, callbacks=[watch], **QUIET).fit(method, loader(n=320, batch_size=64))
    assert [s is None for s in method.strengths] == [True] * 5 + [False] * 5
    strengths = torch.cat(method.strengths[5:]).flatten()
    assert 0.1 < (strengths == 0).float().mean() < 0.4 and strengths.max() <= 0.2 and strengths.max() > 0.15
    begin, between, end = watch.states
    for name in begin:
        predictor = name.startswith("predictor.")
        assert torch.equal(begin[name], between[name]) == predictor, name
        assert predictor or torch.equal(between[name], end[name]), name
    assert not torch.equal(between["predictor.linear.weight"], end["predictor.linear.weight"])
    joint = afa(adaptive_share=1.0, backbone_lr=0.1)
    before = deepcopy(joint.net.net.state_dict())
    Trainer(max_epochs=1, limit_val_batches=0, **QUIET).fit(joint, loader())
    for name, value in joint.net.net.state_dict().items():
        assert torch.equal(value, before[name]) == ("running" in name or "tracked" in name), name


@pytest.mark.parametrize(("share", "training"), [(0.0, 2), (1.0, 1)])
def test_passes(share: float, training: int) -> None:
    method, seen = afa(adaptive_share=share), []
    method._checked = {True, False}
    method.net.net.register_forward_hook(lambda *_: seen.append(1))
    Trainer(max_epochs=1, limit_val_batches=0, **QUIET).fit(method, loader())
    assert len(seen) == 3 * (2 + training)
    assert method.attack.forwards == method.attack.backwards == 2 * 24


def test_clean_images_never_move_the_adversarial_half_in_training() -> None:
    """Two runs that differ in the clean images alone, while the attacked ones are given."""
    given = torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(3))

    class Given(Seen):
        def craft(self, batch: Any, eps: Any = None) -> Any:
            example = super().craft(batch, eps)
            example.x_adv = given
            return example

    found = []
    for seed in (1, 2):
        torch.manual_seed(0)
        method = Given(AdaptiveDualNet(SmallCNN(width=4), 1, 4), PGD(eps=0.2, steps=1), optimizer=sgd, adaptive_share=0.0)
        Trainer(max_epochs=1, limit_val_batches=0, **QUIET).fit(method, loader(n=8, seed=seed))
        found.append({half: statistics(method.net, half) for half in ("clean", "adv")})
    assert changed(found[0]["adv"], found[1]["adv"]) == {False}
    assert True in changed(found[0]["clean"], found[1]["clean"])


def test_the_schedule_begins_again_in_the_second_stage() -> None:
    plain = rates(Cosine(), 6)
    found = rates(_TwoStages(Cosine(), 0.4, [0.5]), 10)
    assert found == pytest.approx([*plain, 0.5, 0.5 * (1 + 0.5**0.5) / 2, 0.25, 0.5 * (1 - 0.5**0.5) / 2])
    found = rates(_TwoStages(MultiStep([2, 3]), 0.5, [1.0]), 8)
    assert found[:5] == pytest.approx([1, 1, 0.1, 0.01, 1])
    assert rates(_TwoStages(None, 0.5, [0.0]), 4) == pytest.approx([1, 1, 0, 0])
    warm = rates(_TwoStages(Cosine(warmup=0.5), 0.5, [0.1]), 8)
    assert warm[:4] == pytest.approx(rates(Cosine(warmup=0.5), 4)) and warm[4] == pytest.approx(0.1)


CONFIG = """
model:
  class_path: AFA
  init_args:
    net:
      class_path: AdaptiveDualNet
      init_args:
        net: {class_path: SmallCNN, init_args: {width: 4}}
        width: 4
    attack: {class_path: PGD, init_args: {eps: 0.2, steps: 2}}
    adaptive_share: 0.34
    optimizer: {class_path: torch.optim.SGD, init_args: {lr: 0.05, momentum: 0.9}}
    schedule: {class_path: Cosine}
data:
  class_path: DigitsDataModule
  init_args: {batch_size: 128}
attacks:
  fgsm: {class_path: FGSM, init_args: {eps: 0.2}}
trainer: {max_epochs: 3, logger: false, enable_progress_bar: false, enable_model_summary: false}
"""


@pytest.mark.slow
def test_resumed_equals_uninterrupted_and_loads_as_the_adaptive_network(
    robust_pl: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("afa.yaml").write_text(CONFIG)
    robust_pl("fit", "-c", "afa.yaml", "--run.name", "whole")
    robust_pl("fit", "-c", "afa.yaml", "--run.name", "part", "--trainer.callbacks+=tests.stopper.StopAfterEpoch")
    robust_pl("fit", "-c", "afa.yaml", "--ckpt_path", "runs/part/checkpoints/last.ckpt")
    whole, resumed = (
        torch.load(f"runs/{name}/checkpoints/last.ckpt", weights_only=True)["state_dict"] for name in ("whole", "part")
    )
    for name, value in whole.items():
        assert torch.equal(value, resumed[name]), name
    net, x = load_model("runs/whole/checkpoints/last.ckpt"), torch.rand(4, 1, 8, 8)
    assert isinstance(net, AdaptiveDualNet) and net.predictor.layers[0].in_channels == 1
    weight = net.weight(x)
    assert not torch.equal(weight, torch.full((4,), 0.5))
    with net.routing.use(weight):
        assert torch.equal(net(x), net.net(x))


@pytest.mark.slow
def test_the_predicted_weight_grows_with_the_strength(
    robust_pl: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    robust_pl("fit", "-c", Path(__file__).parent.parent / "configs/digits/afa.yaml", "--run.name", "afa")
    from robust_pl.data import DigitsDataModule

    net, data = load_model("runs/afa/checkpoints/last.ckpt"), DigitsDataModule(eval_batch_size=400)
    data.prepare_data()
    data.setup("test")
    x, y, _ = next(iter(data.test_dataloader()))
    means = [net.weight(PGD(eps=eps, steps=7)(net, x, y)).mean().item() for eps in (0.0, 0.05, 0.1, 0.15, 0.2)]
    assert means == sorted(means) and means[-1] > means[0] + 0.05, means


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: dual_batch_norm(nn.Sequential(nn.Linear(2, 2))), ValueError, "no BatchNorm"),
        (lambda: AdaptiveDualNet(AdaptiveDualNet(SmallCNN())), ValueError, "already"),
        (lambda: dual_batch_norm(SmallCNN()).use(1.5).__enter__(), ValueError, "weight=1.5"),
        (lambda: dual_batch_norm(SmallCNN()).use(torch.zeros(2, 1)).__enter__(), ValueError, r"\(B,\)"),
        (lambda: AFA(SmallCNN()), TypeError, "AdaptiveDualNet"),
        (lambda: AFA(AdaptiveDualNet(SmallCNN()), adaptive_share=2), ValueError, "adaptive_share=2"),
        (lambda: AFA(AdaptiveDualNet(SmallCNN()), PGD(bn_mode="train")), ValueError, "bn_mode='train'"),
    ],
)
def test_bad_arguments(build: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build()
