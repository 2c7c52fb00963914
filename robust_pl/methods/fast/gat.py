"""GAT."""

from __future__ import annotations

from torch import Tensor, nn
from torch.optim import SGD

from ...callbacks.attacks.base import Attack
from ...functional.output_distances import softmax_distance
from ..base import OptimizerFactory
from ..schedules import Schedule
from .guided_fgsm import GuidedFGSM


class GAT(GuidedFGSM):
    """Guided adversarial training (Sriramanan et al., NeurIPS 2020): see :class:`GuidedFGSM`, with the squared distance of
    softmax outputs, mean_i ||softmax f(x_i) - softmax f(x_adv_i)||^2.

    The authors raise the weight once, together with the last fall of their learning rate. A public port takes the softmax twice
    in the cross-entropy of the attack; here it is that of logits, as in the authors' code.

    Args:
        lmbda: weight of the distance; 10 is the authors' on CIFAR-10.
        step_up_after: the last epoch, counted from 0, in which it is lmbda; 85 of their 100. None keeps it.
        factor: what it is multiplied by after that.
        net: see :class:`GuidedFGSM`, and so all others.

    Raises:
        ValueError: if an argument is out of its range.
    """

    def __init__(
        self,
        net: nn.Module,
        attack: Attack | None = None,
        lmbda: float = 10.0,
        step_up_after: int | None = 85,
        factor: float = 4.0,
        optimizer: OptimizerFactory = lambda params: SGD(params, lr=0.1, momentum=0.9, weight_decay=5e-4),
        schedule: Schedule | None = None,
        weights: str | None = None,
        num_classes: int = 10,
    ) -> None:
        super().__init__(net, attack, lmbda, optimizer, schedule, weights, num_classes)
        if step_up_after is not None and step_up_after < 0:
            raise ValueError(f"step_up_after={step_up_after} is an epoch, counted from 0: it must be at least 0")
        if factor <= 0:
            raise ValueError(f"factor={factor} must be above 0")
        self.step_up_after, self.factor = step_up_after, factor

    def distance(self, logits: Tensor, logits_adv: Tensor) -> Tensor:
        return softmax_distance(logits, logits_adv)

    def weight(self) -> float:
        raised = self.step_up_after is not None and self.current_epoch > self.step_up_after
        return self.lmbda * (self.factor if raised else 1.0)
