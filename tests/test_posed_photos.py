"""Photos with poses: formats, lenses, placement, rays, and what is said of bad ones."""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from robust_pl.data import PosedPhotosDataModule
from robust_pl.data.cameras import Camera
from robust_pl.data.colmap import read_colmap
from robust_pl.data.placement import place
from robust_pl.data.transforms_json import read_transforms
from robust_pl.functional.lens import distort, undistort
from robust_pl.functional.viewpoints import camera_to_world
from robust_pl.scenes.renderer import pixel_rays

REAL = Path(os.environ.get("ROBUST_PL_DATA", "data")) / "multiview"
FOX = {"k1": 0.0578421, "k2": -0.0805099, "p1": -0.000980296, "p2": 0.00015575}
Scene = Callable[..., Path]


def ring(number: int, distance: float = 4.0) -> Tensor:
    """Poses around the origin, float64."""
    view = torch.zeros(number, 6, dtype=torch.float64)
    view[:, 1], view[:, 2], view[:, 3] = torch.linspace(-150, 150, number, dtype=torch.float64), 60.0, distance
    return camera_to_world(view)


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    """Writes a scene as NeRF's synthetic ones, of which every picture has a colour of its own; more changes its JSON."""

    def write(number: int = 6, size: tuple[int, int] = (8, 6), mode: str = "RGBA", **more: object) -> Path:
        folder = tmp_path / "scene"
        (folder / "train").mkdir(parents=True, exist_ok=True)
        frames = []
        for i, pose in enumerate(ring(number)):
            value = (10 * i, 20, 30, 128)[: len(mode)]
            Image.new(mode, size, value).save(folder / "train" / f"r_{i}.png")
            frames.append({"file_path": f"./train/r_{i}", "transform_matrix": pose.tolist()})
        content = {"camera_angle_x": math.radians(39.6), "frames": frames, **more}
        (folder / "transforms_train.json").write_text(json.dumps(content))
        return folder

    return write


def test_a_lens_is_undone() -> None:
    x, y = torch.meshgrid(*[torch.linspace(-0.7, 0.7, 41, dtype=torch.float64)] * 2, indexing="ij")
    back = distort(*undistort(x, y, **FOX), **FOX)
    torch.testing.assert_close(back, (x, y), atol=1e-9, rtol=0)
    one = distort(torch.tensor(0.5), torch.tensor(-0.2), 0.1, 0.01, 0.02, 0.03)
    radial = 1 + 0.1 * 0.29 + 0.01 * 0.29**2
    assert one[0].item() == pytest.approx(0.5 * radial + 2 * 0.02 * 0.5 * -0.2 + 0.03 * (0.29 + 2 * 0.25))
    assert one[1].item() == pytest.approx(-0.2 * radial + 0.02 * (0.29 + 2 * 0.04) + 2 * 0.03 * 0.5 * -0.2)
    with pytest.raises(ValueError, match="cannot be undone"):
        undistort(x, y, -2.0, 0.0, 0.0, 0.0)


def test_rays_of_a_pinhole_are_those_of_the_renderers(scene: Scene) -> None:
    data = PosedPhotosDataModule(str(scene()), hold_out=3)
    photo = data.held_out_rays[1]
    assert photo.key == 3 and photo.size == (6, 8)
    origin, direction = pixel_rays(data.poses[3:4].float(), (6, 8), 39.6)
    torch.testing.assert_close(photo.direction, direction.flatten(0, 2), atol=1e-6, rtol=0)
    torch.testing.assert_close(photo.origin, origin.expand(48, 3))
    alpha = 128 / 255
    torch.testing.assert_close(photo.alpha, torch.full((48,), alpha))
    torch.testing.assert_close(photo.rgb[0], alpha * torch.tensor([30.0, 20.0, 30.0]) / 255)


def test_rays_go_through_the_lens() -> None:
    camera = Camera(60, 80, 50.0, 52.0, 31.0, 39.0, **FOX)
    ray = camera.directions()[70, 5]
    x, y = distort(-ray[0] / ray[2], ray[1] / ray[2], **FOX)
    assert (50 * x + 31).item() == pytest.approx(5.5, abs=1e-6)
    assert (52 * y + 39).item() == pytest.approx(70.5, abs=1e-6)
    half = camera.resized(30, 40).directions()
    # A pixel of the half size lies in the middle of four.
    torch.testing.assert_close(half[20, 10], camera.directions()[40:42, 20:22].mean((0, 1)), atol=1e-3, rtol=0)


