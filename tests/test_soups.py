"""Soups: what is chosen and learned against closed forms, how much is in memory, resuming, and the command line."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import DataLoader, TensorDataset

from robust_pl import load_model
from robust_pl.callbacks import AWP, EMA, FGSM, PGD
from robust_pl.data import DigitsDataModule, HeldOut
from robust_pl.functional.soups import Combination, blocks
from robust_pl.methods import Example, GreedySoup, LearnedSoup, MEHLSoup, Method, UniformSoup
from robust_pl.nets import SmallCNN
from robust_pl.nets.trajectory import Sample

from .stopper import StopAfterEpoch

QUIET: dict[str, Any] = {
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
    "accelerator": "cpu",
    "devices": 1,
}


def sgd(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.05, momentum=0.9)


def folder_of(path: Path, tensors: list[dict[str, Tensor]]) -> str:
    path.mkdir(exist_ok=True)
    for number, named in enumerate(tensors):
        save_file({name: tensor.contiguous() for name, tensor in named.items()}, path / f"{number}.safetensors")
    return str(path)


def cnns(path: Path, count: int) -> str:
    """Small networks that differ a little, with statistics of their own."""
    torch.manual_seed(0)
    base, found = SmallCNN(width=4), []
    for _ in range(count):
        net = SmallCNN(width=4)
        net.load_state_dict(
            {n: t + 0.1 * torch.rand_like(t) if t.is_floating_point() else t for n, t in base.state_dict().items()}
        )
        found.append(net.state_dict())
    return folder_of(path, found)


def digits() -> HeldOut:
    return HeldOut(DigitsDataModule(val_size=0.2), batch_size=32, augment=False)


# The algebra ---------------------------------------------------------------------------------------------------------


def test_blocks() -> None:
    sizes = {"a": 4, "b": 2, "c": 3, "d": 5}
    assert blocks(sizes, None) == {"a": 0, "b": 0, "c": 0, "d": 0}
    assert blocks(sizes, 0) == {"a": 0, "b": 1, "c": 2, "d": 3}
    assert blocks(sizes, 5) == {"a": 0, "b": 0, "c": 1, "d": 1}


@pytest.mark.parametrize("layer_size", [None, 0, 9])
def test_gradient_by_the_coefficients_is_that_of_autograd(layer_size: int | None) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    x = torch.rand(5, 4, dtype=torch.float64)
    rows = {name: torch.randn(3, *p.shape, dtype=torch.float64) for name, p in net.named_parameters()}
    center = {name: torch.randn_like(p) for name, p in net.named_parameters()}
    combination = Combination(rows, blocks({n: p.numel() for n, p in net.named_parameters()}, layer_size), center)
    coefficients = torch.randn(3, combination.num_blocks, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(functional_call(net, combination.weights(coefficients), x).square().sum(), coefficients)
    net.load_state_dict(combination.weights(coefficients.detach()))
    net(x).square().sum().backward()
    found = combination.gradient({name: p.grad for name, p in net.named_parameters()})
    assert torch.allclose(found, expected, rtol=0, atol=1e-10)


def test_rows_have_length_1_in_each_block_and_frozen_layers_stay_finite() -> None:
    rows = {"a": torch.tensor([[3.0, 0.0], [0.0, 0.0]]), "b": torch.tensor([[4.0], [2.0]])}
    combination = Combination(rows, {"a": 0, "b": 0})
    assert combination.normalise_().tolist() == [[5.0], [2.0]]
    layered = Combination({"a": torch.tensor([[3.0, 4.0], [0.0, 0.0]]), "b": torch.tensor([[4.0], [2.0]])}, {"a": 0, "b": 1})
    lengths = layered.normalise_(1e-8)
    assert torch.allclose(lengths, torch.tensor([[5.0, 4.0], [1e-8, 2.0]]))
    assert torch.allclose(layered.rows["a"], torch.tensor([[0.6, 0.8], [0.0, 0.0]]))


# Greedy and uniform --------------------------------------------------------------------------------------------------


class Table(nn.Module):
    """Sample j is the image with pixel j alone; ``margins[j]`` decides it, so that every accuracy can be planted."""

    def __init__(self, margins: list[float]) -> None:
        super().__init__()
        self.margins = nn.Parameter(torch.tensor(margins))

    def forward(self, x: Tensor) -> Tensor:
        score = x.flatten(1) @ self.margins
        return torch.stack([-score, score], 1)


def planted(path: Path, *margins: list[float]) -> tuple[str, DataLoader[Any]]:
    ingredients = folder_of(path, [{"margins": torch.tensor(m)} for m in margins])
    data = TensorDataset(torch.eye(8).view(8, 1, 2, 4), torch.ones(8, dtype=torch.int64))
    return ingredients, DataLoader(data, 4)


def test_greedy_takes_what_helps_and_nothing_else(tmp_path: Path) -> None:
    harmful = [1.0, 1, 1, 1, -9, -9, -9, 1]  # 5 of 8 right
    second = [1.0, 1, 1, 1, -1, -1, 1, 2]  # 6, and all 8 together with the best
    best = [3.0, 3, 3, 3, 3, 3, 3, -1]  # 7
    useless = [1.0, 1, 1, 1, -0.1, -0.1, -0.1, -0.1]  # 4, and changes no decision
    ingredients, loader = planted(tmp_path / "in", harmful, second, best, useless)
    soup = GreedySoup(Table([0.0] * 8), ingredients, num_classes=2)
    Trainer(**QUIET).fit(soup, loader, loader)
    assert soup.made_of["scores"] == [5 / 8, 6 / 8, 7 / 8, 4 / 8]
    assert soup.made_of["chosen"] == [2, 1] and soup.made_of["score"] == 1.0
    assert soup.made_of["shares"].flatten().tolist() == [0, 0.5, 0.5, 0]
    assert soup.net.margins.tolist() == [2, 2, 2, 2, 1, 1, 2, 0.5]


def test_greedy_by_robust_accuracy(tmp_path: Path) -> None:
    brittle = [1.0] * 7 + [-10.0]  # an attack lights pixel 7 in every image: 0.8 - 0.2 * 10 < 0
    robust = [1.0] * 6 + [-0.1] * 2
    ingredients, loader = planted(tmp_path / "in", brittle, robust)
    for attack, scores in ((None, [7 / 8, 6 / 8]), (FGSM(0.2), [0.0, 6 / 8])):
        soup = GreedySoup(Table([0.0] * 8), ingredients, attack, num_classes=2)
        Trainer(**QUIET).fit(soup, loader, loader)
        assert soup.made_of["scores"] == scores


@pytest.mark.parametrize("attack", [None, PGD(0.1, steps=2, random_start=False)])
def test_uniform_soup_has_mean_weights_and_statistics_of_its_own(attack: PGD | None, tmp_path: Path) -> None:
    soup = UniformSoup(SmallCNN(width=4), cnns(tmp_path / "in", 3), attack, batches=3)
    Trainer(**QUIET).fit(soup, digits())
    files = [load_model(file, SmallCNN(width=4)).state_dict() for file in sorted((tmp_path / "in").iterdir())]
    mean = {name: sum(f[name] for f in files) / 3 for name in files[0]}
    for name, parameter in soup.net.named_parameters():
        assert torch.allclose(parameter, mean[name], atol=1e-6)
    # Attacked with the ingredients' mean statistics; a new mean over forward passes in train mode.
    before, by_hand = SmallCNN(width=4), SmallCNN(width=4)
    for net in (before, by_hand):
        net.load_state_dict(mean)
    layer = by_hand.layers[1]
    layer.reset_running_stats()
    layer.momentum = None
    for (x, y, _), _ in zip(digits().train_dataloader(), range(3), strict=False):
        by_hand.layers[:2].train()(x if attack is None else attack(before.eval(), x, y))
    assert torch.allclose(soup.net.layers[1].running_mean, layer.running_mean, atol=1e-5)
    assert torch.allclose(soup.net.layers[1].running_var, layer.running_var, rtol=1e-4)


def test_statistics_may_be_averaged(tmp_path: Path) -> None:
    ingredients = cnns(tmp_path / "in", 3)
    soup = UniformSoup(SmallCNN(width=4), ingredients, batches=0)
    Trainer(**QUIET).fit(soup, digits())
    files = [load_model(file, SmallCNN(width=4)).state_dict() for file in sorted((tmp_path / "in").iterdir())]
    for name, tensor in soup.net.state_dict().items():
        if tensor.is_floating_point():
            assert torch.allclose(tensor, sum(f[name] for f in files) / 3, atol=1e-6), name


def test_a_greedy_soup_resumes_without_choosing_again(tmp_path: Path) -> None:
    def soup() -> GreedySoup:
        return GreedySoup(SmallCNN(width=4), cnns(tmp_path / "in", 3), FGSM(0.05), batches=2)

    first, data = soup(), digits()
    trainer = Trainer(max_epochs=3, **QUIET)
    trainer.fit(first, data)
    assert trainer.global_step == 1, "a run without training is one step"
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    second = soup()
    second.assemble = None  # type: ignore[method-assign, assignment]
    Trainer(**QUIET).fit(second, digits(), ckpt_path=tmp_path / "x.ckpt", weights_only=True)
    assert second.made_of["chosen"] == first.made_of["chosen"]
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name])


# Learned -------------------------------------------------------------------------------------------------------------


class Squares(LearnedSoup):
    """A convex problem: squared errors of a linear network."""

    def loss(self, example: Example) -> Tensor:
        return F.mse_loss(self(example.x), F.one_hot(example.y, 3).to(example.x.dtype))


def test_learned_coefficients_reach_the_least_squares_optimum(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x, y = torch.rand(60, 1, 2, 2, dtype=torch.float64), torch.randint(3, (60,))
    tensors = [{"1.weight": torch.randn(3, 4, dtype=torch.float64)} for _ in range(3)]
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 3, bias=False))
    soup = Squares(
        net,
        folder_of(tmp_path / "in", tensors),
        softmax=False,
        optimizer=lambda params: torch.optim.SGD(params, lr=0.2, momentum=0.9),
        num_classes=3,
    )
    loader = DataLoader(TensorDataset(x, y), 60)
    Trainer(max_epochs=400, precision="64-true", limit_val_batches=0, **QUIET).fit(soup, loader)
    outputs = torch.stack([(x.flatten(1) @ t["1.weight"].T).flatten() for t in tensors], 1)
    optimum = torch.linalg.lstsq(outputs, F.one_hot(y, 3).double().flatten().unsqueeze(1)).solution
    assert torch.allclose(soup.coefficients, optimum, rtol=0, atol=1e-8)
    expected = sum(b * t["1.weight"] for b, t in zip(optimum.flatten(), tensors, strict=True))
    assert torch.allclose(net[1].weight, expected, rtol=0, atol=1e-8)


def test_softmax_gradient(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tensors = [{"1.weight": torch.randn(3, 4, dtype=torch.float64)} for _ in range(3)]
    x, y = torch.rand(20, 1, 2, 2, dtype=torch.float64), torch.randint(3, (20,))
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 3, bias=False))
    one = lambda params: torch.optim.SGD(params, lr=1.0)  # noqa: E731
    soup = Squares(net, folder_of(tmp_path / "in", tensors), optimizer=one, num_classes=3)
    loader = DataLoader(TensorDataset(x, y), 20)
    Trainer(max_epochs=1, precision="64-true", limit_val_batches=0, **QUIET).fit(soup, loader)
    logits = torch.zeros(3, 1, dtype=torch.float64, requires_grad=True)
    mixed = (logits.softmax(0).view(3, 1, 1) * torch.stack([t["1.weight"] for t in tensors])).sum(0)
    F.mse_loss(x.flatten(1) @ mixed.T, F.one_hot(y, 3).double()).backward()
    assert torch.allclose(soup.coefficients, -logits.grad, rtol=0, atol=1e-12)
    assert soup.shares.sum().item() == pytest.approx(1)


def mehl(path: Path, **more: Any) -> MEHLSoup:
    return MEHLSoup(SmallCNN(width=4), str(path), **{"models": 2, "epochs": 2, "layer_size": 0, **more})


@pytest.mark.parametrize("layer_size", [None, 0])
@pytest.mark.parametrize("count", [4, 5])
def test_mehl_is_the_soup_that_its_shares_say(count: int, layer_size: int | None, tmp_path: Path) -> None:
    cnns(tmp_path / "in", count)
    soup = mehl(tmp_path / "in", layer_size=layer_size, optimizer=lambda params: torch.optim.AdamW(params, lr=0.3))
    Trainer(max_epochs=2 * -(-count // 2), limit_val_batches=0, **QUIET).fit(soup, digits())
    shares = soup.shares
    assert torch.allclose(shares.sum(0), torch.ones(shares.shape[1]), atol=1e-5)
    assert (shares - 1 / count).abs().max() > 0.05, "something must have been learned"
    assert soup.coefficients.shape == (2, 1 if layer_size is None else len(list(soup.net.parameters())))
    files = [load_model(file, SmallCNN(width=4)).state_dict() for file in sorted((tmp_path / "in").iterdir())]
    for name, parameter in soup.net.named_parameters():
        expected = sum(share * file[name] for share, file in zip(shares[:, soup._block[name]], files, strict=True))
        assert torch.allclose(parameter, expected, atol=1e-4), name


def test_mehl_begins_at_the_mean_of_the_first_models(tmp_path: Path) -> None:
    cnns(tmp_path / "in", 4)
    still = lambda params: torch.optim.SGD(params, lr=0.0)  # noqa: E731
    soup = mehl(tmp_path / "in", epochs=1, optimizer=still, seed=3)
    Trainer(max_epochs=2, limit_val_batches=0, **QUIET).fit(soup, digits())
    first = torch.randperm(4, generator=torch.Generator().manual_seed(3))[:2].tolist()
    files = [load_model(tmp_path / "in" / f"{i}.safetensors", SmallCNN(width=4)).state_dict() for i in first]
    for name, parameter in soup.net.named_parameters():
        assert torch.allclose(parameter, (files[0][name] + files[1][name]) / 2, atol=1e-6)


def test_mehl_starts_its_schedule_anew_with_each_batch_of_models(tmp_path: Path) -> None:
    class Rates(Callback):
        def __init__(self) -> None:
            self.seen: list[float] = []

        def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
            self.seen.append(trainer.optimizers[0].param_groups[0]["lr"])

    cnns(tmp_path / "in", 4)
    rates = Rates()
    Trainer(max_epochs=4, limit_val_batches=0, limit_train_batches=5, callbacks=[rates], **QUIET).fit(
        mehl(tmp_path / "in"), digits()
    )
    assert rates.seen[:10] == rates.seen[10:]
    assert rates.seen[:3] == pytest.approx([0.01 / 3, 0.02 / 3, 0.01]) and rates.seen[9] < 0.001


@pytest.mark.parametrize("stop", [1, 2, 3])
@pytest.mark.parametrize("build", [mehl, lambda path: LearnedSoup(SmallCNN(width=4), str(path), PGD(0.1, steps=1))])
def test_resumed_is_uninterrupted(build: Callable[[Path], Method], stop: int, tmp_path: Path) -> None:
    class StopAt(Callback):
        def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            trainer.should_stop = trainer.current_epoch + 1 == stop

    cnns(tmp_path / "in", 4)

    def fit(*callbacks: Callback, seed: int = 0, ckpt_path: Path | None = None) -> tuple[Any, Trainer]:
        torch.manual_seed(seed)
        method = build(tmp_path / "in")
        trainer = Trainer(max_epochs=4, limit_train_batches=2, limit_val_batches=0, callbacks=list(callbacks), **QUIET)
        trainer.fit(method, digits(), ckpt_path=ckpt_path, weights_only=None if ckpt_path is None else True)
        return method, trainer

    whole, _ = fit()
    _, stopped = fit(StopAt())
    assert stopped.current_epoch == stop
    stopped.save_checkpoint(tmp_path / "x.ckpt")
    resumed, _ = fit(seed=1, ckpt_path=tmp_path / "x.ckpt")
    assert torch.equal(whole.coefficients, resumed.coefficients) and torch.equal(whole.shares, resumed.shares)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


class Wide(nn.Module):
    """Eight tensors of a size that nothing else has."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList([torch.zeros(2, 50009) for _ in range(8)])

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1).sum(1, keepdim=True) * sum(w.sum(1) for w in self.weights)


