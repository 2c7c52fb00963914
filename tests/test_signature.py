"""Robust weight signatures: orthogonal, put on and taken off without a trace, quantised, written and read, as a run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn

from robust_pl import load_model
from robust_pl.data import DigitsDataModule
from robust_pl.functional.signature import Patch, WeightSignature, first_layers
from robust_pl.methods import Method, RobustWeightSignature
from robust_pl.nets import SmallCNN

QUIET: dict[str, Any] = {
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
    "accelerator": "cpu",
    "devices": 1,
}


def three(dtype: torch.dtype = torch.float64) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    torch.manual_seed(0)
    base = {"a": torch.randn(40, 5, dtype=dtype), "b": torch.randn(7, dtype=dtype), "frozen": torch.randn(3, dtype=dtype)}
    std = {name: t + 0.1 * torch.randn_like(t) for name, t in base.items()} | {"frozen": base["frozen"]}
    return base, std, {name: t + 0.3 * torch.randn_like(t) for name, t in base.items()}


def network(seed: int = 0) -> SmallCNN:
    torch.manual_seed(seed)
    return SmallCNN(width=4)


def signature(seed: int, scale: float = 0.1) -> WeightSignature:
    """A random one of the small network."""
    torch.manual_seed(seed)
    values = {name: scale * torch.randn_like(p) for name, p in network().named_parameters()}
    return WeightSignature(values, {name: tuple(v.shape) for name, v in values.items()})


def test_it_is_orthogonal_to_clean_fine_tuning() -> None:
    base, std, tuned = three()
    found = WeightSignature.extract(base, std, tuned)
    for name in ("a", "b"):
        a, v, s = std[name] - base[name], tuned[name] - base[name], found.delta(name)
        assert abs((s * a).sum()) < 1e-10
        # What was taken away lies along a, and no more of it was.
        taken = v - s
        assert torch.allclose(taken, (v * a).sum() / (a * a).sum() * a, rtol=0, atol=1e-12)
    assert torch.equal(found.delta("frozen"), tuned["frozen"] - base["frozen"])


def test_by_hand() -> None:
    zero, std, tuned = ({"w": torch.tensor(v)} for v in ([0.0, 0.0], [2.0, 0.0], [1.0, 3.0]))
    assert WeightSignature.extract(zero, std, tuned).delta("w").tolist() == [0.0, 3.0]


def test_inner_products_are_in_float64() -> None:
    """In float32 the projection of large, nearly parallel vectors loses the signature in rounding."""
    torch.manual_seed(0)
    a, s = torch.randn(100_000), 1e-3 * torch.randn(100_000)
    zero = torch.zeros(100_000)
    found = WeightSignature.extract({"w": zero}, {"w": a}, {"w": 1000 * a + s}).delta("w")
    cosine = (found.double() * a.double()).sum() / (found.double().norm() * a.double().norm())
    assert abs(cosine) < 1e-5


def test_running_statistics_are_no_weights() -> None:
    nets = [network(seed).state_dict() for seed in range(3)]
    found = WeightSignature.extract(*nets)
    assert set(found.shapes) == {name for name, _ in network().named_parameters()}


def test_a_patch_leaves_no_trace() -> None:
    net = network()
    clean = {name: t.clone() for name, t in net.state_dict().items()}
    places = {name: p.data_ptr() for name, p in net.named_parameters()}
    patch = Patch(net)
    patch.add("fog", signature(1), 0.7)
    patch.add("linf", signature(2), -1.3)
    expected = clean["linear.weight"] + 0.7 * signature(1).delta("linear.weight") - 1.3 * signature(2).delta("linear.weight")
    assert torch.allclose(net.linear.weight, expected, atol=1e-6)
    patch.remove("fog")  # not the last that was added
    alone = network()
    Patch(alone).add("linf", signature(2), -1.3)
    assert all(torch.equal(t, alone.state_dict()[name]) for name, t in net.state_dict().items())
    patch.add("linf", signature(2), 0.5)  # another scale
    assert torch.allclose(net.linear.weight, clean["linear.weight"] + 0.5 * signature(2).delta("linear.weight"), atol=1e-6)
    patch.remove("linf")
    assert all(torch.equal(t, clean[name]) for name, t in net.state_dict().items())
    assert {name: p.data_ptr() for name, p in net.named_parameters()} == places, "optimizers hold the tensors themselves"


def test_a_patch_of_another_network_changes_nothing() -> None:
    net = SmallCNN(width=8)
    clean = {name: t.clone() for name, t in net.state_dict().items()}
    with pytest.raises(ValueError, match=r"layers\.0\.weight .* another network"):
        Patch(net).add("x", signature(1))
    assert all(torch.equal(t, clean[name]) for name, t in net.state_dict().items())


@pytest.mark.parametrize(("bits", "times"), [(8, 4), (4, 8)])
def test_quantisation_is_off_by_half_a_step_at_most(bits: Any, times: int) -> None:
    exact = signature(1)
    coarse = exact.quantised(bits)
    for name in exact.shapes:
        step = exact.delta(name).abs().amax() / (2 ** (bits - 1) - 1)
        off = (coarse.delta(name) - exact.delta(name)).abs().amax()
        assert off <= 0.5001 * step
        assert coarse.delta(name).shape == exact.shapes[name]
    codes = sum(value.numel() for value in coarse.values.values())
    assert coarse.nbytes == codes + 4 * len(exact.shapes) and exact.nbytes == pytest.approx(times * codes, rel=0.01)
    assert torch.allclose(coarse.scaled(-2).delta("linear.weight"), -2 * coarse.delta("linear.weight"))


def test_codes_of_4_bits_keep_their_order_and_sign() -> None:
    values = torch.tensor([-7.0, 7, 0, -1, 3])  # an odd number of them
    found = WeightSignature({"w": values, "zero": torch.zeros(2)}, {"w": (5,), "zero": (2,)}).quantised(4)
    assert found.delta("w").tolist() == values.tolist() and found.values["w"].numel() == 3
    assert found.delta("zero").tolist() == [0, 0]


@pytest.mark.parametrize("bits", [32, 8, 4])
def test_written_and_read(bits: Any, tmp_path: Path) -> None:
    written = signature(1) if bits == 32 else signature(1).quantised(bits)
    written.save(tmp_path / "x.safetensors")
    read = WeightSignature.load(tmp_path / "x.safetensors")
    assert (read.bits, read.shapes, read.nbytes) == (bits, written.shapes, written.nbytes)
    assert all(torch.equal(read.delta(name), written.delta(name)) for name in written.shapes)
    assert written.nbytes < (tmp_path / "x.safetensors").stat().st_size < written.nbytes + 4000


def test_first_layers() -> None:
    names = first_layers(network(), 2)
    assert names == [
        f"layers.{i}.{n}" for i, n in ((0, "weight"), (1, "weight"), (1, "bias"), (3, "weight"), (4, "weight"), (4, "bias"))
    ]
    assert first_layers(network(), None) == [name for name, _ in network().named_parameters()]
    assert first_layers(network(), 99) == first_layers(network(), None)


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (lambda path: signature(1).quantised(3), "bits=3"),
        (lambda path: first_layers(network(), 0), "keep_layers=0"),
        (lambda path: WeightSignature.extract({"w": torch.zeros(2)}, {"w": torch.zeros(3)}, {"w": torch.zeros(2)}), "std has"),
        (lambda path: WeightSignature.extract({"w": torch.zeros(2)}, {"w": torch.zeros(2)}, {}), "tuned has shape none for w"),
        (lambda path: WeightSignature.load(path), "cannot be read as safetensors"),
        (lambda path: RobustWeightSignature(network(), "a", "b", []), r"tuned=\[\]"),
        (lambda path: RobustWeightSignature(network(), "a", "b", "c", bits=16), "bits=16"),
    ],
)
def test_refused(action: Callable[[Path], Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"no file of tensors")
    with pytest.raises(ValueError, match=message):
        action(path)


# As a run ------------------------------------------------------------------------------------------------------------


def files(folder: Path) -> dict[str, str]:
    """A base, its clean fine-tuning and two robust ones, with statistics of their own."""
    base, found = network().state_dict(), {}
    for number, name in enumerate(("base", "std", "first", "second")):
        torch.manual_seed(number)
        move = 0.0 if name == "base" else 0.1
        tensors = {n: t + move * torch.rand_like(t) if t.is_floating_point() else t for n, t in base.items()}
        found[name] = str(folder / f"{name}.pt")
        torch.save(tensors, found[name])
    return found


def fitted(folder: Path, **more: Any) -> tuple[Method, dict[str, dict[str, Tensor]]]:
    paths = files(folder)
    method = RobustWeightSignature(network(9), paths["base"], paths["std"], [paths["first"], paths["second"]], **more)
    Trainer(default_root_dir=folder / "run", **QUIET).fit(method, DigitsDataModule())
    return method, {name: torch.load(path, weights_only=True) for name, path in paths.items()}


def test_a_run_adds_signatures_to_the_clean_network(tmp_path: Path) -> None:
    method, nets = fitted(tmp_path, alpha=0.8, batches=0)
    signatures = [WeightSignature.extract(nets["base"], nets["std"], nets[name]) for name in ("first", "second")]
    for name, parameter in method.net.named_parameters():
        expected = nets["std"][name] + 0.4 * sum(s.delta(name) for s in signatures)
        assert torch.allclose(parameter, expected, atol=1e-6), name
    for name, buffer in method.net.named_buffers():
        if buffer.is_floating_point():
            robust = (nets["first"][name] + nets["second"][name]) / 2
            assert torch.allclose(buffer, 0.2 * nets["std"][name] + 0.8 * robust, atol=1e-6), name
    read = WeightSignature.load(tmp_path / "run" / "signature-1.safetensors")
    assert all(torch.equal(read.delta(name), signatures[1].delta(name)) for name in read.shapes)


def test_a_run_patches_only_the_first_layers_and_computes_statistics_again(tmp_path: Path) -> None:
    method, nets = fitted(tmp_path, keep_layers=1, bits=8, batches=2)
    names = set(first_layers(network(), 1))
    for name, parameter in method.net.named_parameters():
        assert torch.equal(parameter, nets["std"][name]) == (name not in names), name
    assert not torch.allclose(method.net.layers[1].running_mean, nets["std"]["layers.1.running_mean"])
    assert method.made_of["nbytes"] < 2 * 1.3 * sum(nets["std"][name].numel() for name in names)


@pytest.mark.slow
def test_from_the_command_line(tiny: Path, robust_pl: Callable[..., None], tmp_path: Path) -> None:
    paths = files(tmp_path)
    own = [f"--model.{name}={path}" for name, path in (("base", paths["base"]), ("std", paths["std"]))]
    robust_pl(
        *("fit", "-c", tiny, "--model=RobustWeightSignature", "--model.net=SmallCNN", "--model.net.width=4", *own),
        *(f"--model.tuned=[{paths['first']}]", "--model.attack=FGSM", "--run.name=rws"),
    )
    run = tmp_path / "runs" / "rws"
    robust_pl("test", "--ckpt_path", run / "checkpoints" / "best.ckpt")
    assert (run / "signature-0.safetensors").is_file() and (run / "test").is_dir()
    net = load_model(run)
    assert isinstance(net, nn.Module)
    stored = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)
    assert stored["robust_pl_soup"]["tuned"] == [paths["first"]]
    assert torch.equal(net.linear.weight, stored["state_dict"]["net.linear.weight"])
