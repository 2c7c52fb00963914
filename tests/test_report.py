"""Reports: intervals against published ones, arithmetic by hand, Markdown line by line, pictures pixel by pixel, curves."""

import json
import warnings

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import Logger
from matplotlib import pyplot
from PIL import Image
from scipy.stats import binomtest
from torch import nn

from robust_pl.callbacks import PGD, RobustnessCurve
from robust_pl.callbacks.attacks.base import Attack
from robust_pl.functional.ratio import Ratio
from robust_pl.report import (
    Curve,
    Table,
    as_markdown,
    interval,
    model_info,
    plot_curves,
    plot_summary,
    summarise,
    worst_images,
    worst_samples,
    write_report,
)
from robust_pl.report.plots import as_image
from robust_pl.report.units import radius

# Newcombe 1998 (Statistics in Medicine 17), table I, the score method without continuity correction.
NEWCOMBE = [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)]


@pytest.mark.parametrize(("right", "total", "low", "high"), NEWCOMBE)
def test_intervals_are_the_published_ones(right, total, low, high):
    assert [round(end, 4) for end in interval(right, total)] == [low, high]


@pytest.mark.parametrize("total", [1, 7, 1000, 10_000])
def test_intervals_are_scipys_and_hold_the_share(total):
    for right in {0, 1, total // 3, total - 1, total}:
        expected = binomtest(right, total).proportion_ci(method="wilson")
        low, high = interval(right, total)
        assert (low, high) == pytest.approx((expected.low, expected.high), abs=1e-12)
        assert 0 <= low <= right / total <= high <= 1


@pytest.mark.parametrize(("right", "total"), [(0, 0), (-1, 3), (4, 3)])
def test_intervals_of_nothing_are_refused(right, total):
    with pytest.raises(ValueError, match=f"right={right} of total={total} is no share"):
        interval(right, total)


def table(**meta):
    """Five samples of classes 0..4; the clean prediction is wrong on the last, pgd breaks 0, aa breaks 1 (then 0 and 1)."""
    label = torch.arange(5)
    columns = {
        "index": torch.arange(5),
        "label": label,
        "prediction": torch.tensor([0, 1, 2, 3, 0]),
        "confidence": torch.tensor([0.5, 0.9, 0.8, 0.7, 0.6]),
        "prediction_pgd": torch.tensor([9, 1, 2, 3, 9]),
        "linf_pgd": torch.tensor([0.02, 0.02, 0.02, 0.02, 0.02]),
        "forwards_pgd": torch.tensor([20, 20, 20, 20, 20]),
        "backwards_pgd": torch.tensor([20, 20, 20, 20, 20]),
        "prediction_aa": torch.tensor([9, 9, 2, 9, 4]),
        "l2_aa": torch.tensor([0.5, 0.25, 0.0, 0.5, 0.5]),
        "forwards_aa": torch.tensor([1, 2, 3, 4, 5]),
        "backwards_aa": torch.tensor([0, 0, 0, 0, 5]),
        "robust_aa_apgd-ce": torch.tensor([True, False, True, True, False]),
        "robust_aa_square": torch.tensor([False, False, True, False, False]),
    }
    attacks = {
        "pgd": {"class": "robust_pl.callbacks.attacks.pgd.PGD", "norm": "linf", "eps": 8 / 255, "steps": 20, "seconds": 1.25},
        "aa": {"class": "AutoAttack", "norm": "l2", "eps": Ratio("0.5"), "version": "standard", "seconds": 1000.0},
    }
    return Table(columns, {"attacks": attacks, "dataset": "cifar10", **meta})


def test_the_summary_by_hand():
    lines = [(line.name, line.right, line.standing, line.part) for line in summarise(table())]
    assert lines == [
        ("none (clean)", 4, 4, False),
        ("pgd", 3, 3, False),
        ("aa", 2, 1, False),  # right on 2 and 4, and 4 was wrong before
        ("apgd-ce", 3, 2, True),
        ("square", 1, 1, True),
        ("worst of all", 1, 1, False),
    ]
    costs = [(line.forwards, line.backwards, line.seconds) for line in summarise(table())]
    assert costs == [(None,) * 3, (20, 20, 1.25), (3, 1, 1000), (None,) * 3, (None,) * 3, (23, 21, 1001.25)]
    assert summarise(table())[1].interval == interval(3, 5)


def test_without_attacks_only_the_clean_line():
    columns = {name: [0, 1] for name in ("index", "label", "prediction")}
    assert [line.name for line in summarise(Table(columns))] == ["none (clean)"]
    assert "## Threat models" not in as_markdown(Table(columns))


def test_parts_belong_to_the_attack_with_the_longer_name():
    columns = {"index": [0], "label": [0], "prediction": [0], "prediction_aa": [0], "prediction_aa_l2": [0]}
    found = Table(columns | {"robust_aa_l2_fab": [True], "robust_aa_fab": [False]})
    assert {name: list(found.parts(name)) for name in found.attacks} == {"aa": ["fab"], "aa_l2": ["fab"]}
    assert found.parts("aa")["fab"].tolist() == [False]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"index": [0]}, "lacks the column 'label'"),
        ({"index": [0], "label": [0], "prediction": [0, 1]}, "'prediction' has 2 samples and 'index' 1"),
        ({"index": [], "label": [], "prediction": []}, "holds no sample"),
    ],
)
def test_tables_that_cannot_be_reported_are_refused(columns, message):
    with pytest.raises(ValueError, match=message):
        Table(columns)