def most_in_memory(build: Callable[[], Method], monkeypatch: pytest.MonkeyPatch, max_epochs: int) -> float:
    """Networks in memory at the same time, at most: whenever a tensor is read, and around each step."""
    found = [0.0]
    size = 2 * 50009

    def large() -> list[Tensor]:
        return [t for t in gc.get_objects() if type(t) in (Tensor, nn.Parameter) and t.numel() >= size]

    def count(*_: Any) -> None:
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in large()}
        found[0] = max(found[0], sum(storages.values()) / (8 * size * 4))

    class Count(Callback):
        on_train_batch_start = on_train_batch_end = lambda self, *_: count()

    original = Sample.__getitem__
    gc.collect()
    gc.freeze()  # what is there already is not looked at
    loader = DataLoader(TensorDataset(torch.rand(4, 1, 2, 2), torch.zeros(4, dtype=torch.int64)), 4)
    with monkeypatch.context() as patch:
        patch.setattr(Sample, "__getitem__", lambda self, name: (count(), original(self, name))[1])
        Trainer(max_epochs=max_epochs, limit_val_batches=0, callbacks=[Count()], **QUIET).fit(build(), loader)
    gc.unfreeze()
    return found[0]


def test_few_models_are_in_memory_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    found = {}
    for count in (4, 6):
        tensors = [{f"weights.{i}": torch.randn(2, 50009) for i in range(8)} for _ in range(count)]
        folder = folder_of(tmp_path / str(count), tensors)
        del tensors

        def build(folder: str = folder) -> Method:
            return MEHLSoup(Wide(), folder, models=2, epochs=1, num_classes=2)

        found[count] = most_in_memory(build, monkeypatch, count // 2)
    # Two rows, the centre and the network itself; while they are read, a few tensors more.
    assert found[4] == found[6] and 4 <= found[4] < 5
    learned = most_in_memory(lambda: LearnedSoup(Wide(), str(tmp_path / "6"), num_classes=2), monkeypatch, 1)
    assert 7 <= learned < 8, "the count must be able to see them"


def test_candidates_meet_the_same_noise(tmp_path: Path) -> None:
    """Random numbers belong to samples: how they are batched changes nothing, nor does the order of the ingredients."""
    path, scores = cnns(tmp_path / "in", 3), []
    for batch_size, order in ((7, (0, 1, 2)), (40, (2, 0, 1))):
        torch.manual_seed(batch_size)
        attack = PGD(0.05, steps=2, random_start=True)
        soup = GreedySoup(SmallCNN(width=4), [f"{path}/{i}.safetensors" for i in order], attack, batches=0)
        Trainer(**QUIET).fit(soup, DigitsDataModule(eval_batch_size=batch_size))
        scores.append(dict(zip(order, soup.made_of["scores"], strict=True)))
    assert scores[0] == scores[1]


def test_greedy_needs_held_out_samples(tmp_path: Path) -> None:
    ingredients, loader = planted(tmp_path / "in", [1.0] * 8, [2.0] * 8)
    with pytest.raises(ValueError, match="held-out samples and there are none"):
        Trainer(**QUIET).fit(GreedySoup(Table([0.0] * 8), ingredients, num_classes=2), loader)


class Counted(nn.Module):
    """Counts the images that go through it."""

    def __init__(self) -> None:
        super().__init__()
        self.margins = nn.Parameter(torch.zeros(8))
        self.images = 0

    def forward(self, x: Tensor) -> Tensor:
        self.images += len(x)
        return Table.forward(self, x)


def test_passes(tmp_path: Path) -> None:
    ingredients, loader = planted(tmp_path / "in", *([float(i + 1)] * 8 for i in range(4)))
    attack = PGD(0.1, steps=3)
    learned = LearnedSoup(Counted(), ingredients, attack, num_classes=2)
    learned._checked = {True, False}
    Trainer(max_epochs=2, limit_val_batches=0, **QUIET).fit(learned, loader)
    assert learned.net.images == 2 * 8 * (3 + 1), "the attack and one more pass a step"
    greedy = GreedySoup(Counted(), ingredients, FGSM(0.1), num_classes=2)
    evaluated = []
    accuracy = greedy.held_out_accuracy
    greedy.held_out_accuracy = lambda: (evaluated.append(greedy.net.images), accuracy())[1]  # type: ignore[method-assign]
    Trainer(num_sanity_val_steps=0, **QUIET).fit(greedy, loader, loader)
    assert len(evaluated) == 4 + 3 and set(torch.tensor(evaluated).diff().tolist()) == {8 * 2}


class Shallow(SmallCNN):
    """Every tensor that it has fits the ingredients, which have more."""

    def __init__(self) -> None:
        super().__init__(width=4)
        self.layers = self.layers[:6]


# What is refused -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "more", "message"),
    [
        (lambda path: UniformSoup(SmallCNN(width=8), path), {}, r"0\.safetensors holds layers\.0\.weight of shape"),
        (lambda path: UniformSoup(Shallow(), path), {}, r"holds layers\.\d+\.\w+, which the network lacks"),
        (lambda path: UniformSoup(SmallCNN(width=4), [path + "/0.safetensors"]), {}, "at least two"),
        (lambda path: GreedySoup(SmallCNN(width=4), path, skip=3), {}, r"name 4 network\(s\) and skip=3 leaves 1"),
        (lambda path: LearnedSoup(SmallCNN(width=4), path, skip=-1), {}, "skip=-1"),
        (lambda path: UniformSoup(SmallCNN(width=4), path, batches=-1), {}, "batches=-1"),
        (lambda path: LearnedSoup(SmallCNN(width=4), path, layer_size=-1), {}, "layer_size=-1"),
        (lambda path: LearnedSoup(SmallCNN(width=4), path), {"precision": "16-true"}, "bf16-mixed or 32"),
        (lambda path: MEHLSoup(SmallCNN(width=4), path, models=2), {"max_epochs": 7}, "set it to 10"),
        (lambda path: MEHLSoup(SmallCNN(width=4), path, models=0), {}, "models=0"),
        (lambda path: MEHLSoup(SmallCNN(width=4), path, eps=0), {}, "eps=0"),
        (
            lambda path: LearnedSoup(SmallCNN(width=4), path),
            {"callbacks": [EMA(0.9)]},
            "EMA cannot be combined with LearnedSoup",
        ),
        (lambda path: GreedySoup(SmallCNN(width=4), path), {"callbacks": [EMA(0.9)]}, "EMA cannot be combined with GreedySoup"),
        (lambda path: GreedySoup(SmallCNN(width=4), path), {"callbacks": [AWP()]}, "takes no gradient step"),
        (lambda path: MEHLSoup(SmallCNN(width=4), path), {"callbacks": [AWP()]}, "coefficients and not weights"),
    ],
)
def test_refused(build: Callable[[str], Method], more: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = cnns(tmp_path / "in", 4)
    with pytest.raises(ValueError, match=message):
        Trainer(**{"max_epochs": 1, **QUIET, **more}).fit(build(path), digits())


def test_a_checkpoint_of_other_ingredients_is_refused(tmp_path: Path) -> None:
    cnns(tmp_path / "in", 4)
    trainer = Trainer(max_epochs=2, limit_train_batches=1, limit_val_batches=0, callbacks=[StopAfterEpoch()], **QUIET)
    trainer.fit(LearnedSoup(SmallCNN(width=4), str(tmp_path / "in")), digits())
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    other = LearnedSoup(SmallCNN(width=4), cnns(tmp_path / "other", 5))
    with pytest.raises(ValueError, match="other ingredients"):
        Trainer(max_epochs=2, **QUIET).fit(other, digits(), ckpt_path=tmp_path / "x.ckpt", weights_only=True)


# The command line ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_soups_from_the_command_line(tiny: Path, robust_pl: Callable[..., None], tmp_path: Path) -> None:
    for name in ("a", "b"):
        robust_pl("fit", "-c", tiny, "--run.name", name, "--run.output_dir", "in", "--trainer.max_epochs=1")
    data = ["--data=HeldOut", "--data.data=DigitsDataModule", "--data.batch_size=32"]
    short = ["--trainer.logger=false", "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
    net = ["--model.net=SmallCNN", "--model.net.width=4", "--model.ingredients=in"]
    fgsm = ["--attacks", '{"fgsm": {"class_path": "FGSM", "init_args": {"eps": 0.1}}}']
    for soup, more in (
        ("GreedySoup", ["--model.attack=PGD", "--model.attack.steps=2"]),
        ("LearnedSoup", ["--trainer.max_epochs=1"]),
        ("MEHLSoup", ["--model.models=1", "--model.epochs=1", "--trainer.max_epochs=2"]),
    ):
        robust_pl("fit", f"--model={soup}", *net, *more, *data, *short, *fgsm, "--run.name", soup)
        best = tmp_path / "runs" / soup / "checkpoints" / "best.ckpt"
        robust_pl("test", "--ckpt_path", best)
        assert (tmp_path / "runs" / soup / "test").is_dir()
        stored = torch.load(best, weights_only=True)
        assert stored["robust_pl_soup"]["shares"].shape == (2, 1)
        assert all("in/" in label for label in stored["robust_pl_soup"]["ingredients"])
        net_of_soup = load_model(tmp_path / "runs" / soup)
        assert torch.equal(net_of_soup.linear.weight, stored["state_dict"]["net.linear.weight"])
