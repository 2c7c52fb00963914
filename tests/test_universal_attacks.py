"""Universal attacks: what they learn, what that costs, how it is kept, and how it is measured."""

from functools import partial

import pytest
import torch
from torch import nn

from robust_pl import evaluate
from robust_pl.callbacks import FGUAP, UAP, DeepFool, DominantPatterns
from robust_pl.callbacks.attacks.penultimate import Penultimate
from robust_pl.data import DigitsDataModule
from robust_pl.functional import universal
from robust_pl.nets import SmallCNN
from tests import test_attacks as contract
from tests.attack_table import MUST_FIT
from tests.test_attacks import batch, net, one_thread, trained

# ruff: noqa: F401, F811  (fixtures are imported, and asked for by name)

every_attack = pytest.mark.parametrize("make", [pytest.param(make, id=name) for name, make in MUST_FIT])

# Not among them: an evaluation makes no pass, and what is learnt for one network need not fool another.
HOLDING = [
    contract.test_result_is_inside_ball_and_box,
    contract.test_eps_of_each_sample,
    contract.test_eps_of_each_sample_at_construction,
    contract.test_the_network_is_left_as_it_was,
    contract.test_global_random_streams_are_untouched,
    contract.test_global_seeds_do_not_matter,
    contract.test_autocast_keeps_the_ball,
    contract.test_float64_stays_float64,
    contract.test_seeds_reproduce,
    contract.test_the_stream_advances_between_calls_and_resumes,
    contract.test_processes_start_at_different_points,
    contract.test_the_input_is_not_written_to,
    contract.test_with_an_index_batches_order_and_subset_do_not_matter,
    contract.test_with_an_index_the_seed_and_the_name_tell_attacks_apart,
    contract.test_mixed_labels_of_one_class_are_labels,
    contract.test_a_batch_of_one,
]


def batches(count=96, seed=4, size=32):
    """Training data of the small task, as a list of (x, y)."""
    x, y = contract.samples(count, seed)
    return list(zip(x.split(size), y.split(size), strict=True))


def predicted(net, x):
    with torch.no_grad():
        return net(x).argmax(1)


def changed(net, attack, x, y):
    """Fooling rate of an attack."""
    return universal.fooling_rate(predicted(net, x), predicted(net, attack(net, x, y))).item()


@pytest.fixture(scope="module")
def digits():
    """A small network, some batches that it was trained on, and test images."""
    data = DigitsDataModule(batch_size=64)
    data.setup("fit")
    data.setup("test")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = SmallCNN(width=8)
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    for _ in range(5):
        train = [(x, y) for x, y, _ in data.train_dataloader()]
        for x, y in train:
            optimizer.zero_grad()
            contract.losses.cross_entropy(net(x), y).mean().backward()
            optimizer.step()
    return net.eval(), train[:6], torch.cat([x for x, *_ in data.test_dataloader()])


@pytest.fixture
def kept(trained, tmp_path):
    """Fits an attack once, and gives the same attack by its file."""

    def keep(make):
        attack, path = make(), str(tmp_path / "universal.pt")
        attack.fit_to(trained, batches(32))
        attack.save(path)
        return partial(make.func, *make.args, **make.keywords, perturbation=path)

    return keep


# The contract of attacks ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("holds", [pytest.param(test, id=test.__name__.removeprefix("test_")) for test in HOLDING])
@every_attack
def test_contract(make, holds, kept, net, batch):
    holds(kept(make), net, batch)


@pytest.mark.parametrize("zero", [0, torch.zeros(30, 1, 1, 1)], ids=["number", "tensor"])
@every_attack
def test_eps_zero_returns_the_input(make, zero, kept, net, batch):
    contract.test_eps_zero_returns_the_input(kept(make), zero, net, batch)


@every_attack
def test_fitting_leaves_the_network_and_random_streams_alone(make, net):
    net.train()
    before = torch.get_rng_state(), [m.training for m in net.modules()], [t.clone() for t in net.state_dict().values()]
    with torch.inference_mode():
        make().fit_to(net, batches(32))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert [m.training for m in net.modules()] == before[1]
    assert all(torch.equal(new, old) for new, old in zip(net.state_dict().values(), before[2], strict=True))
    assert all(p.requires_grad and p.grad is None for p in net.parameters())
    assert not any(m._forward_hooks for m in net.modules())


# What is learnt ---------------------------------------------------------------------------------------------------


