"""LP-FT: linear probing, then fine-tuning."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.optim import SGD

from ...callbacks.attacks.base import Attack
from ...callbacks.attacks.prepare import evaluating
from ..base import Method, OptimizerFactory
from ..example import Example
from ..interpolation import show
from ..samples import Batch, require_validation, training_samples, validation_samples
from ..schedules import Cosine, Schedule

STRENGTHS = tuple(float(c) for c in np.logspace(-7, 2, 100))
"""The authors' 100 values of C."""
_CHUNK = 256


class LPFT(Method):
    """LP-FT (Kumar et al. 2022, arXiv 2202.10054): a head is fitted to frozen features first, then all weights are fine-tuned.

    Gradients through a head that knows nothing distort pretrained features, which costs accuracy under shift.

    1. Before training, logistic regression with an l2 penalty on the features of training images, in eval mode and without
       augmentation, for each of ``strengths`` in turn, each from where the last one ended. The one with the highest validation
       accuracy, the first of equals, becomes the head. scikit-learn fits it, on the CPU.
    2. Cross-entropy on all weights; attacked images where there is an attack, which is a use of ours. Normalisation layers stay
       in eval mode, as in the runs that the authors report.

    Cost: one forward pass of the training samples that are asked for and of the validation samples, and the regressions, which
    hold all these features in memory; then that of standard training, one forward and one backward pass a step, and the
    attack's.

    Args:
        net: has ``forward_features`` and a linear ``head``, as the networks here do.
        attack: of the fine-tuning; None takes clean images.
        strengths: C, the inverse of the penalty, rising; None takes the authors', 1e-7 ... 100 in 100 steps.
        standardise: features are shifted and scaled by two numbers, the mean and the deviation of all of them, for the
            regression; the head then has that folded in.
        samples: training samples for the regression, spread evenly; None takes all.
        freeze_bn: normalisation layers stay in eval mode.
        optimizer: the authors' by default, with one of the rates that they try.
        schedule: None takes a cosine over epochs.
        weights: of the pretrained network, whose head does not count; None where ``net`` brings its own.
        num_classes: see :class:`Method`.

    Raises:
        ValueError: if ``strengths`` are not positive; if there is no linear head with a bias; if the attack would move frozen
            statistics; before training, if there are no validation samples, or a class is missing among the training samples.
    """

    def __init__(
        self,
        net: nn.Module,
        attack: Attack | None = None,
        strengths: Sequence[float] | None = None,
        standardise: bool = False,
        samples: int | None = None,
        freeze_bn: bool = True,
        optimizer: OptimizerFactory = lambda params: SGD(params, lr=0.003, momentum=0.9),
        schedule: Schedule | None = None,
        weights: str | None = None,
        num_classes: int = 10,
    ) -> None:
        super().__init__(net, attack, optimizer, schedule or Cosine(interval="epoch"), weights, num_classes)
        self.strengths = list(STRENGTHS if strengths is None else strengths)
        if not self.strengths or min(self.strengths) <= 0 or self.strengths != sorted(self.strengths):
            raise ValueError(f"strengths={self.strengths} must rise from above 0, at least one of them")
        if samples is not None and samples < 1:
            raise ValueError(f"samples={samples} must be at least 1, or null for all")
        if not isinstance(getattr(net, "head", None), nn.Linear) or not hasattr(net, "forward_features"):
            raise ValueError(f"{type(net).__name__} has no forward_features or no linear head to fit: choose another net")
        if net.head.bias is None:
            raise ValueError(f"the head of {type(net).__name__} has no bias, and a regression has one: choose another net")
        if freeze_bn and self.attack is not None and self.attack.bn_mode == "train":
            raise ValueError(
                "attack.bn_mode='train' moves statistics that freeze_bn keeps: set it to eval, or freeze_bn to false"
            )
        self.standardise, self.samples, self.freeze_bn = standardise, samples, freeze_bn
        self.strength: float | None = None
        """C of the head that was taken; None before."""

    def loss(self, example: Example) -> Tensor:
        return F.cross_entropy(self(example.x if example.x_adv is None else example.x_adv), example.y)

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage != "fit":
            return
        require_validation(self.trainer, "LPFT")
        if self.trainer.ckpt_path is None:
            # Before processes share the weights of the first one.
            self.to(self.trainer.strategy.root_device)
            self.fit_head()

    def on_train_start(self) -> None:
        # Not as an epoch starts: a run that is resumed within one does not come by there. Lightning keeps modes.
        super().on_train_start()
        for module in self.net.modules() if self.freeze_bn else ():
            if isinstance(module, _NormBase):
                module.eval()

    def fit_head(self) -> None:
        """Replace the head by the best of all regressions."""
        count = sys.maxsize if self.samples is None else self.samples
        z, y = self._features(training_samples(self.trainer, count, _CHUNK, self.device))
        z_val, y_val = self._features(validation_samples(self.trainer, self.device))
        missing = sorted(set(range(self.num_classes)) - set(y.tolist()))
        if missing:
            raise ValueError(f"samples={len(y)} hold no image of class {missing[0]}: raise samples, or leave it out for all")
        shift, scale = (z.mean(), z.std()) if self.standardise else (z.new_zeros(()), z.new_ones(()))
        found = []
        for weight, bias in regressions(((z - shift) / scale).numpy(), y.numpy(), self.strengths):
            weight = weight / scale
            bias = bias - weight.sum(1) * shift
            right = ((z_val @ weight.T + bias).argmax(1) == y_val).sum()
            counts = torch.stack([right, torch.full_like(right, len(y_val))]).to(self.device)
            hits, of = self.trainer.strategy.reduce(counts, reduce_op="sum").tolist()
            found.append((hits / of, weight, bias))
        best = max(range(len(found)), key=lambda i: (found[i][0], -i))
        self.strength = self.strengths[best]
        with torch.no_grad():
            head: nn.Linear = self.net.head  # type: ignore[assignment]
            head.weight.copy_(found[best][1])
            head.bias.copy_(found[best][2])
        scored = enumerate(zip(self.strengths, found, strict=True))
        rows = [(f"{c:.1e}", f"{one[0]:.2%}", "taken" if i == best else "") for i, (c, one) in scored]
        show(self.trainer, f"Linear probing on {len(y)} training samples:", ("C", "validation", ""), rows)

    @torch.no_grad()
    def _features(self, batches: Iterable[Batch]) -> tuple[Tensor, Tensor]:
        """Float64 (N, D) and labels (N,), on the CPU."""
        with evaluating(self):
            parts = [(self.net.forward_features(x).cpu().double(), y.cpu()) for x, y, _ in batches]
        z, y = (torch.cat(column) for column in zip(*parts, strict=True))
        return z, y


def regressions(z: np.ndarray, y: np.ndarray, strengths: Sequence[float]) -> list[tuple[Tensor, Tensor]]:
    """Weights (K, D) and biases (K,), float64, of a logistic regression for each C, each begun where the last one ended."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    model, found = LogisticRegression(warm_start=True, max_iter=200), []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the authors stop there, too
        for strength in strengths:
            model.set_params(C=strength).fit(z, y)
            weight, bias = torch.from_numpy(model.coef_.copy()), torch.from_numpy(model.intercept_.copy())
            if len(weight) == 1:  # of two classes, the difference of their logits
                weight, bias = torch.cat([-weight, weight]) / 2, torch.cat([-bias, bias]) / 2
            found.append((weight, bias))
    return found
