"""COCO-O: reading, arithmetic, and mean average precision against pycocotools' own evaluation."""

from __future__ import annotations

import importlib.util
import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from robust_pl.data.coco_files import CocoFiles
from robust_pl.evaluation.coco_o import DOMAINS, CocoO, evaluate_coco_o, mean_average_precision, new_metric

SIZE = (40, 60)


def write(folder: Path, boxes: dict[int, list[tuple[int, list[float]]]]) -> None:
    """Images whose red value is their number, and boxes (category, [left, top, width, height]) of each."""
    (folder / "val2017").mkdir(parents=True)
    (folder / "annotations").mkdir()
    images, annotations = [], []
    for number, its in boxes.items():
        Image.new("RGB", SIZE[::-1], (number, 0, 0)).save(folder / "val2017" / f"{number:012}.png")
        images.append({"id": number, "file_name": f"{number:012}.png", "height": SIZE[0], "width": SIZE[1]})
        for category, box in its:
            known = {"image_id": number, "category_id": category, "bbox": box, "area": box[2] * box[3], "iscrowd": 0}
            annotations.append({"id": len(annotations) + 1, **known})
    categories = [{"id": i, "name": str(i)} for i in range(1, 91)]
    content = {"images": images[::-1], "annotations": annotations, "categories": categories}
    (folder / "annotations" / "instances_val2017.json").write_text(json.dumps(content))


BOXES: dict[int, list[tuple[int, list[float]]]] = {
    3: [(1, [2, 3, 20, 10]), (17, [10, 12, 30, 20])],
    5: [(1, [0, 0, 12, 30])],
    8: [],
}


class Sees(nn.Module):
    """Knows the boxes by the red value; shifts those of category 1 by ``off`` pixels and sees one that is not there."""

    def __init__(self, off: float = 0.0, ghost: bool = False) -> None:
        super().__init__()
        self.off, self.ghost = off, ghost
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        assert not self.training and all(image.shape == (3, *SIZE) for image in images)
        return [self.look(round(image[0, 0, 0].item() * 255)) for image in images]

    def look(self, number: int) -> dict[str, Tensor]:
        rows = [[x + self.off * (c == 1), y, x + w + self.off * (c == 1), y + h] for c, (x, y, w, h) in BOXES[number]]
        labels, scores = [c for c, _ in BOXES[number]], [0.9 - 0.1 * i for i in range(len(rows))]
        if self.ghost:
            rows, labels, scores = [*rows, [30.0, 20.0, 50.0, 35.0]], [*labels, 17], [*scores, 0.95]
        return {"boxes": torch.tensor(rows).view(-1, 4), "labels": torch.tensor(labels).long(), "scores": torch.tensor(scores)}


