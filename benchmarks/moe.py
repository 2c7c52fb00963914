"""What a mixture of experts saves at inference: ``python -m benchmarks.moe``.

Compares the dense ResNet-18 with MoEResNet18 in FLOPs, counted by PyTorch as they are dispatched, and in time: batches of
random images in eval mode without gradients, in interleaved pairs with the dense network. Three ways to the same logits:

- ``sorted``: as the library does it, each expert convolves its block of images; the host waits once for the blocks' sizes.
- ``masked``: all experts' outputs for all images, of which those of other experts are thrown away, as in the published code.
- ``per image``: a grouped convolution in which each image brings its expert's filters; the host waits for nothing.

The router runs, but the images are dealt out evenly whatever it says, since an untrained one sends all of them to one expert.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from robust_pl.nets import MoEResNet18, ResNet18
from robust_pl.nets.experts import MoEConv, MoENet

from .timing import Pairs, machine


class Unsorted:
    """A route that leaves the batch in its order."""

    def __init__(self, chosen: Tensor) -> None:
        self.chosen = chosen


class Masked(nn.Module):
    """All experts for all images, and then the gates."""

    def __init__(self, conv: MoEConv) -> None:
        super().__init__()
        self.experts, self.stride = len(conv), conv[0].stride
        self.weight = nn.Parameter(torch.cat([expert.weight for expert in conv]))

    def forward(self, z: Tensor, route: Unsorted) -> Tensor:
        out = F.conv2d(z, self.weight, stride=self.stride, padding=1).unflatten(1, (self.experts, -1))
        gates = F.one_hot(route.chosen, self.experts).to(z.dtype).view(*out.shape[:2], 1, 1, 1)
        return (out * gates)[torch.arange(len(z), device=z.device), route.chosen]


class PerImage(nn.Module):
    """Filters of each image's expert, in as many groups as there are images."""

    def __init__(self, conv: MoEConv) -> None:
        super().__init__()
        self.stride = conv[0].stride
        self.weight = nn.Parameter(torch.stack([expert.weight for expert in conv]))

    def forward(self, z: Tensor, route: Unsorted) -> Tensor:
        filters = self.weight[route.chosen].flatten(0, 1)
        out = F.conv2d(z.reshape(1, -1, *z.shape[2:]), filters, stride=self.stride, padding=1, groups=len(z))
        return out.view(len(z), -1, *out.shape[2:])


def variants(net: MoENet, scores: Tensor) -> dict[str, Callable[[Tensor], Tensor]]:
    """Name -> logits of pixels, the router's cost included and its choice replaced by ``scores``."""

    def unsorted(layer: Callable[[MoEConv], nn.Module]) -> Callable[[Tensor], Tensor]:
        other = copy.deepcopy(net)
        for parent in list(other.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, MoEConv):
                    setattr(parent, name, layer(child))

        def logits(x: Tensor) -> Tensor:
            other.signals(x)
            return other.head(other.path(other.normalize(x), Unsorted(scores.argmax(1))))

        return logits

    def as_is(x: Tensor) -> Tensor:
        net.signals(x)
        return net.routed(x, scores)

    return {"sorted": as_is, "masked": unsorted(Masked), "per image": unsorted(PerImage)}


def flops(run: Callable[[], Any]) -> int:
    """Of one run: two for each multiplication and the addition that takes it up."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def compare(name: str, count: int, ours: Callable[[], Any], dense: Callable[[], Any], wait: Callable[[], Any]) -> list[Pairs]:
    """Wall and CPU seconds of both in interleaved pairs."""
    clocks = {"wall": time.perf_counter, "CPU": time.process_time}
    measured = {clock: Pairs(f"{name}, {clock} seconds", count) for clock in clocks}
    for pair, side in measured["wall"].order():
        began = {clock: now() for clock, now in clocks.items()}
        ours() if side == "ours" else dense()
        wait()
        for clock, now in clocks.items():
            measured[clock].add(pair, side, now() - began[clock])
    return list(measured.values())


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.moe", description="Inference cost of a mixture of experts.")
    parser.add_argument("--pairs", type=int, default=9, help="measured pairs, after one for warming up")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--experts", type=int, default=2)
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--size", type=int, default=32, help="height and width of the images")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    args = parser.parse_args(argv)
    for name in ("pairs", "batch_size", "size", "threads"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    return args


@torch.inference_mode()
def main(argv: list[str] | None = None) -> None:
    """Measure, print the table, and write the JSON if asked."""
    args = _arguments(argv)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    x = torch.rand(args.batch_size, 3, args.size, args.size, device=args.device)
    dense = ResNet18().to(args.device).eval()
    net = MoEResNet18(experts=args.experts, ratio=args.ratio).to(args.device).eval()
    even = F.one_hot(torch.arange(len(x), device=args.device) % args.experts, args.experts).to(x.dtype)
    wait = torch.cuda.synchronize if args.device == "cuda" else lambda: None
    ways = variants(net, even)
    expected = ways["sorted"](x)
    for name, way in ways.items():
        if not torch.allclose(way(x), expected, atol=1e-4):
            raise RuntimeError(f"{name} does not compute what the network does")

    of_dense = flops(lambda: dense(x))
    figures: dict[str, Any] = {"dense": {"flops": of_dense / len(x)}}
    table = Table(title=f"MoEResNet18(experts={args.experts}, ratio={args.ratio}), batch {len(x)}, fp32, {args.pairs} pairs")
    for column in ("network", "GFLOPs an image", "wall s", "CPU s", "of dense, FLOPs", "wall (min, max)", "CPU (min, max)"):
        table.add_column(column, justify="left" if column == "network" else "right")
    for name, way in ways.items():
        count = flops(lambda way=way: way(x))
        summaries = [p.summary() for p in compare(name, args.pairs, lambda way=way: way(x), lambda: dense(x), wait)]
        if len(figures) == 1:
            seconds = [f"{s['lean_median_s']:.3f}" for s in summaries]
            table.add_row("dense ResNet-18", f"{of_dense / len(x) / 1e9:.3f}", *seconds, "1", "1", "1")
        seconds = [f"{s['ours_median_s']:.3f}" for s in summaries]
        ratios = [f"{s['ratio_median']:.2f} ({s['ratio_min']:.2f}, {s['ratio_max']:.2f})" for s in summaries]
        table.add_row(name, f"{count / len(x) / 1e9:.3f}", *seconds, f"{count / of_dense:.2f}", *ratios)
        figures[name] = {"flops": count / len(x), "wall": summaries[0], "cpu": summaries[1]}
    console = Console(width=120)
    console.print(table)
    device = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
    console.print(", ".join(f"{key} {value}" for key, value in machine().items()), device, highlight=False, soft_wrap=True)
    if args.json is not None:
        settings = {key: value for key, value in vars(args).items() if key != "json"}
        args.json.write_text(json.dumps({"settings": settings, "machine": machine(), **figures}, indent=2) + "\n")


if __name__ == "__main__":
    main()
