"""Objects from the user's own files: meshes and fitted fields, found, split, rendered, attacked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import trimesh

from robust_pl.callbacks import ViewFool
from robust_pl.data import SceneFilesDataModule
from robust_pl.nets import SmallCNN
from robust_pl.scenes import MeshRasterizer, RadianceField, ViewSpace

CLI = Callable[..., Any]
SMALL = {"image_size": 16, "views_per_object": 3, "batch_size": 4}


def files(root: Path, objects: int = 3) -> Path:
    """Boxes and balls; one box lies in a folder of its own, one ball is a field."""
    for kind, shape in (("ball", trimesh.creation.icosphere(1)), ("crate", trimesh.creation.box((1, 2, 3)))):
        (root / kind).mkdir(parents=True)
        for number in range(objects):
            shape.export(root / kind / f"{number}.ply")
    (root / "crate" / "2.5").mkdir()
    (root / "crate" / "2.ply").rename(root / "crate" / "2.5" / "model.ply")
    (root / "crate" / "2.5" / "notes.txt").write_text("beside it")
    (root / "ball" / "2.ply").unlink()
    field = RadianceField(resolution=6, samples=8, low=(-0.5,) * 3, high=(0.5,) * 3)
    torch.nn.init.constant_(field.density, 3.0)
    field.save(root / "ball" / "2.ckpt")
    return root


def module(root: Path, **arguments: Any) -> SceneFilesDataModule:
    return SceneFilesDataModule(str(root), **{**SMALL, **arguments})


def test_meshes_and_fields_are_split_by_object_and_rendered(tmp_path: Path) -> None:
    data = module(files(tmp_path), val_objects=1, test_objects=1, held_out="last")
    data.setup("fit")
    data.setup("test")
    assert data.class_names == ["ball", "crate"] and data.num_classes == 2
    assert data.train_scenes.ids == ["ball/0", "crate/0"] and data.val_scenes.ids == ["ball/1", "crate/1"]
    assert data.test_scenes.ids == ["ball/2", "crate/2.5"] and data.test_scenes.labels.tolist() == [0, 1]
    kinds = [type(renderer) for renderer in data.test_scenes.renderers]
    assert kinds == [RadianceField, MeshRasterizer] and {r.image_size for r in data.test_scenes.renderers} == {(16, 16)}
    assert data.train_scenes.renderers[1].radius == pytest.approx(1.0)
    x, y = data.test_set.read(torch.arange(6), None)
    assert y.tolist() == [0, 0, 0, 1, 1, 1] and ((x < 1).flatten(1).float().mean(1) > 0.05).all()  # something is seen
    images = data.test_scenes.images(data.test_metadata.object, data.test_metadata.pose)
    assert (x - images.detach()).abs().max() <= 0.5 / 255 + 1e-6
    assert [len(part) for part in data.split] == [6, 6]


def test_views_belong_to_the_object_and_a_split_is_that_of_folders_of_images(tmp_path: Path) -> None:
    files(tmp_path, 3)
    one, other = (module(tmp_path, val_objects=1, test_objects=1, seed=seed) for seed in (0, 5))
    assert one.test_scenes.ids == other.test_scenes.ids
    whole = module(tmp_path, test_objects="all")
    pose = {name: whole.test_metadata.pose[3 * i : 3 * i + 3] for i, name in enumerate(whole.test_metadata.object_ids)}
    assert len(pose) == 6
    for i, name in enumerate(one.test_metadata.object_ids):
        assert torch.equal(one.test_metadata.pose[3 * i : 3 * i + 3], pose[name])


def test_attacks_see_them_with_the_classes_of_a_network(tmp_path: Path) -> None:
    data = module(files(tmp_path), test_objects="all", classes=["apple", "crate", "ball"])
    assert data.test_scenes.labels.tolist() == [2, 2, 2, 1, 1, 1]
    torch.manual_seed(0)
    found = ViewFool(5, 2, eval_samples=4)(SmallCNN(3, 3, 2), data.test_scenes, space=data.view_space)
    assert found.ids == data.test_scenes.ids and found.loss.isfinite().all()
    with pytest.raises(ValueError, match="test_objects=all leaves no object to train on"):
        data.setup("fit")


def test_bad_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist or holds no objects: set data_dir"):
        module(tmp_path / "none").setup("test")
    files(tmp_path)
    with pytest.raises(ValueError, match="class 'ball' has 3 objects, of which val_objects=1 and test_objects=2"):
        module(tmp_path, val_objects=1, test_objects=2).setup("test")
    with pytest.raises(ValueError, match="the objects of 'ball' have no class: it is not among classes"):
        module(tmp_path, classes=["crate"]).setup("test")
    with pytest.raises(ValueError, match=r"r begins at 0\.5 and the object 'ball/0' reaches 1 "):
        module(tmp_path, test_objects="all", view_space=ViewSpace(r=(0.5, 5))).setup("test")
    with pytest.raises(ValueError, match=r"test_objects=1\.5 must be a fraction"):
        module(tmp_path, test_objects=1.5)
    (tmp_path / "ball" / "0.obj").write_text("v 0 0 0\n")
    with pytest.raises(ValueError, match=r"the object ball/0 is there twice, as 0\.obj and 0\.ply: remove one"):
        module(tmp_path).setup("test")
    (tmp_path / "ball" / "0.ply").unlink()
    with pytest.raises(ValueError, match=r"0\.obj.*has no faces"):
        module(tmp_path, test_objects="all").setup("test")
    (tmp_path / "ball" / "0.obj").rename(tmp_path / "cow.obj")
    with pytest.raises(ValueError, match=r"the object 'cow\.obj' has no class: put it into a folder of its class"):
        module(tmp_path).setup("test")


CONFIG = """
model:
  class_path: VIAT
  init_args:
    net: {class_path: SmallCNN, init_args: {width: 4}}
    search: {class_path: GMVFool, init_args: {components: 1, popsize: 3, iterations: 1}}
    warm_iterations: 1
    renders: 2
data:
  class_path: SceneFilesDataModule
  init_args: {data_dir: objects, image_size: 16, views_per_object: 3, batch_size: 4, val_objects: 1, test_objects: 1}
trainer:
  max_epochs: 2
  logger: false
  callbacks:
    - {class_path: ViewFool, init_args: {popsize: 3, iterations: 1, eval_samples: 3}}
"""


@pytest.mark.slow
def test_trained_and_attacked_from_the_command_line(
    robust_pl: CLI, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    files(tmp_path / "objects")
    Path("own.yaml").write_text(CONFIG)
    robust_pl("fit", "-c", "own.yaml")
    robust_pl("test", "--ckpt_path", "runs/own/checkpoints/best.ckpt", "--data.test_objects", "all")
    assert "test: viewpoints of 6 objects" in capsys.readouterr().out
    assert len(list(Path("runs/own/viewpoints/test_viewfool/views").glob("*/*.png"))) == 18
