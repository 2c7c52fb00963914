"""What ``benchmarks.viewpoints`` tests a training by: ``python -m benchmarks.view_attacks FOLDER NAME ASKED SIZES``.

Attacks the last weights of the run NAME in FOLDER on the objects of the test, and writes ``tests/NAME.json`` there. SIZES are
the arguments of :func:`attacks`, as JSON; ASKED is kept in the file, and tells whether it is the one that was asked for. What
was killed goes on where it was.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from robust_pl import load_model
from robust_pl.callbacks import GMVFool, NaturalViews, RandomViews, ViewFool, ViewpointAttack
from robust_pl.data import ProceduralViewsDataModule


def attacks(popsize: int, iterations: int, samples: int) -> dict[str, ViewpointAttack]:
    """What each network is tested by; each search renders as often as the random search before it, or a few views less.

    Raises:
        ValueError: if a size is out of its range.
    """
    if iterations < 11:
        raise ValueError(f"iterations={iterations} must be at least 11: ten of them look for a start")
    evolution = {"popsize": popsize, "iterations": iterations, "eval_samples": samples}
    # Ten populations of uniform views come first, and as many iterations less follow.
    begun = {**evolution, "iterations": iterations - 10, "begin": "search"}
    return {
        "clean": NaturalViews(eval_samples=samples),
        "random": RandomViews(eval_samples=samples),
        "search 1": RandomViews(popsize * iterations, keep=1, sigma=0.15, eval_samples=samples),
        "viewfool": ViewFool(**begun),
        "middle": ViewFool(**evolution),
        "search 5": RandomViews((popsize + 4) * iterations, keep=5, sigma=0.15, eval_samples=samples),
        "gmvfool": GMVFool(5, **begun),
        "spread": GMVFool(5, **evolution),
    }


def test(folder: Path, name: str, asked: str, sizes: Mapping[str, int]) -> None:
    """Attack the network of one run, in this process, and write down the figures."""
    torch.set_num_threads(1)
    run = folder / "runs" / name
    config = yaml.safe_load((run / "config.yaml").read_text())
    data = ProceduralViewsDataModule(**config["data"]["init_args"])
    model, scenes = load_model(run / "checkpoints" / "last.ckpt"), data.test_scenes
    figures: dict[str, Any] = {}
    for label, attack in attacks(**sizes).items():
        kept = folder / "tests" / name / asked / label.replace(" ", "_")
        found = attack(model, scenes, space=data.view_space, folder=kept)
        of_attack = {**found.figures("x"), "worst_loss_x": found.worst_loss.mean().item(), "renders_x": float(found.renders)}
        figures[label] = {key.removesuffix("_x"): value for key, value in of_attack.items()}
    cost = json.loads((run / "compute.json").read_text())
    result = {"asked": asked, "figures": figures, "seconds": cost["seconds"], "objects": len(scenes)}
    (folder / "tests" / f"{name}.json").write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    test(Path(sys.argv[1]), sys.argv[2], sys.argv[3], json.loads(sys.argv[4]))
