"""Where a teacher's weights come from: a run, a checkpoint, a file of nothing but weights, timm; and what is said if not."""

from __future__ import annotations

import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from robust_pl.nets import SmallCNN, TimmModel, TrainedNet, WideResNet
from robust_pl.nets.frozen import Frozen

CONFIGS = Path(__file__).parents[1] / "configs"
TAUGHT = sorted(path for path in CONFIGS.glob("*/*.yaml") if "source: runs/teacher_" in path.read_text())


@pytest.fixture
def saved() -> SmallCNN:
    net = SmallCNN(width=2)
    with torch.no_grad():
        for value in net.state_dict().values():
            value.copy_(torch.rand_like(value, dtype=torch.float32))
    return net.eval()


@pytest.fixture
def x() -> Tensor:
    return torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("suffix", ["pt", "pth", "safetensors"])
def test_a_file_of_weights_fills_the_given_network(tmp_path: Path, saved: SmallCNN, x: Tensor, suffix: str) -> None:
    path = tmp_path / f"teacher.{suffix}"
    (save_file if suffix == "safetensors" else torch.save)(saved.state_dict(), path)
    teacher = TrainedNet(str(path), net=SmallCNN(width=2))
    assert all(module.training for module in teacher.modules()), "BatchNorm would learn nothing in a fine-tuning"
    assert not any(module.training for module in Frozen(teacher).modules())
    assert torch.equal(teacher(x), saved(x)) and torch.equal(teacher.forward_features(x), saved.forward_features(x))
    with pytest.raises(ValueError, match="argument net of TrainedNet"):
        TrainedNet(str(path))
    with pytest.raises(ValueError, match=r"teacher.* tensors fitted; .*Build the network that it was saved from"):
        TrainedNet(str(path), net=SmallCNN(width=4))


def test_a_run_fills_the_given_network(ingredients: Path, x: Tensor) -> None:
    run, last = str(ingredients / "base"), str(ingredients / "base" / "checkpoints" / "last.ckpt")
    assert torch.equal(TrainedNet(run, net=SmallCNN(width=4))(x), TrainedNet(run)(x))
    assert torch.equal(TrainedNet(last, net=SmallCNN(width=4))(x), TrainedNet(last)(x))


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "teacher.safetensors"
    path.write_bytes(b"no weights")
    with pytest.raises(ValueError, match=r"teacher\.safetensors is no checkpoint that safetensors can read"):
        TrainedNet(str(path), net=SmallCNN())


def test_weights_of_timm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file in timm's names fits a TimmModel, which holds the network one level deeper."""

    class Net(nn.Linear):
        pretrained_cfg = {"mean": (0.5,) * 3, "std": (0.25,) * 3}  # noqa: RUF012

        def forward(self, z: Tensor) -> Tensor:
            return super().forward(z.mean((2, 3)))

    module = types.ModuleType("timm")
    module.create_model = lambda *_, **__: Net(3, 10)
    monkeypatch.setitem(sys.modules, "timm", module)
    inner, x = Net(3, 10), torch.rand(2, 3, 8, 8)
    save_file(inner.state_dict(), tmp_path / "timm.safetensors")
    teacher = TrainedNet(str(tmp_path / "timm.safetensors"), net=TimmModel(mean=(0.5,) * 3, std=(0.25,) * 3))
    assert torch.equal(teacher(x), inner.eval()((x - 0.5) / 0.25))


def test_a_config_names_file_and_network(
    robust_pl: Callable[..., None], tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    net = WideResNet(10, depth=10, widen_factor=1, in_channels=1)
    torch.save(net.state_dict(), "teacher.pt")
    sizes = "{class_path: WideResNet, init_args: {depth: 10, widen_factor: 1, in_channels: 1}}"
    source = f"{{class_path: TrainedNet, init_args: {{source: teacher.pt, net: {sizes}}}}}"
    text = tiny.read_text().replace("PGDAT", "PubDef", 1).replace("    net:", f"    sources: {{a: {source}}}\n    net:", 1)
    tiny.write_text(text)
    short = ("--trainer.max_epochs", 1, "--trainer.limit_train_batches", 2, "--trainer.limit_val_batches", 0)
    robust_pl("fit", "-c", tiny, *short)
    assert Path("runs/tiny/checkpoints/last.ckpt").is_file()
    tiny.write_text(text.replace("widen_factor: 1", "widen_factor: 2"))
    with pytest.raises(SystemExit) as stopped:
        robust_pl("fit", "-c", tiny, *short, "--run.name", "other")
    error = capsys.readouterr().err.strip()
    assert stopped.value.code == 2 and "teacher.pt: " in error and "mismatched" in error and error.count("\n") == 0


@pytest.mark.slow
def test_missing_weights_are_one_line_and_exit_with_2(tiny: Path) -> None:
    source = "{class_path: TrainedNet, init_args: {source: runs/teacher_robust}}"
    tiny.write_text(
        tiny.read_text().replace("PGDAT", "PubDef", 1).replace("    net:", f"    sources: {{a: {source}}}\n    net:")
    )
    done = subprocess.run([sys.executable, "-m", "robust_pl", "fit", "-c", tiny], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    said = [line for line in done.stderr.splitlines() if not line.startswith("Seed set")]
    assert len(said) == 1 and said[0].startswith("robust-pl: error: no file of weights at runs/teacher_robust")
    assert not Path("runs").exists()


@pytest.mark.parametrize("config", TAUGHT, ids=[f"{path.parent.name}/{path.stem}" for path in TAUGHT])
def test_the_configs_miss_their_teachers_in_one_line(
    robust_pl: Callable[..., None], tiny: Path, capsys: pytest.CaptureFixture[str], config: Path
) -> None:
    with pytest.raises(SystemExit) as stopped:
        robust_pl("fit", "-c", config)
    error = capsys.readouterr().err.strip()
    assert stopped.value.code == 2 and error.count("\n") == 0
    assert "no file of weights at runs/teacher_" in error
    assert not Path("runs").exists()
