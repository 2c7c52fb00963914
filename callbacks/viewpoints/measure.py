"""A viewpoint attack on the scenes of a trainer's data module: figures, a table, and files."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from lightning.pytorch import LightningModule, Trainer
from rich.console import Console
from torch import Tensor

from ...data.hashing import hash_keys, integers
from ...report.viewpoint_report import write_viewpoint_report
from ...scenes.scene_set import SceneSet
from ...scenes.view_space import ViewSpace
from ..attacks.draws import seed_from
from ..outcome import EvaluationAttack, check_names
from ..progress import watch_attack
from ..track import log_rows
from .chunks import OtherAttackError
from .distribution import ViewDistribution
from .found import Found, as_table
from .images import write_table, write_views
from .places import places_of

if TYPE_CHECKING:
    from .base import ViewpointAttack

DISTRIBUTION = "distribution.safetensors"
_PREFIX = {"validate": "val", "test": "test"}


class HasScenes(Protocol):
    """What a data module offers to viewpoint attacks, after its ``setup``. What a run does not need may be missing."""

    val_scenes: SceneSet | None
    """Objects that validation attacks: not those of the test, and for a test of generalisation not those of training."""
    test_scenes: SceneSet | None
    """Objects that the test attacks."""
    view_space: ViewSpace
    """Ranges of viewpoints of attacks that name none. May be missing."""
    class_names: Sequence[str]
    """Names the folders of extreme views. May be missing."""


def check_data(trainer: Trainer, attacks: Sequence[ViewpointAttack], stage: str) -> None:
    """Refuse, before anything runs, a data module without scenes, and attacks that share a name.

    Raises:
        ValueError: naming what is missing.
    """
    check_names([attack.name for attack in attacks])
    others = [c.name or type(c).__name__.lower() for c in trainer.callbacks if isinstance(c, EvaluationAttack)]
    if shared := [attack.name for attack in attacks if attack.name in others]:
        raise ValueError(f"two attacks are named {shared[0]!r}: give each its own name, since it is the metric's name")
    step = "test" if stage == "test" else "validate"
    wanted = f"{_PREFIX[step]}_scenes"
    if stage != "predict" and any(step in attack.stages for attack in attacks) and not hasattr(trainer.datamodule, wanted):
        raise ValueError(
            f"{type(trainer.datamodule).__name__} offers no {wanted}, which viewpoint attacks render: use a data module with "
            "scenes, or leave the attacks out"
        )


def measure(trainer: Trainer, pl_module: LightningModule, attack: ViewpointAttack, stage: str) -> None:
    """Attack the scenes of a stage, log the figures, and write the files. With several processes all must call it."""
    data, prefix = trainer.datamodule, _PREFIX[stage]
    scenes: SceneSet | None = getattr(data, f"{prefix}_scenes")
    attack.found = attack.figures = None
    if scenes is None:
        return
    aims = _other_classes(pl_module, data, scenes, attack.seed) if attack.targeted else None
    run = partial(
        attack,
        pl_module,
        scenes,
        aims,
        space=attack.space or getattr(data, "view_space", None),
        rank=trainer.global_rank,
        world_size=trainer.world_size,
        watch=partial(watch_attack, trainer, attack.name) if stage == "test" else None,
    )
    root = Path(trainer.strategy.broadcast(attack.folder or str(Path(trainer.default_root_dir) / "viewpoints")))
    with trainer.precision_plugin.val_step_context():
        if stage == "validate":  # the network goes on changing, so there is nothing to go on with
            found, folder = run(), root / f"{prefix}_{attack.name}"
        else:
            found, folder = _in_a_folder(run, root, f"{prefix}_{attack.name}")
    attack.found, attack.figures = found, found.figures(attack.name)
    _write(trainer, attack, found, scenes, folder, stage)
    log_rows(pl_module, prefix, attack.figures, {f"acc_{attack.name}"} if stage == "validate" else ())


def report(trainer: Trainer, attacks: Sequence[ViewpointAttack], stage: str) -> None:
    """Print the table of all attacks that measured something."""
    done = [attack for attack in attacks if attack.figures is not None and stage in attack.stages]
    if done and trainer.is_global_zero:
        title = "validation" if stage == "validate" else stage
        Console().print(as_table({attack.name: attack.figures for attack in done}, len(done[0].found.ids), title))


def _in_a_folder(run: partial[Found], root: Path, name: str) -> tuple[Found, Path]:
    """Go on in the folder ``name``, ``name-2``, ... that holds the same attack, or begin in the first that is not there."""
    for number in count(1):
        folder = root / (name if number == 1 else f"{name}-{number}")
        try:
            return run(folder=folder), folder
        except OtherAttackError:
            continue
    raise AssertionError


def _write(trainer: Trainer, attack: ViewpointAttack, found: Found, scenes: SceneSet, folder: Path, stage: str) -> None:
    if trainer.is_global_zero and isinstance(found.distribution, ViewDistribution):
        found.distribution.save(folder / DISTRIBUTION)
    if stage != "test" or not found.u.shape[1]:
        return
    names = getattr(trainer.datamodule, "class_names", None)
    write_views(found, scenes, folder, names, trainer.global_rank, trainer.world_size, trainer.strategy.root_device)
    trainer.strategy.barrier()
    if trainer.is_global_zero:
        write_table(found, scenes, folder, names)
        figures = {key.removesuffix(f"_{attack.name}"): value for key, value in (attack.figures or {}).items()}
        figures["renders"] = found.renders
        write_viewpoint_report(folder, attack.name, figures, places_of(found.distribution), trainer.loggers)


def _other_classes(pl_module: LightningModule, data: object, scenes: SceneSet, seed: int) -> Tensor:
    """A random class beside the label for each object, by its id."""
    classes = getattr(pl_module, "num_classes", None) or getattr(data, "num_classes", None)
    if classes is None:
        raise ValueError("num_classes is unknown, and a targeted attack chooses among them: give the module num_classes")
    keys = hash_keys(torch.tensor([seed_from(seed, "target", name) for name in scenes.ids]))
    return (scenes.labels + 1 + integers(keys, 0, classes - 1)) % classes
