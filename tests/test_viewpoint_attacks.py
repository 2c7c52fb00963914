"""Viewpoint attacks on a toy whose bad regions are known, and as a user runs them in a trainer."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import robust_pl
from robust_pl.callbacks import (
    GMVFool,
    GridViews,
    NaturalViews,
    RandomViews,
    ViewDistribution,
    ViewFool,
    ViewpointAttack,
    ViewSphere,
)
from robust_pl.callbacks.viewpoints import problem as problem_module
from robust_pl.callbacks.viewpoints.draws import ObjectDraws
from robust_pl.callbacks.viewpoints.evolution import Evolution, Mixtures
from robust_pl.callbacks.viewpoints.found import Found
from robust_pl.data import ViewImages
from robust_pl.scenes import SceneSet, ViewSpace

from .view_landscape import FailsNear, PosePhoto, photos

SPACE = ViewSpace(phi=(0, 80))
BAD = torch.tensor([[20.0, 100.0, 60.0, 3.3, 0.3, 0.2], [-20.0, -100.0, 50.0, 4.7, -0.3, 0.3]])
SEEDS = 16
"""Objects look alike and differ in their random numbers alone, so they are as many seeds."""


def shares(found: Found, scenes: SceneSet, net: FailsNear) -> Tensor:
    """Share of an object's fresh views that lie in each bad region, (N, M)."""
    n, count = found.u.shape[:2]
    images = found.images(scenes, torch.arange(n).repeat_interleave(count), found.view.flatten(0, 1))
    away = (images.flatten(1).unsqueeze(1) - net.bad).square().sum(-1) * net.sharp.detach()
    return (away < 1.5).view(n, count, -1).float().mean(1)


@pytest.fixture(scope="module")
def landscape() -> tuple[SceneSet, FailsNear, dict[str, Found]]:
    scenes, net = photos(SEEDS), FailsNear(BAD, width=0.25)
    attacks: dict[str, ViewpointAttack] = {
        "viewfool": ViewFool(space=SPACE),
        "gmvfool": GMVFool(space=SPACE),
        "random": RandomViews(5100, keep=1, sigma=0.15, space=SPACE),
        "random5": RandomViews(5250, keep=5, sigma=0.15, space=SPACE),
        "uniform": RandomViews(space=SPACE),
        "natural": NaturalViews(space=SPACE),
    }
    return scenes, net, {name: attack(net, scenes) for name, attack in attacks.items()}


def test_gmvfool_finds_both_regions_and_viewfool_one(landscape: tuple) -> None:
    scenes, net, found = landscape
    both = shares(found["gmvfool"], scenes, net)
    assert (both > 0.15).all() and (both.sum(1) > 0.6).all()
    one = shares(found["viewfool"], scenes, net)
    assert (one.amax(1) > 0.6).all() and (one.amin(1) == 0).all()


@pytest.mark.parametrize(("attack", "baseline"), [("viewfool", "random"), ("gmvfool", "random5")])
def test_worse_views_than_random_search_with_the_same_renders(landscape: tuple, attack: str, baseline: str) -> None:
    found, random = landscape[2][attack], landscape[2][baseline]
    assert found.renders == random.renders
    gain = found.worst_loss - random.worst_loss
    assert gain.mean() > 0.1 and gain.mean() > 2 * gain.std() / SEEDS**0.5
    assert found.loss.mean() > random.loss.mean()  # under the noise of the distribution the margin is small
    for name in ("uniform", "natural"):
        assert found.accuracy_of_each.mean() < 0.5 and landscape[2][name].accuracy_of_each.mean() > 0.9


