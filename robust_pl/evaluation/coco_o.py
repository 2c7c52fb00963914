"""COCO-O: detectors on six kinds of pictures that they were not trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics import Metric

from ..data.coco_files import CocoFiles
from ..report.record import Cell, Record, Sheet

DOMAINS = ("sketch", "cartoon", "painting", "weather", "handmake", "tattoo")
EXPECTED = 0.45
"""Mean average precision on COCO-O that standard detectors have for each of that on COCO (reconstructed: from memory of the
paper, and it agrees with rows of its table)."""


@dataclass(frozen=True)
class CocoO:
    """What a detector does on COCO-O (Mao et al. 2023, arXiv 2307.12730); precisions in [0, 1].

    Args:
        domains: domain -> mean average precision of its boxes, over IoU 0.5 to 0.95.
        coco: mean average precision on COCO's validation images; None if it is not known.
    """

    domains: Mapping[str, float]
    coco: float | None = None

    @property
    def mean(self) -> float:
        """Mean over domains, each of which counts alike."""
        return sum(self.domains.values()) / len(self.domains)

    @property
    def effective(self) -> float | None:
        """Effective robustness: the mean minus 0.45 times the precision on COCO."""
        return None if self.coco is None else self.mean - EXPECTED * self.coco

    @property
    def relative_drop(self) -> float | None:
        """Share of the precision on COCO that is lost; None where that is 0."""
        return 1 - self.mean / self.coco if self.coco else None

    def record(self, name: str = "coco_o") -> Record:
        """As a record, which reports show."""
        figures = {"map": self.mean, "map_coco": self.coco, "effective": self.effective, "relative_drop": self.relative_drop}
        rows: list[list[Cell]] = [[domain, value] for domain, value in self.domains.items()]
        rows += [["mean", self.mean], *([["COCO", self.coco]] if self.coco is not None else [])]
        sheet = Sheet("mean average precision", ["domain", "mAP"], rows, share=True)
        known = {key: value for key, value in figures.items() if value is not None}
        return Record("CocoO", name, "COCO-O", known, [sheet])


def evaluate_coco_o(
    detector: nn.Module,
    folder: str | Path,
    *,
    coco: float | str | Path | None = None,
    domains: Sequence[str] = DOMAINS,
    batch_size: int = 4,
    num_workers: int = 0,
    progress: bool = False,
) -> CocoO:
    """Mean average precision of a detector on each domain of COCO-O; one forward pass for each image.

    The files are the user's: ``folder`` holds ``sketch/val2017``, ``sketch/annotations/instances_val2017.json`` and so on.
    Score thresholds and non-maximum suppression are the detector's own, and must be the same on COCO.

    Args:
        detector: with torchvision's interface: in eval mode a list of images (3, H, W) in [0, 1] gives a list of ``boxes`` (as
            left, top, right, bottom), ``labels`` (COCO's category numbers) and ``scores``. It is left as it was.
        folder: of the domains.
        coco: precision on COCO in [0, 1], or COCO's folder, on which it is then measured; None leaves out what needs it.
        domains: that are measured.
        batch_size: images a batch.
        num_workers: processes that read ahead.
        progress: show a progress bar.

    Raises:
        ImportError: if pycocotools or torchvision is missing.
        FileNotFoundError: if a domain's files are missing.
        ValueError: if a file is damaged, no domain is given, ``coco`` is no precision, or the detector gives something else.
    """
    new_metric()  # rather than after a long way through the images
    if not domains:
        raise ValueError(f"domains is empty: name at least one of {', '.join(DOMAINS)}")
    if isinstance(coco, int | float) and not 0 <= coco <= 1:
        raise ValueError(f"coco={coco} is no mean average precision: give it as a share in [0, 1], not per cent")
    sets = {domain: CocoFiles(Path(folder) / domain) for domain in domains}
    clean = CocoFiles(coco) if isinstance(coco, str | Path) else None

    def measure(files: CocoFiles, title: str) -> float:
        return mean_average_precision(detector, files, batch_size, num_workers, title if progress else None)

    found = {domain: measure(files, domain) for domain, files in sets.items()}
    return CocoO(found, measure(clean, "COCO") if clean is not None else coco)  # type: ignore[arg-type]


def mean_average_precision(
    detector: nn.Module, files: CocoFiles, batch_size: int = 4, num_workers: int = 0, title: str | None = None
) -> float:
    """Mean average precision of boxes over IoU 0.5 to 0.95, in [0, 1], by torchmetrics.

    Args:
        detector: see :func:`evaluate_coco_o`.
        files: images and boxes.
        batch_size: images a batch.
        num_workers: processes that read ahead.
        title: of the progress bar; None shows none.

    Raises:
        ImportError: if pycocotools or torchvision is missing.
        ValueError: if there is no box, an image is damaged, or the detector gives something else.
    """
    metric = new_metric()
    if not any(len(target["labels"]) for target in files.targets):
        raise ValueError(f"{files.folder} has no box: there is nothing to detect")
    device = next((p.device for p in detector.parameters()), torch.device("cpu"))
    was_training = detector.training
    detector.eval()
    loader = DataLoader(files, batch_size, num_workers=num_workers, collate_fn=_collate, generator=torch.Generator())
    try:
        with torch.inference_mode():
            for images, targets in track(loader, title or "", transient=True, disable=title is None):
                found = detector([image.to(device) for image in images])
                metric.update(_checked(found, len(images)), targets)
    finally:
        detector.train(was_training)
    return max(0.0, float(metric.compute()["map"]))


def new_metric() -> Metric:
    """Torchmetrics' mean average precision.

    Raises:
        ImportError: if pycocotools or torchvision is missing.
    """
    try:
        from torchmetrics.detection.mean_ap import MeanAveragePrecision

        metric = MeanAveragePrecision(box_format="xyxy", iou_type="bbox")
    except Exception as error:  # a torchvision built for another torch fails with RuntimeError
        raise ImportError(
            "COCO-O is measured by torchmetrics with pycocotools and torchvision, install them with: "
            f"pip install robust_pl[detection] ({' '.join(str(error).split())})"
        ) from error
    metric.warn_on_many_detections = False
    return metric


def _collate(batch: list[Any]) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    images, targets = zip(*batch, strict=True)
    return list(images), list(targets)


def _checked(found: Any, count: int) -> list[dict[str, Tensor]]:
    """Detections on the CPU, where the metric counts them."""
    wanted = ("boxes", "labels", "scores")
    if not isinstance(found, Sequence) or len(found) != count or not all(isinstance(one, Mapping) for one in found):
        raise ValueError(f"the detector gives {type(found).__name__}, not a list of {count} mappings, one an image")
    if missing := [name for name in wanted if name not in found[0]]:
        raise ValueError(f"the detector gives no {' and no '.join(missing)}: torchvision's give boxes, labels and scores")
    return [
        {name: one[name].detach().float().cpu() if name != "labels" else one[name].cpu() for name in wanted} for one in found
    ]
