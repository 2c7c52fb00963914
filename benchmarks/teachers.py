"""How sure teachers and students are, and what a teacher says of attacks on a student: ``python -m benchmarks.teachers``.

It reads the runs that ``python -m benchmarks.distillation`` made on the digits and trains nothing. That explains why learning
from two teachers helps or not: a student of both has to be sure of clean images and unsure of attacked ones.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from robust_pl.callbacks import PGD
from robust_pl.data import DigitsDataModule
from robust_pl.functional.distillation import entropy
from robust_pl.nets import TrainedNet

from .runs import markdown

EPS, STEPS = 0.2, 20
TEACHERS = ("teacher_robust", "teacher_clean")


def row(net: nn.Module, x: Tensor, y: Tensor) -> list[str]:
    """Accuracy in percent, mean probability of the right class, mean entropy in nats."""
    with torch.no_grad():
        logits = net(x)
    right = logits.softmax(1).gather(1, y.unsqueeze(1)).mean()
    return [f"{100 * (logits.argmax(1) == y).float().mean():.1f}", f"{right:.2f}", f"{entropy(logits).mean():.2f}"]


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table of one seed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.teachers", description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=Path, default=Path("runs/benchmark_distillation/digits/seed0/runs"))
    parser.add_argument("--students", nargs="+", default=["rslad", "mtard", "bmtard"], metavar="NAME")
    args = parser.parse_args(argv)
    missing = [name for name in (*TEACHERS, *args.students) if not (args.runs / name).is_dir()]
    if missing:
        parser.error(f"--runs {args.runs} has no run {missing[0]!r}: run python -m benchmarks.distillation first")
    data = DigitsDataModule()
    x, y = data.test_set.read(torch.arange(len(data.test_set)), None)
    nets = {name: TrainedNet(str(args.runs / name)) for name in (*TEACHERS, *args.students)}
    body = [[name, "clean", *row(net, x, y)] for name, net in nets.items()]
    for student in args.students:
        x_adv = PGD(EPS, steps=STEPS)(nets[student], x, y)
        body += [[name, f"attacks on {student}", *row(nets[name], x_adv, y)] for name in (student, TEACHERS[0])]
    print(markdown(["network", "images", "accuracy", "probability of the right class", "entropy"], body))


if __name__ == "__main__":
    main()
