"""Shape or texture: decisions by hand, cue-conflict files, and procedural cue conflicts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from PIL import Image
from torch import Tensor, nn

from robust_pl.callbacks import RobustEvaluation, ShapeBias
from robust_pl.data import CueConflictDataModule, CueConflictSolidsDataModule, DigitsDataModule
from robust_pl.data.label_maps import sixteen_classes
from robust_pl.functional.cue_conflict import CueDecisions, count_decisions
from robust_pl.methods import StandardTraining
from robust_pl.methods.schedules import OneCycle
from robust_pl.nets import SmallCNN
from robust_pl.report import Record
from robust_pl.scenes import SOLIDS
from robust_pl.scenes.paint import class_picture

SIXTEEN = list(sixteen_classes())


def test_decisions_by_hand() -> None:
    prediction = torch.tensor([0, 1, 2, 0, 1, 1])
    shape = torch.tensor([0, 0, 0, 0, 1, 2])
    texture = torch.tensor([1, 1, 1, 0, 2, 0])
    # Shape, texture, neither, no conflict, shape, neither.
    found = count_decisions(prediction, shape, texture)
    assert found == CueDecisions(2, 1, 5) and found.shape_bias == 2 / 3 and found.decided == 3 / 5
    assert CueDecisions(0, 0, 4).shape_bias is None and CueDecisions(0, 0, 0).decided is None


class Says(nn.Module):
    """Says the class that the first pixel holds."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.classes = classes

    def forward(self, x: Tensor) -> Tensor:
        said = (x[:, 0, 0, 0] * 255).round().long()
        return nn.functional.one_hot(said, self.classes).float()


def test_analysis_as_a_callable() -> None:
    x = torch.tensor([0, 1, 2, 0, 1, 1]).view(-1, 1, 1, 1) / 255
    shape = torch.tensor([0, 0, 0, 0, 1, 2])
    record = ShapeBias(textures=[1, 1, 1, 0, 2, 0])(Says(3), [(x[:4], shape[:4]), (x[4:], shape[4:])])
    assert record.figures == pytest.approx({"bias": 2 / 3, "decided": 0.6, "shape": 0.4, "texture": 0.2})
    assert record.sheets[0].rows == [["0", 1 / 3, 1 / 3, 0.5], ["1", 1.0, 0.0, 1.0], ["2", 0.0, 0.0, None]]
    assert record.about["forwards_per_sample"] == 1
    none = ShapeBias(textures=[1, 0])(Says(3), [(torch.full((2, 1, 1, 1), 2 / 255), torch.tensor([0, 1]))])
    assert "bias" not in none.figures and none.figures["decided"] == 0 and none.notes
    assert Record.read is not None and "NaN" not in none.as_json()


def test_refusals() -> None:
    batch = [(torch.zeros(2, 1, 1, 1), torch.tensor([0, 1]))]
    with pytest.raises(ValueError, match="the data cannot tell the textures of its images, which ShapeBias needs: test on Cue"):
        ShapeBias()(Says(2), batch)
    with pytest.raises(ValueError, match="there are 1 textures and an image at position 1"):
        ShapeBias(textures=[1])(Says(2), batch)
    with pytest.raises(ValueError, match="no image has a shape and a texture of different classes"):
        ShapeBias(textures=[0, 1])(Says(2), batch)
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, callbacks=[ShapeBias()])
    with pytest.raises(ValueError, match="DigitsDataModule cannot tell the textures"):
        trainer.test(StandardTraining(nn.Sequential(nn.Flatten(), nn.Linear(64, 10))), DigitsDataModule(), verbose=False)


def picture(path: Path, value: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (6, 6), (value, 0, 0)).save(path)


class Likely(nn.Module):
    """The class of ImageNet of the first pixel's place among the sixteen is likely; all dogs together are a little likely."""

    def forward(self, x: Tensor) -> Tensor:
        said = (x[:, 0, 0, 0] * 255).round().long()
        p = torch.full((len(x), 1000), 1e-6)
        p[:, sixteen_classes()["dog"]] = 0.008
        p[torch.arange(len(x)), torch.tensor([group[0] for group in sixteen_classes().values()])[said]] = 0.1
        return p.log()


