"""Losses between embeddings of images, of their captions, and of the same object seen from elsewhere; and whose views stray.

Embeddings have shape (N, d). Omniview-Tuning is Ruan et al. 2024 (arXiv 2404.12139).
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

AnchorWeights = Literal["isolated", "mean"]
ANCHOR_WEIGHTS: tuple[str, ...] = get_args(AnchorWeights)
_NEAREST = 5
_LEAST_SIMILAR = 0.1
_CHUNK = 2**24


def image_text_contrastive(image: Tensor, text: Tensor, scale: Tensor | float) -> Tensor:
    """Symmetric cross-entropy of B pairs, a scalar, as CLIP trains (Radford et al. 2021, arXiv 2103.00020).

    ``(CE(S, diagonal) + CE(S^T, diagonal)) / 2`` with ``S = scale * image @ text^T``. A caption that comes several times in the
    batch is a negative of its own images: that adds a constant to the loss, but no gradient where its images are alike.

    Args:
        image: normalised embeddings (B, d).
        text: normalised embeddings (B, d); that of row i belongs to image i.
        scale: factor of the cosines.
    """
    logits = scale * image @ text.T
    target = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def viewpoint_alignment(image: Tensor, anchor: Tensor, chosen: Tensor, margin: float = 0.3) -> Tensor:
    """Distance of views to the anchors of their objects, a scalar: the mean over chosen rows of ``max(1 - cos + margin, 0)``.

    As ``1 - cos`` is never negative, the hinge never clips: the gradient is that of the cosine, and the margin a constant in
    the loss. The authors' code is the same; a nearest other anchor, which would make it a triplet loss, enters neither.

    Args:
        image: embeddings (B, d).
        anchor: of the object in each row, (B, d).
        chosen: bool (B,); 0.0 where no row is.
        margin: m.
    """
    distance = 1 - F.cosine_similarity(image, anchor, dim=1)
    # Not image[chosen]: the number of rows would have to be known.
    return ((distance + margin).clamp_min(0) * chosen).sum() / chosen.sum().clamp_min(1)


def anchors(views: Tensor, object: Tensor, count: int, weights: AnchorWeights = "isolated") -> Tensor:
    """Weighted means (M, d) of the views of each object; zeros where it has none. Not normalised again.

    ``isolated`` weighs a view by the reciprocal of its mean cosine to its 5 nearest other views (all others, if fewer), as the
    authors' code does: a view far from the others weighs more, which is the reverse of a density. Views of a trained encoder
    are so alike that the result is close to ``mean``. Here cosines below 0.1 count as 0.1, for one near 0 would take all the
    weight.

    Args:
        views: normalised embeddings (N, d).
        object: number of the object of each, int64 (N,).
        count: number M of objects.
        weights: ``isolated`` or ``mean``.

    Cost: ``isolated`` takes the V * V cosines of each object, in chunks of at most 16 million.
    """
    total = views.new_zeros(count, views.shape[1])
    if weights == "mean":
        sizes = torch.bincount(object, minlength=count).clamp_min(1).unsqueeze(1)
        return total.index_add(0, object, views) / sizes
    table = rows_of_objects(object, count)
    per_chunk = max(1, _CHUNK // max(table.shape[1] ** 2, 1))
    return torch.cat([_isolated(views, rows) for rows in table.split(per_chunk)]) if len(table) else total


def _isolated(views: Tensor, rows: Tensor) -> Tensor:
    """Anchors of the objects whose views are in ``rows`` (m, V), -1 where there is none."""
    there = rows >= 0
    z = views[rows.clamp_min(0)] * there.unsqueeze(2)
    cosine = z @ z.transpose(1, 2)
    itself = torch.eye(rows.shape[1], dtype=torch.bool, device=rows.device)
    cosine = cosine.masked_fill(itself | ~there.unsqueeze(1), float("-inf"))
    nearest = cosine.topk(min(_NEAREST, rows.shape[1]), dim=2).values
    known = nearest.isfinite()
    similar = nearest.masked_fill(~known, 0).sum(2) / known.sum(2).clamp_min(1)
    weight = similar.clamp_min(_LEAST_SIMILAR).reciprocal() * there
    weight = weight / weight.sum(1, keepdim=True).clamp_min(torch.finfo(weight.dtype).tiny)
    return (weight.unsqueeze(2) * z).sum(1)


def hard_views(views: Tensor, object: Tensor, anchor: Tensor, k: int) -> Tensor:
    """Which views belong to the ``k`` of their object with the lowest cosine to its anchor, bool (N,).

    Of equal ones the first. The only view of an object is never hard, since it is its own anchor.

    Args:
        views: embeddings (N, d).
        object: number of the object of each, int64 (N,).
        anchor: of each object, (M, d).
        k: views an object; all, if it has fewer.
    """
    cosine = F.cosine_similarity(views, anchor[object], dim=1)
    order = cosine.argsort(stable=True)
    order = order[object[order].argsort(stable=True)]
    sizes = torch.bincount(object, minlength=len(anchor))
    place = _place_in_object(object[order], sizes)
    hard = torch.zeros(len(object), dtype=torch.bool, device=object.device)
    hard[order] = place < k
    return hard & (sizes[object] > 1)


def rows_of_objects(object: Tensor, count: int) -> Tensor:
    """Rows of each object's views, int64 (M, V) for the V of the largest, filled up with -1."""
    order = object.argsort(stable=True)
    sizes = torch.bincount(object, minlength=count)
    table = torch.full((count, int(sizes.max()) if len(object) else 0), -1, device=object.device)
    table[object[order], _place_in_object(object[order], sizes)] = order
    return table


def _place_in_object(ordered: Tensor, sizes: Tensor) -> Tensor:
    """0, 1, ... within each run of equal objects."""
    return torch.arange(len(ordered), device=ordered.device) - (sizes.cumsum(0) - sizes)[ordered]
