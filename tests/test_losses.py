"""Losses and objectives against numbers worked out by hand, in float64."""

import math

import pytest
import torch

from robust_pl.functional.losses import cross_entropy, dlr, dlr_targeted, hard, kl_divergence, margin, trades

# Softmax of the logarithms of probabilities is those probabilities, which makes hand calculations short.
P = [[0.5, 0.25, 0.25], [0.7, 0.2, 0.1]]
Q = [[0.25, 0.5, 0.25], [0.6, 0.1, 0.3]]
KL = [0.5 * math.log(2) + 0.25 * math.log(0.5), 0.7 * math.log(7 / 6) + 0.2 * math.log(2) + 0.1 * math.log(1 / 3)]


def logs(rows, shift=(0.0, 0.0)):
    return torch.tensor(rows, dtype=torch.float64).log() + torch.tensor(shift, dtype=torch.float64).unsqueeze(1)


def close(found, expected):
    torch.testing.assert_close(found, torch.as_tensor(expected, dtype=torch.float64), atol=1e-8, rtol=0)


def test_kl_divergence_by_hand():
    """KL(softmax(reference) || softmax(logits)): the reference comes first in the formula and second in the call."""
    close(kl_divergence(logs(Q), logs(P)), KL)
    assert abs(KL[1] - 0.13667) < 1e-4


def test_kl_divergence_of_two_classes_by_hand():
    # softmax(0, 0) = (1/2, 1/2); softmax(ln 3, 0) = (3/4, 1/4)
    logits, reference = torch.tensor([[math.log(3), 0.0]], dtype=torch.float64), torch.zeros(1, 2, dtype=torch.float64)
    close(kl_divergence(logits, reference), [0.5 * math.log(2 / 3) + 0.5 * math.log(2)])
    close(kl_divergence(reference, logits), [0.75 * math.log(3 / 2) + 0.25 * math.log(1 / 2)])


def test_kl_divergence_ignores_shifts_and_is_zero_only_where_equal():
    close(kl_divergence(logs(Q, (3.0, -40.0)), logs(P, (7.0, 100.0))), KL)
    close(kl_divergence(logs(P), logs(P)), [0.0, 0.0])
    close(kl_divergence(logs(P, (5.0, 5.0)), logs(P)), [0.0, 0.0])
    assert (kl_divergence(logs(P), logs(Q)) > 0.05).all()


def test_kl_divergence_is_finite_where_the_network_is_sure():
    sure = torch.tensor([[1000.0, 0.0, -1000.0]])
    assert torch.isfinite(kl_divergence(-sure, sure)).all()
    assert kl_divergence(-sure, sure).item() == pytest.approx(2000.0)


def test_batchmean_is_the_sum_over_the_batch_size():
    logits, reference = logs(Q), logs(P)
    batchmean = torch.nn.functional.kl_div(logits.log_softmax(1), reference.softmax(1), reduction="batchmean")
    close(kl_divergence(logits, reference).mean(), batchmean)
    close(kl_divergence(logits, reference).sum() / 2, batchmean)


def test_cross_entropy_by_hand():
    close(cross_entropy(logs(P), torch.tensor([1, 0])), [math.log(4), -math.log(0.7)])
    mixed = torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
    close(cross_entropy(logs(P), mixed), [0.5 * math.log(2) + 0.5 * math.log(4), math.log(10)])


def test_margin_by_hand():
    logits = torch.tensor([[2.0, 0.5, -1.0], [2.0, 0.5, -1.0], [1.0, 1.0, 0.0]], dtype=torch.float64)
    close(margin(logits, torch.tensor([0, 2, 1])), [-1.5, 3.0, 0.0])
    close(margin(logits[:, :2], torch.tensor([0, 1, 1])), [-1.5, 1.5, 0.0])


def test_margin_of_mixed_labels_counts_the_largest_entry():
    logits = torch.tensor([[2.0, 0.5, -1.0], [2.0, 0.5, -1.0]], dtype=torch.float64)
    mixed = torch.tensor([[0.6, 0.4, 0.0], [0.1, 0.2, 0.7]], dtype=torch.float64)
    close(margin(logits, mixed), [-1.5, 3.0])
    assert hard(mixed).tolist() == [0, 2]
    labels = torch.tensor([2, 1])
    assert hard(labels) is labels


