"""VIAT and its baselines on a toy whose images are the pose, and on a landscape with known bad regions."""

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
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from robust_pl.callbacks import AWP, EMA, GMVFool, RandomViews, ViewFool
from robust_pl.callbacks.attacks.draws import seed_from
from robust_pl.callbacks.viewpoints import problem as problem_module
from robust_pl.data import DigitsDataModule
from robust_pl.methods import VIAT, NaturalViewTraining, RandomViewTraining, RenderedViews, StandardTraining
from robust_pl.methods.viewpoint.objects_by_class import ObjectsByClass
from robust_pl.methods.viewpoint.pool import DistributionPool
from robust_pl.methods.viewpoint.render_cache import RenderCache
from robust_pl.nets import SmallCNN
from robust_pl.scenes import SceneSet, ViewSpace

from .view_landscape import FailsNear, PosePhoto, photos
from .view_training import BATCH, LABELS, RENDERS, SPACE, STEPS, Photos, fit, search, sgd, still, viat

BAD = torch.tensor([[20.0, 100.0, 60.0, 3.3, 0.3, 0.2], [-20.0, -100.0, 50.0, 4.7, -0.3, 0.3]])
PER_ITERATION = 2 + 6


def pool_of(method: VIAT) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in method.pool.named_buffers()}


