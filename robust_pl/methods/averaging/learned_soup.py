"""Learned soup."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn
from torch.optim import AdamW

from ...callbacks.attacks.base import Attack
from ...functional.soups import Combination, blocks
from ...nets.trajectory import Trajectory
from ..base import Method, OptimizerFactory
from ..example import Example
from ..schedules import Schedule
from .assembled import SOUP_KEY, refuse_averages
from .ingredients import Ingredients, mean_of, parameters_of, read_ingredients, write


class LearnedSoup(Method):
    """Learned soup (Wortsman et al. 2022, arXiv 2203.05482): the coefficients of an average, learned by gradient steps.

    ``theta = sum_i beta_i theta_i``, where beta minimises the cross-entropy of what the run trains on: give it samples that no
    ingredient was trained on (:class:`robust_pl.data.HeldOut`), since on the ingredients' own all of them look right. Where
    there is an attack, the samples are attacked: that is an extension of this library. The authors also learn a temperature;
    it changes no decision and is left out, and the default optimizer is theirs as we remember it. It begins as the equal
    average. BatchNorm is in train mode, so that its running statistics follow the soup.

    Cost: the attack's passes, and one forward and one backward pass a step, which gives the gradient by the weights. That by
    the coefficients is a product with the ingredients, which are all in memory: m copies of the network.

    Args:
        ingredients: folder or list of weights, see :func:`.ingredients.read_ingredients`.
        skip: leave out so many of the first, such as a trajectory's beginning.
        attack: of the images that the coefficients are learned on; None takes clean ones.
        softmax: keep coefficients positive with sum 1. Otherwise they are free, and may extrapolate.
        layer_size: None learns one coefficient an ingredient; otherwise each block of consecutive tensors that together have
            more than ``layer_size`` elements has its own, so that 0 means every tensor.
        optimizer: of the coefficients.
        schedule: of their learning rate.
        net: see :class:`Method`, and so all others.

    Raises:
        ValueError: if there are fewer than two ingredients, or they are not all of ``net``.
    """

    refuses_perturbation = "its steps move coefficients and not weights"

    def __init__(
        self,
        net: nn.Module,
        ingredients: Ingredients,
        attack: Attack | None = None,
        skip: int = 0,
        softmax: bool = True,
        layer_size: int | None = None,
        optimizer: OptimizerFactory = lambda params: AdamW(params, lr=0.1, weight_decay=0.0),
        schedule: Schedule | None = None,
        num_classes: int = 10,
    ) -> None:
        super().__init__(net, attack, optimizer, schedule, num_classes=num_classes)
        if layer_size is not None and layer_size < 0:
            raise ValueError(f"layer_size={layer_size} must be at least 0, or null for one coefficient an ingredient")
        self.ingredients, self.skip, self.softmax, self.layer_size = ingredients, skip, softmax, layer_size
        self.coefficients = torch.zeros(0, 0)
        """What the optimizer moves, (m, L) for L blocks: with softmax, its logits. It has no place in the state dict, so that a
        soup is loaded like any network, without its ingredients."""
        self._resumed: dict[str, Any] | None = None
        self._samples: Trajectory
        self._combination: Combination | None = None

    @property
    def shares(self) -> Tensor:
        """Coefficient of each ingredient in each block, (m, L)."""
        return self.coefficients.softmax(0) if self.softmax else self.coefficients

    def loss(self, example: Example) -> Tensor:
        return F.cross_entropy(self(example.x if example.x_adv is None else example.x_adv), example.y)

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage != "fit":
            return
        name = type(self).__name__
        if str(self.trainer.precision) in ("16-mixed", "16-true"):
            raise ValueError(f"precision 16 scales gradients before {name} reads them: choose precision bf16-mixed or 32")
        refuse_averages(self.trainer, self)
        self._samples = read_ingredients(self.ingredients, self.net, self.skip)
        self._block = blocks({n: p.numel() for n, p in parameters_of(self.net).items()}, self.layer_size)

    # Coefficients in the place of weights ----------------------------------------------------------------------------

    def trained_parameters(self) -> list[Any]:
        self.coefficients = self._beginning()
        if self._resumed is not None:
            saved = self._resumed["coefficients"]
            if saved.shape != self.coefficients.shape or self._resumed["ingredients"] != self._labels():
                raise ValueError(
                    f"the checkpoint's soup has other ingredients or blocks, coefficients {tuple(saved.shape)} and now "
                    f"{tuple(self.coefficients.shape)}: keep the settings of the run to continue it, or start a new run"
                )
            self.coefficients.copy_(saved)
        return [self.coefficients]

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        parameters = {n: p for n, p in self.net.named_parameters() if p.grad is not None}
        gradient = self._combination.gradient({n: p.grad for n, p in parameters.items()})
        for parameter in parameters.values():
            parameter.grad = None
        if self.softmax:
            shares = self.shares
            gradient = shares * (gradient - (shares * gradient).sum(0))
        unused = len(self.coefficients) - len(gradient)
        self.coefficients.grad = F.pad(gradient, (0, 0, 0, unused)).to(self.coefficients.dtype)

    def after_step(self, example: Example) -> None:
        self._write()

    def _write(self) -> None:
        self._write_combination(self.shares)

    def _write_combination(self, coefficients: Tensor) -> None:
        combination = self._combination
        write(self.net, ((name, combination.weight(name, coefficients)) for name in combination.rows))

    # The run ---------------------------------------------------------------------------------------------------------

    def on_train_start(self) -> None:
        super().on_train_start()
        self._combination = Combination(self._rows(self._samples), self._block)
        if self._resumed is None:
            write(self.net, mean_of(self._samples, self.net))
            self._write()
        self._resumed = None

    def on_train_end(self) -> None:
        shares = self.shares.float()
        listed = "; ".join(
            f"{label} {share.mean():.3f}" + (f" ({share.min():.3f} to {share.max():.3f})" if share.numel() > 1 else "")
            for label, share in zip(self._labels(), shares, strict=True)
        )
        rank_zero_info(f"{type(self).__name__}: {listed}")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint[SOUP_KEY] = self._resumed if self._combination is None else self.state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self._resumed = checkpoint.get(SOUP_KEY)

    def state(self) -> dict[str, Any]:
        """What the checkpoint keeps beside the weights."""
        return {
            "ingredients": self._labels(),
            "shares": self.shares.cpu().clone(),
            "coefficients": self.coefficients.cpu().clone(),
            "blocks": self._block,
        }

    def _beginning(self) -> Tensor:
        shape = len(self._samples), max(self._block.values()) + 1
        # Logits of 0 and shares of 1/m are the same soup.
        return torch.full(shape, 0.0 if self.softmax else 1 / shape[0], dtype=self._wide(), device=self.device)

    def _wide(self) -> torch.dtype:
        return torch.promote_types(next(self.net.parameters()).dtype, torch.float32)

    def _labels(self) -> list[str]:
        return [sample.label for sample in self._samples]

    def _rows(self, samples: Trajectory) -> dict[str, Tensor]:
        """Parameters of all models, name -> (b, *shape), on the device; read tensor by tensor."""
        parameters = parameters_of(self.net)
        layers = samples.layers(list(parameters))
        return {
            name: layers[position].view(-1, *p.shape).to(self.device, torch.promote_types(p.dtype, torch.float32))
            for position, (name, p) in enumerate(parameters.items())
        }
