"""Which frequencies robust networks rely on: ``python -m benchmarks.frequencies``, on real CIFAR-10 images.

Two public networks (files under ``ROBUST_PL_DATA``): ResNet-20, standard training, and ResNet-2B, adversarially trained at
linf 2/255. Three that are trained here, if they are not yet: a small CNN by standard training, and ResNet-20 by PGD-AT and by
FR, both begun from the public weights. Of each: accuracy under low-pass and high-pass filters, clean and under PGD-20; the
spectrum of what PGD-20 adds; the error rate under each of the central 31 x 31 waves.

Of trainings the last weights count, since 200 validation images cannot choose. What was finished is not run again; trainings
are processes of one thread, and everything here runs on one thread a network.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from robust_pl import load_model
from robust_pl.callbacks import PGD, Analysis, FourierHeatMap, FrequencyFilter, PerturbationSpectrum
from robust_pl.callbacks.attacks.problem import Problem
from robust_pl.data import CIFAR10DataModule
from robust_pl.report import Record
from robust_pl.report.plots import save

from .frequencies_plot import plot_filters, plot_maps, plot_spectra
from .runs import Runs, at_once, digest, markdown
from .timing import machine

NETWORKS = {
    "standard": ("standard, ResNet-20 (public)", "akamaster_resnet20"),
    "standard_cpu": ("standard, small CNN", "configs/cifar10/standard_cpu.yaml"),
    "adv2": ("AT at 2/255, ResNet-2B (public)", "abcrown_resnet2b_adv2"),
    "pgd_at": ("PGD-AT, ResNet-20", "configs/cifar10/pgd_at_resnet20_cpu.yaml"),
    "fr": ("FR, ResNet-20", "configs/cifar10/fr_resnet20_cpu.yaml"),
}
SIZES = [32, 28, 24, 20, 16, 12, 8]


class OncePGD(PGD):
    """PGD that remembers what it found for each batch, for several analyses of one network."""

    def perturb(self, problem: Problem, x: Tensor, y: Tensor) -> Tensor:
        self.found: dict[tuple[int, ...], Tensor] = getattr(self, "found", {})
        batch = tuple(problem.draws.index.tolist())
        if batch not in self.found:
            self.found[batch] = super().perturb(problem, x, y)
        return self.found[batch]


def analyses(samples: int, heat_samples: int) -> list[Analysis]:
    """The three of them; the attack is run once for the first two."""
    attack = OncePGD("8/255", step_size="2/255", steps=20, random_start=True)
    attack.name = "PGD-20"
    return [
        FrequencyFilter(attack, SIZES, samples=samples),
        PerturbationSpectrum(attack, samples=samples),
        FourierHeatMap(size=31, norm=4.0, samples=heat_samples),
    ]


def measure(name: str, runs: Runs, samples: int, heat_samples: int) -> list[Record]:
    """The records of one network, from its files where they are of the same weights and settings."""
    source, made_by = NETWORKS[name][1], ""
    if source.endswith(".yaml"):
        made_by = runs.fit(f"robust-pl fit -c {source}")
        source = str(runs.folder / "runs" / Path(source).stem / "checkpoints" / "last.ckpt")
    folder = runs.folder / "records" / name
    folder.mkdir(parents=True, exist_ok=True)
    data = CIFAR10DataModule(eval_batch_size=50)
    data.setup("test")
    net, records = None, []
    for analysis in analyses(samples, heat_samples):
        file, asked = folder / f"{analysis.name}.json", digest([made_by, analysis.settings()])
        if not file.exists() or (found := Record.read(file)).about.get("asked") != asked:
            net = load_model(source).eval() if net is None else net
            found = analysis(net, _first(data, analysis.samples))
            found.about["asked"] = asked
            file.write_text(found.as_json())
            print(f"{name} {analysis.name}: {found.about['seconds']:.0f} s", flush=True)
        records.append(found)
    return records


def _first(data: CIFAR10DataModule, samples: int) -> Any:
    """The batches that hold the first samples of the test set."""
    for batch in data.test_dataloader():
        if int(batch[2].min()) >= samples:
            return
        yield batch


def table(records: dict[str, list[Record]]) -> str:
    """Accuracy under low-pass filters, and figures of the spectra, as Markdown."""
    body, others = [], []
    for name, (filters, spectrum, heat) in records.items():
        f = filters.figures
        for title, end in (("clean", ""), ("PGD-20", "_adv")):
            body.append([NETWORKS[name][0], title, *(f"{100 * f[f'low_{r}{end}']:.1f}" for r in SIZES)])
        s, h = spectrum.figures, heat.figures
        row = [f["low_16"] / max(f["low_32"], 1e-12), f["high_8"], s["low"], h["clean"], h["low"], h["high"]]
        smooth = f"{s['kernel_roughness']:.2f}"
        others.append([NETWORKS[name][0], *(f"{100 * v:.1f}" for v in row), f"{s['centroid']:.1f}", smooth])
    head = ["network", "kept at r = 16", "high pass, r = 8", "energy of PGD-20 in 16 x 16", "error, no wave", "low waves"]
    head += ["high waves", "PGD-20's mean frequency", "roughness of first kernels"]
    return markdown(["network", "input", *(f"r = {r}" for r in SIZES)], body) + "\n" + markdown(head, others)


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is missing, print the table, write JSON, Markdown and plots."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.frequencies", description="Frequencies of robust networks.")
    parser.add_argument("--networks", nargs="+", choices=sorted(NETWORKS), default=list(NETWORKS), metavar="NAME")
    parser.add_argument("--samples", type=int, default=500, help="test images for filters and spectra")
    parser.add_argument("--heat-samples", type=int, default=200, help="test images for the heat maps")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark_frequencies"))
    parser.add_argument("--workers", type=int, default=2, help="networks at once")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    runs = Runs(args.output.resolve(), 0)
    tasks = [partial(measure, name, runs, args.samples, args.heat_samples) for name in args.networks]
    records = dict(zip(args.networks, at_once(tasks, args.workers), strict=True))
    titles = {name: NETWORKS[name][0] for name in records}
    text = table(records)
    print(text)
    (args.output / "frequencies.md").write_text(text)
    numbers = {name: [record.figures for record in of] for name, of in records.items()}
    told = {"samples": args.samples, "heat_samples": args.heat_samples, "machine": machine()}
    (args.output / "frequencies.json").write_text(json.dumps({**told, "figures": numbers}, indent=1) + "\n")
    for key, plot in (("filters", plot_filters), ("spectra", plot_spectra), ("maps", plot_maps)):
        save(plot(titles, records), args.output / f"frequencies_{key}.png")
    print(f"Written: {args.output / 'frequencies.md'}, frequencies.json and three plots beside it")


if __name__ == "__main__":
    main()
