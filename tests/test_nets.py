"""The networks: published sizes, normalisation, features, and staying frozen."""

import copy
import sys
import types

import pytest
import torch
from torch import nn

from robust_pl import nets
from robust_pl.nets.preact_resnet import PreActBlock
from robust_pl.nets.resnet import BasicBlock
from robust_pl.nets.resnet2b import VerifiableBlock
from robust_pl.nets.resnet_cifar import PadShortcut, ThinBlock
from robust_pl.nets.wide_resnet import WideBlock

# name, arguments, published number of parameters, width of the features
NETWORKS = [
    ("ResNet18", {}, 11_173_962, 512),
    ("PreActResNet18", {}, 11_172_170, 512),
    ("PreActResNet18", {"variant": "wong2020"}, 11_171_146, 512),
    ("ResNet50", {}, 23_520_842, 2048),
    ("DMPreActResNet18", {}, 12_548_426, 512),
    ("DMWideResNet", {"depth": 28, "widen_factor": 10}, 36_479_194, 640),
    ("ResNet20", {}, 269_722, 64),
    ("ResNet32", {}, 464_154, 64),
    ("ResNet44", {}, 658_586, 64),
    ("ResNet56", {}, 853_018, 64),
    ("ResNet2B", {}, 112_006, 100),
    ("SmallCNN", {"in_channels": 3}, 65_834 + 2 * 9 * 32, 64),
    # Nobody published the sizes of mixtures of experts: worked out from their layers.
    ("MoEResNet18", {}, 2 * 2_755_584 + 54_282 + 269_202, 256),
    ("MoESmallCNN", {"in_channels": 3}, 2 * 18_432 + 1_418 + 4_378, 32),
    ("MoEWideResNet", {"depth": 28, "widen_factor": 10}, 2 * 9_054_720 + 77_914 + 269_202, 320),
    ("WideResNet", {"depth": 28, "widen_factor": 10}, 36_479_194, 640),
    ("WideResNet", {"depth": 34, "widen_factor": 10}, 46_160_474, 640),
    ("WideResNet", {"depth": 70, "widen_factor": 16, "activation": "silu"}, 266_796_506, 1024),
]
SMALL = [n for n in NETWORKS if n[2] < 12_000_000] + [
    ("WideResNet", {"depth": 10, "widen_factor": 1, "activation": "silu", "drop_rate": 0.3}, None, 64)
]
NORMALIZATION = {"mean": (0.4914, 0.4822, 0.4465), "std": (0.247, 0.2435, 0.2616)}


@pytest.mark.parametrize(("name", "arguments", "parameters", "width"), NETWORKS)
def test_the_number_of_parameters_is_the_published_one(name, arguments, parameters, width):
    with torch.device("meta"):
        net = getattr(nets, name)(**arguments)
        assert net.head.in_features == width
    assert sum(p.numel() for p in net.parameters()) == parameters


@pytest.mark.parametrize(("name", "arguments", "parameters", "width"), SMALL)
def test_logits_are_the_head_of_the_features(name, arguments, parameters, width):
    net = getattr(nets, name)(num_classes=7, **arguments, **NORMALIZATION).eval()
    x = torch.rand(2, 3, 32, 32)
    features, logits = net.forward_features(x), net(x)
    assert features.shape == (2, width)
    assert logits.shape == (2, 7)
    assert torch.equal(net.head(features), logits)


@pytest.mark.parametrize(("name", "arguments", "parameters", "width"), SMALL)
def test_normalisation_inside_equals_normalisation_outside(name, arguments, parameters, width):
    inside = getattr(nets, name)(**arguments, **NORMALIZATION).eval()
    outside = getattr(nets, name)(**arguments).eval()
    outside.load_state_dict(inside.state_dict())  # strict: the constants add no names
    x = torch.rand(2, 3, 32, 32)
    z = nets.Normalize(**NORMALIZATION)(x)
    assert torch.equal(inside(x), outside(z))


