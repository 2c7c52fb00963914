"""FGSM-UAP, FGSM-CUAP and FGSM-FUAP: their steps by hand, and what becomes of perturbations that samples share."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from robust_pl import load_model
from robust_pl.callbacks import FGSM, PGD, NoisyFGSM
from robust_pl.functional.ratio import Ratio
from robust_pl.methods import FGSMAT, FGSMCUAP, FGSMFUAP, FGSMUAP, Example
from robust_pl.methods.fast.clusters import Clusters
from robust_pl.nets import SmallCNN

from .test_methods import QUIET, Counted, loader, sgd

EPS, UAP_EPS, CLASSES = 0.1, 0.125, 3


def tiny() -> nn.Module:
    """No BatchNorm, so that a sample's logits do not depend on the batch."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 6), nn.Tanh(), nn.Linear(6, CLASSES)).double()


def batch(n: int = 6, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(n, 1, 4, 4, generator=generator, dtype=torch.float64)  # some of it near the box's sides
    return x, torch.arange(n) % 2, torch.arange(n)  # class 2 never occurs


def build(kind: type[FGSMUAP] = FGSMUAP, net: nn.Module | None = None, **more: Any) -> FGSMUAP:
    attack = more.pop("attack", None) or FGSM(EPS, bn_mode="train")
    net = tiny() if net is None else net
    return kind(net, attack, uap_eps=UAP_EPS, optimizer=sgd, **{"num_classes": CLASSES, **more}).double()


def boxed(point: Tensor, x: Tensor) -> Tensor:
    return (x + (point - x).clamp(-EPS, EPS)).clamp(0.0, 1.0)


def gradient_at(net: nn.Module, point: Tensor, y: Tensor) -> Tensor:
    point = point.clone().requires_grad_()
    return torch.autograd.grad(F.cross_entropy(net(point), y), point)[0]


@pytest.mark.parametrize("smoothed", [False, True])
@pytest.mark.parametrize("kind", [FGSMUAP, FGSMCUAP])
def test_two_steps_by_hand(kind: type[FGSMUAP], smoothed: bool) -> None:
    method, net = build(kind, lmbda=10.0, decay=0.3), tiny()
    optimizer = torch.optim.SGD(method.parameters(), lr=0.1)
    u = mu = None
    for step in range(3):
        x, classes, index = batch(seed=step)
        classes = classes if step < 2 else torch.zeros_like(classes)  # a class that was seen before, and is not now
        y = 0.6 * F.one_hot(classes, CLASSES).double() + 0.4 / CLASSES if smoothed else classes
        group = classes if kind is FGSMCUAP else torch.zeros_like(classes)
        example = method.craft((x, y, index))
        if u is None:
            u = method.universal.u.clone()
            mu = torch.zeros_like(u)
            assert u.shape == (CLASSES if kind is FGSMCUAP else 1, 1, 4, 4) and torch.equal(
                u.abs(), UAP_EPS * torch.ones_like(u)
            )
            assert 0.1 < (u > 0).double().mean() < 0.9
        net.load_state_dict(method.net.state_dict())
        start = boxed(x + u[group], x)
        gradient = gradient_at(net, start, y)
        x_adv = boxed(start + EPS * gradient.sign(), x)
        assert torch.allclose(example.start, start, atol=1e-12) and torch.allclose(example.x_adv, x_adv, atol=1e-12)

        logits_start, logits = net(start), net(x_adv)
        targets = y if smoothed else F.one_hot(y, CLASSES).double()
        expected = -(targets * logits.log_softmax(1)).sum(1).mean() + 10 * (logits - logits_start).square().mean()
        loss = method.loss(example)
        assert loss.item() == pytest.approx(expected.item(), abs=1e-12)
        optimizer.zero_grad()
        loss.backward()
        wanted = torch.autograd.grad(expected, list(net.parameters()))  # through both logits
        for parameter, gradient_by_hand in zip(method.net.parameters(), wanted, strict=True):
            assert torch.allclose(parameter.grad, gradient_by_hand, atol=1e-12)
        optimizer.step()
        method.after_step(example)

        gradient = gradient / gradient.abs().sum()
        for m in group.unique().tolist():
            mu[m] = gradient[group == m].mean(0) + 0.3 * mu[m]
            u[m] = (u[m] + UAP_EPS * mu[m].sign()).clamp(-UAP_EPS, UAP_EPS)
        assert torch.allclose(method.universal.mu, mu, atol=1e-14) and torch.allclose(method.universal.u, u, atol=1e-14)
    assert set((u / UAP_EPS).round(decimals=6).unique().tolist()) <= {-1.0, 0.0, 1.0}
    if kind is FGSMCUAP:
        assert torch.equal(mu[2], torch.zeros_like(mu[2])) and (u[2] != 0).all()  # as it was drawn


def test_the_loss_at_other_weights_looks_at_the_start_again() -> None:
    method = build()
    example = method.craft(batch())
    first = method.loss(example)
    assert method.loss(example).item() == pytest.approx(first.item(), abs=1e-12)
    with torch.no_grad():
        for parameter in method.parameters():
            parameter.mul_(1.5)
    net = method.net
    expected = F.cross_entropy(net(example.x_adv), example.y) + 10 * (net(example.x_adv) - net(example.start)).square().mean()
    assert method.loss(example).item() == pytest.approx(expected.item(), abs=1e-12) != first.item()


def test_micro_batches_move_the_perturbations_as_one_batch_does() -> None:
    whole, parts = build(FGSMCUAP), build(FGSMCUAP)
    x, y, index = batch()
    whole.after_step(whole.craft((x, y, index)))
    halves = [parts.craft((x[half], y[half], index[half])) for half in (slice(0, 2), slice(2, 6))]
    parts.after_step(Example.join(halves))
    for found, expected in zip(parts.universal.buffers(), whole.universal.buffers(), strict=True):
        assert torch.allclose(found, expected, atol=1e-14)
    assert (whole.universal.mu[:2] != 0).any()


def test_gradients_of_zero_leave_the_perturbation() -> None:
    method = build()
    example = method.craft(batch())
    u = method.universal.u.clone()
    example.gradient = torch.zeros_like(example.gradient)
    method.after_step(example)
    assert torch.equal(method.universal.u, u) and torch.equal(method.universal.mu, torch.zeros_like(u))


def test_each_sample_may_have_its_own_eps() -> None:
    method, (x, y, index) = build(), batch()
    eps = torch.linspace(0.01, 0.2, len(x), dtype=torch.float64).view(-1, 1, 1, 1)
    example = method.craft((x, y, index), eps)
    start = (x + torch.minimum(torch.maximum(method.universal.u, -eps), eps)).clamp(0, 1)
    assert torch.allclose(example.start, start) and ((example.x_adv - x).abs() <= eps + 1e-12).all()


def test_default_settings_are_the_papers() -> None:
    method = FGSMUAP(SmallCNN(width=4))
    assert (method.attack.eps, method.attack.step_size, method.attack.bn_mode) == (8 / 255, None, "train")
    assert (method.uap_eps, method.lmbda, method.decay) == (10 / 255, 10.0, 0.3)
    assert FGSMFUAP(SmallCNN(width=4)).perturbations() == 50 and FGSMCUAP(SmallCNN(7), num_classes=7).perturbations() == 7


# Clusters ---------------------------------------------------------------------------------------------------------------


def linears(clusters: Clusters, inputs: int) -> nn.Sequential:
    """Layers with the same weights."""
    m, k = clusters.clusters, clusters.num_classes
    layers = nn.Sequential(nn.Linear(inputs, m), nn.ReLU(), nn.Linear(m, k)).double()
    nn.utils.vector_to_parameters(clusters.weights.clone(), layers.parameters())
    return layers


@pytest.mark.parametrize("mixed", [False, True])
def test_clusters_learn_as_two_layers_with_adam_do(mixed: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    clusters = Clusters(5, CLASSES, 1e-3)
    features = torch.randn(20, 7, generator=generator, dtype=torch.float64)
    clusters.begin_at(features, 0)
    layers = linears(clusters, 7)
    for layer in (layers[0], layers[2]):  # as nn.Linear draws them
        bound = layer.in_features**-0.5
        assert 0.5 * bound < layer.weight.abs().max() <= bound and layer.bias.abs().max() <= bound
    adam = torch.optim.Adam(layers.parameters(), lr=1e-3)
    for _ in range(5):
        features = torch.randn(20, 7, generator=generator, dtype=torch.float64)
        y = torch.randint(CLASSES, (20,), generator=generator)
        y = 0.6 * F.one_hot(y, CLASSES).double() + 0.4 / CLASSES if mixed else y
        assert torch.allclose(clusters.scores(features), layers[0](features), atol=1e-12)
        clusters.learn(features, y)
        adam.zero_grad()
        F.cross_entropy(layers(features), y).backward()
        adam.step()
        assert torch.allclose(clusters.weights, nn.utils.parameters_to_vector(layers.parameters()), atol=1e-12)
        assert not clusters.weights.requires_grad


def test_fuap_by_hand() -> None:
    method, net = build(FGSMFUAP, clusters=4), tiny()
    for step in range(2):
        x, y, index = batch(seed=step)
        example = method.craft((x, y, index))
        # The noise is the attack's own: before it is in the ball, and the features are those of x with it.
        layers = linears(method.clusters, 6)
        u = method.universal.u.clone()
        if step == 0:
            mu = torch.zeros_like(u)
        group = layers[0](example.features).argmax(1)
        assert torch.equal(example.group, group)
        gradient = gradient_at(net, example.start, y)
        assert torch.allclose(example.x_adv, boxed(example.start + EPS * gradient.sign(), x), atol=1e-12)
        method.after_step(example)
        gradient = gradient / gradient.abs().sum()
        for m in group.unique().tolist():
            mu[m] = gradient[group == m].mean(0) + 0.3 * mu[m]
            u[m] = (u[m] + UAP_EPS * mu[m].sign()).clamp(-UAP_EPS, UAP_EPS)
        assert torch.allclose(method.universal.mu, mu, atol=1e-14) and torch.allclose(method.universal.u, u, atol=1e-14)
        F.cross_entropy(layers(example.features), y).backward()
        moved = linears(method.clusters, 6)
        if step == 0:  # Adam's first step is lr * sign(gradient)
            for now, before in zip(moved.parameters(), layers.parameters(), strict=True):
                assert torch.allclose(now, before - 1e-3 * before.grad.sign(), atol=1e-6)


def test_fuap_groups_by_the_noisy_image_and_starts_there() -> None:
    """With no perturbation to add, the start is the noisy image, whose features were read."""
    method = build(FGSMFUAP, clusters=4)
    x, y, index = batch()
    method.craft((x, y, index))
    method.universal.u.zero_()
    example = method.craft((x, y, index))
    noise = example.start - x
    assert (noise.abs() <= EPS + 1e-12).all() and (noise.abs() < 0.99 * EPS).any() and noise.std() > 0.3 * EPS
    assert torch.allclose(example.features, method.net[:3](example.start), atol=1e-12)
    again = method.craft((x, y, index))
    assert not torch.allclose(again.start, example.start)  # noise anew each time


def test_weights_of_clusters_belong_to_no_optimizer_and_no_average() -> None:
    method = build(FGSMFUAP, clusters=4)
    method.craft(batch())
    assert {name.split(".")[0] for name, _ in method.named_parameters()} == {"net"}
    assert {"clusters.weights", "clusters.moments", "clusters.steps", "universal.u"} <= method.state_dict().keys()


# Around a run -----------------------------------------------------------------------------------------------------------

RUNS: dict[str, Callable[[], FGSMUAP]] = {
    "FGSMUAP": lambda: small(FGSMUAP),
    "FGSMCUAP": lambda: small(FGSMCUAP),
    "FGSMFUAP": lambda: small(FGSMFUAP, clusters=4),
}


def small(kind: type[FGSMUAP], net: nn.Module | None = None, **more: Any) -> FGSMUAP:
    net = SmallCNN(width=4) if net is None else net
    return kind(net, FGSM(EPS, bn_mode="train"), uap_eps=UAP_EPS, optimizer=sgd, **more)


def fit(method: FGSMUAP, data: Any = None, ckpt_path: Path | None = None, **more: Any) -> Trainer:
    trainer = Trainer(**{**QUIET, "max_epochs": 1, "limit_val_batches": 0, **more})
    trainer.fit(method, loader() if data is None else data, ckpt_path=ckpt_path, weights_only=True)
    return trainer


@pytest.mark.parametrize("name", RUNS)
def test_a_checkpoint_is_read_without_training_data(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    method = RUNS[name]()
    fit(method).save_checkpoint(tmp_path / "x.ckpt")
    fresh = RUNS[name]()
    trainer = Trainer(callbacks=[PGD(EPS, steps=1)], **QUIET)
    trainer.test(fresh, loader(), ckpt_path=tmp_path / "x.ckpt", weights_only=True, verbose=False)
    loaded = type(method).load_from_checkpoint(
        tmp_path / "x.ckpt", net=SmallCNN(width=4), attack=FGSM(EPS, bn_mode="train"), optimizer=sgd
    )
    net = load_model(tmp_path / "x.ckpt", SmallCNN(width=4))
    for key, tensor in method.state_dict().items():
        assert torch.equal(fresh.state_dict()[key], tensor) and torch.equal(loaded.state_dict()[key], tensor), key
        assert not key.startswith("net.") or torch.equal(net.state_dict()[key.removeprefix("net.")], tensor)


@pytest.mark.parametrize("name", RUNS)
def test_a_checkpoint_from_before_the_first_step_is_read(name: str, tmp_path: Path) -> None:
    method = RUNS[name]()
    trainer = fit(method, limit_train_batches=0)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    resumed = RUNS[name]()
    fit(resumed, ckpt_path=tmp_path / "x.ckpt")
    assert resumed.universal.u.shape[1:] == (1, 8, 8)


def test_a_ratio_given_in_code_stays_out_of_the_checkpoint(tmp_path: Path) -> None:
    method = FGSMUAP(SmallCNN(width=4), FGSM(EPS, bn_mode="train"), uap_eps=Ratio("10/255"), optimizer=sgd)
    assert method.uap_eps == 10 / 255
    fit(method).save_checkpoint(tmp_path / "x.ckpt")
    assert "uap_eps" not in torch.load(tmp_path / "x.ckpt", weights_only=True)["hyper_parameters"]


def test_other_classes_clusters_or_images_are_refused(tmp_path: Path) -> None:
    fit(small(FGSMCUAP)).save_checkpoint(tmp_path / "classes.ckpt")
    fit(small(FGSMFUAP, clusters=4)).save_checkpoint(tmp_path / "clusters.ckpt")
    with pytest.raises(ValueError, match="holds 10 universal perturbations and FGSMCUAP has 7 here"):
        fit(small(FGSMCUAP, SmallCNN(7, width=4), num_classes=7), ckpt_path=tmp_path / "classes.ckpt")
    with pytest.raises(ValueError, match="holds 4 universal perturbations and FGSMFUAP has 5 here"):
        fit(small(FGSMFUAP, clusters=5), ckpt_path=tmp_path / "clusters.ckpt")
    larger = DataLoader(TensorDataset(torch.rand(8, 1, 12, 12), torch.arange(8)), 8)
    with pytest.raises(ValueError, match=r"are of images \(1, 8, 8\) and these are \(1, 12, 12\)"):
        fit(small(FGSMCUAP), larger, tmp_path / "classes.ckpt", max_epochs=2)
    plain = FGSMAT(SmallCNN(width=4), optimizer=sgd)
    with pytest.raises(ValueError, match=r"universal\.u"):
        fit(plain, ckpt_path=tmp_path / "classes.ckpt")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"uap_eps": 0}, ValueError, "uap_eps=0 must be above 0"),
        ({"uap_eps": 10}, ValueError, "uap_eps=10 .* write 10/255"),
        ({"lmbda": -1}, ValueError, "lmbda=-1"),
        ({"decay": 1.0}, ValueError, "decay=1.0"),
        ({"attack": PGD(EPS)}, TypeError, "attack is a PGD: FGSMUAP takes FGSM"),
        ({"attack": NoisyFGSM(EPS)}, TypeError, "attack is a NoisyFGSM"),
        ({"attack": FGSM(EPS, random_start=True)}, ValueError, "random_start=True"),
        ({"attack": FGSM(EPS, norm="l2")}, ValueError, "'l2'"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        FGSMUAP(SmallCNN(width=4), **arguments)


def test_bad_arguments_of_clusters() -> None:
    for arguments in ({"clusters": 0}, {"clusters": 2.5}, {"cluster_lr": 0.0}):
        ((field, value),) = arguments.items()
        with pytest.raises(ValueError, match=f"{field}={value}"):
            FGSMFUAP(SmallCNN(width=4), **arguments)
    method = FGSMFUAP(nn.Sequential(nn.Conv2d(1, 10, 8), nn.Flatten()), FGSM(EPS, bn_mode="train"))
    with pytest.raises(ValueError, match="no linear layer of the network returns its logits"):
        method.craft((torch.rand(2, 1, 8, 8), torch.arange(2), torch.arange(2)))


@pytest.mark.parametrize(("bn_mode", "forwards"), [("train", 2), ("eval", 3), ("train_no_track", 3)])
def test_the_pass_at_the_start_is_used_again_where_its_mode_is_the_losses(bn_mode: Any, forwards: int) -> None:
    net = Counted()
    method = FGSMUAP(net, FGSM(EPS, bn_mode=bn_mode), uap_eps=UAP_EPS, optimizer=sgd)
    method._checked = {True, False}
    fit(method)
    assert net.forwards == 3 * forwards


@pytest.mark.parametrize(("bn_mode", "moved"), [("train", 3), ("train_no_track", 2), ("eval", 2)])
def test_the_noisy_pass_of_fuap_is_in_the_attacks_mode(bn_mode: Any, moved: int) -> None:
    """BatchNorm counts the passes by which its statistics move: noisy, start and end."""
    torch.manual_seed(0)
    method = FGSMFUAP(SmallCNN(width=4), FGSM(EPS, bn_mode=bn_mode), clusters=4, uap_eps=UAP_EPS, optimizer=sgd)
    method._checked = {True, False}
    fit(method, limit_train_batches=1)
    assert method.net.layers[1].num_batches_tracked.item() == moved


@pytest.mark.slow
def test_two_processes_keep_the_same(tmp_path: Path) -> None:
    """With half of each batch on either process, perturbations and weights are those of one process with all of it."""
    from .universal_processes import METHODS, state

    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "tests.universal_processes"]
    done = subprocess.run([*command, str(tmp_path)], cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line.removeprefix("RESULT ") for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    results = {found["name"]: found for found in map(json.loads, lines)}
    assert results.keys() == METHODS.keys()
    for name, found in results.items():
        assert found["differing"] == [], name
        if METHODS[name].alike:
            one, two = state(name, tmp_path), torch.load(tmp_path / f"{name}.pt", weights_only=True)
            for key in one:
                assert torch.allclose(one[key], two[key], atol=1e-10), f"{name}: {key} is not that of one process"
