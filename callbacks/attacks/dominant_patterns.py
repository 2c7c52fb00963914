"""Dominant patterns: a perturbation that decides the prediction whatever the image."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ...functional.geometry import Norm
from .checks import Number, check_step_size
from .universal import UNIVERSAL_EPS, UniversalAttack, Update


class DominantPatterns(UniversalAttack):
    """Dominant patterns (Ye et al. 2021, arXiv 2105.15057), reconstructed: no code was published, and the abstract alone is
    known to us. Do not compare with the paper's figures.

    By the abstract, the prediction for x + delta is that for the pattern delta itself, found by "insensitivity in the
    feature space". Here Adam minimises the mean cross-entropy between the logits at x + delta and the class predicted for
    the pattern on a plain ground of the batch's mean colour, and steps back into the ball; labels are not needed.
    Compare ``dominance_ratio`` and ``own_class`` of :mod:`robust_pl.functional.universal`.

    Cost: none in an evaluation. Fitting takes 3 forward passes and 1 backward pass for each image and pass over the data, and
    one forward pass more for each batch.

    Args:
        eps: radius, see :class:`UniversalAttack`.
        epochs: most passes over the data.
        step_size: Adam's learning rate.
        norm: see :class:`Attack`.
        perturbation: see :class:`UniversalAttack`.
        seed: of the start, uniform in +-1e-4.

    Raises:
        ValueError: if an argument is out of its range.
    """

    start_size = 1e-4

    def __init__(
        self,
        eps: Number | Tensor = UNIVERSAL_EPS,
        epochs: int = 2,
        step_size: Number = 0.02,
        *,
        norm: Norm = "linf",
        perturbation: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(eps, epochs, 1.0, norm=norm, perturbation=perturbation, seed=seed)
        self.step_size = check_step_size(step_size)

    def learner(self, model: nn.Module, delta: Tensor) -> Update:
        def loss(x: Tensor, delta: Tensor) -> Tensor:
            ground = x.mean((0, 2, 3), keepdim=True)
            own = self.predictions(model, (ground + delta).clamp(0.0, 1.0))
            logits = self.logits(model, (x + delta).clamp(0.0, 1.0))
            return F.cross_entropy(logits.float(), own.expand(len(x)))

        return self.adam(delta, self.step_size, 0.0, loss)
