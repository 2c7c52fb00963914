"""Robust weight signatures as a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import nn

from ...callbacks.attacks.base import Attack
from ...functional.signature import Patch, WeightSignature, first_layers
from ...nets.trajectory import Sample, Trajectory, read_trajectory
from .assembled import Assembled
from .ingredients import write


class RobustWeightSignature(Assembled):
    """Robust weight signatures (Cai et al. 2023, arXiv 2302.12480): robustness added to a network by weight arithmetic.

    ``theta = target + alpha / n * sum_i RWS_i``, where RWS_i is what separates the i-th robustly fine-tuned network from the
    base, orthogonal, tensor by tensor, to what separates the one that was fine-tuned on clean data. The paper does this for
    corruptions; for adversarially trained networks it is an extension of this library. All must have been fine-tuned from the
    same base. Each signature is also written as ``signature-<i>.safetensors`` into the run's folder;
    :class:`robust_pl.functional.signature.Patch` adds them to a network in memory, scales them and takes them off again, which
    gives the clean weights back bit for bit. The authors' code multiplies by alpha twice, this one once; it replaces
    BatchNorm's scale and shift by those of the robust networks, here they are tensors like others.

    Cost: no training; BatchNorm's statistics take ``batches`` forward passes, and the attack's where there is one.

    Args:
        base: reference to the common starting point, ``PATH`` or ``PATH#ema``.
        std: to its clean fine-tuning.
        tuned: to one or several robust fine-tunings.
        target: to the network that is patched; None takes ``std``.
        attack: attacks the images that BatchNorm's statistics are computed again from; None takes clean ones.
        alpha: how much of the signatures; usually in [0, 1.5]. Negative takes away what they add.
        keep_layers: only the first so many convolutions and linear layers; null takes all.
        bits: of each element of the signatures: 32, or 8 or 4 quantised.
        batches: for BatchNorm's statistics, training batches of each process; 0 blends those of the target and of the robust
            networks by alpha, held to [0, 1], instead.
        net: see :class:`Method`, and so all others.

    Raises:
        ValueError: if an argument is out of its range, or something is not of ``net``.
    """

    def __init__(
        self,
        net: nn.Module,
        base: str,
        std: str,
        tuned: str | list[str],
        target: str | None = None,
        attack: Attack | None = None,
        alpha: float = 1.0,
        keep_layers: int | None = None,
        bits: Literal[32, 8, 4] = 32,
        batches: int = 100,
        num_classes: int = 10,
    ) -> None:
        super().__init__(net, attack, batches, num_classes)
        if bits not in (32, 8, 4):
            raise ValueError(f"bits={bits} is not supported: choose 32, 8 or 4")
        self.sources = [base, std, std if target is None else target, *([tuned] if isinstance(tuned, str) else tuned)]
        if len(self.sources) < 4:
            raise ValueError("tuned=[] names no network: name at least one robust fine-tuning of the base")
        self.alpha, self.bits, self.names = alpha, bits, first_layers(net, keep_layers)

    def check(self) -> None:
        self._samples = read_trajectory(self.sources).of(self.net)

    def assemble(self) -> dict[str, Any]:
        base, std, target, *tuned = self._samples
        write(self.net, target.items())
        signatures = [WeightSignature.extract(base, std, robust, self.names) for robust in tuned]
        if self.bits != 32:
            signatures = [signature.quantised(self.bits) for signature in signatures]
        patch = Patch(self.net)
        for number, signature in enumerate(signatures):
            patch.add(str(number), signature, self.alpha / len(signatures))
            if self.trainer.is_global_zero:
                folder = Path(self.trainer.default_root_dir)
                folder.mkdir(parents=True, exist_ok=True)
                signature.save(folder / f"signature-{number}.safetensors")
        if not self.batches:
            self._blend_statistics(target, Trajectory(tuned))
        nbytes = sum(signature.nbytes for signature in signatures)
        rank_zero_info(f"RobustWeightSignature: {len(tuned)} of {nbytes / len(tuned):.0f} bytes each, alpha {self.alpha:g}")
        labels = [sample.label for sample in self._samples]
        return {"base": labels[0], "std": labels[1], "target": labels[2], "tuned": labels[3:], "nbytes": nbytes}

    def _blend_statistics(self, target: Sample, tuned: Trajectory) -> None:
        share = min(max(self.alpha, 0.0), 1.0)
        buffers = {name: b for name, b in self.net.named_buffers() if b.is_floating_point() and name in target}
        write(self.net, ((n, torch.lerp(target[n], tuned.mean(n).to(target[n]), share)) for n in buffers))
