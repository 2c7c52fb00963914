"""Speed: every switch that makes a step faster, in one place."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, get_args

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from ..functional.gradients import compiled_parts
from ..nets.folding import look_at
from ..nets.graphed import GraphedTraining
from .attacks.base import Attack

CompileMode = Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]


class Speed(Callback):
    """Switches that make training and attacks faster. It is there by itself; name it to change its settings.

    The defaults are the fastest that change no result beyond rounding. Half precision is the Trainer's (``precision:
    bf16-mixed``), and so is the choice of convolution algorithms (``benchmark: true``).

    Args:
        fold_batchnorm: attacks in eval mode fold BatchNorm into the convolutions, see :class:`robust_pl.nets.folding.Folded`.
        channels_last: networks with convolutions get images with channels last, in attacks and in training.
        cuda_graphs: on CUDA, passes are recorded once and replayed: those of attacks in eval mode
            (:class:`robust_pl.nets.graphed.Graphed`) and, on a single device, those of the training
            (:class:`robust_pl.nets.graphed.GraphedTraining`).
        compile: compile the network that is trained by ``torch.compile`` in this mode; null does not. Attacks go through it,
            too, instead of through folded weights, whatever their ``bn_mode`` and ``eps``. Validation and test run as they
            are, since they would be compiled again for their batches. A method that differentiates twice, or uses a pass of its
            attack in its loss, refuses a compiled network by name.
        backend: of ``torch.compile``.
        fused_optimizer: on CUDA, step all weights in one kernel where the optimizer can and its own settings do not say.
        tf32: on CUDA, whether products of float32 matrices and convolutions are rounded to TF32; null leaves torch's defaults:
            convolutions are, products are not.
        resident_data: on CUDA, keep sets of 8-bit pixels on the device, if there is room, and make batches there.

    Raises:
        ValueError: if ``compile`` is no mode of ``torch.compile``.
    """

    def __init__(
        self,
        fold_batchnorm: bool = True,
        channels_last: bool = True,
        cuda_graphs: bool = False,
        compile: CompileMode | None = None,
        backend: str = "inductor",
        fused_optimizer: bool = True,
        tf32: bool | None = None,
        resident_data: bool = True,
    ) -> None:
        if compile is not None and compile not in get_args(CompileMode):
            raise ValueError(
                f"compile={compile!r} is no mode of torch.compile: choose one of {', '.join(get_args(CompileMode))}"
            )
        self.fold_batchnorm, self.channels_last, self.cuda_graphs = fold_batchnorm, channels_last, cuda_graphs
        self.compile, self.backend, self.fused_optimizer = compile, backend, fused_optimizer
        self.tf32, self.resident_data = tf32, resident_data
        self._layout: RemovableHandle | None = None
        self._graphed: GraphedTraining | None = None
        self._compiled = False
        self._before: list[Callable[[], None]] = []

    @staticmethod
    def ensure(trainer: Trainer) -> Speed:
        """The trainer's switches, added if it has none."""
        found = next((callback for callback in trainer.callbacks if isinstance(callback, Speed)), None)
        if found is None:
            found = Speed()
            found.apply(trainer, trainer.lightning_module)
            trainer.callbacks.append(found)
        return found

    def apply(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set what attacks, data and torch read; :meth:`teardown` sets it back."""
        attacks = [callback for callback in trainer.callbacks if isinstance(callback, Attack)]
        for attack in [*attacks, getattr(pl_module, "attack", None)]:
            if isinstance(attack, Attack):
                # AutoAttack has switches of its own.
                self._set(attack, "fold_batchnorm", attack.fold_batchnorm and self.fold_batchnorm)
                self._set(attack, "channels_last", attack.channels_last and self.channels_last)
                self._set(attack, "cuda_graphs", self.cuda_graphs)
        if hasattr(trainer.datamodule, "resident"):
            self._set(trainer.datamodule, "resident", None if self.resident_data else False)
        if self.tf32 is not None:
            for backend in (torch.backends.cuda.matmul, torch.backends.cudnn):
                self._set(backend, "allow_tf32", self.tf32)

    def _set(self, thing: Any, name: str, value: object) -> None:
        self._before.append(partial(setattr, thing, name, getattr(thing, name)))
        setattr(thing, name, value)

    # Lightning's hooks -----------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.apply(trainer, pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.compile is not None:
            self._compiled = True
            network_of(pl_module).compile(mode=self.compile, backend=self.backend, dynamic=False)
        if self.fused_optimizer:
            for optimizer in trainer.optimizers:
                _fuse(optimizer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int) -> None:
        x, net = batch[0] if isinstance(batch, tuple | list) else batch, network_of(pl_module)
        images = isinstance(x, Tensor) and x.dim() == 4
        if self.channels_last and self._layout is None and images and look_at(net, x).channels_last:
            self._layout = net.register_forward_pre_hook(_lay_out)
        if self._graphed is not None:
            self._graphed.next_step()
        elif self.cuda_graphs and trainer.world_size == 1 and pl_module.device.type == "cuda" and not compiled_parts(net):
            self._graphed = GraphedTraining(net, self._layout is not None)
            net._compiled_call_impl = self._graphed

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.compile is not None and trainer.state.fn == "fit":
            torch.compiler.set_stance("force_eager")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.compile is not None and trainer.state.fn == "fit":
            torch.compiler.set_stance("default")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.on_validation_end(trainer, pl_module)
        if self._layout is not None and "view" in str(exception):  # it was looked at in eval mode
            warnings.warn(
                "the network may want its images contiguous in training: set channels_last of Speed to false", stacklevel=2
            )
        self.teardown(trainer, pl_module, "fit")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self._layout is not None:
            self._layout.remove()
            self._layout = None
        if self._compiled or self._graphed is not None:
            network_of(pl_module)._compiled_call_impl = self._graphed = None
            self._compiled = False
        while self._before:
            self._before.pop()()


def network_of(pl_module: LightningModule) -> nn.Module:
    """The network that is trained: ``net`` of our methods, else the module itself."""
    net = getattr(pl_module, "net", None)
    return net if isinstance(net, nn.Module) else pl_module


def _lay_out(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
    x = inputs[0] if inputs else None
    if not isinstance(x, Tensor) or x.dim() != 4:
        return None
    return x.contiguous(memory_format=torch.channels_last), *inputs[1:]


_lay_out.counts_only = True  # type: ignore[attr-defined]  # it changes no value


def _fuse(optimizer: Optimizer) -> None:
    """Let the optimizer step all its weights in one kernel, if they are on CUDA and nobody chose otherwise."""
    if "fused" not in optimizer.defaults:
        return
    for group in optimizer.param_groups:
        floats = all(p.is_cuda and p.is_floating_point() for p in group["params"])
        if floats and group.get("fused") is None and group.get("foreach") is None and not group.get("differentiable"):
            group["fused"], group["foreach"] = True, False