def test_every_nth_photo_is_held_out_and_downscaling_is_the_mean(scene: Scene) -> None:
    folder = scene(5)
    picture = Image.new("RGBA", (8, 6))
    picture.putpixel((0, 0), (255, 0, 0, 255))
    picture.putpixel((1, 1), (0, 255, 0, 255))
    picture.save(folder / "train" / "r_2.png")
    data = PosedPhotosDataModule(str(folder), hold_out=2, downscale=2)
    data.setup("fit")
    assert [rays.key for rays in data.train_rays] == [1, 3]
    assert [rays.key for rays in data.held_out_rays] == [0, 2, 4]
    photo = data.held_out_rays[1]
    assert photo.size == (3, 4)
    torch.testing.assert_close(photo.rgb[0], torch.tensor([0.25, 0.25, 0.0]))  # premultiplied by alpha
    torch.testing.assert_close(photo.alpha, torch.tensor([0.5] + 11 * [0.0]))


def test_batches_are_a_function_of_seed_and_step(scene: Scene) -> None:
    data = PosedPhotosDataModule(str(scene()), batch_size=64, steps_per_epoch=3, seed=5)
    loader = data.train_dataloader()
    first, *others = list(loader)
    assert len(loader) == 3 and len(others) == 2
    assert first.rgb.shape == first.origin.shape == first.direction.shape == (64, 3) and first.alpha.shape == (64,)
    assert torch.equal(loader.batch(0).direction, first.direction) and loader.batch(0).key == first.key
    assert not torch.equal(others[0].direction, first.direction)
    other = PosedPhotosDataModule(str(scene()), batch_size=64, steps_per_epoch=3, seed=6).train_dataloader()
    assert not torch.equal(other.batch(0).direction, first.direction)
    seen = torch.cat([loader.batch(step).rgb[:, 0] for step in range(20)]) / loader.alpha[0] * 255
    assert seen.round().unique().tolist() == [10, 20, 30, 40, 50]  # all photos but the first, which is held out


def test_placement_from_the_cameras() -> None:
    pose = ring(7, distance=2.5)
    turn = torch.tensor([[1.0, 0, 0], [0, 0, -1], [0, 1, 0]], dtype=torch.float64)  # up is -y there... of another world
    moved = pose.clone()
    moved[:, :3] = turn.T @ moved[:, :3]
    moved[:, :3, 3] += torch.tensor([5.0, -3.0, 2.0], dtype=torch.float64)
    placed = place(moved, "cameras", "cameras", "y" if (turn.T @ torch.tensor([0.0, 0, 1]).double())[1] > 0 else "-y")
    expected = ring(7, distance=4.0)
    torch.testing.assert_close(placed[:, :3, 3].norm(dim=1), torch.full((7,), 4.0, dtype=torch.float64))
    torch.testing.assert_close(placed[:, 2], expected[:, 2], atol=1e-9, rtol=0)  # heights, and what is up
    by_cameras = place(moved, "cameras", 1.6, "cameras")
    torch.testing.assert_close(by_cameras[:, :3, 3].mT.mean(1)[2], expected[:, 2, 3].mean(), atol=0.5, rtol=0)
    torch.testing.assert_close(torch.linalg.det(by_cameras[:, :3, :3]), torch.ones(7, dtype=torch.float64))
    upside_down = place(pose, (0.0, 0.0, 0.0), 1.0, "-z")
    torch.testing.assert_close(upside_down[:, 2, 3], -pose[:, 2, 3])
    with pytest.raises(ValueError, match="parallel"):
        place(pose[:1].expand(3, 4, 4), "cameras", 1.0, "z")


def quaternion(turn: Tensor) -> list[float]:
    """w, x, y, z of a rotation (3, 3): the eigenvector of Bar-Itzhack's matrix."""
    (a, b, c), (d, e, f), (g, h, i) = turn.tolist()
    matrix = torch.tensor(
        [
            [a + e + i, h - f, c - g, d - b],
            [h - f, a - e - i, b + d, c + g],
            [c - g, b + d, e - a - i, f + h],
            [d - b, c + g, f + h, i - a - e],
        ],
        dtype=torch.float64,
    )
    return torch.linalg.eigh(matrix).eigenvectors[:, -1].tolist()


