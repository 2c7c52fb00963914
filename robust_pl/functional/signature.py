"""Robust weight signatures: robustness as a patch of a network's weights, put on and taken off."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

_MARK = "robust_pl_signature"
_SCALE = "::scale"
_STATISTICS = ("running_mean", "running_var")


@dataclass(frozen=True)
class WeightSignature:
    """What robust fine-tuning adds to weights beyond clean fine-tuning (Cai et al. 2023, arXiv 2302.12480).

    With ``a = std - base`` and ``v = tuned - base`` it is ``v - <v, a> / <a, a> a``, tensor by tensor. The paper patches
    robustness to corruptions so; signatures of adversarial training are an extension of this library. A negative ``scaled``
    takes away what the signature adds.

    Args:
        values: name -> tensor, or codes int8 of it; two codes to a byte, flat, where ``bits`` is 4.
        scales: name -> what a code is multiplied by; empty where ``values`` are no codes.
        shapes: name -> shape of the tensor.
        bits: of each element: 32, 8 or 4.
    """

    values: Mapping[str, Tensor]
    shapes: Mapping[str, tuple[int, ...]]
    scales: Mapping[str, Tensor] = field(default_factory=dict)
    bits: Literal[32, 8, 4] = 32

    @classmethod
    def extract(
        cls,
        base: Mapping[str, Tensor],
        std: Mapping[str, Tensor],
        tuned: Mapping[str, Tensor],
        names: Collection[str] | None = None,
    ) -> WeightSignature:
        """The signature of ``tuned``, in float64 on the way, by inner products; where clean fine-tuning moved nothing, it is v.

        Args:
            base: named tensors of the common starting point.
            std: the same, fine-tuned on clean data.
            tuned: the same, fine-tuned for robustness.
            names: which tensors; None takes all in floating point but BatchNorm's running statistics.

        Raises:
            ValueError: if the three are not weights of one network.
        """
        if names is None:
            names = [n for n, t in base.items() if t.is_floating_point() and not n.endswith(_STATISTICS)]
        values = {}
        for name in names:
            for label, tensors in (("base", base), ("std", std), ("tuned", tuned)):
                if name not in tensors or tensors[name].shape != base[name].shape:
                    found = tuple(tensors[name].shape) if name in tensors else "none"
                    raise ValueError(
                        f"{label} has shape {found} for {name} and base {tuple(base[name].shape)}: the three must be weights "
                        "of one network, and start from the same pre-trained ones"
                    )
            start, dtype = base[name].double(), tuned[name].dtype
            a, v = std[name].double() - start, tuned[name].double() - start
            length = a.square().sum()
            along = torch.where(length > 0, (v * a).sum() / torch.where(length > 0, length, 1.0), 0.0)
            values[name] = (v - along * a).to(dtype)
        return cls(values, {name: tuple(value.shape) for name, value in values.items()})

    def delta(self, name: str) -> Tensor:
        """What is added to a tensor."""
        value = self.values[name]
        if self.bits == 32:
            return value
        if self.bits == 4:
            value = torch.stack([value << 4 >> 4, value >> 4], 1).flatten()[: prod(self.shapes[name])]
        return (value * self.scales[name]).view(self.shapes[name])

    def scaled(self, alpha: float) -> WeightSignature:
        """The same with every tensor times ``alpha``."""
        if self.bits == 32:
            return replace(self, values={name: alpha * value for name, value in self.values.items()})
        return replace(self, scales={name: alpha * scale for name, scale in self.scales.items()})

    def quantised(self, bits: Literal[8, 4] = 8) -> WeightSignature:
        """Codes on an even grid about 0, with one scale a tensor: off by at most half a step, ``max / (2^bits - 2)``.

        The authors' code also has logarithmic and tanh grids; those are not here.

        Raises:
            ValueError: if bits is neither 8 nor 4.
        """
        if bits not in (8, 4):
            raise ValueError(f"bits={bits} is not supported: choose 8 or 4")
        top, values, scales = 2 ** (bits - 1) - 1, {}, {}
        for name in self.values:
            value = self.delta(name)
            scale = value.abs().amax() / top
            codes = (value / torch.where(scale > 0, scale, 1.0)).round().clamp(-top, top).to(torch.int8)
            if bits == 4:
                pairs = nn.functional.pad(codes.flatten(), (0, codes.numel() % 2)).view(-1, 2)
                codes = (pairs[:, 0] & 0xF) | (pairs[:, 1] << 4)
            values[name], scales[name] = codes, scale
        return WeightSignature(values, self.shapes, scales, bits)

    @property
    def nbytes(self) -> int:
        """Size of the tensors, as :meth:`save` writes them."""
        return sum(t.numel() * t.element_size() for t in (*self.values.values(), *self.scales.values()))

    def save(self, path: str | Path) -> None:
        """Write a safetensors file."""
        tensors = {name: value.contiguous() for name, value in self.values.items()}
        tensors |= {name + _SCALE: scale for name, scale in self.scales.items()}
        save_file(tensors, path, {_MARK: json.dumps({"bits": self.bits, "shapes": self.shapes})})

    @classmethod
    def load(cls, path: str | Path) -> WeightSignature:
        """Read what :meth:`save` wrote.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it is damaged, or no signature.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"no signature at {path}: check the path")
        try:
            with safe_open(path, "pt") as file:
                about = json.loads((file.metadata() or {}).get(_MARK, "null"))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{path} cannot be read as safetensors: it is damaged or another format") from error
        if about is None:
            raise ValueError(f"{path} holds no signature: write one with WeightSignature.save")
        shapes = {name: tuple(shape) for name, shape in about["shapes"].items()}
        scales = {name.removesuffix(_SCALE): tensor for name, tensor in tensors.items() if name.endswith(_SCALE)}
        return cls({name: tensors[name] for name in shapes}, shapes, scales, about["bits"])


