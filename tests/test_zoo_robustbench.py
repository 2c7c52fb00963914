"""Networks under RobustBench's names: tables, tensor names, files, and where they are sought."""

import re

import pytest
import torch

import robust_pl
from robust_pl import nets
from robust_pl.nets import pretrained, robustbench
from robust_pl.nets.robustbench import MODELS, NOT_BUILT, RENAMED, Entry
from robust_pl.nets.weights import rename

NORM = ("weight", "bias", "running_mean", "running_var")


def batchnorm(name, channels):
    return {f"{name}.{tensor}": (channels,) for tensor in NORM} | {f"{name}.num_batches_tracked": ()}


def trades_wide(sub_block1):
    """Names and shapes of TRADES' wide ResNet 10-2, the layout of RobustBench's WideResNet, written by hand."""
    shapes = {"conv1.weight": (16, 3, 3, 3), "bn1": 128, "fc.weight": (10, 128), "fc.bias": (10,)}
    for stage, a, b in [("block1", 16, 32), ("sub_block1", 16, 32), ("block2", 32, 64), ("block3", 64, 128)]:
        if stage == "sub_block1" and not sub_block1:
            continue
        shapes |= {f"{stage}.layer.0.bn1": a, f"{stage}.layer.0.bn2": b}
        shapes |= {f"{stage}.layer.0.conv1.weight": (b, a, 3, 3), f"{stage}.layer.0.conv2.weight": (b, b, 3, 3)}
        shapes |= {f"{stage}.layer.0.convShortcut.weight": (b, a, 1, 1)}
    return shapes


def deepmind_wide():
    """Names and shapes of DeepMind's wide ResNet 16-2: two blocks a stage, the second without a shortcut."""
    shapes = {"init_conv.weight": (16, 3, 3, 3), "batchnorm": 128, "logits.weight": (10, 128), "logits.bias": (10,)}
    for stage, a, b in [(0, 16, 32), (1, 32, 64), (2, 64, 128)]:
        for block, c in [(0, a), (1, b)]:
            at = f"layer.{stage}.block.{block}"
            shapes |= {f"{at}.batchnorm_0": c, f"{at}.batchnorm_1": b}
            shapes |= {f"{at}.conv_0.weight": (b, c, 3, 3), f"{at}.conv_1.weight": (b, b, 3, 3)}
        shapes |= {f"layer.{stage}.block.0.shortcut.weight": (b, a, 1, 1)}
    return shapes


def deepmind_preact():
    """Names and shapes of DeepMind's pre-activation ResNet-18; its shortcuts are 3 x 3."""
    shapes = {"conv_2d.weight": (64, 3, 3, 3), "batchnorm": 512, "logits.weight": (10, 512), "logits.bias": (10,)}
    for stage, a, b in [(0, 64, 64), (1, 64, 128), (2, 128, 256), (3, 256, 512)]:
        for block, c in [(0, a), (1, b)]:
            at = f"layer_{stage}.{block}"
            shapes |= {f"{at}.batchnorm_0": c, f"{at}.batchnorm_1": b}
            shapes |= {f"{at}.conv_2d_1.weight": (b, c, 3, 3), f"{at}.conv_2d_2.weight": (b, b, 3, 3)}
        if a != b:
            shapes |= {f"layer_{stage}.0.shortcut.weight": (b, a, 3, 3)}
    return shapes


def preact(last_norm):
    """Names and shapes of the pre-activation ResNet-18, with the last BatchNorm of Rice et al. or without."""
    shapes = {"conv1.weight": (64, 3, 3, 3), "linear.weight": (10, 512), "linear.bias": (10,)}
    shapes |= {"bn": 512} if last_norm else {}
    for stage, a, b in [(1, 64, 64), (2, 64, 128), (3, 128, 256), (4, 256, 512)]:
        for block, c in [(0, a), (1, b)]:
            at = f"layer{stage}.{block}"
            shapes |= {f"{at}.bn1": c, f"{at}.bn2": b}
            shapes |= {f"{at}.conv1.weight": (b, c, 3, 3), f"{at}.conv2.weight": (b, b, 3, 3)}
        if a != b:
            shapes |= {f"layer{stage}.0.shortcut.0.weight": (b, a, 1, 1)}
    return shapes