@pytest.fixture
def metric(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no torchvision, a stand-in for the one function of it that torchmetrics calls; all else is real."""
    pytest.importorskip("pycocotools")
    if importlib.util.find_spec("torchvision") is not None:
        return
    from torchmetrics.detection import mean_ap

    def box_convert(boxes: Tensor, in_fmt: str, out_fmt: str) -> Tensor:
        assert (in_fmt, out_fmt) == ("xyxy", "xywh")
        return torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1)

    ops = types.ModuleType("torchvision.ops")
    ops.box_convert = box_convert
    monkeypatch.setitem(sys.modules, "torchvision", types.ModuleType("torchvision"))
    monkeypatch.setitem(sys.modules, "torchvision.ops", ops)
    monkeypatch.setattr(mean_ap, "_TORCHVISION_AVAILABLE", True)


def official(folder: Path, detector: Sees) -> float:
    """What pycocotools says of the same files and boxes."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    truth = COCO(str(folder / "annotations" / "instances_val2017.json"))
    results: list[dict[str, Any]] = []
    for number in BOXES:
        found = detector.look(number)
        for box, label, score in zip(found["boxes"].tolist(), found["labels"].tolist(), found["scores"].tolist(), strict=True):
            size = [box[0], box[1], box[2] - box[0], box[3] - box[1]]
            results.append({"image_id": number, "category_id": label, "bbox": size, "score": score})
    run = COCOeval(truth, truth.loadRes(results), "bbox")
    run.evaluate()
    run.accumulate()
    run.summarize()
    return float(run.stats[0])


@pytest.mark.parametrize(("off", "ghost"), [(0.0, False), (2.0, False), (0.0, True), (2.5, True)])
def test_precision_is_that_of_pycocotools(tmp_path: Path, metric: None, off: float, ghost: bool) -> None:
    write(tmp_path / "sketch", BOXES)
    detector = Sees(off, ghost).train()
    found = mean_average_precision(detector, CocoFiles(tmp_path / "sketch"), batch_size=2)
    assert found == pytest.approx(official(tmp_path / "sketch", detector), abs=1e-6) and detector.training
    assert (found == pytest.approx(1)) == (not off and not ghost)


def test_domains_mean_and_effective_robustness(tmp_path: Path, metric: None) -> None:
    for domain in ("sketch", "cartoon"):
        write(tmp_path / domain, BOXES)
    write(tmp_path / "coco", BOXES)
    found = evaluate_coco_o(Sees(2.0), tmp_path, coco=tmp_path / "coco", domains=["sketch", "cartoon"])
    assert found.domains["sketch"] == found.domains["cartoon"] == found.mean == found.coco
    assert found.effective == pytest.approx(0.55 * found.mean) and found.relative_drop == pytest.approx(0)
    with pytest.raises(FileNotFoundError, match=r"painting/annotations/instances_val2017\.json does not exist"):
        evaluate_coco_o(Sees(), tmp_path)
    with pytest.raises(ValueError, match=r"coco=64\.3 is no mean average precision: give it as a share"):
        evaluate_coco_o(Sees(), tmp_path, coco=64.3)
    with pytest.raises(ValueError, match="domains is empty: name at least one of sketch"):
        evaluate_coco_o(Sees(), tmp_path, domains=[])


def test_what_is_no_detector_is_refused(tmp_path: Path, metric: None) -> None:
    write(tmp_path, BOXES)
    files = CocoFiles(tmp_path)
    with pytest.raises(ValueError, match="the detector gives list, not a list of 3 mappings"):
        mean_average_precision(nn.Identity(), files)

    class Boxes(nn.Module):
        def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
            return [{"boxes": torch.zeros(0, 4)} for _ in images]

    with pytest.raises(ValueError, match="the detector gives no labels and no scores"):
        mean_average_precision(Boxes(), files)
    write(tmp_path / "empty", {8: []})
    with pytest.raises(ValueError, match="has no box: there is nothing to detect"):
        mean_average_precision(Sees(), CocoFiles(tmp_path / "empty"))


def test_arithmetic() -> None:
    """EVA of the public leaderboard: 57.8 on COCO-O and 64.3 on COCO leave 28.9."""
    found = CocoO(dict.fromkeys(DOMAINS, 0.578), 0.643)
    assert found.effective == pytest.approx(0.2887, abs=1e-4) and found.relative_drop == pytest.approx(0.1011, abs=1e-4)
    # Each domain counts alike, however many images it has.
    found = CocoO({"sketch": 0.2, "tattoo": 0.4})
    assert found.mean == pytest.approx(0.3) and found.effective is None and found.relative_drop is None
    record = CocoO({"sketch": 0.2, "tattoo": 0.4}, 0.5).record()
    assert record.figures == pytest.approx({"map": 0.3, "map_coco": 0.5, "effective": 0.075, "relative_drop": 0.4})
    assert record.sheets[0].rows[-1] == ["COCO", 0.5] and CocoO({"sketch": 0.1}, 0.0).relative_drop is None


def test_files(tmp_path: Path) -> None:
    write(tmp_path, BOXES)
    files = CocoFiles(tmp_path)
    assert len(files) == 3 and [target["image_id"].item() for target in files.targets] == [3, 5, 8]
    image, target = files[0]
    assert image.shape == (3, *SIZE) and image[0, 0, 0].item() == pytest.approx(3 / 255)
    assert target["boxes"].tolist() == [[2, 3, 22, 13], [10, 12, 40, 32]] and target["labels"].tolist() == [1, 17]
    assert files[2][1]["boxes"].shape == (0, 4)
    Image.new("RGB", (7, 7)).save(tmp_path / "val2017" / f"{3:012}.png")
    with pytest.raises(ValueError, match="is an image of 7 x 7 pixels and its boxes are for 60 x 40"):
        files[0]
    (tmp_path / "val2017" / f"{5:012}.png").write_bytes(b"\x89PNG")
    with pytest.raises(ValueError, match="cannot be read as an image"):
        files[1]
    (tmp_path / "val2017" / f"{8:012}.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of 3 images of .* are missing, such as .*000000000008\.png"):
        CocoFiles(tmp_path)
    (tmp_path / "annotations" / "instances_val2017.json").write_text('{"images": []}')
    with pytest.raises(ValueError, match=r"is not of COCO's form \(KeyError: 'annotations'\): unpack"):
        CocoFiles(tmp_path)


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchmetrics.detection.mean_ap", None)
    with pytest.raises(ImportError, match=r"install them with: pip install robust_pl\[detection\]") as caught:
        new_metric()
    assert "\n" not in str(caught.value)