class Patch:
    """Signatures on a network: added, scaled and removed in any order.

    The weights are always clean + sum of what is on, computed anew from a copy of the clean ones, which is kept for every
    tensor that a signature touches. With none left they are the clean ones, bit for bit; adding and subtracting
    would leave rounding errors. Training the network meanwhile is lost at the next change.

    Args:
        net: the network, changed in place.
    """

    def __init__(self, net: nn.Module) -> None:
        self._tensors = {name: p.detach() for name, p in (*net.named_parameters(), *net.named_buffers())}
        self._clean: dict[str, Tensor] = {}
        self._on: dict[str, tuple[WeightSignature, float]] = {}

    def add(self, name: str, signature: WeightSignature, alpha: float = 1.0) -> None:
        """Add ``alpha`` times a signature; under a name that is taken, it replaces that one.

        Raises:
            ValueError: if the signature is of another network.
        """
        for tensor, shape in signature.shapes.items():
            if tensor not in self._tensors or tuple(self._tensors[tensor].shape) != shape:
                raise ValueError(
                    f"the signature {name!r} has {tensor} {shape}, which the network lacks: it is of another network"
                )
        self._on[name] = (signature, alpha)
        for tensor in signature.shapes:
            self._clean.setdefault(tensor, self._tensors[tensor].clone())
        self._write()

    def remove(self, name: str) -> None:
        """Take one off.

        Raises:
            KeyError: if it is not on.
        """
        del self._on[name]
        self._write()

    @torch.no_grad()
    def _write(self) -> None:
        for name, clean in self._clean.items():
            total = clean
            for signature, alpha in self._on.values():
                if name in signature.shapes:
                    total = total + alpha * signature.delta(name).to(clean)
            self._tensors[name].copy_(total)


def first_layers(net: nn.Module, keep_layers: int | None) -> list[str]:
    """Names of the parameters of the first ``keep_layers`` convolutions and linear layers, and of the normalisation between.

    Robustness to corruptions sits in the early layers, the paper finds, so that a signature needs no others.

    Args:
        net: whose modules are in the order in which it defines them.
        keep_layers: None takes all parameters.

    Raises:
        ValueError: if keep_layers is not at least 1.
    """
    if keep_layers is not None and keep_layers < 1:
        raise ValueError(f"keep_layers={keep_layers} must be at least 1, or null for all layers")
    found: list[str] = []
    seen = 0
    for prefix, module in net.named_modules():
        own = dict(module.named_parameters(recurse=False))
        seen += any(p.dim() >= 2 for p in own.values())
        if keep_layers is not None and seen > keep_layers:
            break
        found += [f"{prefix}.{name}" if prefix else name for name in own]
    return found
