"""AutoAttack and TransferEvaluation go through what of the contract holds for them, and every attack has its fragment."""

import copy
from functools import partial
from inspect import isabstract

import pytest
import torch
import yaml

from robust_pl import callbacks
from robust_pl.callbacks import MIM, AutoAttack, TransferEvaluation
from robust_pl.callbacks.outcome import EvaluationAttack
from tests import test_attacks as contract
from tests.conftest import CONFIGS
from tests.test_attacks import batch, net, one_thread, trained

# ruff: noqa: F401, F811  (fixtures are imported, and asked for by name)

# Why they are not in the table of all attacks: a call of AutoAttack gives the same again, whatever ran before and in
# whichever process; a transfer's passes, and its success, are not those of the network that it is given.
HOLDING = [
    contract.test_result_is_inside_ball_and_box,
    contract.test_eps_of_each_sample_at_construction,
    contract.test_the_network_is_left_as_it_was,
    contract.test_global_random_streams_are_untouched,
    contract.test_global_seeds_do_not_matter,
    contract.test_autocast_keeps_the_ball,
    contract.test_float64_stays_float64,
    contract.test_the_input_is_not_written_to,
    contract.test_with_an_index_batches_order_and_subset_do_not_matter,
    contract.test_mixed_labels_of_one_class_are_labels,
    contract.test_a_batch_of_one,
]


@pytest.fixture(params=["autoattack", "autoattack_l2", "transfer"])
def make(request, trained):
    parts = {"version": "custom", "attacks": ["apgd-ce", "fab-t"], "n_targets": 1}

    surrogate = copy.deepcopy(trained)

    class Transfer(TransferEvaluation):
        """With the radius first, as the tests give it to all attacks."""

        def __init__(self, eps, steps, seed=0):
            super().__init__(surrogate, MIM(eps, steps=steps, seed=seed))

    return {
        "autoattack": partial(AutoAttack, 0.4, **parts),
        "autoattack_l2": partial(AutoAttack, 2.0, norm="l2", **parts),
        "transfer": partial(Transfer, 0.1, steps=3),
    }[request.param]


@pytest.mark.filterwarnings("ignore:the network is in train mode")
@pytest.mark.parametrize("holds", [pytest.param(test, id=test.__name__.removeprefix("test_")) for test in HOLDING])
def test_contract(holds, make, net, batch):
    holds(make, net, batch)


@pytest.mark.parametrize("zero", [0, torch.zeros(30, 1, 1, 1)], ids=["number", "tensor"])
def test_eps_zero_returns_the_input(zero, make, net, batch):
    contract.test_eps_zero_returns_the_input(make, zero, net, batch)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_works_where_gradients_are_off(mode, make, net, batch):
    contract.test_works_where_gradients_are_off(make, mode, net, batch)


FOR_TRAINING_ALONE = {"NoisyFGSM", "UnanimousFGSM", "ZeroedFGSM"}


def test_every_attack_has_a_fragment_of_its_name():
    paths = sorted((CONFIGS / "attacks").glob("*.yaml"))
    fragments = [yaml.safe_load(path.read_text())["attacks"] for path in paths]
    assert [list(fragment) for fragment in fragments] == [[path.stem] for path in paths]
    classes = {name: getattr(callbacks, name) for name in callbacks.__all__}
    attacks = {name for name, c in classes.items() if issubclass(c, EvaluationAttack) and not isabstract(c)}
    assert {spec["class_path"] for fragment in fragments for spec in fragment.values()} == attacks - FOR_TRAINING_ALONE
