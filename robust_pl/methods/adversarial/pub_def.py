"""PubDef: training against attacks transferred from public networks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD

from ...callbacks.attacks.base import Attack
from ...callbacks.attacks.pgd import PGD
from ...functional.losses import cross_entropy
from ...nets.frozen import Frozen
from ..base import Method, OptimizerFactory
from ..example import Example
from ..schedules import Schedule

CLEAN = "clean"
Sampler = Literal["random", "all", "top_k"]


@dataclass
class TransferredExample(Example):
    """A batch with what was transferred onto it.

    Args:
        transferred: adversarial pixels (B, n, C, H, W), from n sources for each sample; ``x_adv`` is the first of them.
        source: from which source, int64 (B, n), in the order of :attr:`PubDef.names`.
    """

    transferred: Tensor | None = None
    source: Tensor | None = None


class PubDef(Method):
    """PubDef (Sitawarin et al. 2024, arXiv 2310.17645): a defence against attacks transferred from public networks.

    NOT robust against white-box attacks, which break it nearly always: it withstands an adversary who attacks public networks
    and cannot see or ask this one. Report white-box accuracy beside that under transfer, and transfers from sources that it was
    not trained on.

    L = sum over j of pi_j * CE(f(x_j), y), j over the clean samples and those attacked on each of S frozen sources. ``random``
    attacks each sample on one source: the batch is cut into S contiguous parts, whose sources rotate from step to step, and the
    part of pi that belongs to sources is shared as they are. ``all`` attacks every sample on every source. ``top_k`` does, too,
    and keeps those k sources whose mean loss is highest, with the share of all. Clean and adversarial samples go through the
    network as one batch. The authors' dual loss CE(clean) + beta * CE(adversarial) is pi = 1 : beta; their TRADES-like,
    log-sum-exp, smoothed-weight and source-dropout losses are not here. The weights and ``top_k`` are as in their code; that
    ``random`` is their default and about as good as the others is from memory and unverified.

    The authors attack the training set once, four times over, store it and augment afterwards. Here each step attacks the
    augmented samples as it meets them, which differs from theirs in the seeds and costs more, but no disk.

    Cost: for ``random`` the attack's passes, all of them of a source and none of the network under training, and 2 forward and
    2 backward passes of that: 10 + 10 and 2 + 2 with PGD-10. For ``all`` and ``top_k`` S times the attack's, and 1 + S each.

    Args:
        sources: name -> network that maps pixels in [0, 1] to logits, such as ``TrainedNet``; frozen in place, in no optimizer,
            average or checkpoint. The authors take one of each kind of training.
        attack: transferred from the sources; PGD-10 at 8/255 by default.
        sampler: ``random``, ``all`` or ``top_k``.
        top_k: k.
        pi: weights of ``clean`` and of each source; they are divided by their sum. None weighs all alike.
        net: see :class:`Method`, and so all others.

    Raises:
        ValueError: if there is no source, its classes are others, or a value is out of range.
    """

    def __init__(
        self,
        net: nn.Module,
        sources: dict[str, nn.Module],
        attack: Attack | None = None,
        sampler: Sampler = "random",
        top_k: int = 1,
        pi: dict[str, float] | None = None,
        optimizer: OptimizerFactory = lambda params: SGD(params, lr=0.1, momentum=0.9, weight_decay=5e-4),
        schedule: Schedule | None = None,
        weights: str | None = None,
        num_classes: int = 10,
    ) -> None:
        super().__init__(net, attack, optimizer, schedule, weights, num_classes)
        if not sources or CLEAN in sources:
            raise ValueError(f"sources={list(sources)} must name at least one network, and none {CLEAN!r}")
        if any(source is net for source in sources.values()):
            raise ValueError("a source is the network under training, which cannot be frozen: pass another network")
        if sampler not in get_args(Sampler):
            raise ValueError(f"sampler={sampler!r} is unknown: choose one of {', '.join(get_args(Sampler))}")
        if not 1 <= top_k <= len(sources):
            raise ValueError(f"top_k={top_k} must lie between 1 and the number of sources, {len(sources)}")
        self.names = list(sources)
        self.sources = nn.ModuleList(Frozen(source) for source in sources.values())
        self.sampler: Sampler = sampler
        self.top_k = top_k
        self.pi = normalised(pi, (CLEAN, *self.names))
        # Not saved: it is an argument.
        self.register_buffer("shares", torch.tensor([self.pi[name] for name in self.names]), persistent=False)

    @staticmethod
    def default_attack() -> PGD:
        return PGD()

    def craft(self, batch: tuple[Tensor, ...], eps: Tensor | None = None) -> TransferredExample:
        clean = self.clean(batch)
        x, positions = clean.x, torch.arange(len(clean.x), device=clean.x.device)
        if self.sampler == "random":
            parts, turn = positions.tensor_split(len(self.sources)), self.global_step
            order = [(turn + i) % len(self.sources) for i in range(len(self.sources))]
            found = [self._transfer(s, clean, rows, eps) for s, rows in zip(order, parts, strict=True) if len(rows)]
            transferred = torch.cat(found).unsqueeze(1)
            of = torch.cat([torch.full_like(rows, s) for s, rows in zip(order, parts, strict=True)]).unsqueeze(1)
        else:
            every = range(len(self.sources))
            transferred = torch.stack([self._transfer(s, clean, slice(None), eps) for s in every], 1)
            of = torch.arange(len(self.sources), device=x.device).expand(len(x), -1)
        return TransferredExample(x, clean.y, clean.index, transferred[:, 0], transferred, of)

    def loss(self, example: TransferredExample) -> Tensor:
        x, y, of = example.x, example.y, example.source
        logits = self(torch.cat([x, example.transferred.flatten(0, 1)]))
        clean = F.cross_entropy(logits[: len(x)], y)
        each = cross_entropy(logits[len(x) :], y.repeat_interleave(of.shape[1], 0)).view(of.shape)
        share = self.shares[of]
        if self.sampler == "top_k":
            # Columns are sources here.
            share = share * torch.zeros_like(self.shares).index_fill(0, each.detach().mean(0).topk(self.top_k).indices, 1)
        # The sum of shares is 0 only where every weight of what is there is.
        adversarial = (share * each).sum() / share.sum().clamp_min(torch.finfo(share.dtype).tiny)
        return self.pi[CLEAN] * clean + (1 - self.pi[CLEAN]) * adversarial

    def _transfer(self, source: int, clean: Example, rows: Tensor | slice, eps: Tensor | None) -> Tensor:
        x = clean.x[rows]
        attacked = self.attack.run(
            self.sources[source],
            x,
            clean.y[rows],
            eps=None if eps is None else eps[rows],
            objective=self.inner_objective,
            rank=self.global_rank,
            careful=x.device.type == "cpu",
        )
        return attacked.x_adv.to(x.dtype)

    def _check_first(self, batch: tuple[Tensor, ...]) -> None:
        first = self.training and True not in self._checked
        super()._check_first(batch)
        if first:
            for name, source in zip(self.names, self.sources, strict=True):
                with torch.no_grad():
                    logits = source(batch[0][:2])
                if logits.shape[1:] != (self.num_classes,):
                    raise ValueError(
                        f"the source {name!r} returns logits of shape {tuple(logits.shape)} for two images, and there are "
                        f"{self.num_classes} classes: choose sources trained on the same data"
                    )


def normalised(pi: Mapping[str, float] | None, names: tuple[str, ...]) -> dict[str, float]:
    """Weights of ``names`` that sum to 1, all alike without ``pi``.

    Raises:
        ValueError: if names differ, a weight is negative, or sources have none.
    """
    pi = dict.fromkeys(names, 1.0) if pi is None else pi
    if set(pi) != set(names):
        raise ValueError(f"pi has weights for {', '.join(pi)}: give one for each of {', '.join(names)}")
    if min(pi.values()) < 0 or not sum(pi[name] for name in names[1:]) > 0:
        raise ValueError(f"pi={dict(pi)} must hold no negative weight, and a positive one for some source")
    return {name: pi[name] / sum(pi.values()) for name in names}
