"""Fairness between classes: figures by hand, and class-wise errors."""

import math

import pytest
import torch

from robust_pl.functional.fairness import class_gaps, class_means, class_sums
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
