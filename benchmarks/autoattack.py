"""AutoAttack of ours beside the official package: ``python -m benchmarks.autoattack``.

Both attack the same networks on the same images, interleaved, in one process. Counted are CPU seconds and the samples that
pass through the network forwards and backwards; compared are the verdicts, sample by sample. The official package
(https://github.com/fra31/auto-attack) is no dependency: without it ours alone is measured. It is at no registry:
``--install FOLDER`` makes an environment of its own with it, see ``benchmarks/environment.py``, from where it is published or
from another ``--source`` that pip takes. It asks for nothing, and imports torch and numpy alone.

Networks: an undefended one, and a robust one of which about half of the samples stand. With ``ROBUST_PL_DATA`` they are
``akamaster_resnet20`` at linf 8/255 and ``abcrown_resnet2b_adv2`` at 2/255 on CIFAR-10; else a small network for
scikit-learn's digits, trained here without and with PGD, at 0.2.

Requirement: at least 5 times less CPU time on the undefended network; at least 1.1 times fewer passes and 1.3 times less CPU
time on the robust one; verdicts that differ for at most 1 in 100 samples.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from robust_pl import nets
from robust_pl.callbacks import PGD, AutoAttack
from robust_pl.data import CIFAR10DataModule, DigitsDataModule
from robust_pl.functional.ratio import Ratio

from .environment import Packages, add_install_option, run_installed
from .timing import Pairs, machine

OFFICIAL = "git+https://github.com/fra31/auto-attack"
OFFICIAL_NORM = {"linf": "Linf", "l2": "L2", "l1": "L1"}


@dataclass(frozen=True)
class Setting:
    """A network and what it is attacked with.

    Args:
        name: what the table calls it.
        net: maps pixels to logits, in eval mode with frozen parameters.
        x: pixels (B, C, H, W).
        y: labels (B,).
        eps: radius.
    """

    name: str
    net: nn.Module
    x: Tensor
    y: Tensor
    eps: float


class Counting(nn.Module):
    """Counts the samples that pass through a network forwards and backwards."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.forwards, self.backwards = net, 0, 0

    def forward(self, x: Tensor) -> Tensor:
        self.forwards += len(x)
        logits = self.net(x)
        if logits.requires_grad:
            logits.register_hook(self._count)
        return logits

    def _count(self, gradient: Tensor) -> None:
        self.backwards += len(gradient)


@dataclass
class Side:
    """What one side has found last."""

    robust: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.bool))
    forwards: int = 0
    backwards: int = 0
    after: dict[str, int] = field(default_factory=dict)

    @property
    def passes(self) -> int:
        """Forward and backward passes together, summed over samples."""
        return self.forwards + self.backwards

    def summary(self) -> dict[str, Any]:
        """For JSON."""
        robust = self.robust.nonzero().flatten().tolist()
        return {"forwards": self.forwards, "backwards": self.backwards, "robust": robust, "after": self.after}


def run_ours(setting: Setting, args: argparse.Namespace, side: Side) -> None:
    """One evaluation by ours."""
    attack = AutoAttack(setting.eps, norm=args.norm, version=args.version, batch_size=args.batch_size)
    found = attack.run(setting.net, setting.x, setting.y)
    side.forwards, side.backwards = found.forwards, found.backwards
    side.after = {name: int(stands.sum()) for name, stands in found.robust.items()}
    side.robust = _right(setting.net, found.x_adv, setting.y)


def run_official(setting: Setting, args: argparse.Namespace, side: Side) -> None:
    """One evaluation by the official package."""
    from autoattack import AutoAttack as Official

    net = Counting(setting.net)
    with contextlib.redirect_stdout(io.StringIO()):
        attack = Official(
            net, norm=OFFICIAL_NORM[args.norm], eps=setting.eps, seed=0, version=args.version, device="cpu", verbose=False
        )
        x_adv = attack.run_standard_evaluation(setting.x, setting.y, bs=args.batch_size)
    side.forwards, side.backwards = net.forwards, net.backwards
    side.robust = _right(setting.net, x_adv, setting.y)


def measure(setting: Setting, args: argparse.Namespace) -> dict[str, Any]:
    """Both sides on one network, or ours alone."""
    sides = {"ours": (run_ours, Side())}
    if official_is_there():
        sides["lean"] = (run_official, Side())
    pairs = Pairs(setting.name, args.pairs)
    few = Setting(setting.name, setting.net, setting.x[:4], setting.y[:4], setting.eps)
    for pair, name in pairs.order():
        if name in sides:
            attack, side = sides[name]
            began = time.process_time()
            attack(setting if pair else few, args, side)  # pair 0 is the warm-up
            pairs.add(pair, name, time.process_time() - began)
    ours = sides["ours"][1]
    figures = {"eps": setting.eps, "samples": len(setting.y), "ours": ours.summary() | {"seconds": pairs.ours}}
    if "lean" not in sides:
        return figures
    theirs = sides["lean"][1]
    return figures | {
        "official": theirs.summary() | {"seconds": pairs.lean},
        "times_less_time": 1 / pairs.summary()["ratio_median"],
        "times_fewer_passes": theirs.passes / max(1, ours.passes),
        "different_verdicts": (ours.robust != theirs.robust).nonzero().flatten().tolist(),
    }


