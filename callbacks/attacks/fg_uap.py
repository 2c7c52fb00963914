"""FG-UAP: a universal perturbation that turns the features of all images away from where they were."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...functional.geometry import Norm
from .checks import Number, check_step_size
from .penultimate import Penultimate
from .universal import UNIVERSAL_EPS, UniversalAttack, Update, home


class FGUAP(UniversalAttack):
    """Feature-gathering universal adversarial perturbation (Ye et al. 2022, arXiv 2209.13113).

    Adam minimises the mean cosine between what the last layer reads for x + delta and for x; no labels are needed. With a
    ``target``, ``target_weight`` times the cross-entropy to that class is added. After each step the perturbation goes back
    into the ball. As in the authors' code (yzx1213/FG-UAP): learning rate 0.02, weight decay 1e-5, 2 passes. Unlike it, x +
    delta is clipped to the box, in fitting too; the start is uniform in +-1e-4, since at zero the cosine has no gradient and
    the code starts by rounding errors alone; the best pass is judged on the data it is fitted to, not on further ones.

    Cost: none in an evaluation. Fitting takes 4 forward passes and 1 backward pass for each image and pass over the data.

    Args:
        eps: radius, see :class:`UniversalAttack`.
        epochs: most passes over the data.
        step_size: Adam's learning rate.
        weight_decay: Adam's.
        target: the class to reach, or None for any other.
        target_weight: of the cross-entropy to the target.
        layer: name of the last layer, see :class:`penultimate.Penultimate`; None finds it.
        norm: see :class:`Attack`.
        perturbation: see :class:`UniversalAttack`.
        seed: of the start.

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
        weight_decay: float = 1e-5,
        target: int | None = None,
        target_weight: float = 0.1,
        layer: str | None = None,
        norm: Norm = "linf",
        perturbation: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(eps, epochs, 1.0, norm=norm, perturbation=perturbation, seed=seed)
        if target is not None and target < 0:
            raise ValueError(f"target={target} must be a class, 0 or above; leave it out for any other class")
        self.step_size, self.weight_decay = check_step_size(step_size), weight_decay
        self.target, self.target_weight, self.layer = target, target_weight, layer

    def learner(self, model: nn.Module, delta: Tensor) -> Update:
        read = Penultimate(model, self.layer)
        dtype = home(model).dtype

        def loss(x: Tensor, delta: Tensor) -> Tensor:
            with torch.no_grad():
                clean, _ = read(x.to(dtype))
            features, logits = read((x + delta).clamp(0.0, 1.0).to(dtype))
            self.fit_forwards += 2 * len(x)
            cosine = torch.cosine_similarity(features.float(), clean.float(), dim=1).mean()
            if self.target is None:
                return cosine
            if self.target >= logits.shape[1]:
                raise ValueError(f"target={self.target} is no class of a network with {logits.shape[1]} logits")
            aim = torch.full((len(x),), self.target, device=x.device)
            return cosine + self.target_weight * F.cross_entropy(logits.float(), aim)

        return self.adam(delta, self.step_size, self.weight_decay, loss)
