"""Accuracies and costs counted by hand, and one batch evaluated on a toy network."""

import math
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from torch import nn

from robust_pl.callbacks import FGSM, PGD
from robust_pl.callbacks.outcome import Outcome, attack_batch, check_names, score
from robust_pl.metrics import AttackCost, ClassAccuracy, Row, Scoreboard
from robust_pl.metrics.scoreboard import as_metrics, as_table, by_class

# Torchmetrics warns of an empty metric; empty ones are tested on purpose.
pytestmark = pytest.mark.filterwarnings("ignore:The ``compute`` method")


def bools(*values):
    return torch.tensor(values, dtype=torch.bool)


# ClassAccuracy ------------------------------------------------------------------------------------------------------


def test_class_accuracy_by_hand():
    metric = ClassAccuracy(4)
    metric.update(bools(1, 1, 0), torch.tensor([0, 0, 1]))
    metric.update(bools(1, 0), torch.tensor([1, 3]))
    assert metric.compute().tolist() == [[2, 1, 0, 0], [2, 2, 0, 1]]


def test_a_row_by_hand():
    """Class 2 has no sample, so it is no worst class; the other three fare 1, 1/2 and 0."""
    row = Row("pgd", right=(2, 1, 0, 0), total=(2, 2, 0, 1))
    assert (row.samples, row.accuracy, row.worst_class, row.worst_tenth, row.fair) == (5, 3 / 5, 0.0, 0.0, 3 / 5)
    assert row.class_accuracy == {0: 1.0, 1: 0.5, 3: 0.0}
    # Mean 1/2, variance (1/4 + 0 + 1/4) / 3 = 1/6.
    assert row.nsd == pytest.approx(math.sqrt(1 / 6) / 0.5, abs=1e-12)


def test_the_worst_tenth_of_eleven_classes_are_two():
    right = (9, 3, 8, 1, 9, 9, 9, 9, 9, 9, 9)
    row = Row("pgd", right, (10,) * 11)
    assert row.worst_class == pytest.approx(0.1, abs=1e-12) and row.worst_tenth == pytest.approx(0.2, abs=1e-12)
    ten = Row("pgd", right[:10], (10,) * 10)
    assert ten.worst_tenth == ten.worst_class == pytest.approx(0.1, abs=1e-12)


def test_a_row_of_nothing_and_one_of_nothing_right():
    empty = Row("clean", (0, 0), (0, 0))
    figures = (empty.accuracy, empty.worst_class, empty.worst_tenth, empty.nsd, empty.fair)
    assert all(map(math.isnan, figures)) and empty.samples == 0
    broken = Row("pgd", (0, 0), (3, 2))
    assert math.isnan(broken.nsd) and broken.fair == broken.worst_tenth == 0.0
    assert "nsd_pgd" not in as_metrics([broken])  # 0 / 0, which JSON does not know
    assert list(as_table([broken], "test").columns[3].cells) == [""]


def test_class_accuracy_does_not_depend_on_batching():
    generator = torch.Generator().manual_seed(0)
    right, y = torch.rand(97, generator=generator) < 0.6, torch.randint(5, (97,), generator=generator)
    whole, parts = ClassAccuracy(5), ClassAccuracy(5)
    whole.update(right, y)
    for r, labels in zip(right.split(10), y.split(10), strict=True):
        parts.update(r, labels)
    assert torch.equal(whole.compute(), parts.compute())
    assert whole.compute().sum(1).tolist() == [right.sum().item(), 97]
    whole.reset()
    assert not whole.compute().any()


def test_counts_are_merged_over_processes_by_sums_and_seconds_by_the_slowest():
    assert ClassAccuracy(3)._reductions.keys() == {"right", "total"}
    assert {fn.__name__ for fn in ClassAccuracy(3)._reductions.values()} == {"dim_zero_sum"}
    reductions = {name: fn.__name__ for name, fn in AttackCost()._reductions.items()}
    assert reductions == {
        "forwards": "dim_zero_sum",
        "backwards": "dim_zero_sum",
        "samples": "dim_zero_sum",
        "seconds": "dim_zero_max",
    }