@every_attack
def test_one_perturbation_fools_more_images_than_its_own_pixels_shuffled(make, digits):
    """On images that were not seen; shuffled and with random signs it has the same size in every norm."""
    net, train, x = digits
    attack, clean = make(), predicted(net, x)
    attack.fit_to(net, train)
    size = contract.geometry.size(attack.delta, attack.norm).item()
    assert 0.9 * attack.eps < size <= attack.eps + 1e-6
    x_adv = attack(net, x, clean)
    torch.testing.assert_close(x_adv, (x + attack.delta).clamp(0, 1))
    generator, by_noise = torch.Generator().manual_seed(0), []
    for _ in range(20):
        order, sign = torch.randperm(64, generator=generator), torch.randn(64, generator=generator).sign()
        noise = (sign * attack.delta.flatten()[order]).view(1, 1, 8, 8)
        by_noise.append(universal.fooling_rate(clean, predicted(net, (x + noise).clamp(0, 1))).item())
    rate = universal.fooling_rate(clean, predicted(net, x_adv)).item()
    assert rate > 0.35
    assert rate > max(by_noise)
    assert rate > 1.5 * sum(by_noise) / 20


@every_attack
def test_the_best_pass_is_kept(make, net):
    attack, data = make(), batches(32)
    attack.fit_to(net, data)
    assert attack.rate == pytest.approx(changed(net, attack, *data[0]))
    longer = make(epochs=attack.epochs + 2)
    longer.fit_to(net, data)
    assert longer.rate >= attack.rate


@pytest.mark.parametrize("make", [FGUAP, DominantPatterns])
def test_the_start_belongs_to_the_seed(make, net):
    found = []
    for seed in (0, 0, 1):
        attack = make(0.2, epochs=1, step_size=1e-6, seed=seed)
        attack.fit_to(net, batches(32))
        found.append(attack.delta)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    assert 5e-5 < found[0].abs().max() < 1.1e-4


def test_a_target_is_reached(net, batch):
    x, y = batch
    for target in range(3):
        attack = FGUAP(0.25, epochs=5, target=target, target_weight=1.0)
        attack.fit_to(net, batches())
        assert (predicted(net, attack(net, x, y)) == target).float().mean() > 0.8


def test_dominant_patterns_have_a_class_of_their_own_that_images_take(net, batch):
    x, y = batch
    attack = DominantPatterns(0.25, epochs=5)
    attack.fit_to(net, batches())
    own = universal.own_class(net, attack.delta, x.mean((0, 2, 3), keepdim=True))
    attacked = predicted(net, attack(net, x, y))
    assert (attacked == own).float().mean() > 0.8
    assert universal.dominant_classes(attacked, 1).item() == own.item()
    assert universal.dominance_ratio(attacked, 1) > 2 * universal.dominance_ratio(predicted(net, x), 1)


def test_fg_uap_turns_features_away(net, batch):
    x, y = batch
    attack, read = FGUAP(0.2), Penultimate(net)
    attack.fit_to(net, batches())
    with torch.no_grad():
        cosine = torch.cosine_similarity(read(attack(net, x, y))[0], read(x)[0]).mean()
    assert cosine < 0.8
    assert not read.model[0]._forward_hooks


def test_uap_adds_what_deepfool_finds(net):
    """One image at a time, by hand: prediction at x, DeepFool from x + delta, sum, ball."""
    x, _ = contract.samples(5, seed=8)
    attack = UAP(0.06, epochs=1, together=1, deepfool_steps=30)
    attack.fit_to(net, [(x, None)])
    delta = torch.zeros(1, 1, 8, 8)
    for image in x.split(1):
        start = (image + delta).clamp(0, 1)
        found = DeepFool(steps=30)(net, start, predicted(net, image))
        delta = (delta + found - start).clamp(-0.06, 0.06)
    torch.testing.assert_close(attack.delta, delta)


def test_uap_stops_when_enough_are_fooled(net):
    spent = []
    for enough in (0.05, 1.0):
        attack = UAP(0.25, epochs=3, enough=enough)
        attack.fit_to(net, batches())
        spent.append(attack.fit_forwards)
        assert attack.rate > 0.05
    assert spent[0] < 0.6 * spent[1]


