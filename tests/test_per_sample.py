"""What is kept of each training sample: read and written, in checkpoints, and over one process or two."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from robust_pl import load_model
from robust_pl.callbacks import FGSM
from robust_pl.callbacks.checkpoints import SIDE_FILES, SIDE_FOLDER, BestCheckpoint, LastCheckpoint
from robust_pl.data import DigitsDataModule
from robust_pl.methods import FGSMAT, FGSMPCO, FGSMPGI
from robust_pl.methods.per_sample import PerSample
from robust_pl.nets import SmallCNN

from .test_methods import QUIET, sgd
from .test_started import indexed

EPS, SHAPE = 0.1, (1, 4, 4)
CONFIG = """
model:
  class_path: FGSMPGI
  init_args:
    net:
      class_path: SmallCNN
      init_args: {width: 2}
    attack:
      class_path: FGSM
      init_args: {eps: 0.1, bn_mode: train}
    optimizer:
      class_path: torch.optim.SGD
      init_args: {lr: 0.05, momentum: 0.9}
data:
  class_path: DigitsDataModule
  init_args:
    batch_size: 256
attacks:
  fgsm:
    class_path: FGSM
    init_args: {eps: 0.1}
trainer:
  max_epochs: 2
  logger: false
  enable_progress_bar: false
  enable_model_summary: false
"""


def memory(samples: int = 9, storage: Any = "float32") -> PerSample:
    found = PerSample(("a", "b"), storage)
    found.reserve(samples, SHAPE, torch.device("cpu"))
    return found


def everything(method: Any) -> tuple[Tensor, Tensor]:
    """What is kept of all samples of the training set, read in batches."""
    kept = method.per_sample
    parts = [kept.read(index) for index in torch.arange(kept._samples).split(kept._batch)]
    return torch.cat([values for values, _ in parts]), torch.cat([epochs for _, epochs in parts])


class StopAt(Callback):
    """Save after so many steps, and beside it what is kept, and stop."""

    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)
            kept = everything(pl_module)
            if trainer.is_global_zero:
                torch.save(kept, self.path.with_suffix(".kept"))
            trainer.should_stop = True


class Look(Callback):
    """What is kept before the first step."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> int:
        self.found = everything(pl_module)
        trainer.should_stop = True
        return -1

    def is_what(self, path: Path) -> bool:
        """Whether a file says the same."""
        expected = torch.load(path, weights_only=True)
        return expected[0].abs().max() > 0 and all(torch.equal(a, b) for a, b in zip(self.found, expected, strict=True))


def fit(
    root: Path,
    callbacks: list[Callback] | None = None,
    seed: int = 0,
    ckpt_path: Path | None = None,
    batch_size: int = 200,
    kind: Any = FGSMPGI,
    data: Any = None,
    **more: Any,
) -> Any:
    torch.manual_seed(seed)
    method = kind(SmallCNN(width=2), FGSM(EPS, bn_mode="train"), optimizer=sgd)
    settings = {**QUIET, "max_epochs": 3, "limit_val_batches": 0, "default_root_dir": root, "devices": 1, **more}
    trainer = Trainer(callbacks=callbacks or [], **settings)
    data = data or DigitsDataModule(batch_size=batch_size, drop_last=False)
    trainer.fit(method, data, ckpt_path=ckpt_path, weights_only=None if ckpt_path is None else True)
    return method


# In a step -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", ["float32", "bfloat16"])
def test_what_is_written_is_read(storage: Any) -> None:
    kept, values = memory(storage=storage), torch.rand(3, 2, *SHAPE)
    found, epochs = kept.read(torch.arange(9))
    assert not found.any() and (epochs == -1).all() and found.dtype == torch.float32
    kept.write(torch.tensor([4, 0, 8]), values, 5)
    kept.write(torch.tensor([4]), values[2:], 6)
    found, epochs = kept.read(torch.tensor([8, 4, 1, 0]))
    expected = torch.stack([values[2], values[2], torch.zeros(2, *SHAPE), values[1]])
    assert torch.equal(found, expected.to(kept.dtype).float()) and epochs.tolist() == [5, 6, -1, 5]
    assert kept._rows.element_size() == (4 if storage == "float32" else 2) and len(kept._rows) == 10


def test_of_a_sample_that_occurs_twice_the_last_counts() -> None:
    kept, values = memory(), torch.rand(4, 2, *SHAPE)
    kept.write(torch.tensor([3, 1, 3, 3]), values, 0)
    found, _ = kept.read(torch.tensor([3, 1]))
    assert torch.equal(found, values[[3, 1]])


def test_what_is_read_is_a_copy() -> None:
    kept = memory()
    kept.read(torch.tensor([2]))[0].fill_(1.0)
    assert not kept.read(torch.tensor([2]))[0].any()


