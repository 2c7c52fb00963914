"""PubDef: its weights by pencil, who attacks whom, and sources that stay as they are and out of everything."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn

from robust_pl.callbacks import FGSM, PGD
from robust_pl.methods import PubDef
from robust_pl.methods.adversarial.pub_def import TransferredExample
from robust_pl.nets import SmallCNN

from .test_methods import QUIET, Counted, loader, sgd
from .test_resume import assert_same_weights


class Passed(nn.Module):
    """Two classes; the logits of an image are (v, 0) with v its first pixel: CE of class 0 is log(1 + exp(-v))."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        v = self.scale * x[:, 0, 0, 0]
        return torch.stack([v, torch.zeros_like(v)], 1)


def ce(v: float) -> float:
    return math.log(1 + math.exp(-v))


def images(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).view(-1, 1, 1, 1)


def method(sampler: str, pi: dict[str, float] | None = None, **more: Any) -> PubDef:
    return PubDef(Passed(), {"a": Passed(), "b": Passed()}, FGSM(0.1), sampler, pi=pi, optimizer=sgd, num_classes=2, **more)


def example(x: Tensor, transferred: Tensor, source: list[list[int]]) -> TransferredExample:
    zeros = torch.zeros(len(x), dtype=torch.int64)
    return TransferredExample(x, zeros, zeros, transferred[:, 0], transferred, torch.tensor(source))


PI = {"clean": 4.0, "a": 1.0, "b": 3.0}  # of 8


def test_all_sources_by_pencil() -> None:
    seen = example(images(0.9, 0.8), torch.stack([images(0.1, 0.2), images(0.3, 0.4)], 1), [[0, 1], [0, 1]])
    clean, a, b = (sum(map(ce, pair)) / 2 for pair in ((0.9, 0.8), (0.1, 0.2), (0.3, 0.4)))
    assert method("all").loss(seen).item() == pytest.approx((clean + a + b) / 3, abs=1e-7)
    assert method("all", PI).loss(seen).item() == pytest.approx(0.5 * clean + 0.125 * a + 0.375 * b, abs=1e-12)


def test_top_k_by_pencil() -> None:
    """The loss from source a is higher; it then has the share of both."""
    seen = example(images(0.9, 0.8), torch.stack([images(0.1, 0.2), images(0.3, 0.4)], 1), [[0, 1], [0, 1]])
    clean, a, b = (sum(map(ce, pair)) / 2 for pair in ((0.9, 0.8), (0.1, 0.2), (0.3, 0.4)))
    assert method("top_k", PI, top_k=1).loss(seen).item() == pytest.approx(0.5 * clean + 0.5 * a, abs=1e-12)
    both = method("top_k", PI, top_k=2).loss(seen)
    assert both.item() == pytest.approx(0.5 * clean + 0.125 * a + 0.375 * b, abs=1e-12)


def test_random_by_pencil() -> None:
    """Three samples: two from a, one from b. Shares 1 : 3 of one half, each divided among what is there."""
    seen = example(images(0.9, 0.8, 0.7), images(0.1, 0.2, 0.3).unsqueeze(1), [[0], [0], [1]])
    clean = (ce(0.9) + ce(0.8) + ce(0.7)) / 3
    adversarial = (ce(0.1) + ce(0.2) + 3 * ce(0.3)) / 5
    assert method("random", PI).loss(seen).item() == pytest.approx(0.5 * clean + 0.5 * adversarial, abs=1e-12)


def nets(count: int) -> dict[str, SmallCNN]:
    torch.manual_seed(1)
    return {f"s{i}": SmallCNN(width=2) for i in range(count)}


def test_each_sample_is_attacked_on_the_source_that_it_names() -> None:
    torch.manual_seed(0)
    sources = nets(3)
    x, y = next(iter(loader()))
    for sampler, columns in (("random", 1), ("all", 3)):
        defence = PubDef(SmallCNN(width=4), sources, FGSM(0.1), sampler)
        found = defence.craft((x, y, torch.arange(8)))
        assert found.transferred.shape == (8, columns, 1, 8, 8) and found.source.shape == (8, columns)
        for i, source in enumerate(sources.values()):
            wanted = FGSM(0.1)(source, x, y)
            rows, at = (found.source == i).nonzero(as_tuple=True)
            assert len(rows) >= 2 and torch.equal(found.transferred[rows, at], wanted[rows])
        assert torch.equal(found.x_adv, found.transferred[:, 0]) and torch.equal(found.x, x)


def test_sources_rotate_so_that_none_is_left_out() -> None:
    class Small(PubDef):
        step = 0
        global_step = property(lambda self: self.step)  # type: ignore[assignment]

    defence = Small(SmallCNN(width=4), nets(3), FGSM(0.1))
    x, y = next(iter(loader(2, 2)))
    met = []
    for step in range(3):
        defence.step = step
        met.append(defence.craft((x, y)).source.flatten().tolist())
    assert met == [[0, 1], [1, 2], [2, 0]]