# AttackCost ---------------------------------------------------------------------------------------------------------


def test_attack_cost_is_per_sample():
    cost = AttackCost()
    assert cost.compute().tolist() == [0.0, 0.0, 0.0]
    cost.update(forwards=44, backwards=40, samples=4, seconds=0.5)
    cost.update(forwards=16, backwards=20, samples=2, seconds=0.25)
    assert cost.compute().tolist() == [10.0, 10.0, 0.75]
    cost.reset()
    assert cost.compute().tolist() == [0.0, 0.0, 0.0]


# Scoreboard ---------------------------------------------------------------------------------------------------------


def board():
    """Six samples of two classes, two attacks, two batches."""
    board = Scoreboard(["a", "b"], 2)
    y = torch.tensor([0, 0, 0, 1])
    clean, a, b = bools(1, 1, 1, 1), bools(1, 1, 0, 0), bools(1, 0, 1, 1)
    losses = torch.tensor([0.0, 1.0, 2.0, 3.0])
    board.update(y, {"clean": clean, "a": a, "b": b}, {"a": (8, 8, 0.5), "b": (4, 0, 0.25)}, losses)
    # A sample that is wrong when clean and "right" under attack counts as wrong in the worst case.
    y, clean, a, b = torch.tensor([1, 1]), bools(0, 1), bools(1, 1), bools(1, 1)
    board.update(y, {"clean": clean, "a": a, "b": b}, {"a": (4, 4, 0.5), "b": (8, 6, 0.25)}, torch.tensor([4.0, 8.0]))
    return board


def test_scoreboard_by_hand():
    clean, a, b, worst = board().rows()
    assert [row.name for row in (clean, a, b, worst)] == ["clean", "a", "b", "worst"]
    assert [row.samples for row in (clean, a, b, worst)] == [6, 6, 6, 6]
    assert clean.accuracy == pytest.approx(5 / 6)
    assert clean.worst_class == pytest.approx(2 / 3)  # class 1: wrong once in three
    assert a.accuracy == pytest.approx(4 / 6)
    assert a.worst_class == pytest.approx(2 / 3)
    assert b.accuracy == pytest.approx(5 / 6)
    assert b.worst_class == pytest.approx(2 / 3)
    # Right everywhere: samples 0 and 5 only, although each attack alone leaves four or more.
    assert worst.accuracy == pytest.approx(2 / 6)
    assert worst.worst_class == pytest.approx(1 / 3)
    assert (a.forwards, a.backwards, a.seconds) == (2.0, 2.0, 1.0)
    assert (b.forwards, b.backwards, b.seconds) == (2.0, 1.0, 0.5)
    assert clean.forwards is None and worst.seconds is None


def test_the_loss_is_the_mean_over_samples_not_over_batches():
    assert board().loss.compute().item() == pytest.approx(3.0)  # 18 / 6; the mean of batch means would be 3.75


def test_scoreboard_as_metrics():
    figures = as_metrics(board().rows())
    kinds = ("acc", "worst_class", "worst_tenth", "fair", "nsd")
    expected = {f"{kind}_{name}" for kind in kinds for name in ("clean", "a", "b", "worst")}
    expected |= {f"{kind}_{name}" for kind in ("forwards", "backwards", "seconds") for name in ("a", "b")}
    assert set(figures) == expected
    assert figures["acc_worst"] == pytest.approx(2 / 6)
    assert figures["worst_class_a"] == pytest.approx(2 / 3)
    assert figures["forwards_a"] == 2.0
    assert figures["fair_worst"] == pytest.approx(2 / 6 + 1 / 3)
    # Under b the classes fare 2/3 and 1: their mean is 5/6, and each is 1/6 away from it.
    assert figures["nsd_b"] == pytest.approx((1 / 6) / (5 / 6))


