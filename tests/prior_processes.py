"""What is kept of each sample on two processes: started by test_per_sample with torchrun, one line of JSON."""

from __future__ import annotations

import json
import logging
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from robust_pl.methods import FGSMPGI, ConvergeSmooth
from robust_pl.methods.per_sample import PerSample

from .test_per_sample import Look, StopAt, everything, fit
from .test_prior_guided import SHAPE, batch, build, given, prior


def same(tensor: Tensor) -> bool:
    """Whether the other process has the same."""
    first = tensor.detach().clone()
    dist.broadcast(first, 0)
    return torch.equal(first, tensor)


def exchange(storage: Any) -> bool:
    """Batches of different sizes, over and over, against one table on each process."""
    rank, samples = dist.get_rank(), 23
    memory = PerSample(("a", "b"), storage)
    memory._rank, memory._ranks, memory._batch = rank, 2, 7
    memory.reserve(samples, SHAPE, torch.device("cpu"))
    table, epochs = torch.zeros(samples, 2, *SHAPE), torch.full((samples,), -1)
    generator = torch.Generator().manual_seed(0)
    right = memory._rows.numel() == (12 + 1) * 2 * 16  # half of the samples, and one that nobody reads
    for epoch in range(6):
        order = torch.randperm(samples, generator=generator)
        for step in order[: 7 + 5 + 3].split(12):  # 7 and 5 samples, then 2 and 1
            mine = [step[: (len(step) + 2) // 2], step[(len(step) + 2) // 2 :]]
            values = torch.rand(len(step), 2, *SHAPE, generator=generator)
            values = values.to(memory.dtype).float()
            kept, written = memory.read(mine[rank])
            right &= torch.equal(kept, table[mine[rank]]) and torch.equal(written, epochs[mine[rank]])
            memory.write(mine[rank], values.split([len(m) for m in mine])[rank], epoch)
            table[step], epochs[step] = values, epoch
    kept, written = zip(*(memory.read(part) for part in torch.arange(samples).split(7)), strict=True)
    return right and torch.equal(torch.cat(kept), table) and torch.equal(torch.cat(written), epochs)


def one_batch_over_two() -> float:
    """How far the momenta of halves of a batch are from those of the whole of it, whose norm they share."""
    x, y, index = batch()
    kept, half = prior(2), slice(3 * dist.get_rank(), 3 * dist.get_rank() + 3)
    method = build(FGSMPGI)
    given(method, kept)  # each process has all of it
    found = method.craft((x[half], y[half], index[half])).prior
    net = method.net
    point = (x + kept[:, 0].double()).clamp(0, 1).requires_grad_()
    (gradient,) = torch.autograd.grad(torch.nn.functional.cross_entropy(net(point), y, reduction="sum"), point)
    expected = gradient / gradient.abs().sum() + 0.3 * kept[:, 1].double()
    return (found[:, 1] - expected[half]).abs().max().item()


def decision() -> list[float]:
    """A batch whose halves would decide otherwise each, and in which the larger one counts more."""
    losses = [torch.tensor([1.0, 1.0, 1.0]), torch.tensor([2.0])][dist.get_rank()]
    smooth = ConvergeSmooth(gamma=0.1)
    smooth.previous.fill_(1.3)  # the mean is 1.25
    return smooth.judge(losses, 0).flatten().tolist()


def stray() -> bool:
    """An index of no sample on one process alone stops both."""
    memory = PerSample(("a",))
    memory._rank, memory._ranks, memory._batch = dist.get_rank(), 2, 2
    memory.reserve(5, SHAPE, torch.device("cpu"))
    try:
        memory.read(torch.tensor([0, [1, 5][dist.get_rank()]]))
    except ValueError as error:
        return "indices outside of 0 to 4" in str(error)
    return False


def main() -> None:
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    folder = Path(sys.argv[1])
    dist.init_process_group("gloo")
    report: dict[str, Any] = {"exchange": [exchange(storage) for storage in ("float32", "bfloat16")]}
    report |= {"momentum": one_batch_over_two(), "decision": decision(), "stray": stray()}

    two = {"strategy": "ddp", "devices": 2, "batch_size": 100}  # 1293 samples: 6 steps of 200, and one of 47 and 46
    whole = fit(folder / "two", **two)
    kept = everything(whole)
    report |= {"weights": all(same(p) for p in whole.parameters()), "samples": int((kept[1] >= 0).sum())}
    for step, name in ((11, "middle"), (7, "two")):
        fit(folder / "two", [StopAt(step, folder / f"{name}.ckpt")], **two)
    resumed = fit(folder / "two", seed=1, ckpt_path=folder / "middle.ckpt", **two)
    report["resumed"] = all(torch.equal(a, b) for a, b in zip(everything(resumed), kept, strict=True))
    report["resumed"] &= all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    joined = fit(folder / "two", accumulate_grad_batches=2, **two)  # three steps of two batches, and one of the last
    report["accumulated"] = (everything(joined)[1] == 2).sum().item() == 1293 and all(same(p) for p in joined.parameters())
    look = Look()
    fit(folder / "one", [look], ckpt_path=folder / "one.ckpt", **two)
    report["from_one"] = look.is_what(folder / "one.kept")
    reports: list[Any] = [None, None]
    dist.all_gather_object(reports, report)
    if dist.get_rank() == 0:
        print("RESULT " + json.dumps(reports), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