FLAGS = [
    {"name": "zero gradients", "raised": False, "value": 0.001234567, "message": "fine"},
    {"name": "rises", "raised": True, "value": None, "message": "accuracy rises |\nat 16/255"},
]


def test_markdown_line_by_line():
    meta = {"model": "a net", "flags": FLAGS, "hardware": "2 CPU cores", "versions": {"torch": "2.13"}, "config": "seed: 1\n"}
    lines = as_markdown(table(**meta), {"Accuracy": "images/a.png"}).splitlines()
    assert lines[:2] == ["# Robustness of a net on cifar10", ""]
    assert lines[2:10] == [
        "| attack | accuracy | worst so far | 95 % interval | forward | backward | seconds |",
        "| :--- | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| none (clean) | 80.00% | 80.00% | [37.55, 96.38] |  |  |  |",
        "| pgd | 60.00% | 60.00% | [23.07, 88.24] | 20.0 | 20.0 | 1.2 |",
        "| aa | 40.00% | 20.00% | [11.76, 76.93] | 3.0 | 1.0 | 1,000.0 |",
        "| &emsp;apgd-ce | 60.00% | 40.00% | [23.07, 88.24] |  |  |  |",
        "| &emsp;square | 20.00% | 20.00% | [3.62, 62.45] |  |  |  |",
        "| **worst of all** | 20.00% | 20.00% | [3.62, 62.45] | 23.0 | 21.0 | 1,001.2 |",
    ]
    for line in (
        "| pgd | PGD | L∞ | 8/255 | 20 |  |",
        "| aa | AutoAttack | L2 | 0.5 |  | version=standard |",
        "**1 of 2 raised: the accuracies above may be too high.**",
        "| rises | **yes** |  | accuracy rises \\| at 16/255 |",
        "| zero gradients | no | 0.001235 | fine |",
        "![Accuracy](images/a.png)",
        "| hardware | 2 CPU cores |",
        "| torch | 2.13 |",
        "seed: 1",
    ):
        assert line in lines
    assert lines.index("| rises | **yes** |  | accuracy rises \\| at 16/255 |") < lines.index(
        "| zero gradients | no | 0.001235 | fine |"
    )


@pytest.mark.parametrize(
    ("eps", "norm", "text"),
    [
        (8 / 255, "linf", "8/255"),
        (2.5 / 255, "linf", "2.5/255"),
        (0.031, "linf", "0.031"),
        (1.0, "linf", "255/255"),
        (0.0, "linf", "0"),
        (0.5, "l2", "0.5"),
        (Ratio("16/510"), "linf", "16/510"),
        (float("inf"), "l2", "unbounded"),
        ("8/255", None, "8/255"),
        (None, "linf", ""),
    ],
)
def test_radii_as_text(eps, norm, text):
    assert radius(eps, norm) == text