def test_what_was_found_is_what_the_network_says(landscape: tuple) -> None:
    scenes, net, found = landscape
    gmvfool = found["gmvfool"]
    images = gmvfool.worst_images(scenes)
    assert images.shape == (SEEDS, 3, 2, 2)
    loss = F.cross_entropy(net(images), scenes.labels, reduction="none")
    torch.testing.assert_close(loss, gmvfool.worst_loss)
    assert torch.equal(net(images).argmax(1), gmvfool.worst_prediction)
    assert (gmvfool.worst_loss >= gmvfool.loss.amax(1)).all()
    assert torch.equal(gmvfool.worst_fitness, gmvfool.worst_loss)
    assert gmvfool.history.shape == (SEEDS, 50, 2)
    assert (gmvfool.history[:, -10:, 0].mean(1) > gmvfool.history[:, :10, 0].mean(1) + 0.4).all()
    assert torch.equal(gmvfool.u, gmvfool.distribution.sample(100, gmvfool.sample_seed)[0])
    figures = gmvfool.figures("g")
    assert figures["acc_g"] == pytest.approx((gmvfool.prediction == 0).float().mean().item())
    assert figures["center_acc_g"] == pytest.approx((gmvfool.center_prediction == 0).float().mean().item())
    assert figures["worst_view_g"] == 0.0 and figures["entropy_g"] < 0 and figures["renders_per_second_g"] > 0
    labels = torch.tensor([2] * 3 + [0] * (SEEDS - 3))  # the network says 0 or 1
    parted = dataclasses.replace(gmvfool, labels=labels)
    right = (gmvfool.prediction[3:] == 0).float().mean().item()
    assert parted.accuracy_of_classes == {0: pytest.approx(right), 2: 0.0} and right > 0
    assert parted.figures("g")["worst_class_g"] == 0.0
    assert SPACE.contains(gmvfool.view).all() and SPACE.contains(gmvfool.worst_view).all()
    assert found["uniform"].figures("u")["entropy_u"] == pytest.approx(0.0)
    assert found["uniform"].coverage > found["viewfool"].coverage >= 1
    natural = found["natural"].view
    assert (natural[..., 0] == 0).all() and natural[..., 2].min() >= 40 and natural[..., 2].max() <= 80


def test_a_grid_holds_each_of_its_views_once() -> None:
    found = GridViews(12, 7, space=SPACE)(FailsNear(BAD), photos(5))
    assert found.view.shape == (5, 84, 6) and found.renders == 5 * 2 * 84
    low, high = SPACE.ranges["phi"]
    wanted = torch.cartesian_prod(torch.arange(-165, 180, 30.0), low + (torch.arange(7) + 0.5) / 7 * (high - low))
    for view in found.view:
        theta, phi = view[:, 1], view[:, 2]
        order = (theta.round() * 1000 + phi).argsort()
        torch.testing.assert_close(torch.stack([theta, phi], 1)[order], wanted, atol=0.02, rtol=0)
        assert (view[:, [0, 3, 4, 5]] - torch.tensor([0.0, 4.0, 0.0, 0.0])).abs().max() < 0.002
    assert found.coverage == 60 and found.figures("g")["acc_g"] == pytest.approx(found.figures("g")["center_acc_g"])
    assert torch.equal(found.worst_loss, found.loss.amax(1).maximum(found.worst_loss))
    with pytest.raises(ValueError, match="GridViews moves theta and phi, and phi is not active"):
        GridViews()(FailsNear(BAD), photos(1), space=ViewSpace(active=["theta"]))


def test_renders_are_counted() -> None:
    scenes = photos(3)
    found = GMVFool(2, popsize=7, iterations=4, eval_samples=9, batch_size=5, space=SPACE)(FailsNear(BAD), scenes)
    each = 4 * (2 + 6) + 9 + 2
    assert found.renders == 3 * each
    shown = [sum(renderer.calls) for renderer in scenes.renderers]
    assert shown == [each + 1, each, each]  # one look before any work starts
    assert max(max(renderer.calls) for renderer in scenes.renderers) <= 5


def test_a_search_for_the_beginning_begins_at_bad_views_and_is_counted() -> None:
    scenes, net = photos(8), FailsNear(BAD)
    settings = {"popsize": 41, "iterations": 5, "eval_samples": 0, "space": SPACE}
    searched, spread = (GMVFool(2, begin=begin, **settings)(net, scenes) for begin in ("search", "spread"))
    assert searched.renders == spread.renders + 8 * 410
    assert (searched.history[:, 0, 0] > spread.history[:, 0, 0] + 0.5).all()


