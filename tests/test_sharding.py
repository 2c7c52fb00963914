"""Sharded training: what it refuses, and the command line on two nodes, whose checkpoint one process tests."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import nn

from robust_pl.callbacks import AWP, EMA, PGD
from robust_pl.methods import PGDAT, TRADES, FreeAT, Method
from robust_pl.sharding import ShardedStrategy, refuse

from .tiny_vit import TinyViT

ROOT = Path(__file__).resolve().parent.parent
CONFIG = """
model:
  class_path: PGDAT
  init_args:
    net: {class_path: tests.tiny_vit.TinyViT}
    attack: {class_path: PGD, init_args: {eps: 0.1, steps: 2}}
    optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 0.003}}
    schedule: {class_path: Cosine, init_args: {interval: step}}
data: {class_path: DigitsDataModule, init_args: {batch_size: 64, eval_batch_size: 50}}
attacks:
  fgsm: {class_path: FGSM, init_args: {eps: 0.1}}
trainer: {max_epochs: 2, logger: false, accelerator: cpu, enable_progress_bar: false, enable_model_summary: false}
"""
SHARDED = ("--trainer.strategy", "{class_path: robust_pl.sharding.ShardedStrategy}")
STOP = """
from lightning.pytorch import Callback

class StopAfterEpoch(Callback):
    def on_train_epoch_end(self, trainer, pl_module):
        trainer.should_stop = True
"""


def refused(method: Method, *callbacks: Callback, gather: Any = "step") -> None:
    refuse(SimpleNamespace(callbacks=list(callbacks)), method, gather)


def test_what_needs_whole_weights_is_refused_by_name() -> None:
    method = TRADES(TinyViT(), PGD(0.1, steps=2))
    refused(method)
    with pytest.raises(ValueError, match="EMA copies whole weights after each step"):
        refused(method, EMA(0.9))
    with pytest.raises(ValueError, match="FreeAT defines training_step, where it may need whole weights"):
        refused(FreeAT(TinyViT()))
    with pytest.raises(ValueError, match=r"net\.1 is a BatchNorm, .* set trainer\.sync_batchnorm"):
        refused(PGDAT(nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))))
    refused(PGDAT(nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)))))
    trainer = SimpleNamespace(callbacks=[], precision="32-true", strategy=ShardedStrategy())
    with pytest.raises(ValueError, match="AWP needs whole weights on each process, and ShardedStrategy shards them"):
        AWP(0.01).setup(trainer, method, "fit")


def test_attacks_whose_passes_differ_between_processes_are_gathered_for_once_a_step() -> None:
    for attack in (PGD(0.1, steps=2, restarts=2, random_start=True), PGD(0.1, steps=2, keep="first")):
        refused(PGDAT(TinyViT(), attack))
        with pytest.raises(ValueError, match="makes more passes on one process than on another"):
            refused(PGDAT(TinyViT(), attack), gather="pass")
    attack = PGD(0.1)
    attack.cuda_graphs = True
    with pytest.raises(ValueError, match="cuda_graphs"):
        refused(PGDAT(TinyViT(), attack))
    with pytest.raises(ValueError, match="gather='never' is unknown"):
        ShardedStrategy(gather="never")  # type: ignore[arg-type]


def on_two_nodes(folder: Path, port: int, *arguments: str) -> None:
    """As a user types it on each of two machines, which are one here."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    command += ["--master-addr", "127.0.0.1", "--master-port", str(port)]
    command += ["-m", "robust_pl", *arguments, "--trainer.num_nodes", "2", "--trainer.devices", "1"]
    command[7:7] = ["--node-rank", "0"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    nodes = []
    for rank in range(2):
        command[8] = str(rank)
        nodes.append(
            subprocess.Popen(command, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        )
    said = [node.communicate(timeout=200)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said[0][-2000:] + said[1][-2000:]


@pytest.mark.slow
def test_two_nodes_train_shards_resume_them_and_one_process_tests_the_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "vit.yaml").write_text(CONFIG)
    (tmp_path / "stop.py").write_text(STOP)
    fit = ("fit", "-c", "vit.yaml", *SHARDED)
    on_two_nodes(tmp_path, 29611, *fit, "--run.output_dir", "whole")
    on_two_nodes(tmp_path, 29612, *fit, "--run.output_dir", "part", "--trainer.callbacks+=stop.StopAfterEpoch")
    (last,) = (tmp_path / "part").rglob("last.ckpt")
    on_two_nodes(tmp_path, 29613, *fit, "--run.output_dir", "resumed", "--run.name", "resumed", "--ckpt_path", str(last))
    (whole,), (resumed,) = ((tmp_path / name).rglob("last.ckpt") for name in ("whole", "resumed"))
    one, other = (torch.load(path, weights_only=True) for path in (whole, resumed))
    assert one["global_step"] == other["global_step"] == 20
    assert all(torch.equal(tensor, other["state_dict"][name]) for name, tensor in one["state_dict"].items())
    test = [sys.executable, "-m", "robust_pl", "test", "-c", "vit.yaml", "--ckpt_path", str(whole)]
    done = subprocess.run(
        test, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(list(whole.parents[1].rglob("predictions.csv"))) == 1 and "worst of all" in done.stdout