# Of model_info/cifar10/Linf/Rice2020Overfitting.json and its neighbours: name -> type, and None where a file lacks it.
ROBUSTBENCH = {
    **dict.fromkeys(("link", "name", "authors", "dataset", "venue", "architecture", "eps"), str),
    **dict.fromkeys(("clean_acc", "reported", "autoattack_acc"), str),
    **dict.fromkeys(("additional_data", "unreliable"), bool),
    "number_forward_passes": int,
    "footnote": str,
}


def test_the_model_info_has_robustbenchs_fields_and_invents_nothing():
    info = model_info(table())
    assert set(info) == set(ROBUSTBENCH)
    assert all(value is None or isinstance(value, ROBUSTBENCH[name]) for name, value in info.items())
    assert {name: value for name, value in info.items() if value} == {
        "dataset": "cifar10",
        "eps": "0.5",
        "clean_acc": "80.00",
        "autoattack_acc": "20.00",
        "footnote": "Measured on 5 samples.",
    }
    assert json.loads(json.dumps(info)) == info


def test_the_model_info_takes_what_is_known_and_what_was_flagged():
    info = model_info(table(flags=FLAGS), "pgd", {"name": "Mine", "additional_data": False, "footnote": None})
    assert (info["name"], info["additional_data"], info["footnote"], info["unreliable"]) == ("Mine", False, None, True)
    assert (info["eps"], info["autoattack_acc"]) == ("8/255", "60.00")
    assert model_info(table(flags=FLAGS[:1]))["unreliable"] is False
    with pytest.raises(ValueError, match="'titel' is no field of a model info"):
        model_info(table(), known={"titel": "Mine"})
    with pytest.raises(ValueError, match="no attack is called 'fgsm': there are pgd, aa"):
        model_info(table(), "fgsm")


def test_worst_samples():
    assert worst_samples(table(), "aa").tolist() == [1, 3, 0]  # 4 was wrong before; 3 is as near as 0 and more confident
    assert worst_samples(table(), "aa", by="confidence").tolist() == [1, 3, 0]
    assert worst_samples(table(), "aa", 1).tolist() == [1]
    assert worst_samples(table(), "pgd").tolist() == [0]
    with pytest.raises(ValueError, match="choose norm or confidence"):
        worst_samples(table(), "aa", by="size")


def test_worst_images_show_the_samples():
    rows = worst_samples(table(), "aa")
    x = torch.zeros(3, 3, 8, 8)
    x[1, 0] = 1.0  # red
    picture = np.asarray(worst_images(table(), "aa", rows, x, (x + 0.1).clamp(0, 1), "abcdefghij"))
    left, top = 110 + 102, 6
    assert (picture[top + 48, left + 48] == (255, 0, 0)).all()
    assert (picture[top + 118 + 48, left + 48] == (255, 26, 26)).all()  # 0.1 as a byte
    assert (picture[top + 236 + 48, left + 48] == (128, 255, 255)).all()  # the difference, magnified by five
    captions = picture[top + 97 : top + 112]
    assert captions.min() < 100 and (captions.max(2) - captions.min(2)).max() == 0  # black: right on clean images
    assert (picture[top + 118 + 97 : top + 118 + 112, :, 0] == 255).all()  # red on white: wrong under attack
    with pytest.raises(ValueError, match="give as many of each"):
        worst_images(table(), "aa", rows, x[:1], x)


def curve(**changes):
    right = np.array([[1, 1, 1, 1], [1, 1, 0, 1], [1, 0, 0, 0], [0, 1, 0, 1]], dtype=bool)
    return Curve.of("net", "linf", [0, 2 / 255, 8 / 255, 4 / 255], right[:, [0, 1, 3, 2]], **changes)


def test_a_curve_by_hand():
    found = curve()
    assert found.eps == (0, 2 / 255, 4 / 255, 8 / 255)
    assert found.raw == (3, 3, 1, 3)
    assert found.standing == (3, 2, 1, 1)  # what was broken once stays broken, and the last was wrong from the start
    assert found.accuracy == (0.75, 0.5, 0.25, 0.25)
    assert found.rises == (8 / 255,)
    assert found.intervals[0] == interval(3, 4)
    assert Curve.from_dict(json.loads(json.dumps(found.as_dict()))) == found


