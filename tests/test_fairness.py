"""Fairness between classes: figures by hand, class-wise errors, and evaluations that were stopped."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from robust_pl import evaluate
from robust_pl.callbacks import FGSM, PGD
from robust_pl.functional.fairness import class_gaps, class_means, class_sums, nsd, worst_class, worst_tenth
from robust_pl.metrics import ClassErrors

# Two columns; class 0 has the samples 0 and 3, class 1 only sample 1, class 2 none, class 3 only sample 2.
VALUES = torch.tensor([[1.0, 10.0], [2.0, 20.0], [4.0, 40.0], [8.0, 80.0]], dtype=torch.float64)
Y = torch.tensor([0, 1, 3, 0])
NAN = math.nan


def close(found, expected, nan=False):
    expected = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(found.double(), expected, atol=1e-8, rtol=0, equal_nan=nan)


def test_class_sums_by_hand():
    sums, counts = class_sums(VALUES, Y, 4)
    close(sums, [[9.0, 90.0], [2.0, 20.0], [0.0, 0.0], [4.0, 40.0]])
    close(counts, [2.0, 1.0, 0.0, 1.0])
    means = class_means(sums, counts)
    close(means, [[4.5, 45.0], [2.0, 20.0], [NAN, NAN], [4.0, 40.0]], nan=True)
    # The mean over the three classes that occur is 3.5, not 10.5 / 4.
    close(class_gaps(means), [[1.0, 10.0], [-1.5, -15.0], [0.0, 0.0], [0.5, 5.0]])


def test_class_sums_of_one_column_need_no_second_dimension():
    sums, counts = class_sums(VALUES[:, 0], Y, 4)
    assert sums.shape == (4, 1) and counts.shape == (4,)
    close(sums[:, 0], [9.0, 2.0, 0.0, 4.0])


def test_class_sums_of_mixed_labels_count_by_share():
    shares = torch.tensor([[0.75, 0.25, 0.0], [0.0, 1.0, 0.0]], dtype=torch.float64)
    sums, counts = class_sums(VALUES[:2], shares, 3)
    close(sums, [[0.75, 7.5], [2.25, 22.5], [0.0, 0.0]])
    close(counts, [0.75, 1.25, 0.0])
    pure = torch.nn.functional.one_hot(Y, 4).double()
    for mixed, plain in zip(class_sums(VALUES, pure, 4), class_sums(VALUES, Y, 4), strict=True):
        close(mixed, plain)


def test_class_sums_keep_no_graph_and_sum_half_precision_in_float32():
    values = torch.full((1000,), 1.0, dtype=torch.bfloat16, requires_grad=True)
    sums, counts = class_sums(values, torch.zeros(1000, dtype=torch.int64), 2)
    assert not sums.requires_grad and sums.dtype == torch.float32
    # In bfloat16 the sum of ones stops at 256.
    close(sums[:, 0], [1000.0, 0.0])
    close(counts, [1000.0, 0.0])


def test_class_sums_of_other_shapes_are_refused():
    with pytest.raises(ValueError, match=r"values \(4, 2\) and y \(3,\) of 4 classes do not agree: give values"):
        class_sums(VALUES, Y[:3], 4)
    with pytest.raises(ValueError, match="do not agree"):
        class_sums(VALUES, torch.full((4, 3), 1 / 3), 4)


def test_class_errors_over_batches_are_those_of_all_samples_and_survive_a_checkpoint():
    whole, first = ClassErrors(4, 2), ClassErrors(4, 2)
    whole.add(VALUES.float(), Y)
    first.add(VALUES[:1].float(), Y[:1])
    again = ClassErrors(4, 2)
    again.load_state_dict(first.state_dict())
    again.add(VALUES[1:].float(), Y[1:])
    assert torch.equal(again.means()[[0, 1, 3]], whole.means()[[0, 1, 3]]) and again.means()[2].isnan().all()
    again.reset()
    assert again.means().isnan().all() and not again.counts.any()


def sum_on(rank: int, folder: str) -> None:
    """One of two processes: batches of other sizes, and a class that only the second one has."""
    torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    errors = ClassErrors(4, 2)
    mine = slice(0, 1) if rank == 0 else slice(1, 4)
    errors.add(VALUES[mine].float(), Y[mine])
    torch.save(errors.state_dict(), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_class_errors_of_two_processes_are_those_of_one(tmp_path):
    torch.multiprocessing.start_processes(sum_on, (str(tmp_path),), nprocs=2, start_method="fork")
    one = ClassErrors(4, 2)
    one.add(VALUES.float(), Y)
    for rank in (0, 1):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert all(torch.equal(found[name], tensor) for name, tensor in one.state_dict().items())


# Figures ------------------------------------------------------------------------------------------------------------


def test_figures_of_classes_by_hand():
    """NSD of (1/5, 2/5, 3/5): mean 2/5, variance (1 + 0 + 1)/3 * 1/25, so sqrt(2/3)/5 / (2/5) = sqrt(1/6)."""
    accuracy = torch.tensor([[0.2, 0.4, 0.6], [0.5, 0.5, 0.5], [0.0, 0.9, 0.0]], dtype=torch.float64)
    close(nsd(accuracy), [math.sqrt(1 / 6), 0.0, math.sqrt(2)])
    close(worst_class(accuracy), [0.2, 0.5, 0.0])
    close(worst_tenth(accuracy), [0.2, 0.5, 0.0])
    assert nsd(torch.zeros(3)).isnan()
    twenty_one = torch.arange(21, dtype=torch.float64).flip(0) / 20
    close(worst_tenth(twenty_one), (0 + 1 + 2) / 3 / 20)


def test_nsd_changes_neither_with_the_level_nor_with_the_order():
    accuracy = torch.rand(7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    close(nsd(accuracy.flip(0) / 3), nsd(accuracy))


# Evaluations that were stopped ---------------------------------------------------------------------------------------


class Stops(PGD):
    """Is killed at its second batch."""

    seen: list[int] = []  # noqa: RUF012

    def perturb(self, problem, x, y):
        self.seen.append(len(x))
        if len(self.seen) == 2:
            raise KeyboardInterrupt
        return super().perturb(problem, x, y)


def test_a_resumed_evaluation_gives_the_same_figures(tmp_path: Path):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    x = torch.rand(60, 1, 4, 4)
    with torch.no_grad():
        net[1].bias -= net(x).mean(0)  # so that every class occurs
        y = net(x).argmax(1)
    y[::7] = (y[::7] + 1) % 3
    attacks = {"fgsm": FGSM(eps=0.05), "stops": Stops(eps=0.05, steps=2)}
    with pytest.raises(KeyboardInterrupt):
        evaluate(net, (x, y), attacks, batch_size=20, store=tmp_path / "resumed")
    reports = [evaluate(net, (x, y), attacks, batch_size=20, store=tmp_path / name) for name in ("resumed", "whole")]
    assert len(Stops.seen) == 2 + 2 + 3  # the first batch is not attacked again
    assert reports[0].rows[0].right == reports[1].rows[0].right
    found = [json.loads((tmp_path / name / "figures.json").read_text()) for name in ("resumed", "whole")]
    found = [{name: value for name, value in each.items() if not name.startswith("seconds_")} for each in found]
    assert found[0] == found[1]
    kinds = ("acc", "worst_class", "worst_tenth", "fair", "nsd")
    assert {f"{kind}_{name}" for kind in kinds for name in ("clean", "fgsm", "stops", "worst")} <= set(found[0])
    by_hand = [reports[1].rows[3].right[k] / (y == k).sum().item() for k in range(3)]
    assert [found[0][f"class_acc_worst/{k}"] for k in range(3)] == pytest.approx(by_hand, abs=1e-12)
    assert found[0]["nsd_worst"] == pytest.approx(np.std(by_hand) / np.mean(by_hand), abs=1e-12)
