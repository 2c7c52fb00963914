"""Scenes of 3D Gaussians: how their file is read. Rendering them needs a GPU."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from robust_pl.scenes import GaussianSplats, Renderer

NAMES = [*"xyz", "f_dc_0", "f_dc_1", "f_dc_2", *(f"f_rest_{i}" for i in range(9)), "opacity"]
NAMES += [f"scale_{i}" for i in range(3)] + [f"rot_{i}" for i in range(4)]


def write(path: Path, rows: np.ndarray, names: list[str] = NAMES) -> Path:
    header = ["ply", "format binary_little_endian 1.0", "comment of some program", f"element vertex {len(rows)}"]
    header += [*(f"property float {name}" for name in names), "end_header", ""]
    path.write_bytes("\n".join(header).encode() + rows.astype("<f4").tobytes())
    return path


def test_a_file_is_read(tmp_path: Path) -> None:
    rows = np.arange(2 * len(NAMES), dtype=float).reshape(2, -1) / 10
    scene = GaussianSplats(write(tmp_path / "scene.ply", rows), (4, 6))
    assert isinstance(scene, Renderer)
    first = dict(zip(NAMES, rows[0], strict=True))
    assert scene.opacities[0].item() == pytest.approx(1 / (1 + math.exp(-first["opacity"])))
    assert scene.scales[0, 2].item() == pytest.approx(math.exp(first["scale_2"]))
    torch.testing.assert_close(scene.quats.norm(dim=1), torch.ones(2))
    assert scene.radius == pytest.approx(float(np.linalg.norm(rows[1, :3])))
    assert scene.colors.shape == (2, 4, 3)  # degree 1
    by_hand = [[first[f"f_dc_{c}"] for c in range(3)]] + [[first[f"f_rest_{3 * c + k}"] for c in range(3)] for k in range(3)]
    torch.testing.assert_close(scene.colors[0], torch.tensor(by_hand, dtype=torch.float32))
    assert scene.fingerprint() != GaussianSplats(tmp_path / "scene.ply", (4, 7)).fingerprint()
    plain = [name for name in NAMES if not name.startswith("f_rest")]
    assert GaussianSplats(write(tmp_path / "plain.ply", rows[:, : len(plain)], plain)).colors.shape == (2, 1, 3)


@pytest.mark.skipif(importlib.util.find_spec("gsplat") is not None, reason="gsplat is there")
def test_rendering_names_the_extra(tmp_path: Path) -> None:
    scene = GaussianSplats(write(tmp_path / "scene.ply", np.ones((1, len(NAMES)))))
    with pytest.raises(ImportError, match=r"robust_pl\[gsplat\]"):
        scene.render(torch.eye(4).unsqueeze(0))


def test_bad_files(tmp_path: Path) -> None:
    path = tmp_path / "scene.ply"
    with pytest.raises(FileNotFoundError, match="give the PLY"):
        GaussianSplats(path)
    path.write_bytes(b"ply\nformat ascii 1.0\nend_header\n")
    with pytest.raises(ValueError, match="no binary little-endian PLY"):
        GaussianSplats(path)
    with pytest.raises(ValueError, match="lacks the property opacity"):
        GaussianSplats(write(path, np.ones((1, 3)), [*"xyz"]))
    with pytest.raises(ValueError, match="holds no Gaussians"):
        GaussianSplats(write(path, np.ones((0, len(NAMES)))))
    write(path, np.ones((2, len(NAMES))))
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ValueError, match="cut off"):
        GaussianSplats(path)
