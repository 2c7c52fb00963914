"""Reports of viewpoints: the view sphere, contact sheets, turntables, and what a test with scenes writes."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from robust_pl.callbacks import GMVFool, ViewFool, ViewSphere
from robust_pl.callbacks.viewpoints.distribution import UniformViews, ViewDistribution
from robust_pl.callbacks.viewpoints.places import places_of
from robust_pl.cli import main
from robust_pl.functional.viewpoints import azimuth_and_elevation
from robust_pl.report import ViewBins, draw_contact_sheet, mixture_components, plot_view_sphere, write_turntable
from robust_pl.report.view_components import Component
from robust_pl.report.view_sphere import _unbroken, describe_bins
from robust_pl.scenes import Mesh, MeshRasterizer, RadianceField, SceneSet, Views, ViewSpace, make_solid
from robust_pl.scenes.orbit import distance_to_see, orbit

from .view_landscape import FailsNear, PosePhoto, photos

# Bins ----------------------------------------------------------------------------------------------------------------


def test_bins_by_hand() -> None:
    bins = ViewBins.count([-180, -151, -150, 180, 0, 1], [-90, -76, -90, 90, 0, 14.9], [1, 0, 1, 1, 0, 0])
    assert bins.total.shape == (12, 12) and bins.total.sum() == 6
    assert (bins.total[0, 0], bins.right[0, 0]) == (2, 1)  # an edge belongs to the field above it
    assert (bins.total[0, 1], bins.right[0, 1]) == (1, 1)
    assert (bins.total[11, 11], bins.right[11, 11]) == (1, 1)  # but for the last one
    assert (bins.total[6, 6], bins.right[6, 6]) == (2, 0)
    assert bins.covered == 4 and bins.worst == (6, 6)
    assert np.isnan(bins.accuracy).sum() == 140 and bins.accuracy[0, 0] == 0.5
    pole, equator = 1 - math.sin(math.radians(75)), math.sin(math.radians(15))
    assert bins.mean == pytest.approx(pole * (0.5 + 1 + 1) / (3 * pole + equator))
    rows = list(bins.rows())
    assert len(rows) == 144 and rows[0][:7] == (-180, -150, -90, -75, 2, 1, 0.5) and rows[0][7] < 0.5 < rows[0][8]
    assert rows[2][4:] == (0, 0, "", "", "")
    assert "4 of 144 fields with 1 to 2 views" in describe_bins(bins) and "azimuth 0 to 30" in describe_bins(bins)


def test_bins_of_a_part_and_of_nothing() -> None:
    bins = ViewBins.count([-90, 90, 90], [10, 59, -5], [True, False, False], 2, 3, (0, 60))
    assert bins.total.tolist() == [[1, 0], [0, 0], [0, 1]] and bins.elevation.tolist() == [0, 20, 40, 60]
    nothing = ViewBins.count([], [], [])
    assert nothing.covered == 0 and math.isnan(nothing.mean) and describe_bins(nothing) == "No view."
    with pytest.raises(ValueError, match="no view was counted"):
        _ = nothing.worst
    with pytest.raises(ValueError, match="2, 1, 1 azimuths, elevations and verdicts"):
        ViewBins.count([0, 1], [0], [1])
    with pytest.raises(ValueError, match="fields at elevations"):
        ViewBins.count([0], [0], [1], elevations=(30, 20))


def test_the_worst_of_equal_fields_is_that_of_most_views() -> None:
    bins = ViewBins.count([5, 35, 35, 65], [1, 1, 1, 1], [0, 0, 0, 1])
    assert bins.worst == (6, 7)


# Components ----------------------------------------------------------------------------------------------------------


def test_ellipses_by_hand() -> None:
    """Where only azimuth and elevation move, a little, half axes are sigma times the slopes of both mappings."""
    space = ViewSpace(phi=(0, 90), active=("theta", "phi"))
    mean, sigma = torch.tensor([[[0.5, 0.3]]]), torch.tensor([[[0.01, 0.03]]])
    (place,) = mixture_components(torch.ones(1, 1), mean, sigma, space, samples=20_000)
    theta, phi = 180 * math.tanh(0.5), 45 * math.tanh(0.3) + 45
    assert place.azimuth == pytest.approx(theta - 90, abs=1e-3) and place.elevation == pytest.approx(90 - phi, abs=1e-3)
    assert place.weight == 1.0 and place.outline is not None
    away = place.outline - [place.azimuth, place.elevation]
    wide = 0.01 * 180 * (1 - math.tanh(0.5) ** 2)
    high = 0.03 * 45 * (1 - math.tanh(0.3) ** 2)
    assert np.abs(away).max(0) == pytest.approx([wide, high], rel=0.03)
    np.testing.assert_allclose((away[:, 0] / wide) ** 2 + (away[:, 1] / high) ** 2, 1, atol=0.12)
    np.testing.assert_allclose(place.outline[0], place.outline[-1], atol=1e-9)


def test_ellipses_at_the_pole_and_across_the_seam() -> None:
    space = ViewSpace(phi=(-80, 80))
    mean = torch.zeros(2, 2, 6)
    mean[1, 0, 1:3] = torch.tensor([-0.55, 0.8])  # theta near -90, so azimuth near 180
    places = mixture_components(torch.tensor([[0.3, 0.7], [0.5, 0.5]]), mean, torch.full_like(mean, 0.1), space)
    assert [place.weight for place in places] == pytest.approx([0.3, 0.7, 0.5, 0.5])
    assert places[0].elevation == pytest.approx(90) and np.isfinite(places[0].outline).all()
    assert np.isnan(_unbroken(places[2].outline)).any(1).sum() == 2  # leaves the map, and comes back
    assert not np.isnan(_unbroken(np.array([[10.0, 0], [20, 5], [10, 0]]))).any()


def test_places_of_what_was_found() -> None:
    mean, sigma = torch.zeros(2, 3, 6), torch.full((2, 3, 6), 0.1)
    joint = ViewDistribution(torch.full((2, 3), 1 / 3), mean, sigma, ViewSpace(), ["a", "b"])
    assert len(places_of(joint)) == 6
    each = ViewDistribution(torch.full((2, 3, 6), 1 / 3), mean, sigma, ViewSpace(), ["a", "b"], "per_dim")
    assert len(places_of(each)) == 40 and all(place.outline is None for place in places_of(each))
    assert places_of(UniformViews(ViewSpace(), ["a"])) == []
    grid = ViewDistribution(torch.full((1, 31), 1 / 31), torch.zeros(1, 31, 6), torch.full((1, 31, 6), 0.1), ViewSpace(), ["a"])
    assert places_of(grid) == []


def test_the_map_leaves_empty_fields_white_and_marks_those_of_few_views() -> None:
    bins = ViewBins.count([0] * 6 + [40], [0] * 7, [1, 1, 1, 0, 0, 0, 1])
    figure = plot_view_sphere(bins, {"found": [Component(10, 20, 1.0, np.array([[0.0, 0], [5, 5], [0, 0]]))], "none": []})
    axes = figure.axes[0]
    drawn = axes.collections[0].get_array().reshape(72, 72)
    assert (~drawn.mask).sum() == 2 * 36 and set(drawn.compressed().tolist()) == {50.0, 100.0}
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["fewer than 5 views", "found"]
    few = ViewBins.count([0], [0], [1])
    assert plot_view_sphere(few).axes[0].get_legend() is None  # where all are few, no mark tells anything


# Pictures ------------------------------------------------------------------------------------------------------------


def test_contact_sheet() -> None:
    images = [torch.full((3, 16, 16), 0.5), torch.zeros(3, 300, 150), torch.zeros(1, 8, 8)]
    sheet = draw_contact_sheet(images, [[("one", True)], [("two", False)], []], columns=2)
    assert sheet.size == (10 + 2 * 154, 10 + 2 * (288 + 4 + 15 + 10))
    pixels = np.asarray(sheet)
    assert (pixels[80, 80] == 128).all() and (pixels[200, 240] == 0).all()
    assert (pixels == [192, 0, 0]).all(-1).any()  # what is wrong is red
    with pytest.raises(ValueError, match="0 images and 0 captions"):
        draw_contact_sheet([], [])


# Cameras and films ---------------------------------------------------------------------------------------------------


def test_orbit_stands_where_it_is_asked_upright() -> None:
    azimuth, elevation = torch.tensor([-170.0, 0, 33, 180]), torch.tensor([-80.0, 0, 60, 15])
    pose = orbit(azimuth, elevation, 3.0)
    found = azimuth_and_elevation(pose)
    torch.testing.assert_close(found[1], elevation, atol=1e-3, rtol=0)
    assert ((found[0] - azimuth + 180) % 360 - 180).abs().max() < 1e-3
    torch.testing.assert_close(pose[:, :3, 3], 3 * pose[:, :3, 2])  # the origin is in the middle
    assert pose[:, 2, 0].abs().max() < 1e-6 and (pose[:, 2, 1] > 0).all()


@pytest.mark.parametrize("size", [(32, 32), (24, 48)])
def test_the_distance_shows_all_of_a_sphere(size: tuple[int, int]) -> None:
    ball = _ball(size)
    distance = distance_to_see(ball.radius, ball.fov_x, size)
    alpha = ball.render(orbit(torch.tensor([0.0]), torch.tensor([0.0]), distance)).alpha[0, 0]
    rows = (alpha > 0).any(1).nonzero().squeeze(1)
    assert 0.8 * size[0] <= len(rows) <= 0.95 * size[0]


def _ball(size: tuple[int, int]) -> MeshRasterizer:
    import trimesh

    sphere = trimesh.creation.icosphere(3)
    return MeshRasterizer(Mesh(torch.tensor(sphere.vertices).float(), torch.tensor(sphere.faces)), size)


def test_turntable_gif(tmp_path: Path) -> None:
    renderer = MeshRasterizer(make_solid("mug", 3), (24, 32))
    paths = [write_turntable(renderer, tmp_path / f"{name}.gif", frames=5, fps=10, elevation=30) for name in "ab"]
    assert paths[0].read_bytes() == paths[1].read_bytes()
    with Image.open(paths[0]) as film:
        assert (film.n_frames, film.size, film.info["duration"], film.info["loop"]) == (5, (32, 24), 100, 0)
        frames = []
        for number in range(5):
            film.seek(number)
            frames.append(np.asarray(film.convert("RGB")).astype(int))
    azimuth = torch.arange(5) * 72.0
    distance = distance_to_see(renderer.radius, renderer.fov_x, (24, 32))
    seen = renderer.render(orbit(azimuth, torch.full((5,), 30.0), distance)).over(1.0).permute(0, 2, 3, 1) * 255
    assert np.abs(np.stack(frames) - seen.numpy()).mean() < 4  # 256 colours for all frames
    assert all((frame[0, 0] == 255).all() for frame in frames)
    small = write_turntable(renderer, tmp_path / "small.gif", frames=2, size=16, background=0.0)
    with Image.open(small) as film:
        assert film.size == (16, 12) and film.convert("RGB").getpixel((0, 0)) == (0, 0, 0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.gif", "b.gif", "small.gif"]


@pytest.mark.parametrize("background", [1.0, 0.5])
def test_the_background_of_a_gif_keeps_its_color(background: float, tmp_path: Path) -> None:
    """Also where the scene has more colours than a GIF, and some that are close to it."""

    class Noise(PosePhoto):
        image_size = (48, 48)

        def render(self, pose: Tensor) -> Views:
            rgb = torch.rand(len(pose), 3, 48, 48, generator=torch.Generator().manual_seed(0)) * 0.06 + background - 0.06
            rgb[:, :, 20:] *= torch.rand(len(pose), 3, 28, 48, generator=torch.Generator().manual_seed(1))
            alpha = torch.ones_like(rgb[:, :1])
            alpha[..., :12] = 0
            return Views(rgb * alpha, alpha)

    with Image.open(write_turntable(Noise(), tmp_path / "a.gif", frames=12, background=background)) as film:
        for number in range(12):
            film.seek(number)
            assert (np.asarray(film.convert("RGB"))[:, :12] == round(255 * background)).all()


def test_turntable_mp4(tmp_path: Path) -> None:
    imageio_ffmpeg = pytest.importorskip("imageio_ffmpeg")
    path = write_turntable(MeshRasterizer(make_solid("box", 3), (32, 32)), tmp_path / "a.mp4", frames=6, fps=12)
    frames = imageio_ffmpeg.read_frames(str(path))
    about = next(frames)
    assert about["size"] == (32, 32) and about["fps"] == 12 and sum(1 for _ in frames) == 6


def test_an_mp4_without_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "imageio_ffmpeg", None)
    with pytest.raises(ImportError, match=r"pip install 'robust_pl\[video\]'"):
        write_turntable(PosePhoto(), tmp_path / "a.mp4", frames=2)


@pytest.mark.parametrize(
    ("name", "settings", "says"),
    [
        ("a.avi", {}, r"name a \.gif or \.mp4 file"),
        ("a.gif", {"frames": 0}, "frames=0 must be at least 1"),
        ("a.gif", {"size": 4}, "size=4 must be at least 16"),
        ("a.gif", {"elevation": 91.0}, r"elevation=91.0 must lie in \[-90, 90\]"),
        ("a.gif", {"background": 2.0}, "background=2.0"),
        ("a.gif", {"distance": 0.5}, "distance=0.5 lies inside the scene, which reaches 1 "),
    ],
)
def test_bad_turntables(name: str, settings: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=says):
        write_turntable(PosePhoto(), tmp_path / name, **settings)
    assert not list(tmp_path.iterdir())


def test_turntable_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import trimesh

    trimesh.creation.box().export(tmp_path / "box.ply")
    main(["turntable", str(tmp_path / "box.ply"), "--output", str(tmp_path / "box.gif"), "--frames", "3", "--size", "32"])
    assert capsys.readouterr().out.strip() == str(tmp_path / "box.gif")
    field = RadianceField(resolution=4, samples=4)
    field.save(tmp_path / "field.ckpt")
    main(["turntable", str(tmp_path / "field.ckpt"), "--output", str(tmp_path / "f.gif"), "--frames", "2", "--size", "16"])
    with Image.open(tmp_path / "box.gif") as box, Image.open(tmp_path / "f.gif") as other:
        assert (box.n_frames, box.size, other.size) == (3, (32, 32), (16, 16))
    with pytest.raises(SystemExit) as done:
        main(["turntable", str(tmp_path / "none.ply"), "--output", str(tmp_path / "a.gif")])
    assert done.value.code == 2 and "none.ply does not exist" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["turntable", "cow.stl", "--output", str(tmp_path / "a.gif")])
    assert "cow.stl is no scene: name a mesh (.obj, " in capsys.readouterr().err


# In a trainer --------------------------------------------------------------------------------------------------------

BAD = torch.tensor([[0.0, 15.0, 50.0, 4.0, 0.0, 0.0]])
"""Seen from azimuth -75 and elevation 40."""


class Fixed(LightningModule):
    """A module around a network that does not learn, and fails around one view."""

    num_classes = 3

    def __init__(self) -> None:
        super().__init__()
        self.net: nn.Module = FailsNear(BAD, width=0.3)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        pass


class TinyScenes(LightningDataModule):
    """Two objects to attack, and one batch of something."""

    class_names = ("mug", "car", "duck")
    view_space = ViewSpace(phi=(0, 80))
    test_scenes: SceneSet | None = photos(2)

    def test_dataloader(self) -> DataLoader:
        return DataLoader(TensorDataset(torch.zeros(2, 3, 2, 2), torch.zeros(2, dtype=torch.int64)))


def run_test(callbacks: list[Callback], root: Path, data: LightningDataModule | None = None) -> dict[str, float]:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = Trainer(default_root_dir=root, accelerator="cpu", callbacks=callbacks, **quiet)
    trainer.test(Fixed(), data or TinyScenes(), verbose=False)
    return {key: value.item() for key, value in trainer.callback_metrics.items()}


def test_view_sphere_and_reports_in_a_trainer(tmp_path: Path) -> None:
    sphere, attack = ViewSphere(batch_size=50), GMVFool(2, popsize=9, iterations=6, eval_samples=3)
    figures = run_test([sphere, attack, ViewFool(5, 2, eval_samples=0)], tmp_path)
    bins = sphere.bins
    assert bins is not None and (bins.total == 2).all() and bins.accuracy[8, 3] == 0.0  # -90 to -60, 30 to 45
    azimuth, elevation = np.meshgrid(np.arange(-165, 180, 30.0), np.arange(-82.5, 90, 15))
    poses = orbit(torch.tensor(azimuth.ravel()).float(), torch.tensor(elevation.ravel()).float(), 4.0)
    alone = Fixed()(PosePhoto().render(poses).rgb).argmax(1) == 0
    assert np.array_equal(bins.right, 2 * alone.view(12, 12).numpy())
    assert 0.5 < figures["test/view_mean"] == pytest.approx(bins.mean) and figures["test/view_worst_bin"] == 0.0
    with (tmp_path / "images/view_sphere.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 144 and sum(int(row["right"]) for row in rows) == bins.right.sum()
    assert Image.open(tmp_path / "images/view_sphere.png").width > 1000

    folder = tmp_path / "viewpoints/test_gmvfool"
    for name in ("worst_views", "view_sphere"):
        assert Image.open(folder / f"images/{name}.png").width > 300
    said = (folder / "report.md").read_text()
    assert attack.found is not None and attack.figures is not None
    for text in (
        "# Viewpoints that gmvfool found",
        "2 objects, 3 fresh views of each",
        f"| accuracy under the distribution | {attack.figures['acc_gmvfool']:.2%} |",
        f"| the same of the class in which it is lowest | {attack.figures['worst_class_gmvfool']:.2%} |",
        f"{attack.figures['coverage_gmvfool']:.1f} of 144",
        f"{attack.figures['entropy_gmvfool']:.2f} nats",
        f"| renders | {attack.found.renders} |",
        "| thing/0 | mug |",
        "images/worst_views.png",
        '"popsize": "9"',
    ):
        assert text in said, text
    assert not (tmp_path / "viewpoints/test_viewfool/report.md").exists()  # without fresh views there is nothing to report


def test_view_sphere_on_a_part_of_the_sphere(tmp_path: Path) -> None:
    sphere = ViewSphere(4, 2, (0, 60), distance=4.5, name="upper", folder=str(tmp_path / "here"))
    assert {"test/upper_mean", "test/upper_worst_bin"} <= run_test([sphere], tmp_path).keys()
    assert sphere.bins is not None and sphere.bins.total.tolist() == [[2] * 4] * 2
    assert {path.name for path in (tmp_path / "here").iterdir()} == {"upper_sphere.csv", "upper_sphere.png"}


def test_bad_view_spheres(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="azimuths=0"):
        ViewSphere(0)
    with pytest.raises(ValueError, match=r"elevation=\(60, 0\) must rise"):
        ViewSphere(elevation=(60, 0))
    with pytest.raises(ValueError, match=r"distance=0\.5 lies inside of an object, which reaches 1 "):
        run_test([ViewSphere(distance=0.5)], tmp_path)
    without = TinyScenes()
    without.test_scenes = None
    with pytest.raises(ValueError, match="TinyScenes offers no test_scenes, which ViewSphere renders"):
        run_test([ViewSphere()], tmp_path, without)
