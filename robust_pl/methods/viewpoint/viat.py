"""VIAT: viewpoint-invariant adversarial training."""

from __future__ import annotations

import shutil
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD

from ...callbacks.attacks.checks import check_count
from ...callbacks.attacks.draws import seed_from
from ...callbacks.progress import ProgressBar, watch_attack
from ...callbacks.viewpoints.base import ViewpointAttack
from ...callbacks.viewpoints.chunks import OtherAttackError
from ...callbacks.viewpoints.distribution import space_record
from ...callbacks.viewpoints.found import Found
from ...callbacks.viewpoints.gmvfool import GMVFool
from ...callbacks.viewpoints.viewfool import ViewFool
from ...data.hashing import hash_keys, uniform
from ..base import OptimizerFactory
from ..schedules import Schedule
from .natural_views import natural_views
from .pool import DistributionPool
from .rendered_views import RenderedViews

_UPDATE, _KEY = 23, "robust_pl_viat"


class VIAT(RenderedViews):
    """VIAT (Ruan et al. 2023, arXiv 2307.10235): training on views from adversarial distributions of viewpoints.

    min_W CE(f_W(x), y) + CE(f_W(R(v)), y), v ~ p_i, where p_i, a mixture of Gaussians for each training object i, maximises
    E[CE(f_W(R(v)), y)] + lambda * H(p_i), see :class:`robust_pl.callbacks.GMVFool`.

    - Epoch ``start_epoch``: ``search`` looks for the distribution of every training object, in all its iterations. Before, the
      views are natural ones, as those of :class:`NaturalViewTraining`.
    - Each later epoch begins with the distribution of one random object of each class, ``warm_iterations`` on from where it
      was, with a new momentum; the others keep theirs.
    - Each step: see :class:`RenderedViews`. With probability ``share`` an object is seen as the distribution of another random
      object of its class says, so that what was found for one also teaches about the others.

    The authors initialise by a trained classifier; take ``weights`` for that, or ``start_epoch``. Ours by default where their
    code is not what the paper says: the camera's distance is what was drawn, where their renderer divides it away
    (``search.space.normalize_radius``); training and search see pixels of the same range (``normalize_renders``); the mean that
    the search found is the centre of the distribution, where theirs is the last best candidate (``search.center``); and the
    mixture is joint (``search.mixture``). Their 16 views beside 512 images are 3 % of a step; the default here are 16 as well,
    whatever the batch.

    The distributions are buffers, ``pool.mean`` and so on, equal on all processes and in the checkpoint. Processes share the
    objects of a search out, chunk by chunk, so choose ``search.chunk`` no larger than objects / processes. A search is kept in
    ``viewpoints/pool`` of the run folder until the next one is done: a run that was killed in its midst goes on there, to the
    same result.

    Logged where a search was made: ``train/search_renders``, of all processes; ``train/search_renders_per_second`` of one;
    ``train/search_loss``, the mean loss of the last candidates.

    Cost: a step as :class:`RenderedViews`; the first search (K - 1 + popsize) * iterations renders and forward passes for each
    object, 5,750 by default, a later epoch's 1,150 for each class.

    Args:
        net: see :class:`RenderedViews`, and so all others.
        search: GMVFool or ViewFool; of ``space`` what is trained on, too. by default GMVFool with K = 15, as the authors,
            in chunks of 4 objects. Its seed counts beside ``seed``; what concerns its evaluation does not.
        share: probability of another object's distribution.
        warm_iterations: of the search where it goes on.
        start_epoch: first epoch with a search.

    Raises:
        TypeError: if the search cannot go on from where it was.
        ValueError: if an argument is out of range, or a checkpoint holds the distributions of other objects or spaces; and see
            :class:`RenderedViews`.
    """

    def __init__(
        self,
        net: nn.Module,
        search: ViewpointAttack | None = None,
        renders: int = 16,
        share: float = 0.5,
        warm_iterations: int = 10,
        start_epoch: int = 0,
        views_per_object: int = 0,
        seed: int | None = None,
        normalize_renders: bool = True,
        optimizer: OptimizerFactory = lambda params: SGD(params, lr=0.1, momentum=0.9, weight_decay=5e-4),
        schedule: Schedule | None = None,
        weights: str | None = None,
        num_classes: int = 10,
    ) -> None:
        search = GMVFool(components=15, chunk=4) if search is None else search
        super().__init__(
            net, renders, views_per_object, search.space, seed, normalize_renders, optimizer, schedule, weights, num_classes
        )
        if not isinstance(search, GMVFool | ViewFool):
            raise TypeError(
                f"search is a {type(search).__name__}, which cannot go on from where it was: use GMVFool or ViewFool"
            )
        if search.targeted:
            raise ValueError("search.targeted=True would train towards labels that nobody chose: set it to False")
        if not 0 <= share <= 1:
            raise ValueError(f"share={share} is a probability: choose from [0, 1]")
        check_count("warm_iterations", warm_iterations)
        if start_epoch < 0:
            raise ValueError(f"start_epoch={start_epoch} must be at least 0")
        self.search, self.share, self.warm_iterations, self.start_epoch = search, share, warm_iterations, start_epoch
        self.pool = DistributionPool()
        self._updated = -1
        self._resumed: dict[str, Any] | None = None

    def sample_views(self, which: Tensor, keys: Tensor) -> Tensor:
        if self.pool.empty:
            return natural_views(self._space, keys)
        numbers = uniform(keys.view(-1, 1, 1), torch.arange(2, 2 + 2 * self._space.dim).view(2, -1))
        return self._space.squash(self.pool.draw(self.givers(which, keys), numbers))

    def givers(self, which: Tensor, keys: Tensor) -> Tensor:
        """Whose distribution objects ``which`` (M,) are seen with, int64 (M,)."""
        return torch.where(uniform(keys, 0) < self.share, self._members.another(which, uniform(keys, 1)), which)

    # The inner problem -----------------------------------------------------------------------------------------------

    def update_pool(self) -> None:
        """Bring the distributions up to this epoch: of all objects the first time, then of one of each class."""
        epoch = self.current_epoch
        rows, start, iterations = torch.arange(len(self._scenes)), None, None
        if not self.pool.empty:
            classes = torch.arange(self._members.classes)
            rows = self._members.of_class(classes, uniform(hash_keys(self._seed, _UPDATE, epoch, classes), 0))
            start, iterations = (
                self.pool.distribution(rows, [self._scenes.ids[i] for i in rows], self._space),
                self.warm_iterations,
            )
        if self.trainer.world_size > 1:
            # As DDP would before the next step: statistics of BatchNorm are those of the first process.
            for buffer in self.buffers():
                torch.distributed.broadcast(buffer, 0)
        run = partial(
            self.search,
            self,
            self._scenes.subset(rows.tolist()),
            space=self._space,
            start=start,
            iterations=iterations,
            eval_samples=0,
            seed=seed_from(self._seed, self.search.seed, epoch),
            rank=self.global_rank,
            world_size=self.trainer.world_size,
            watch=partial(watch_attack, self.trainer, type(self).__name__),
        )
        with self.trainer.precision_plugin.val_step_context():
            found = self._in_a_folder(run, f"epoch_{epoch:04d}")
        if isinstance(bar := self.trainer.progress_bar_callback, ProgressBar):
            bar.attack_bar.hide()
        self.pool.put(rows, found.distribution, epoch)
        self._updated = epoch
        if self._cache is not None:
            self._cache.forget(self._stale(rows))
        figures = {"renders": float(found.renders), "renders_per_second": found.renders_per_second}
        figures["loss"] = found.history[:, -1, 0].mean().item()
        for name, value in figures.items():
            self.log(f"train/search_{name}", value, on_step=False, on_epoch=True, batch_size=1)

    def _in_a_folder(self, run: partial[Found], name: str) -> Found:
        """Go on in the folder ``name``, ``name-2``, ... that holds this search, or begin in the first that is not there."""
        root = Path(self.trainer.strategy.broadcast(str(Path(self.trainer.default_root_dir) / "viewpoints" / "pool")))
        for number in count(1):
            folder = root / (name if number == 1 else f"{name}-{number}")
            try:
                found = run(folder=folder)
            except OtherAttackError:
                continue
            if self.global_rank == 0:
                for other in root.iterdir():
                    if other != folder:
                        shutil.rmtree(other, ignore_errors=True)
            return found
        raise AssertionError

    def _stale(self, rows: Tensor) -> Tensor:
        """Which of the views of each object are drawn from the distributions of ``rows``, bool (N, views_per_object)."""
        which, view = torch.arange(len(self._scenes)).unsqueeze(1), torch.arange(self.views_per_object)
        keys = self.view_keys(which, view)
        return torch.isin(self.givers(which.expand_as(keys), keys), rows)

    # Lightning's side ------------------------------------------------------------------------------------------------

    def on_train_start(self) -> None:
        super().on_train_start()
        here = self._identity()
        for what, there in (self._resumed or {}).items():
            if there != here[what]:
                raise ValueError(
                    f"the checkpoint's distributions of viewpoints are for other {what} than those of this run: go on with the "
                    "data and the space of the run, or start a new one from its weights with --model.init_args.weights"
                )
        self._resumed, self._updated = None, self.pool.last

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        # An epoch has no start for Lightning where a run goes on from a checkpoint that the last step of the one before wrote.
        if self.start_epoch <= self.current_epoch != self._updated:
            self.update_pool()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        if self._scenes is not None and not self.pool.empty:
            checkpoint[_KEY] = self._identity()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.pool.make_room(checkpoint["state_dict"], "pool")
        super().on_load_checkpoint(checkpoint)
        self._resumed = checkpoint.get(_KEY)

    def _identity(self) -> dict[str, Any]:
        """What the distributions in a checkpoint are of."""
        return {"objects": self._scenes.ids, "viewpoints": space_record(self._space)}
