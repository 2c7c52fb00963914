"""Whose errors under corruptions others are divided by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

from ...functional.corruption_error import ALEXNET_CLEAN_ERROR, ALEXNET_ERRORS
from ...report.record import Record

_IMAGENET_CLASSES, _IMAGENET_SIZE = 1000, (224, 224)


@dataclass(frozen=True)
class Baseline:
    """Errors of a network under corruptions.

    Args:
        title: whose they are.
        errors: (corruption, severity) -> error; severity 0 is the mean over all five, where only that is known.
        clean_error: without corruption.
        notes: sentences that a reader needs.
    """

    title: str
    errors: Mapping[tuple[str, int], float]
    clean_error: float
    notes: list[str] = field(default_factory=list)

    @classmethod
    def alexnet(cls, num_classes: int | None = None, size: tuple[int, ...] | None = None) -> Baseline:
        """AlexNet on ImageNet-C.

        Args:
            num_classes: of the data that are compared with it; None if it is not known.
            size: height and width of their images; None if they are not known.
        """
        notes = ["The clean error of AlexNet, 43.48 %, which the relative mCE is taken over, is reconstructed."]
        if num_classes not in (None, _IMAGENET_CLASSES):
            notes.append(
                f"AlexNet's errors are those among 1,000 classes, and these images are of {num_classes}: here CE, mCE and "
                "relative mCE do not compare with published ones."
            )
        if size and tuple(size) != _IMAGENET_SIZE:
            notes.append(
                f"AlexNet's errors are those on images of 224 x 224 pixels, and these have {size[0]} x {size[1]}: here CE, mCE "
                "and relative mCE do not compare with published ones."
            )
        return cls("AlexNet", {(name, 0): error for name, error in ALEXNET_ERRORS.items()}, ALEXNET_CLEAN_ERROR, notes)

    @classmethod
    def of_record(cls, path: Path) -> Baseline:
        """The errors in the record of another run.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it is no record of corruptions.
        """
        if not path.is_file():
            raise FileNotFoundError(
                f"reference={path} does not exist: name the record of another run, such as "
                "runs/NAME/analysis/test/corruptions.json"
            )
        record = Record.read(path)
        if record.kind != "Corruptions" or not record.maps or "clean" not in record.figures:
            raise ValueError(f"reference={path} is a record of {record.kind}, not of Corruptions: name one of those")
        heat = record.maps[0]
        errors = {
            (name, severity): 1 - share
            for name, row in zip(heat.y, heat.values, strict=True)
            for severity, share in zip(heat.x, row, strict=True)
            if share is not None
        }
        note = (
            f"CE, mCE and relative mCE are relative to {path}, which was measured on {record.about.get('samples')} samples "
            f"(images: {record.about.get('images')}, parameters: {record.about.get('parameters')})."
        )
        return cls(str(path), errors, 1 - record.figures["clean"], [note])

    def mean_errors(self, corruptions: Sequence[str], severities: Sequence[int]) -> dict[str, float]:
        """Corruption -> mean error over the severities.

        Raises:
            ValueError: if it is not known.
        """
        if all((name, 0) in self.errors for name in corruptions):
            return {name: self.errors[name, 0] for name in corruptions}
        wanted = [(name, severity) for name in corruptions for severity in severities]
        if missing := [pair for pair in wanted if pair not in self.errors]:
            name, severity = missing[0]
            raise ValueError(
                f"reference={self.title} lacks {name} at severity {severity}: measure both runs under the same corruptions and "
                "severities"
            )
        return {name: fmean(self.errors[name, severity] for severity in severities) for name in corruptions}
