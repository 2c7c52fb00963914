"""The contract of every viewpoint attack: a plain callable ``attack(model, scenes) -> Found`` that is also a callback."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from ...scenes.scene_set import SceneSet
from ...scenes.view_space import ViewSpace
from ..attacks.checks import check_count
from ..attacks.draws import seed_from
from ..attacks.prepare import prepared
from ..store.identity import describe
from .chunks import Chunks
from .distribution import ViewDistribution, space_record
from .draws import ObjectDraws
from .found import Found
from .measure import check_data, measure, report
from .problem import ViewProblem
from .search import Order, Searched, attack_chunk, facts_about, gathered, sample_seed_of, together

Watch = Callable[[str, int, float], None]
"""Told which part runs, how many objects are attacked at once, and which share is done."""
_INCIDENTAL = ("batch_size", "name", "every_n_epochs", "folder")


class ViewpointAttack(Callback, ABC):
    """Base of attacks that look for distributions of viewpoints from which a frozen classifier fails.

    A subclass defines :meth:`search`. The attack is black-box: it renders views, asks the network, and uses no gradient, also
    where the renderer has one. The network sees pixels in [0, 1], in eval mode; there is no budget but the ranges of the space.

    As a callable, ``attack(model, scenes)`` returns what it found for a :class:`robust_pl.scenes.SceneSet`. As a callback it
    attacks, at the end of validation and test, the scenes that the data module offers as ``val_scenes`` and ``test_scenes``,
    see :class:`robust_pl.callbacks.viewpoints.measure.HasScenes`. It logs, as ``val/...`` and ``test/...``:

    - ``acc_<name>``: accuracy on ``eval_samples`` fresh views of each object from its distribution.
    - ``worst_class_<name>``: the same of the class in which it is lowest.
    - ``center_acc_<name>``: at the means of the components.
    - ``worst_view_<name>``: share of objects that are right at the worst of all views that were rendered.
    - ``view_loss_<name>``: mean cross-entropy of the fresh views.
    - ``entropy_<name>``: of the distribution in nats, relative to the uniform one: 0 is all of the space, and below is less.
    - ``coverage_<name>``: fields of 30 x 15 degrees of the view sphere, of 144, that an object's fresh views fall into.
    - ``reached_<name>``: share of fresh views that the network takes for the target, if ``targeted``.
    - ``renders_per_second_<name>``: rendered and classified views a second, of one process.

    Into ``viewpoints/`` of the run folder it writes the distributions of the last validation,
    ``val_<name>/distribution.safetensors``, and for a test ``test_<name>/``: distributions and the extreme views as an
    evaluation folder, see :func:`robust_pl.callbacks.viewpoints.images.write_views`. A killed test goes on there. Several
    processes share the objects out.

    Every random number belongs to an object by its id, and objects are attacked in fixed chunks, so that what is found does
    not depend on the other objects, the number of processes or a restart; as far as the network itself does not: its
    convolutions may round otherwise in another batch.

    Args:
        space: ranges of viewpoints; None takes the ``view_space`` of the data module, or else ViewFool's ranges.
        eval_samples: fresh views of each object from the found distribution; 0 for none.
        batch_size: views rendered and classified at once.
        chunk: objects attacked together; what a process takes, and what is kept on disk.
        targeted: lead the network to a class instead of away from the label. As a callback it aims at a random other one.
        seed: of all random numbers.
        name: of the figures; None takes the class's.
        every_n_epochs: how often a fit's validation attacks: after every so many epochs.
        folder: where a run's files go; None takes ``viewpoints`` in the trainer's root folder.

    Raises:
        ValueError: if an argument is out of its range.
    """

    stages: tuple[str, ...] = ("validate", "test")
    """Where the callback takes part."""
    found: Found | None = None
    """What the last attack of a trainer found, of all processes."""
    figures: dict[str, float] | None = None
    """The figures of it."""

    def __init__(
        self,
        *,
        space: ViewSpace | None = None,
        eval_samples: int = 100,
        batch_size: int = 256,
        chunk: int = 16,
        targeted: bool = False,
        seed: int = 0,
        name: str | None = None,
        every_n_epochs: int = 1,
        folder: str | None = None,
    ) -> None:
        for field, value in (("batch_size", batch_size), ("chunk", chunk), ("every_n_epochs", every_n_epochs)):
            check_count(field, value)
        if eval_samples < 0:
            raise ValueError(f"eval_samples={eval_samples} must be at least 0")
        self.space, self.eval_samples, self.batch_size, self.chunk = space, eval_samples, batch_size, chunk
        self.targeted, self.seed, self.every_n_epochs, self.folder = targeted, seed, every_n_epochs, folder
        self.name = name or type(self).__name__.lower()

    @abstractmethod
    def search(self, problem: ViewProblem, order: Order) -> Searched:
        """Look for viewpoints: ``problem.fitness(u)`` says how bad views u (N, S, D) are, ``problem.draws`` gives numbers."""

    def space_of(self, space: ViewSpace) -> ViewSpace:
        """The space that is searched where ``space`` is asked for."""
        return space

    def __call__(
        self,
        model: nn.Module,
        scenes: SceneSet,
        y: Tensor | None = None,
        *,
        space: ViewSpace | None = None,
        start: ViewDistribution | None = None,
        iterations: int | None = None,
        eval_samples: int | None = None,
        seed: int | None = None,
        folder: str | Path | None = None,
        rank: int = 0,
        world_size: int = 1,
        watch: Watch | None = None,
    ) -> Found:
        """Attack ``model``, which maps pixels in [0, 1] to logits.

        Args:
            model: left as it was: mode, gradients and random streams.
            scenes: N objects.
            y: classes to reach, int64 (N,), if ``targeted``; else labels instead of those of the scenes.
            space: instead of the attack's own.
            start: go on from these distributions, which must hold every object; more objects may be in them.
            iterations: instead of the attack's own.
            eval_samples: instead of the attack's own.
            seed: instead of the attack's own; another one a call gives other candidates from the same start.
            folder: keep there what is finished; the same call then goes on where it was killed, to the same result.
            rank: of this process, which attacks its share of the chunks; all get what all found.
            world_size: number of processes.
            watch: told how far the attack is.

        Raises:
            ValueError: if views could lie inside of an object or miss it, labels, start and scenes do not fit together, the
                folder holds another attack, or the network's output is not what an attack can work with.
        """
        space = self.space_of(space or self.space or ViewSpace())
        labels, target = self._aims(scenes, y)
        scenes.check_space(space)
        if start is not None:
            if space_record(start.space) != space_record(space):
                raise ValueError("start is of another space of viewpoints: give space=start.space, or start anew")
            start = start.of(scenes.ids)
        seed = self.seed if seed is None else seed
        samples = self.eval_samples if eval_samples is None else eval_samples
        settings = {**self.settings(), "seed": seed, "iterations": iterations or getattr(self, "iterations", None)}
        asked: dict[str, Any] = {}
        if folder is not None:
            asked = {"attack": settings, "eval_samples": samples, "chunk": self.chunk, "space": space_record(space)}
            asked["target"] = None if target is None else target.tolist()
            asked |= facts_about(model, scenes, labels, start)
        chunks = Chunks(None if folder is None else Path(folder), asked)
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        draws = ObjectDraws(seed_from(seed, type(self).__name__), scenes.ids, device)
        pieces = {}
        firsts = range(0, len(scenes), self.chunk)[rank::world_size]
        with prepared(model, "eval"), torch.no_grad():
            problem = ViewProblem(model, scenes, labels, space, draws, self.batch_size, target)
            problem.check()
            for done, first in enumerate(firsts):
                part = problem.part(list(range(first, min(first + self.chunk, len(scenes)))))
                begin = None if start is None else start.of(part.ids).to(device)
                tell = partial(_tell, watch, len(part.ids), done, len(firsts))
                told = (begin, iterations, samples, sample_seed_of(seed), tell)
                pieces[first] = attack_chunk(self, part, chunks, first, *told)
        found = gathered(pieces, world_size)
        return together(found, scenes.ids, labels, target, space, settings, sample_seed_of(seed))

    def settings(self) -> dict[str, Any]:
        """Class and settings, as far as they change what is found."""
        return {key: value for key, value in describe(self).items() if key not in _INCIDENTAL}

    def _aims(self, scenes: SceneSet, y: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if y is not None and (y.shape != (len(scenes),) or y.dtype != torch.int64):
            raise ValueError(f"y is {y.dtype} {tuple(y.shape)} for {len(scenes)} objects: give one int64 class for each")
        if not self.targeted:
            return (scenes.labels if y is None else y.cpu()), None
        if y is None:
            raise ValueError("a targeted attack needs y, the class to reach with each object")
        return scenes.labels, y.cpu()

    # Lightning's side ------------------------------------------------------------------------------------------------

    @property
    def state_key(self) -> str:
        return f"{type(self).__qualname__}[{self.name}]"

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        check_data(trainer, self._all(trainer), stage)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        due = trainer.state.fn == "validate" or (trainer.current_epoch + 1) % self.every_n_epochs == 0
        if due and not trainer.sanity_checking and "validate" in self.stages:
            measure(trainer, pl_module, self, "validate")

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if "test" in self.stages:
            measure(trainer, pl_module, self, "test")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "validate":
            self._report(trainer, "validate")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._report(trainer, "test")

    def _all(self, trainer: Trainer) -> list[ViewpointAttack]:
        return [callback for callback in trainer.callbacks if isinstance(callback, ViewpointAttack)]

    def _report(self, trainer: Trainer, stage: str) -> None:
        """One table for all: the last one prints it."""
        if self is self._all(trainer)[-1]:
            report(trainer, self._all(trainer), stage)


def _tell(watch: Watch | None, objects: int, chunk: int, chunks: int, share: float) -> None:
    if watch is not None:
        watch("objects", objects, (chunk + share) / chunks)
