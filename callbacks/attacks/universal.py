"""The base of universal attacks: one perturbation for all images."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...functional import geometry
from ...functional.geometry import Norm
from ...functional.ratio import Ratio
from ...functional.universal import fooling_rate
from .base import Attack
from .checks import COMPLAINTS, Number, check_count, outside_box
from .draws import StreamDraws, seed_from
from .problem import Problem

UNIVERSAL_EPS = Ratio("10/255")
Update = Callable[[Tensor, Tensor], Tensor]


class UniversalAttack(Attack):
    """An attack that learns one perturbation from training data, and then adds it to every image.

    A subclass defines :meth:`learner`. :meth:`fit` passes over the data ``epochs`` times; after each pass it measures the
    share of images whose prediction changes, on the same data, since it is given no others (two forward passes an image),
    and keeps the best perturbation. :meth:`perturb` adds it and clips to ball and box; labels are not used, and no pass over
    the network is made. What fitting spent is in ``fit_forwards`` and ``fit_backwards``, summed over images.

    An evaluation with a data module fits it to the training set first. To fit it elsewhere, to another network, say, call
    ``fit_to(model, loader)`` and set ``fitted = True``, or :meth:`save` it and name the file.

    Args:
        eps: radius, one number for all images: the perturbation is at most so large before the box clips it.
        epochs: passes over the data.
        enough: stop after a pass at whose end this share of the images is fooled.
        norm: which ball.
        perturbation: file that :meth:`save` wrote, to be used instead of fitting.
        seed: of the start, where that is random.

    Raises:
        ValueError: if an argument is out of its range, or the file holds no perturbation.
    """

    start_size: ClassVar[float] = 0.0
    """The first perturbation is uniform between minus and plus so much."""
    delta: Tensor | None = None
    """The perturbation (1, C, H, W)."""
    rate: float | None = None
    """Share of the data it was fitted to that it fools."""

    def __init__(
        self,
        eps: Number | Tensor,
        epochs: int,
        enough: float,
        *,
        norm: Norm = "linf",
        perturbation: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(eps, norm=norm, seed=seed)
        check_count("epochs", epochs)
        if not 0 < enough <= 1:
            raise ValueError(f"enough={enough} must be above 0 and at most 1: it is the share of images to fool")
        self.epochs, self.enough = epochs, enough
        self.fit_forwards = self.fit_backwards = 0
        self.perturbation, self._given = perturbation, perturbation is not None
        if perturbation is not None:
            self.load(perturbation)

    @abstractmethod
    def learner(self, model: nn.Module, delta: Tensor) -> Update:
        """A function ``(x, delta) -> delta`` that improves the perturbation by one batch; called once, before the first.

        Args:
            model: the network.
            delta: where to start.
        """

    @property
    def must_fit(self) -> bool:
        """Whether an evaluation must fit it first: no file was given."""
        return not self._given

    def fit(self, model: nn.Module, data: Iterable[Any]) -> None:
        """Learn the perturbation; :meth:`fit_to` does so with the network prepared.

        Args:
            model: maps pixels in [0, 1] to logits; in eval mode.
            data: batches x, (x, y) or (x, y, index), which can be passed over several times, such as a loader.

        Raises:
            ValueError: if eps is not one number, or a pass over ``data`` finds no batch.
        """
        if isinstance(self.eps, Tensor) and self.eps.numel() > 1:
            raise ValueError("a universal perturbation has one radius: set eps to a number, such as 10/255")
        self.fit_forwards = self.fit_backwards = 0
        self.delta, self.rate = None, None
        delta: Tensor | None = None
        learn: Update | None = None
        for _ in range(self.epochs):
            for x in self._images(model, data):
                if learn is None:
                    if outside_box(x):
                        raise ValueError(COMPLAINTS["input"].format(attack=type(self).__name__, found=" to fit to"))
                    delta = self._start(x[:1])
                    learn = self.learner(model, delta)
                delta = self.inside(learn(x, delta).detach())
            if delta is None:
                raise ValueError("there is nothing to fit to: the data hold no batch")
            rate = self._rate(model, data, delta)
            if self.rate is None or rate > self.rate:
                self.delta, self.rate = delta.clone(), rate
            if rate >= self.enough:
                break

    def fitted_state(self) -> dict[str, Tensor]:
        """The perturbation, the share of the data that it fools, and what fitting spent."""
        spent = torch.tensor([self.fit_forwards, self.fit_backwards])
        return {"delta": self.delta, "rate": torch.tensor(self.rate, dtype=torch.float64), "spent": spent}

    def load_fitted_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on with what :meth:`fitted_state` gave."""
        self.delta, self.rate = state["delta"], state["rate"].item()
        self.fit_forwards, self.fit_backwards = state["spent"].tolist()

    def perturb(self, problem: Problem, x: Tensor, y: Tensor) -> Tensor:
        if self.delta is None:
            raise ValueError(
                f"{type(self).__name__} has no perturbation yet: call fit_to(model, loader) or name a file with perturbation="
            )
        if self.delta.shape[1:] != x.shape[1:]:
            learnt, given = tuple(self.delta.shape[1:]), tuple(x.shape[1:])
            raise ValueError(f"the perturbation is {learnt} and the images are {given}: fit it to such images")
        return problem.project(x + self.delta.to(x))

    def save(self, path: str) -> None:
        """Write the perturbation to a file, as ``torch.save`` does."""
        if self.delta is None:
            raise ValueError(f"{type(self).__name__} has no perturbation to save yet: call fit_to(model, loader)")
        torch.save({"delta": self.delta.cpu()}, path)

    def load(self, path: str) -> None:
        """Use the perturbation of a file that :meth:`save` wrote; an evaluation then need not fit."""
        found = torch.load(path, map_location="cpu", weights_only=True)
        delta = found.get("delta") if isinstance(found, dict) else None
        if not isinstance(delta, Tensor) or delta.dim() != 4 or len(delta) != 1 or not delta.isfinite().all():
            raise ValueError(f"{path} holds no universal perturbation: name a file that save() of such an attack wrote")
        self.delta, self._given = delta, True

    # For subclasses --------------------------------------------------------------------------------------------------

    def inside(self, delta: Tensor) -> Tensor:
        """The perturbation cut, or for l2 and l1 scaled, to at most eps."""
        if self.norm == "linf":
            return delta.clamp(-self.eps, self.eps)
        size = geometry.size(delta, self.norm).clamp(min=1e-12).view(-1, 1, 1, 1)
        return delta * (self.eps / size).clamp(max=1.0)

    def adam(self, delta: Tensor, lr: float, weight_decay: float, loss: Callable[[Tensor, Tensor], Tensor]) -> Update:
        """A learner by Adam's steps on ``loss(x, delta)``, which also counts a backward pass of each image."""
        variable = nn.Parameter(delta.clone())
        optimizer = torch.optim.Adam([variable], lr=lr, weight_decay=weight_decay)

        def update(x: Tensor, delta: Tensor) -> Tensor:
            variable.data.copy_(delta)
            (variable.grad,) = torch.autograd.grad(loss(x, variable), variable)
            self.fit_backwards += len(x)
            optimizer.step()
            return variable

        return update

    def logits(self, model: nn.Module, x: Tensor) -> Tensor:
        """Logits (B, K): one forward pass of each image, in the precision of the network."""
        self.fit_forwards += len(x)
        return model(x.to(home(model).dtype))

    def predictions(self, model: nn.Module, x: Tensor) -> Tensor:
        """Predicted classes (B,): one forward pass of each image."""
        with torch.no_grad():
            return self.logits(model, x).argmax(1)

    def _start(self, like: Tensor) -> Tensor:
        draws = StreamDraws(seed_from(self.seed, type(self).__name__), like.device)
        return self.inside(self.start_size * (2 * draws.uniform(like) - 1))

    def _rate(self, model: nn.Module, data: Iterable[Any], delta: Tensor) -> float:
        clean, attacked = [], []
        for x in self._images(model, data):
            clean.append(self.predictions(model, x))
            attacked.append(self.predictions(model, (x + delta).clamp(0.0, 1.0)))
        if not clean:
            raise ValueError("the data can be passed over only once: give a loader or a list of batches")
        return fooling_rate(torch.cat(clean), torch.cat(attacked)).item()

    def _images(self, model: nn.Module, data: Iterable[Any]) -> Iterator[Tensor]:
        for batch in data:
            x = batch if isinstance(batch, Tensor) else batch[0]
            yield x.detach().to(home(model).device, torch.promote_types(x.dtype, torch.float32))


def home(model: nn.Module) -> Tensor:
    """A tensor on the device and in the precision of the network."""
    return next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
