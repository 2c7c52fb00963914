"""A basis shared by two processes: started by test_subspace with torchrun, one line of JSON with what each saw."""

from __future__ import annotations

import json
import logging
import sys
import warnings
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from robust_pl.callbacks import SubspaceTraining, WeightTrajectory
from robust_pl.methods import LayerwiseTWA, StandardTraining
from robust_pl.nets import SmallCNN, read_trajectory

from .test_methods import QUIET
from .test_subspace import flat


class Gradients(Callback):
    """The gradient of the first step, flat."""

    found: Tensor | None = None

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        if self.found is None:
            self.found = torch.cat([p.grad.flatten() for p in pl_module.parameters()]).double()


def fit(module: LightningModule, folder: str, *callbacks: Callback) -> None:
    """Each process trains on samples of its own."""
    generator = torch.Generator().manual_seed(dist.get_rank())
    x, y = torch.rand(24, 1, 8, 8, generator=generator), torch.randint(10, (24,), generator=generator)
    settings = {**QUIET, "max_epochs": 2, "limit_val_batches": 0, "strategy": "ddp", "devices": 2}
    trainer = Trainer(callbacks=list(callbacks), default_root_dir=folder, use_distributed_sampler=False, **settings)
    trainer.fit(module, DataLoader(TensorDataset(x, y), 8))


def same(vector: Tensor) -> bool:
    """Whether the other process has the same."""
    first = vector.clone()
    dist.broadcast(first, 0)
    return torch.equal(first, vector)


def main() -> None:
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    folder = sys.argv[1]
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    sgd = lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9)  # noqa: E731
    fit(StandardTraining(SmallCNN(width=2), optimizer=sgd), folder, WeightTrajectory(times_per_epoch=2))

    before, after, callback = Gradients(), Gradients(), SubspaceTraining(folder, dim=3)
    sizes: list[int] = []
    project = callback.on_before_optimizer_step

    def watched(*arguments: Any) -> None:
        sizes.append(callback.subspace.nbytes)
        project(*arguments)

    callback.on_before_optimizer_step = watched
    module = StandardTraining(SmallCNN(width=2), optimizer=sgd)
    fit(module, folder, before, callback, after)
    w = torch.stack([flat(s, module.net) for s in read_trajectory(folder).of(module.net)])
    rows = torch.linalg.svd(w - w.mean(0), full_matrices=False).Vh[:3]
    weights = flat(dict(module.net.named_parameters()), module.net)
    moved = weights - w[0]
    report = {
        "projected": (after.found - rows.T @ (rows @ before.found)).norm().item() / before.found.norm().item(),
        "outside": (moved - rows.T @ (rows @ moved)).norm().item() / moved.norm().item(),
        "equal": same(weights) and same(after.found),
        "rows": sizes[0] / (w.shape[1] * 4),
    }

    averaged = LayerwiseTWA(SmallCNN(width=2), folder, batches=2)
    fit(averaged, folder)
    sample = read_trajectory(folder).of(averaged.net)
    expected = []
    for c, (name, _) in zip(averaged.coefficients.double(), averaged.net.named_parameters(), strict=True):
        layer = torch.stack([s[name].double().flatten() for s in sample])
        away = layer - layer.mean(0)
        expected.append(layer.mean(0) + (c / away.norm(dim=1)) @ away)
    weights = flat(dict(averaged.net.named_parameters()), averaged.net)
    report["formula"] = (weights - torch.cat(expected)).abs().max().item()
    report["learned"] = averaged.coefficients.abs().max().item()
    report["equal_twa"] = same(weights) and all(same(b) for b in averaged.buffers())
    reports: list[Any] = [None, None]
    dist.all_gather_object(reports, report)
    if dist.get_rank() == 0:
        print("RESULT " + json.dumps(reports), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