def tensors(shapes, dtype=torch.float32):
    """A state dict of random numbers; a number of channels stands for a BatchNorm."""
    spelled = {}
    for name, shape in shapes.items():
        spelled |= batchnorm(name, shape) if isinstance(shape, int) else {name: shape}
    return {
        name: torch.tensor(1) if name.endswith("tracked") else (0.01 + 0.02 * torch.rand(shape)).to(dtype)
        for name, shape in spelled.items()
    }


SMALL = {
    "Carmon2019Unlabeled": (Entry(nets.WideResNet, {"depth": 10, "widen_factor": 2}), trades_wide(True)),
    "Standard": (Entry(nets.WideResNet, {"depth": 10, "widen_factor": 2}), trades_wide(False)),
    "Wang2023Better_WRN-28-10": (
        Entry(nets.DMWideResNet, {"depth": 16, "widen_factor": 2}, "cifar10"),
        deepmind_wide(),
    ),
    "Rebuffi2021Fixing_R18_ddpm": (MODELS["cifar10/Linf"]["Rebuffi2021Fixing_R18_ddpm"], deepmind_preact()),
    "Wong2020Fast": (MODELS["cifar10/Linf"]["Wong2020Fast"], preact(False)),
    "Andriushchenko2020Understanding": (MODELS["cifar10/Linf"]["Andriushchenko2020Understanding"], preact(False)),
    "cifar10/L2/Rice2020Overfitting": (MODELS["cifar10/L2"]["Rice2020Overfitting"], preact(True)),
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty data folder and working directory; with small networks in the place of the large ones."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ROBUST_PL_DATA", str(tmp_path / "data"))
    for name, (entry, _) in SMALL.items():
        table, _, bare = name.rpartition("/")
        monkeypatch.setitem(MODELS[table or "cifar10/Linf"], bare, entry)
    return tmp_path


def write(folder, name, content):
    path = folder / "models" / f"{name if '/' in name else 'cifar10/Linf/' + name}.pt"
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)


@pytest.mark.parametrize("name", SMALL)
def test_files_in_robustbenchs_layout_load_strictly(folder, name):
    entry, shapes = SMALL[name]
    state = tensors(shapes)
    write(folder / "data", name, {entry.part: state} if entry.part else state)
    net = robust_pl.load_model(name)
    loaded = net.state_dict()
    assert set(loaded) == {key for key in state if not key.startswith("sub_block1")}
    assert all(torch.equal(value, state[key]) for key, value in loaded.items())
    assert not net.training
    assert net(torch.rand(2, 3, 32, 32)).isfinite().all()


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("lacking", [0, -1])
def test_a_file_that_lacks_a_tensor_is_refused(folder, name, lacking):
    entry, shapes = SMALL[name]
    state = tensors(shapes)
    # BatchNorm's counters, the last of each, may be missing.
    del state[[key for key in state if not key.endswith("tracked") and not key.startswith("sub_")][lacking]]
    write(folder / "data", name, {entry.part: state} if entry.part else state)
    with pytest.raises(ValueError, match="1 missing"):
        pretrained(name)


