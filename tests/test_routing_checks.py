"""Checks of dynamic networks: broken gates are refused or flagged, honest ones not, and each check measures what it says."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn

from robust_pl import evaluate
from robust_pl.callbacks import FGSM, PGD
from robust_pl.callbacks.gates import called_routed_nets, gate_problems, refuse_cut_gates
from robust_pl.evaluation.masking import Flag, masking_flags
from robust_pl.evaluation.masking.evidence import Evidence
from robust_pl.evaluation.masking.routes import Routes
from robust_pl.evaluation.masking.routing import CHECKS, frozen_gates
from robust_pl.methods import PGDAT
from robust_pl.nets import AWNet, Frozen, RoutedNet, SmallCNN

from .masking_zoo import EPS, Around, digits
from .masking_zoo import honest as static
from .routing_zoo import CUT, HONEST, BatchLevelShare, SteepSwitch, Trembling, broken, dynamic
from .test_masking_flags import NAMES
from .test_methods import QUIET, loader

ROUTING = [check.__name__ for check in CHECKS]
FAST = {"aw_net_pgd_at"}


def images(count: int = 100) -> tuple[Tensor, Tensor]:
    x, y = digits("test")
    return x[:count], y[:count]


def checked(net: nn.Module, count: int = 100, **settings: object) -> dict[str, Flag]:
    """The checks of dynamic networks alone, by name."""
    evidence = Evidence(
        net.eval(), *images(count), **{"eps": EPS, "norm": "linf", "seed": 0, "batch_size": 64, "steps": 20} | settings
    )
    with torch.random.fork_rng():
        return {check.__name__: check(evidence) for check in CHECKS}


def raised(flags: dict[str, Flag]) -> set[str]:
    return {name for name, flag in flags.items() if flag.raised}


# The two lists --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", [pytest.param(name, id=name, marks=() if name in FAST else pytest.mark.slow) for name in HONEST]
)
def test_honest_networks_are_not_flagged(name: str) -> None:
    flags = masking_flags(dynamic(name), *images(), eps=EPS)
    assert [flag.name for flag in flags] == NAMES + ROUTING
    assert not [flag.message for flag in flags if flag.raised]
    assert all(flag.value is not None for flag in flags)


@pytest.mark.parametrize("kind", CUT)
def test_cut_gates_are_refused_before_any_attack(kind: type[AWNet]) -> None:
    class Counted(FGSM):
        def perturb(self, *arguments: object) -> Tensor:
            raise AssertionError("an attack ran")

    net = broken(kind)
    with pytest.raises(ValueError, match=CUT[kind]) as refusal:
        evaluate(net, images(40), {"fgsm": Counted(EPS)})
    assert "\n" not in str(refusal.value) and kind.__name__ in str(refusal.value)
    # Inside of what holds it, too.
    for holder in (Frozen(copy.deepcopy(net)), PGDAT(copy.deepcopy(net)), nn.Sequential(nn.Identity(), copy.deepcopy(net))):
        with pytest.raises(ValueError, match=CUT[kind]):
            refuse_cut_gates(holder, images(8)[0])
    flag = next(
        f for f in masking_flags(net, *images(30), eps=EPS, steps=2, queries=2, binarization=False) if f.name == ROUTING[0]
    )
    assert flag.raised and flag.value >= 1 and CUT[kind] in flag.message


def test_a_batchnorm_chosen_for_a_whole_batch_is_flagged() -> None:
    flags = checked(broken(BatchLevelShare, "aw_net_standard"), steps=4)
    assert flags["mixed_batch"].raised and not flags["detached_gates"].raised
    assert not checked(dynamic("aw_net_standard"), steps=4)["mixed_batch"].raised


def test_a_steep_gate_is_evaded() -> None:
    """Cross-entropy has no gradient through it; the router alone walks to it."""
    flags = checked(SteepSwitch())
    assert flags["router_evasion"].raised and flags["router_evasion"].value > 0.2
    assert not flags["detached_gates"].raised


def test_a_trembling_gate_is_worse_than_a_frozen_one() -> None:
    flags = checked(Trembling())
    assert flags["frozen_gates"].raised and flags["frozen_gates"].value > 0.2
    assert not flags["detached_gates"].raised


# What the checks do ---------------------------------------------------------------------------------------------------


def test_static_networks_have_no_such_checks() -> None:
    assert called_routed_nets(static("linear_pgd_at"), images(2)[0]) == []
    assert gate_problems(static("linear_pgd_at"), images(2)[0]) == []

    class Taught(nn.Module):
        """A dynamic teacher that only the training asks."""

        def __init__(self) -> None:
            super().__init__()
            self.net, self.teacher = static("linear_pgd_at"), Frozen(dynamic("aw_net_pgd_at"))

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

    flags = masking_flags(Taught(), *images(20), eps=EPS, steps=2, queries=2, binarization=False)
    assert [flag.name for flag in flags] == NAMES[:-1]


def test_constant_gates_are_no_cut_ones() -> None:
    """Before any training every gate is 1, whatever the image is."""
    for net in (AWNet(SmallCNN(width=4), in_channels=1), AWNet(SmallCNN(width=4), in_channels=1).double()):
        x = images(16)[0].to(next(net.parameters()).dtype)
        assert gate_problems(net.train(), x) == [] and net.training
        assert all(p.requires_grad and p.grad is None for p in net.parameters())


def test_a_hard_choice_that_passes_gradients_straight_through_is_no_cut_one() -> None:
    class StraightThrough(RoutedNet):
        def __init__(self) -> None:
            super().__init__()
            self.inner = dynamic("soft_mixture_standard")

        def signals(self, x: Tensor) -> Tensor:
            soft = self.inner.signals(x)
            return soft + (nn.functional.one_hot(soft.argmax(1), 2) - soft).detach()

        def routed(self, x: Tensor, signals: Tensor) -> Tensor:
            return self.inner.routed(x, signals)

    assert gate_problems(StraightThrough(), images(64)[0]) == []


def test_gates_are_held_and_read() -> None:
    """With the signals of the images themselves the network is as it was, with others it is another one."""
    net, (x, _) = dynamic("aw_net_pgd_at"), images(8)
    model = Around(net, before=lambda x: 0.9 * x)
    routes = Routes(model, called_routed_nets(model, x))
    assert routes.nets == [net]
    logits, said = routes.said(x)
    assert torch.equal(logits, model(x)) and torch.equal(said[0], net.signals(0.9 * x))
    assert torch.equal(routes.held(said)(x), logits)
    others = routes.signals(x.flip(0))
    assert torch.allclose(routes.held(others)(x), net.routed(0.9 * x, net.signals(0.9 * x.flip(0))), atol=1e-6)
    assert torch.equal(model(x), logits) and "forward" not in vars(net)


def test_frozen_gates_by_hand() -> None:
    """FGSM with one step on routed(x, signals of x), judged by the whole network."""
    net, (x, y) = dynamic("aw_net_standard"), images(60)
    found = frozen_gates(Evidence(net, x, y, eps=EPS, norm="linf", seed=0, batch_size=64, steps=1))
    pixels, held = x.clone().requires_grad_(), net.signals(x).detach()
    loss = nn.functional.cross_entropy(net.routed(pixels, held), y, reduction="sum")
    x_adv = (x + EPS * torch.autograd.grad(loss, pixels)[0].sign()).clamp(0, 1)
    frozen = (net(x_adv).argmax(1) == y) & (net(x).argmax(1) == y)
    adaptive = net(FGSM(EPS)(net, x, y)).argmax(1) == y
    assert found.value == pytest.approx(
        (adaptive & (net(x).argmax(1) == y)).float().mean().item() - frozen.float().mean().item()
    )


def test_stated_cost() -> None:
    """140 forward and backward passes for each sample that is right, as docs/masking_flags.md says."""
    passes = {"forward": 0, "gradient": 0}

    def count(x: Tensor) -> Tensor:
        passes["gradient" if x.requires_grad else "forward"] += len(x)
        return x

    net, (x, y) = dynamic("aw_net_pgd_at"), images(40)
    x, y = x[right := net(x).argmax(1) == y], y[right]
    model = Around(net, count)
    evidence = Evidence(model, x, y, eps=EPS, norm="linf", seed=0, batch_size=128, steps=20)
    evidence.pgd()
    passes.update(forward=0, gradient=0)
    frozen_gates(evidence)
    n = len(x)
    assert passes == {"gradient": 20 * n, "forward": 2 * n + 2}  # the gates, the verdict, and the search for dynamic networks
    CHECKS[1](evidence)
    assert passes["gradient"] == (20 + 6 * 20) * n


def test_checks_are_deterministic_and_leave_the_network_as_it_was() -> None:
    net = copy.deepcopy(dynamic("aw_net_pgd_at")).train()
    before = copy.deepcopy(net.state_dict())
    settings = {"eps": EPS, "steps": 2, "queries": 2, "binarization": False}
    with torch.inference_mode():
        first, second = (masking_flags(net, *images(20), **settings) for _ in range(2))
    assert first == second and net.training
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())
    l2 = masking_flags(net, *images(20), **settings | {"norm": "l2"})
    assert [flag.name for flag in l2][-4:] == ROUTING


# Where a user meets them ----------------------------------------------------------------------------------------------


def test_a_trainer_refuses_cut_gates(tmp_path: Path) -> None:
    method = PGDAT(broken(next(iter(CUT))))
    trainer = Trainer(default_root_dir=tmp_path, callbacks=[PGD(EPS, steps=1)], **QUIET)
    for run in (trainer.validate, trainer.test):
        with pytest.raises(ValueError, match="detach no gates in forward"):
            run(method, loader())
    honest = PGDAT(dynamic("aw_net_pgd_at"))
    Trainer(default_root_dir=tmp_path, callbacks=[PGD(EPS, steps=1)], **QUIET).test(honest, loader(), verbose=False)


CONFIG = """
model:
  class_path: PGDAT
  init_args:
    net: {net}
    attack: {{class_path: PGD, init_args: {{eps: 0.1, steps: 1}}}}