@pytest.mark.parametrize(
    "attack",
    [
        ViewFool(11, 5, space=SPACE, chunk=2),
        GMVFool(3, "per_dim", 21, 4, learn_weights=True, space=SPACE, center="best", chunk=4),
        GMVFool(3, popsize=7, iterations=3, begin="search", space=SPACE),
        RandomViews(40, keep=3, space=SPACE),
        NaturalViews(space=SPACE),
        GridViews(3, 2, space=SPACE),
    ],
    ids=lambda attack: attack.name,
)
def test_objects_together_are_as_each_alone(attack: ViewpointAttack) -> None:
    """Bit for bit, with backgrounds that belong to the objects, whatever else is attacked in the same batch."""

    class HalfClear(PosePhoto):
        def render(self, pose: Tensor) -> Any:
            return super().render(pose)._replace(alpha=torch.full((len(pose), 1, 2, 2), 0.5))

    bank = torch.rand(9, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    scenes = SceneSet([HalfClear() for _ in range(5)], [0, 1, 0, 2, 0], list("abcde"), bank)
    net = FailsNear(BAD)
    together = attack(net, scenes)
    for rows in ([3], [4, 0]):
        alone = attack(net, scenes.subset(rows))
        for name in ("history", "u", "loss", "prediction", "worst_u", "worst_loss", "center_prediction"):
            assert torch.equal(getattr(alone, name), getattr(together, name)[rows]), name
        for name, tensor in alone.distribution.tensors().items():
            assert torch.equal(tensor, together.distribution.tensors()[name][rows]), name
        assert torch.equal(alone.worst_images(scenes.subset(rows)), together.worst_images(scenes)[rows])


def test_one_step_by_hand() -> None:
    """PEPG's own sums, as the published code has them, for one Gaussian and no entropy."""
    draws = ObjectDraws(0, ["a", "b"])
    state = Mixtures(
        torch.ones(2, 1, 1), torch.zeros(2, 1, 3), torch.full((2, 1, 3), 0.1), torch.zeros(2, 1, 3), torch.zeros(2)
    )
    evolution = Evolution(5, 0.0, 0.1, 0.15, False)
    asked = evolution.ask(state, 0, draws)
    assert asked.u.shape == (2, 11, 3)
    torch.testing.assert_close(asked.u[:, 1:6], -asked.u[:, 6:])
    fitness = torch.randn(2, 11, generator=torch.Generator().manual_seed(1))
    found = evolution.tell(state, 7, asked, fitness)
    rank = fitness.argsort(1).argsort(1) / 10 - 0.5
    offset = asked.u[:, 1:6]
    gradient = ((rank[:, 1:6] - rank[:, 6:]).unsqueeze(2) * offset).sum(1)
    torch.testing.assert_close(found.mean[:, 0], 0.1 * 0.99**7 * 0.1 * gradient)
    torch.testing.assert_close(found.velocity[:, 0], 0.1 * gradient)
    height = (rank[:, 1:6] + rank[:, 6:]) / 2 - rank[:, :1]
    change = (height.unsqueeze(2) * (offset**2 - 0.01) / 0.1).sum(1) / 10
    torch.testing.assert_close(found.sigma[:, 0], 0.999 * (0.1 + (0.2 * change).clamp(-0.02, 0.02)))
    torch.testing.assert_close(found.best[:, 0], asked.u[range(2), fitness.argmax(1)])


def test_the_entropy_widens_and_its_weight_is_that_of_the_component() -> None:
    flat = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    nn.init.zeros_(flat[1].weight)
    for weight, wider in ((0.01, True), (0.0, False)):
        found = ViewFool(5, 20, weight, sigma_init=0.1, sigma_max=0.8, space=SPACE, eval_samples=0)(flat, photos(1))
        assert (found.distribution.sigma > 0.11).all().item() is wider
        assert found.distribution.mean.abs().max() < 1e-6  # nothing pulls on a flat landscape, and H is highest in the middle


def test_weights_of_components_are_learned_where_asked() -> None:
    bad = BAD[:1]
    found = GMVFool(2, learn_weights=True, popsize=41, iterations=40, space=SPACE)(FailsNear(bad), photos(4))
    weights = found.distribution.weights
    torch.testing.assert_close(weights.sum(1), torch.ones(4))
    assert (weights != 0.5).all()
    fixed = GMVFool(2, popsize=41, iterations=3, space=SPACE)(FailsNear(bad), photos(4))
    assert (fixed.distribution.weights == 0.5).all()


def test_targeted_reaches_the_target() -> None:
    class TwoWays(nn.Module):
        """Class 1 near the first bad view, class 2 near the second."""

        num_classes = 3

        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = FailsNear(BAD[:1]), FailsNear(BAD[1:])

        def forward(self, x: Tensor) -> Tensor:
            margins = [-net(x)[:, 0] for net in (self.first, self.second)]
            return torch.stack([torch.zeros(len(x)), *margins], 1)

    net, scenes = TwoWays(), photos(2)
    attack = ViewFool(targeted=True, iterations=60, space=SPACE)
    found = attack(net, scenes, torch.tensor([1, 2]))
    assert found.worst_prediction.tolist() == [1, 2] and found.labels.tolist() == [0, 0]
    assert found.figures("t")["reached_t"] > 0.5
    assert (found.worst_fitness < 0).all()
    with pytest.raises(ValueError, match="needs y"):
        attack(net, scenes)


def test_warm_start_goes_on_from_what_was_found() -> None:
    scenes, net = photos(3), FailsNear(BAD)
    attack = GMVFool(3, iterations=30, space=SPACE)
    begun = attack(net, scenes, seed=1)
    order = ["thing/2", "thing/0"]
    part = scenes.subset([2, 0])
    on = attack(net, part, start=begun.distribution, iterations=2, eval_samples=50)
    assert on.history.shape == (2, 2, 2) and on.u.shape == (2, 50, 6)
    away = (on.distribution.mean - begun.distribution.of(order).mean).abs().max()
    assert 0 < away < 0.3
    assert (on.history[:, 0, 0] > begun.history[[2, 0], 0, 0]).all()
    with pytest.raises(ValueError, match="components=3 and mixture='joint', and the attack 5"):
        GMVFool(5, space=SPACE)(net, scenes, start=begun.distribution)
    with pytest.raises(ValueError, match="no object 'thing/3'"):
        attack(net, photos(4), start=begun.distribution)
    with pytest.raises(ValueError, match="another space"):
        attack(net, scenes, start=begun.distribution, space=ViewSpace())
    with pytest.raises(ValueError, match="neither start nor iterations"):
        RandomViews(space=SPACE)(net, scenes, start=begun.distribution)


def test_the_network_and_the_random_streams_are_left_as_they_were() -> None:
    net = nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.Dropout(), nn.Linear(12, 3)).train()
    net[0].eval()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    modes, stream = [module.training for module in net.modules()], torch.get_rng_state()
    ViewFool(5, 2, space=SPACE)(net, photos(2))
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())
    assert modes == [module.training for module in net.modules()]
    assert all(p.requires_grad and p.grad is None for p in net.parameters())
    assert torch.equal(torch.get_rng_state(), stream)


