"""A look at the teachers before a student learns from them."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from ...callbacks.attacks.base import Attack
from ...callbacks.attacks.pgd import PGD
from ...data import ImageDataModule
from ...data.loaders import EvalLoader
from ...functional.losses import hard
from ...nets.teacher import Teacher
from ..samples import training_samples

_SAMPLES = 256
_STEPS = 10
ROBUST = 0.25
"""A robust teacher keeps at least this share of its clean accuracy under the attack; standard training keeps next to none."""
ACCURATE = 0.5
"""Clean accuracy below which a teacher has little to teach."""
GAIN = 0.1
"""What normalising the pixels may add to a teacher's accuracy, unless it expects that."""


def inspect_teachers(
    trainer: Trainer, teachers: Mapping[str, Teacher], expected: Mapping[str, str], attack: Attack, num_classes: int
) -> None:
    """Refuse teachers that do not fit the data, and warn of those that lack what is to be learned from them, or say the same.

    Costs 2 forward passes a teacher, and 10 forward and backward passes where robustness is expected, on 256 images.

    Args:
        trainer: of the run.
        teachers: by name.
        expected: ``robustness`` or ``accuracy`` of each.
        attack: of the training, whose radius and norm count.
        num_classes: number of classes K.

    Raises:
        ValueError: if a teacher has another number of classes, or expects normalised pixels.
    """
    x, y = _samples(trainer)
    kind = "validation" if _has_validation(trainer) else "training"
    accuracy: dict[str, float] = {}
    said: dict[str, Tensor] = {}
    for name, teacher in teachers.items():
        with torch.no_grad(), trainer.precision_plugin.val_step_context():
            logits = teacher(x[:2])
            if logits.shape[1:] != (num_classes,):
                raise ValueError(
                    f"{name} returns logits of shape {tuple(logits.shape)} for two images, and there are {num_classes} "
                    "classes: choose a teacher that was trained on the same ones"
                )
            said[name] = teacher(x)
            accuracy[name] = clean = _accuracy(said[name], y)
            mean, std = x.mean((0, 2, 3), keepdim=True), x.std((0, 2, 3), keepdim=True)
            normalised = _accuracy(teacher((x - mean) / std.clamp_min(1e-6)), y)
        if normalised >= max(ACCURATE, clean + GAIN):
            raise ValueError(
                f"{name} is right on {clean:.1%} of {len(x)} {kind} images and on {normalised:.1%} if they are normalised by "
                "their mean and deviation: it expects that, while attacks work on pixels in [0, 1]. Build it with its mean and "
                "std, or put nets.Normalize before it"
            )
        if clean < ACCURATE:
            rank_zero_warn(f"{name} is right on {clean:.1%} of {len(x)} {kind} images only: a student of it learns little")
        if expected.get(name) == "robustness":
            _look_at_robustness(trainer, name, teacher, x, y, clean, attack, kind)
    for one, other in combinations(said, 2):
        if torch.equal(said[one], said[other]):
            rank_zero_warn(
                f"{one} and {other} say the same of {len(x)} {kind} images: give two teachers, or use a method of one"
            )
    robust = [accuracy[name] for name in accuracy if expected.get(name) == "robustness"]
    for name, clean in accuracy.items():
        if expected.get(name) == "accuracy" and robust and clean < max(robust):
            rank_zero_warn(
                f"{name} is right on {clean:.1%} of {len(x)} {kind} images and the robust teacher on {max(robust):.1%}: "
                "a clean teacher should be the more accurate one"
            )


def _look_at_robustness(
    trainer: Trainer, name: str, teacher: Teacher, x: Tensor, y: Tensor, clean: float, attack: Attack, kind: str
) -> None:
    # Cross-entropy of a teacher that is sure of everything has no gradient left, above all in half precision.
    pgd = PGD(attack.eps, steps=_STEPS, norm=attack.norm, objective="margin")
    with trainer.precision_plugin.val_step_context():
        x_adv = pgd(teacher, x, y).to(x.dtype)
        with torch.no_grad():
            robust = _accuracy(teacher(x_adv), y)
    if robust < ROBUST * clean:
        rank_zero_warn(
            f"{name} is right on {robust:.1%} of {len(x)} {kind} images under PGD-{_STEPS} ({attack.norm}, eps "
            f"{float(pgd.eps):.4g}) and on {clean:.1%} without: it lacks the robustness that the student is to learn"
        )


def _accuracy(logits: Tensor, y: Tensor) -> float:
    return (logits.argmax(1) == y).float().mean().item()


def _has_validation(trainer: Trainer) -> bool:
    return isinstance(trainer.datamodule, ImageDataModule) and len(trainer.datamodule.split[1]) > 0


def _samples(trainer: Trainer) -> tuple[Tensor, Tensor]:
    """Clean images and their classes, the same on every process."""
    device, data = trainer.strategy.root_device, trainer.datamodule
    if _has_validation(trainer):
        batches = EvalLoader(data.train_set, data.split[1][:_SAMPLES], _SAMPLES, num_workers=data.num_workers)
    else:
        batches = training_samples(trainer, _SAMPLES, _SAMPLES, device)
    xs, ys = zip(*((x.to(device), hard(y).to(device)) for x, y, *_ in batches), strict=True)
    return torch.cat(xs), torch.cat(ys)
