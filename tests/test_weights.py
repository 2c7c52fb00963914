"""Loading published weights: what fits, what is refused, and in which words."""

import os
import pickle
from pathlib import Path

import pytest
import torch

from robust_pl import nets
from robust_pl.nets import load_weights, pretrained

DATA = os.environ.get("ROBUST_PL_DATA")


def small(**arguments):
    return nets.SmallCNN(**{"width": 2, **arguments})


def same(a, b):
    other = b.state_dict()
    return all(torch.equal(value, other[name]) for name, value in a.state_dict().items())


@pytest.fixture
def saved():
    net = small()
    with torch.no_grad():
        for value in net.state_dict().values():
            value.copy_(torch.rand_like(value, dtype=torch.float32))
    return net


@pytest.mark.parametrize("key", [None, "state_dict", "model", "model_state_dict", "net"])
@pytest.mark.parametrize("prefix", ["", "module.", "net.", "model.", "_orig_mod.", "module._orig_mod.", "net.module."])
def test_wrapping_keys_and_prefixes_are_removed(tmp_path, saved, key, prefix):
    state = {prefix + name: value for name, value in saved.state_dict().items()}
    torch.save({key: state, "epoch": 3} if key else state, tmp_path / "weights.pt")
    net = small()
    report = load_weights(net, tmp_path / "weights.pt")
    assert same(net, saved)
    assert report.fits
    assert set(report.loaded) == set(saved.state_dict())
    assert f"{len(report.loaded)} of the network's {len(report.loaded)} tensors fitted" in str(report)


def test_a_mapping_is_a_source(saved):
    net = small()
    load_weights(net, saved.state_dict())
    assert same(net, saved)


def test_prefixes_of_the_network_count_too(saved):
    wrapped = torch.nn.ModuleDict({"net": small()})
    load_weights(wrapped, {f"module.{name}": value for name, value in saved.state_dict().items()})
    assert same(wrapped["net"], saved)


def test_a_frozen_network_is_filled(saved):
    frozen = nets.Frozen(small())
    load_weights(frozen, saved.state_dict())
    assert same(frozen.net, saved)


def test_other_parts_of_a_training_module_are_left_out(saved):
    state = {f"net.{name}": value for name, value in saved.state_dict().items()}
    net = small()
    report = load_weights(net, {"state_dict": state | {"class_counts": torch.ones(10)}})
    assert same(net, saved)
    assert report.left_out == ("class_counts",)
    assert "1 left out: class_counts" in str(report)


def test_another_number_of_classes_is_refused_and_changes_nothing(tmp_path, saved):
    torch.save(saved.state_dict(), tmp_path / "ten.pt")
    net, untouched = small(num_classes=7), small(num_classes=7)
    untouched.load_state_dict(net.state_dict())
    with pytest.raises(ValueError, match="num_classes") as caught:
        load_weights(net, tmp_path / "ten.pt")
    message = str(caught.value)
    assert str(tmp_path / "ten.pt") in message
    assert "24 of the network's 26 tensors fitted" in message
    assert "2 mismatched: linear.weight (10, 4) in the file, (7, 4) in the network, linear.bias" in message
    assert "\n" not in message
    assert same(net, untouched)


def test_without_strict_what_fits_is_loaded(saved):
    net = small(num_classes=7)
    report = load_weights(net, saved.state_dict(), strict=False)
    assert report.mismatched == (("linear.weight", (10, 4), (7, 4)), ("linear.bias", (10,), (7,)))
    assert torch.equal(net.layers[0].weight, saved.layers[0].weight)


def test_missing_and_unexpected_names_are_told_apart(saved):
    state = saved.state_dict()
    state["fc.weight"] = state.pop("linear.weight")
    report = load_weights(small(), state, strict=False)
    assert (report.missing, report.unexpected) == (("linear.weight",), ("fc.weight",))
    with pytest.raises(ValueError, match=r"1 missing: linear.weight; 1 unexpected: fc.weight"):
        load_weights(small(), state)


def test_a_wholly_different_network_is_summarised(saved):
    with pytest.raises(ValueError, match=r"0 of the network's .* and \d+ more") as caught:
        load_weights(nets.ResNet2B(), {f"x{name}": value for name, value in saved.state_dict().items()})
    assert len(str(caught.value)) < 600