# Files ---------------------------------------------------------------------------------------------------------------


class Killed(Exception):
    pass


@pytest.mark.parametrize("after", [2, 25, 60])
def test_a_killed_attack_goes_on_to_the_same_result(after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scenes, net = photos(5), FailsNear(BAD)
    attack = GMVFool(2, popsize=9, iterations=11, space=SPACE, chunk=2, eval_samples=7, begin="search")
    whole = attack(net, scenes)
    looks, look = 0, problem_module.ViewProblem.look

    def fragile(self: Any, u: Tensor) -> Any:
        nonlocal looks
        looks += 1
        if looks == after:
            raise Killed
        return look(self, u)

    with monkeypatch.context() as patch:
        patch.setattr(problem_module.ViewProblem, "look", fragile)
        if after < 3 * 14:
            with pytest.raises(Killed):
                attack(net, scenes, folder=tmp_path / "run")
        else:
            attack(net, scenes, folder=tmp_path / "run")
        looks = 1000
        again = attack(net, scenes, folder=tmp_path / "run")
    assert looks - 1000 + min(after - 1, 42) == 3 * (12 + 2)  # nothing was done twice
    for name in ("history", "u", "loss", "prediction", "worst_u", "worst_loss", "worst_prediction", "center_prediction"):
        assert torch.equal(getattr(again, name), getattr(whole, name)), name
    for name, tensor in whole.distribution.tensors().items():
        assert torch.equal(again.distribution.tensors()[name], tensor)
    assert again.renders == whole.renders


def test_a_folder_of_another_attack_is_not_touched(tmp_path: Path) -> None:
    scenes, net = photos(2), FailsNear(BAD)
    attack = ViewFool(5, 2, space=SPACE, eval_samples=2)
    attack(net, scenes, folder=tmp_path / "run")
    content = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    others: list[Callable[[], Any]] = [
        lambda: ViewFool(5, 3, space=SPACE, eval_samples=2)(net, scenes, folder=tmp_path / "run"),
        lambda: attack(FailsNear(BAD, width=0.3), scenes, folder=tmp_path / "run"),
        lambda: attack(net, photos(3), folder=tmp_path / "run"),
        lambda: attack(net, scenes, folder=tmp_path / "run", seed=1),
        lambda: attack(net, scenes, folder=tmp_path / "run", space=ViewSpace()),
    ]
    for other in others:
        with pytest.raises(ValueError, match="holds another attack"):
            other()
    assert content == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match=r"no attack\.json of ours"):
        attack(net, scenes, folder=tmp_path / "mine")


