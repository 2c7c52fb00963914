"""What the command line knows of a run beside model, data and trainer."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from .callbacks.evaluation import RobustEvaluation
from .callbacks.outcome import EvaluationAttack
from .callbacks.store.files import sha256_of_file
from .trust import CONFIG_KEY


@dataclass
class Run:
    """Where the run is kept, and how wandb files it.

    Args:
        name: folder of the run and its name in wandb; None takes the name of the config, else of the method.
        output_dir: folder that holds all runs.
        project: of wandb.
        group: of wandb.
        tags: of wandb.
        monitor: metric that chooses ``best.ckpt``, the higher the better; None takes ``val/acc_worst``, or ``val/acc_clean``
            where nothing attacks in validation. ``val/fair_pgd20`` is accuracy plus that of the worst class under ``pgd20``;
            ``val_ema/acc_pgd20`` the accuracy of an average, and ``val_max/acc_pgd20`` the higher one of raw and averaged
            weights, see :class:`RobustEvaluation`.
        save_every_n_steps: write ``last.ckpt`` also every so many training steps, and not only at the end of every epoch.
        save_every_n_epochs: write it at the end of every so many epochs; it is written at the end of the training, too.
    """

    name: str | None = None
    output_dir: str = "runs"
    project: str = "robust_pl"
    group: str | None = None
    tags: list[str] = field(default_factory=list)
    monitor: str | None = None
    save_every_n_steps: int | None = None
    save_every_n_epochs: int = 1


@dataclass
class ReportOptions:
    """What ``test`` adds to its report.

    Args:
        flags: number of test samples for the checks for gradient masking; 0 leaves them out, None takes 100 where AutoAttack
            is among the attacks or the network is a dynamic one, and else none. See docs/masking_flags.md for their cost.
    """

    flags: int | None = None


class StoreConfig(Callback):
    """Puts the whole experiment into each checkpoint, so that it can be tested without its YAML."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint[CONFIG_KEY] = self.config


# What changes how an evaluation is computed or shown, but not what comes out.
_NOT_ASKED = ("num_workers", "output_dir")


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _takes_part(callback: Any) -> bool:
    """Whether what a config names is an attack or the evaluation, and not a bar or the like."""
    module, _, name = str(callback.get("class_path", "")).rpartition(".") if isinstance(callback, dict) else ("", "", "")
    # Parsing has imported it.
    found = getattr(sys.modules.get(module), name, None)
    return isinstance(found, type) and issubclass(found, EvaluationAttack | RobustEvaluation)


def request_of(command: str, config: dict[str, Any], checkpoint: str | None) -> dict[str, Any]:
    """All that determines the result of a test or predict: where it is the same, an evaluation that was stopped goes on."""

    def asked(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: asked(v) for k, v in value.items() if k not in _NOT_ASKED}
        return [asked(v) for v in value] if isinstance(value, list) else value

    request = {key: asked(config.get(key)) for key in ("seed_everything", "model", "data", "attacks", "evaluation")}
    trainer = config.get("trainer") or {}
    request["trainer"] = {key: trainer.get(key) for key in ("precision", f"limit_{command}_batches", "fast_dev_run")}
    request["trainer"]["callbacks"] = [asked(one) for one in _listed(trainer.get("callbacks")) if _takes_part(one)]
    request["checkpoint"] = sha256_of_file(Path(checkpoint)) if checkpoint and command in ("test", "predict") else None
    return {"command": command, **request}
