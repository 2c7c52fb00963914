"""Viewpoint attack and view sphere on two processes: started by test_viewpoint_attacks with torchrun, one line of JSON."""

from __future__ import annotations

import json
import logging
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist

from robust_pl.callbacks import GMVFool, ViewSphere

from .test_viewpoint_attacks import Fixed, TinyScenes, trainer_with


def main() -> None:
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    attack = GMVFool(2, popsize=9, iterations=4, eval_samples=5, chunk=1)
    trainer = trainer_with(Path(sys.argv[1]), attack, ViewSphere(6, 5), strategy="ddp", devices=2, num_nodes=1)
    trainer.test(Fixed(), TinyScenes(), verbose=False)
    if trainer.is_global_zero:
        figures = {key: value.item() for key, value in trainer.callback_metrics.items()}
        print("RESULT " + json.dumps(figures), flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
