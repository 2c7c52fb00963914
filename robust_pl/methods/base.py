"""The base of all methods: it owns steps, optimizers and schedules, and a subclass owns a loss."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.core.mixins.hparams_mixin import HyperparametersMixin, _given_hyperparameters
from lightning.pytorch.utilities.parsing import collect_init_args
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import SGD, Optimizer
from typing_extensions import Self

from ..callbacks.attacks.base import Attack, ObjectiveName
from ..callbacks.attacks.ledger import Attacked
from ..callbacks.attacks.problem import Objective
from ..callbacks.evaluation import RobustEvaluation
from ..callbacks.speed import Speed
from ..callbacks.weights.perturbation import WeightPerturbation
from ..nets.synced import refuse_to_sync
from ..nets.weights import load_weights
from ..trust import check_classes, guarded, read_checkpoint
from .example import Example
from .first_batch import check_batch
from .random_state import random_state, set_random_state
from .ranks import of_all_ranks
from .schedules import Schedule
from .second_pass import differentiate_again

_PLAIN = (bool, int, float, str, type(None))
OptimizerFactory = Callable[[Iterable[Parameter]], Optimizer]


class Method(LightningModule, ABC):
    """A training method. Most subclasses define :meth:`loss` and nothing else.

    A step has three parts: :meth:`craft` attacks once, :meth:`loss` is pure in the weights and may be asked again at other
    weights, :meth:`after_step` follows each real optimizer step.

    Args:
        net: maps pixels in [0, 1], (B, C, H, W), to logits (B, K).
        attack: the training attack; None where the method needs none, or takes its own default.
        optimizer: makes the optimizer from the parameters; SGD as in Rice et al. 2020 by default.
        schedule: of the learning rate; None keeps it constant.
        weights: state dict to start from, a path as it is or under ``ROBUST_PL_DATA``; ignored where a checkpoint is given.
        num_classes: number of classes K.
    """

    inner_objective: ObjectiveName = "ce"
    """What the training attack maximises unless it names an objective itself."""
    refuses_perturbation: str | None = None
    """Why AWP, SAM and the like cannot be combined with the method; None if they can."""
    aims: bool = False
    """Whether :meth:`craft` chooses the labels that a targeted training attack is to reach."""

    def __init__(
        self,
        net: nn.Module,
        attack: Attack | None = None,
        optimizer: OptimizerFactory = lambda params: SGD(params, lr=0.1, momentum=0.9, weight_decay=5e-4),
        schedule: Schedule | None = None,
        weights: str | None = None,
        num_classes: int = 10,
    ) -> None:
        super().__init__()
        live: list[str] = []
        if _given_hyperparameters.get() is None:
            # The command line offers the config, which rebuilds everything. What code built must not go into a checkpoint.
            for arguments in collect_init_args(inspect.currentframe(), [], classes=(HyperparametersMixin,)):
                live += [name for name, value in arguments.items() if type(value) not in _PLAIN]  # nor a Ratio
        self.save_hyperparameters(ignore=live)
        self.net = net
        self.attack = attack if attack is not None else self.default_attack()
        if self.attack is not None and self.attack.targeted and not self.aims:
            raise ValueError("attack.targeted=True would train towards labels that nobody chose: set it to False")
        self.num_classes = num_classes
        self._optimizer, self._schedule, self._weights = optimizer, schedule, weights
        self._checked: set[bool] = set()
        self._length: int | None = None
        self._resumed_length: int | None = None
        self._window: list[Example] = []
        self._rng: list[dict[str, Tensor]] | None = None

    @property
    def initial_weights(self) -> str | None:
        """File of the weights that the network starts from."""
        return self._weights

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, K) of pixels (B, C, H, W)."""
        return self.net(x)

    @classmethod
    def load_from_checkpoint(
        cls, checkpoint_path: str | Path, *arguments: Any, named: Collection[str] = (), **more: Any
    ) -> Self:
        """As Lightning's, but a checkpoint may not choose code: see :mod:`robust_pl.trust`.

        Args:
            checkpoint_path: of a run that was started by a config.
            named: class paths outside of robust_pl, torch, timm and lightning that it may import.
            arguments: of Lightning.
            more: of Lightning.

        Raises:
            ValueError: if the file is damaged, carries code, or names other classes.
        """
        content = read_checkpoint(checkpoint_path)
        hparams = {k: v for k, v in content.get("hyper_parameters", {}).items() if k != "_instantiator"}
        check_classes(hparams, checkpoint_path, named)
        with guarded(named):
            return super().load_from_checkpoint(checkpoint_path, *arguments, weights_only=True, **more)

    # What a method may define ----------------------------------------------------------------------------------------

    @staticmethod
    def default_attack() -> Attack | None:
        """The training attack where none is given; None trains without one."""
        return None

    def craft(self, batch: tuple[Tensor, ...], eps: Tensor | None = None) -> Example:
        """Run the training attack once, on (x, y, index) or (x, y); ``eps`` (B, 1, 1, 1) is a radius for each sample."""
        example = self.clean(batch)
        if self.attack is None:
            return example
        return replace(example, x_adv=self.run_attack(example, eps).x_adv.to(example.x.dtype))

    def run_attack(
        self, example: Example, eps: Tensor | None = None, start: Tensor | None = None, keep_graph: bool = False
    ) -> Attacked:
        """One call of the training attack, with all that it found on its way; for a :meth:`craft` that needs more of it.

        ``start`` and ``keep_graph`` are those of :meth:`Attack.run`.
        """
        if self.attack is None:
            raise ValueError(f"{type(self).__name__} needs a training attack: set attack, such as FGSM or PGD")
        return self.attack.run(
            self,
            example.x,
            example.y,
            eps=eps,
            objective=self.attack_objective(example) if self.attack.objective is None else None,
            rank=self.global_rank,
            careful=example.x.device.type == "cpu",
            start=start,
            keep_graph=keep_graph,
        )

    def clean(self, batch: tuple[Tensor, ...]) -> Example:
        """The batch before any attack, with what the attack may need to know of it; without an index in it, that is -1."""
        x, y = batch[0], batch[1]
        return Example(x, y, batch[2] if len(batch) > 2 else torch.full((len(x),), -1, device=x.device))

    def attack_objective(self, example: Example) -> ObjectiveName | Objective:
        """Inner objective for what :meth:`clean` made; override it where it sees more than (x, y), such as teacher logits."""
        return self.inner_objective

    @abstractmethod
    def loss(self, example: Example) -> Tensor:
        """The training loss, a scalar: a function of the weights and the example alone."""

    def after_step(self, example: Example) -> None:
        """Called once after each real optimizer step, with all its micro-batches: teacher temperatures, class statistics."""

    def averaging_weight(self) -> Tensor | None:
        """Whether an EMA takes the step just made; None always does. SWA, which averages epochs, does not ask.

        Else 1.0 or 0.0, equal on all processes, of dimension 0 and on the device, so that nothing waits for it.
        """
        return None

    def trained_parameters(self) -> list[Any]:
        """What the optimizer is made from: parameters, or groups of them where their learning rates differ."""
        return [p for p in self.parameters() if p.requires_grad]

    def optimizer_steps(self) -> float:
        """Optimizer steps of the whole run, over which a schedule by step is laid."""
        return self.trainer.estimated_stepping_batches

    # What the base owns ----------------------------------------------------------------------------------------------

    def training_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> Tensor:
        self._check_first(batch)
        example = self.craft(batch)
        perturbation = self._perturbation()
        if perturbation is not None or type(self).after_step is not Method.after_step:
            self._window.append(example)
        with nullcontext() if perturbation is None else perturbation.around_loss(self):
            loss = self.loss(example)
        self.log("train/loss", loss, prog_bar=True, on_step=True, batch_size=len(example.x))
        return loss

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: Any,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        update = partial(super().optimizer_step, epoch, batch_idx, optimizer)
        perturbation = self._perturbation()
        if perturbation is None or optimizer_closure is None:
            update(optimizer_closure)
        else:
            again = partial(self._gradients_again, optimizer)
            perturbation.step(self, optimizer_closure, again, lambda loss: update(lambda: loss))
        if self._window and type(self).after_step is not Method.after_step:
            self.after_step(Example.join(self._window))
        self._window.clear()

    def _perturbation(self) -> WeightPerturbation | None:
        found = WeightPerturbation.among(self.trainer.callbacks)
        return found if found is not None and self.current_epoch >= found.start_epoch else None

    def _gradients_again(self, optimizer: Any, tracked: bool) -> None:
        optimizer.zero_grad()
        differentiate_again(self, self._window, tracked)

    def validation_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> dict[str, Tensor]:
        self._check_first(batch)
        return {"logits": self(batch[0])}

    def test_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> dict[str, Tensor]:
        return self.validation_step(batch, batch_idx)

    def predict_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> dict[str, Tensor]:
        return self.validation_step(batch, batch_idx)

    def configure_optimizers(self) -> Any:
        optimizer = self._optimizer(self.trained_parameters())
        if self._schedule is None:
            return optimizer
        by_step = self._schedule.interval == "step"
        length = self.optimizer_steps() if by_step else self.trainer.max_epochs
        if length in (None, -1, float("inf")):
            raise ValueError("a schedule needs to know how long the run is: set trainer.max_epochs")
        length = self._schedule.length(int(length))
        if self._schedule.uses_length and self._resumed_length not in (None, length):
            raise ValueError(
                f"the checkpoint's schedule is laid over {self._resumed_length} {self._schedule.interval}s, that of this run "
                f"over {length}: keep the settings of the run to continue it, or start a new run from its weights with "
                "--model.init_args.weights CHECKPOINT"
            )
        self._length = length
        scheduler = self._schedule.build(optimizer, self._length)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": self._schedule.interval},
        }

    def setup(self, stage: str) -> None:
        if str(self.trainer.precision) in ("16-mixed", "16-true") and self.attack is not None:
            raise ValueError("precision 16 rounds small gradients of pixels to 0: choose precision bf16-mixed or 32")
        if getattr(self.trainer.strategy, "_layer_sync", None) is not None:
            refuse_to_sync(self)
        RobustEvaluation.ensure(self.trainer)
        Speed.ensure(self.trainer)
        if self._weights is not None and self.trainer.ckpt_path is None:
            load_weights(self.net, self._weights)
            self._weights = None

    def on_train_start(self) -> None:
        if self._rng is not None and len(self._rng) == self.trainer.world_size:
            set_random_state(self._rng[self.global_rank])
        self._rng = None

    def on_train_epoch_end(self) -> None:
        if self.attack is not None:
            self.attack.raise_if_violated()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["robust_pl_training"] = {
            "attack": self.attack.training_state() if self.attack is not None else {},
            "rng": of_all_ranks(random_state()),
            "length": self._length,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        try:
            load_weights(self, checkpoint["state_dict"])
        except ValueError as error:
            raise ValueError(f"the checkpoint was saved from another network than the config's: {error}") from error
        saved = checkpoint.get("robust_pl_training", {})
        self._rng = saved.get("rng")
        self._resumed_length = saved.get("length")
        if self.attack is not None:
            self.attack.load_training_state(saved.get("attack", {}))

    def _check_first(self, batch: tuple[Tensor, ...]) -> None:
        """Look at the first batch of training, and at that of evaluation: one small forward pass each."""
        if self.training not in self._checked:
            groups = getattr(self.trainer.datamodule, "class_groups", None)
            check_batch(self, batch[0], batch[1], self.num_classes if groups is None else len(groups))
            self._checked.add(self.training)
