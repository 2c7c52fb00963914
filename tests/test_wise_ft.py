"""WiSE-FT: weights between two networks by hand, Fisher information in closed form, what is chosen, and zero-shot heads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from robust_pl.callbacks import WeightInterpolation
from robust_pl.data import DigitsDataModule
from robust_pl.functional.weight_interpolation import diagonal_fisher, interpolate_state_dicts
from robust_pl.methods import StandardTraining, UniformSoup, WiSEFT
from robust_pl.methods.natural.wise_ft import drawn_labels
from robust_pl.nets import ImageTextPair, SmallCNN, TinyClip, ZeroShotClassifier, load_weights

from .conftest import CONFIGS
from .test_soups import QUIET, folder_of

ALPHAS = [0.0, 0.25, 0.5, 1.0]


@pytest.fixture(scope="module")
def ends(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Weights of two networks that have learned a little from digits, the second from where the first was early on."""
    data, found = DigitsDataModule(), []
    data.setup("fit")
    x, y = data.train_set.read(torch.arange(128), None)
    torch.manual_seed(0)
    net = SmallCNN(width=4).train()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    for step in range(30):
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
        if step in (5, 29):
            found.append({name: tensor.clone() for name, tensor in net.state_dict().items()})
    return [str(path) for path in sorted(Path(folder_of(tmp_path_factory.mktemp("ends"), found)).iterdir())]


def fitted(method: Any, **data: Any) -> Any:
    Trainer(max_epochs=1, **QUIET).fit(method, DigitsDataModule(batch_size=64, eval_batch_size=100, **data))
    return method


def state(path: str) -> dict[str, Tensor]:
    net = SmallCNN(width=4)
    load_weights(net, path)
    return {name: tensor.clone() for name, tensor in net.state_dict().items()}


# The algebra ---------------------------------------------------------------------------------------------------------


def test_interpolation_by_hand() -> None:
    start = {"module.w": torch.tensor([1.0, -3.0]), "module.n": torch.tensor(4), "h": torch.tensor([2.0], dtype=torch.half)}
    end = {"w": torch.tensor([5.0, 1.0]), "n": torch.tensor(9), "h": torch.tensor([3.0], dtype=torch.half)}
    found = interpolate_state_dicts(start, end, 0.25)
    assert found["w"].tolist() == [2.0, -2.0] and found["n"].item() == 9
    assert found["h"].dtype == torch.float32 and found["h"].item() == 2.25
    torch.manual_seed(0)
    a, b = torch.randn(100), torch.randn(100)
    assert torch.equal(interpolate_state_dicts({"w": a}, {"w": b}, 0.0)["w"], a)
    assert torch.equal(interpolate_state_dicts({"w": a}, {"w": b}, 1.0)["w"], b)
    # A counter that one of them lacks is no reason to complain.
    counted = {"w": b, "bn.num_batches_tracked": torch.tensor(3)}
    assert interpolate_state_dicts({"w": a}, counted, 0.5)["bn.num_batches_tracked"] == 3


def test_fisher_weights_by_hand() -> None:
    start, end = {"w": torch.tensor([1.0, 1.0, 1.0]), "b": torch.tensor([0.0])}, {}
    end["w"], end["b"] = torch.tensor([3.0, 3.0, 3.0]), torch.tensor([8.0])
    fisher = {"w": torch.tensor([1.0, 3.0, 0.0])}, {"w": torch.tensor([1.0, 1.0, 0.0])}
    found = interpolate_state_dicts(start, end, 0.25, fisher)
    # (0.75 F0 * 1 + 0.25 F1 * 3) / (0.75 F0 + 0.25 F1), with both at the floor in the last place
    assert torch.allclose(found["w"], torch.tensor([1.5, (2.25 + 0.75) / 2.5, 1.5]))
    assert found["b"].item() == 2.0
    one_sided = interpolate_state_dicts(start, end, 0.5, ({"w": torch.zeros(3)}, {"w": torch.ones(3)}))
    assert torch.allclose(one_sided["w"], torch.full((3,), (1e-8 + 3) / (1e-8 + 1)))


