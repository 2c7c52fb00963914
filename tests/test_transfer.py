"""Attacks made on one network and judged on another, and the sizes that are compared with them."""

import warnings

import pytest
import torch
import yaml
from torch import nn

import robust_pl as package
from robust_pl.callbacks import BIM, DIM, FGSM, MIM, PGD, EoT, TransferEvaluation
from robust_pl.evaluation.transfer import transfer_table
from robust_pl.functional.perturbation import eight_bit, per_pixel, perturbation_sizes, saturated
from robust_pl.functional.transfer import succeeded
from robust_pl.nets import SmallCNN

from .test_attacks import Counting, linear, network, samples

# Sizes ------------------------------------------------------------------------------------------------------------


def test_sizes_by_hand():
    """Four pixels: d = (3, 4, 0, 0) / 100 has l2 0.05 and linf 0.04; the ball of 0.05 allows an l2 size of 0.05 * sqrt(4)."""
    x = torch.full((2, 1, 2, 2), 0.5, dtype=torch.float64)
    x_adv = x.clone()
    x_adv[0, 0, 0] += torch.tensor([0.03, -0.04])
    x_adv[1] += 0.05
    sizes = perturbation_sizes(x_adv, x, 0.05)
    assert sizes.l2.tolist() == pytest.approx([0.05, 0.1])
    assert sizes.linf.tolist() == pytest.approx([0.04, 0.05])
    assert sizes.saturation.tolist() == pytest.approx([0.5, 1.0])
    each = perturbation_sizes(x_adv, x, torch.tensor([0.1, 0.05]).view(2, 1, 1, 1))
    assert each.saturation.tolist() == pytest.approx([0.25, 1.0])
    assert perturbation_sizes(x_adv, x, 0.2, "l2").saturation.tolist() == pytest.approx([0.25, 0.5])
    assert perturbation_sizes(x, x, 0.0).saturation.tolist() == [0, 0]


