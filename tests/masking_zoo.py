"""Networks for the tests of gradient masking: honest ones, and defences that are broken on purpose."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robust_pl.data import DigitsDataModule
from robust_pl.functional.losses import kl_divergence
from robust_pl.nets import SmallCNN

EPS = 0.1
STEPS = 4


@cache
def digits(part: str) -> tuple[Tensor, Tensor]:
    """All digits of ``train`` or ``test``."""
    data = DigitsDataModule(val_size=0, drop_last=False)
    data.prepare_data()
    data.setup("fit" if part == "train" else "test")
    batches = list(data.train_dataloader() if part == "train" else data.test_dataloader())
    return torch.cat([batch[0] for batch in batches]), torch.cat([batch[1] for batch in batches])


# Training -----------------------------------------------------------------------------------------------------------


def train(make: Callable[[], nn.Module], seed: int, epochs: int, eps: float = 0.0, trades: bool = False) -> nn.Module:
    """Standard training, or with a radius adversarial training, or TRADES with beta 6; in eval mode."""
    x, y = digits("train")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = make()
        optimizer = torch.optim.Adam(net.parameters())
        steps = epochs * (len(x) // 128)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, total_steps=steps)
        for _ in range(epochs):
            for rows in torch.randperm(len(x))[: len(x) // 128 * 128].split(128):
                loss = _loss(net, x[rows], y[rows], eps, trades)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
    optimizer.zero_grad()
    return net.eval()


def _loss(net: nn.Module, x: Tensor, y: Tensor, eps: float, trades: bool) -> Tensor:
    if not eps:
        return F.cross_entropy(net.train()(x), y)
    net.eval()
    clean = net(x).detach()
    x_adv = (x + eps * (2 * torch.rand_like(x) - 1)).clamp(0, 1)
    for _ in range(STEPS):
        x_adv.requires_grad_()
        logits = net(x_adv)
        rises = kl_divergence(logits, clean).sum() if trades else F.cross_entropy(logits, y)
        step = 2.5 * eps / STEPS * torch.autograd.grad(rises, x_adv)[0].sign()
        x_adv = torch.clamp(x_adv.detach() + step, x - eps, x + eps).clamp(0, 1)
    net.train()
    if not trades:
        return F.cross_entropy(net(x_adv), y)
    logits = net(x)
    return F.cross_entropy(logits, y) + 6 * kl_divergence(net(x_adv), logits).mean()


# Honest networks ----------------------------------------------------------------------------------------------------


class MLP(nn.Sequential):
    def __init__(self, activation: Callable[[], nn.Module] = nn.ReLU, width: int = 128, norm: bool = False) -> None:
        middle = [nn.BatchNorm1d(width)] if norm else []
        super().__init__(
            nn.Flatten(),
            nn.Linear(64, width),
            *middle,
            activation(),
            nn.Linear(width, width),
            activation(),
            nn.Linear(width, 10),
        )


def linear() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))


# name -> (network, radius at which it is audited). All but the standard ones are trained adversarially at that radius.
HONEST: dict[str, tuple[Callable[[], nn.Module], float]] = {
    "mlp_pgd_at": (lambda: train(MLP, 2, 12, EPS), EPS),
    "linear_pgd_at": (lambda: train(linear, 3, 12, EPS), EPS),
    "cnn_pgd_at": (lambda: train(lambda: SmallCNN(width=12), 0, 8, EPS), EPS),
    "cnn_trades": (lambda: train(lambda: SmallCNN(width=12), 1, 8, 0.2, trades=True), 0.2),
    "mlp_standard": (lambda: train(MLP, 4, 12), EPS),
    "cnn_standard": (lambda: train(lambda: SmallCNN(width=12), 5, 8), EPS),
}


@cache
def honest(name: str) -> nn.Module:
    return HONEST[name][0]()


# Broken defences ----------------------------------------------------------------------------------------------------


def same(x: Tensor) -> Tensor:
    return x


class Around(nn.Module):
    """A network with something before its input and after its output."""

    def __init__(self, net: nn.Module, before: Callable = same, after: Callable = same) -> None:
        super().__init__()
        self.net, self._functions = net, (before, after)

    def forward(self, x: Tensor) -> Tensor:
        before, after = self._functions
        return after(self.net(before(x)))


def quantise(x: Tensor) -> Tensor:
    return (7 * x).round() / 7


def jpeg(x: Tensor) -> Tensor:
    """Round the coefficients of the cosine transform of 8 x 8 blocks."""
    n = torch.arange(8.0)
    basis = torch.cos((2 * n + 1) * n.unsqueeze(1) * torch.pi / 16) / 2
    basis[0] /= 2**0.5
    return basis.T @ (0.4 * ((basis @ x @ basis.T) / 0.4).round()) @ basis


def straight_through(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: x + (function(x) - x).detach()


class KWinners(nn.Module):
    """Keeps the largest tenth of the activations (Xiao et al. 2020, arXiv 1905.10510)."""

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(1)
        least = flat.topk(max(1, flat.shape[1] // 10), dim=1).values[:, -1:]
        return (flat * (flat >= least)).view_as(x)


class Detached(nn.Module):
    """The features of a network, cut off from its head."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        *body, self.head = net
        self.body = nn.Sequential(*body)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).detach())