@pytest.mark.parametrize("wrong", [9, -1])
def test_indices_of_no_sample(wrong: int) -> None:
    kept = memory()
    with pytest.raises(ValueError, match="indices outside of 0 to 8, and have no other samples: yield"):
        kept.read(torch.tensor([0, wrong]))
    kept.raise_if_stray()  # said once


def test_writing_asks_for_no_index_of_no_sample() -> None:
    """On a GPU nobody waits for the complaint, so that until the end of the epoch strays go where nobody reads."""
    kept = memory()
    kept.write(torch.tensor([9, 2, -1]), torch.ones(3, 2, *SHAPE), 0)
    found, epochs = kept.read(torch.arange(9))
    assert found.sum() == 32 and (epochs == 0).tolist() == [i == 2 for i in range(9)]


def test_an_unknown_storage() -> None:
    with pytest.raises(ValueError, match="storage='float16' is unknown: choose one of float32, bfloat16"):
        PerSample(("a",), "float16")  # type: ignore[arg-type]


# Around a run --------------------------------------------------------------------------------------------------------


def test_its_memory_is_stated(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        fit(tmp_path, max_epochs=1)
    # 1437 samples and one row of 2 * 64 float32
    assert "FGSMPGI keeps perturbation and momentum of 1,437 samples: 0.7 MiB on cpu of each process" in caplog.text


def test_all_of_a_users_own_indexed_batches() -> None:
    method = FGSMPGI(SmallCNN(width=2), FGSM(EPS, bn_mode="train"), optimizer=sgd)
    Trainer(max_epochs=2, limit_val_batches=0, accumulate_grad_batches=2, **QUIET).fit(method, indexed(28))
    kept, epochs = method.per_sample.read(torch.arange(28))
    assert (epochs == 1).all() and (kept[:, 0].abs().flatten(1).amax(1) > 0).all() and method.per_sample._samples == 28


def test_batches_of_unknown_length() -> None:
    class Endless(IterableDataset):
        def __iter__(self) -> Any:
            return iter(indexed(8).dataset)

    method = FGSMPGI(SmallCNN(width=2), FGSM(EPS, bn_mode="train"), optimizer=sgd)
    with pytest.raises(ValueError, match="FGSMPGI keeps something of every training sample and must know how many"):
        Trainer(max_epochs=1, limit_val_batches=0, **QUIET).fit(method, DataLoader(Endless(), 4))


def test_a_run_with_recomputed_statistics_keeps_what_it_would_without() -> None:
    """They ask for examples of training batches, which are no steps."""
    from robust_pl.callbacks import EMA

    found = []
    for buffers in ("copy", "method"):
        torch.manual_seed(0)
        method = FGSMPGI(SmallCNN(width=2), FGSM(EPS, bn_mode="train"), optimizer=sgd)
        ema = EMA(0.9, buffers=buffers, batches=2)
        Trainer(max_epochs=2, num_sanity_val_steps=0, callbacks=[ema], **QUIET).fit(method, indexed(), indexed())
        found.append((*method.per_sample.read(torch.arange(32)), *method.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("stop", [7, 11])
def test_resumed_equals_uninterrupted(stop: int, tmp_path: Path) -> None:
    """After an epoch of 7 steps, and in the middle of the second."""
    whole = fit(tmp_path)
    fit(tmp_path, [StopAt(stop, tmp_path / "stopped.ckpt")])
    resumed = fit(tmp_path, seed=1, ckpt_path=tmp_path / "stopped.ckpt")
    assert all(torch.equal(a, b) for a, b in zip(everything(whole), everything(resumed), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_the_second_epoch_depends_on_what_the_first_kept(tmp_path: Path) -> None:
    """Else the tests of resuming would show nothing."""
    whole = fit(tmp_path)
    fit(tmp_path, [StopAt(7, tmp_path / "stopped.ckpt")])

    class Forgetful(FGSMPGI):
        def on_train_start(self) -> None:
            super().on_train_start()
            self.per_sample._epochs.fill_(-1)

    resumed = fit(tmp_path, ckpt_path=tmp_path / "stopped.ckpt", kind=Forgetful)
    assert not all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_a_loaded_method_may_be_fitted_to_other_data(tmp_path: Path) -> None:
    fit(tmp_path, [StopAt(7, tmp_path / "stopped.ckpt")])
    method = FGSMPGI(SmallCNN(width=2), FGSM(EPS, bn_mode="train"), optimizer=sgd)
    method.on_load_checkpoint(torch.load(tmp_path / "stopped.ckpt", weights_only=True))
    Trainer(max_epochs=1, limit_val_batches=0, **QUIET).fit(method, indexed())
    assert method.per_sample._samples == 32


def files(root: Path) -> set[str]:
    return {path.name for path in (root / SIDE_FOLDER).iterdir()}


def named(path: Path) -> set[str]:
    return set(torch.load(path, weights_only=True)[SIDE_FILES])


def test_files_go_with_the_checkpoint_that_they_belong_to(tmp_path: Path) -> None:
    """Those of best.ckpt and last.ckpt alone stay, and those of a checkpoint saved by hand, though at the same step."""
    folder, by_hand = tmp_path / "checkpoints", tmp_path / "elsewhere" / "mine.ckpt"

    class ByHand(Callback):
        def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            if trainer.current_epoch == 1:
                trainer.save_checkpoint(by_hand)
            pl_module.log("score", {0: 0.1, 1: 0.3, 2: 0.2}[trainer.current_epoch])

    callbacks = [ByHand(), BestCheckpoint(folder, "score"), LastCheckpoint(folder)]
    fit(tmp_path, callbacks, enable_checkpointing=True)
    found = [named(folder / "best.ckpt"), named(folder / "last.ckpt"), named(by_hand)]
    assert [len(names) for names in found] == [1, 1, 1] and files(tmp_path) == set().union(*found) and len(files(tmp_path)) == 3
    look = Look()
    fit(tmp_path, [look], ckpt_path=by_hand)
    assert (look.found[1] == 1).sum() == 1293 and (look.found[1] == -1).sum() == 144  # of validation


def test_checkpoints_of_one_step_share_what_lies_on_the_disk(tmp_path: Path) -> None:
    class Twice(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            if trainer.global_step in (2, 3):
                for name in ("a", "b"):
                    trainer.save_checkpoint(tmp_path / f"{name}{trainer.global_step}.ckpt")

    fit(tmp_path, [Twice()], max_epochs=1)
    nodes = [
        (tmp_path / SIDE_FOLDER / name).stat().st_ino
        for k in ("a2", "b2", "a3", "b3")
        for name in named(tmp_path / f"{k}.ckpt")
    ]
    assert nodes[0] == nodes[1] != nodes[2] == nodes[3] and len(files(tmp_path)) == 4
    (tmp_path / SIDE_FOLDER / named(tmp_path / "a2.ckpt").pop()).unlink()
    fit(tmp_path, [look := Look()], ckpt_path=tmp_path / "b2.ckpt")
    assert (look.found[1] == 0).sum() == 400


def test_an_unreadable_checkpoint_keeps_all_files_and_ends_no_run(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    (folder / "other.ckpt").write_bytes(b"half")
    (folder / "last.ckpt").write_bytes(b"half")
    fit(tmp_path, [LastCheckpoint(folder)], enable_checkpointing=True)
    assert len(files(tmp_path)) == 3 and named(folder / "last.ckpt") < files(tmp_path)


def test_a_method_without_them_has_no_files(tmp_path: Path) -> None:
    fit(tmp_path, [LastCheckpoint(tmp_path / "checkpoints")], kind=FGSMAT, enable_checkpointing=True)
    assert not (tmp_path / SIDE_FOLDER).exists()


def test_nothing_half_written_is_left_where_the_disk_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors import SafetensorError

    def full(tensors: Any, path: Path, meta: Any) -> None:
        path.write_bytes(b"half")
        raise SafetensorError("Error while serializing: I/O error: No space left on device")

    monkeypatch.setattr("robust_pl.methods.per_sample.save_file", full)
    with pytest.raises(OSError, match=r"could not be written: .* No space left"):
        fit(tmp_path, [StopAt(1, tmp_path / "x.ckpt")])
    assert not files(tmp_path) and not (tmp_path / "x.ckpt").exists()


# On the command line -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which a run of two epochs lies."""
    from robust_pl.cli import main

    folder = tmp_path_factory.mktemp("per_sample")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["robust-pl"])
        patch.setattr(sys, "path", list(sys.path))
        Path("pgi.yaml").write_text(CONFIG)
        main(["fit", "-c", "pgi.yaml"])
    return folder


@pytest.fixture
def run(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of that run's folder."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return Path("runs/pgi")


def test_a_run_goes_on_and_replaces_its_files(run: Path, robust_pl: Callable[..., None]) -> None:
    before = files(run)
    assert len(before) in (1, 2)
    robust_pl("fit", "--ckpt_path", run / "checkpoints/last.ckpt", "--trainer.max_epochs", "4")
    checkpoints = run / "checkpoints"
    assert files(run) == named(checkpoints / "best.ckpt") | named(checkpoints / "last.ckpt")
    assert not named(checkpoints / "last.ckpt") & before


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-100] ^= 64
    path.write_bytes(content)


def each(run: Path, change: Callable[[Path], Any]) -> None:
    for path in (run / SIDE_FOLDER).iterdir():
        change(path)


RESUME = ("fit", "--ckpt_path", "runs/pgi/checkpoints/last.ckpt", "--trainer.max_epochs", "4")


@pytest.mark.parametrize(
    ("change", "more", "message"),
    [
        (lambda run: shutil.rmtree(run / SIDE_FOLDER), (), "the checkpoint needs side_files/"),
        (lambda run: each(run, lambda p: p.write_bytes(p.read_bytes()[:-1000])), (), "is damaged ("),
        (lambda run: each(run, flip), (), "is not what was written"),
        (lambda run: each(run, lambda p: p.write_bytes(b"")), (), "is damaged ("),
        (
            lambda run: None,
            ("--data.init_args.val_size", "100", "--data.init_args.drop_last", "false"),
            "training set",
        ),
        (
            lambda run: None,
            ("--model", "FGSMPCO", "--model.init_args.attack.init_args.eps", "0.1"),
            "keeps momentum, perturbation",
        ),
    ],
    ids=["missing", "cut off", "a bit flipped", "empty", "another split", "another method"],
)
def test_what_a_run_cannot_go_on_from_is_said_in_one_line(
    run: Path,
    robust_pl: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
    change: Callable[[Path], Any],
    more: tuple[str, ...],
    message: str,
) -> None:
    change(run)
    before = (run / "checkpoints/last.ckpt").read_bytes()
    with pytest.raises(SystemExit) as ended:
        robust_pl(*RESUME, *more)
    said = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert ended.value.code == 2 and len(said) == 1 and message in said[0], said
    assert (run / "checkpoints/last.ckpt").read_bytes() == before


class Others(DigitsDataModule):
    """Digits of other pixels."""

    def load_train(self) -> Any:
        images = super().load_train()
        images.images = images.images.flip(-1)
        return images


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"data": DigitsDataModule(batch_size=200, drop_last=False, seed=1)}, r"split \w{8} and not \w{8}"),
        ({"data": DigitsDataModule(batch_size=200, drop_last=False, val_split="last", val_size=0.5)}, r"split \w{8} and not"),
        ({"data": Others(batch_size=200, drop_last=False)}, r"\(data DigitsDataModule and not Others, pixels \w{8} and not"),
        ({"kind": FGSMPCO}, "keeps momentum, perturbation of each sample and FGSMPCO perturbation: resume the method it is of"),
    ],
    ids=["seed", "split", "data", "method"],
)
def test_files_of_another_run(more: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DigitsDataModule, "load_state_dict", lambda self, state: None)  # which says so before
    fit(tmp_path, [StopAt(7, tmp_path / "stopped.ckpt")])
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, ckpt_path=tmp_path / "stopped.ckpt", **more)


def test_a_checkpoint_of_a_method_that_keeps_nothing(tmp_path: Path) -> None:
    fit(tmp_path, [StopAfter(7, tmp_path / "stopped.ckpt")], kind=FGSMAT)
    with pytest.raises(ValueError, match="names no files of what FGSMPGI keeps of each sample: it is of another method"):
        fit(tmp_path, ckpt_path=tmp_path / "stopped.ckpt")


class StopAfter(StopAt):
    """Of a method that keeps nothing."""

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)
            trainer.should_stop = True


