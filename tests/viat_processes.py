"""VIAT on two processes: started by test_viat with torchrun, one line of JSON."""

from __future__ import annotations

import json
import logging
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist

from robust_pl.nets import SmallCNN

from .view_training import Photos, fit, viat


def main() -> None:
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    folder = Path(sys.argv[1])
    net = SmallCNN(3, 3, 2).eval()
    method, data = viat(net, renders=2), Photos(batch_size=2)
    trainer = fit(method, folder, data, strategy="ddp", devices=2)
    shares: list[int] = [0, 0]
    dist.all_gather_object(shares, sum(sum(renderer.calls) for renderer in data.train_scenes.renderers))
    differ = []
    for name, tensor in method.state_dict().items():
        first = tensor.clone()
        dist.broadcast(first, 0)
        if not torch.equal(first, tensor) and "running" not in name:
            differ.append(name)
    names: list[list[str]] = [[], []]
    dist.all_gather_object(names, differ)
    if trainer.is_global_zero:
        torch.save({k: v for k, v in method.state_dict().items() if k.startswith("pool.")}, folder / "pool.pt")
        print("RESULT " + json.dumps({"differ": names, "renders": shares}), flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
