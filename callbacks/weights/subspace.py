"""Train any method in the subspace that an earlier run's weights span."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import SGD

from ...functional.subspace import STORAGES, Storage, Subspace, orthonormal
from ...nets.trajectory import Trajectory, read_trajectory
from ..attacks.checks import choose

Start = Literal["first", "mean", "current"]


class SubspaceTraining(Callback):
    """P-SGD (Li et al. 2022, arXiv 2111.12229 and 2103.11154): gradients of any method are projected, g <- P^T P g.

    P holds orthonormal directions of the weights that another run went through (:class:`WeightTrajectory`): centred, the d
    principal ones (DLDR), so that the weights stay in w_0 + span(P). What is projected is the gradient that the optimizer gets,
    after micro-batches, processes and weight perturbations, before it is clipped. Momentum stays in the subspace; weight decay
    and per-weight step sizes do not. Several processes hold a share of P's rows each.

    Cost: no pass; reads the samples three times at the start, holds d n numbers, and spends 4 d n operations a step.

    Args:
        trajectory: folder of a run with a trajectory, or of checkpoints, or a list of references ``PATH`` or ``PATH#ema``,
            see :func:`robust_pl.nets.read_trajectory`.
        dim: number d of directions; None takes all that the samples span.
        centred: directions around the samples' mean, as DLDR; False takes the span of the samples themselves, as TWA.
        start: where the run starts: at the ``first`` sample and its running statistics, at the ``mean`` of all, or at the
            ``current`` weights of the network.
        skip: leave out so many of the first samples.
        storage: of P: ``float32``, ``bfloat16`` or ``int8``.

    Raises:
        FileNotFoundError: if there is no trajectory.
        ValueError: if an argument is out of range, the samples are of another network or too few, or the optimizer leaves the
            subspace.
    """

    def __init__(
        self,
        trajectory: str | list[str],
        dim: int | None = None,
        centred: bool = True,
        start: Start = "first",
        skip: int = 0,
        storage: Storage = "float32",
    ) -> None:
        if dim is not None and dim < 1:
            raise ValueError(f"dim={dim} must be at least 1")
        if skip < 0:
            raise ValueError(f"skip={skip} must be at least 0")
        choose("start", start, ("first", "mean", "current"))
        choose("storage", storage, STORAGES)
        self.trajectory, self.dim, self.centred, self.start = trajectory, dim, centred, start
        self.skip, self.storage = skip, storage
        self.subspace: Subspace | None = None
        """The basis, while a fit runs."""
        self._mixing: Tensor | None = None
        self._parameters: list[Parameter] = []

    # The basis itself is not kept: samples and mixing matrix give it again, bit for bit.
    def state_dict(self) -> dict[str, Any]:
        return {} if self._mixing is None else {"mixing": self._mixing}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._mixing = state_dict.get("mixing")

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Look at the samples before anything is trained."""
        if stage != "fit":
            return
        if not isinstance(trainer.strategy, DDPStrategy | SingleDeviceStrategy):
            raise ValueError(
                f"SubspaceTraining needs whole weights on each process, and {type(trainer.strategy).__name__} shards them: "
                "choose ddp"
            )
        weights = getattr(pl_module, "initial_weights", None)
        if weights is not None and self.start != "current" and trainer.ckpt_path is None:
            raise ValueError(f"weights={weights} and start={self.start} of the subspace both say where to start: leave one out")
        self._samples = open_trajectory(self.trajectory, self.skip, pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._check(trainer)
        named = trained(pl_module)
        layers = self._samples.layers(list(named))
        if self._mixing is not None and self._mixing.shape[1] != len(self._samples):
            raise ValueError(
                f"the checkpoint was trained in the span of {self._mixing.shape[1]} samples and the trajectory now has "
                f"{len(self._samples)}: keep the trajectory of the run to continue it"
            )
        if self._mixing is None:
            self._mixing = on_first(trainer, lambda: orthonormal(layers, self.dim, self.centred))
        self.subspace = Subspace(layers, self._mixing, share(trainer, len(self._mixing)), self.storage, pl_module.device)
        self._parameters = list(named.values())
        if trainer.ckpt_path is None:
            move_to(pl_module, self._samples, self.start)

    def _check(self, trainer: Trainer) -> None:
        for optimizer in trainer.optimizers:
            if not isinstance(optimizer, SGD):
                raise ValueError(
                    f"the optimizer {type(optimizer).__name__} scales each weight by itself and leaves the subspace: use SGD"
                )
            decayed = any(group["weight_decay"] for group in optimizer.param_groups)
            if decayed and (self.centred or self.start == "current"):
                raise ValueError(
                    "the optimizer's weight_decay pulls the weights out of the subspace: set weight_decay to 0"
                    + ("" if self.centred else ", or start at the first sample or the mean")
                )

    @torch.no_grad()
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        for parameter in self._parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        projected = self.subspace.project(gradients)
        add_up(trainer, projected)
        torch._foreach_copy_(gradients, projected)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.subspace, self._parameters = None, []


def only_subspace(trainer: Trainer, own: SubspaceTraining) -> list[Callback]:
    """The callback that a method brings, for its ``configure_callbacks``; Lightning would drop the user's without a word.

    Raises:
        ValueError: if the trainer has another one.
    """
    if any(isinstance(callback, SubspaceTraining) and callback is not own for callback in trainer.callbacks):
        raise ValueError("the method trains in a subspace of its own: remove SubspaceTraining from trainer.callbacks")
    return [own]


def trained(module: nn.Module) -> dict[str, Parameter]:
    """The trainable parameters in flat order, by name."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def open_trajectory(source: str | list[str], skip: int, module: nn.Module) -> Trajectory:
    """The samples of a trajectory but the first ``skip``, under the module's names.

    Raises:
        FileNotFoundError: if there is no trajectory.
        ValueError: if they are of another network, or fewer than two.
    """
    samples = read_trajectory(source)
    if len(samples) - skip < 2:
        left = f" and skip={skip} leaves {max(len(samples) - skip, 0)}" if skip else ""
        raise ValueError(f"trajectory={source} has {len(samples)} sample(s){left}: a subspace needs at least 2")
    return samples[skip:].of(module)


@torch.no_grad()
def move_to(module: nn.Module, samples: Trajectory, start: Start) -> None:
    """Put the module to the first sample, or to the mean of all with the buffers of the last; or leave it."""
    if start == "current":
        return
    sample = samples[0] if start == "first" else samples[-1]
    parameters = trained(module)
    for name, tensor in module.state_dict(keep_vars=True).items():
        if name in sample:
            mean = start == "mean" and name in parameters
            tensor.copy_(samples.mean(name) if mean else sample[name])


def share(trainer: Trainer, rows: int) -> slice:
    """The rows of a basis that this process holds."""
    world, rank = trainer.world_size, trainer.global_rank
    return slice(rows * rank // world, rows * (rank + 1) // world)


def on_first(trainer: Trainer, find: Any) -> Tensor:
    """What the first process finds, on all: eigenvectors may differ between machines. All fail with its sentence."""
    found, said = None, None
    if trainer.is_global_zero:
        try:
            found = find()
        except ValueError as error:
            said = str(error)
    found, said = trainer.strategy.broadcast((found, said))
    if said is not None:
        raise ValueError(said)
    return found


def add_up(trainer: Trainer, tensors: Sequence[Tensor]) -> None:
    """Sum over processes, in place."""
    if trainer.world_size > 1:
        flat = torch._utils._flatten_dense_tensors(tensors)
        torch.distributed.all_reduce(flat)
        torch._foreach_copy_(list(tensors), list(torch._utils._unflatten_dense_tensors(flat, tensors)))