class StaysInTraining(Around):
    """BatchNorm that eval() does not reach."""

    def train(self, mode: bool = True) -> nn.Module:
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm1d):
                module.training = True
        return self


class BatchStatistics(Around):
    """BatchNorm without running statistics, in eval mode."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__(net)
        for module in net.modules():
            if isinstance(module, nn.BatchNorm1d):
                module.running_mean = module.running_var = None
                module.track_running_stats = False


class Purifies(Around):
    """Moves its input before it answers, along a gradient of its own."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            z = x.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(self.net(z).logsumexp(1).sum(), z)
        return self.net((x + 0.02 * gradient.sign()).clamp(0, 1))


class NoGradient(Around):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return self.net(x)


def standard(**settings: object) -> nn.Module:
    return train(lambda: MLP(**settings), 4, 12)


# name -> (network, flags that must be raised, whatever others are).
BROKEN: dict[str, tuple[Callable[[], nn.Module], set[str]]] = {
    "logits_times_1000": (
        lambda: Around(honest("mlp_standard"), after=lambda z: 1000 * z),
        {"zero_gradient", "unbounded_attack_fails"},
    ),
    "quantised_input": (
        lambda: Around(honest("mlp_standard"), quantise),
        {"zero_gradient", "piecewise_constant", "unbounded_attack_fails", "black_box_beats_white_box", "binarization"},
    ),
    "quantised_input_straight_through": (
        lambda: Around(honest("mlp_standard"), straight_through(quantise)),
        {"gradient_mismatch", "piecewise_constant"},
    ),
    "input_noise": (lambda: Around(honest("mlp_standard"), lambda x: x + 0.1 * torch.randn_like(x)), {"randomized"}),
    "jpeg": (
        lambda: Around(honest("mlp_standard"), jpeg),
        {"zero_gradient", "piecewise_constant", "unbounded_attack_fails", "black_box_beats_white_box", "binarization"},
    ),
    "jpeg_straight_through": (
        lambda: Around(honest("mlp_standard"), straight_through(jpeg)),
        {"gradient_mismatch", "piecewise_constant"},
    ),
    "softmax_output": (lambda: Around(honest("mlp_standard"), after=lambda z: z.softmax(1)), {"softmax_output"}),
    "detached_features": (
        lambda: Detached(honest("mlp_standard")),
        {"zero_gradient", "gradient_mismatch", "unbounded_attack_fails", "black_box_beats_white_box", "binarization"},
    ),
    "k_winners": (lambda: standard(activation=KWinners, width=256), {"black_box_beats_white_box"}),
    "train_mode_batchnorm": (lambda: StaysInTraining(standard(norm=True)), {"train_mode", "batch_dependent"}),
    "batch_statistics": (lambda: BatchStatistics(standard(norm=True)), {"batch_dependent"}),
    "optimises_at_inference": (lambda: Purifies(honest("mlp_standard")), {"runtime_optimisation"}),
    "no_gradient": (lambda: NoGradient(honest("mlp_standard")), {"zero_gradient", "gradient_mismatch"}),
    "nan_gradient": (
        lambda: Around(honest("mlp_standard"), lambda x: x + (x - x).sqrt()),
        {"zero_gradient", "gradient_mismatch"},
    ),
}