def test_the_extreme_fills_the_ball_but_for_the_box():
    x = torch.tensor([0.5, 0.5, 0.5, 0.98], dtype=torch.float64).view(1, 1, 2, 2)
    d = torch.tensor([0.01, -0.001, 0.0, 0.02], dtype=torch.float64).view(1, 1, 2, 2)
    assert saturated(x + d, x, 0.1).flatten().tolist() == pytest.approx([0.6, 0.4, 0.5, 1.0])
    inner = 0.3 + 0.4 * torch.rand(3, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    noisy = inner + 0.01 * torch.randn(3, 3, 5, 5, generator=torch.Generator().manual_seed(1))
    assert perturbation_sizes(saturated(noisy, inner, 0.1), inner, 0.1).saturation.tolist() == pytest.approx(
        [1, 1, 1], rel=1e-5
    )


def test_small_helpers():
    x = torch.zeros(2, 3, 4, 4)
    assert [per_pixel(0.48, x, norm) for norm in ("linf", "l2", "l1")] == pytest.approx([0.48, 0.48 / 48**0.5, 0.01])
    grid = torch.arange(256) / 255
    assert torch.equal(eight_bit(grid), grid) and torch.equal(eight_bit(grid + 0.001), grid)


@pytest.mark.parametrize(
    ("targeted", "hit", "could"),
    [(False, [1, 0, 0, 0], [1, 1, 0, 0]), (True, [0, 0, 0, 1], [0, 0, 1, 1])],
)
def test_success_counts_what_was_none_before(targeted, hit, could):
    """Goal 1; before right, right, wrong, wrong; after wrong, right, wrong, right."""
    found = succeeded(torch.tensor([1, 1, 0, 0]), torch.tensor([0, 1, 0, 1]), torch.ones(4, dtype=torch.int64), targeted)
    assert [part.int().tolist() for part in found] == [hit, could]


# A pair of networks -----------------------------------------------------------------------------------------------


def trained(seed):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = network()
    x, y = samples(192, seed=1)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    for _ in range(25):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
    return net.eval()


@pytest.fixture(scope="module")
def pair():
    return trained(0), trained(1)


@pytest.fixture
def batch():
    return samples(60, seed=2)


# TransferEvaluation -----------------------------------------------------------------------------------------------


def test_images_are_those_of_the_attack_on_the_surrogate(pair, batch):
    surrogate, victim = Counting(pair[0]), Counting(pair[1])
    x, y = batch
    index = torch.arange(60)
    transfer, alone = TransferEvaluation(surrogate, MIM(0.1, steps=4)), MIM(0.1, steps=4)
    attacked = transfer.run(victim, x, y, index=index)
    assert torch.equal(attacked.x_adv, alone.run(pair[0], x, y, index=index).x_adv)
    assert (victim.forwards, victim.backwards) == (0, 0)
    assert (attacked.forwards, attacked.backwards) == (60 * 4, 60 * 4)
    assert (surrogate.forwards, surrogate.backwards) == (60 * (4 + 2), 60 * 4)  # and two to judge
    assert (transfer.forwards, transfer.calls, transfer.samples) == (60 * 4, 1, 60)
    assert torch.equal(transfer(victim, x, y), attacked.x_adv)
    assert surrogate.forwards == 60 * (4 + 2 + 4)  # without an index nothing is judged


def test_figures_by_hand(pair, batch):
    surrogate, (x, y) = pair[0], batch
    transfer = TransferEvaluation(surrogate, BIM(0.03, steps=4))
    parts = [transfer.run(pair[1], x[s], y[s], index=torch.arange(60)[s]) for s in (slice(0, 40), slice(40, 60))]
    x_adv = torch.cat([part.x_adv for part in parts])
    before, after = surrogate(x).argmax(1) == y, surrogate(x_adv).argmax(1) == y
    assert torch.equal(torch.cat([part.robust["surrogate"] for part in parts]), after)
    figures, sizes = transfer.figures(), perturbation_sizes(x_adv, x, 0.03)
    assert figures["surrogate_success"] == pytest.approx((before & ~after).sum().item() / before.sum().item())
    assert 0 < figures["surrogate_success"] < 1
    for name in ("l2", "linf", "saturation"):
        assert figures[name] == pytest.approx(getattr(sizes, name).mean().item(), rel=1e-5)
    transfer.reset()
    transfer.run(pair[1], x[:7], y[:7], index=torch.arange(7), eps=0.0)
    assert transfer.figures()["surrogate_success"] == transfer.figures()["l2"] == 0


def test_settings_are_those_of_the_attack(pair):
    transfer = TransferEvaluation(pair[0], PGD("4/255", norm="l2", targeted=True, seed=5))
    assert (str(transfer.eps), transfer.norm, transfer.targeted, transfer.seed) == ("4/255", "l2", True, 5)
    assert transfer.is_random and not TransferEvaluation(pair[0], MIM()).is_random


def test_a_targeted_transfer_aims_at_another_class(pair, batch):
    x, y = batch
    transfer = TransferEvaluation(pair[0], PGD(0.2, steps=5, targeted=True))
    aim = transfer.aim(y, 3, torch.arange(60))
    attacked = transfer.run(pair[1], x, aim, index=torch.arange(60))
    assert (aim != y).all() and (pair[0](attacked.x_adv).argmax(1) == aim).float().mean() > 0.9
    assert transfer.figures()["surrogate_success"] > 0.9
    assert not attacked.robust["surrogate"].float().mean() > 0.1


def test_the_surrogate_is_frozen_and_in_eval_mode(batch):
    x, y = batch
    net = trained(3).train()
    statistics = net[2].running_mean.clone()
    transfer = TransferEvaluation(net, PGD(0.1, steps=2, bn_mode="train"))
    transfer(network(), x, y)
    assert not any(p.requires_grad for p in net.parameters())
    assert not any(module.training for module in net.modules())
    assert torch.equal(net[2].running_mean, statistics)
    assert list(transfer.surrogate.state_dict()) == []  # so that no checkpoint holds it


def test_the_network_under_test_may_be_of_any_precision(pair, batch):
    x, y = batch
    surrogate = trained(0)
    transfer = TransferEvaluation(surrogate, MIM(0.1, steps=2))
    for dtype, expected in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64), (torch.float32, torch.float32)):
        x_adv = transfer(pair[1], x.to(dtype), y)
        assert x_adv.dtype == expected and (x_adv - x.to(dtype)).abs().max() <= 0.1 + 1e-6
    assert surrogate[1].weight.dtype == torch.float32


def test_the_surrogate_may_be_moved_in_inference_mode(pair, batch):
    """Lightning tests in inference mode, and so the surrogate's first move to a GPU, here to another precision, is in it."""
    x, y = batch
    transfer, index = TransferEvaluation(trained(0), MIM(0.1, steps=2)), torch.arange(60)
    with torch.inference_mode():
        first = transfer.run(pair[1], x.double(), y, index=index).x_adv
    second = transfer.run(pair[1], x.double(), y, index=index).x_adv
    assert torch.equal(first, second)
    assert (first != x).any()


