"""Images a second of PGD adversarial training, and the share of the card's matrix rate: ``python -m benchmarks.throughput``.

Each row trains the same network on the same made-up images, under a Lightning ``Trainer`` as a user would or by the plain
loop of ``benchmarks/lean.py``, and its figure is the median time between the starts of neighbouring steps, the first ones left
out. The floating-point work of a sample is that of ``torch.utils.flop_counter``: (steps + 1) forward passes, ``steps`` backward
passes to the pixels and one to the weights. The matrix rate is what a product of two 8192 x 8192 bf16 matrices reaches on the
same card. ``--profile`` writes what the kernels of a step cost in the first and in each other row.

Aim on an H100-class card: 35 % of its matrix rate with a ResNet-18 and PGD-10.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from lightning.pytorch import Trainer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from robust_pl import nets
from robust_pl.callbacks import PGD, ComputeMonitor, Speed
from robust_pl.callbacks.monitors.passes import PassCounter
from robust_pl.data import ImageDataModule
from robust_pl.data.images import ImagesInMemory
from robust_pl.methods import PGDAT

from . import lean
from .step_clock import SKIP, Clock, matrix_rate
from .timing import machine
from .training import EPS, STEP_SIZE, sgd

OFF = {"fold_batchnorm": False, "channels_last": False, "fused_optimizer": False, "resident_data": False}


@dataclass(frozen=True)
class Setting:
    """What all rows share."""

    net: Callable[[], nn.Module]
    shape: tuple[int, int, int]
    classes: int
    batch_size: int
    attack_steps: int
    steps: int
    device: torch.device


class MadeUp(ImageDataModule):
    """Random images, enough for the steps that are measured; where they lie is up to the switches."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(batch_size=setting.batch_size, val_size=0, augment=False)
        self.class_names, self.image_shape = [str(k) for k in range(setting.classes)], setting.shape
        self.size = setting.batch_size * min(setting.steps + SKIP[setting.device.type], 64)

    def load_train(self) -> ImagesInMemory:
        generator = torch.Generator().manual_seed(0)
        pixels = torch.randint(256, (self.size, *self.image_shape), dtype=torch.uint8, generator=generator)
        return ImagesInMemory(pixels, torch.randint(self.num_classes, (self.size,), generator=generator))

    def load_test(self) -> ImagesInMemory:
        return self.load_train()


@dataclass
class Row:
    """A way to train.

    Args:
        name: what the table calls it.
        precision: the Trainer's.
        switches: of :class:`robust_pl.callbacks.Speed`; None trains by hand.
        channels_last: of the hand-written loop.
    """

    name: str
    precision: str = "32-true"
    switches: dict[str, Any] | None = field(default_factory=dict)
    channels_last: bool = False

    def seconds(self, setting: Setting, trace: Path | None) -> list[float]:
        """Of each step that counts."""
        torch.manual_seed(0)
        clock = Clock(setting.device, setting.steps, None if self.switches is None else trace)
        if self.switches is None:
            self._by_hand(setting, clock)
        else:
            attack = PGD(EPS, STEP_SIZE, setting.attack_steps)
            method = PGDAT(setting.net(), attack, optimizer=sgd, num_classes=setting.classes)
            trainer = Trainer(
                accelerator=setting.device.type,
                devices=1,
                max_steps=setting.steps + SKIP[setting.device.type],
                precision=self.precision,  # type: ignore[arg-type]
                benchmark=setting.device.type == "cuda",
                callbacks=[clock, Speed(**self.switches), ComputeMonitor(show=False)],
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
            )
            trainer.fit(method, MadeUp(setting))
        return clock.seconds()

    def _by_hand(self, setting: Setting, clock: Clock) -> None:
        net = setting.net().to(setting.device)
        memory_format = torch.channels_last if self.channels_last else torch.contiguous_format
        net = net.to(memory_format=memory_format)
        optimizer = sgd(net.parameters())
        torch.backends.cudnn.benchmark = True
        half = torch.autocast(setting.device.type, torch.bfloat16) if self.precision == "bf16-mixed" else nullcontext()
        for x, y in _batches(setting):
            clock.mark()
            with half:
                x = x.contiguous(memory_format=memory_format)
                lean.training_step(net, optimizer, x, y, EPS, STEP_SIZE, setting.attack_steps)
        clock.mark()


ROWS = {
    "lean": Row("hand-written loop, float32", switches=None),
    "lean_bf16": Row("hand-written loop, bf16, channels last", "bf16-mixed", None, True),
    "plain": Row("Lightning, float32, all switches off", switches=OFF),
    "default": Row("defaults, float32"),
    "bf16": Row("defaults, bf16", "bf16-mixed"),
    "graphs": Row("bf16, CUDA graphs", "bf16-mixed", {"cuda_graphs": True}),
    "compile": Row("bf16, compiled", "bf16-mixed", {"compile": "default"}),
}