def test_accuracies_by_class_have_names_where_these_tell_classes_apart():
    rows = board().rows()
    found = by_class(rows, ["cat", "dog"])
    assert found["class_acc_b/cat"] == pytest.approx(2 / 3) and found["class_acc_b/dog"] == 1.0
    assert len(found) == 4 * 2
    numbered = {f"class_acc_{row.name}/{k}" for row in rows for k in (0, 1)}
    for names in (None, ["cat", "cat"], ["cat", "dog", "cow"]):
        assert set(by_class(rows, names)) == numbered


def test_scoreboard_as_table():
    table = as_table(board().rows(), "test")
    assert table.row_count == 4
    assert "test" in str(table.title) and "6 samples" in str(table.title)
    columns = [list(column.cells) for column in table.columns]
    assert columns[1] == ["83.33%", "66.67%", "83.33%", "33.33%"]
    assert columns[2] == ["66.67%", "66.67%", "66.67%", "33.33%"]
    assert columns[3] == ["0.200", "0.000", "0.200", "0.000"]
    assert columns[4] == ["", "2.00", "2.00", ""]


def test_the_table_fits_a_console_and_shows_the_worst_tenth_of_many_classes():
    spent = (1042.5, 291.25, 12345.67)
    rows = [Row(name, (5,) * 100, (10,) * 100, *spent) for name in ("clean", "autoattack_linf", "worst")]
    console = Console(width=100)
    with console.capture() as capture:
        console.print(as_table(rows, "test"))
    said = capture.get()
    assert "worst tenth" in said and "\u2026" not in said
    assert any("autoattack_linf" in line and "12345.67" in line for line in said.splitlines())


def test_scoreboard_without_attacks_has_one_row_and_resets():
    clean_only = Scoreboard([], 2)
    clean_only.update(torch.tensor([0, 1]), {"clean": bools(1, 0)}, {}, torch.tensor([1.0, 3.0]))
    (row,) = clean_only.rows()
    assert (row.name, row.accuracy, row.worst_class, row.samples) == ("clean", 0.5, 0.0, 2)
    clean_only.reset()
    assert clean_only.rows()[0].samples == 0


def test_names_that_modules_use_are_allowed_for_attacks():
    names = ["keys", "forward", "training"]
    odd = Scoreboard(names, 2)
    odd.update(torch.tensor([0]), {n: bools(1) for n in ["clean", *names]}, dict.fromkeys(names, (1, 1, 0.0)), torch.ones(1))
    assert [row.name for row in odd.rows()] == ["clean", *names, "worst"]


@pytest.mark.parametrize(
    ("names", "complaint"),
    [
        (["clean"], "uses itself"),
        (["worst"], "uses itself"),
        (["a", "a"], "own name"),
        (["a/b"], "letters"),
        ([""], "letters"),
    ],
)
def test_names_that_would_hide_each_other_are_refused(names, complaint):
    with pytest.raises(ValueError, match=complaint):
        check_names(names)
    check_names(["pgd-20", "pgd_50", "aa"])


# attack_batch and score ---------------------------------------------------------------------------------------------