class Pools(Callback):
    """The pool at the end of each epoch."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Tensor]] = []

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        self.seen.append(pool_of(pl_module))


class Examples(Callback):
    """What the loss saw of each batch."""

    def __init__(self, method: RenderedViews) -> None:
        self.seen: list[Any] = []
        craft = method.craft

        def kept(*arguments: Any) -> Any:
            self.seen.append(craft(*arguments))
            return self.seen[-1]

        method.craft = kept


# The pieces ----------------------------------------------------------------------------------------------------------


def test_objects_of_a_class_by_hand() -> None:
    members = ObjectsByClass(torch.tensor([5, 7, 5, 6, 5, 7]))
    assert members.classes == 3
    group = torch.tensor([0, 0, 0, 1, 2, 2])
    assert members.of_class(group, torch.tensor([0.0, 0.34, 0.99, 0.5, 0.49, 0.5])).tolist() == [0, 2, 4, 3, 1, 5]
    which = torch.tensor([0, 0, 2, 2, 4, 3, 1, 5])
    number = torch.tensor([0.0, 0.9, 0.0, 0.9, 0.0, 0.7, 0.2, 0.9])
    assert members.another(which, number).tolist() == [2, 4, 4, 0, 0, 3, 5, 1]


def test_draws_from_a_pool_by_hand() -> None:
    pool = DistributionPool()
    mean = torch.tensor([[[0.0, 0.0], [1.0, 2.0]], [[-1.0, -2.0], [3.0, 4.0]]])
    pool.begin(weights=torch.tensor([[0.25, 0.75], [1.0, 0.0]]), mean=mean, sigma=torch.full_like(mean, 0.5))
    numbers = torch.tensor([[0.2, 0.9], [0.3, 0.1], [0.99, 0.99]]).unsqueeze(1).repeat(1, 2, 1).double()
    numbers[:, 1] = torch.tensor([[0.5, 0.8413447], [0.5, 0.5], [0.1586553, 0.5]])
    u = pool.draw(torch.tensor([0, 0, 1]), numbers)
    torch.testing.assert_close(u, torch.tensor([[0.0, 0.5], [1.0, 2.0], [-1.5, -2.0]]))
    pool.begin(weights=pool.weights.unsqueeze(2).repeat(1, 1, 2))  # each coordinate chooses its own component
    u = pool.draw(torch.tensor([0, 0, 1]), numbers)
    torch.testing.assert_close(u, torch.tensor([[0.0, 2.5], [1.0, 0.0], [-1.5, -2.0]]))
    assert pool.draw(torch.tensor([0]), torch.zeros(1, 2, 2).double()).isfinite().all()


def test_draws_follow_the_mixture() -> None:
    pool = DistributionPool()
    pool.begin(weights=torch.tensor([[0.2, 0.8]]), mean=torch.tensor([[[-1.0], [1.0]]]), sigma=torch.tensor([[[0.1], [0.2]]]))
    numbers = torch.rand(20_000, 2, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u = pool.draw(torch.zeros(20_000, dtype=torch.int64), numbers).squeeze(1)
    near, far = u[u < 0], u[u > 0]
    assert len(near) / len(u) == pytest.approx(0.2, abs=0.01)
    assert near.mean().item() == pytest.approx(-1, abs=0.01) and near.std().item() == pytest.approx(0.1, abs=0.01)
    assert far.mean().item() == pytest.approx(1, abs=0.01) and far.std().item() == pytest.approx(0.2, abs=0.01)


def test_a_cache_renders_once_until_it_forgets() -> None:
    asked: list[int] = []

    def render(rows: Tensor) -> Tensor:
        asked.append(len(rows))
        return (rows.float().view(-1, 1, 1, 1) / 10 + 0.001).expand(-1, 3, 2, 2)

    cache = RenderCache(3, 2, (2, 2), torch.device("cpu"))
    which, number = torch.tensor([0, 2, 2]), torch.tensor([1, 0, 1])
    first, rendered = cache.images(which, number, render)
    assert rendered == 3 and first[:, 0, 0, 0].mul(255).tolist() == pytest.approx([0, 26, 51])
    again, rendered = cache.images(which.flip(0), number.flip(0), render)
    assert rendered == 0 and torch.equal(again, first.flip(0))
    cache.forget(torch.tensor([[False, False], [False, False], [False, True]]))
    assert cache.images(which, number, render)[1] == 1 and asked == [3, 1]


# The inner problem ---------------------------------------------------------------------------------------------------


def test_the_pool_is_what_the_search_finds_and_then_goes_on_from(tmp_path: Path) -> None:
    """Full search of all objects first, then one random object of each class from where it was; the others stay."""
    net, pools = FailsNear(BAD), Pools()
    method, data = viat(net, optimizer=still, search=search(seed=3), seed=11), Photos()
    fit(method, tmp_path, data, callbacks=[pools], max_epochs=4)
    scenes, attack = data.train_scenes, search()
    whole = attack(net, scenes, space=SPACE, eval_samples=0, seed=seed_from(11, 3, 0)).distribution
    for name, tensor in whole.tensors().items():
        assert torch.equal(pools.seen[0][name], tensor), name
    assert pools.seen[0]["epoch"].tolist() == [0.0] * 6
    chosen = []
    for epoch in (1, 2, 3):
        before, after = pools.seen[epoch - 1 : epoch + 1]
        rows = (after["epoch"] == epoch).nonzero().squeeze(1)
        assert sorted(LABELS[i] for i in rows) == [0, 1, 2]
        others = after["epoch"] != epoch
        for name in before:
            assert torch.equal(before[name][others], after[name][others])
        assert (before["mean"][rows] != after["mean"][rows]).any((1, 2)).all()
        ids = [scenes.ids[i] for i in rows]
        start = type(whole)(before["weights"], before["mean"], before["sigma"], SPACE, scenes.ids).of(ids)
        part = scenes.subset(rows.tolist())
        found = attack(net, part, space=SPACE, start=start, iterations=2, eval_samples=0, seed=seed_from(11, 3, epoch))
        assert torch.equal(found.distribution.mean, after["mean"][rows])
        assert torch.equal(found.distribution.sigma, after["sigma"][rows])
        chosen.append(tuple(rows.tolist()))
    assert len(set(chosen)) > 1


def test_the_distributions_lie_where_the_network_fails(tmp_path: Path) -> None:
    scenes = photos(3)
    method = viat(FailsNear(BAD), optimizer=still, search=GMVFool(3, popsize=41, iterations=40, space=SPACE), renders=60)
    examples = Examples(method)
    fit(method, tmp_path, Photos(scenes), max_epochs=1)
    seen = torch.cat([example.x[BATCH:] for example in examples.seen])
    uniform = RandomViews(space=SPACE)(FailsNear(BAD), scenes)
    loss = F.cross_entropy(method.net(seen), torch.zeros(len(seen), dtype=torch.int64))
    assert loss > uniform.loss.mean() + 1.5


def test_before_its_first_search_the_views_are_natural(tmp_path: Path) -> None:
    method, pools, data = viat(start_epoch=2), Pools(), Photos()
    natural = NaturalViewTraining(SmallCNN(3, 3, 2), renders=RENDERS, num_classes=3, optimizer=still)
    of_viat, of_natural = Examples(method), Examples(natural)
    fit(method, tmp_path, data, callbacks=[pools])
    fit(natural, tmp_path, data)
    assert pools.seen[1]["mean"].numel() == 0 and pools.seen[2]["epoch"].tolist() == [2.0] * 6
    same = [torch.equal(a.x, b.x) for a, b in zip(of_viat.seen, of_natural.seen, strict=True)]
    assert same == [True] * 2 * STEPS + [False] * STEPS


# A step --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [viat, NaturalViewTraining, RandomViewTraining], ids=lambda build: build.__name__)
def test_a_batch_holds_the_images_and_labelled_renders(build: Callable[..., RenderedViews], tmp_path: Path) -> None:
    net = SmallCNN(3, 3, 2)
    method = build(net, renders=400, optimizer=still, num_classes=3)
    seen: list[tuple[Tensor, Tensor]] = []
    render = method.render

    def noted(which: Tensor, keys: Tensor) -> Tensor:
        seen.append((which, method.sample_views(which, keys)))
        return render(which, keys)

    method.render = noted
    examples, data = Examples(method), Photos()
    fit(method, tmp_path, data, max_epochs=2)
    assert len(examples.seen) == len(seen) == 2 * STEPS
    for example, (which, view) in zip(examples.seen, seen, strict=True):
        assert example.x.shape == (BATCH + 400, 3, 2, 2) and example.x.min() >= 0 and example.x.max() <= 1
        assert (example.index[:BATCH] >= 0).all() and (example.index[BATCH:] == -1).all()
        assert torch.equal(example.y[BATCH:], torch.tensor(LABELS)[which])
        pixels = data.train_set.read(example.index[:BATCH], None)
        assert torch.equal(example.x[:BATCH], pixels[0]) and torch.equal(example.y[:BATCH], pixels[1])
        assert SPACE.contains(view).all()
        images = data.train_scenes.images(which, SPACE.to_matrix(view.float()))
        assert torch.equal(example.x[BATCH:], images)
        loss = F.cross_entropy(net.eval()(example.x), example.y)
        torch.testing.assert_close(method.loss(example), loss)
    which = torch.cat([which for which, _ in seen])
    share = torch.bincount(torch.tensor(LABELS)[which]) / len(which)
    torch.testing.assert_close(share, torch.full((3,), 1 / 3), atol=0.04, rtol=0)  # classes alike, however many objects
    of_first = torch.bincount(which, minlength=6)[[0, 2, 4]] / (torch.tensor(LABELS)[which] == 0).sum()
    torch.testing.assert_close(of_first, torch.full((3,), 1 / 3), atol=0.06, rtol=0)
    assert len(torch.cat([view for _, view in seen]).unique(dim=0)) == len(which)  # nothing is drawn twice


def test_natural_views_stand_upright_and_random_ones_fill_the_box(tmp_path: Path) -> None:
    keys, which = torch.arange(4000), torch.zeros(4000, dtype=torch.int64)
    natural = NaturalViewTraining(SmallCNN(3, 3, 2), (20, 40), space=SPACE)
    view = natural.sample_views(which, keys)
    assert (view[:, 0] == 0).all() and view[:, 2].min() >= 50 and view[:, 2].max() <= 70
    view = RandomViewTraining(SmallCNN(3, 3, 2), space=SPACE).sample_views(which, keys)
    for column, name in enumerate(("gamma", "theta", "phi", "r", "x", "y")):
        low, high = SPACE.ranges[name]
        share = (view[:, column] - low) / (high - low)
        assert share.min() >= 0 and share.max() <= 1
        assert share.mean().item() == pytest.approx(0.5, abs=0.02) and share.std().item() == pytest.approx(0.289, abs=0.01)


def test_distributions_are_shared_within_a_class(tmp_path: Path) -> None:
    keys, labels = torch.arange(6000), torch.tensor(LABELS)
    which = keys % 6
    for share, other in ((0.0, 0.0), (0.25, 0.25), (1.0, 1.0)):
        method = viat(share=share)
        method._members = ObjectsByClass(labels)
        giver = method.givers(which, keys)
        assert torch.equal(labels[giver], labels[which])
        foreign = (giver != which).float()
        assert (foreign[labels[which] == 1] == 0).all()  # its object is alone
        assert foreign[labels[which] != 1].mean().item() == pytest.approx(other, abs=0.03)
    of_first = torch.bincount(giver[which == 0], minlength=6) / 1000
    torch.testing.assert_close(of_first[[2, 4]], torch.tensor([0.5, 0.5]), atol=0.05, rtol=0)


def test_mixed_labels_and_backgrounds_from_a_bank(tmp_path: Path) -> None:
    class Clear(PosePhoto):
        def render(self, pose: Tensor) -> Any:
            return super().render(pose)._replace(rgb=torch.zeros(len(pose), 3, 2, 2), alpha=torch.zeros(len(pose), 1, 2, 2))

    bank = torch.linspace(0, 1, 9).view(9, 1, 1, 1).expand(9, 3, 2, 2)
    data = Photos(SceneSet([Clear() for _ in LABELS], LABELS, background=bank))
    method = viat(renders=200)
    examples = Examples(method)
    fit(method, tmp_path, data, max_epochs=1)
    grey = torch.cat([example.x[BATCH:, 0, 0, 0] for example in examples.seen])
    assert len(grey.unique()) == 9  # an object is not known by what is behind it
    x, y, index = next(iter(data.train_dataloader()))
    mixed = F.one_hot(y, 3) * 0.7 + 0.1
    example = method.craft((x, mixed, index))
    assert example.y.shape == (BATCH + 200, 3) and torch.equal(example.y[:BATCH], mixed)
    assert (example.y[BATCH:].sum(1) == 1).all() and example.y.dtype == torch.float32
    assert method.loss(example).isfinite()


def test_renders_may_pass_by_the_normalization(tmp_path: Path) -> None:
    """As in published code: the network's first layer then sees the pixels of a render themselves, and a batch normalised."""
    mean, std = torch.tensor([0.2, 0.4, 0.6]).view(3, 1, 1), torch.tensor([0.5, 0.25, 0.1]).view(3, 1, 1)
    seen: list[Tensor] = []
    for normal in (True, False):
        torch.manual_seed(0)
        net = SmallCNN(3, 3, 2, mean=mean.flatten().tolist(), std=std.flatten().tolist())
        method = RandomViewTraining(net, RENDERS, normalize_renders=normal, optimizer=still, num_classes=3)
        examples = Examples(method)
        fit(method, tmp_path, max_epochs=1)
        seen.append(net.normalize(examples.seen[0].x))
    whole, passed = seen
    torch.testing.assert_close(passed[:BATCH], whole[:BATCH])
    torch.testing.assert_close(passed[BATCH:], whole[BATCH:] * std + mean)
    with pytest.raises(ValueError, match="normalize_renders=False, and the network has no Normalize"):
        RandomViewTraining(FailsNear(BAD), normalize_renders=False)