@pytest.mark.parametrize("prefix", ["", "module.", "model.", "module.model."])
@pytest.mark.parametrize("wrapped", [True, False])
def test_wrapped_half_precision_files_load(folder, prefix, wrapped):
    state = tensors(trades_wide(True), torch.float16)
    content = {prefix + key: value for key, value in state.items()}
    write(folder / "data", "Carmon2019Unlabeled", {"state_dict": content, "epoch": 3} if wrapped else content)
    net = pretrained("Carmon2019Unlabeled")
    assert net.fc.weight.dtype == torch.float32
    assert torch.equal(net.fc.weight, state["fc.weight"].float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_normalisation_in_a_file_must_be_the_tables(folder, dtype):
    state = tensors(preact(True))
    mean, std = (torch.tensor(v, dtype=dtype).view(1, 3, 1, 1) for v in robustbench.NORMALIZATIONS["cifar10"].values())
    named = {f"module.{key}": value for key, value in state.items()}
    write(folder / "data", "cifar10/L2/Rice2020Overfitting", named | {"module.mu": mean, "module.sigma": std})
    pretrained("cifar10/L2/Rice2020Overfitting")
    write(folder / "data", "cifar10/L2/Rice2020Overfitting", named | {"module.mu": mean, "module.sigma": std / 2})
    with pytest.raises(ValueError, match=r"unexpected: module\.normalize\.std"):
        pretrained("cifar10/L2/Rice2020Overfitting")


def test_of_several_networks_in_a_file_the_one_that_robustbench_takes(folder):
    last, best = tensors(preact(False)), tensors(preact(False))
    alias = {"model_preact_hl1.1.weight": last["conv1.weight"]}
    write(folder / "data", "Andriushchenko2020Understanding", {"best": best, "last": last | alias})
    assert torch.equal(pretrained("Andriushchenko2020Understanding").conv1.weight, last["conv1.weight"])
    write(folder / "data", "Andriushchenko2020Understanding", best)
    with pytest.raises(ValueError, match=r"Understanding\.pt lacks the key 'last'"):
        pretrained("Andriushchenko2020Understanding")


def test_the_data_folder_comes_before_the_working_directory(folder):
    first, second = tensors(trades_wide(False)), tensors(trades_wide(False))
    write(folder, "Standard", second)
    assert torch.equal(pretrained("Standard").fc.bias, second["fc.bias"])
    write(folder / "data", "Standard", first)
    assert torch.equal(pretrained("cifar10/Linf/Standard").fc.bias, first["fc.bias"])


def test_a_missing_file_is_named_in_both_places(folder):
    with pytest.raises(FileNotFoundError, match="nothing is downloaded") as caught:
        robust_pl.load_model("Standard")
    message = str(caught.value)
    assert f"{folder}/data/models/cifar10/Linf/Standard.pt or models/cifar10/Linf/Standard.pt" in message
    assert "\n" not in message


def test_the_table_says_classes_and_threat_model(folder):
    state = tensors(preact(True) | {"linear.weight": (100, 512), "linear.bias": (100,)})
    write(folder / "data", "cifar100/Linf/Rice2020Overfitting", state)
    net = pretrained("cifar100/Linf/Rice2020Overfitting")
    assert net.linear.out_features == 100
    assert net.normalize.mean.flatten().tolist() == pytest.approx([0.50707516, 0.48654887, 0.44091784])


def test_a_bare_name_is_cifar10_linf_or_the_only_one():
    assert robustbench.find("Rice2020Overfitting")[0] == "cifar10/Linf/Rice2020Overfitting"
    assert robustbench.find("Rony2019Decoupling")[0] == "cifar10/L2/Rony2019Decoupling"
    assert robustbench.find("cifar10/L2/Wong2020Fast") is None
    assert robustbench.find("imagenet/Linf/Standard") is None
    with pytest.raises(ValueError, match=r"write cifar10/L2/Gowal2020Uncovering or cifar100/Linf/Gowal2020Uncovering$"):
        pretrained("Gowal2020Uncovering")


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("Rice2020Overfiting", "Rice2020Overfitting"),
        ("cifar10/L2/Rice2020Overfiting", "cifar10/L2/Rice2020Overfitting"),
        ("cifar10/l2/Standard", "cifar10/L2/Standard"),
    ],
)
def test_a_misspelled_name_is_corrected(wrong, right):
    with pytest.raises(ValueError, match=f"did you mean '{right}'"):
        pretrained(wrong)