def test_it_trains_with_what_it_saved(pair, batch):
    """As a training attack it resumes its stream, like any other."""
    x, y = batch
    transfer = TransferEvaluation(pair[0], PGD(0.1, steps=2))
    transfer(pair[1], x, y)
    saved, second = transfer.training_state(), transfer(pair[1], x, y)
    resumed = TransferEvaluation(pair[0], PGD(0.1, steps=2))
    resumed.load_training_state(saved)
    assert torch.equal(resumed(pair[1], x, y), second)


def test_weights_are_read_at_the_first_use(tmp_path, pair, batch):
    x, y = batch
    torch.save(pair[0].state_dict(), tmp_path / "surrogate.pth")
    transfer = TransferEvaluation(network(), MIM(0.1, steps=2), weights=str(tmp_path / "surrogate.pth"))
    assert torch.equal(transfer(pair[1], x, y), MIM(0.1, steps=2)(pair[0], x, y))
    missing = TransferEvaluation(network(), MIM(), weights="nowhere.pth")
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pth"):
        missing(pair[1], x, y)


def test_what_cannot_be_meant_is_refused(pair):
    with pytest.raises(ValueError, match=r"leave out weights='x\.pth'"):
        TransferEvaluation("akamaster_resnet20", MIM(), weights="x.pth")
    with pytest.raises(ValueError, match="no pretrained network is called 'resnet_of_mine'"):
        _ = TransferEvaluation("resnet_of_mine", MIM()).surrogate
    transfer = TransferEvaluation(pair[0], MIM())
    with pytest.raises(ValueError, match="put EoT inside of TransferEvaluation instead"):
        EoT(transfer)
    with pytest.raises(ValueError, match="'black' chooses its own network"):
        transfer_table(pair[0], {"b": pair[1]}, {"black": transfer}, samples(6, 0))
    with pytest.raises(ValueError, match="at least one attack and one victim"):
        transfer_table(pair[0], {}, {"mim": MIM()}, samples(6, 0))
    TransferEvaluation(pair[0], EoT(MIM(), 2))


def test_evaluate_judges_it_on_the_network_under_test(pair, batch):
    x, y = batch
    transfer = TransferEvaluation(pair[0], MIM(0.1, steps=4))
    report = package.evaluate(pair[1], (x, y), {"transfer": transfer, "white": MIM(0.1, steps=4)}, batch_size=32)
    x_adv = MIM(0.1, steps=4)(pair[0], x, y)
    assert report.metrics["acc_transfer"] == pytest.approx((pair[1](x_adv).argmax(1) == y).float().mean().item())
    assert report.metrics["acc_white"] <= report.metrics["acc_transfer"] < report.metrics["acc_clean"]
    assert (report.metrics["forwards_transfer"], report.metrics["backwards_transfer"]) == (4, 4)


# The table --------------------------------------------------------------------------------------------------------


def test_the_table_by_hand():
    """Two classes and two pixels: the surrogate looks at both, one victim at the first, one at the difference."""
    looks = (
        torch.tensor([[0.0, 0.0], [1.0, 1.0]]),
        torch.tensor([[0.0, 0.0], [1.0, 0.0]]),
        torch.tensor([[0.0, 0.0], [1.0, -1.0]]),
    )
    surrogate, first, difference = (
        linear(w, b) for w, b in zip(looks, map(torch.tensor, ([1.0, 0], [0.5, 0], [0.0, 0])), strict=True)
    )
    x = torch.tensor([[0.45, 0.45], [0.3, 0.3], [0.55, 0.6], [0.8, 0.9]]).view(4, 1, 1, 2)
    y = torch.tensor([0, 0, 1, 1])
    # Steps of 0.1 in both pixels: the first and third images cross the surrogate's and the first victim's boundary.
    table = transfer_table(
        surrogate, {"first": first, "difference": difference}, {"fgsm": FGSM(0.1)}, (x, y), batch_size=3, round_pixels=False
    )
    one, other = table.rows
    assert (one.attack, one.surrogate, one.victim, one.samples) == ("fgsm", "surrogate", "first", 4)
    assert (one.white_box, one.black_box) == (0.5, 0.5)
    assert (other.victim, other.white_box, other.black_box) == ("difference", 0.5, 0.0)  # a difference stays
    assert one.l2 == pytest.approx(0.1 * 2**0.5, rel=1e-5)
    assert (one.linf, one.saturation) == (pytest.approx(0.1, rel=1e-5), pytest.approx(1.0, rel=1e-5))
    text = str(table)
    assert "difference" in text and "50.00%" in text and "25.50/255" in text and "100%" in text