def test_renders_and_passes_are_counted(tmp_path: Path) -> None:
    data, net = Photos(), SmallCNN(3, 3, 2)
    method, passes = viat(net), []
    net.register_forward_hook(lambda module, inputs, output: passes.append((len(inputs[0]), module.training)))
    trainer = fit(method, tmp_path, data, max_epochs=2)
    first, later = 6 * 3 * PER_ITERATION, 3 * 2 * PER_ITERATION
    assert sum(n for n, training in passes if training) == 2 * STEPS * (BATCH + RENDERS)
    rendered = sum(sum(renderer.calls) for renderer in data.train_scenes.renderers)
    assert rendered == first + later + 2 * STEPS * RENDERS + 2  # each search looks once before it begins
    figures = trainer.callback_metrics
    assert figures["train/renders"] == STEPS * RENDERS and figures["train/renders_per_second"] > 0
    assert figures["train/search_renders"] == later and figures["train/search_renders_per_second"] > 0
    assert figures["train/search_loss"] > 0
    published = viat(search=None)
    cost = published.search.components - 1 + published.search.popsize
    assert (cost * published.search.iterations, cost * 10) == (5750, 1150)  # as the docstring says


def test_a_fixed_number_of_views_is_rendered_once_and_anew_where_the_pool_moved(tmp_path: Path) -> None:
    for build in (NaturalViewTraining, viat):
        data = Photos()
        method = build(SmallCNN(3, 3, 2), renders=60, views_per_object=2, optimizer=still, num_classes=3)
        examples = Examples(method)
        fit(method, tmp_path / build.__name__, data, max_epochs=1)
        different = [len(torch.cat([e.x[BATCH:] for e in examples.seen[:n]]).unique(dim=0)) for n in (1, STEPS)]
        assert 6 <= different[0] <= different[1] == 12
        if build is NaturalViewTraining:
            assert sum(sum(renderer.calls) for renderer in data.train_scenes.renderers) < 12 + 60  # twice in the first batch
    method = viat(renders=300, views_per_object=2, optimizer=still, search=search(step_size=50.0))
    examples = Examples(method)
    fit(method, tmp_path / "again", data, max_epochs=2)
    before, after = ({tuple(x.flatten().tolist()) for x in examples.seen[i].x[BATCH:]} for i in (0, STEPS))
    which, view = torch.arange(6).unsqueeze(1), torch.arange(2)
    stale = method._stale((method.pool.epoch == 1).nonzero().squeeze(1))
    givers = method.givers(which.expand(6, 2), method.view_keys(which, view))
    assert torch.equal(stale, method.pool.epoch[givers] == 1) and 0 < stale.sum() < 12
    assert len(before) == 12 and len(after - before) == stale.sum()


