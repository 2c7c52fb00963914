"""The composition table on two processes: started by test_composition with torchrun, one line of JSON for each pair."""

from __future__ import annotations

import json
import logging
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import seed_everything
from torch import nn

from robust_pl.callbacks import AWP, RWP, SAM, FriendlySAM, WeightPerturbation
from robust_pl.data import DigitsDataModule
from robust_pl.methods import Method, StandardTraining

from .method_table import METHODS, sgd
from .test_composition import COMBINATIONS, check_steps, fit, refused, trainer_for

PERTURBATIONS: dict[str, Callable[[], WeightPerturbation]] = {
    "AWP": lambda: AWP(0.05),
    "SAM": lambda: SAM(0.5),
    "FriendlySAM": lambda: FriendlySAM(0.5),
    "RWP": lambda: RWP(0.1),
    "mRWP": lambda: RWP(0.1, mix=0.5),
}


def main() -> None:
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    ingredients = Path(sys.argv[1])
    dist.init_process_group("gloo")
    for name in METHODS:
        for combination in COMBINATIONS:
            error = run(name, combination, ingredients)
            if dist.get_rank() == 0:
                print("RESULT " + json.dumps({"name": name, "combination": combination, "error": error}), flush=True)
    for name, perturbation in PERTURBATIONS.items():
        method = linear_fit(perturbation(), Path(sys.argv[2]), batch_size=8, strategy="ddp", devices=2)
        if dist.get_rank() == 0:
            torch.save(method.net.state_dict(), Path(sys.argv[2]) / f"{name}.pt")
    dist.destroy_process_group()


def linear_fit(perturbation: WeightPerturbation, root: Path, batch_size: int, **more: Any) -> Method:
    """A net without BatchNorm in float64: two processes with half of each batch must take the steps of one."""
    seed_everything(0, verbose=False)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10))
    method = StandardTraining(net, optimizer=sgd)
    trainer = trainer_for([perturbation], precision="64-true", default_root_dir=root, accumulate_grad_batches=2, **more)
    trainer.fit(method, DigitsDataModule(batch_size=batch_size))
    return method


def run(name: str, combination: str, ingredients: Path) -> str | None:
    """What went wrong on any process, or None."""
    case, callbacks = METHODS[name], COMBINATIONS[combination]()
    with tempfile.TemporaryDirectory() as root:
        more = {"strategy": case.strategy, "devices": 2, "default_root_dir": root}
        error = None
        try:
            if refused(case, callbacks) is not None:
                try:
                    fit(case, ingredients, callbacks, **more)
                    error = "was not refused"
                except ValueError as reason:
                    error = None if refused(case, callbacks) in str(reason) else f"refused for another reason: {reason}"
            else:
                method = check_steps(case, ingredients, callbacks, **more)
                error = differing(method)
        except Exception as found:
            error = f"{type(found).__name__}: {found}"
        errors: list[str | None] = [None, None]
        dist.all_gather_object(errors, error)
    return next((e for e in errors if e), None)


def differing(method: torch.nn.Module) -> str | None:
    """The first parameter that is not the same on both processes."""
    for name, parameter in method.named_parameters():
        first = parameter.detach().clone()
        dist.broadcast(first, 0)
        if not torch.equal(first, parameter):
            return f"{name} differs between the processes by {(first - parameter).abs().max():.1e}"
    return None


if __name__ == "__main__":
    main()
