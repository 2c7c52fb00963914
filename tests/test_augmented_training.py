"""AugMix's and APR's training: their losses by hand, one forward pass of everything, and what the versions depend on."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from robust_pl.callbacks import FGSM, PGD
from robust_pl.data import PRIME, APRPair, Augmentation, AugMixChains, CutMix, DigitsDataModule, SmoothColor
from robust_pl.data.hashing import VERSIONS, hash_keys
from robust_pl.functional.output_distances import jensen_shannon
from robust_pl.functional.recombination import recombined
from robust_pl.methods import APR, AugMix, Example
from robust_pl.nets import SmallCNN


class Brighter(Augmentation):
    """Each version brighter by a number of its key; out of [0, 1] in places."""

    def __call__(self, x: Tensor, y: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        return x + (keys % 5).view(-1, 1, 1, 1) / 10, y


class Recorded(nn.Module):
    """A network with BatchNorm that keeps what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(3 * 64, 10))
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x.detach().clone())
        return self.net(x)


def batch(count: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    return x, torch.arange(count) % 10, torch.arange(count) + 100


def test_divergence_of_three_by_hand():
    """p = (1, 0), q = (0, 1), r = (1/2, 1/2): m = (1/2, 1/2), so that two thirds of log 2 are left."""
    p, q, r = torch.tensor([[0.0, -100.0]]), torch.tensor([[-100.0, 0.0]]), torch.zeros(1, 2)
    assert abs(float(jensen_shannon(p, q, r)) - 2 / 3 * math.log(2)) < 1e-6
    one_hot = 100 * torch.eye(3)
    assert abs(float(jensen_shannon(*[one_hot[i : i + 1] for i in range(3)])) - math.log(3)) < 1e-6
    logits = torch.randn(3, 20, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert float(jensen_shannon(logits[0], logits[0], logits[0] + 3)) < 1e-12
    # log M as the input of kl_div and the outputs as its target, as in the authors' code
    mean = logits.softmax(2).mean(0).clamp(1e-7, 1).log()
    theirs = sum(F.kl_div(mean, one.softmax(1), reduction="batchmean") for one in logits) / 3
    assert abs(float(jensen_shannon(*logits) - theirs)) < 1e-9
    entropy = torch.distributions.Categorical
    gap = entropy(logits.softmax(2).mean(0)).entropy() - entropy(logits=logits).entropy().mean(0)
    assert abs(float(jensen_shannon(*logits) - gap.mean())) < 1e-9


def test_augmix_loss_by_hand():
    x, y, index = batch()
    method = AugMix(Recorded(), augmentation=Brighter(), weight=7.0)
    example = method.clean((x, y, index))
    assert example.x.shape == (18, 3, 8, 8)
    assert torch.equal(example.y, y.repeat(3)) and torch.equal(example.index, index.repeat(3))
    keys = hash_keys(0, VERSIONS, 0, index)
    assert torch.equal(example.x[:6], x)
    for i in range(2):
        assert torch.equal(example.x[6 + 6 * i : 12 + 6 * i], Brighter()(x, y, hash_keys(keys, i))[0])
    loss = method.loss(example).detach()
    assert len(method.net.seen) == 1 and torch.equal(method.net.seen[0], example.x)  # BatchNorm sees all of them at once
    logits = method.net(example.x).detach()
    p = logits.softmax(1).view(3, 6, 10)
    m = p.mean(0)
    divergence = (p * (p / m).log()).sum(2).mean()
    assert abs(float(loss - F.cross_entropy(logits[:6], y) - 7 * divergence)) < 1e-6
    alone = AugMix(method.net, augmentation=Brighter(), weight=0).loss(example).detach()
    assert abs(float(alone - F.cross_entropy(logits[:6], y))) < 1e-6


def test_gradients_flow_through_all_three_outputs():
    logits = torch.randn(3, 6, 10, generator=torch.Generator().manual_seed(0)).requires_grad_()
    jensen_shannon(*logits).backward()
    assert (logits.grad.abs().sum((1, 2)) > 0).all()


def test_apr_loss_by_hand():
    x, y, index = batch()
    method = APR(Recorded(), augmentation=APRPair(1.0, overflow="keep"))
    example = method.clean((x, y, index))
    assert torch.equal(example.x[:6], x) and example.x.min() < 0  # recombined images are not cut off
    assert any(torch.allclose(example.x[6], recombined(x[j : j + 1], x[:1])[0], atol=1e-6) for j in range(1, 6))
    logits = method.net(example.x).detach()
    expected = F.cross_entropy(logits[:6], y) + F.cross_entropy(logits[6:], y)
    assert abs(float(method.loss(example).detach() - expected)) < 1e-6
    unchanged = APR(method.net, augmentation=APRPair(0.0))
    twice = unchanged.clean((x, y, index))
    assert torch.equal(twice.x, torch.cat([x, x]))
    single = F.cross_entropy(method.net(twice.x)[:6], y)
    assert torch.allclose(unchanged.loss(twice), 2 * single)


def test_versions_depend_on_seed_and_sample_alone():
    x, y, index = batch()

    def versions(seed: int = 0, rows: slice = slice(None)) -> Tensor:
        method = AugMix(SmallCNN(width=4, in_channels=3), seed=seed)
        return method.clean((x[rows], y[rows], index[rows])).x.unflatten(0, (3, -1))

    whole = versions()
    assert torch.equal(whole, versions()) and torch.allclose(whole[:, 2:5], versions(rows=slice(2, 5)), atol=1e-6)
    assert not torch.equal(whole[1], whole[2])
    assert (whole[1:] != versions(seed=1)[1:]).flatten(2).any(2).all()


def test_mixed_labels_from_the_data_stay():
    x, y, index = batch()
    soft = F.one_hot(y, 10).float() * 0.9 + 0.01
    method = AugMix(Recorded())
    example = method.clean((x, soft, index))
    assert torch.equal(example.y, soft.repeat(3, 1)) and method.loss(example).isfinite()


@pytest.mark.parametrize("make", [AugMix, APR])
def test_with_an_attack_everything_is_attacked(make):
    x, y, index = batch()
    method = make(Recorded(), FGSM(0.03), augmentation=Brighter())
    example = method.craft((x, y, index))
    assert example.x.shape == example.x_adv.shape == ((1 + method.versions) * 6, 3, 8, 8)
    assert example.x.max() == 1  # cut off, where the augmentation went beyond
    change = (example.x_adv - example.x).abs().flatten(1)
    assert float(change.max()) <= 0.03 + 1e-6 and (change.amax(1) > 0.02).all()
    method.net.seen.clear()
    attacked = method.loss(example)
    assert torch.equal(method.net.seen[0], example.x_adv)
    assert float(attacked) > float(method.loss(Example(example.x, example.y, example.index)))


class Kept(AugMix):
    """AugMix that keeps its examples."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.kept: list[Example] = []

    def loss(self, example: Example) -> Tensor:
        self.kept.append(example)
        return super().loss(example)


def fit(method: Kept, data: Any, folder: Path, **more: Any) -> list[Example]:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    settings = {"max_epochs": 2, "limit_train_batches": 2, "limit_val_batches": 0}
    Trainer(accelerator="cpu", default_root_dir=folder, **{**quiet, **settings, **more}).fit(method, data)
    return method.kept


@pytest.mark.parametrize("precision", ["32", "bf16-mixed", "64-true"])
def test_versions_in_a_run_are_new_each_epoch_and_as_exact_as_the_pixels(tmp_path, precision):
    data = DigitsDataModule(batch_size=256, seed=3)
    kept = fit(Kept(SmallCNN(width=4), augmentation=PRIME(), seed=5), data, tmp_path, precision=precision)
    for number, example in enumerate(kept):
        count = len(example.x) // 3
        keys = hash_keys(5, VERSIONS, number // 2, example.index[:count])
        expected = PRIME()(example.x[:count], example.y[:count], hash_keys(keys, 1))[0]
        assert torch.allclose(example.x[2 * count :], expected, atol=1e-5)
        assert example.x.dtype == (torch.float64 if precision == "64-true" else torch.float32)


def test_a_loader_without_indices_gives_every_batch_versions_of_its_own(tmp_path):
    x = torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(1)).expand(16, 1, 8, 8)
    loader = DataLoader(TensorDataset(x, torch.zeros(16, dtype=torch.int64)), batch_size=8)
    kept = fit(Kept(SmallCNN(width=4)), loader, tmp_path)
    made = torch.cat([example.x[8:] for example in kept])  # of one and the same image
    assert len(kept) == 4 and len(made.flatten(1).unique(dim=0)) > 55


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: AugMix(SmallCNN(), weight=-1), ValueError, "weight=-1"),
        (lambda: AugMix(SmallCNN(), augmentation=CutMix()), ValueError, "CutMix mixes labels"),
        (lambda: APR(SmallCNN(), augmentation=F.relu), TypeError, "is no augmentation"),
        (lambda: AugMix(SmallCNN(), PGD(targeted=True)), ValueError, "targeted=True"),
    ],
)
def test_wrong_arguments(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_defaults_are_the_papers():
    method = AugMix(SmallCNN())
    assert method.weight == 12 and method.attack is None and method.versions == 2
    assert isinstance(method.augmentation, AugMixChains) and method.augmentation.operations[0].severity == 3
    pair = APR(SmallCNN()).augmentation
    assert pair.probability == 0.6 and pair.overflow == "keep"


# On the command line -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_augmix_of_prime_with_an_attack_in_yaml(robust_pl, tiny: Path) -> None:
    """Beside what the data augment; the checkpoint knows how to build all of it again."""
    config = yaml.safe_load(tiny.read_text())
    config["model"]["class_path"] = "AugMix"
    prime = {"class_path": "PRIME", "init_args": {"operations": [{"class_path": "SmoothColor", "init_args": {"cutoff": 5}}]}}
    config["model"]["init_args"] |= {"augmentation": prime, "attack": {"class_path": "FGSM", "init_args": {"eps": 0.1}}}
    config["data"]["init_args"]["augment"] = [{"class_path": "AsUsual"}, {"class_path": "APRSingle"}]
    tiny.write_text(yaml.safe_dump(config))
    robust_pl("fit", "-c", tiny, "--trainer.max_epochs", 1)
    last = "runs/tiny/checkpoints/last.ckpt"
    (colour,) = AugMix.load_from_checkpoint(last).augmentation.operations
    assert type(colour) is SmoothColor and colour.cutoff == 5
    robust_pl("test", "--ckpt_path", last)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("augment", "message"),
    [
        ({"class_path": "AugMixChains", "init_args": {"severity": 30}}, "severity=30"),
        ({"class_path": "PRIME", "init_args": {"operations": [{"class_path": "CutMix"}]}}, "CutMix mixes labels"),
    ],
)
def test_wrong_arguments_in_yaml_are_one_sentence(robust_pl, tiny: Path, capsys, augment, message) -> None:
    config = yaml.safe_load(tiny.read_text())
    config["data"]["init_args"]["augment"] = [augment]
    tiny.write_text(yaml.safe_dump(config))
    with pytest.raises(SystemExit) as stop:
        robust_pl("fit", "-c", tiny)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and message in said and "Traceback" not in said