def test_on_the_surrogate_itself_black_box_is_white_box(pair, batch):
    states = [p.requires_grad for p in pair[0].parameters()]
    table = transfer_table(pair[0], {"itself": pair[0], "other": pair[1]}, {"mim": MIM(0.05)}, batch)
    itself, other = table.rows
    assert itself.white_box == itself.black_box == other.white_box >= other.black_box > 0
    assert [p.requires_grad for p in pair[0].parameters()] == states  # left as it was


def test_images_are_judged_as_files_keep_them(pair, batch):
    x, y = eight_bit(batch[0]), batch[1]
    rounded, exact = (
        transfer_table(pair[0], {"b": pair[1]}, {"dim": DIM("8/255", norm="l2", steps=3)}, (x, y), round_pixels=r).rows[0]
        for r in (True, False)
    )
    assert rounded.linf * 255 * 60 == pytest.approx(round(rounded.linf * 255 * 60), abs=1e-2)
    assert exact.linf * 255 * 60 != pytest.approx(round(exact.linf * 255 * 60), abs=1e-2)


def test_sizes_that_differ_are_warned_of(pair, batch):
    fills, short = FGSM(0.1), BIM(0.1, step_size=0.02, steps=2)
    with pytest.warns(UserWarning, match="fills makes perturbations .*% longer than short in l2") as caught:
        transfer_table(pair[0], {"b": pair[1]}, {"short": short, "fills": fills}, batch)
    assert len(caught) == 1 and "\n" not in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        transfer_table(pair[0], {"b": pair[1]}, {"one": FGSM(0.1), "two": FGSM(0.11)}, batch)
        transfer_table(pair[0], {"b": pair[1]}, {"one": FGSM(0.1)}, batch)


def test_the_extreme_check_adds_rows(pair, batch):
    attacks = {"bim": BIM(0.1, steps=10), "l2": PGD(1.0, norm="l2", steps=2)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rows = transfer_table(pair[0], {"b": pair[1]}, attacks, batch, extreme=True, round_pixels=False).rows
    assert [row.attack for row in rows] == ["bim", "bim (sign)", "l2"]
    assert rows[0].saturation < rows[1].saturation <= 1 + 1e-6
    assert rows[1].linf == pytest.approx(0.1, rel=1e-4)


def test_momentum_fills_more_of_the_ball(pair, batch):
    """The single step fills the ball, plain iterations do not, momentum lies between."""
    attacks = {"fgsm": FGSM(0.1), "bim": BIM(0.1, 0.025, steps=10), "mim": MIM(0.1, 0.025, steps=10)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rows = {row.attack: row for row in transfer_table(pair[0], {"b": pair[1]}, attacks, batch, round_pixels=False).rows}
    assert rows["bim"].saturation < rows["mim"].saturation < rows["fgsm"].saturation
    assert rows["mim"].white_box >= rows["fgsm"].white_box


# The command line -------------------------------------------------------------------------------------------------


def test_a_surrogate_from_the_command_line(robust_pl, tiny, capsys):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        torch.save(SmallCNN(in_channels=1, num_classes=10, width=4).state_dict(), "surrogate.pth")
    config = {
        "class_path": "TransferEvaluation",
        "init_args": {
            "surrogate": {"class_path": "SmallCNN", "init_args": {"in_channels": 1, "num_classes": 10, "width": 4}},
            "weights": "surrogate.pth",
            "attack": {"class_path": "MIM", "init_args": {"eps": "16/255", "steps": 3}},
        },
    }
    tiny.with_name("transfer.yaml").write_text(yaml.safe_dump({"attacks": {"transfer": config}}))
    robust_pl("test", "-c", tiny, "-c", "transfer.yaml", "--trainer.limit_test_batches", 1)
    said = " ".join(capsys.readouterr().out.split())
    assert "transfer: fools its own surrogate on" in said and "/255 (linf)" in said
    assert "3.00" in said


def test_a_transfer_for_validation_alone_says_nothing_in_a_test(robust_pl, tiny, capsys):
    config = {
        "class_path": "TransferEvaluation",
        "init_args": {
            "surrogate": {"class_path": "SmallCNN", "init_args": {"width": 4}},
            "attack": {"class_path": "FGSM"},
        },
    }
    tiny.with_name("transfer.yaml").write_text(yaml.safe_dump({"val_attacks": {"transfer": config}}))
    robust_pl("test", "-c", tiny, "-c", "transfer.yaml", "--trainer.limit_test_batches", 1)
    assert "surrogate" not in capsys.readouterr().out