# Composition and resuming --------------------------------------------------------------------------------------------


class KillAt(Callback):
    """Crashes at the end of a batch."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            raise Killed


class Killed(Exception):
    pass


def same(first: torch.nn.Module, second: torch.nn.Module) -> None:
    one, other = first.state_dict(), second.state_dict()
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


@pytest.mark.parametrize(
    ("views_per_object", "callbacks"),
    [(0, lambda: []), (2, lambda: []), (0, lambda: [AWP(0.01), EMA(0.9)])],
    ids=["new views", "kept views", "AWP+EMA"],
)
def test_a_run_killed_in_an_epoch_goes_on_bit_for_bit(
    views_per_object: int, callbacks: Callable[[], list[Callback]], tmp_path: Path
) -> None:
    whole = viat(views_per_object=views_per_object)
    fit(whole, tmp_path / "whole", callbacks=callbacks())
    begun = viat(views_per_object=views_per_object)
    kept = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1, save_on_train_epoch_end=False)
    with pytest.raises(Killed):
        fit(begun, tmp_path / "begun", callbacks=[*callbacks(), kept, KillAt(5)], enable_checkpointing=True)
    for step in (2, 3, 4):  # in the first epoch, at its end, in the second
        again = viat(views_per_object=views_per_object)
        fit(again, tmp_path / f"again{step}", callbacks=callbacks(), ckpt_path=tmp_path / f"step={step}.ckpt")
        same(whole, again)


@pytest.mark.parametrize("after", [5, 13], ids=["first search", "a later search"])
def test_a_run_killed_in_a_search_goes_on_bit_for_bit(after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = viat()
    fit(whole, tmp_path / "whole")
    looks, look = 0, problem_module.ViewProblem.look

    def fragile(self: Any, u: Tensor) -> Any:
        nonlocal looks
        looks += u.shape[1] > 0
        if looks == after:
            raise Killed
        return look(self, u)

    kept = ModelCheckpoint(tmp_path, "last", enable_version_counter=False, save_on_train_epoch_end=True)
    with monkeypatch.context() as patch:
        patch.setattr(problem_module.ViewProblem, "look", fragile)
        with pytest.raises(Killed):
            fit(viat(), tmp_path / "run", callbacks=[kept], enable_checkpointing=True)
        again = viat()
        fit(again, tmp_path / "run", ckpt_path=None if after == 5 else tmp_path / "last.ckpt")
    same(whole, again)
    assert looks - 1 == 3 * 3 + 2 * (2 * 2)  # nothing was searched twice: chunks of two objects, three and then two
    assert [path.name for path in (tmp_path / "run" / "viewpoints" / "pool").iterdir()] == ["epoch_0002"]


def test_a_search_of_other_weights_in_the_folder_is_not_mistaken(tmp_path: Path) -> None:
    fit(viat(seed=1), tmp_path, max_epochs=1)
    method, alone = viat(), viat()
    fit(method, tmp_path, max_epochs=1)
    assert [path.name for path in (tmp_path / "viewpoints" / "pool").iterdir()] == ["epoch_0000-2"]
    fit(alone, tmp_path / "alone", max_epochs=1)
    same(method, alone)


def test_accumulated_batches_have_views_of_their_own(tmp_path: Path) -> None:
    method, one = viat(optimizer=still), viat(optimizer=still)
    accumulated, plain = Examples(method), Examples(one)
    fit(method, tmp_path / "accumulated", accumulate_grad_batches=3, callbacks=[AWP(0.01)])
    fit(one, tmp_path / "plain")
    assert len(accumulated.seen) == 3 * STEPS
    for i, (a, b) in enumerate(zip(accumulated.seen, plain.seen, strict=True)):
        assert torch.equal(a.x[:BATCH], b.x[:BATCH])
        assert i >= STEPS or torch.equal(a.x, b.x)  # BatchNorm's statistics have seen other weights since
    assert len({tuple(e.x[BATCH].flatten().tolist()) for e in accumulated.seen}) == 3 * STEPS


def test_a_step_of_an_accumulated_window_is_that_of_all_its_samples(tmp_path: Path) -> None:
    net = lambda: torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3))  # noqa: E731
    method = viat(net())
    examples = Examples(method)
    before = [p.detach().clone() for p in method.net.parameters()]
    fit(method, tmp_path, accumulate_grad_batches=STEPS, max_epochs=1)
    moved = [a - b for a, b in zip(before, method.net.parameters(), strict=True)]
    method.load_state_dict({f"net.1.{k}": v for k, v in zip(("weight", "bias"), before, strict=True)}, strict=False)
    loss = torch.stack([method.loss(example) for example in examples.seen]).mean()
    for difference, gradient in zip(moved, torch.autograd.grad(loss, list(method.net.parameters())), strict=True):
        torch.testing.assert_close(difference, 0.1 * gradient)


@pytest.mark.slow
def test_two_processes_share_the_objects_and_hold_one_pool(tmp_path: Path) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    root = Path(__file__).parent.parent
    done = subprocess.run(
        [*launch, "-m", "tests.viat_processes", str(tmp_path)], cwd=root, capture_output=True, text=True, timeout=300
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert done.returncode == 0 and lines, done.stderr[-3000:]
    found = json.loads(lines[0].removeprefix("RESULT "))
    assert found["differ"] == [[], []]
    steps, looks, iteration = 3 * STEPS * 2, 3, PER_ITERATION
    first, second = 2 * 2 * 3 * iteration + 2 * 2 * 2 * iteration, 2 * 3 * iteration + 2 * 2 * iteration
    assert sum(found["renders"]) == first + second + 2 * (steps + looks)
    assert found["renders"][0] - found["renders"][1] == first - second  # of three chunks, and then of two
    pool = torch.load(tmp_path / "pool.pt", weights_only=True)
    assert pool["pool.mean"].shape == (6, 2, 6) and pool["pool.epoch"].max() == 2


def test_the_run_is_a_function_of_its_seed(tmp_path: Path) -> None:
    first, again, other = (viat(seed=seed) for seed in (None, 0, 1))
    for i, method in enumerate((first, again, other)):
        fit(method, tmp_path / str(i), max_epochs=1)
    same(first, again)  # None takes that of the data module, 0
    assert not torch.equal(first.pool.mean, other.pool.mean)


def test_a_checkpoint_is_read_without_the_data(tmp_path: Path) -> None:
    method = viat()
    trainer = fit(method, tmp_path, max_epochs=1)
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    loaded = VIAT.load_from_checkpoint(tmp_path / "end.ckpt", net=SmallCNN(3, 3, 2), search=search(), num_classes=3)
    same(method, loaded)


# Bad input -----------------------------------------------------------------------------------------------------------


def refuse(match: str, kind: type[Exception], run: Callable[[], Any]) -> None:
    with pytest.raises(kind, match=match) as caught:
        run()
    assert "\n" not in str(caught.value)


def test_bad_arguments_are_named() -> None:
    net = SmallCNN(3, 3, 2)
    refuse("renders=0 must be at least 1", ValueError, lambda: VIAT(net, renders=0))
    refuse("renders=-1 must be at least 1", ValueError, lambda: NaturalViewTraining(net, renders=-1))
    refuse("views_per_object=-1", ValueError, lambda: RandomViewTraining(net, views_per_object=-1))
    refuse("components", ValueError, lambda: VIAT(net, GMVFool(0)))
    refuse("search is a RandomViews", TypeError, lambda: VIAT(net, RandomViews()))
    refuse("targeted", ValueError, lambda: VIAT(net, ViewFool(targeted=True)))
    refuse("share=1.5", ValueError, lambda: VIAT(net, share=1.5))
    refuse("warm_iterations", ValueError, lambda: VIAT(net, warm_iterations=0))
    refuse("start_epoch=-1", ValueError, lambda: VIAT(net, start_epoch=-1))
    refuse(r"elevation=\(50, 10\)", ValueError, lambda: NaturalViewTraining(net, (50, 10)))


def test_bad_data_are_named_before_any_work(tmp_path: Path) -> None:
    refuse("DigitsDataModule offers no train_scenes", ValueError, lambda: fit(viat(), tmp_path, DigitsDataModule()))
    inside = Photos(photos(2, radius=3.5))
    refuse("r begins at 3 and the object 'thing/0' reaches 3.5", ValueError, lambda: fit(viat(), tmp_path, inside))
    wide = viat(search=search(space=ViewSpace(r=(0.5, 5))))
    refuse("r begins at 0.5 and the object", ValueError, lambda: fit(wide, tmp_path))
    foreign = Photos(SceneSet([PosePhoto(), PosePhoto()], [0, 3]))
    refuse("the object '1' has the label 3", ValueError, lambda: fit(viat(), tmp_path, foreign))
    large = PosePhoto()
    large.image_size = (4, 4)
    refuse(r"train_scenes give images \(3, 4, 4\)", ValueError, lambda: fit(viat(), tmp_path, Photos(SceneSet([large], [0]))))


def test_a_checkpoint_of_other_objects_or_another_space_is_refused(tmp_path: Path) -> None:
    trainer = fit(viat(), tmp_path, max_epochs=1)
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    resume = {"folder": tmp_path, "ckpt_path": tmp_path / "end.ckpt"}
    others = Photos(SceneSet([PosePhoto() for _ in LABELS], LABELS))
    refuse("other objects than", ValueError, lambda: fit(viat(), data=others, **resume))
    narrow = viat(search=search(space=ViewSpace(phi=(0, 70))))
    refuse("other viewpoints than", ValueError, lambda: fit(narrow, **resume))
    other_k = VIAT(SmallCNN(3, 3, 2), GMVFool(3, popsize=7, iterations=2), 5, num_classes=3, optimizer=sgd)
    refuse("components=2 .* and the attack 3", ValueError, lambda: fit(other_k, **resume))
    standard = StandardTraining(SmallCNN(3, 3, 2), optimizer=sgd, num_classes=3)
    refuse("another network", ValueError, lambda: fit(standard, **resume))
