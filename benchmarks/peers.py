"""A PGD attack of ours beside torchattacks, foolbox and ART: ``python -m benchmarks.peers --install FOLDER``.

All attack one network in eval mode on the same random images, with the same radius, step size and number of steps, from a
random start each, interleaved in one process; the plain loop of ``benchmarks/lean.py`` is the yardstick. Parameters ask for
gradients, as they do after a training, and each side has a copy of the network; who freezes them is faster with foolbox and
ART, which else compute the weights' gradients, too (``--frozen`` does so for all). The plain loop's are frozen always.

A faster attack could be a weaker one. So beside the times stand the mean cross-entropy that each reaches, the accuracy that it
leaves and the largest change of a pixel: on the timed images, whose labels are what the network says without an attack (with
random weights none stands, so the cross-entropy tells), and on scikit-learn's digits with a small network that was trained
with PGD here, at linf 0.2, of which some stand.

The peers are no dependencies. ``--install FOLDER`` makes an environment of its own with them, see
``benchmarks/environment.py``; without it, those that can be imported take part, and a line names the others. torchvision is
not needed: of the versions that are installed, foolbox and ART neither ask for it nor import it for this attack; torchattacks
asks for it, and for a ``requests`` of 2021, and imports neither, so it is installed without what it asks for (torch, numpy,
scipy and tqdm are there already). Nothing of a peer is replaced or patched.

Requirement: with the defaults, on a CPU, ours takes at most 0.82 times the time of the plain loop, and is at least 1.2 times
faster than torchattacks and 1.8 times faster than foolbox and ART.
"""

from __future__ import annotations

import argparse
import copy
import json
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from robust_pl import nets
from robust_pl.data import DigitsDataModule

from .autoattack import trained_on_digits
from .environment import add_install_option, run_installed
from .peer_attacks import PACKAGES, PEERS, Attack, Budget, by_hand, by_ours
from .timing import Rounds, machine, now, print_machine, unit

LIMIT = 0.82
TIMED, DIGITS = "random images", "digits, trained with PGD"


@dataclass(frozen=True)
class Strength:
    """What an attack achieved: mean cross-entropy, share of samples that are still right, largest change of a pixel."""

    loss: float
    accuracy: float
    furthest: float

    @classmethod
    def of(cls, net: nn.Module, x: Tensor, y: Tensor, x_adv: Tensor) -> Strength:
        """Of one result."""
        with torch.no_grad():
            logits = net(x_adv)
        right = (logits.argmax(1) == y).float().mean().item()
        return cls(F.cross_entropy(logits, y).item(), right, (x_adv - x).abs().max().item())

    @classmethod
    def mean_of(cls, found: list[Strength]) -> Strength:
        """Of several results of one attack: means, and the largest change of all."""
        return cls(mean(s.loss for s in found), mean(s.accuracy for s in found), max(s.furthest for s in found))


def attacks(net: nn.Module, budget: Budget, x: Tensor, peers: list[str], frozen: bool) -> dict[str, Attack]:
    """Side -> its attack on a copy of the network of its own."""
    builders = {"ours": by_ours, "lean": by_hand, **{name: PEERS[name].build for name in peers}}
    return {side: build(copy.deepcopy(net).requires_grad_(not frozen), budget, x) for side, build in builders.items()}


def measure(
    net: nn.Module, x: Tensor, y: Tensor, sides: Mapping[str, Attack], rounds: int, steps: int
) -> tuple[Rounds, dict[str, Strength]]:
    """Time and strength of every side."""
    measured = Rounds(f"PGD-{steps} attack", rounds, sides)
    found: dict[str, list[Strength]] = {side: [] for side in sides}
    for turn, side in measured.order():
        began = now(x.device)
        x_adv = sides[side](x, y)
        measured.add(turn, side, now(x.device) - began)
        if turn:
            found[side].append(Strength.of(net, x, y, x_adv))
    return measured, {side: Strength.mean_of(each) for side, each in found.items()}


def on_digits(args: argparse.Namespace, device: torch.device, peers: list[str]) -> tuple[float, dict[str, Strength]]:
    """Radius, and the strength of every side, where about as many samples stand as fall."""
    images = DigitsDataModule().load_test()
    x, y = (part.to(device) for part in images.read(torch.arange(len(images)), None))
    net = trained_on_digits(robust=True).eval().to(device)
    budget = Budget(0.2, 0.05, args.steps)
    sides = attacks(net, budget, x, peers, args.frozen)
    found = {side: [Strength.of(net, x, y, attack(x, y)) for _ in range(args.rounds)] for side, attack in sides.items()}
    return budget.eps, {side: Strength.mean_of(each) for side, each in found.items()}