CAMERAS = [
    (1, "SIMPLE_PINHOLE", 8, 6, [9.0, 4.0, 3.0]),
    (2, "PINHOLE", 8, 6, [9.0, 9.5, 4.0, 3.0]),
    (3, "SIMPLE_RADIAL", 8, 6, [9.0, 4.0, 3.0, 0.05]),
    (5, "OPENCV", 8, 6, [9.0, 9.5, 4.0, 3.0, *FOX.values()]),
]
NUMBERS = {"SIMPLE_PINHOLE": 0, "PINHOLE": 1, "SIMPLE_RADIAL": 2, "OPENCV": 4}


def colmap(folder: Path, binary: bool) -> None:
    """Four views of the ring, one from each kind of camera, in reverse order."""
    sparse = folder / "sparse" / "0"
    sparse.mkdir(parents=True)
    (folder / "images").mkdir()
    text, content = ["# of images"], struct.pack("<Q", 4)
    for i, (pose, (camera, *_)) in reversed(list(enumerate(zip(ring(4), CAMERAS, strict=True)))):
        Image.new("RGB", (8, 6), (i, 0, 0)).save(folder / "images" / f"a {i}.png")
        turn = (pose[:3, :3] * torch.tensor([1.0, -1.0, -1.0], dtype=torch.float64)).T
        numbers = [*quaternion(turn), *(-turn @ pose[:3, 3]).tolist()]
        text += [f"{i + 1} {' '.join(map(repr, numbers))} {camera} a {i}.png", "1.0 2.0 -1" if i % 2 else ""]
        content += struct.pack("<i7di", i + 1, *numbers, camera) + f"a {i}.png".encode() + b"\0"
        content += struct.pack("<Qddq", 1, 1.0, 2.0, -1) if i % 2 else struct.pack("<Q", 0)
    if binary:
        packed = [struct.pack(f"<iiQQ{len(n)}d", i, NUMBERS[m], w, h, *n) for i, m, w, h, n in CAMERAS]
        (sparse / "cameras.bin").write_bytes(struct.pack("<Q", 4) + b"".join(packed))
        (sparse / "images.bin").write_bytes(content)
    else:
        lines = [f"{i} {m} {w} {h} {' '.join(map(str, n))}" for i, m, w, h, n in CAMERAS]
        (sparse / "cameras.txt").write_text("\n".join(["# of cameras", *lines]) + "\n")
        (sparse / "images.txt").write_text("\n".join(text) + "\n")


@pytest.mark.parametrize("binary", [False, True])
def test_colmap(tmp_path: Path, binary: bool) -> None:
    colmap(tmp_path, binary)
    photos = read_colmap(tmp_path / "sparse" / "0", tmp_path / "images")
    assert [photo.file.name for photo in photos] == [f"a {i}.png" for i in range(4)]
    torch.testing.assert_close(torch.stack([photo.pose for photo in photos]), ring(4), atol=1e-9, rtol=0)
    cameras = [photo.camera for photo in photos]
    assert cameras == [
        Camera(8, 6, 9.0, 9.0, 4.0, 3.0),
        Camera(8, 6, 9.0, 9.5, 4.0, 3.0),
        Camera(8, 6, 9.0, 9.0, 4.0, 3.0, k1=0.05),
        Camera(8, 6, 9.0, 9.5, 4.0, 3.0, **FOX),
    ]
    data = PosedPhotosDataModule(str(tmp_path), scale=0.5, up="z")
    torch.testing.assert_close(data.poses[:, :3, 3], 0.5 * ring(4)[:, :3, 3], atol=1e-9, rtol=0)
    for name in ("a 1.png", "a 2.png"):
        (tmp_path / "images" / name).unlink()
    with pytest.raises(FileNotFoundError, match="lists 4 images and 2 are missing"):
        read_colmap(tmp_path / "sparse" / "0", tmp_path / "images")
    assert len(read_colmap(tmp_path / "sparse" / "0", tmp_path / "images", skip_missing=True)) == 2


