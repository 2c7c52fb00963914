"""The switches of Speed: each changes how long a step takes, and no result beyond rounding."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import nn
from torch.optim import SGD, Adam
from torch.utils.data import DataLoader, TensorDataset

from robust_pl import nets
from robust_pl.callbacks import PGD, Speed
from robust_pl.callbacks.monitors.passes import PassCounter
from robust_pl.callbacks.speed import _fuse
from robust_pl.methods import PGDAT, TRADES, GradAlign, StandardTraining
from robust_pl.nets.epilogue import Shifted

PLAIN = {"fold_batchnorm": False, "channels_last": False, "fused_optimizer": False, "resident_data": False}


@pytest.fixture
def batches():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.rand(24, 3, 16, 16, generator=generator), torch.randint(10, (24,), generator=generator)
    return DataLoader(TensorDataset(x, y), batch_size=8)


class Losses(Speed):
    """Also notes each step's loss, and how images lie in memory."""

    def __init__(self, **switches):
        super().__init__(**switches)
        self.losses, self.seen = [], []

    def on_train_start(self, trainer, pl_module):
        if pl_module.device.type == "cpu":  # a hook would keep CUDA graphs away
            pl_module.net.conv1.register_forward_pre_hook(self.note)

    def note(self, module, inputs):
        self.seen.append(inputs[0].is_contiguous(memory_format=torch.channels_last))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(outputs["loss"].item())


def fit(batches, method=PGDAT, norm="l2", device="cpu", precision="32-true", bn_mode="eval", **switches):
    torch.manual_seed(0)
    speed = Losses(**switches)
    attack = PGD(
        0.1, steps=2, norm=norm, bn_mode=bn_mode, random_start=method is TRADES
    )  # by default without signs, which rounding flips
    module = method(nets.ResNet20(), attack, optimizer=lambda params: SGD(params, lr=0.01, momentum=0.9))
    trainer = Trainer(
        accelerator="gpu" if device == "cuda" else device,
        devices=1,
        precision=precision,
        max_epochs=1,
        callbacks=[speed],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, batches)
    return speed, module


def test_the_defaults_change_no_loss_beyond_rounding(batches):
    (fast, module), (plain, _) = fit(batches), fit(batches, **PLAIN)
    assert fast.losses == pytest.approx(plain.losses, abs=1e-4)
    assert all(fast.seen) and not any(plain.seen)
    assert not module.net._forward_pre_hooks and module.attack.fold_batchnorm
    assert all(p.is_contiguous() for p in module.parameters())


class CutsInTraining(nn.Sequential):
    def forward(self, x):
        return super().forward(x.view(len(x), -1).view(x.shape) if self.training else x)


def test_a_network_that_wants_contiguous_images_in_training_alone_is_told_the_switch(batches):
    module = StandardTraining(CutsInTraining(nn.Conv2d(3, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10)))
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    with pytest.raises(RuntimeError, match="view"), pytest.warns(UserWarning, match="set channels_last of Speed to false"):
        Trainer(accelerator="cpu", max_steps=1, **quiet).fit(module, batches)


def test_the_switches_reach_attacks_and_data():
    module, speed = PGDAT(nets.ResNet20(), PGD()), Speed(**PLAIN, cuda_graphs=True)
    trainer = SimpleNamespace(callbacks=[PGD(), speed], datamodule=SimpleNamespace(resident=None))
    speed.apply(trainer, module)
    for attack in (module.attack, trainer.callbacks[0]):
        assert (attack.fold_batchnorm, attack.channels_last, attack.cuda_graphs) == (False, False, True)
    assert trainer.datamodule.resident is False
    speed.apply(trainer, module)
    speed.teardown(trainer, module, "fit")
    for attack in (module.attack, trainer.callbacks[0]):
        assert (attack.fold_batchnorm, attack.channels_last, attack.cuda_graphs) == (True, True, False)
    assert trainer.datamodule.resident is None


class Breaks(Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        raise RuntimeError("no more")


@pytest.mark.parametrize("breaks", [False, True])
def test_all_is_as_it_was_after_a_run(batches, breaks):
    speed = Speed(tf32=not torch.backends.cuda.matmul.allow_tf32, fold_batchnorm=False)
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    module = PGDAT(nets.ResNet20(), PGD(0.1, steps=1))
    compiled = module.net.layer1._compiled_call_impl = lambda *given: module.net.layer1._call_impl(*given)
    trainer = Trainer(
        accelerator="cpu", max_steps=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[speed, Breaks()] if breaks else [speed],
    )  # fmt: skip
    try:
        trainer.fit(module, batches)
        assert not breaks
    except RuntimeError as error:
        assert breaks and str(error) == "no more"
    assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32) == before
    assert module.attack.fold_batchnorm and module.net.layer1._compiled_call_impl is compiled
    assert not module.net._forward_pre_hooks and module.net._compiled_call_impl is None


def test_it_is_there_by_itself(batches):
    module = StandardTraining(nets.ResNet20())
    trainer = Trainer(accelerator="cpu", max_steps=1, logger=False, enable_checkpointing=False, enable_progress_bar=False)
    trainer.fit(module, batches)
    assert sum(isinstance(callback, Speed) for callback in trainer.callbacks) == 1


class RadiusOfEach(PGDAT):
    """A radius for each sample."""

    def craft(self, batch, eps=None):
        return super().craft(batch, torch.linspace(0.05, 0.2, len(batch[0])).view(-1, 1, 1, 1))


