"""The composition table on two processes: started by test_composition with torchrun, one line of JSON for each pair."""

from __future__ import annotations

import json
import logging
import sys
import tempfile
import warnings
from pathlib import Path

import torch
import torch.distributed as dist

from .method_table import METHODS
from .test_composition import COMBINATIONS, check_steps, fit, refused


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
    dist.destroy_process_group()


def run(name: str, combination: str, ingredients: Path) -> str | None:
    """What went wrong on any process, or None."""
    case, callbacks = METHODS[name], COMBINATIONS[combination]()
    with tempfile.TemporaryDirectory() as root:
        more = {"strategy": "ddp", "devices": 2, "default_root_dir": root}
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