def official_is_there() -> bool:
    """Whether the official package can be imported."""
    try:
        import autoattack  # noqa: F401
    except ImportError:
        return False
    return True


def _right(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        return net(x).argmax(1) == y


def settings(args: argparse.Namespace) -> list[Setting]:
    """The undefended and the robust network."""
    if os.environ.get("ROBUST_PL_DATA"):
        images = CIFAR10DataModule().load_test()
        x, y = images.read(torch.arange(args.samples), None)
        chosen = [("akamaster_resnet20", "8/255"), ("abcrown_resnet2b_adv2", "2/255")]
        return [_setting(name, nets.pretrained(name), x, y, args.eps or eps) for name, eps in chosen]
    images = DigitsDataModule().load_test()
    x, y = images.read(torch.arange(min(args.samples, len(images))), None)
    chosen = [("digits, undefended", False, 0.2), ("digits, PGD training", True, 0.2)]
    return [_setting(name, trained_on_digits(robust), x, y, args.eps or eps) for name, robust, eps in chosen]


def _setting(name: str, net: nn.Module, x: Tensor, y: Tensor, eps: str | float) -> Setting:
    return Setting(name, net.eval().requires_grad_(False), x, y, float(Ratio(eps)))


def trained_on_digits(robust: bool, epochs: int = 12) -> nn.Module:
    images = DigitsDataModule().load_train()
    x, y = images.read(torch.arange(len(images)), None)
    torch.manual_seed(0)
    net, attack = nets.SmallCNN(), PGD(0.2, steps=5)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    for rows in [rows for _ in range(epochs) for rows in torch.randperm(len(x)).split(64)]:
        seen = attack(net, x[rows], y[rows]) if robust else x[rows]
        optimizer.zero_grad()
        F.cross_entropy(net(seen), y[rows]).backward()
        optimizer.step()
    return net


def print_figures(measured: dict[str, dict[str, Any]], title: str) -> None:
    """Print two rows a network, and the machine."""
    table = Table(title=title)
    for name in ("network", "side", "robust", "CPU s", "forward", "backward"):
        table.add_column(name, justify="left" if name in ("network", "side") else "right", no_wrap=True)
    console = Console()
    for name, figures in measured.items():
        for side in ("ours", "official"):
            if side in figures:
                found = figures[side]
                robust = f"{len(found['robust'])} of {figures['samples']}"
                seconds = f"{median(found['seconds']):.2f}"
                table.add_row(name, side, robust, seconds, f"{found['forwards']:,}", f"{found['backwards']:,}")
    console.print(table)
    for name, figures in measured.items():
        if "official" in figures:
            console.print(
                f"{name}: {figures['times_less_time']:.2f} times less CPU time, {figures['times_fewer_passes']:.2f} times "
                f"fewer passes, {len(figures['different_verdicts'])} of {figures['samples']} verdicts differ",
                highlight=False,
                soft_wrap=True,
            )
    console.print(", ".join(f"{key} {value}" for key, value in machine().items()), highlight=False, soft_wrap=True)


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.autoattack", description="Beside the official AutoAttack.")
    parser.add_argument("--samples", type=int, default=64, help="test images")
    parser.add_argument("--eps", help="radius for both networks, such as 4/255, instead of those of each")
    parser.add_argument("--pairs", type=int, default=1, help="measured pairs, after a small one for warming up")
    parser.add_argument("--norm", default="linf", choices=tuple(OFFICIAL_NORM))
    parser.add_argument("--version", default="standard", choices=("standard", "plus", "rand"))
    parser.add_argument("--batch-size", type=int, default=250)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", choices=("undefended", "robust"), help="one of the two networks")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    add_install_option(parser)
    parser.add_argument("--source", default=OFFICIAL, help="of the official package, for --install: a URL, a folder or a wheel")
    args = parser.parse_args(argv)
    for name in ("samples", "pairs", "batch_size", "threads"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    return args


def main(argv: list[str] | None = None) -> None:
    """Measure, print the table, and write the JSON if asked."""
    args = _arguments(argv)
    run_installed("benchmarks.autoattack", [Packages((args.source,), alone=True)], argv)
    warnings.filterwarnings("ignore", category=UserWarning)
    torch.set_num_threads(args.threads)
    if not official_is_there():
        Console().print("The official package (import autoattack) is not installed: ours is measured alone.", soft_wrap=True)
    chosen = settings(args)
    chosen = {"undefended": chosen[:1], "robust": chosen[1:], None: chosen}[args.only]
    measured = {setting.name: measure(setting, args) for setting in chosen}
    print_figures(measured, f"AutoAttack {args.version}, {args.norm}, fp32: medians of {args.pairs} pairs")
    if args.json is not None:
        given = {key: value for key, value in vars(args).items() if key not in ("json", "install", "source")}
        args.json.write_text(json.dumps({"settings": given, "machine": machine(), **measured}, indent=2) + "\n")


if __name__ == "__main__":
    main()