class Brightness(nn.Module):
    """Two classes by one pixel: logits (0, 20 * (x - 0.5)); class 1 where the pixel is above 0.5."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(20.0))

    def forward(self, x):
        bright = self.scale * (x.flatten(1)[:, 0] - 0.5)
        return torch.stack([torch.zeros_like(bright), bright], 1)


X = torch.tensor([0.2, 0.45, 0.52, 0.9, 0.7]).view(-1, 1, 1, 1)
Y = torch.tensor([0, 0, 1, 1, 0])  # the last one is wrong when clean


def toy(**attacks):
    return attack_batch(Brightness(), attacks, X, Y, torch.arange(5))


def test_attack_batch_on_a_toy_network():
    outcome = toy(small=FGSM(eps=0.03), large=FGSM(eps=0.1))
    assert outcome.predictions["clean"].tolist() == [0, 0, 1, 1, 1]
    assert outcome.predictions["small"].tolist() == [0, 0, 0, 1, 1]
    assert outcome.predictions["large"].tolist() == [0, 1, 0, 1, 1]
    torch.testing.assert_close(outcome.verdicts["large"].sizes["linf"], torch.full((5,), 0.1))
    torch.testing.assert_close(outcome.logits[:, 1], 20 * (X.flatten() - 0.5))
    assert outcome.verdicts["large"].attacked.x_adv.flatten().tolist() == pytest.approx([0.3, 0.55, 0.42, 0.8, 0.8])


def test_score_of_the_toy_network():
    scoreboard = Scoreboard(["small", "large"], 2)
    outcome = toy(small=FGSM(eps=0.03), large=PGD(eps=0.1, steps=3))
    score(scoreboard, outcome)
    clean, small, large, worst = scoreboard.rows()
    assert [row.accuracy for row in (clean, small, large, worst)] == pytest.approx([0.8, 0.6, 0.4, 0.4])
    assert [row.worst_class for row in (clean, small, large, worst)] == pytest.approx([2 / 3, 0.5, 1 / 3, 1 / 3])
    assert (small.forwards, small.backwards) == (1.0, 1.0)
    assert (large.forwards, large.backwards) == (3.0, 3.0)
    expected = torch.nn.functional.cross_entropy(outcome.logits, Y).item()
    assert scoreboard.loss.compute().item() == pytest.approx(expected)


def test_the_worst_case_is_taken_per_sample_over_attacks():
    """One attack fools the dark samples and the other the bright ones: each alone spares half, together none."""
    verdict = toy(fgsm=FGSM()).verdicts["fgsm"]
    says = {"up": torch.tensor([1, 1, 1, 1]), "down": torch.tensor([0, 0, 0, 0])}
    outcome = Outcome(
        index=torch.arange(4),
        y=torch.tensor([0, 0, 1, 1]),
        logits=torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]),
        verdicts={name: replace(verdict, prediction=said) for name, said in says.items()},
    )
    scoreboard = Scoreboard(["up", "down"], 2)
    score(scoreboard, outcome)
    assert [row.accuracy for row in scoreboard.rows()] == [1.0, 0.5, 0.5, 0.0]


def test_attack_batch_takes_clean_logits_that_are_known():
    known = torch.tensor([[3.0, 0.0]]).expand(5, 2)
    outcome = attack_batch(Brightness(), {}, X, Y, torch.arange(5), logits=known)
    assert outcome.predictions["clean"].tolist() == [0] * 5
    assert outcome.logits is known


def test_attack_batch_names_the_attacks_and_its_columns():
    attack = FGSM(eps=0.1)
    outcome = attack_batch(Brightness(), {"mine": attack}, X, Y, torch.tensor([5, 3, 9, 0, 1]))
    assert attack.name == "mine"
    columns = outcome.columns()
    of_sample = ["index", "label", "prediction", "confidence", "loss"]
    of_attack = ["right", "prediction", "linf", "l2", "l1", "forwards", "backwards"]
    assert list(columns) == [*of_sample, *(f"{kind}_mine" for kind in of_attack)]
    assert columns["forwards_mine"].tolist() == [1] * 5
    assert columns["right_mine"].tolist() == [True, False, False, True, False]
    assert columns["index"].tolist() == [5, 3, 9, 0, 1]
    assert columns["confidence"][3].item() == pytest.approx(1 / (1 + math.exp(-8.0)))


def test_a_targeted_attack_aims_at_another_class():
    outcome = toy(targeted=PGD(eps=0.1, steps=2, random_start=False, targeted=True))
    # With two classes the other class is the only target, so targeted and untargeted meet.
    assert outcome.predictions["targeted"].tolist() == [0, 1, 0, 1, 1]
