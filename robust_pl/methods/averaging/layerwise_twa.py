"""TWA with coefficients for each layer, for held-out samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from lightning.pytorch import Callback
from torch import Tensor, nn
from torch.optim import AdamW

from ...callbacks.attacks.base import Attack
from ...callbacks.weights.subspace import add_up, move_to, open_trajectory, share, trained
from ...functional.subspace import Storage, Subspace, normalised
from ..base import OptimizerFactory
from ..schedules import Schedule
from .assembled import refuse_averages
from .twa import TWA

_KEY = "robust_pl_twa"


class LayerwiseTWA(TWA):
    """TWA-v (Li et al., extended version of arXiv 2205.13104): coefficients for each layer, learned on held-out samples.

    ``theta_l = mean_l + sum_i c_il (w_il - mean_l) / |w_il - mean_l|`` for each tensor l, c from 0, as in the authors' code,
    whose matrix has 1 to 4 bits; ours has 8 at least. Give it samples that no w_i was trained on,
    :class:`robust_pl.data.HeldOut`.

    Cost: as :class:`TWA`.

    Args:
        optimizer: of the coefficients, of any kind; AdamW with learning rate 1e-3.
        schedule: the authors take ``Cosine(warmup=0.2)`` over 10 epochs.
        weights: where to start instead of at the mean.
        net: see :class:`TWA`, and so all others.

    Raises:
        ValueError: if an argument is out of range, or the weights are of another network.
    """

    refuses_perturbation = "its steps move coefficients and not weights"

    def __init__(
        self,
        net: nn.Module,
        trajectory: str | list[str],
        attack: Attack | None = None,
        skip: int = 0,
        storage: Storage = "float32",
        optimizer: OptimizerFactory = lambda params: AdamW(params, lr=1e-3, weight_decay=0.0),
        schedule: Schedule | None = None,
        weights: str | None = None,
        batches: int = 100,
        num_classes: int = 10,
    ) -> None:
        super().__init__(net, trajectory, attack, skip, storage, optimizer, schedule, weights, batches, num_classes)
        self.coefficients = torch.zeros(0, 0)
        """What the optimizer moves, (L, t) for L tensors and t samples; not part of the state dict."""
        self._saved: Tensor | None = None
        self._subspace: Subspace | None = None

    def configure_callbacks(self) -> Sequence[Callback]:
        return []

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage != "fit":
            return
        if str(self.trainer.precision) in ("16-mixed", "16-true"):
            raise ValueError("precision 16 scales gradients before LayerwiseTWA reads them: choose precision bf16-mixed or 32")
        refuse_averages(self.trainer, self)
        settings = self.subspace_training
        self._samples = open_trajectory(settings.trajectory, settings.skip, self)

    def trained_parameters(self) -> list[Any]:
        parameters = trained(self)
        dtype = torch.promote_types(next(iter(parameters.values())).dtype, torch.float32)
        self.coefficients = torch.zeros(len(parameters), len(self._samples), dtype=dtype, device=self.device)
        if self._saved is not None:
            if self._saved.shape != self.coefficients.shape:
                raise ValueError(
                    f"the checkpoint has coefficients {tuple(self._saved.shape)} and the trajectory asks for "
                    f"{tuple(self.coefficients.shape)}: keep the trajectory of the run to continue it"
                )
            self.coefficients.copy_(self._saved)
        return [self.coefficients]

    def on_train_start(self) -> None:
        super().on_train_start()
        layers, settings = self._samples.layers(list(trained(self))), self.subspace_training
        rows = share(self.trainer, len(self._samples))
        self._subspace = Subspace(layers, normalised(layers), rows, settings.storage, self.device)
        if self._saved is None:
            move_to(self, self._samples, settings.start)
        self._saved = None

    @torch.no_grad()
    def on_before_optimizer_step(self, optimizer: Any) -> None:
        parameters = list(trained(self).values())
        products = self._subspace.coordinates([torch.zeros_like(p) if p.grad is None else p.grad for p in parameters])
        add_up(self.trainer, [products])
        self.coefficients.grad = products
        for parameter in parameters:  # which no optimizer knows, so that nobody else would
            parameter.grad = None

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Callable[[], Any] | None = None
    ) -> None:
        before = self.coefficients.clone()
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        with torch.no_grad():
            parameters = list(trained(self).values())
            moved = self._subspace.combine(self.coefficients - before, parameters)
            add_up(self.trainer, moved)
            torch._foreach_add_(parameters, moved)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint[_KEY] = {"coefficients": self.coefficients.cpu().clone()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self._saved = checkpoint.get(_KEY, {}).get("coefficients")

    def teardown(self, stage: str) -> None:
        self._subspace = None