# What it costs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("attack", "forwards", "backwards"),
    [
        (FGUAP(0.2, epochs=2), 2 * 4 * 96, 2 * 96),
        (FGUAP(0.2, epochs=3, target=0), 3 * 4 * 96, 3 * 96),
        (DominantPatterns(0.2, epochs=2), 2 * (3 * 96 + 3), 2 * 96),  # the pattern itself, once a batch of 32
    ],
)
def test_passes_of_fitting_by_hand(attack, forwards, backwards, net):
    model = contract.Counting(net)
    attack.fit_to(model, batches())
    assert (attack.fit_forwards, attack.fit_backwards) == (forwards, backwards)
    assert model.forwards == forwards
    attack.fit_to(model, batches())  # counts afresh
    assert (attack.fit_forwards, attack.fit_backwards) == (forwards, backwards)
    assert (attack.forwards, attack.backwards) == (0, 0)


def test_passes_of_uap_are_those_that_the_network_saw(net):
    model, attack = contract.Counting(net), UAP(0.1, epochs=2, enough=1.0, candidates=2)
    attack.fit_to(model, batches(32))
    # Counting sees one backward pass a class and step of the images that DeepFool still moves.
    assert attack.fit_forwards == model.forwards
    assert attack.fit_backwards == model.backwards > 0


def test_an_evaluation_makes_no_pass(net, batch):
    attack = FGUAP(0.2)
    attack.fit_to(net, batches())
    model = contract.Counting(net)
    attack(model, *batch)
    assert model.forwards == 0


# Which features ---------------------------------------------------------------------------------------------------


class Wrapped(nn.Module):
    """Two networks, of which the second answers; the first runs too."""

    def __init__(self, scale=None):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.teacher, self.net = (nn.Sequential(nn.Flatten(), nn.Linear(64, 5), nn.Linear(5, 3)) for _ in range(2))
        self.scale = scale

    def forward(self, x):
        logits = self.net(x)
        self.teacher(x)
        return logits if self.scale is None else self.scale * logits


def test_features_are_what_the_last_layer_reads():
    x = torch.rand(4, 1, 8, 8)
    for model, features in (
        (Wrapped(), lambda m: m.net[1](x.flatten(1))),
        (SmallCNN(3, width=4).eval(), lambda m: m.forward_features(x)),
    ):
        found, logits = Penultimate(model)(x)
        torch.testing.assert_close(found, features(model))
        torch.testing.assert_close(logits, model(x))
    scaled = Wrapped(2.0)
    for name in ("net.2", "net.1"):
        layer = scaled.get_submodule(name)
        torch.testing.assert_close(layer(Penultimate(scaled, name)(x)[0]), layer(scaled.net[: int(name[-1])](x)))
    outer = nn.Sequential(SmallCNN(3, width=4)).eval()
    torch.testing.assert_close(Penultimate(outer, "linear")(x)[0], outer[0].forward_features(x))


def test_a_last_layer_that_is_not_found_must_be_named():
    data = [torch.rand(8, 1, 8, 8)]
    with pytest.raises(ValueError, match="name the last layer with layer="):
        FGUAP().fit_to(Wrapped(2.0), data)
    FGUAP(layer="net.2").fit_to(Wrapped(2.0), data)
    for layer, count in (("head", 0), ("2", 2)):
        with pytest.raises(ValueError, match=f"layer='{layer}' names {count} layers of the network"):
            FGUAP(layer=layer).fit_to(Wrapped(), data)


# How it is kept ---------------------------------------------------------------------------------------------------


def test_files_round_trip(net, batch, tmp_path):
    path = str(tmp_path / "delta.pt")
    attack = FGUAP(0.2)
    attack.fit_to(net, batches())
    attack.save(path)
    by_argument, by_call = DominantPatterns(0.2, perturbation=path), UAP(0.2)
    by_call.load(path)
    assert attack.must_fit and not by_argument.must_fit and not by_call.must_fit
    for other in (by_argument, by_call):
        assert torch.equal(other(net, *batch), attack(net, *batch))


def test_what_is_no_perturbation_is_refused(net, batch, tmp_path):
    path = str(tmp_path / "other.pt")
    for content in ({"delta": torch.zeros(1, 8, 8)}, {"state": torch.zeros(1, 1, 8, 8)}, torch.zeros(3), {"delta": 1}):
        torch.save(content, path)
        with pytest.raises(ValueError, match="holds no universal perturbation"):
            UAP(perturbation=path)
    torch.save({"delta": torch.zeros(1, 3, 4, 4)}, path)
    with pytest.raises(ValueError, match=r"the perturbation is \(3, 4, 4\) and the images are \(1, 8, 8\)"):
        UAP(perturbation=path)(net, *batch)
    with pytest.raises(ValueError, match=r"FGUAP has no perturbation yet: call fit_to\(model, loader\) or name a file"):
        FGUAP()(net, *batch)
    with pytest.raises(ValueError, match="no perturbation to save yet"):
        FGUAP().save(path)


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (partial(UAP, norm="l1"), "norm='l1' is unknown: choose one of linf, l2"),
        (partial(UAP, enough=0.0), "enough=0.0 must be above 0 and at most 1"),
        (partial(UAP, together=0), "together=0 must be a whole number"),
        (partial(UAP, deepfool_steps=0), "steps=0 must be a whole number"),
        (partial(FGUAP, epochs=0), "epochs=0 must be a whole number"),
        (partial(FGUAP, target=-1), "target=-1 must be a class"),
        (partial(DominantPatterns, step_size=0), "step_size=0 must be above 0"),
    ],
)
def test_arguments_out_of_range_are_refused(make, complaint):
    with pytest.raises(ValueError, match=complaint):
        make()