def random_problem(args: argparse.Namespace, device: torch.device) -> tuple[nn.Module, Tensor, Tensor]:
    """The timed network in eval mode, random images, and what it says of them."""
    torch.manual_seed(0)
    net = getattr(nets, args.net)(in_channels=3)
    x = torch.randint(256, (args.batch_size, 3, 32, 32)) / 255
    norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0  # else the running statistics say nothing of the images, and all get one class
    with torch.no_grad():
        net.train()(x)
        y = net.eval()(x).argmax(1)
    return net.to(device), x.to(device), y.to(device)


def print_figures(
    measured: Rounds, strengths: Mapping[str, tuple[float, Mapping[str, Strength]]], title: str, device: Any
) -> None:
    """Print the table of times, that of strengths, and how the requirement stands."""
    console, figures = Console(width=120), measured.figures("lean")
    table = Table(title=title)
    for column in ("attack", unit(device), "of lean", "min, max", "of ours"):
        table.add_column(column, justify="left" if column == "attack" else "right", no_wrap=True)
    of_ours = measured.figures("ours")
    for side, s in figures.items():
        spread = f"{s['ratio_min']:.3f}, {s['ratio_max']:.3f}"
        table.add_row(side, f"{s['median_s']:.3f}", f"{s['ratio_median']:.3f}", spread, f"{of_ours[side]['ratio_median']:.3f}")
    console.print(table)
    table = Table(title="Strength")
    for column in ("network and images", "attack", "cross-entropy", "still right", "largest change, of eps"):
        table.add_column(column, justify="right" if len(table.columns) > 1 else "left", no_wrap=True)
    for where, (eps, found) in strengths.items():
        for side, s in found.items():
            table.add_row(where, side, f"{s.loss:.4f}", f"{100 * s.accuracy:.1f} %", f"{s.furthest / eps:.6f}")
        table.add_section()
    console.print(table)
    on_cpu = "with the defaults" if device.type == "cpu" else "a requirement on CPUs:"
    lines = [f"ours: {figures['ours']['ratio_median']:.3f} times the time of lean ({on_cpu} at most {LIMIT})"]
    for side in measured.sides[2:]:
        times = of_ours[side]["ratio_median"]
        lines.append(f"{side}: ours is {times:.2f} times faster ({on_cpu} at least {PEERS[side].least})")
    reached = [f"{found['ours'].loss / found['lean'].loss:.4f} ({where})" for where, (_, found) in strengths.items()]
    lines.append(f"cross-entropy that ours reaches, of lean's: {', '.join(reached)}")
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True)
    print_machine(console, device)


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description="PGD beside torchattacks, foolbox and ART.")
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds of all sides, after one for warming up")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=10, help="attack steps")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--net", default="ResNet18", choices=("ResNet18", "PreActResNet18", "SmallCNN"))
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--only", nargs="+", choices=tuple(PEERS), default=tuple(PEERS), help="peers beside ours and lean")
    parser.add_argument("--frozen", action="store_true", help="no parameter asks for a gradient, on all sides")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    add_install_option(parser)
    args = parser.parse_args(argv)
    for name in ("rounds", "batch_size", "steps", "threads"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this torch sees no GPU")
    return args


def main(argv: list[str] | None = None) -> None:
    """Measure, print the tables, and write the JSON if asked."""
    args = _arguments(argv)
    run_installed("benchmarks.peers", PACKAGES, argv)
    warnings.filterwarnings("ignore", category=UserWarning)
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    left_out = {name: why for name in args.only if (why := PEERS[name].missing()) is not None}
    for name, why in left_out.items():
        Console().print(f"{name} is left out ({why})", highlight=False, soft_wrap=True, markup=False)
    peers = [name for name in args.only if name not in left_out]
    net, x, y = random_problem(args, device)
    budget = Budget(8 / 255, 2 / 255, args.steps)
    measured, found = measure(net, x, y, attacks(net, budget, x, peers, args.frozen), args.rounds, args.steps)
    strengths = {TIMED: (budget.eps, found), DIGITS: on_digits(args, device, peers)}
    title = f"PGD-{args.steps}, {args.net}, batch {args.batch_size}, fp32: medians of {args.rounds} rounds"
    print_figures(measured, strengths, title, device)
    if args.json is not None:
        report = {
            "settings": {key: value for key, value in vars(args).items() if key not in ("json", "install")},
            "machine": machine(device),
            "versions": {name: PEERS[name].version() for name in peers},
            "left_out": left_out,
            "of_lean": measured.figures("lean"),
            "of_ours": measured.figures("ours"),
            "strength": {where: {side: asdict(s) for side, s in found.items()} for where, (_, found) in strengths.items()},
        }
        args.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