def test_missing_batch_counters_are_harmless(saved):
    state = {name: value for name, value in saved.state_dict().items() if "num_batches_tracked" not in name}
    assert load_weights(small(), state).fits


def test_equal_normalisation_in_the_file_is_harmless_and_another_is_not(saved):
    state = saved.state_dict() | {"normalize.mean": torch.tensor([0.5]), "normalize.std": torch.tensor([0.25])}
    assert load_weights(small(mean=(0.5,), std=(0.25,)), state).fits
    with pytest.raises(ValueError, match=r"1 unexpected: normalize.std"):
        load_weights(small(mean=(0.5,), std=(0.3,)), state)
    with pytest.raises(ValueError, match=r"2 unexpected: normalize.mean, normalize.std"):
        load_weights(small(), state)


def test_half_precision_weights_are_converted(saved):
    net = small()
    load_weights(net, saved.half().state_dict())
    assert net.linear.weight.dtype == torch.float32
    assert torch.equal(net.linear.weight, saved.linear.weight.float())


def test_a_relative_path_is_also_tried_under_the_data_folder(tmp_path, monkeypatch, saved):
    (tmp_path / "here").mkdir()
    (tmp_path / "data" / "checkpoints").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("ROBUST_PL_DATA", str(tmp_path / "data"))
    torch.save(saved.state_dict(), tmp_path / "data" / "checkpoints" / "a.pt")
    net = small()
    load_weights(net, "checkpoints/a.pt")
    assert same(net, saved)


