"""A mix of an accurate and a robust classifier, decided for each image."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .frozen import Frozen


def mix(standard: Tensor, robust: Tensor, log_alpha: Tensor, log_rest: Tensor) -> Tensor:
    """Log-probabilities of ``(1 - alpha) * softmax(standard) + alpha * softmax(robust)``, (B, K), without leaving log space.

    Args:
        standard: logits (B, K).
        robust: logits (B, K).
        log_alpha: log(alpha), (B, 1) or a scalar.
        log_rest: log(1 - alpha).
    """
    return torch.logaddexp(log_rest + standard.log_softmax(1), log_alpha + robust.log_softmax(1))


class MixedClassifier(nn.Module):
    """Adaptive smoothing (Bai, Anderson, Kim, Sojoudi 2023, arXiv 2301.12554): two frozen classifiers and who decides.

    ``log((1 - alpha) * softmax(s * standard(x)) + alpha * softmax(r * robust(x)))``, log-probabilities (B, K), which attacks
    take as logits. Without ``alpha`` a mixing network predicts gamma from what both networks computed; alpha is sigmoid(gamma)
    in train mode, and in eval mode the same squeezed into ``alpha_range``. Gradients by the image flow through it.

    The mixing network is smaller than the paper's, a ResNet on two joined feature maps of each: each tap has a branch of its
    own, of two convolutions and a mean over pixels, or one linear layer if it is a vector, and so have the log-probabilities of
    both networks, which are always read. A linear layer joins the branches; a BatchNorm without affine parameters, in train
    mode after clamping to 0.6 standard deviations around the batch's mean, and ``scale`` and ``shift`` give gamma.

    Args:
        standard: the accurate network, ``{class_path: TrainedNet, init_args: {source: runs/standard}}`` say. It is frozen, and
            stays out of checkpoints: a run loads it from its own source.
        robust: the robust network; both map pixels to logits of the same classes.
        alpha: weight of the robust network for all images, in [0, 1]: there is no mixing network, nor anything to train.
        standard_scale: s, multiplies the logits of the accurate network.
        robust_scale: r; below 1 it makes the robust network less sure.
        alpha_range: smallest and largest alpha in eval mode.
        standard_taps: names of modules in the accurate network whose outputs, (B, C, h, w) or (B, D), the mixing network reads.
        robust_taps: of the robust network.
        width: channels of the mixing network's branches.
        scale: of gamma.
        train_shift: of gamma in train mode.
        eval_shift: of gamma in eval mode.
        in_channels: the number C of image channels.
        image_size: of a black image that is sent through both networks once, to see the sizes of the taps.

    Raises:
        ValueError: if a number is out of its range, a network has no such module, or the networks' classes differ.
    """

    def __init__(
        self,
        standard: nn.Module,
        robust: nn.Module,
        alpha: float | None = None,
        standard_scale: float = 1.2,
        robust_scale: float = 0.5,
        alpha_range: tuple[float, float] = (0.84, 0.99),
        standard_taps: Sequence[str] = (),
        robust_taps: Sequence[str] = (),
        width: int = 32,
        scale: float = 2.0,
        train_shift: float = 0.4,
        eval_shift: float = 1.3,
        in_channels: int = 3,
        image_size: int = 32,
    ) -> None:
        super().__init__()
        low, high = alpha_range
        if not 0 <= low <= high <= 1:
            raise ValueError(f"alpha_range={tuple(alpha_range)} must rise inside [0, 1]")
        if alpha is not None and not 0 <= alpha <= 1:
            raise ValueError(f"alpha={alpha} is the weight of the robust network: choose from [0, 1], or null to predict it")
        if standard_scale <= 0 or robust_scale <= 0:
            raise ValueError(f"standard_scale={standard_scale} and robust_scale={robust_scale} must be above 0")
        self.standard, self.robust = Frozen(standard), Frozen(robust)
        self.alpha, self.alpha_range = alpha, (low, high)
        self.standard_scale, self.robust_scale = standard_scale, robust_scale
        self.scale, self.train_shift, self.eval_shift = scale, train_shift, eval_shift
        self._tapped = [_submodule(standard, name) for name in standard_taps]
        self._tapped += [_submodule(robust, name) for name in robust_taps]
        with torch.no_grad():
            like = next(standard.parameters(), torch.zeros(()))
            seen = self._read(torch.zeros(1, in_channels, image_size, image_size, dtype=like.dtype, device=like.device))
        if seen[0].shape != seen[1].shape:
            raise ValueError(f"standard gives {seen[0].shape[1]} logits and robust {seen[1].shape[1]}: both need the same")
        self.mixer = None if alpha is not None else Mixer([tensor.shape[1:] for tensor in seen], width)

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Log-probabilities (B, K) of pixels (B, C, H, W), and gamma (B,), None where alpha is fixed."""
        standard, robust, *taps = self._read(x)
        if self.mixer is None:
            alpha = torch.as_tensor(self.alpha, dtype=standard.dtype, device=x.device)
            return mix(standard, robust, alpha.log(), (1 - alpha).log()), None
        raw = self.mixer([standard.log_softmax(1), robust.log_softmax(1), *taps])
        gamma = self.scale * raw + (self.train_shift if self.training else self.eval_shift)
        column = gamma.unsqueeze(1)
        if self.training:
            return mix(standard, robust, F.logsigmoid(column), F.logsigmoid(-column)), gamma
        low, high = self.alpha_range
        alpha = low + (high - low) * column.sigmoid()
        return mix(standard, robust, alpha.log(), torch.log1p(-alpha)), gamma

    def forward(self, x: Tensor) -> Tensor:
        """Log-probabilities (B, K) of pixels (B, C, H, W)."""
        return self.parts(x)[0]

    def _read(self, x: Tensor) -> list[Tensor]:
        """Scaled logits of both networks (B, K), at least float32, and what the taps saw."""
        with _listening(self._tapped) as taps:
            logits = [self.standard_scale * _wide(self.standard(x)), self.robust_scale * _wide(self.robust(x))]
        return [*logits, *map(_wide, taps)]


