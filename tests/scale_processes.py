"""The same evaluation and the same training on W processes: started by test_scale with torchrun, and writes what it found."""

from __future__ import annotations

import json
import logging
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import nn
from torch.distributed.tensor import DTensor

from robust_pl.callbacks import FGSM, PGD, RobustEvaluation
from robust_pl.data import DigitsDataModule
from robust_pl.methods import PGDAT
from robust_pl.sharding import ShardedStrategy

from .tiny_vit import TinyViT

BATCH = 64


class Losses(Callback):
    """The loss of each step, over all processes and micro-batches, and how much of the weights lies here."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.held = 1.0
        self._window: list[torch.Tensor] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, i: int) -> None:
        self._window.append(outputs["loss"].detach().double() / dist.get_world_size())  # divided by the micro-batches already
        if trainer.fit_loop.epoch_loop._accumulated_batches_reached():
            loss = torch.stack(self._window).sum()
            dist.all_reduce(loss)
            self.losses.append(float(loss))
            self._window.clear()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, i: int) -> None:
        parameters = list(pl_module.parameters())
        held = sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in parameters)
        self.held = held / sum(p.numel() for p in parameters)


def trainer_for(*callbacks: Callback, **more: Any) -> Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    world = {"accelerator": "cpu", "devices": dist.get_world_size(), "strategy": "ddp", "use_distributed_sampler": False}
    return Trainer(callbacks=list(callbacks), **(quiet | world | more))


def evaluation(folder: Path) -> dict[str, float]:
    """Chunks of 20, of which there are 18: no number of processes but one has equally many."""
    seed_everything(0, verbose=False)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    attack = PGD(0.05, steps=3, random_start=True, restarts=3)
    attack.name = "pgd"
    trainer = trainer_for(attack, RobustEvaluation(output_dir=str(folder / f"test{dist.get_world_size()}")))
    trainer.test(PGDAT(net, FGSM(0.1)), DigitsDataModule(eval_batch_size=20), verbose=False)
    return {key: float(value) for key, value in trainer.callback_metrics.items() if "seconds" not in key}


def training(folder: Path, kind: str, accumulate: int = 1, **more: Any) -> dict[str, Any]:
    """Six steps of 64 images, shared out over processes and micro-batches, validated after the third by unequal chunks."""
    seed_everything(0, verbose=False)
    strategy = "ddp" if kind == "ddp" else ShardedStrategy(gather=kind)
    method = PGDAT(TinyViT(), PGD(0.1, steps=2, random_start=False), optimizer=lambda params: torch.optim.AdamW(params, 1e-2))
    losses = Losses()
    settings = {"accumulate_grad_batches": accumulate, "max_steps": 6, "val_check_interval": 3 * accumulate}
    settings = {"precision": "64-true", **settings, **more}  # in float32 single signs of PGD flip where gradients vanish
    trainer = trainer_for(losses, FGSM(0.1), strategy=strategy, gradient_clip_val=0.5, **settings)
    data = DigitsDataModule(batch_size=BATCH // dist.get_world_size() // accumulate, eval_batch_size=50)
    trainer.fit(method, data)
    trainer.save_checkpoint(folder / f"{kind}{dist.get_world_size()}.ckpt")
    return {"losses": losses.losses, "val": float(trainer.callback_metrics["val/acc_worst"]), "held": losses.held}


def main() -> None:
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    dist.init_process_group("gloo")
    folder, world = Path(sys.argv[1]), dist.get_world_size()
    found = {"evaluation": evaluation(folder), "ddp": training(folder, "ddp"), "accumulated": training(folder, "ddp", 2)}
    if world == 2:
        kinds = ("ddp", "step", "pass")
        found["32-true"] = {kind: training(folder, kind, precision="32-true") for kind in kinds}
        found["bf16-mixed"] = {kind: training(folder, kind, 2, precision="bf16-mixed") for kind in kinds[:2]}
    if dist.get_rank() == 0:
        (folder / f"found{world}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