def test_fisher_information_of_a_linear_classifier() -> None:
    """The gradient of -log p(y | x) by W is (p - e_y) x^T."""
    torch.manual_seed(0)
    net, x, y = nn.Sequential(nn.Flatten(), nn.Linear(6, 3)).double(), torch.rand(10, 1, 2, 3).double(), torch.arange(10) % 3
    wrong = net(x).softmax(1).detach() - torch.eye(3)[y]
    weight = (wrong.unsqueeze(2) * x.flatten(1).unsqueeze(1)).square().mean(0)
    for sizes in ([10], [7, 3]):
        found = diagonal_fisher(net, zip(x.split(sizes), y.split(sizes), strict=True), chunk=4)
        assert torch.allclose(found["1.weight"].double(), weight, rtol=1e-5)
        assert torch.allclose(found["1.bias"].double(), wrong.square().mean(0), rtol=1e-5)
    net[1].bias.requires_grad_(False)
    assert set(diagonal_fisher(net, [(x, y)])) == {"1.weight"}


def test_labels_are_drawn_by_probability() -> None:
    p = torch.tensor([0.1, 0.0, 0.6, 0.3])
    labels = drawn_labels(p.log().expand(4000, 4), torch.arange(4000))
    shares = torch.bincount(labels, minlength=4) / 4000
    assert shares[1] == 0 and torch.allclose(shares, p, atol=0.03)
    assert torch.equal(drawn_labels(p.log().expand(7, 4), torch.arange(100, 107)), labels[100:107])


# The run -------------------------------------------------------------------------------------------------------------


def test_the_network_is_that_of_alpha(ends: list[str]) -> None:
    method = fitted(WiSEFT(SmallCNN(width=4), ends[1], ends[0], alpha=0.25, alphas=ALPHAS, batches=0))
    expected = interpolate_state_dicts(state(ends[0]), state(ends[1]), 0.25)
    for name, tensor in method.net.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    assert method.made_of["alpha"] == 0.25 and method.made_of["ends"] == ends