def test_a_rise_of_one_per_cent_is_noise():
    right = np.zeros((100, 3), dtype=bool)
    right[:30, 0] = right[:31, 1] = right[:32, 2] = True
    assert Curve.of("net", "l2", [1, 2, 3], right).rises == (3.0,)  # two above the lowest before


@pytest.mark.parametrize(
    ("eps", "shape", "message"), [([1, 2], (3, 3), "one column"), ([1, 1], (3, 2), "twice"), ([1], (0, 1), "one column")]
)
def test_curves_of_odd_shapes_are_refused(eps, shape, message):
    with pytest.raises(ValueError, match=message):
        Curve.of("net", "l2", eps, np.ones(shape, dtype=bool))


def pixels(figure, *colors):
    """How many pixels of a figure have nearly each of these colours."""
    image = np.asarray(as_image(figure)).astype(int)
    assert image.shape[0] > 300 and image.shape[1] > 800
    return [int((abs(image - np.array(color)) < 12).all(2).sum()) for color in colors]


BLUE, ORANGE, RED = (0, 114, 178), (213, 94, 0), (192, 0, 0)


def test_plots_show_what_they_should():
    falling = Curve.of("falls", "linf", [0, 1 / 255], [[True, False], [True, True]])
    blue, *others = pixels(plot_curves([falling]), BLUE, ORANGE, RED)
    assert blue > 500 and others == [0, 0]
    both = plot_curves([falling, curve()])
    blue, orange, red = pixels(both, BLUE, ORANGE, RED)
    assert blue > 500 and orange > 500 and red > 50
    texts = [text.get_text() for text in both.axes[0].get_legend().get_texts()]
    assert texts == [
        "falls (2 samples)",
        "net (4 samples)",
        "at this radius alone",
        "rises by more than 1%: check for gradient masking",
    ]
    assert both.axes[0].get_xlabel() == "L∞ radius ε in units of 1/255"
    assert both.axes[0].lines[0].get_xdata().tolist() == pytest.approx([0, 1])
    assert both.axes[0].lines[0].get_ydata().tolist() == [100, 50]
    bars = plot_summary(summarise(table()))
    assert pixels(bars, BLUE)[0] > 5000
    assert [patch.get_width() for patch in bars.axes[0].patches][:6] == pytest.approx([80, 60, 40, 60, 20, 20])
    with pytest.raises(ValueError, match="share one norm, got l2, linf"):
        plot_curves([falling, Curve.of("other", "l2", [1], [[True]])])


def test_drawing_leaves_matplotlibs_state_alone():
    before = dict(pyplot.rcParams), pyplot.get_fignums(), pyplot.get_backend()
    as_image(plot_curves([curve()]))
    assert (dict(pyplot.rcParams), pyplot.get_fignums(), pyplot.get_backend()) == before


class Recorder(Logger):
    name, version = "recorder", 0

    def __init__(self):
        super().__init__()
        self.images, self.tables = {}, {}

    def log_image(self, key, images):
        self.images[key] = images

    def log_table(self, key, columns, data):
        self.tables[key] = (columns, data)

    def log_metrics(self, metrics, step=None): ...

    def log_hyperparams(self, *args, **kwargs): ...


def test_the_whole_report(tmp_path):
    logger = Recorder()
    grids = {"Worst of pgd": Image.new("RGB", (20, 10), "red")}
    path = write_report(table(), tmp_path / "report", curves=[curve()], grids=grids, loggers=[logger, object()])
    text = path.read_text()
    for name in ("accuracy.png", "classes.png", "robustness_curve.png", "worst_of_pgd.png"):
        assert f"(images/{name})" in text
        with Image.open(path.parent / "images" / name) as picture:
            assert np.asarray(picture).std() > 0 or name == "worst_of_pgd.png"
    assert json.loads((path.parent / "robustbench.json").read_text()) == model_info(table())
    columns, rows = logger.tables["report/summary"]
    assert columns[0] == "attack" and rows[1][:2] == ["pgd", "60.00%"]
    columns, rows = logger.tables["report/classes"]
    assert columns == ["class", "samples", "none (clean)", "pgd", "aa", "worst of all"]
    assert rows[4] == ["4", "1", "0.00%", "0.00%", "100.00%", "0.00%"]
    titles = ("Accuracy under attack", "Accuracy by class", "Robustness curve", "Worst of pgd")
    assert set(logger.images) == {f"report/{title}" for title in titles}


