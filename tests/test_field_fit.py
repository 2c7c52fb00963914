"""Fitting a radiance field: to views of a mesh, from the command line, and stopped in between."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from torch import nn
from torch.optim import Adam

from robust_pl.functional.viewpoints import camera_to_world
from robust_pl.methods import FieldFit
from robust_pl.methods.scenes.field_fit import _replace, total_variation
from robust_pl.scenes import MeshRasterizer, RadianceField, make_solid

CLI = Callable[..., None]
LAST = "checkpoints/last.ckpt"


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fit of 60 steps to 20 views of a solid with alpha, 32 pixels wide, in an empty working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ROBUST_PL_DATA", raising=False)
    view = torch.zeros(20, 6)
    view[:, 1] = torch.arange(20) * 137.5 % 360 - 180
    view[:, 2], view[:, 3] = torch.linspace(20, 85, 20)[torch.arange(20) * 7 % 20], 4.0
    pose = camera_to_world(view)
    seen = MeshRasterizer(make_solid("mug", 0), (32, 32), supersampling=3).render(pose)
    colors = seen.rgb / seen.alpha.clamp(min=1e-6)
    pixels = (torch.cat([colors, seen.alpha], 1).clamp(0, 1) * 255).round().byte()
    folder = tmp_path / "data" / "mug"
    folder.mkdir(parents=True)
    frames = []
    for i, (picture, matrix) in enumerate(zip(pixels, pose, strict=True)):
        Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy()).save(folder / f"r_{i}.png")
        frames.append({"file_path": f"./r_{i}", "transform_matrix": matrix.tolist()})
    (folder / "transforms_train.json").write_text(json.dumps({"camera_angle_x": math.radians(39.6), "frames": frames}))
    field = {"image_size": [32, 32], "resolution": 32, "samples": 40}
    settings = {
        "model": {
            "class_path": "FieldFit",
            "init_args": {
                "field": {"class_path": "RadianceField", "init_args": field},
                "schedule": {"class_path": "Cosine", "init_args": {"final_lr": 0.02}},
                "optimizer": {"class_path": "torch.optim.Adam", "init_args": {"lr": 0.2, "betas": [0.9, 0.99]}},
                "start_resolution": 16,
                "refine_at": [0.3, 0.6],
            },
        },
        "data": {
            "class_path": "PosedPhotosDataModule",
            "init_args": {"folder": "mug", "hold_out": 5, "batch_size": 512, "steps_per_epoch": 30},
        },
        "trainer": {"max_epochs": 2, "logger": False, "enable_progress_bar": False, "enable_model_summary": False},
    }
    path = tmp_path / "mug.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def test_fit_from_the_command_line(robust_pl: CLI, config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    robust_pl("fit", "-c", config)
    assert "Run folder: runs/mug" in capsys.readouterr().out
    best = Path("runs/mug/checkpoints/best.ckpt")
    field = RadianceField.load(best)
    assert field.resolution == 32 and field.image_size == (32, 32) and not field.density.requires_grad
    saved = torch.load(best, weights_only=True)
    states = [state for name, state in saved["callbacks"].items() if "val/psnr" in name]
    assert states[0]["best_model_score"] >= 24  # dB on the four views held out
    pose = camera_to_world(torch.tensor([[0.0, -180, 20, 4, 0, 0]]))  # the first of those
    photo = Image.open("data/mug/r_0.png").convert("RGBA")
    pixels = torch.frombuffer(bytearray(photo.tobytes()), dtype=torch.uint8).view(32, 32, 4).permute(2, 0, 1) / 255
    error = (field.render(pose).over(1.0)[0] - (pixels[:3] * pixels[3:] + 1 - pixels[3:])).square().mean()
    assert -10 * error.log10() >= 22
    with Image.open("runs/mug/images/held_out_epoch001.png") as sheet:
        assert sheet.size[0] % 64 == 0 and sheet.size[1] % 32 == 0
    robust_pl("test", "--ckpt_path", best)
    assert "test/psnr" in capsys.readouterr().out


def test_resumed_is_uninterrupted(robust_pl: CLI, config: Path) -> None:
    common = ("fit", "-c", config, "--run.save_every_n_steps", 3, "--data.init_args.batch_size", 64)
    quick = ("--data.init_args.steps_per_epoch", 5, "--model.init_args.refine_at", "[0.15,0.7]")
    robust_pl(*common, *quick, "--run.name", "whole")
    with pytest.raises(RuntimeError, match="crash"):
        robust_pl(*common, *quick, "--run.name", "stopped", "--trainer.callbacks+=tests.stopper.CrashAfterBatch")
    stopped = torch.load(f"runs/stopped/{LAST}", weights_only=True)
    assert stopped["global_step"] == 3 and stopped["radiance_field"]["resolution"] == 23
    robust_pl(*common, *quick, "--ckpt_path", f"runs/stopped/{LAST}")
    first, second = (torch.load(f"runs/{name}/{LAST}", weights_only=True) for name in ("whole", "stopped"))
    assert first["global_step"] == second["global_step"] == 10
    assert first["state_dict"]["field.density"].shape[2:] == (32, 32, 32)
    for name, value in first["state_dict"].items():
        assert torch.equal(value, second["state_dict"][name]), name


def test_what_does_not_go_together_is_said_in_one_line(
    robust_pl: CLI, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def complaint(*arguments: object) -> str:
        with pytest.raises(SystemExit) as stop:
            robust_pl("fit", "-c", config, *arguments)
        assert stop.value.code == 2
        return capsys.readouterr().err

    said = complaint("--data", "DigitsDataModule")
    assert "FieldFit cannot learn from data=robust_pl.data.DigitsDataModule" in said
    said = complaint("--model", "StandardTraining", "--model.init_args.net", "SmallCNN")
    assert "StandardTraining cannot learn from data=robust_pl.data.PosedPhotosDataModule" in said
    said = complaint("--data.init_args.folder", "cup")
    assert "cup does not exist" in said and "Traceback" not in said
    said = complaint("--trainer.accumulate_grad_batches", 2)
    assert "raise data.batch_size" in said
    (config.parent / "data" / "mug" / "r_3.png").unlink()
    assert "1 of their pictures are missing" in complaint()


def test_total_variation_by_hand() -> None:
    grid = torch.tensor([[[[[0.0, 1.0], [3.0, 7.0]], [[0.0, 1.0], [3.0, 7.0]]]]])
    assert total_variation(grid).item() == pytest.approx(0 + (9 + 36) / 2 + (1 + 16) / 2)


def test_the_optimizer_goes_on_with_other_parameters() -> None:
    old, new = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(5))
    optimizer = Adam([old], lr=0.1)
    old.sum().backward()
    optimizer.step()
    _replace(optimizer, [new])
    optimizer.zero_grad()
    new.sum().backward()
    optimizer.step()
    torch.testing.assert_close(new.detach(), torch.full((5,), 0.9))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tv_color": -1.0}, "tv_color=-1"),
        ({"start_resolution": 9}, "start_resolution=9 must lie between 2 and the field's 8"),
        ({"start_resolution": 4, "refine_at": (0.5, 0.2)}, "must rise"),
    ],
)
def test_bad_arguments(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FieldFit(RadianceField(resolution=8), **arguments)  # type: ignore[arg-type]