@pytest.mark.parametrize(("name", "arguments", "parameters", "width"), SMALL)
def test_every_parameter_takes_part(name, arguments, parameters, width):
    net = getattr(nets, name)(**arguments)
    net(torch.rand(2, 3, 32, 32)).sum().backward()
    assert [n for n, p in net.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize(
    ("name", "some"),
    [
        ("ResNet18", "conv1.weight bn1.bias layer1.0.conv1.weight layer2.0.shortcut.0.weight layer2.0.shortcut.1.bias"),
        ("PreActResNet18", "conv1.weight layer1.0.bn1.weight layer2.0.shortcut.0.weight bn.weight linear.bias"),
        (
            "WideResNet",
            "block1.layer.0.bn1.weight block1.layer.0.convShortcut.weight block3.layer.3.conv2.weight fc.bias",
        ),
        ("ResNet2B", "conv1.bias layer1.0.conv1.bias layer1.0.shortcut.0.bias linear1.weight linear2.weight"),
    ],
)
def test_tensors_have_their_published_names(name, some):
    with torch.device("meta"):
        names = getattr(nets, name)().state_dict().keys()
    assert set(some.split()) <= set(names)


@pytest.mark.parametrize(
    ("block", "expected"),
    [
        # conv2 is zero, so the shortcut's part comes out: where it projects, three times the sum of the channels
        (BasicBlock(2, 2), [0.0, 2.0]),  # ReLU after the sum
        (BasicBlock(2, 2, stride=2), [3.0, 3.0]),  # projection: the raw input, 3 (-1 + 2)
        (PreActBlock(2, 2), [-1.0, 2.0]),  # identity: the raw input
        (PreActBlock(2, 2, stride=2), [6.0, 6.0]),  # projection: the activated input, 3 (0 + 2)
        (WideBlock(2, 2, 1, "relu", 0.0), [-1.0, 2.0]),
        (WideBlock(2, 1, 1, "relu", 0.0), [6.0]),
        (ThinBlock(2, 2), [0.0, 2.0]),
        (ThinBlock(2, 4), [0.0, 0.0, 2.0, 0.0]),  # option A
        (VerifiableBlock(2, 2), [0.0, 2.0]),
    ],
)
def test_shortcuts_by_hand(block, expected):
    for module in block.eval().modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 0.0  # a fresh BatchNorm in eval mode is then the identity
    with torch.no_grad():
        for module in block.modules():
            if isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1):
                module.weight.fill_(3)
        for parameter in block.conv2.parameters():
            parameter.zero_()
        out = block(torch.tensor([-1.0, 2.0]).view(1, 2, 1, 1))
    assert out.flatten().tolist() == expected


def test_shortcut_option_a_by_hand():
    z = torch.arange(2 * 4 * 4, dtype=torch.float32).view(1, 2, 4, 4)
    out = PadShortcut(2, 4)(z)
    assert out.shape == (1, 4, 2, 2)
    assert out[0].tolist() == [
        [[0, 0], [0, 0]],
        [[0, 2], [8, 10]],
        [[16, 18], [24, 26]],
        [[0, 0], [0, 0]],
    ]


def test_normalize_by_hand():
    x = torch.tensor([0.5, 1.0]).view(1, 2, 1, 1)
    layer = nets.Normalize(mean=(0.25, 0.5), std=(0.5, 0.25))
    assert layer(x).flatten().tolist() == [0.5, 2.0]
    assert layer.mean.shape == layer.std.shape == (1, 2, 1, 1)
    assert layer.state_dict() == {}


@pytest.mark.parametrize(
    ("mean", "std"), [((0.5,), (0.0,)), ((0.5,), (-1.0,)), ((0.5,), (float("nan"),)), ((0.5, 0.5), (1.0,)), ((), ())]
)
def test_normalize_refuses_wrong_constants(mean, std):
    with pytest.raises(ValueError, match="std"):
        nets.Normalize(mean, std)


def test_normalize_refuses_to_broadcast_channels():
    with pytest.raises(ValueError, match=r"\(B, 3, H, W\)"):
        nets.Normalize(**NORMALIZATION)(torch.rand(2, 1, 4, 4))


@pytest.mark.parametrize("one", ["mean", "std"])
def test_mean_and_std_come_together(one):
    with pytest.raises(ValueError, match="both"):
        nets.SmallCNN(**{one: (0.5,)})