def test_testing_and_loading_need_no_files(run: Path, robust_pl: Callable[..., None]) -> None:
    shutil.rmtree(run / SIDE_FOLDER)
    robust_pl("test", "--ckpt_path", run / "checkpoints/best.ckpt")
    assert load_model(run / "checkpoints/best.ckpt") is not None
    assert not (run / SIDE_FOLDER).exists()


def test_files_are_found_beside_a_moved_checkpoint(run: Path, robust_pl: Callable[..., None]) -> None:
    run.rename("moved")
    robust_pl("fit", "--ckpt_path", "moved/checkpoints/last.ckpt", "--trainer.max_epochs", "3", "--run.name", "new")
    assert files(Path("runs/new"))


# On two processes ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_on_two_processes(tmp_path: Path) -> None:
    """Each holds half, whoever reads; batches may differ in size; and a run goes on with one process more or less."""
    fit(tmp_path / "one", [StopAt(7, tmp_path / "one.ckpt")])
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "tests.prior_processes"]
    done = subprocess.run([*command, str(tmp_path)], cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))
    for report in json.loads(line.removeprefix("RESULT ")):
        assert report["exchange"] == [True, True] and report["stray"]
        assert report["momentum"] < 1e-12 and report["decision"] == [5.0, 4.0, 0.0]
        assert report["weights"] and report["samples"] == 1293 and report["resumed"]
        assert report["accumulated"] and report["from_one"]
    look = Look()
    fit(tmp_path / "two", [look], ckpt_path=tmp_path / "two.ckpt")
    assert look.is_what(tmp_path / "two.kept")
