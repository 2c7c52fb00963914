"""Shape-texture debiased training."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import SGD

from ...data.augmentations import Augmentation
from ...data.hashing import hash_keys
from ...nets.dual_net import DualNet
from ..base import Method, OptimizerFactory
from ..example import Example
from ..schedules import Schedule
from .adv_prop import check_dual
from .augmented import version_keys


@dataclass
class StyledExample(Example):
    """A batch with its images in other styles.

    Args:
        x_style: pixels (B, C, H, W).
        y_style: their labels, float (B, K) if mixed.
    """

    x_style: Tensor | None = None
    y_style: Tensor | None = None


class ShapeTexture(Method):
    """Shape-texture debiased training (Li et al. 2021, arXiv 2010.05981): images, and the same in other images' styles.

    The loss is the mean cross-entropy over [x; x_style], in one pass in which clean images are normalised by the main
    BatchNorms, which are evaluated, and changed ones by the auxiliary ones. The authors' x_style is half of the way to another
    image's style, by AdaIN in VGG-19's features, and its label is 0.8 * y + 0.2 * y of that image:
    ``{class_path: Stylize, init_args: {alpha: 0.5, style_label: 0.2, probability: 1, encoder: ..., decoder: ...}}``, for which
    the user must have both networks' weights. Any augmentation can stand there instead, ``PixelAdaIN`` for one, which knows
    nothing of texture. The authors also stylise at a smaller size in some epochs, to save time; that is left out.

    Cost: one forward and one backward pass on twice the batch, 2 + 2, and the augmentation.

    Args:
        net: a network in a DualNet.
        augmentation: makes x_style.
        seed: of the styles; None takes that of the data module.
        optimizer: see :class:`Method`, and so all others.

    Raises:
        TypeError: if the network is no DualNet, or the augmentation is none.
    """

    def __init__(
        self,
        net: DualNet,
        augmentation: Augmentation,
        seed: int | None = None,
        optimizer: OptimizerFactory = lambda params: SGD(params, lr=0.2, momentum=0.9, weight_decay=1e-4),
        schedule: Schedule | None = None,
        weights: str | None = None,
        num_classes: int = 10,
    ) -> None:
        super().__init__(net, None, optimizer, schedule, weights, num_classes)
        check_dual(net, "ShapeTexture")
        if not isinstance(augmentation, Augmentation):
            raise TypeError(f"augmentation={augmentation!r} is no augmentation: take Stylize, or PixelAdaIN")
        self.augmentation, self.seed = augmentation, seed

    def craft(self, batch: tuple[Tensor, ...], eps: Tensor | None = None) -> StyledExample:
        example = self.clean(batch)
        x, y = example.x, example.y
        if self.augmentation.mixes_labels and not y.is_floating_point():
            y = F.one_hot(y, self.num_classes).to(torch.promote_types(x.dtype, torch.float32))
        keys = hash_keys(version_keys(self, self.seed, batch), 0)
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            x_style, y_style = self.augmentation(x, y, keys)
        return StyledExample(x, y, example.index, x_style=x_style, y_style=y_style)

    def loss(self, example: StyledExample) -> Tensor:
        with self.net.routing.split(len(example.x)):
            logits = self(torch.cat([example.x, example.x_style]))
        return F.cross_entropy(logits, torch.cat([example.y, example.y_style]))