# In a trainer --------------------------------------------------------------------------------------------------------


class Fixed(LightningModule):
    """A module around a network that does not learn."""

    num_classes = 3

    def __init__(self) -> None:
        super().__init__()
        self.net = FailsNear(BAD)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return 0 * self.net.sharp

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pass

    test_step = validation_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class TinyScenes(LightningDataModule):
    """What viewpoint attacks ask of a data module, and one batch of something."""

    class_names = ("mug", "toy car/red", "duck")
    view_space = SPACE

    def setup(self, stage: str) -> None:
        self.val_scenes, self.test_scenes = photos(2), photos(3)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(TensorDataset(torch.zeros(2, 3, 2, 2), torch.zeros(2, dtype=torch.int64)))

    val_dataloader = test_dataloader = train_dataloader


def trainer_with(root: Path, *callbacks: Callback, **more: Any) -> Trainer:
    seed_everything(0, verbose=False)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    return Trainer(default_root_dir=root, accelerator="cpu", callbacks=list(callbacks), **quiet, **more)


def test_in_a_trainer_and_its_folder_read_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    attack, random = ViewFool(11, 6, eval_samples=8), RandomViews(20, eval_samples=8, every_n_epochs=2)
    trainer = trainer_with(tmp_path, attack, random, max_epochs=3)
    module, data = Fixed(), TinyScenes()
    seen: list[set[str]] = []
    module.on_validation_end = lambda: seen.append({key for key in trainer.callback_metrics if key.startswith("val/acc")})
    trainer.fit(module, data)
    both = {"val/acc_viewfool", "val/acc_randomviews"}
    assert [found & both for found in seen[1:]] == [{"val/acc_viewfool"}, both, both]
    folder = tmp_path / "viewpoints"
    assert ViewDistribution.load(folder / "val_viewfool" / "distribution.safetensors").ids == ["thing/0", "thing/1"]

    trainer.test(module, data, verbose=False)
    figures = trainer.callback_metrics
    assert {f"test/{key}_viewfool" for key in ("acc", "worst_view", "entropy", "renders_per_second")} <= figures.keys()
    found = attack.found
    plain = attack(module, data.test_scenes, space=SPACE)
    assert torch.equal(found.u, plain.u) and torch.equal(found.worst_u, plain.worst_u)
    assert figures["test/acc_viewfool"].item() == pytest.approx(plain.figures("x")["acc_x"])
    said = capsys.readouterr().out
    assert "viewpoints of 3 objects" in said and "viewfool" in said and "randomviews" in said
    check_folder(folder / "test_viewfool", found, data.test_scenes, module)
    assert len(ViewImages(folder / "test_randomviews")) == 24

    stamp = (folder / "test_viewfool" / "chunks" / "00000.safetensors").stat().st_mtime_ns
    trainer.test(module, data, verbose=False)  # the same again is already there
    assert (folder / "test_viewfool" / "chunks" / "00000.safetensors").stat().st_mtime_ns == stamp
    module.net.sharp.data.mul_(0.9)
    trainer.test(module, data, verbose=False)
    assert (folder / "test_viewfool-2" / "views.csv").is_file() and not (folder / "test_viewfool-3").exists()