def test_cue_conflict_files(tmp_path: Path) -> None:
    number = {name: place for place, name in enumerate(SIXTEEN)}
    root = tmp_path / "cue-conflict"
    picture(root / "airplane" / "airplane1-bear2.png", number["airplane"])
    picture(root / "airplane" / "airplane2-airplane3.png", number["airplane"])
    picture(root / "cat" / "0001_s5n_s01_0_cat_00_cat7-dog12.png", number["dog"])
    picture(root / "truck3-oven1.png", number["bird"])
    data = CueConflictDataModule(str(tmp_path), num_workers=0, image_size=4, resize=4)
    _, labels = data.test_set.read(torch.arange(3), None)
    assert [SIXTEEN[i] for i in labels] == ["truck", "airplane", "cat"]
    assert [SIXTEEN[i] for i in data.test_textures] == ["oven", "bear", "dog"]
    assert (data.num_classes, data.net_classes) == (16, 1000)

    analysis = ShapeBias()
    options = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(default_root_dir=tmp_path, accelerator="cpu", callbacks=[analysis, RobustEvaluation()], **options)
    (figures,) = trainer.test(StandardTraining(Likely(), num_classes=1000), data, verbose=False)
    # One by shape, one by texture, one by neither. All dogs together are more likely than any other class; their mean is not.
    assert figures["test/shapebias_bias"] == 0.5
    assert figures["test/shapebias_decided"] == pytest.approx(2 / 3) and figures["test/acc_clean"] == pytest.approx(1 / 3)
    assert Record.read(tmp_path / "analysis" / "test" / "shapebias.json") == analysis.record
    assert [row[0] for row in analysis.record.sheets[0].rows] == ["airplane", "cat", "truck"]


def test_cue_conflict_bad_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds no images .* folder of the cue-conflict images, such as airplane"):
        CueConflictDataModule(str(tmp_path)).setup("test")
    picture(tmp_path / "airplane1-airplane2.png", 0)
    with pytest.raises(ValueError, match=r"all 1 images in .* have shape and texture of one class"):
        CueConflictDataModule(str(tmp_path)).setup("test")
    for name in ("zebra1-bear2.png", "bear.png", "bear1-cat2-dog3.png"):
        picture(tmp_path / name, 0)
        with pytest.raises(ValueError, match=rf"{name} does not say two of the sixteen classes in its name: expected <shape>"):
            CueConflictDataModule(str(tmp_path)).setup("test")
        (tmp_path / name).unlink()


# Solids ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def solids() -> CueConflictSolidsDataModule:
    return CueConflictSolidsDataModule(
        image_size=16, train_objects=2, val_objects=1, test_objects=1, views_per_object=2, eval_batch_size=90
    )


def test_solids_train_without_and_test_with_conflict(solids: CueConflictSolidsDataModule) -> None:
    assert len(solids.train_set) == 10 * 3 * 2 and [len(part) for part in solids.split] == [40, 20]
    _, shape = solids.test_set.read(torch.arange(180), None)
    texture = solids.test_textures
    pairs = torch.stack([shape, texture], 1).unique(dim=0)
    assert len(pairs) == 90 and (shape != texture).all() and solids.class_groups is None
    assert len(set(solids.object_ids("test"))) == 90 and solids.object_ids("train")[0] == "box_in_box_train_0"
    assert len(torch.cat([solids.object_keys(part) for part in ("train", "val", "test")]).unique()) == 120


def test_solids_wear_the_texture_that_is_told(solids: CueConflictSolidsDataModule) -> None:
    """The hue of most pixels of an image is that of the texture, not that of the shape's own class."""
    pictures = torch.stack([class_picture(i, len(SOLIDS)).flatten(0, 1).mean(0) for i in range(len(SOLIDS))])
    assert torch.cdist(pictures, pictures).fill_diagonal_(1).min() > 0.05
    x, shape = solids.test_set.read(torch.arange(180), None)
    seen = (x < 0.999).any(1, keepdim=True)
    mean = (x * seen).sum((2, 3)) / seen.sum((2, 3))
    nearest = (1 - nn.functional.cosine_similarity(mean.unsqueeze(1), pictures, dim=2)).argmin(1)
    right = (nearest == solids.test_textures).double().mean().item()
    assert right > 0.7 and (nearest == shape).double().mean().item() < 0.15


def test_solids_refuse_bad_numbers() -> None:
    for name, value in (("train_objects", 0), ("val_objects", -1), ("test_objects", 0)):
        with pytest.raises(ValueError, match=f"{name} must be at least"):
            CueConflictSolidsDataModule(**{name: value})


@pytest.mark.slow
def test_a_network_learns_the_easier_cue(tmp_path: Path) -> None:
    """Trained on both cues, a small network goes by texture."""
    torch.manual_seed(0)
    data = CueConflictSolidsDataModule(
        batch_size=32, image_size=24, train_objects=6, val_objects=0, views_per_object=10, eval_batch_size=300
    )
    analysis = ShapeBias()
    options = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = Trainer(default_root_dir=tmp_path, accelerator="cpu", max_epochs=12, callbacks=[analysis], **options)
    method = StandardTraining(SmallCNN(in_channels=3, width=16), schedule=OneCycle())
    trainer.fit(method, data)
    (figures,) = trainer.test(method, data, verbose=False)
    assert figures["test/shapebias_decided"] > 0.5 and figures["test/shapebias_bias"] < 0.5