def test_a_radius_for_each_sample_goes_with_it() -> None:
    x, y = next(iter(loader()))
    eps = torch.linspace(0, 0.1, 8).view(-1, 1, 1, 1)
    for sampler in ("random", "all"):
        found = PubDef(SmallCNN(width=4), nets(2), FGSM(0.1), sampler).craft((x, y), eps)
        assert ((found.transferred - x.unsqueeze(1)).abs().amax((2, 3, 4)) <= eps.flatten(1) + 1e-6).all()
        assert torch.equal(found.transferred[0, 0], x[0]) and not torch.equal(found.transferred[7, 0], x[7])


@pytest.mark.parametrize(("sampler", "times"), [("random", 1), ("all", 3), ("top_k", 3)])
def test_a_step_costs_what_the_docstring_says(sampler: str, times: int) -> None:
    net, counted = Counted(), []
    net.register_forward_hook(lambda module, inputs, _: counted.append(len(inputs[0])))
    defence = PubDef(net, nets(3), PGD(steps=10), sampler, optimizer=sgd)
    defence._checked = {True, False}
    Trainer(max_steps=3, limit_val_batches=0, **QUIET).fit(defence, loader())
    assert net.forwards == net.for_training == 3 and sum(counted) == 24 * (1 + times)
    assert (defence.attack.forwards, defence.attack.backwards) == (24 * 10 * times, 24 * 10 * times)


def test_sources_stay_as_they_are_and_out_of_checkpoint_and_optimizer(tmp_path: Path) -> None:
    sources = nets(2)
    before = {name: {k: v.clone() for k, v in source.state_dict().items()} for name, source in sources.items()}
    defence = PubDef(SmallCNN(width=4), sources, PGD(steps=2), optimizer=sgd)
    trainer = Trainer(max_epochs=2, limit_val_batches=0, **QUIET)
    trainer.fit(defence, loader())
    for name, source in sources.items():
        assert not source.training and all(torch.equal(v, before[name][k]) for k, v in source.state_dict().items())
        assert all(p.grad is None for p in source.parameters())
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    saved = torch.load(tmp_path / "x.ckpt", weights_only=True)
    assert all(name.startswith("net.") for name in saved["state_dict"])
    optimized = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert optimized == {id(p) for p in defence.net.parameters()}


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["random", "top_k"])
def test_resumed_equals_uninterrupted(robust_pl: Callable[..., None], tiny: Path, sampler: str) -> None:
    robust_pl("fit", "-c", tiny, "--model", "StandardTraining", "--trainer.max_epochs", 1, "--run.name", "source")
    text = tiny.read_text().replace("PGDAT", "PubDef", 1)
    source = "{class_path: TrainedNet, init_args: {source: runs/source}}"
    text = text.replace("    net:", f"    sampler: {sampler}\n    sources: {{a: {source}, b: {source}}}\n    net:", 1)
    tiny.write_text(text)
    common = ("fit", "-c", tiny)
    robust_pl(*common, "--run.name", "whole")
    robust_pl(*common, "--run.name", "stopped", "--trainer.callbacks+=tests.stopper.StopAfterEpoch")
    robust_pl(*common, "--ckpt_path", "runs/stopped/checkpoints/last.ckpt")
    assert_same_weights(*(Path("runs", name, "checkpoints", "last.ckpt") for name in ("whole", "stopped")))


@pytest.mark.parametrize("missing", ["runs/nowhere", "runs/nowhere/checkpoints/best.ckpt"])
def test_a_missing_source_is_one_line(robust_pl: Callable[..., None], tiny: Path, capsys: Any, missing: str) -> None:
    source = f"{{class_path: TrainedNet, init_args: {{source: {missing}}}}}"
    text = tiny.read_text().replace("PGDAT", "PubDef", 1)
    tiny.write_text(text.replace("    net:", f"    sources: {{a: {source}}}\n    net:", 1))
    with pytest.raises(SystemExit):
        robust_pl("fit", "-c", tiny)
    error = capsys.readouterr().err
    assert f"no file of weights at {missing}" in error and error.strip().count("\n") == 0


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: PubDef(SmallCNN(), {}), "at least one network"),
        (lambda: PubDef(SmallCNN(), {"clean": SmallCNN()}), "none 'clean'"),
        (lambda: PubDef(SmallCNN(), nets(2), sampler="worst"), "sampler='worst'"),
        (lambda: PubDef(SmallCNN(), nets(2), sampler="top_k", top_k=3), "top_k=3"),
        (lambda: PubDef(SmallCNN(), nets(2), pi={"clean": 1, "s0": 1}), "one for each of clean, s0, s1"),
        (lambda: PubDef(SmallCNN(), nets(1), pi={"clean": 1, "s0": -1}), "no negative weight"),
        (lambda: PubDef(SmallCNN(), nets(1), pi={"clean": 1, "s0": 0}), "positive one for some source"),
    ],
)
def test_complaints(build: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
    net = SmallCNN()
    with pytest.raises(ValueError, match="network under training"):
        PubDef(net, {"a": net})


def test_a_source_of_other_classes_is_refused() -> None:
    defence = PubDef(SmallCNN(width=4), {"a": SmallCNN(width=2), "b": SmallCNN(7, width=2)}, PGD(steps=1), optimizer=sgd)
    with pytest.raises(ValueError, match=r"the source 'b' returns logits of shape \(2, 7\) .* 10 classes"):
        Trainer(max_epochs=1, limit_val_batches=0, **QUIET).fit(defence, loader())