def test_networks_that_are_not_built_are_told_from_unknown_ones():
    with pytest.raises(ValueError, match="uses XCiT, which robust_pl does not build"):
        pretrained("Debenedetti2022Light_XCiT-S12")
    with pytest.raises(ValueError, match="no pretrained network is called"):
        pretrained("Debenedetti2022Heavy")
    assert not any(name in models for name in NOT_BUILT for models in MODELS.values())


ARCHITECTURE = re.compile(r"(?:WRN-?|_)(\d\d\d?)[-_](\d\d?)(?:_|$)")


@pytest.mark.parametrize(("table", "name"), [(table, name) for table, models in MODELS.items() for name in models])
def test_names_that_state_depth_and_width_get_them(table, name):
    stated = ARCHITECTURE.search(name)
    entry = MODELS[table][name]
    assert entry.normalization == "per_image" or entry.normalization in robustbench.NORMALIZATIONS
    if stated:
        assert (entry.arguments["depth"], entry.arguments["widen_factor"]) == tuple(map(int, stated.groups()))
    if entry.net in (nets.DMWideResNet, nets.DMPreActResNet18):
        assert entry.normalization == table.partition("/")[0]


def test_normalisation_of_single_images():
    net = MODELS["cifar10/Linf"]["Ding2020MMA"]._replace(arguments={"depth": 10, "widen_factor": 1}).build(10)
    x = torch.rand(3, 3, 32, 32)
    z = net.normalize(x)
    assert torch.allclose(z.mean((1, 2, 3)), torch.zeros(3), atol=1e-5)
    assert torch.allclose(z.std((1, 2, 3)), torch.ones(3), atol=1e-5)
    assert torch.equal(net.normalize(torch.full_like(x, 0.5)), torch.zeros_like(x))


def test_downsampling_pads_to_the_right_and_below_only():
    # The last stage's convolution of stride 2 on 16 x 16 sees pixels 0 to 16, so that row 0 never meets padding.
    net = nets.DMWideResNet(depth=10, widen_factor=1)
    block = net.layer[1].block[0]
    with torch.no_grad():
        block.conv_0.weight.zero_()[:, :, 0, 0] = 1.0  # reads the upper left of each window
    z = torch.zeros(1, 16, 4, 4)
    z[:, :, 0, 0] = 5.0
    seen = []
    block.conv_0.register_forward_hook(lambda module, inputs, output: seen.append(output))
    block.eval()(z)
    assert seen[0].shape[2:] == (2, 2)
    assert seen[0][0, 0, 0, 0] > 0
    assert seen[0][0, 0].count_nonzero() == 1


def test_the_two_preactivation_variants_differ_in_their_shortcuts():
    x = torch.rand(2, 3, 32, 32)
    rice, wong = nets.PreActResNet18().eval(), nets.PreActResNet18(variant="wong2020").eval()
    wong.load_state_dict(rice.state_dict(), strict=False)
    assert torch.equal(rice.layer1(rice.conv1(x)), wong.layer1(wong.conv1(x)))  # no projection yet
    assert not torch.allclose(rice.layer2(rice.layer1(rice.conv1(x))), wong.layer2(wong.layer1(wong.conv1(x))))
    with pytest.raises(ValueError, match="variant must be one of rice2020, wong2020"):
        nets.PreActResNet18(variant="rice")


def test_renaming_looks_behind_prefixes():
    one = torch.ones(1)
    names = ["module.sub_block1.a", "module.model.mu", "mu", "mu.weight", "block1.sub_block1.a", "net.sigma"]
    renamed = rename(dict.fromkeys(names, one), RENAMED)
    assert list(renamed) == [
        "module.model.normalize.mean",
        "normalize.mean",
        "mu.weight",
        "block1.sub_block1.a",
        "net.normalize.std",
    ]
