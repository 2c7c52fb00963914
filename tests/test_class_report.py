"""Classes in a report: counts by hand, the section line by line, intervals against simulated truth, the bars."""

import math

import numpy as np
import pytest
import torch

from robust_pl.functional.fairness import nsd, worst_class
from robust_pl.report import Table, as_markdown, count_classes, plot_classes
from robust_pl.report.plots import COLORS, GREY, as_image

NAMES = ["cat", "dog", "cow"]


def small_table(**meta):
    """Class 0 has four samples, class 2 two, class 1 none. Attack b is right where a is not, and the other way round."""
    return Table(
        {
            "index": range(6),
            "label": [0, 0, 0, 0, 2, 2],
            "prediction": [0, 0, 0, 1, 2, 2],
            "prediction_a": [0, 2, 2, 0, 2, 2],
            "prediction_b": [1, 0, 1, 1, 2, 0],
        },
        {"class_names": NAMES, **meta},
    )


def test_classes_by_hand():
    clean, a, b, worst = count_classes(small_table())
    for column in (clean, a, b, worst):
        assert column.classes.tolist() == [0, 2] and column.total.tolist() == [4, 2]
    assert [column.right.tolist() for column in (clean, a, b, worst)] == [[3, 2], [2, 2], [1, 1], [0, 1]]
    assert clean.taken_for == ((1, 1),) and a.taken_for == ((2, 2),) and b.taken_for == ((1, 3),)
    # What the first that fools the network made of it: b of sample 0, a of 1 and 2, and the clean 3 was wrong from the start.
    assert worst.taken_for == ((1, 2), (2, 2))
    assert a.nsd == pytest.approx(0.25 / 0.75) and worst.nsd == pytest.approx(1.0)
    assert (a.worst, b.worst) == (0, 0) and a.worst_tenth == pytest.approx(0.5)


def test_at_most_three_classes_are_named_as_targets():
    label, said = [0] * 9, [1, 2, 2, 3, 3, 3, 4, 5, 0]
    (clean,) = count_classes(Table({"index": range(9), "label": label, "prediction": said}))
    assert clean.taken_for == ((3, 3), (2, 2), (1, 1))


def test_the_report_has_a_section_on_classes():
    lines = as_markdown(small_table()).splitlines()
    assert "## Classes" in lines
    begun = lines[lines.index("## Classes") :]
    assert begun[2] == "| attack | worst class | 95 % interval | accuracy + worst class | NSD | 95 % interval | taken for |"
    a = next(line for line in begun if line.startswith("| a |")).split(" | ")
    assert a[1] == "cat: 50.00%" and a[3:5] == ["116.67", "0.333"] and a[6] == "cow 50.0% |"
    for line in (
        "| class | samples | none (clean) | a | b | worst of all |",
        "| cat | 4 | 75.00% | 50.00% | 25.00% | 0.00% |",
        "| cow | 2 | 100.00% | 100.00% | 50.00% | 50.00% |",
    ):
        assert line in begun
    assert "<details>" not in "".join(begun)
    assert not any("| dog |" in line for line in begun)
    numbered = as_markdown(small_table(class_names=None))
    assert "0: 50.00%" in numbered and "| 2 | 2 | 100.00% |" in numbered


def test_what_is_never_right_has_no_nsd():
    found = as_markdown(Table({"index": [0, 1], "label": [0, 1], "prediction": [1, 0]}))
    assert "| none (clean) | 0: 0.00% |  | 0.00 |  |  | 1 100.0% |" in found and "nan" not in found


def test_one_class_alone_has_no_section():
    assert "## Classes" not in as_markdown(Table({"index": [0, 1], "label": [1, 1], "prediction": [1, 0]}))


def many_classes(count):
    """Of class k under attack, k + 1 of its samples are right."""
    label = np.repeat(np.arange(count), count)
    right = np.arange(count * count) % count <= label
    wrong = (label + 1) % count
    attacked = np.where(right, label, wrong)
    return Table({"index": np.arange(count * count), "label": label, "prediction": label, "prediction_a": attacked})


def test_many_classes_are_shown_the_worst_first():
    text = as_markdown(many_classes(25))
    assert "<details><summary>all 25 classes, the worst first</summary>" in text and "worst tenth" in text
    # The worst three of 25 are right on 1, 2 and 3 of 25 samples.
    assert "| a | 0: 4.00% | " in text and "| 8.00% |" in text
    figure = plot_classes(count_classes(many_classes(25)))
    axes = figure.axes[0]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == [str(k) for k in range(20)]
    assert "20 of 25 classes" in axes.get_xlabel()


# Intervals ----------------------------------------------------------------------------------------------------------


def test_intervals_are_seeded_and_narrow_with_more_samples():
    def column(times):
        return count_classes(Table({k: np.tile(v, times) for k, v in small_table().columns.items()}))[1]

    few, many = column(10), column(1000)
    assert few.interval(worst_class, 1.0) == few.interval(worst_class, 1.0)
    for figure in (worst_class, nsd):
        (a, b), (c, d) = few.interval(figure), many.interval(figure)
        assert 0 <= a < c < d < b and c < figure(torch.from_numpy(many.accuracy)).item() < d
    # One class is always right, so the worst is the other, and its binomial error is sqrt(1/4 / 4000).
    low, high = many.interval(worst_class, 1.0)
    assert high - low == pytest.approx(2 * 1.96 * math.sqrt(0.25 / 4000), rel=0.1)


def test_intervals_hold_the_true_nsd_of_many_small_classes():
    """Where plain percentiles of the bootstrap do in one case of five."""
    generator, held = np.random.default_rng(0), 0
    for _ in range(40):
        true = generator.beta(4, 4, 100)
        right = np.arange(50) < generator.binomial(50, true)[:, None]
        label = np.repeat(np.arange(100), 50)
        said = np.where(right.ravel(), label, (label + 1) % 100)
        (column,) = count_classes(Table({"index": np.arange(5000), "label": label, "prediction": said}))
        low, high = column.interval(nsd)
        held += low <= nsd(torch.from_numpy(true)).item() <= high
    assert held >= 34


# Picture ------------------------------------------------------------------------------------------------------------


def test_the_bars_are_the_accuracies():
    columns = count_classes(small_table())
    figure = plot_classes(columns, NAMES)
    axes = figure.axes[0]
    assert [patch.get_height() for patch in axes.patches] == pytest.approx([75, 100, 50, 100, 25, 50])
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["cat", "cow"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["none (clean)", "a", "b", "worst of all"]
    assert [line[0][1] for line in axes.collections[0].get_segments()] == [0, 50]
    image = np.asarray(as_image(figure)).astype(int)
    for color in (GREY, *COLORS[:2]):
        seen = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
        assert (abs(image - seen) < 12).all(2).sum() > 5000
