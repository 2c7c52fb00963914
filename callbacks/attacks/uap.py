"""UAP: a universal perturbation as the sum of minimal ones."""

from __future__ import annotations

from torch import Tensor, nn

from ...functional.geometry import Norm
from ...functional.losses import cross_entropy
from .checks import Number, check_count, choose
from .deepfool import DeepFool
from .draws import StreamDraws
from .problem import Objective, Problem
from .universal import UNIVERSAL_EPS, UniversalAttack, Update, home


class UAP(UniversalAttack):
    """Universal adversarial perturbation (Moosavi-Dezfooli et al. 2017, arXiv 1610.08401).

    Takes the images in turn; where the perturbation so far does not change the network's prediction, it adds what l2
    DeepFool finds there, and goes back into the ball. The paper takes one image at a time, which ``together=1`` does; more
    share the perturbation so far, what was found for each is added up, and the ball comes after that. (Their mean instead
    of their sum hardly moves: 0.02 of the images fooled instead of 0.56 on CIFAR-10, in one pass over 256 of them by 8.) Unlike
    the authors' code (LTS4/universal), images are clipped to the box, an l2 perturbation is never stretched to the radius,
    and the best pass is kept.

    Cost: none in an evaluation. Fitting takes, for each image and pass, 4 forward passes and DeepFool's own where the image
    is not fooled: at most 2 * ``deepfool_steps`` forward and ``candidates`` * ``deepfool_steps`` backward.

    Args:
        eps: radius, see :class:`UniversalAttack`; the paper takes 10/255 for linf and 2000/255 for l2 at 224 x 224 pixels.
        epochs: most passes over the data.
        enough: stop at this fooling rate, 1 - delta in the paper.
        together: images that are looked at together.
        deepfool_steps: most steps of DeepFool; images where they do not suffice are left out.
        overshoot: see :class:`DeepFool`.
        candidates: see :class:`DeepFool`.
        norm: ``linf`` or ``l2``.
        perturbation: see :class:`UniversalAttack`, and so ``seed``, though nothing is drawn.

    Raises:
        ValueError: if an argument is out of its range.
    """

    def __init__(
        self,
        eps: Number | Tensor = UNIVERSAL_EPS,
        epochs: int = 10,
        enough: float = 0.8,
        *,
        together: int = 32,
        deepfool_steps: int = 10,
        overshoot: float = 0.02,
        candidates: int = 10,
        norm: Norm = "linf",
        perturbation: str | None = None,
        seed: int = 0,
    ) -> None:
        choose("norm", norm, ("linf", "l2"))
        super().__init__(eps, epochs, enough, norm=norm, perturbation=perturbation, seed=seed)
        check_count("together", together)
        self.together = together
        self.deepfool = DeepFool(steps=deepfool_steps, overshoot=overshoot, candidates=candidates)

    def learner(self, model: nn.Module, delta: Tensor) -> Update:
        def update(x: Tensor, delta: Tensor) -> Tensor:
            clean = self.predictions(model, x)
            for images, predicted in zip(x.split(self.together), clean.split(self.together), strict=True):
                delta = self.inside(delta + self._step(model, (images + delta).clamp(0.0, 1.0), predicted))
            return delta

        return update

    def _step(self, model: nn.Module, x_adv: Tensor, predicted: Tensor) -> Tensor:
        """Sum of the smallest changes that make perturbed images leave their clean predictions, (1, C, H, W)."""
        problem = Problem(
            model,
            x_adv,
            predicted,
            eps=float("inf"),
            norm="l2",
            objective=Objective(cross_entropy, (predicted,)),
            draws=StreamDraws(self.seed, x_adv.device),
            dtype=home(model).dtype,
        )
        changes = self.deepfool.find(problem, x_adv, predicted) - x_adv
        self.fit_forwards += problem.ledger.forwards.total
        self.fit_backwards += problem.ledger.backwards.total
        return changes.sum(0, keepdim=True)
