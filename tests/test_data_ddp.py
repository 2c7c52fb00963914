"""Two real processes: shards, an evaluation that one rank has no part in, and resuming in the middle of an epoch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import json, sys
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torchmetrics import SumMetric
from robust_pl.data import DigitsDataModule

folder, ckpt = sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else None

class Module(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer, self.count, self.seen = torch.nn.Linear(64, 10), SumMetric(), []
    def training_step(self, batch, _):
        x, y, index = batch
        self.seen.append(index.tolist())
        return torch.nn.functional.cross_entropy(self.layer(x.flatten(1)), y)
    def validation_step(self, batch, _):
        self.count.update(len(batch[2]))
    def on_validation_epoch_end(self):  # a rank without a batch would never log in validation_step, and the other hangs
        self.total = int(self.count.compute())
        self.log("count", self.count)
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)

class Save(Callback):
    def on_train_batch_end(self, trainer, *args):
        if ckpt is None and trainer.global_step == 7:
            trainer.save_checkpoint(f"{folder}/mid.ckpt")

module, data = Module(), DigitsDataModule(batch_size=128, eval_batch_size=200, val_size=150, augment=True)
data.resident = ckpt is not None  # the resumed run makes its batches of a copy on the device
trainer = Trainer(accelerator="cpu", devices=2, strategy="ddp", max_epochs=2, logger=False, enable_checkpointing=False,
                  enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
                  callbacks=[Save()])
trainer.fit(module, data, ckpt_path=ckpt)
json.dump({"seen": module.seen, "validated": module.total}, open(f"{folder}/rank{trainer.global_rank}.json", "w"))
"""


@pytest.mark.slow
def test_two_processes(tmp_path: Path):
    def run(*ckpt: str) -> list[dict]:
        env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
        subprocess.run([sys.executable, "-W", "ignore", script, tmp_path, *ckpt], check=True, timeout=120, env=env)
        return [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]

    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    full = run()
    for epoch in range(2):
        seen = [i for rank in full for batch in rank["seen"][5 * epoch : 5 * epoch + 5] for i in batch]
        assert len(seen) == len(set(seen)) == 5 * 2 * 128
    assert [rank["validated"] for rank in full] == [150, 150]  # one chunk of 200, so rank 1 had none
    resumed = run(str(tmp_path / "mid.ckpt"))
    assert [rank["seen"] for rank in resumed] == [rank["seen"][7:] for rank in full]