def test_validation_samples_choose(ends: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    data = DigitsDataModule(val_size=300, eval_batch_size=100)
    data.setup("fit")
    x, y, _ = (torch.cat(column) for column in zip(*data.val_dataloader(), strict=True))
    scores, net = [], SmallCNN(width=4).eval()
    for alpha in ALPHAS:
        net.load_state_dict(interpolate_state_dicts(state(ends[0]), state(ends[1]), alpha))
        with torch.no_grad():
            scores.append((net(x).argmax(1) == y).double().mean().item())
    assert len(set(scores)) > 1
    method = fitted(WiSEFT(SmallCNN(width=4), ends[1], ends[0], alpha=None, alphas=ALPHAS, batches=0), val_size=300)
    assert method.made_of["scores"] == pytest.approx(scores)
    assert method.made_of["alpha"] == ALPHAS[scores.index(max(scores))]
    assert f"{max(scores):.2%}" in capsys.readouterr().out


def test_statistics_are_those_of_the_average(ends: list[str]) -> None:
    """Half-way it is the soup of both, statistics included; with batches=0 these are interpolated."""
    soup = fitted(UniformSoup(SmallCNN(width=4), ends, batches=3)).net.state_dict()
    found = fitted(WiSEFT(SmallCNN(width=4), ends[1], ends[0], alphas=[0.5], batches=3)).net.state_dict()
    for name, tensor in soup.items():
        assert "tracked" in name or torch.allclose(tensor, found[name], atol=1e-6), name
    plain = fitted(WiSEFT(SmallCNN(width=4), ends[1], ends[0], alphas=[0.5], batches=0)).net.state_dict()
    assert not torch.allclose(plain["layers.1.running_mean"], soup["layers.1.running_mean"], atol=1e-3)


def test_fisher_information_weighs_both_ends(ends: list[str]) -> None:
    a, b = state(ends[0]), state(ends[1])
    net = fitted(WiSEFT(SmallCNN(width=4), ends[1], ends[0], alphas=[0.5], fisher=24, batches=0)).net
    data, fisher = DigitsDataModule(), []
    data.setup("fit")
    index = data.split[0][torch.arange(24) * len(data.split[0]) // 24]
    x = data.train_set.read(index, None)[0]
    for end in (a, b):
        model = SmallCNN(width=4).eval()
        model.load_state_dict(end)
        with torch.no_grad():
            labels = drawn_labels(model(x), index)
        fisher.append(diagonal_fisher(model, [(x, labels)]))
    expected = interpolate_state_dicts(a, b, 0.5, (fisher[0], fisher[1]))
    for name, tensor in net.state_dict().items():
        assert torch.allclose(tensor, expected[name], atol=1e-5), name
    assert not torch.allclose(expected["linear.weight"], interpolate_state_dicts(a, b, 0.5)["linear.weight"], atol=1e-3)


def test_without_validation_samples_nothing_is_measured(ends: list[str]) -> None:
    assert fitted(WiSEFT(SmallCNN(width=4), ends[1], ends[0], batches=0), val_size=0).made_of["scores"] == []
    with pytest.raises(ValueError, match=r"chooses on held-out samples and there are none"):
        fitted(WiSEFT(SmallCNN(width=4), ends[1], ends[0], alpha=None, batches=0), val_size=0)


def pair() -> ImageTextPair:
    torch.manual_seed(0)
    names = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    return ImageTextPair(TinyClip(in_channels=1, width=4, dim=8, vocabulary=64), names, ["a {}", "the digit {}"])


def test_a_zero_shot_classifier_with_a_head_of_its_own(tmp_path: Path) -> None:
    """It begins with the pair's logits, learns without texts, and its weights are averaged with those it began with."""
    zero_shot, x = ZeroShotClassifier(pair()), torch.rand(5, 1, 8, 8)
    before = {name: t.clone() for name, t in zero_shot.state_dict().items()}
    zero_shot.eval()
    assert torch.allclose(zero_shot(x), pair().eval()(x), atol=1e-5)
    (tmp_path / "names.txt").write_text("nine\n\neight\n")
    assert torch.allclose(ZeroShotClassifier(pair(), str(tmp_path / "names.txt")).eval()(x), zero_shot(x)[:, [9, 8]], atol=1e-5)
    tuned = StandardTraining(zero_shot, optimizer=lambda p: torch.optim.SGD(p, lr=0.01))
    data = {"max_epochs": 1, "limit_train_batches": 3, "limit_val_batches": 0}
    Trainer(**data, **QUIET).fit(tuned, DigitsDataModule(batch_size=32))
    after = zero_shot.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert "head.weight" in moved and any(name.startswith("pair.model.visual.") for name in moved)
    assert not any("word" in name or "text" in name or "logit_scale" in name for name in moved)
    save_file({name: t.contiguous() for name, t in after.items()}, tmp_path / "tuned.safetensors")
    method = fitted(WiSEFT(ZeroShotClassifier(pair()), str(tmp_path / "tuned.safetensors"), alphas=[0.5], batches=0))
    for name, tensor in method.net.state_dict().items():
        assert torch.allclose(tensor, torch.lerp(before[name].double(), after[name].double(), 0.5).to(tensor), atol=1e-6), name
    assert method.made_of["ends"][0] == "the network as built"


def test_it_works_for_the_pair_itself(tmp_path: Path) -> None:
    tuned = pair()
    with torch.no_grad():
        tuned.model.visual.get_parameter(next(name for name, _ in tuned.model.visual.named_parameters())).add_(0.1)
    save_file({name: t.contiguous() for name, t in tuned.state_dict().items()}, tmp_path / "tuned.safetensors")
    method = fitted(WiSEFT(pair(), str(tmp_path / "tuned.safetensors"), alphas=[0.0, 1.0], batches=0))
    assert len(method.made_of["scores"]) == 2


# The analysis --------------------------------------------------------------------------------------------------------


def test_accuracy_on_the_way(ends: list[str]) -> None:
    torch.manual_seed(0)
    x, net = torch.rand(40, 1, 8, 8), SmallCNN(width=4)
    load_weights(net, ends[1])
    with torch.no_grad():
        y = net.eval()(x).argmax(1)
    before = {name: t.clone() for name, t in net.state_dict().items()}
    expected, other = [], SmallCNN(width=4).eval()
    for alpha in ALPHAS:
        other.load_state_dict(interpolate_state_dicts(state(ends[0]), state(ends[1]), alpha))
        with torch.no_grad():
            expected.append((other(x).argmax(1) == y).double().mean().item())
    analysis = WeightInterpolation(ends[0], ALPHAS)
    record = analysis(net, DataLoader(TensorDataset(x, y), 16))
    assert record.lines[0].lines["accuracy"] == pytest.approx(expected) and expected[-1] == 1.0 and expected[0] < 1
    assert record.figures["acc_0.25"] == pytest.approx(expected[1])
    assert record.about["forwards_per_sample"] == len(ALPHAS) and len(record.notes) == 2
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())


def test_texts_that_did_not_move_are_not_embedded_again(tmp_path: Path) -> None:
    start, net = pair(), pair()
    with torch.no_grad():
        next(net.model.visual.parameters()).add_(0.1)
    save_file({name: t.contiguous() for name, t in start.state_dict().items()}, tmp_path / "start.safetensors")
    calls: list[int] = []
    original = net.model.encode_text
    net.model.encode_text = lambda tokens: (calls.append(1), original(tokens))[1]
    data = DataLoader(TensorDataset(torch.rand(6, 1, 8, 8), torch.arange(6)), 2)
    WeightInterpolation(str(tmp_path / "start.safetensors"), ALPHAS)(net, data)
    assert len(calls) == 1


# Errors --------------------------------------------------------------------------------------------------------------

W = torch.zeros(2)


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: interpolate_state_dicts({"w": W}, {"w": W}, 1.5), ValueError, "alpha=1.5"),
        (lambda: interpolate_state_dicts({"w": W, "b": W}, {"w": W}, 0.5), ValueError, "b is in start and not in end"),
        (lambda: interpolate_state_dicts({"w": W}, {"w": W, "b": W}, 0.5), ValueError, "b is in end and not in start"),
        (
            lambda: interpolate_state_dicts({"w": W}, {"w": torch.zeros(3)}, 0.5),
            ValueError,
            r"shape \(2,\) in start and \(3,\)",
        ),
        (lambda: diagonal_fisher(nn.Linear(2, 2), []), ValueError, "at least one sample"),
        (lambda: WiSEFT(SmallCNN(), "x", alpha=2), ValueError, r"alphas=\[2"),
        (lambda: WiSEFT(SmallCNN(), "x", alpha=None, alphas=[]), ValueError, "at least one"),
        (lambda: WiSEFT(SmallCNN(), "x", fisher=-1), ValueError, "fisher=-1"),
        (lambda: WeightInterpolation("x", [-0.1]), ValueError, r"alphas=\[-0.1\]"),
        (lambda: ZeroShotClassifier(SmallCNN()), TypeError, "pair is a SmallCNN"),
        (lambda: ZeroShotClassifier(ImageTextPair(TinyClip())), ValueError, "set class_names"),
        (lambda: ZeroShotClassifier(pair(), "nowhere.txt"), FileNotFoundError, "class_names='nowhere.txt' is no file"),
    ],
)
def test_bad_arguments(build: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build()


def test_weights_of_another_network_are_refused(ends: list[str]) -> None:
    with pytest.raises(ValueError, match="weights of another network"):
        fitted(WiSEFT(SmallCNN(width=8), ends[1], ends[0]))
    with pytest.raises(ValueError, match="weights of another network"):
        WeightInterpolation(ends[0])(SmallCNN(width=8), [])


def test_a_network_that_cannot_be_differentiated_sample_by_sample() -> None:
    class Looking(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if x.sum() > 0 else x

    with pytest.raises(ValueError, match="Looking cannot be differentiated sample by sample"):
        diagonal_fisher(Looking(2, 2), [(torch.rand(3, 2), torch.zeros(3, dtype=torch.int64))])


@pytest.mark.slow
def test_the_whole_way_from_configs(robust_pl: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    short = ("--trainer.max_epochs", "2")
    robust_pl("fit", "-c", CONFIGS / "digits/standard.yaml", *short)
    robust_pl("fit", "-c", CONFIGS / "digits/adversarial_fine_tuning.yaml", *short)
    robust_pl("fit", "-c", CONFIGS / "digits/wise_ft.yaml")
    robust_pl(
        *("test", "--ckpt_path", "runs/adversarial_fine_tuning/checkpoints/best.ckpt"),
        *("--trainer.callbacks", "[{class_path: WeightInterpolation, init_args: {start: runs/standard}}]"),
    )
    (record,) = Path("runs/adversarial_fine_tuning/analysis").rglob("weightinterpolation.json")
    assert record.with_suffix(".png").is_file()
    logged = "".join(path.read_text() for path in Path("runs/adversarial_fine_tuning").rglob("metrics.csv"))
    assert "test/weightinterpolation_acc_0.50" in logged
