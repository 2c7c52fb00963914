"""Local complexity: the density of linear regions around data, while a network is trained."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.func import functional_call

from ...data.base import ImageDataModule
from ...data.hashing import hash_keys, uniform
from ...functional.gradients import compiled_parts
from ...functional.linear_regions import cross_polytope, crossed_units, polytope_vertices
from ...report.plots import save
from ...report.record import Lines, Record
from ...report.record_plot import plot_record
from ..analysis.layers import find_layers
from ..attacks.checks import check_count
from ..attacks.prepare import evaluating
from ..store.files import write
from .compute import not_training
from .preactivations import preactivations
from .probe import ProbeSet, log_figures

_UNIFORM = 0x1C


class LocalComplexity(Callback):
    """How many units change sign around samples, over training (Humayun et al. 2024, arXiv 2402.15555).

    Around each sample lie the vertices of a cross-polytope, x + r v and x - r v for orthonormal directions v, the same ones for
    all samples and steps. A unit is crossed if it does not have one sign at all of them; the number of crossed units is exact
    for the first layer and a count of vertices for later ones, and of networks without ReLU a proxy. The paper finds that this
    density falls, rises and falls again, and that robustness comes late, in the last phase; BatchNorm weakens the effect.

    It is taken around training samples without augmentation, around test samples (not labels: nothing is chosen by them), and
    around uniform noise, before the first step and at steps that are evenly spaced in their logarithm. Logged as
    ``monitor/lc_train``, ``lc_test``, ``lc_random``, the share of all units that is crossed, the mean over samples;
    :attr:`history` and ``analysis/fit/<name>.json`` of the run folder hold it by layer. Where the data module is not one of
    ours, the training samples are the first that training sees, and there are no test samples.

    Networks are asked in eval mode, in float32, without autocast; training goes on bit for bit as without this. Costs vertices
    forward passes a sample, set and look: 3 x 128 x 40 = 15,360 by default, at 10 looks for each factor of ten in steps;
    :class:`ComputeMonitor` tells them apart.

    Args:
        samples: of each set, spread over it.
        vertices: of a polytope, an even number.
        radius: r in pixel units, where normalisation is a part of the network. 0.001 is about the authors' 0.005 in units of
            CIFAR-10's standard deviation.
        layers: names of modules whose outputs are pre-activations; None takes what enters each activation of the ReLU family.
        per_decade: looks for each factor of ten in steps.
        batch_size: images in one forward pass.
        seed: of directions and noise.
        name: of the files.

    Raises:
        ValueError: if an argument is out of range, there is no such layer, or the network is compiled.
    """

    def __init__(
        self,
        samples: int = 128,
        vertices: int = 40,
        radius: float = 0.001,
        layers: Sequence[str] | None = None,
        per_decade: int = 10,
        batch_size: int = 256,
        seed: int = 0,
        name: str = "localcomplexity",
    ) -> None:
        for field, value in (("samples", samples), ("per_decade", per_decade), ("batch_size", batch_size)):
            check_count(field, value)
        if vertices < 2 or vertices % 2:
            raise ValueError(f"vertices={vertices} must be an even number of at least 2, since they come in pairs")
        if not 0 < radius < float("inf"):
            raise ValueError(f"radius={radius} must be a finite number above 0, such as 0.001")
        if layers is not None and not layers:
            raise ValueError("layers=[] names no layer: leave it out for all activations")
        self.samples, self.vertices, self.radius = samples, vertices, radius
        self.layers = None if layers is None else list(layers)
        self.per_decade, self.batch_size, self.seed, self.name = per_decade, batch_size, seed, name
        self.history: list[dict[str, Any]] = []
        """Of each look its step and, for each set, the mean number of crossed units by layer."""
        self.units: dict[str, int] = {}
        """Units of each layer."""
        self._train, self._frame = ProbeSet(samples), None
        self._test: Tensor | None = None
        self._looked = -1

    def is_due(self, step: int) -> bool:
        """Whether a place on the logarithmic scale lies between the last look and this step, or at it."""
        places = (round(10 ** (i / self.per_decade)) for i in range(self.per_decade * len(str(step)) + 1))
        return any(self._looked < place <= step for place in places)

    def look(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure; all processes together."""
        self._looked = trainer.global_step
        train = [x for x, _, _ in self._train.chunks(pl_module.device, torch.float32)]
        if not train:
            return
        sets = {"train": torch.cat(train)}
        if self._test is not None:
            sets["test"] = self._test.to(pl_module.device)
        sets["random"] = self._noise(sets["train"], trainer.global_rank)
        with not_training(trainer), evaluating(pl_module), torch.no_grad():
            counts = {key: self.count(pl_module, x) for key, x in sets.items()}
        self.history.append(entry := {"step": trainer.global_step, "counts": {}})
        for key, of_layers in counts.items():
            sums = torch.tensor([len(sets[key]), *(int(c.sum()) for c in of_layers.values())], dtype=torch.float64)
            sums = sums if trainer.world_size == 1 else sums.to(pl_module.device)
            total, *crossed = trainer.strategy.reduce(sums, reduce_op="sum").tolist()
            entry["counts"][key] = {name: one / total for name, one in zip(of_layers, crossed, strict=True)}
        log_figures(trainer, "monitor", {f"lc_{key}": self.share(of) for key, of in entry["counts"].items()})

    def share(self, counts: dict[str, float]) -> float:
        """Crossed units over all units, from the mean counts by layer."""
        return sum(counts.values()) / max(1, sum(self.units.values()))

    def count(self, model: nn.Module, x: Tensor) -> dict[str, Tensor]:
        """Crossed units by layer around pixels (M, C, H, W): int64 (M,) each. The network must be in eval mode.

        Raises:
            ValueError: if the network has no layer that can be counted, or is compiled.
        """
        self._refuse(model)
        if self._frame is None or self._frame.shape[1] != x[0].numel():
            self._frame = cross_polytope(x[0].numel(), self.vertices // 2, self.seed)
        frame = self._frame.to(x.device)
        layers = None if self.layers is None else find_layers(model, self.layers)
        found: dict[str, list[Tensor]] = {}
        some_found: dict[str, Tensor] = {}
        units: dict[str, int] = {}

        def see(name: str, values: Tensor) -> None:
            # At once, so that no activation is kept. What is called twice has twice as many units.
            some_found[name] = some_found.get(name, 0) + crossed_units(values, self.vertices)
            units[name] = units.get(name, 0) + values[0].numel()

        state = model.state_dict(keep_vars=True)
        # Signs near 0 flip in half precision.
        half = any(value.dtype in (torch.float16, torch.bfloat16) for value in state.values())
        wide = {name: value.float() if value.is_floating_point() else value for name, value in state.items()}
        for some in x.split(max(1, self.batch_size // self.vertices)):
            points = polytope_vertices(some, frame, self.radius).flatten(0, 1)
            some_found.clear(), units.clear()
            with preactivations(layers, see), torch.autocast(x.device.type, enabled=False):
                functional_call(model, wide, (points,)) if half else model(points)
            for name, crossed in some_found.items():
                found.setdefault(name, []).append(crossed)
        self.units = dict(units)
        if not found:
            raise ValueError(
                "the network has no activation of the ReLU family for LocalComplexity to look at: name layers whose outputs "
                "are pre-activations"
            )
        return {name: torch.cat(parts) for name, parts in found.items()}

    def record(self) -> Record:
        """The curves so far."""
        # Step 0 has no place on a logarithmic axis.
        shown = [entry for entry in self.history if entry["step"]] or self.history
        sets, steps = list(shown[0]["counts"]) if shown else [], [entry["step"] for entry in shown]
        shares = {key: [self.share(entry["counts"][key]) for entry in shown] for key in sets}
        curves = [Lines("Share of units that are crossed", "step", "share", steps, shares, log_x=True)]
        if "train" in sets and len(self.units) > 1:
            layers = {name: [entry["counts"]["train"][name] / units for entry in shown] for name, units in self.units.items()}
            curves.append(Lines("The same around training samples, by layer", "step", "share", steps, layers, log_x=True))
        figures = {f"{key}_first": self.share(of) for key, of in self.history[0]["counts"].items()} if shown else {}
        figures |= {f"{key}_last": values[-1] for key, values in shares.items()}
        about = {"samples": self.samples, "vertices": self.vertices, "radius": self.radius, "units": sum(self.units.values())}
        notes = [
            "Before the first step biases are 0, so that units which see nothing but black stand on their hyperplane and count "
            "as crossed; the curves begin at step 1."
        ]
        return Record("LocalComplexity", self.name, "Local complexity", figures, lines=curves, about=about, notes=notes)

    def _refuse(self, model: nn.Module) -> None:
        if compiled_parts(model):
            raise ValueError(
                f"{compiled_parts(model)[0]} is compiled, and LocalComplexity cannot look inside: switch torch.compile off"
            )

    def _noise(self, like: Tensor, rank: int) -> Tensor:
        """Uniform pixels, the same at every look."""
        keys = hash_keys(self.seed, _UNIFORM, rank, torch.arange(len(like)).unsqueeze(1))
        return uniform(keys, torch.arange(like[0].numel())).float().view(like.shape).to(like.device)

    # Lightning's hooks -----------------------------------------------------------------------------------------------

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._refuse(pl_module)
        if self.layers is not None:
            find_layers(pl_module, self.layers)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.samples < trainer.world_size:
            raise ValueError(f"samples={self.samples} must be at least the number of processes, {trainer.world_size}")
        self._train.read(trainer)
        data = trainer.datamodule
        if isinstance(data, ImageDataModule):
            n = min(self.samples, len(data.test_set))
            index = torch.arange(n) * len(data.test_set) // n
            self._test = data.test_set.read(index[trainer.global_rank :: trainer.world_size], None)[0].float()
            if self._looked < 0:
                self.look(trainer, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._train.collect(batch)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.is_due(trainer.global_step):
            self.look(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.history or not trainer.is_global_zero:
            return
        record, folder = self.record(), Path(trainer.default_root_dir) / "analysis" / "fit"
        picture = save(plot_record(record), folder / f"{self.name}.png")
        write(folder / f"{self.name}.json", record.as_json().encode())
        for logger in trainer.loggers:
            if hasattr(logger, "log_image"):
                logger.log_image(f"monitor/{self.name}", [picture])

    def state_dict(self) -> dict[str, Any]:
        return {"history": [dict(entry) for entry in self.history], "units": dict(self.units), "looked": self._looked}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.history = [dict(entry) for entry in state_dict["history"]]
        self.units, self._looked = dict(state_dict["units"]), state_dict["looked"]
