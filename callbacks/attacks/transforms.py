"""What an iterative attack may put before the network and behind its gradient; they combine in any number and order."""

from __future__ import annotations

from torch import Tensor

from ...functional import transfer
from .problem import Problem


class Transform:
    """Changes the images that the network sees, or the gradient that comes back. A subclass overrides one of the two.

    The gradient of the images is taken through :meth:`inputs`; :meth:`gradient` then is applied to it.
    """

    is_random: bool = False
    """Whether it draws random numbers."""
    copies: int = 1
    """How many copies of the batch :meth:`inputs` makes: what the attack's passes are multiplied by."""

    def inputs(self, x: Tensor, problem: Problem) -> Tensor:
        """What the network sees instead of the images ``x``: (nB, C, H, W) -> (copies * nB, C, H, W), differentiable.

        Args:
            x: the problem's whole batch, once or n times over.
            problem: whose ``draws`` give random numbers to samples.
        """
        return x

    def gradient(self, gradient: Tensor) -> Tensor:
        """What the attack follows instead of the gradient (nB, C, H, W)."""
        return gradient

    def __repr__(self) -> str:
        """Class and settings, by which evaluations are told apart."""
        return f"{type(self).__name__}({', '.join(f'{name}={value}' for name, value in sorted(vars(self).items()))})"


class DiverseInputs(Transform):
    """DI: resizes, pads and resizes back at random (Xie et al. 2019, arXiv 1803.06978).

    Every image draws for itself, so that the outcome for a sample does not depend on its batch; public codes draw once a
    batch. They also leave out the last position of the image in its canvas, which is drawn here like all others.

    Args:
        resize_rate: side of the padded image over that of the image, above 1; at least one pixel is padded.
        prob: how often an image is changed, in [0, 1].
    """

    is_random = True

    def __init__(self, resize_rate: float = 1.1, prob: float = 0.5) -> None:
        if not 1 < resize_rate <= 4:
            raise ValueError(f"resize_rate={resize_rate} must lie in (1, 4]: 1.1 pads an image of 224 pixels to 246")
        if not 0 <= prob <= 1:
            raise ValueError(f"prob={prob} must lie in [0, 1]")
        self.resize_rate, self.prob = resize_rate, prob

    def inputs(self, x: Tensor, problem: Problem) -> Tensor:
        times = len(x) // len(problem.x)
        numbers = problem.draws.few(problem.x, 4 * times).view(-1, times, 4).transpose(0, 1).flatten(0, 1)
        return transfer.diverse(x, numbers, self.resize_rate, self.prob)


class ScaleCopies(Transform):
    """SI: the mean gradient over copies of the image, each half as bright as the last (Lin et al. 2020, arXiv 1908.06281).

    Args:
        copies: number of scales, 1 switches it off.
    """

    def __init__(self, copies: int = 5) -> None:
        if copies < 1:
            raise ValueError(f"copies={copies} must be at least 1")
        self.copies = copies

    def inputs(self, x: Tensor, problem: Problem) -> Tensor:
        return transfer.scale_copies(x, self.copies)


class Smoothing(Transform):
    """TI: convolves the gradient with a Gaussian, as if the image had been shifted about (Dong et al. 2019, arXiv 1904.02884).

    Args:
        kernel_size: side of the kernel in pixels, odd; it spans three standard deviations to either side. 1 switches it off.
    """

    def __init__(self, kernel_size: int = 15) -> None:
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size={kernel_size} must be odd and at least 1")
        self.kernel_size = kernel_size

    def gradient(self, gradient: Tensor) -> Tensor:
        return transfer.smooth(gradient, transfer.gaussian(self.kernel_size))
