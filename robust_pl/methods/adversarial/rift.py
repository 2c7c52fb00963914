"""RiFT: fine-tune the least robust-critical module of a robust network on clean data."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.optim import SGD

from ...callbacks.attacks.base import Attack
from ...callbacks.attacks.pgd import PGD
from ...callbacks.attacks.prepare import evaluating, prepared
from ...functional.criticality import Criticality, weighted_modules
from ..base import Method, OptimizerFactory
from ..example import Example
from ..interpolation import AfterEachStep, choose, forget_best, show
from ..ranks import of_all_ranks
from ..samples import require_validation, training_samples, validation_samples
from ..schedules import MultiStep, Schedule

_STATE = "robust_pl_rift"


class RiFT(Method):
    """Robust critical fine-tuning (Zhu et al. 2023, arXiv 2308.02533): better clean accuracy for a robust network.

    1. Before training, adversarial samples are made once from training data, and :class:`Criticality` is measured for each
       convolution and linear layer. Processes share the modules out and agree on the lowest.
    2. That module alone is fine-tuned on clean data with cross-entropy; all else is frozen.
    3. After the last step theta(alpha) = (1 - alpha) * start + alpha * fine-tuned is measured for alpha = 0, 1/n, ..., 1 on
       the validation samples, clean and attacked. The network becomes the one of the highest clean accuracy whose robust
       accuracy lies at most ``tolerance`` below the start's. It then goes through the run's last validation, and it is what
       ``best.ckpt`` and ``last.ckpt`` hold: whatever was the best before is forgotten. A run that is stopped before its end is
       not interpolated; resume it. Averages such as EMA follow the fine-tuning and are not interpolated.

    The authors' code makes the adversarial samples from the test set, chooses epoch and alpha on it, attacks with steps of
    2/225 instead of 2/255 and lets BatchNorm's statistics drift; here training and validation samples serve, the attack's step
    is the attack's own, ``freeze_bn`` keeps the statistics, and the last epoch is what is interpolated.

    Cost: one clean forward and backward pass a step. Before, for each of ``samples`` samples, the attack's passes, one forward
    pass, and for each of M modules 2E forward and E backward passes in E epochs of ascent: with PGD-10 and E = 10 that is
    11 + 20M and 10 + 10M. After, n + 1 times the attack's passes and two forward passes for each validation sample. Memory: one
    copy of one weight at a time, and of what is fine-tuned.

    Args:
        weights: of the adversarially trained network, required: a run's folder, a checkpoint or a state dict.
        attack: makes the adversarial samples of 1. and judges 3.; PGD-10 at 8/255 by default.
        module: name of the module to fine-tune, such as ``layer2.1.conv2``; None measures which.
        criticality: how it is measured; None takes the authors' settings.
        samples: training samples for it, spread evenly over the training set.
        freeze_bn: normalisation layers stay in eval mode, so that their statistics do not drift.
        interpolations: n in 3.
        tolerance: robust accuracy that may be lost, as a fraction of the validation samples.
        optimizer: the authors' by default: learning rate 0.001; they advise to try several.
        schedule: None takes the authors': a tenth from half of the run on.
        net: see :class:`Method`, and so all others.

    Raises:
        ValueError: if no weights are given, the module is unknown, there are no validation samples, or a value is out of range.
    """

    def __init__(
        self,
        net: nn.Module,
        attack: Attack | None = None,
        module: str | None = None,
        criticality: Criticality | None = None,
        samples: int = 10_000,
        freeze_bn: bool = True,
        interpolations: int = 10,
        tolerance: float = 0.002,
        optimizer: OptimizerFactory = lambda params: SGD(params, lr=0.001, momentum=0.9, weight_decay=5e-4),
        schedule: Schedule | None = None,
        weights: str | None = None,
        num_classes: int = 10,
    ) -> None:
        if weights is None:
            raise ValueError(
                "weights=None: RiFT starts from a robust network, name its run or file with --model.init_args.weights PATH"
            )
        for name, value, least in (("samples", samples, 1), ("interpolations", interpolations, 1), ("tolerance", tolerance, 0)):
            if value < least:
                raise ValueError(f"{name}={value} must be at least {least}")
        super().__init__(net, attack, optimizer, schedule or MultiStep([0.5]), weights, num_classes)
        self.criticality, self.samples = criticality or Criticality(), samples
        self.freeze_bn, self.interpolations, self.tolerance = freeze_bn, interpolations, tolerance
        self.module: str | None = None if module is None else self._known(module)
        self.alpha: float | None = None
        """What the interpolation chose; None before."""
        self.found: dict[str, float] = {}
        """Criticality of each module, lowest first; empty if it was not measured."""
        self._start: dict[str, Tensor] = {}
        self._frozen: list[nn.Parameter] = []

    @staticmethod
    def default_attack() -> PGD:
        return PGD()

    def craft(self, batch: tuple[Tensor, ...], eps: Tensor | None = None) -> Example:
        """Clean samples: nothing is attacked in a step."""
        return self.clean(batch)

    def loss(self, example: Example) -> Tensor:
        return F.cross_entropy(self(example.x), example.y)

    # Which module ----------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage != "fit":
            return
        require_validation(self.trainer, "RiFT")
        if self.trainer.ckpt_path is None:
            # Here and not later, since DistributedDataParallel must know what is frozen.
            self.to(self.trainer.strategy.root_device)
            if self.module is None:
                self.module = self._least_critical()
            self._start = {name: tensor.clone() for name, tensor in self._moving().items()}
            self._freeze()

    def teardown(self, stage: str) -> None:
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        self._frozen.clear()

    def _least_critical(self) -> str:
        modules = weighted_modules(self.net)
        with prepared(self, "eval"):
            x_adv, y = self._adversarial_set()
            base = self.criticality.loss(self, x_adv, y, self.device)
            mine = list(modules)[self.global_rank :: self.trainer.world_size]
            rises = {n: self.criticality.highest_loss(self, modules[n].weight, x_adv, y) - base for n in mine}
        shared = of_all_ranks({name: rise.item() for name, rise in rises.items()})
        together = {name: rise for of_rank in shared for name, rise in of_rank.items()}
        self.found = {name: together[name] for name in sorted(modules, key=lambda name: (together[name], name))}
        chosen = next(iter(self.found))
        rows = [(name, f"{rise:.4f}", "fine-tuned" if name == chosen else "") for name, rise in self.found.items()]
        show(self.trainer, f"Robust criticality on {len(y)} training samples:", ("module", "criticality", ""), rows)
        return chosen

    def _adversarial_set(self) -> tuple[Tensor, Tensor]:
        """Attacked training samples on the CPU, and their labels, the same on every process."""
        parts = []
        for x, y, index in training_samples(self.trainer, self.samples, self.criticality.batch_size, self.device):
            attacked = self.attack.run(self, x, y, objective=self.inner_objective, index=index)
            parts.append((attacked.x_adv.cpu(), y.cpu()))
        return tuple(torch.cat(column) for column in zip(*parts, strict=True))

    def _known(self, module: str) -> str:
        names = list(weighted_modules(self.net))
        if module not in names:
            shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
            raise ValueError(f"module={module!r} is no convolution or linear layer of the network: choose one of {shown}")
        return module

    def _freeze(self) -> None:
        """All parameters but the chosen module's."""
        kept = {id(parameter) for parameter in self.net.get_submodule(self.module).parameters()}
        self._frozen += [p for p in self.net.parameters() if p.requires_grad and id(p) not in kept]
        for parameter in self._frozen:
            parameter.requires_grad_(False)

    def _moving(self) -> dict[str, Tensor]:
        """The floating-point entries of the network's state that fine-tuning can move, not copied."""
        parameters, own = dict(self.net.named_parameters()), f"{self.module}."
        state = {name: tensor for name, tensor in self.net.state_dict().items() if tensor.is_floating_point()}
        return {name: t for name, t in state.items() if name not in parameters or name.startswith(own)}

    def on_train_epoch_start(self) -> None:
        for module in self.net.modules() if self.freeze_bn else ():
            if isinstance(module, _NormBase):
                module.eval()

    # Interpolation ---------------------------------------------------------------------------------------------------

    def configure_callbacks(self) -> list[Callback]:
        return [AfterEachStep(self._interpolate_at_the_end)]

    def on_fit_end(self) -> None:
        if self.alpha is None:
            warnings.warn(
                "the run was stopped before its end, so its network is not interpolated: go on with --ckpt_path .../last.ckpt",
                stacklevel=2,
            )

    def _interpolate_at_the_end(self) -> None:
        trainer = self.trainer
        by_epochs = trainer.max_epochs not in (None, -1) and trainer.current_epoch + 1 >= trainer.max_epochs
        by_steps = trainer.max_steps != -1 and trainer.global_step >= trainer.max_steps
        if self.alpha is not None or not (by_steps or (by_epochs and trainer.is_last_batch)):
            return
        end = {name: tensor.clone() for name, tensor in self._moving().items()}
        alphas = [i / self.interpolations for i in range(self.interpolations + 1)]
        clean, robust = zip(*[self._accuracies(alpha, end) for alpha in alphas], strict=True)
        best = choose(clean, robust, self.tolerance)
        self.alpha = alphas[best]
        self._go_to(self.alpha, end)
        forget_best(trainer)
        lines = list(zip(alphas, clean, robust, strict=True))
        rows = [(f"{a:.2f}", f"{c:.2%}", f"{r:.2%}", "chosen" if a == self.alpha else "") for a, c, r in lines]
        show(trainer, "From the start (0) to the fine-tuned network (1), validation:", ("alpha", "clean", "robust", ""), rows)
        figures = {"rift/alpha": self.alpha}
        for a, c, r in lines:
            figures |= {f"rift/acc_clean_{a:.2f}": c, f"rift/acc_robust_{a:.2f}": r}
        self.log_dict(figures, on_step=False, on_epoch=True)

    @torch.no_grad()
    def _go_to(self, alpha: float, end: dict[str, Tensor]) -> None:
        for name, tensor in self._moving().items():
            tensor.copy_(torch.lerp(self._start[name].to(tensor), end[name], alpha))

    def _accuracies(self, alpha: float, end: dict[str, Tensor]) -> tuple[float, float]:
        """Clean and attacked accuracy at ``alpha`` over the validation samples of all processes."""
        self._go_to(alpha, end)
        counts = torch.zeros(3, dtype=torch.int64, device=self.device)
        for x, y, index in validation_samples(self.trainer, self.device):
            with self.trainer.precision_plugin.val_step_context(), evaluating(self):
                x_adv = self.attack.run(self, x, y, objective=self.inner_objective, index=index).x_adv.to(x.dtype)
                with torch.no_grad():
                    hits = [(self(pixels).argmax(1) == y).sum() for pixels in (x, x_adv)]
            counts += torch.stack([*hits, torch.full_like(hits[0], len(x))])
        clean, robust, of = self.trainer.strategy.reduce(counts, reduce_op="sum").tolist()
        return clean / of, robust / of

    # What a resumed run must know ------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint[_STATE] = {"module": self.module, "alpha": self.alpha, "found": self.found, "start": self._start}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        saved = checkpoint.get(_STATE, {})
        self.alpha, self.found, self._start = saved.get("alpha"), saved.get("found", {}), saved.get("start", {})
        if self._trainer is None or self.trainer.state.fn != "fit":
            return
        if "module" not in saved:
            raise ValueError("the checkpoint is of another method's run: start from it with --model.init_args.weights")
        self.teardown("fit")  # nothing is frozen yet, unless a module was chosen in vain
        self.module = self._known(saved["module"])
        self._freeze()