def check_folder(folder: Path, found: Found, scenes: SceneSet, net: nn.Module) -> None:
    images = ViewImages(folder)
    assert len(images) == 24 and images.labels.tolist() == [0] * 24
    assert images.rows[9]["file"] == "views/mug/1_thing_1_001.png" and images.rows[9]["object"] == "thing/1"
    x, y = images.read(torch.arange(24), None)
    which = torch.arange(3).repeat_interleave(8)
    rendered = found.images(scenes, which, found.view.flatten(0, 1))
    assert (x - rendered).abs().max() <= 0.5 / 255 + 1e-6
    # Everything can be computed again from the table alone.
    view = torch.stack([images.column(name) for name in ("gamma", "theta", "phi", "r", "x", "y")], 1).float()
    assert torch.equal(view, found.view.flatten(0, 1))
    u = torch.stack([images.column(f"u_{name}") for name in SPACE.active], 1).float()
    assert torch.equal(u, found.u.flatten(0, 1))
    loss = F.cross_entropy(net(rendered), y, reduction="none")
    torch.testing.assert_close(images.column("loss").float(), loss.detach())
    assert torch.equal(images.column("prediction").long(), net(rendered).argmax(1))
    drawn = ViewDistribution.load(folder / "distribution.safetensors").sample(8, int(images.rows[0]["seed"]))[0]
    assert torch.equal(drawn, found.u)
    assert images.about["renderers"] == ["PosePhoto"] and images.about["robust_pl"] == robust_pl.__version__
    assert images.about["attack"]["class"].endswith("ViewFool") and images.about["attack"]["popsize"] == "11"
    assert {row["renderer"] for row in images.rows} == {"photo 0", "photo 1", "photo 2"}
    worst = ViewImages(folder, "worst")
    assert (
        len(worst) == 3 and (worst.read(torch.arange(3), None)[0] - found.worst_images(scenes)).abs().max() <= 0.5 / 255 + 1e-6
    )
    assert json.loads((folder / "views.json").read_text())["class_names"][1] == "toy car/red"
    (folder / images.rows[3]["file"]).unlink()
    with pytest.raises(FileNotFoundError, match=re.escape(images.rows[3]["file"])):
        ViewImages(folder)
    with pytest.raises(FileNotFoundError, match=r"no views\.csv"):
        ViewImages(folder / "views")


def test_targeted_in_a_trainer_aims_at_other_classes(tmp_path: Path) -> None:
    attack = ViewFool(5, 2, targeted=True, eval_samples=4)
    trainer_with(tmp_path, attack).test(Fixed(), TinyScenes(), verbose=False)
    assert set(attack.found.target.tolist()) <= {1, 2}


def test_data_modules_without_scenes(tmp_path: Path) -> None:
    class NoScenes(TinyScenes):
        def setup(self, stage: str) -> None:
            pass

    with pytest.raises(ValueError, match="NoScenes offers no test_scenes"):
        trainer_with(tmp_path, ViewFool(5, 2)).test(Fixed(), NoScenes(), verbose=False)
    with pytest.raises(ValueError, match="NoScenes offers no val_scenes"):
        trainer_with(tmp_path, ViewFool(5, 2), max_epochs=1).fit(Fixed(), NoScenes())
    with pytest.raises(ValueError, match="two attacks are named 'viewfool'"):
        trainer_with(tmp_path, ViewFool(5, 2), ViewFool(5, 3)).test(Fixed(), TinyScenes(), verbose=False)