def measure(setting: Setting, rows: list[str], traces: Path | None) -> dict[str, dict[str, Any]]:
    """The figures of each row."""
    work = flops(setting)
    rate = matrix_rate(setting.device)
    found: dict[str, dict[str, Any]] = {}
    for name in rows:
        began = time.perf_counter()
        if setting.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        seconds = ROWS[name].seconds(setting, traces / f"{name}_{setting.batch_size}.txt" if traces else None)
        step = median(seconds)
        images = setting.batch_size / step
        found[name] = {
            "row": ROWS[name].name,
            "batch_size": setting.batch_size,
            "step_s": step,
            "images_s": images,
            "flops_image": work,
            "tflops": images * work / 1e12,
            "share_of_matrix_rate": images * work / rate,
            "matrix_tflops": rate / 1e12,
            "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if setting.device.type == "cuda" else None,
            "whole_row_s": time.perf_counter() - began,
        }
    return found


def flops(setting: Setting) -> float:
    """Floating-point operations of a training step, for one image."""
    net = setting.net()
    counter = PassCounter(net, lambda: "training")
    net(torch.rand(2, *setting.shape))
    counter.remove()
    if counter.flops is None:
        raise RuntimeError(f"the FLOPs of {type(net).__name__} are not known")
    one = counter.flops
    return (setting.attack_steps + 1) * one.forwards + setting.attack_steps * one.input_backwards + one.weight_backwards


def _batches(setting: Setting) -> Iterator[tuple[Tensor, Tensor]]:
    data = MadeUp(setting).train_set
    loader = torch.utils.data.DataLoader(range(len(data)), setting.batch_size)  # type: ignore[arg-type]
    step = 0
    while True:
        for index in loader:
            x, y = data.read(index, None)
            yield x.to(setting.device, non_blocking=True), y.to(setting.device, non_blocking=True)
            step += 1
            if step == setting.steps + SKIP[setting.device.type]:
                return


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.throughput", description="Images a second of PGD training.")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cuda", "cpu"))
    parser.add_argument("--net", default="ResNet18", choices=("ResNet18", "ResNet50", "SmallCNN", "timm_resnet50"))
    parser.add_argument("--size", type=int, default=32, help="height and width of the images")
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[128, 512])
    parser.add_argument("--attack-steps", type=int, default=10)
    parser.add_argument("--steps", type=int, default=30, help="steps that count, after a few that do not")
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=tuple(ROWS))
    parser.add_argument("--profile", type=Path, metavar="FOLDER", help="write what each row's kernels cost there")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Measure, print the table, and write the JSON if asked."""
    args = _arguments(argv)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning.*")
    device = torch.device(args.device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    if args.profile is not None:
        args.profile.mkdir(parents=True, exist_ok=True)
    console, figures = Console(width=140), []
    table = Table(title=f"PGD-{args.attack_steps} training, {args.net}, {args.size} pixels, {name}, torch {torch.__version__}")
    for heading in ("row", "batch", "ms a step", "images/s", "TFLOP/s", "of matrix rate", "peak GiB"):
        table.add_column(heading, justify="left" if heading == "row" else "right")
    for batch_size in args.batch_sizes:
        shape = (3, args.size, args.size)
        net = _net(args.net, args.classes)
        setting = Setting(net, shape, args.classes, batch_size, args.attack_steps, args.steps, device)
        for row in measure(setting, args.rows, args.profile).values():
            figures.append(row)
            peak = "" if row["peak_gib"] is None else f"{row['peak_gib']:.2f}"
            table.add_row(
                row["row"],
                str(batch_size),
                f"{1000 * row['step_s']:.2f}",
                f"{row['images_s']:,.0f}",
                f"{row['tflops']:.1f}",
                f"{row['share_of_matrix_rate']:.1%}",
                peak,
            )
    console.print(table)
    console.print(
        f"matrix rate {figures[-1]['matrix_tflops']:.4g} TFLOP/s; {figures[-1]['flops_image'] / 1e9:.2f} GFLOP an image"
    )
    if args.json is not None:
        settings = {key: str(value) for key, value in vars(args).items() if key != "json"}
        args.json.write_text(
            json.dumps({"settings": settings, "device": name, "machine": machine(), "rows": figures}, indent=2)
        )


def _net(name: str, classes: int) -> Callable[[], nn.Module]:
    if name == "timm_resnet50":
        return lambda: nets.TimmModel(num_classes=classes, model_name="resnet50")
    return lambda: getattr(nets, name)(num_classes=classes, in_channels=3)


if __name__ == "__main__":
    main()