class Threshold(nn.Module):
    """Class 1 where the mean pixel is above a half; so an image at distance d from that is broken at exactly d."""

    def forward(self, x):
        return torch.stack([torch.zeros(len(x)), 10 * (x.mean((1, 2, 3)) - 0.5)], 1)


class Measured(LightningModule):
    num_classes = 2

    def __init__(self):
        super().__init__()
        self.net = Threshold()

    def forward(self, x):
        return self.net(x)

    def test_step(self, batch, batch_idx): ...


DISTANCES = torch.tensor([0.05, 0.15, 0.25, 0.35, -0.05, 0.15])  # the fifth is wrong from the start


def run(callback, tmp_path, batch_size=4, logger=False):
    x = (0.5 + DISTANCES).view(-1, 1, 1, 1).expand(-1, 1, 2, 2).contiguous()
    y = torch.ones(len(x), dtype=torch.long)
    data = torch.utils.data.TensorDataset(x, y, torch.arange(len(x)))
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu", "logger": logger}
    trainer = Trainer(default_root_dir=tmp_path, callbacks=[callback], **quiet)
    trainer.test(Measured(), torch.utils.data.DataLoader(data, batch_size), verbose=False)
    return callback.curve


@pytest.mark.parametrize("batch_size", [1, 4, 6])
def test_the_callback_finds_the_curve_that_is_known(tmp_path, batch_size):
    logger = Recorder()
    attack = PGD(steps=2, random_start=False)
    found = run(RobustnessCurve(attack, [0.1, 0.4, 0.2, Ratio("3/10")], samples=5), tmp_path, batch_size, logger)
    assert found.eps == (0, 0.1, 0.2, 0.3, 0.4)
    assert found.raw == found.standing == (4, 3, 2, 1, 0)
    assert found.total == 5  # the sixth lies behind
    assert attack.samples == 4 * 5 and attack.backwards == 4 * 5 * 2
    assert Curve.from_dict(json.loads((tmp_path / "images/robustness_curve.json").read_text())) == found
    with Image.open(tmp_path / "images/robustness_curve.png") as picture:
        assert picture.size[0] > 800
    assert set(logger.images) == {"test/robustness_curve"}


class Fading(Attack):
    """Breaks everything at 0.1 and nothing at larger radii, as an attack does whose gradients are masked."""

    def perturb(self, problem, x, y):
        return problem.project(x - problem.eps) if problem.eps <= 0.1 else x


def test_an_attack_that_fades_is_reported(tmp_path):
    with pytest.warns(UserWarning, match=r"Fading finds less at a larger radius: the accuracy rises at eps=0\.2"):
        found = run(RobustnessCurve(Fading(), [0.1, 0.2]), tmp_path)
    assert found.raw == (5, 4, 5)
    assert found.standing == (5, 4, 4)
    assert found.rises == (0.2,)


def test_an_attack_that_does_not_fade_is_not(tmp_path):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*finds less")
        run(RobustnessCurve(PGD(steps=1), [0.1]), tmp_path)


class MustFit(PGD):
    def fit(self, model, data): ...


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"eps": []}, "must name at least one radius"),
        ({"eps": [0.1, Ratio("0.1")]}, "each once"),
        ({"eps": [8.0]}, "did you mean 8/255"),
        ({"samples": 0}, "samples=0 must be"),
        ({"attack": MustFit()}, "MustFit must see training data first"),
    ],
)
def test_curves_that_cannot_be_measured_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        RobustnessCurve(**{"attack": PGD(), "eps": [0.1], **arguments})
