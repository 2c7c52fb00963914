"""SSAT: which share of the step a sample trains on, in which modes the network is asked, and how often."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robust_pl.callbacks import FGSM, DeepFool
from robust_pl.methods import SSAT
from robust_pl.nets import SmallCNN

from .test_single_step_methods import batch


class Table(nn.Module):
    """Two pixels: the first is moved, and the second says in which row is looked up where the first fools the network.

    Class 1 is predicted where the entry of the row at 10 times the first pixel is 1, else class 0. The first logit falls
    slightly with the first pixel, so FGSM with label 0 raises it, and the gradient of the second pixel is zero.
    """

    def __init__(self, rows: list[list[int]]) -> None:
        super().__init__()
        self.register_buffer("rows", torch.tensor(rows, dtype=torch.float64))
        self.weight = nn.Parameter(torch.tensor(0.01, dtype=torch.float64))
        self.calls: list[tuple[bool, int, bool]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.calls.append((self.training, len(x), torch.is_grad_enabled()))
        moved, which = x.flatten(1).unbind(1)
        fooled = self.rows[(10 * which).round().long(), (10 * moved).round().long()]
        return torch.stack([-self.weight * moved, 2 * fooled - 1], 1)


#        x   .1 .2 .3   of the first pixel above x = 0
ROWS = {
    (0, 0, 0, 0): 0.3,  # nothing fools: the whole step
    (0, 0, 0, 1): 0.3,  # the whole step alone does
    (0, 1, 0, 0): 0.1,  # a part does, and the whole does not: the distortion that SSAT is about
    (0, 0, 1, 1): 0.2,
    (0, 1, 1, 1): 0.1,  # the smallest of several
    (0, 0, 1, 0): 0.2,
    (1, 0, 0, 0): 0.0,  # misclassified before: no perturbation
    (1, 1, 1, 1): 0.0,
}


def table(**more: int) -> tuple[SSAT, tuple[Tensor, Tensor, Tensor]]:
    method = SSAT(Table([list(row) for row in ROWS]), FGSM(0.3, bn_mode="train"), num_classes=2, **more)
    x = torch.zeros(len(ROWS), 1, 1, 2, dtype=torch.float64)
    x[:, 0, 0, 1] = torch.arange(len(ROWS)) / 10
    return method, (x, torch.zeros(len(ROWS), dtype=torch.int64), torch.arange(len(ROWS)))


@pytest.mark.parametrize("mixed", [False, True])
def test_the_smallest_share_that_fools(mixed: bool) -> None:
    method, (x, y, index) = table()
    y = 0.6 * F.one_hot(y, 2).double() + 0.2 if mixed else y
    example = method.craft((x, y, index))
    expected = x.clone()
    expected[:, 0, 0, 0] = torch.tensor(list(ROWS.values()), dtype=torch.float64)
    assert torch.allclose(example.x_adv, expected, atol=1e-12)
    assert torch.equal(example.x_adv[-2:], x[-2:]), "clean to the last bit"
    logits = method.net(expected)
    own = torch.full_like(logits, 0.2).index_fill(1, torch.tensor(0), 0.8) if mixed else torch.tensor([[1.0, 0.0]]).double()
    assert method.loss(example).item() == pytest.approx(-(own * logits.log_softmax(1)).sum(1).mean().item(), abs=1e-12)


def test_more_checkpoints_find_smaller_shares() -> None:
    method, (x, y, index) = table(checkpoints=2)  # 0.15 rounds to 0.2 in the table, or to 0.1
    found = method.craft((x, y, index)).x_adv[:, 0, 0, 0]
    middle = (10 * torch.tensor(0.15, dtype=torch.float64)).round().long().item()
    expected = [0.0 if row[0] else 0.15 if row[middle] else 0.3 for row in ROWS]
    assert found.tolist() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("checkpoints", "inference_batch", "stacks"),
    [(3, 1024, [16]), (3, 16, [16]), (3, 15, [8, 8]), (3, 1, [8, 8]), (6, 24, [24, 16]), (2, 1024, [8])],
)
def test_checkpoints_are_asked_together_in_eval_mode_without_gradient(
    checkpoints: int, inference_batch: int, stacks: list[int]
) -> None:
    method, data = table(checkpoints=checkpoints, inference_batch=inference_batch)
    whole, _ = table(checkpoints=checkpoints)
    found = method.craft(data).x_adv
    assert method.net.calls == [(True, 8, True), *[(False, n, False) for n in stacks]]
    assert (method.attack.forwards, method.attack.backwards) == (8 * checkpoints, 8)
    assert torch.equal(found, whole.craft(data).x_adv)
    assert method.training and method.net.training and method.net.weight.requires_grad


def test_a_real_network_sample_by_sample() -> None:
    """From a random start with BatchNorm: the same as a loop over samples, and only the attack moves statistics."""
    torch.manual_seed(0)
    net = SmallCNN(width=4)
    x, _, index = batch(64)
    eps = torch.linspace(0.001, 0.05, 64).view(64, 1, 1, 1)  # for several shares
    attack = lambda: FGSM(eps, random_start=True, bn_mode="train")  # noqa: E731
    for _ in range(100):  # until the statistics in eval mode are those of the batch
        y = attack().run(net, x, torch.zeros(64, dtype=torch.int64)).first_logits.argmax(1)
    y[:8] = (y[:8] + 1) % 10  # the others are right at their start, which does not depend on the labels
    state = {k: v.clone() for k, v in net.state_dict().items()}
    found = SSAT(net, attack(), checkpoints=4).craft((x, y, index)).x_adv
    after = {k: v.clone() for k, v in net.state_dict().items()}
    net.load_state_dict(state)
    attacked = attack().run(net, x, y)
    assert all(torch.equal(after[k], v) for k, v in net.state_dict().items())
    net.eval()
    shares = []
    for i in range(len(x)):
        share = 1.0
        for k in (3, 2, 1):
            point = x[i] + k / 4 * (attacked.x_adv[i] - x[i])
            share = k / 4 if net(point.unsqueeze(0)).argmax() != y[i] else share
        shares.append(0.0 if attacked.first_logits[i].argmax() != y[i] else share)
        assert torch.allclose(found[i], x[i] + shares[-1] * (attacked.x_adv[i] - x[i]), atol=1e-6), i
    assert len(set(shares)) >= 4, "the test must see several shares"
    assert ((found - x).abs() <= eps + 1e-6).all() and found.min() >= 0 and found.max() <= 1


def test_the_default_attack_is_that_of_fast_adversarial_training() -> None:
    attack = SSAT(SmallCNN()).attack
    assert (attack.eps, attack.step_size, attack.random_start, attack.bn_mode) == (8 / 255, 10 / 255, True, "train")
    assert SSAT(SmallCNN()).checkpoints == 3


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: SSAT(SmallCNN(), checkpoints=1), "checkpoints=1"),
        (lambda: SSAT(SmallCNN(), checkpoints=0), "checkpoints=0"),
        (lambda: SSAT(SmallCNN(), inference_batch=0), "inference_batch=0"),
        (lambda: SSAT(SmallCNN(width=4), DeepFool(0.1, norm="linf")).craft(batch()), "DeepFool has none"),
    ],
)
def test_bad_arguments(build: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
