"""Shared fixtures: the command line as a user runs it, in this process."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

# Networks in the tests are small, and threads that wait for each other would take most of the time: here, in the processes that
# tests start, and beside those of other workers. Before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
TINY = """
model:
  class_path: PGDAT
  init_args:
    net:
      class_path: SmallCNN
      init_args: {width: 4}
    attack:
      class_path: PGD
      init_args: {eps: 0.1, steps: 2}
    optimizer:
      class_path: torch.optim.SGD
      init_args: {lr: 0.05, momentum: 0.9}
    schedule:
      class_path: Cosine
data:
  class_path: DigitsDataModule
  init_args:
    batch_size: 128
    augment: true
attacks:
  fgsm:
    class_path: FGSM
    init_args: {eps: 0.1}
  pgd:
    class_path: PGD
    init_args: {eps: 0.1, steps: 3}
trainer:
  max_epochs: 2
  logger: false
  enable_progress_bar: false
  enable_model_summary: false
"""


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Networks in the tests are small, and threads that wait for each other would take most of the time."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def no_run_of_wandb_stays_open() -> Iterator[None]:
    """wandb's run outlives the command line in one process, and the next test's logger would go on in it."""
    yield
    wandb = sys.modules.get("wandb")
    if getattr(wandb, "run", None) is not None:
        wandb.finish()


@pytest.fixture(scope="session")
def ingredients(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds the run ``base``: two short epochs and their trajectory, for methods that start from another run."""
    from robust_pl.cli import main

    folder = tmp_path_factory.mktemp("ingredients")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["robust-pl"])
        patch.setattr(sys, "path", list(sys.path))
        Path("base.yaml").write_text(TINY)
        short = ["--trainer.limit_train_batches", "4", "--trainer.limit_val_batches", "1"]
        main(["fit", "-c", "base.yaml", *short, "--trainer.callbacks", "[{class_path: WeightTrajectory}]"])
    return folder / "runs"


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A config of an experiment of seconds, in an empty working directory."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY)
    return path


@pytest.fixture
def robust_pl(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Call the command line: ``robust_pl("fit", "-c", "x.yaml")``; it raises SystemExit where a shell would see 2."""
    from robust_pl.cli import main

    monkeypatch.setattr(sys, "argv", ["robust-pl"])
    monkeypatch.setattr(sys, "path", list(sys.path))
    for variable in ("LOCAL_RANK", "ROBUST_PL_RUN_FOLDER"):
        monkeypatch.delenv(variable, raising=False)
    return lambda *arguments: main([str(argument) for argument in arguments])