@pytest.mark.slow
@pytest.mark.parametrize("bn_mode", ["eval", "train", "train_no_track"])
def test_a_compiled_network_learns_the_same(batches, bn_mode):
    """Traced and differentiated ahead of time; the code that inductor would write is a matter of hardware."""
    how = {"method": RadiusOfEach, "bn_mode": bn_mode}
    (compiled, module), (plain, _) = fit(batches, compile="default", backend="aot_eager", **how), fit(batches, **how)
    assert compiled.losses == pytest.approx(plain.losses, abs=1e-4)
    assert module.net._compiled_call_impl is None


def test_double_backward_refuses_a_compiled_network(batches):
    with pytest.raises(ValueError, match="compiled network cannot be differentiated twice"):
        fit(batches, method=GradAlign, norm="linf", compile="default", backend="aot_eager")


def test_an_unknown_mode_is_refused():
    with pytest.raises(ValueError, match=r"compile='fast' is no mode of torch.compile: choose one of default, reduce-overhead"):
        Speed(compile="fast")


def test_optimizers_are_left_alone_where_they_cannot_be_fused():
    weight = nn.Parameter(torch.ones(3))
    for optimizer in (SGD([weight], lr=0.1), Adam([weight], foreach=False), torch.optim.Rprop([weight])):
        before = copy.deepcopy(optimizer.state_dict())
        _fuse(optimizer)
        assert optimizer.state_dict() == before


cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


@cuda
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_recorded_passes_give_what_the_network_gives(dtype):
    """In float64, since CUDA's convolutions round float32 to TF32; and in half precision."""
    torch.manual_seed(0)
    exact = torch.float64 if dtype is None else torch.float32
    net = nets.ResNet20().cuda().eval().to(exact)
    x, y = torch.rand(8, 3, 32, 32, device="cuda", dtype=exact), torch.arange(8, device="cuda")
    attack, graphed = (PGD(8 / 255, steps=3, random_start=False, norm="l2") for _ in range(2))
    graphed.cuda_graphs = True
    # In half precision a bias that comes late is rounded less often.
    atol = 1e-5 if dtype is None else 2e-3
    with torch.autocast("cuda", dtype, enabled=dtype is not None):
        for _ in range(3):
            torch.testing.assert_close(graphed(net, x, y), attack(net, x, y), atol=atol, rtol=0)
            with torch.no_grad():
                for module in net.modules():  # weights move, and lie where they lay
                    if isinstance(module, nn.BatchNorm2d):
                        module.running_mean.add_(0.1)
                        module.weight.mul_(0.9)
        for parameter in net.parameters():  # and now elsewhere
            parameter.data = parameter.data * 0.9
        torch.testing.assert_close(graphed(net, x, y), attack(net, x, y), atol=atol, rtol=0)


@cuda
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_of_late_biases(parts, dtype):
    made = [torch.randn(3, 24, 5, 7, device="cuda", dtype=dtype).to(memory_format=torch.channels_last) for _ in range(parts)]
    bias, leaves = torch.randn(24, device="cuda", dtype=dtype), [part.requires_grad_() for part in made]
    found = Shifted(tuple(leaves), bias).relu()
    expected = (sum(part.float() for part in made) + bias.float().view(-1, 1, 1)).relu()
    torch.testing.assert_close(found.float(), expected, atol=0.02 if dtype == torch.bfloat16 else 1e-6, rtol=0.01)
    gradients = torch.autograd.grad(found.sum(), leaves)
    assert all(torch.equal(gradient, (found > 0).to(dtype)) for gradient in gradients)
    broken = Shifted((made[0].detach().index_fill(0, torch.tensor([1], device="cuda"), float("nan")),), bias).relu()
    assert broken[1].isnan().all() and broken[0].isfinite().all()


@cuda
@pytest.mark.parametrize("precision", ["64-true", "bf16-mixed"])
@pytest.mark.parametrize("method", [StandardTraining, PGDAT, TRADES])
def test_replayed_training_learns_the_same(batches, method, precision):
    """TRADES asks twice before its backward pass."""
    runs = [fit(batches, method, device="cuda", precision=precision, cuda_graphs=graphs) for graphs in (False, True)]
    (plain, module), (graphed, other) = runs
    assert graphed.losses == pytest.approx(plain.losses, abs=1e-4 if precision == "64-true" else 0.02)
    assert other.net._compiled_call_impl is None
    for before, after in zip(module.buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(after, before, atol=1e-3 if precision == "64-true" else 0.02, rtol=0.05)


@cuda
def test_replayed_passes_are_counted():
    net, passes = nets.ResNet20().cuda().eval(), []
    counter = PassCounter(net, lambda: "training")
    attack = PGD(8 / 255, steps=3)
    attack.cuda_graphs = True
    for _ in range(2):
        attack(net, torch.rand(8, 3, 32, 32, device="cuda"), torch.arange(8, device="cuda"))
        counter.settle()
        tally = counter.tallies["training"]
        passes.append((tally.forwards, tally.input_backwards))
    assert passes == [(24, 24), (48, 48)]


@cuda
def test_fused_on_cuda():
    weight = nn.Parameter(torch.ones(3, device="cuda"))
    weight.grad = torch.ones_like(weight)
    optimizer = SGD([weight], lr=0.1, momentum=0.9)
    _fuse(optimizer)
    optimizer.step()
    assert optimizer.param_groups[0]["fused"] and torch.allclose(weight, torch.full_like(weight, 0.9))