def test_bad_colmap(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"cameras.txt does not exist"):
        read_colmap(tmp_path, tmp_path)
    (tmp_path / "images.txt").write_text("# nothing\n")
    (tmp_path / "cameras.txt").write_text("1 FISHEYE 8 6 1 2 3\n")
    with pytest.raises(ValueError, match="camera model FISHEYE is not read"):
        read_colmap(tmp_path, tmp_path)
    (tmp_path / "cameras.txt").write_text("1 PINHOLE 8 6 1 2 3\n")
    with pytest.raises(ValueError, match="PINHOLE has 4 numbers, not 3"):
        read_colmap(tmp_path, tmp_path)
    (tmp_path / "cameras.txt").write_text("1 PINHOLE 8 6 1 1 4 3\n")
    with pytest.raises(ValueError, match="no poses"):
        read_colmap(tmp_path, tmp_path)
    (tmp_path / "images.txt").write_text("1 1 0 0 0 0 0 0 7 a.png\n\n")
    with pytest.raises(ValueError, match="damaged"):
        read_colmap(tmp_path, tmp_path)
    (tmp_path / "images.bin").write_bytes(b"\1")
    (tmp_path / "cameras.bin").write_bytes(b"\1")
    with pytest.raises(ValueError, match="damaged"):
        read_colmap(tmp_path, tmp_path)


def test_missing_pictures(scene: Scene) -> None:
    folder = scene(6)
    for i in (1, 4):
        (folder / "train" / f"r_{i}.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"lists 6 frames and 2 of their pictures are missing, such as .*r_1.png"):
        PosedPhotosDataModule(str(folder)).setup("fit")
    assert len(PosedPhotosDataModule(str(folder), skip_missing=True).photos) == 4
    with pytest.raises(FileNotFoundError, match="does not exist"):
        PosedPhotosDataModule(str(folder / "nowhere")).setup("fit")
    with pytest.raises(FileNotFoundError, match="has no poses"):
        PosedPhotosDataModule(str(folder / "train")).setup("fit")


def test_bad_transforms(scene: Scene, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no poses"):
        PosedPhotosDataModule(str(scene(frames=[]))).setup("fit")
    with pytest.raises(ValueError, match="frame 0 has no pose"):
        PosedPhotosDataModule(str(scene(frames=[{"file_path": "a"}]))).setup("fit")
    with pytest.raises(ValueError, match="must be 4 x 4 finite"):
        bad = [{"file_path": "a", "transform_matrix": [[1, 0], [0, 1]]}]
        PosedPhotosDataModule(str(scene(frames=bad))).setup("fit")
    with pytest.raises(ValueError, match="how wide its camera sees"):
        PosedPhotosDataModule(str(scene(camera_angle_x=0.5, fl_y=3))).photos  # noqa: B018
        content = json.loads((tmp_path / "scene" / "transforms_train.json").read_text())
        del content["camera_angle_x"]
        (tmp_path / "scene" / "transforms_train.json").write_text(json.dumps(content))
        PosedPhotosDataModule(str(tmp_path / "scene")).setup("fit")
    with pytest.raises(ValueError, match="8 x 6 pixels, and its camera was calibrated for 16 x 12"):
        PosedPhotosDataModule(str(scene(fl_x=20.0, w=16, h=12))).setup("fit")
    with pytest.raises(ValueError, match="leaves nothing"):
        PosedPhotosDataModule(str(scene()), downscale=20).setup("fit")
    with pytest.raises(ValueError, match="has one photo"):
        PosedPhotosDataModule(str(scene(1))).setup("fit")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ValueError, match="is no JSON"):
        read_transforms(tmp_path / "broken.json")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"hold_out": 1}, "hold_out=1"),
        ({"downscale": 0}, "downscale=0"),
        ({"scale": 0.0}, "scale=0"),
        ({"batch_size": 0}, "batch"),
    ],
)
def test_bad_arguments(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PosedPhotosDataModule("scene", **arguments)  # type: ignore[arg-type]


@pytest.mark.skipif(not (REAL / "fox").is_dir(), reason="needs the fox in ROBUST_PL_DATA/multiview")
def test_the_fox() -> None:
    data = PosedPhotosDataModule("multiview/fox", downscale=10, center="cameras", scale="cameras")
    data.setup("fit")
    assert (len(data.train_rays), len(data.held_out_rays)) == (21, 4)
    assert data.held_out_rays[0].size == (48, 27) and data.held_out_rays[0].alpha.min() == 1
    assert data.poses[:, :3, 3].norm(dim=1).mean().item() == pytest.approx(4.0)
    assert data.poses[:, 2, 1].min() > 0.8  # phones were held upright


@pytest.mark.skipif(not (REAL / "lego").is_dir(), reason="needs lego in ROBUST_PL_DATA/multiview")
def test_lego() -> None:
    data = PosedPhotosDataModule("multiview/lego", downscale=4, hold_out=5)
    assert (len(data.train_rays), len(data.held_out_rays)) == (16, 4)
    assert data.held_out_rays[0].size == (50, 50) and data.held_out_rays[0].alpha.min() == 0
