"""Training of networks whose weights, gradients and optimizer states are shared out over processes, with attacks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from lightning.fabric.strategies.model_parallel import _rekey_optimizer_state_if_needed
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict
from torch.distributed.constants import default_pg_timeout
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from .callbacks.weights.averaging import WeightAverage
from .methods.base import Method
from .methods.distillation.base import Distillation

Gather = Literal["step", "pass"]
_HOOKS = (
    "training_step",
    "optimizer_step",
    "configure_optimizers",
    "on_fit_start",
    "on_train_start",
    "on_train_batch_end",
    "on_train_end",
    "on_fit_end",
)


class ShardedStrategy(ModelParallelStrategy):
    """FSDP2 (``torch.distributed.fsdp.fully_shard``) for networks that are attacked while they are trained.

    Each process keeps 1/W of the trained weights, their gradients and their optimizer states; losses are those of DDP. Weights
    are sharded in place, so that attacks and losses go through the module as ever. Frozen networks (teachers) and parameters
    stay whole on each process. Evaluation, whose processes make unequal numbers of passes, gathers the weights once and runs on
    whole ones, as does every command but ``fit``: checkpoints are files with whole weights, which any strategy reads.

    Args:
        gather: when weights are gathered. ``step``: once a training step, before its attack, and given up before the optimizer
            moves them. Each process then holds the weights whole for a while, and sends no more than with DDP, whatever the
            number of attack steps; attacks may make unequal numbers of passes. ``pass``: block by block, in each forward and
            each backward pass of attack and loss, and given up at once: for networks whose weights do not fit into one device's
            memory beside the activations. An attack of k steps then sends the weights about 2 k + 2 times and must make the
            same passes on all processes, without restarts or early exit; nor can gradients be differentiated (GradAlign).
        timeout: of collective operations, in seconds.

    Raises:
        ValueError: if ``gather`` is unknown, or at start-up where a method or callback needs whole weights.
    """

    def __init__(self, gather: Gather = "step", timeout: float = default_pg_timeout.total_seconds()) -> None:
        if gather not in get_args(Gather):
            raise ValueError(f"gather={gather!r} is unknown: choose one of {', '.join(get_args(Gather))}")
        super().__init__(save_distributed_checkpoint=False, timeout=timedelta(seconds=timeout))
        self.gather = gather

    def setup_environment(self) -> None:
        self._data_parallel_size, self._tensor_parallel_size = self.num_nodes * self.num_processes, 1
        super().setup_environment()

    def setup(self, trainer: Trainer) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            if self._layer_sync is not None:
                self.model = self._layer_sync.apply(self.model)
            refuse(trainer, trainer.lightning_module, self.gather)
            self.model = self.precision_plugin.convert_module(self.model)
            shard(trainer.lightning_module, self.device_mesh["data_parallel"], keep=self.gather == "step")
        Strategy.setup(self, trainer)

    # Steps -----------------------------------------------------------------------------------------------------------

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        if self.gather == "step":
            self._gather()
        return super().training_step(*args, **kwargs)

    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any], *args: Any, **kwargs: Any) -> Any:
        def then_sharded() -> Any:
            loss = closure()
            self._give_up()  # the optimizer moves the shards, and what was gathered is no longer true
            return loss

        return super().optimizer_step(optimizer, then_sharded, *args, **kwargs)

    def on_validation_start(self) -> None:
        for group in self._groups():
            _keep(group, True)
        self._gather()

    def on_validation_end(self) -> None:
        for group in self._groups():
            _keep(group, self.gather == "step")
        self._give_up()

    def _groups(self) -> Iterator[FSDPModule]:
        assert self.lightning_module is not None
        return (module for module in self.lightning_module.modules() if isinstance(module, FSDPModule))

    def _gather(self) -> None:
        # An evaluation runs in inference mode, whose tensors could not be trained with afterwards.
        with torch.inference_mode(False), torch.no_grad():
            for group in self._groups():
                group.unshard()

    def _give_up(self) -> None:
        for group in self._groups():
            group.reshard()

    # Checkpoints, which hold whole tensors -----------------------------------------------------------------------------

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        return False

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        return Strategy.load_checkpoint(self, checkpoint_path, weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        Strategy.load_model_state_dict(self, checkpoint, strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        module = self.lightning_module
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            named = _rekey_optimizer_state_if_needed(state, module)
            set_optimizer_state_dict(module, optimizer, named, options=StateDictOptions(full_state_dict=True))


def shard(module: LightningModule, mesh: Any, keep: bool) -> None:
    """Share out the trained parameters of a method's networks, in place.

    Blocks, the children of the outermost ``nn.Sequential`` and ``nn.ModuleList``, are gathered one after the other, what is
    outside of them together.

    Args:
        module: the method.
        mesh: of the processes.
        keep: gathered weights stay until somebody gives them up.
    """
    for net in module.children():
        if not any(p.requires_grad for p in net.parameters()):
            continue
        whole = {p for p in net.parameters() if not p.requires_grad}
        for part in (*_blocks(net), net):
            fully_shard(part, mesh=mesh, reshard_after_forward=True, ignored_params=whole & set(part.parameters()))
            _keep(part, keep)
        if hasattr(net, "forward_features"):
            register_fsdp_forward_method(net, "forward_features")


def _blocks(net: nn.Module) -> Iterator[nn.Module]:
    for child in net.children():
        if isinstance(child, nn.Sequential | nn.ModuleList):
            yield from (block for block in child if any(p.requires_grad for p in block.parameters()))
        else:
            yield from _blocks(child)


def _keep(group: FSDPModule, keep: bool) -> None:
    group.set_reshard_after_forward(not keep, recurse=False)
    group.set_reshard_after_backward(not keep, recurse=False)


def refuse(trainer: Trainer, module: LightningModule, gather: Gather) -> None:
    """Refuse what needs whole weights on each process, before anything is trained.

    Weight perturbations, trajectories and training in a subspace refuse the strategy themselves.

    Raises:
        ValueError: naming it.
    """
    for callback in trainer.callbacks:
        if isinstance(callback, WeightAverage):
            raise ValueError(
                f"{type(callback).__name__} copies whole weights after each step, and ShardedStrategy shares them out: remove "
                "it from trainer.callbacks, or choose strategy ddp"
            )
    own = [hook for hook in _HOOKS if getattr(type(module), hook) is not getattr(Method, hook, None)]
    if isinstance(module, Distillation):
        own = [hook for hook in own if hook != "on_fit_start"]  # which asks the teacher alone
    if own:
        raise ValueError(
            f"{type(module).__name__} defines {own[0]}, where it may need whole weights, and ShardedStrategy shares them out: "
            "choose strategy ddp"
        )
    for name, part in module.named_modules():
        apart = isinstance(part, _BatchNorm) and not isinstance(part, nn.SyncBatchNorm) and part.track_running_stats
        if apart and any(p.requires_grad for p in part.parameters()):
            raise ValueError(
                f"{name} is a BatchNorm, whose statistics ShardedStrategy does not keep equal on all processes: set "
                "trainer.sync_batchnorm, take a network with LayerNorm, or choose strategy ddp"
            )
    attack = getattr(module, "attack", None)
    if attack is not None and attack.cuda_graphs:
        raise ValueError("cuda_graphs of Speed replays weights where they were, and ShardedStrategy moves them: switch it off")
    if gather == "pass" and attack is not None and (attack.restarts > 1 or getattr(attack, "keep", None) == "first"):
        raise ValueError(
            f"{type(attack).__name__} with restarts or keep='first' makes more passes on one process than on another, which "
            "gather='pass' would wait for: choose gather='step'"
        )