class Mixer(nn.Module):
    """The mixing network: outputs of two classifiers to one number an image.

    Args:
        shapes: of what it reads, without the batch: (C, h, w) or (D,).
        width: channels of each branch.
    """

    def __init__(self, shapes: Sequence[torch.Size], width: int = 32) -> None:
        super().__init__()
        self.branches = nn.ModuleList(_branch(shape, width) for shape in shapes)
        self.linear = nn.Linear(width * len(shapes), 1)
        self.norm = nn.BatchNorm1d(1, affine=False)

    def forward(self, seen: Sequence[Tensor]) -> Tensor:
        """Tensors (B, ...) to one number each, (B,), of mean 0 and variance 1 over the batches of training."""
        raw = self.linear(torch.cat([branch(tensor) for branch, tensor in zip(self.branches, seen, strict=True)], 1))
        if self.training:
            mean, reach = raw.mean().detach(), 0.6 * raw.std().detach()
            raw = raw.clamp(mean - reach, mean + reach)
        return _wide(self.norm(raw)).squeeze(1)


def _branch(shape: torch.Size, width: int) -> nn.Sequential:
    if len(shape) == 1:
        return nn.Sequential(nn.Linear(shape[0], width), nn.ReLU())
    if len(shape) != 3:
        raise ValueError(f"a tap gives {tuple(shape)} for each image: choose one that gives (C, h, w) or (D,)")
    convolutions = [nn.Conv2d(shape[0], width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _submodule(net: nn.Module, name: str) -> nn.Module:
    """The module of this name in a network, or in the network that a wrapper holds as ``net``."""
    inside: nn.Module | None = net
    while isinstance(inside, nn.Module):
        if name and name in dict(inside.named_modules()):
            return inside.get_submodule(name)
        inside = getattr(inside, "net", None)
    known = [key for key, _ in net.named_modules() if key and key.count(".") < 3][:12]
    raise ValueError(f"{type(net).__name__} has no module {name!r} to tap: choose one such as {', '.join(known)}")


@contextmanager
def _listening(modules: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """What these modules return while this lasts, in their order."""
    heard: list[Tensor] = [torch.empty(0)] * len(modules)

    def keep(place: int) -> object:
        def hook(module: nn.Module, inputs: object, output: Tensor) -> None:
            heard[place] = output

        return modules[place].register_forward_hook(hook)

    handles = [keep(place) for place in range(len(modules))]
    try:
        yield heard
    finally:
        for handle in handles:
            handle.remove()