def test_data_that_cannot_be_fitted_to_are_refused(net):
    with pytest.raises(ValueError, match="the data hold no batch"):
        FGUAP().fit_to(net, [])
    with pytest.raises(ValueError, match="can be passed over only once"):
        FGUAP().fit_to(net, iter(batches()))
    with pytest.raises(ValueError, match=r"values outside \[0, 1\].*Normalize"):
        FGUAP().fit_to(net, [255 * x for x, _ in batches()])
    with pytest.raises(ValueError, match="one radius"):
        FGUAP(torch.full((8, 1, 1, 1), 0.1)).fit_to(net, batches())
    with pytest.raises(ValueError, match="target=3 is no class of a network with 3 logits"):
        FGUAP(target=3).fit_to(net, batches())


def test_evaluate_fits_before_it_attacks(digits):
    net, _, _ = digits
    attacks = {"fg_uap": FGUAP(0.3), "pattern": DominantPatterns(0.3)}
    metrics = evaluate(net, DigitsDataModule(batch_size=64), attacks, limit=200).metrics
    assert metrics["acc_clean"] > 0.9
    for name, attack in attacks.items():
        assert metrics[f"acc_{name}"] < 0.65
        assert attack.rate > 0.3 and attack.fit_backwards > 0


def test_evaluate_takes_what_was_fitted_or_given(digits, tmp_path):
    net, train, x = digits
    attack, y = FGUAP(0.2), predicted(net, x)
    with pytest.raises(ValueError, match="the attack 'fg_uap' must see training data first"):
        evaluate(net, (x, y), {"fg_uap": attack})
    attack.fit_to(net, train)
    attack.fitted = True
    by_hand = evaluate(net, (x, y), {"fg_uap": attack}).metrics
    attack.save(str(tmp_path / "delta.pt"))
    by_file = evaluate(net, (x, y), {"fg_uap": FGUAP(0.2, perturbation=str(tmp_path / "delta.pt"))}).metrics
    assert by_hand["acc_fg_uap"] == by_file["acc_fg_uap"] < 0.9


# How it is measured -----------------------------------------------------------------------------------------------


def test_fooling_rate_by_hand():
    """Three of five change; labels do not enter."""
    clean, attacked = torch.tensor([0, 1, 2, 2, 3]), torch.tensor([0, 2, 2, 1, 1])
    assert universal.fooling_rate(clean, attacked).item() == pytest.approx(3 / 5)
    assert universal.fooling_rate(clean, clean).item() == 0


def test_dominance_by_hand():
    """Four of class 7, two of 1 and of 3, one of 0."""
    attacked = torch.tensor([7, 1, 7, 3, 7, 0, 7, 3, 1])
    ratios = [universal.dominance_ratio(attacked, k).item() for k in (1, 2, 3, 4, 5, 100)]
    assert ratios == pytest.approx([4 / 9, 6 / 9, 8 / 9, 1, 1, 1])
    assert universal.dominant_classes(attacked, 3).tolist() == [7, 1, 3]
    assert universal.dominant_classes(attacked, 1).tolist() == [7]


def test_own_class_by_hand():
    """On a ground of (0.5, 0.5) the second pixel wins; what leaves the box is cut."""
    model = nn.Flatten()
    delta = torch.tensor([0.1, 0.3]).view(1, 2, 1, 1)
    assert universal.own_class(model, delta, torch.full((1, 2, 1, 1), 0.5)).item() == 1
    assert universal.own_class(model, delta, torch.tensor([0.95, 0.2]).view(1, 2, 1, 1)).item() == 0
    assert universal.own_class(model, 9 * delta, torch.tensor([0.9, 0.1]).view(1, 2, 1, 1)).item() == 0
