"""What a Fourier heat map costs: ``python -m benchmarks.fourier_heat_map``.

The central 31 x 31 frequencies of a ResNet-20 on 256 CIFAR-10 images (``ROBUST_PL_DATA``; random images without it), with the
forward passes that it took, wall time and CPU time.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from robust_pl.callbacks import FourierHeatMap
from robust_pl.data import CIFAR10DataModule
from robust_pl.nets import ResNet20, pretrained
from robust_pl.report import plot_record
from robust_pl.report.plots import save

from .timing import machine


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, write JSON and the map."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fourier_heat_map", description="Cost of a heat map.")
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--size", type=int, default=31)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark_fourier_heat_map"))
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    if os.environ.get("ROBUST_PL_DATA"):
        data = CIFAR10DataModule(eval_batch_size=args.samples)
        data.setup("test")
        batch, net = next(iter(data.test_dataloader())), pretrained("akamaster_resnet20")
    else:
        generator = torch.Generator().manual_seed(0)
        x = torch.rand(args.samples, 3, 32, 32, generator=generator)
        batch, net = (x, torch.randint(10, (args.samples,), generator=generator)), ResNet20().eval()
    analysis = FourierHeatMap(size=args.size, samples=args.samples)
    wall, cpu = time.perf_counter(), time.process_time()
    record = analysis(net, [batch])
    found = {
        "samples": args.samples,
        "waves": record.about["waves"],
        "forward_passes": round(record.about["forwards_per_sample"] * args.samples),
        "wall_s": round(time.perf_counter() - wall, 1),
        "cpu_s": round(time.process_time() - cpu, 1),
        "figures": record.figures,
        "machine": machine(),
    }
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "fourier_heat_map.json").write_text(json.dumps(found, indent=1) + "\n")
    save(plot_record(record), args.output / "fourier_heat_map.png")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