data:
  class_path: DigitsDataModule
attacks:
  fgsm: {{class_path: FGSM, init_args: {{eps: 0.1}}}}
trainer: {{max_epochs: 1, logger: false, enable_progress_bar: false, enable_model_summary: false, limit_test_batches: 1}}
"""
AWAKE = "{class_path: tests.routing_zoo.UntrainedButAwake}"
HONEST_NET = "{class_path: AWNet, init_args: {net: {class_path: SmallCNN, init_args: {width: 4}}, width: 4, dim: 8}}"


def test_the_command_line_refuses_cut_gates_in_one_sentence(
    robust_pl: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("cut.yaml").write_text(CONFIG.format(net=AWAKE))
    for command in ("test", "fit"):  # the latter in the look at the validation before it
        with pytest.raises(SystemExit) as stop:
            robust_pl(command, "-c", "cut.yaml")
        said = [line for line in capsys.readouterr().err.splitlines() if "error:" in line or "Traceback" in line]
        assert stop.value.code == 2 and len(said) == 1
        assert "UntrainedButAwake" in said[0] and "detach no gates in forward" in said[0]


def test_dynamic_networks_are_checked_by_default(
    robust_pl: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("aw.yaml").write_text(CONFIG.format(net=HONEST_NET))
    robust_pl("test", "-c", "aw.yaml", "--run.name", "aw")
    found = json.loads(Path("runs/aw/test/flags.json").read_text())
    assert found["samples"] == 100 and [flag["name"] for flag in found["flags"]] == NAMES + ROUTING
    assert all(f"| {name} |" in Path("runs/aw/test/report.md").read_text() for name in ROUTING)
    robust_pl("test", "-c", "aw.yaml", "--run.name", "aw", "--report.flags", "0")
    assert not Path("runs/aw/test/flags.json").exists()
