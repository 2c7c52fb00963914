"""Low-dimensional subspaces of weight space: the span of t weight vectors, found from their t x t Gram matrix.

A vector of weights is a list of tensors, one a layer. ``layers`` is a sequence of matrices (t, n_l), the t samples of layer l
as rows, which may read each from files when it is asked for: all of them are never held at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

Storage = Literal["float32", "bfloat16", "int8"]
STORAGES: tuple[Storage, ...] = ("float32", "bfloat16", "int8")
_PIECE = 1 << 24
"""Entries that are widened at once."""


def gram(layers: Sequence[Tensor], mixing: Tensor) -> Tensor:
    """Gram matrix (d, d), in float64, of the rows ``mixing @ W``, layer by layer.

    Args:
        layers: (t, n_l) each.
        mixing: (d, t).
    """
    total = torch.zeros(len(mixing), len(mixing), dtype=torch.float64)
    for layer in layers:
        for piece in layer.split(max(_PIECE // len(layer), 1), dim=1):
            rows = mixing @ piece.double()
            total += rows @ rows.T
    return total


def orthonormal(layers: Sequence[Tensor], dim: int | None = None, centred: bool = True, cut: float = 1e-12) -> Tensor:
    """Mixing matrix A (d, t), float64, such that the rows of A W are orthonormal and span the samples, principal ones first.

    Centred, they are the principal components of the samples (the DLDR of Li et al. 2022), as those of sklearn's PCA; else the
    span of the samples themselves. Of nearly collinear samples, directions whose share of the largest eigenvalue is below
    ``cut`` are left out: they are rounding noise. So d may be below ``dim``. Reads every layer twice.

    Args:
        layers: (t, n_l) each, on the CPU.
        dim: number of directions; None takes all.
        centred: take the mean of the samples away first.
        cut: smallest eigenvalue that counts, relative to the largest.

    Raises:
        ValueError: if the samples cannot span ``dim`` dimensions.
    """
    t = len(layers[0])
    most = t - centred
    if dim is not None and not 1 <= dim <= most:
        around = " around their mean" if centred else ""
        raise ValueError(f"dim={dim}: {t} samples span at most {most} dimensions{around}: lower dim, or take more samples")
    mixing = torch.eye(t, dtype=torch.float64)
    if centred:
        mixing -= 1 / t
    # The first sample itself comes along to tell what is small.
    found = gram(layers, torch.cat([mixing, torch.eye(1, t, dtype=torch.float64)]))
    values, vectors = torch.linalg.eigh(found[:t, :t])
    values, vectors = values.flip(0), vectors.flip(1)
    if not values[0] > 1e-24 * found[t, t]:
        raise ValueError(f"the {t} samples are all the same, so they span nothing: take samples of different moments")
    kept = min(dim or most, int((values > cut * values[0]).sum()))
    mixing = (vectors[:, :kept] / values[:kept].sqrt()).T @ mixing
    # Small eigenvalues are known up to the rounding of the largest. Once more, where all are near 1, mends that.
    values, vectors = torch.linalg.eigh(gram(layers, mixing))
    return (vectors / values.sqrt()) @ vectors.T @ mixing


def normalised(layers: Sequence[Tensor]) -> Tensor:
    """Mixing matrices (L, t, t), float64, of the samples' differences from their mean, each of length 1 in each layer.

    Args:
        layers: (t, n_l) each, on the CPU.
    """
    t = len(layers[0])
    centre = torch.eye(t, dtype=torch.float64) - 1 / t
    lengths = torch.stack([gram([layer], centre).diagonal().clamp_min(0).sqrt() for layer in layers])
    # A layer that never moved has no direction: rows of zeros.
    scale = torch.where(lengths > 1e-12, 1 / lengths, 0)
    return scale.unsqueeze(2) * centre


class Subspace:
    """Directions in weight space, rows of a matrix P (d, n), stored layer by layer.

    Of several processes each may hold a share of the rows. Then :meth:`coordinates`, :meth:`combine` and :meth:`project` give
    this process's share of a sum over processes.

    Args:
        layers: samples, (t, n_l) each; read once.
        mixing: (d, t), or (L, d, t) if each layer has its own: the rows are ``mixing @ W``.
        rows: the share of the d rows to hold; None holds all.
        storage: ``float32`` (float64 where the samples are), ``bfloat16``, or ``int8`` with one scale a row and layer. Rows
            in fewer bits are not quite orthonormal.
        device: where to hold them.

    Raises:
        ValueError: if ``storage`` is unknown.
    """

    def __init__(
        self,
        layers: Sequence[Tensor],
        mixing: Tensor,
        rows: slice | None = None,
        storage: Storage = "float32",
        device: torch.device | str = "cpu",
    ) -> None:
        if storage not in STORAGES:
            raise ValueError(f"storage={storage!r} is unknown: choose one of {', '.join(STORAGES)}")
        self.dim = mixing.shape[-2]
        self.rows = slice(*(rows or slice(None)).indices(self.dim))
        self._shards: list[tuple[Tensor, Tensor | None]] = []
        own = mixing[..., self.rows, :]
        for position in range(len(layers)):
            layer, mix = layers[position], own if own.dim() == 2 else own[position]
            pieces = [mix @ piece.double() for piece in layer.split(max(_PIECE // len(layer), 1), dim=1)]
            self._shards.append(_pack([piece.to(layer.dtype) for piece in pieces], storage, device))

    @property
    def nbytes(self) -> int:
        """Memory that the rows take."""
        return sum(rows.nbytes + (0 if scale is None else scale.nbytes) for rows, scale in self._shards)

    def coordinates(self, vector: Sequence[Tensor]) -> Tensor:
        """Products (L, d) of each row with ``vector``, layer by layer; their sum over layers is P v.

        Args:
            vector: a tensor a layer.
        """
        wide = torch.promote_types(vector[0].dtype, torch.float32)
        found = vector[0].new_zeros(len(self._shards), self.dim, dtype=wide)
        for products, tensor, shard in zip(found, vector, self._shards, strict=True):
            flat, own = tensor.detach().flatten().to(wide), products[self.rows]
            for columns, piece in _widened(shard, flat.dtype):
                own += piece @ flat[columns]
        return found

    def combine(self, coordinates: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
        """The vector P^T c, a tensor a layer.

        Args:
            coordinates: (d,), or (L, d) if each layer has its own.
            like: tensors of the wanted shapes and dtypes.
        """
        found = []
        for position, (tensor, shard) in enumerate(zip(like, self._shards, strict=True)):
            own = (coordinates if coordinates.dim() == 1 else coordinates[position])[self.rows]
            flat = torch.cat([piece.T @ own for _, piece in _widened(shard, own.dtype)])
            found.append(flat.view(tensor.shape).to(tensor.dtype))
        return found

    def project(self, vector: Sequence[Tensor]) -> list[Tensor]:
        """P^T P v: the orthogonal projection, where the rows are orthonormal.

        Args:
            vector: a tensor a layer.
        """
        return self.combine(self.coordinates(vector).sum(0), vector)


def _pack(pieces: Sequence[Tensor], storage: Storage, device: torch.device | str) -> tuple[Tensor, Tensor | None]:
    rows = torch.cat(pieces, 1)
    if storage == "float32":
        return rows.to(device), None
    if storage == "bfloat16":
        return rows.to(device, torch.bfloat16), None
    scale = rows.abs().amax(1, keepdim=True).clamp_min(1e-30) / 127
    return (rows / scale).round().to(device, torch.int8), scale.to(device)


def _widened(shard: tuple[Tensor, Tensor | None], dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Pieces of columns in ``dtype``, so that of rows in fewer bits only a part is ever widened."""
    rows, scale = shard
    width = rows.shape[1] if rows.dtype == dtype else max(_PIECE // max(len(rows), 1), 1)
    for start in range(0, rows.shape[1], width):
        columns = slice(start, start + width)
        piece = rows[:, columns].to(dtype)
        yield columns, piece if scale is None else piece * scale.to(dtype)
