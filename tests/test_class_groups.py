"""Groups of classes: which logits count, everywhere alike."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn

from robust_pl import evaluate
from robust_pl.callbacks import FGSM, PGD, RobustEvaluation
from robust_pl.data import ImageDataModule
from robust_pl.data.images import ImagesInMemory
from robust_pl.functional.class_groups import ClassGroups
from robust_pl.methods import StandardTraining
from robust_pl.nets import GroupedNet
from robust_pl.nets.grouped import group_classes, grouped

LOGITS = torch.tensor([[4.0, 1.0, 3.0, 2.0, 5.0], [0.0, 2.0, 1.0, 7.0, 6.0]])


def test_one_class_a_group_is_a_selection() -> None:
    assert torch.equal(ClassGroups([[2], [0]])(LOGITS), LOGITS[:, [2, 0]])


def test_the_highest_member_counts() -> None:
    groups = ClassGroups([[1], [0, 2, 3]])
    assert groups(LOGITS).tolist() == [[1.0, 4.0], [2.0, 7.0]]
    # As the winner among all members, mapped to its group.
    members, owner = torch.tensor([1, 0, 2, 3]), torch.tensor([0, 1, 1, 1])
    logits = torch.randn(50, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(groups(logits).argmax(1), owner[logits[:, members].argmax(1)])


def test_mean_of_probabilities_over_all_classes() -> None:
    groups = ClassGroups([[1], [0, 2, 3]], "mean")
    p = LOGITS.softmax(1)
    torch.testing.assert_close(groups(LOGITS).exp(), torch.stack([p[:, 1], p[:, [0, 2, 3]].mean(1)], 1))
    # Neither the highest member nor the sum: one likely member of many counts less than a group of one.
    assert ClassGroups([[0], [4, 1, 2, 3]], "mean")(LOGITS)[0].argmax() == 0
    assert ClassGroups([[0], [4, 1, 2, 3]])(LOGITS)[0].argmax() == 1


@pytest.mark.parametrize("pool", ["highest", "mean"])
def test_gradients(pool: str) -> None:
    logits = LOGITS.double().requires_grad_()
    assert torch.autograd.gradcheck(ClassGroups([[1], [0, 2, 3]], pool), (logits,))


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"gives logits \(2, 5\) .* at least 8 classes: test a network"):
        ClassGroups([[7]])(LOGITS)
    for groups in ([], [[1], []], [[-1]]):
        with pytest.raises(ValueError, match="at least one group"):
            ClassGroups(groups)
    with pytest.raises(ValueError, match="pool='sum' is unknown: choose one of highest, mean"):
        ClassGroups([[1]], "sum")


def test_a_hook_that_goes_again() -> None:
    net = nn.Identity()
    with grouped(net, ClassGroups([[2]])):
        assert net(LOGITS).tolist() == [[3.0], [1.0]]
    assert net(LOGITS) is LOGITS
    with grouped(net, None):
        assert net(LOGITS) is LOGITS
    group_classes(net, ClassGroups([[2]])).remove()
    assert net(LOGITS) is LOGITS and not list(net.state_dict())
    assert GroupedNet(net, [[2], [0, 1]])(LOGITS).tolist() == [[3.0, 4.0], [1.0, 2.0]]


class Groups(ImageDataModule):
    """Four classes, of which the network has six; its first class is outside."""

    class_names = ["a", "b", "c", "d"]  # noqa: RUF012
    image_shape = (1, 2, 2)

    @property
    def class_groups(self) -> ClassGroups:
        """Made when it is asked for, in inference mode say."""
        return ClassGroups([[1], [2], [3], [4, 5]])

    @property
    def net_classes(self) -> int:
        return 6

    def load_train(self) -> ImagesInMemory:
        raise NotImplementedError

    def load_test(self) -> ImagesInMemory:
        draw = torch.Generator().manual_seed(1)
        images = torch.randint(64, 192, (24, 1, 2, 2), generator=draw, dtype=torch.uint8)
        return ImagesInMemory(images, torch.arange(24) % 4)


class Six(nn.Module):
    """Always says class 0 unless groups are asked for; the others are linear in the pixels."""

    def __init__(self) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(6, 4, generator=draw))

    def forward(self, x: Tensor) -> Tensor:
        logits = (x.flatten(1) - 0.5) @ self.weight.T
        return torch.cat([logits[:, :1] + 100, logits[:, 1:]], 1)


def by_hand(net: Six, x: Tensor) -> Tensor:
    logits = net(x)
    return torch.stack([*(logits[:, i] for i in (1, 2, 3)), logits[:, 4:].amax(1)], 1)


def test_evaluation_attacks_and_predicts_within_the_groups() -> None:
    data, net = Groups(eval_batch_size=10), Six()
    x, y = data.test_set.read(torch.arange(24), None)
    grad_of = x.clone().requires_grad_()
    torch.nn.functional.cross_entropy(by_hand(net, grad_of), y, reduction="sum").backward()
    expected = (by_hand(net, (x + 0.1 * grad_of.grad.sign()).clamp(0, 1)).argmax(1) == y).double().mean().item()
    clean = (by_hand(net, x).argmax(1) == y).double().mean().item()
    assert clean != expected

    report = evaluate(net, data, {"fgsm": FGSM(eps=0.1)})
    assert report.metrics["acc_clean"] == pytest.approx(clean)
    assert report.metrics["acc_fgsm"] == pytest.approx(expected)
    assert net(x).shape == (24, 6)

    method = StandardTraining(net, num_classes=6)
    evaluation = RobustEvaluation()
    attack = PGD(eps=0.1, steps=1, step_size=0.1, random_start=False)
    attack.name = "pgd"
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, callbacks=[evaluation, attack])
    (figures,) = trainer.test(method, data, verbose=False)
    assert figures["test/acc_clean"] == pytest.approx(clean)
    assert figures["test/acc_pgd"] == pytest.approx(expected)
    assert len(evaluation.rows[0].total) == 4
    assert method(x).shape == (24, 6)


def test_a_network_without_the_classes_is_refused_before_anything_runs() -> None:
    method = StandardTraining(nn.Sequential(nn.Flatten(), nn.Linear(4, 4)), num_classes=4)
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
    with pytest.raises(ValueError, match=r"at least 6 classes"):
        trainer.test(method, Groups(eval_batch_size=10), verbose=False)
    assert method(torch.rand(2, 1, 2, 2)).shape == (2, 4)