def test_a_missing_file_says_where_it_was_sought(tmp_path, monkeypatch):
    monkeypatch.setenv("ROBUST_PL_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"nowhere.pt or .*nowhere.pt: check the path") as caught:
        load_weights(small(), "nowhere.pt")
    assert str(tmp_path / "nowhere.pt") in str(caught.value)
    monkeypatch.delenv("ROBUST_PL_DATA")
    with pytest.raises(FileNotFoundError, match="ROBUST_PL_DATA, which is not set"):
        load_weights(small(), "nowhere.pt")
    with pytest.raises(FileNotFoundError, match=r"check the path$"):
        load_weights(small(), tmp_path / "nowhere.pt")


def test_files_that_are_no_checkpoint_are_refused(tmp_path, saved):
    torch.save(saved.state_dict(), tmp_path / "whole.pt")
    whole = (tmp_path / "whole.pt").read_bytes()
    generator = torch.Generator().manual_seed(0)
    noise = [bytes(torch.randint(256, (n,), generator=generator).tolist()) for n in (1, 10, 100, 1000)]
    for content in [b"", b"<html>404</html>", whole[:100], whole[: len(whole) // 2], whole[:-1], *noise]:
        (tmp_path / "bad.pt").write_bytes(content)
        with pytest.raises(ValueError, match=r"bad\.pt (is no checkpoint|holds)"):
            load_weights(small(), tmp_path / "bad.pt")


@pytest.mark.parametrize("content", [[1, 2], torch.ones(2), {"epoch": 3}, {"ema": {"a": torch.ones(1)}}, {}])
def test_checkpoints_without_named_tensors_are_refused(tmp_path, content):
    torch.save(content, tmp_path / "odd.pt")
    with pytest.raises(ValueError, match=r"odd\.pt holds"):
        load_weights(small(), tmp_path / "odd.pt")


class Malice:
    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("write", ["torch", "pickle"])
def test_code_in_a_file_is_refused_and_not_run(tmp_path, saved, write):
    content = {"state_dict": saved.state_dict(), "extra": Malice(tmp_path / "ran")}
    if write == "torch":
        torch.save(content, tmp_path / "evil.pt")
    else:
        (tmp_path / "evil.pt").write_bytes(pickle.dumps({"extra": Malice(tmp_path / "ran")}, protocol=2))
    with pytest.raises(ValueError, match=r"evil\.pt holds Python objects"):
        load_weights(small(), tmp_path / "evil.pt")
    assert not (tmp_path / "ran").exists()
    if write == "torch":  # the file does what this test believes it does
        torch.load(tmp_path / "evil.pt", weights_only=False)
        assert (tmp_path / "ran").exists()


def test_a_whole_pickled_network_is_refused_in_words(tmp_path, saved):
    torch.save(saved, tmp_path / "module.pt")
    with pytest.raises(ValueError, match=r"module\.pt holds Python objects.*save only its state_dict"):
        load_weights(small(), tmp_path / "module.pt")


def test_the_old_file_format_is_read(tmp_path, saved):
    torch.save(saved.state_dict(), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    net = small()
    load_weights(net, tmp_path / "old.pth")
    assert same(net, saved)


def test_a_file_saved_on_a_gpu_loads_on_the_cpu(tmp_path, monkeypatch, saved):
    # Such a file differs only in the device tag that torch.save writes beside each storage.
    monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
    torch.save(saved.state_dict(), tmp_path / "gpu.pt")
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="CUDA"):
            torch.load(tmp_path / "gpu.pt", weights_only=True)
    net = small()
    load_weights(net, tmp_path / "gpu.pt")
    assert same(net, saved)
    assert net.linear.weight.device.type == "cpu"


def test_an_unknown_pretrained_name_is_corrected():
    with pytest.raises(ValueError, match="did you mean 'akamaster_resnet20'"):
        pretrained("akamaster_resnet2")
    with pytest.raises(ValueError, match="there are akamaster_resnet20, abcrown_resnet2b_adv2"):
        pretrained("qqq")


def test_pretrained_says_where_it_looked(tmp_path, monkeypatch):
    monkeypatch.setenv("ROBUST_PL_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="ROBUST_PL_DATA must point at") as caught:
        pretrained("akamaster_resnet20")
    assert str(tmp_path / "checkpoints" / "akamaster_resnet20.th") in str(caught.value)
    monkeypatch.delenv("ROBUST_PL_DATA")
    with pytest.raises(FileNotFoundError, match="it is not set"):
        pretrained("akamaster_resnet20")


needs_data = pytest.mark.skipif(
    not DATA or not (Path(DATA) / "checkpoints").is_dir(), reason="ROBUST_PL_DATA names no folder with checkpoints/"
)


@needs_data
@pytest.mark.parametrize(
    ("name", "net", "file", "tensors"),
    [
        ("akamaster_resnet20", nets.ResNet20, "akamaster_resnet20.th", 97),
        ("abcrown_resnet2b_adv2", nets.ResNet2B, "abcrown_resnet2b_adv2.pth", 16),
    ],
)
def test_public_checkpoints_fit(name, net, file, tensors):
    net = net()
    report = load_weights(net, f"checkpoints/{file}")
    assert report.fits
    assert len(report.loaded) == tensors
    trained = pretrained(name)
    assert same(trained, net)
    assert not trained.training


@needs_data
@pytest.mark.slow
@pytest.mark.parametrize(("name", "correct"), [("akamaster_resnet20", 9173), ("abcrown_resnet2b_adv2", 6924)])
def test_public_checkpoints_have_their_accuracy_on_the_whole_test_set(name, correct):
    file = Path(DATA) / "cifar-10-batches-py" / "test_batch"
    if not file.is_file():
        pytest.skip("ROBUST_PL_DATA holds no cifar-10-batches-py")
    batch = pickle.loads(file.read_bytes(), encoding="bytes")
    x = torch.tensor(batch[b"data"]).view(-1, 3, 32, 32)
    y = torch.tensor(batch[b"labels"])
    net = pretrained(name)
    with torch.inference_mode():
        right = [(net(a.float() / 255).argmax(1) == b).sum().item() for a, b in zip(x.split(500), y.split(500), strict=True)]
    assert len(y) == 10_000
    assert abs(sum(right) - correct) <= 2  # another machine's arithmetic may tip a tie


def test_a_config_names_a_public_network(tmp_path, monkeypatch):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nets.ResNet2B(num_classes=10, mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616)).eval()
    (tmp_path / "checkpoints").mkdir()
    torch.save(net.state_dict(), tmp_path / "checkpoints" / "abcrown_resnet2b_adv2.pth")
    monkeypatch.setenv("ROBUST_PL_DATA", str(tmp_path))
    x = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    named = nets.Pretrained("abcrown_resnet2b_adv2")
    assert torch.equal(named(x), net(x)) and torch.equal(named.forward_features(x), net.forward_features(x))
