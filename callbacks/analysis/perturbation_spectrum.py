"""Where in the spectrum an attack puts its energy, and where features have theirs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ...functional.spectra import amplitude, kernel_roughness, radial_shares, radii, window_share
from ...report.record import HeatMap, Lines, Record, Sheet
from ..attacks.base import Attack
from ..attacks.checks import check_count
from .base import Analysis
from .layers import find_layers, outputs_of
from .under_attack import attack_name, check_attack, under_attack


class PerturbationSpectrum(Analysis):
    """Spectrum of what an attack adds to images, and of feature maps (Huang et al. 2022, arXiv 2212.12732).

    The map is the mean of |F(x_adv - x)| over images and channels, (0, 0) in the centre. By energy |F|^2: the share at each
    distance from the centre and inside of the central r x r frequencies (``low``), and the mean distance (``centroid``, in
    cycles an image); of images the same without their mean, to compare. Attacks on robust networks keep to low frequencies.

    Of each layer that is named: the energy of its maps without their means (``features_<layer>_low``), and of what the attack
    changes in them (``change_<layer>_low``), inside of the central half of the frequencies along each axis.
    ``kernel_roughness`` is that of the first convolution with more than one tap, see :func:`kernel_roughness`; missing where
    there is none. Costs what the attack costs, and two forward passes a sample.

    Args:
        attack: whose perturbations are looked at.
        window: r in bins; None takes half of the shorter side.
        layers: names of modules with maps (B, C, H, W) as their output, such as ``[layer1, layer2]``; () for none.
        samples: see :class:`Analysis`.
        name: likewise.
        folder: likewise.

    Raises:
        ValueError: if the attack must see training data first, there is no such layer, or it has no maps.
    """

    def __init__(
        self,
        attack: Attack,
        window: int | None = None,
        layers: Sequence[str] = (),
        samples: int | None = 1000,
        name: str | None = None,
        folder: str | None = None,
    ) -> None:
        if window is not None:
            check_count("window", window)
        self.attack, self.window, self.layers = check_attack(attack, "PerturbationSpectrum"), window, list(layers)
        super().__init__(samples, name, folder)

    def begin(self, model: nn.Module, data: object) -> None:
        find_layers(model, self.layers)
        first = next((m for m in model.modules() if isinstance(m, nn.Conv2d) and max(m.kernel_size) > 1), None)
        self._roughness = None if first is None else kernel_roughness(first.weight).item()

    def look(self, model: nn.Module, x: Tensor, y: Tensor, index: Tensor) -> None:
        side = min(x.shape[-2:])
        if self.window is not None and self.window > side:
            raise ValueError(
                f"window={self.window} is more than images of {x.shape[-2]} x {x.shape[-1]} have: choose at most {side}"
            )
        with outputs_of(find_layers(model, self.layers)) as seen:
            logits = self.ask(model, x)
            features = self._maps(seen, len(x))
        x_adv = under_attack(self, self.attack, model, x, y, index, logits.shape[1])
        with outputs_of(find_layers(model, self.layers)) as seen:
            logits_adv = self.ask(model, x_adv.to(x.dtype))
            changed = self._maps(seen, len(x))
        wide = x.to(x_adv.dtype)
        difference = amplitude(x_adv - wide)
        self.add(
            amplitude=difference.mean(1).sum(0),
            power=difference.square().mean(1).sum(0),
            images=_power(wide),
            clean=(logits.argmax(1) == y).sum(),
            adv=(logits_adv.argmax(1) == y).sum(),
        )
        for layer, maps in features.items():
            delta = changed[layer] - maps
            self.add(**{f"features {layer}": _power(maps), f"change {layer}": amplitude(delta).square().mean(1).sum(0)})

    def _maps(self, seen: dict[str, Tensor], samples: int) -> dict[str, Tensor]:
        for layer in self.layers:
            output = seen.get(layer)
            if not isinstance(output, Tensor) or output.dim() != 4 or len(output) != samples or min(output.shape[-2:]) < 2:
                what = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
                raise ValueError(
                    f"layers names {layer!r}, whose output is {what}: name modules that give maps (B, C, H, W), 2 x 2 at least"
                )
        return {layer: seen[layer].float() for layer in self.layers}

    def conclude(self, kept: dict[str, Tensor], sums: dict[str, Tensor]) -> Record:
        samples, attack = len(kept["index"]), attack_name(self.attack)
        height, width = sums["power"].shape
        window = self.window or max(1, min(height, width) // 2)
        shares = {"perturbation": radial_shares(sums["power"]), "images without their mean": radial_shares(sums["images"])}
        figures = {
            "low": window_share(sums["power"], window).item(),
            "centroid": _centroid(sums["power"]),
            "images_low": window_share(sums["images"], window).item(),
            "images_centroid": _centroid(sums["images"]),
            "clean": (sums["clean"] / samples).item(),
            "adv": (sums["adv"] / samples).item(),
        }
        rings = list(range(len(shares["perturbation"])))
        curves = [
            Lines(
                "Share of the energy by distance from the centre",
                "cycles an image",
                "share",
                rings,
                {name: values.tolist() for name, values in shares.items()},
            )
        ]
        rows = [["perturbation", f"{height} x {width}", figures["low"]]]
        for layer in self.layers:
            both = {"features without their means": sums[f"features {layer}"], "their change": sums[f"change {layer}"]}
            of_layer = {name: radial_shares(power) for name, power in both.items()}
            size = both["their change"].shape
            title = f"Share of the energy of {layer} by distance from the centre"
            places = list(range(len(of_layer["their change"])))
            lines = {name: values.tolist() for name, values in of_layer.items()}
            curves.append(Lines(title, "cycles a map", "share", places, lines))
            for key, power in zip(("features", "change"), both.values(), strict=True):
                figures[f"{key}_{layer}_low"] = share = window_share(power, max(1, min(size) // 2)).item()
                rows.append([f"{layer}, {key}", f"{size[0]} x {size[1]}", share])
        if self._roughness is not None:
            figures["kernel_roughness"] = self._roughness
        axes = [list(range(-(n // 2), n - n // 2)) for n in (height, width)]
        mean = (sums["amplitude"] / samples).tolist()
        labels = ("cycles over the width", "cycles over the height")
        return Record(
            "PerturbationSpectrum",
            self.name,
            f"Spectrum of {attack}",
            figures,
            [Sheet("share of the energy in the central half of the frequencies", ["of", "size", "share"], rows, share=True)],
            curves,
            [HeatMap(f"Mean |F| of what {attack} adds", *labels, axes[1], axes[0], mean, value_label="mean |F|")],
            about={"attack_backwards_per_sample": sums["attack_backwards"].item() / samples, "window": window},
            notes=[f"Of pixels the window is the central {window} x {window} frequencies, of features half of each axis."],
        )


def _power(maps: Tensor) -> Tensor:
    """Sum over samples of the mean |F|^2 over channels, without each channel's mean, (H, W)."""
    return amplitude(maps - maps.mean((-2, -1), keepdim=True)).square().mean(1).sum(0)


def _centroid(power: Tensor) -> float:
    return ((power * radii(*power.shape)).sum() / power.sum().clamp_min(torch.finfo(power.dtype).tiny)).item()