# Bad input -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: ViewFool(50), "popsize=50 must be odd and at least 3"),
        (lambda: ViewFool(1), "popsize=1 must be odd"),
        (lambda: GMVFool(0), "components=0 must be a whole number of at least 1"),
        (lambda: GMVFool(15, popsize=21), "popsize=21 must be odd and at least 31 for 15 components"),
        (lambda: GMVFool(mixture="both"), "mixture='both' is unknown"),
        (lambda: ViewFool(center="middle"), "center='middle' is unknown"),
        (lambda: ViewFool(sigma_init=0.2), "sigma_init=0.2 must be above 0 and at most sigma_max=0.15"),
        (lambda: ViewFool(entropy_weight=-1.0), "entropy_weight=-1.0"),
        (lambda: ViewFool(iterations=0), "iterations=0"),
        (lambda: ViewFool(chunk=0), "chunk=0"),
        (lambda: ViewFool(eval_samples=-1), "eval_samples=-1"),
        (lambda: RandomViews(10, keep=11), "keep=11 views of samples=10"),
        (lambda: GridViews(0), "azimuths=0 must be a whole number"),
        (lambda: NaturalViews((50, 10)), "elevation=.50, 10. must rise"),
    ],
)
def test_bad_settings(make: Callable[[], ViewpointAttack], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make()


def test_bad_calls() -> None:
    attack, net = ViewFool(5, 2, space=SPACE), FailsNear(BAD)
    with pytest.raises(ValueError, match=r"r begins at 3 and the object 'big' reaches 3\.5"):
        attack(net, SceneSet([PosePhoto(), PosePhoto(radius=3.5)], [0, 0], ["small", "big"]))
    scenes = SceneSet([PosePhoto(), PosePhoto()], [0, 3], ["cup", "cow"])
    with pytest.raises(ValueError, match="label of object 'cow' is 3 and the network has 3 logits"):
        attack(net, scenes)
    assert [len(renderer.calls) for renderer in scenes.renderers] == [1, 0]  # before any work
    with pytest.raises(ValueError, match="give one int64 class for each"):
        attack(net, photos(2), torch.tensor([0]))
    with pytest.raises(ValueError, match="logits are"):
        attack(nn.Identity(), photos(1))
    broken = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    nn.init.constant_(broken[1].bias, float("nan"))
    with pytest.raises(ValueError, match="loss on views of 'thing/0' is not finite"):
        attack(broken, photos(1))


@pytest.mark.slow
def test_two_processes_find_what_one_finds(tmp_path: Path) -> None:
    """With three objects in chunks of one, so that one process has more of them."""
    attack = GMVFool(2, popsize=9, iterations=4, eval_samples=5, chunk=1)
    trainer = trainer_with(tmp_path / "one", attack, ViewSphere(6, 5))
    trainer.test(Fixed(), TinyScenes(), verbose=False)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "tests.view_processes"]
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run([*command, str(tmp_path / "two")], cwd=root, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    figures = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("RESULT ")).removeprefix("RESULT "))
    same = {key: value.item() for key, value in trainer.callback_metrics.items() if "renders_per_second" not in key}
    assert {key: figures[key] for key in same} == pytest.approx(same)
    assert {"test/view_mean", "test/view_worst_bin"} <= same.keys() and same["test/view_mean"] > 0
    maps = [(tmp_path / name / "images" / "view_sphere.csv").read_text() for name in ("one", "two")]
    assert maps[0] == maps[1] and len(maps[0].splitlines()) == 31
    one, two = (tmp_path / name / "viewpoints" / "test_gmvfool" for name in ("one", "two"))
    assert (one / "views.csv").read_bytes() == (two / "views.csv").read_bytes()
    images = ViewImages(two)
    assert torch.equal(images.read(torch.arange(15), None)[0], ViewImages(one).read(torch.arange(15), None)[0])
