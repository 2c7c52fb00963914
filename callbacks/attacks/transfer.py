"""TransferEvaluation: attacks made on one network and judged on another."""

from __future__ import annotations

import torch
from lightning.pytorch import LightningModule, Trainer
from rich.console import Console
from torch import Tensor, nn
from torchmetrics import MeanMetric

from ...functional.losses import hard
from ...functional.perturbation import perturbation_sizes
from ...functional.transfer import succeeded
from ...nets.frozen import Frozen
from ...nets.weights import load_weights
from ...nets.zoo import pretrained
from .base import Attack, ObjectiveName
from .checks import Number
from .ledger import Attacked, Progress
from .problem import Objective
from .wrapper import Wrapper

FIGURES = ("surrogate_success", "l2", "linf", "saturation")


class TransferEvaluation(Wrapper):
    """Crafts adversarial images on a surrogate network; whoever evaluates judges them on the network under test.

    The surrogate is frozen, in eval mode and moved to the data's device. Where samples have an index, as in an evaluation,
    the white-box success on the surrogate is noted, too: per sample as ``robust["surrogate"]``, and with both sizes of the
    perturbation and its saturation (Chen et al. 2021, arXiv 2102.10343) on average in :meth:`figures`, which ``robust-pl
    test`` prints. Cost: the attack's own passes, which are passes of the surrogate, and none of the network under test; to
    judge the surrogate takes two more forward passes, which are not counted, as those of any judgement.

    Args:
        surrogate: a network, frozen in place and not copied, or the name of a public one, see
            :func:`robust_pl.nets.zoo.pretrained`.
        attack: any attack; its eps, norm, target, objective and seed hold.
        weights: state dict of the surrogate, a path as it is or under ``ROBUST_PL_DATA``.

    Raises:
        ValueError: if a name comes with weights, or they do not fit.
    """

    def __init__(self, surrogate: nn.Module | str, attack: Attack, weights: str | None = None) -> None:
        super().__init__(attack)
        if isinstance(surrogate, str) and weights is not None:
            raise ValueError(f"surrogate={surrogate!r} is a network with weights of its own: leave out weights={weights!r}")
        self._source, self._weights = surrogate, weights
        self._surrogate: Frozen | None = None
        self._means = nn.ModuleDict({name: MeanMetric() for name in FIGURES})

    @property
    def surrogate(self) -> Frozen:
        """The surrogate, with its weights, which are read at the first use."""
        if self._surrogate is None:
            net = pretrained(self._source) if isinstance(self._source, str) else self._source
            if self._weights is not None:
                load_weights(net, self._weights)
            self._surrogate = Frozen(net)
        return self._surrogate

    def run(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        *,
        eps: Number | Tensor | None = None,
        objective: ObjectiveName | Objective | None = None,
        index: Tensor | None = None,
        rank: int = 0,
        careful: bool = True,
        progress: Progress | None = None,
    ) -> Attacked:
        """As :meth:`Attack.run`, but on the surrogate: ``model`` is not asked."""
        # The surrogate computes in float32 even where the network under test is in half precision throughout.
        pixels = x.to(torch.promote_types(x.dtype, torch.float32)) if x.is_floating_point() else x
        # Weights moved in inference mode would be inference tensors, through which no gradient can be taken.
        with torch.inference_mode(False):
            surrogate = self.surrogate.to(pixels.device, pixels.dtype)
            self._means.to(x.device)
        attacked = super().run(
            surrogate,
            pixels,
            y,
            eps=eps,
            objective=objective,
            index=index,
            rank=rank,
            careful=careful,
            progress=progress,
        )
        if index is not None:
            self._judge(attacked, pixels, y, self.eps if eps is None else eps)
        return attacked

    def figures(self) -> dict[str, float]:
        """Means over all samples with an index since the last :meth:`reset`; with several processes all must call it.

        ``surrogate_success`` counts samples that were no success before the attack; ``l2``, ``linf`` and ``saturation`` are
        those of :func:`robust_pl.functional.perturbation.perturbation_sizes`.
        """
        return {name: self._means[name].compute().item() for name in FIGURES}

    def reset(self) -> None:
        """Forget what :meth:`figures` is about."""
        for mean in self._means.values():
            mean.reset()

    def _judge(self, attacked: Attacked, x: Tensor, y: Tensor, eps: Number | Tensor) -> None:
        with torch.no_grad():
            before, after = self.surrogate(x).argmax(1), self.surrogate(attacked.x_adv).argmax(1)
        hit, could = succeeded(before, after, hard(y), self.targeted)
        attacked.robust["surrogate"] = (after == hard(y)) != self.targeted
        sizes = perturbation_sizes(attacked.x_adv, x, eps, self.norm)
        self._means["surrogate_success"].update(hit.float(), could.float())
        for name, values in sizes._asdict().items():
            self._means[name].update(values)

    # Lightning's side ------------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        _ = self.surrogate  # so that a missing file is reported at once

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._means.to(pl_module.device)  # in every process, since they add up over processes
        self.reset()

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if "test" not in self.stages:
            return
        found = self.figures()
        if trainer.is_global_zero:
            Console(soft_wrap=True).print(
                f"{self.name}: fools its own surrogate on {found['surrogate_success']:.2%} of what that had right; mean size "
                f"{found['l2']:.3f} (l2), {found['linf'] * 255:.2f}/255 (linf), {found['saturation']:.0%} of the ball"
            )