def test_normalisation_must_have_the_images_channels():
    with pytest.raises(ValueError, match="one number a channel"):
        nets.SmallCNN(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


def test_wrong_inputs_are_refused_in_words():
    net = nets.SmallCNN()
    with pytest.raises(ValueError, match=r"SmallCNN takes images \(B, 1, H, W\), got \(2, 3, 8, 8\)"):
        net(torch.rand(2, 3, 8, 8))
    with pytest.raises(ValueError, match="got"):
        net(torch.rand(1, 8, 8))
    with pytest.raises(TypeError, match="uint8"):
        net(torch.zeros(2, 1, 8, 8, dtype=torch.uint8))
    with pytest.raises(ValueError, match="32 x 32"):
        nets.ResNet2B()(torch.rand(1, 3, 28, 28))


@pytest.mark.parametrize(
    "arguments", [{"depth": 29}, {"depth": 4}, {"activation": "gelu"}, {"drop_rate": 1.0}, {"drop_rate": -0.1}]
)
def test_wide_resnet_refuses_wrong_arguments(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        nets.WideResNet(**arguments)


def test_small_cnn_takes_eight_by_eight_digits():
    assert nets.SmallCNN()(torch.rand(2, 1, 8, 8)).shape == (2, 10)


class Student(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nets.SmallCNN(width=2)
        self.teacher = nets.Frozen(nets.SmallCNN(width=2))


def test_frozen_stays_in_eval_mode_and_keeps_its_statistics():
    student = Student()
    before = copy.deepcopy(student.teacher.net.state_dict())
    student.train()
    student.teacher.net(torch.rand(2, 1, 8, 8))
    assert student.net.training
    assert not any(module.training for module in student.teacher.modules())
    assert all(torch.equal(before[name], value) for name, value in student.teacher.net.state_dict().items())


def test_frozen_has_no_parameter_gradient_but_an_input_gradient():
    teacher = nets.Frozen(nets.SmallCNN(width=2))
    assert not any(p.requires_grad for p in teacher.parameters())
    x = torch.rand(2, 1, 8, 8, requires_grad=True)
    teacher(x)[:, 0].sum().backward()
    assert x.grad.abs().sum() > 0
    assert torch.equal(teacher(x), teacher.net.head(teacher.forward_features(x)))


def test_frozen_is_in_no_checkpoint_and_survives_a_strict_load():
    saved, resumed = copy.deepcopy(Student()), Student()
    teacher = copy.deepcopy(resumed.teacher.net.state_dict())
    state = saved.state_dict()
    assert {name.split(".")[0] for name in state} == {"net"}
    resumed.load_state_dict(state)
    assert torch.equal(resumed.net.linear.weight, saved.net.linear.weight)
    assert all(torch.equal(teacher[name], value) for name, value in resumed.teacher.net.state_dict().items())


class FakeTimmNet(nn.Module):
    """The part of timm's interface that is used."""

    def __init__(self, num_classes, in_chans):
        super().__init__()
        self.pretrained_cfg = {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}
        self.conv = nn.Conv2d(in_chans, 4, 3)
        self.fc = nn.Linear(4, num_classes)

    def forward_features(self, z):
        return self.conv(z)

    def forward_head(self, z, pre_logits=False):
        z = z.mean((2, 3))
        return z if pre_logits else self.fc(z)

    def get_classifier(self):
        return self.fc

    def forward(self, z):
        return self.forward_head(self.forward_features(z))


@pytest.fixture
def fake_timm(monkeypatch):
    calls = []

    def create_model(model_name, pretrained=False, num_classes=1000, in_chans=3, **options):
        calls.append((model_name, pretrained, options))
        return FakeTimmNet(num_classes, in_chans)

    module = types.ModuleType("timm")
    module.create_model = create_model
    monkeypatch.setitem(sys.modules, "timm", module)
    return calls


def test_timm_model_wraps_the_network(fake_timm):
    net = nets.TimmModel(7, "vit_tiny", drop_path_rate=0.1, **NORMALIZATION)
    x = torch.rand(2, 3, 8, 8)
    assert fake_timm == [("vit_tiny", False, {"drop_path_rate": 0.1})]
    assert net.forward_features(x).shape == (2, 4)
    assert torch.allclose(net(x), net.head(net.forward_features(x)))
    assert torch.equal(net(x), net.net(nets.Normalize(**NORMALIZATION)(x)))


def test_a_pretrained_timm_model_brings_its_normalisation(fake_timm):
    assert isinstance(nets.TimmModel().normalize, nn.Identity)
    normalize = nets.TimmModel(pretrained=True).normalize
    assert normalize.mean.flatten().tolist() == [0.5] * 3
    assert normalize.std.flatten().tolist() == [0.25] * 3


def test_timm_model_names_the_missing_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)  # importing it now fails
    with pytest.raises(ImportError, match=r"pip install robust_pl\[vision\]"):
        nets.TimmModel()


def test_every_public_name_exists():
    for name in nets.__all__:
        assert getattr(nets, name).__module__.startswith("robust_pl.nets.")


@pytest.mark.slow
def test_small_cnn_learns_the_digits():
    from sklearn.datasets import load_digits

    torch.manual_seed(0)
    digits = load_digits()
    x = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    y = torch.tensor(digits.target)
    order = torch.randperm(len(x))
    train, test = order[:1437], order[1437:]
    net = nets.SmallCNN()
    epochs, batch = 15, 64
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=epochs * (len(train) // batch))
    for _ in range(epochs):
        for rows in train[torch.randperm(len(train))][: len(train) // batch * batch].split(batch):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x[rows]), y[rows]).backward()
            optimizer.step()
            schedule.step()
    accuracy = (net.eval()(x[test]).argmax(1) == y[test]).float().mean().item()
    assert accuracy >= 0.98
