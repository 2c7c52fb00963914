"""Greedy soup."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn

from ...callbacks.attacks.base import Attack
from ...nets.trajectory import Sample
from .assembled import Assembled
from .ingredients import Ingredients, read_ingredients, write


class GreedySoup(Assembled):
    """Greedy soup (Wortsman et al. 2022, arXiv 2203.05482): an equal average of those ingredients that help it.

    Ingredients are sorted by held-out accuracy; each in turn joins if the average with it is more accurate on held-out samples
    than without. Accuracy is clean, or robust where there is an attack; that is an extension of this library. The attack's
    random numbers belong to the samples, so that all candidates meet the same ones. The same validation samples choose and
    are reported, so only test accuracies are free of the choice; they must not be among those that an ingredient was trained
    on, so keep the ingredients' data settings and seed.

    Cost, with m ingredients, no training but m + (m - 1) evaluations of the validation split, each an attack and one forward
    pass a sample, and for the m - 1 averages BatchNorm's statistics: an attack and a forward pass on ``batches`` training
    batches. Two networks and one tensor of the ingredients are in memory.

    Args:
        ingredients: folder or list of weights, see :func:`.ingredients.read_ingredients`.
        skip: leave out so many of the first, such as a trajectory's beginning.
        attack: under which accuracy counts, and BatchNorm's statistics are computed again; None counts clean accuracy.
        batches: for these statistics, training batches of each process; 0 averages the ingredients' statistics instead, which
            are those of other activations than the soup's.
        net: see :class:`Method`, and so all others.

    Raises:
        ValueError: if there are fewer than two ingredients, they are not all of ``net``, or there are no validation samples.
    """

    def __init__(
        self,
        net: nn.Module,
        ingredients: Ingredients,
        attack: Attack | None = None,
        skip: int = 0,
        batches: int = 100,
        num_classes: int = 10,
    ) -> None:
        super().__init__(net, attack, batches, num_classes)
        self.ingredients, self.skip = ingredients, skip

    def check(self) -> None:
        self._samples = read_ingredients(self.ingredients, self.net, self.skip)

    def assemble(self) -> dict[str, Any]:
        scores = []
        for sample in self._samples:
            write(self.net, sample.items())
            scores.append(self.held_out_accuracy())
        order = sorted(range(len(scores)), key=lambda i: -scores[i])  # stable: of equals the first goes first
        chosen, best = order[:1], scores[order[0]]
        total = _sum({}, self._samples[order[0]])
        for i in order[1:]:
            candidate = _sum(total, self._samples[i])
            self._write_mean(candidate, len(chosen) + 1)
            score = self.held_out_accuracy()
            if score > best:
                chosen, best, total = [*chosen, i], score, candidate
        self._write_mean(total, len(chosen))
        shares = torch.zeros(len(scores), 1)
        shares[chosen] = 1 / len(chosen)
        rank_zero_info(
            f"GreedySoup: {len(chosen)} of {len(scores)} ingredients, held-out accuracy {best:.4f}, the best alone "
            f"{max(scores):.4f}"
        )
        labels = [sample.label for sample in self._samples]
        return {"ingredients": labels, "shares": shares, "chosen": chosen, "scores": scores, "score": best}

    def refresh_statistics(self) -> None:
        """Nothing to do: the soup's were computed when it was tried."""

    def _write_mean(self, total: dict[str, Tensor], count: int) -> None:
        write(self.net, ((name, t / count if t.is_floating_point() else t) for name, t in total.items()))
        if count > 1:  # one alone was judged, and is kept, with its own
            super().refresh_statistics()


def _sum(total: dict[str, Tensor], sample: Sample) -> dict[str, Tensor]:
    """Sums in float64, on the CPU; counters are the first one's."""
    found = {}
    for name, tensor in sample.items():
        wide = tensor.double() if tensor.is_floating_point() else tensor
        found[name] = wide if name not in total else total[name] + wide if tensor.is_floating_point() else total[name]
    return found