def test_margin_gradient_is_plus_one_and_minus_one():
    logits = torch.tensor([[2.0, 0.5, -1.0]], dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(margin(logits, torch.tensor([0])).sum(), logits)
    assert gradient.tolist() == [[-1.0, 1.0, 0.0]]


def test_margin_is_positive_exactly_where_the_sample_is_misclassified():
    logits = torch.randn(200, 5, generator=torch.Generator().manual_seed(0))
    y = torch.arange(200) % 5
    assert torch.equal(margin(logits, y) > 0, logits.argmax(1) != y)


def test_trades_by_hand():
    """Clean prediction P, adversarial prediction Q: CE(P, y) + beta * KL(P || Q), both averaged over the batch."""
    y = torch.tensor([0, 2])
    expected = (math.log(2) + math.log(10)) / 2 + 6.0 * (KL[0] + KL[1]) / 2
    close(trades(logs(P), logs(Q), y, beta=6.0), expected)
    close(trades(logs(P), logs(Q), y, beta=0.0), (math.log(2) + math.log(10)) / 2)
    close(trades(logs(P), logs(P), y, beta=6.0), (math.log(2) + math.log(10)) / 2)
    assert trades(logs(P), logs(Q), y, beta=6.0).shape == ()


def test_trades_equals_the_authors_expression():
    """Zhang et al.: CE(clean) + beta / B * KLDivLoss(size_average=False)(log_softmax(adv), softmax(clean))."""
    y, clean, attacked = torch.tensor([0, 2]), logs(P), logs(Q)
    kl = torch.nn.KLDivLoss(reduction="sum")(attacked.log_softmax(1), clean.softmax(1))
    close(trades(clean, attacked, y, beta=6.0), torch.nn.functional.cross_entropy(clean, y) + 6.0 / 2 * kl)


def test_gradients_of_trades_flow_through_both_branches():
    """By hand for B = 1, K = 2. With p, q the clean and the adversarial softmax:
    d/d adv_i = beta * (q_i - p_i); d/d clean_i = (p_i - 1[i=y]) + beta * p_i * (log(p_i / q_i) - KL).
    """
    clean = logs([[0.75, 0.25]], (0.0,)).requires_grad_()
    attacked = logs([[0.5, 0.5]], (0.0,)).requires_grad_()
    by_clean, by_attacked = torch.autograd.grad(trades(clean, attacked, torch.tensor([0]), 2.0), (clean, attacked))
    kl = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    close(by_attacked, [[2.0 * (0.5 - 0.75), 2.0 * (0.5 - 0.25)]])
    close(by_clean, [[-0.25 + 2 * 0.75 * (math.log(1.5) - kl), 0.25 + 2 * 0.25 * (math.log(0.5) - kl)]])


def test_gradients_of_trades_agree_with_finite_differences():
    y = torch.tensor([0, 2])
    clean, attacked = logs(P).requires_grad_(), logs(Q).requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: trades(a, b, y, 6.0), (clean, attacked))


def test_dlr_by_hand():
    """(largest wrong - right) / (first - third): -(3 - 2) / (3 - 0.5), then (3 - 0.5) / 2.5, then (3 - 2) / 2.5."""
    logits = torch.tensor([[3.0, 2.0, 0.5, -1.0]] * 3, dtype=torch.float64)
    close(dlr(logits, torch.tensor([0, 2, 1])), [-0.4, 1.0, 0.4])
    close(dlr(7 * logits - 5, torch.tensor([0, 2, 1])), [-0.4, 1.0, 0.4])
    close(dlr(logits[:, :3], torch.tensor([0, 2, 1])), [-0.4, 1.0, 0.4])


def test_targeted_dlr_by_hand():
    """(target - right) / (first - (third + fourth) / 2) with the denominator 3 - (0.5 - 1) / 2 = 3.25."""
    logits = torch.tensor([[3.0, 2.0, 0.5, -1.0]] * 3, dtype=torch.float64)
    y, target = torch.tensor([0, 0, 3]), torch.tensor([1, 3, 2])
    close(dlr_targeted(logits, y, target), [-1 / 3.25, -4 / 3.25, 1.5 / 3.25])
    mixed = torch.nn.functional.one_hot(y, 4).double()
    close(dlr_targeted(0.1 * logits + 2, mixed, target), [-1 / 3.25, -4 / 3.25, 1.5 / 3.25])


def test_the_gradient_of_dlr_also_flows_through_its_denominator():
    """d/dz of (b - a) / (a - c) at (a, b, c) = (3, 2, 1), where 0 is right: a: -(1/2) + 1/4, b: 1/2, c: -1/4."""
    logits = torch.tensor([[3.0, 2.0, 1.0]], dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(dlr(logits, torch.tensor([0])).sum(), logits)
    close(gradient, [[-0.25, 0.5, -0.25]])


@pytest.mark.parametrize(("loss", "needed"), [(dlr, 3), (lambda z, y: dlr_targeted(z, y, y), 4)])
def test_dlr_says_how_many_classes_it_needs(loss, needed):
    with pytest.raises(ValueError, match=f"needs at least {needed} classes and the network has {needed - 1}: choose 'ce'"):
        loss(torch.zeros(2, needed - 1), torch.tensor([0, 1]))
    loss(torch.zeros(2, needed), torch.tensor([0, 1]))
