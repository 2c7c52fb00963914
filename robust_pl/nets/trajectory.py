"""Read the weights that a network went through: the trajectory of a run, a folder of checkpoints, a list of references."""

from __future__ import annotations

import os
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from .reference import pick_average, places, resolve, split
from .weights import _best_prefixes, _unwrap

FOLDER = "trajectory"
"""Where :class:`robust_pl.callbacks.WeightTrajectory` writes, inside of a run's folder."""
_SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth")


def read_trajectory(
    source: str | os.PathLike[str] | Sequence[str | os.PathLike[str] | Mapping[str, Tensor]],
) -> Trajectory:
    """The weights at ``source``, in order, read only when they are asked for.

    Args:
        source: the folder of a run that was fitted with ``WeightTrajectory``; a folder of ``*.safetensors``, ``*.ckpt``,
            ``*.pt`` or ``*.pth``, taken in natural order (9 before 10); or a list of references, each ``PATH``,
            ``PATH#ema`` (that average in the checkpoint) or a mapping of names to tensors. A reference to a run's folder
            means its ``checkpoints/best.ckpt``, else ``last.ckpt``. ``FOLDER#ema`` takes that average of every file. Relative
            paths are also tried under ``ROBUST_PL_DATA``.

    Raises:
        FileNotFoundError: if there is nothing.
        ValueError: if a file is damaged, holds objects, or lacks the average.
    """
    if isinstance(source, Sequence) and not isinstance(source, str):
        if not source:
            raise ValueError("the list of weights is empty: name at least one file of weights, PATH or PATH#ema")
        return Trajectory([_open(reference) for reference in source])
    path, average = (os.fspath(source), None) if Path(source).exists() else split(source)
    folder = next((place for place in places(path) if place.exists()), None)
    if folder is None:
        raise FileNotFoundError(f"no weights at {path}: name the folder of a run with a trajectory, or of checkpoints")
    if folder.is_file():
        return Trajectory([_open(source)])
    if average is None and (folder / FOLDER).is_dir():
        folder = folder / FOLDER
    elif not _files(folder) and (folder / "checkpoints").is_dir():
        folder = folder / "checkpoints"
    files = _files(folder)
    if not files:
        raise FileNotFoundError(
            f"{folder} holds no weights ({', '.join('*' + suffix for suffix in _SUFFIXES)}): fit a run with the callback "
            "WeightTrajectory, or name a folder of checkpoints"
        )
    return Trajectory([_open(f"{file}#{average}" if average else file) for file in files])


class Sample(Mapping[str, Tensor]):
    """Named weights of one moment. Tensors are read from the file when they are asked for.

    Args:
        label: where they come from.
        tensors: by name, or a handle of a safetensors file.
        names: name here -> name there; None keeps them.
    """

    def __init__(self, label: str, tensors: Any, names: Mapping[str, str] | None = None) -> None:
        self.label, self._tensors = label, tensors
        self._names = {name: name for name in tensors.keys()} if names is None else dict(names)  # noqa: SIM118

    def __getitem__(self, name: str) -> Tensor:
        there = self._names[name]
        return self._tensors[there] if isinstance(self._tensors, Mapping) else self._tensors.get_tensor(there)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        there = self._names[name]
        found = self._tensors[there].shape if isinstance(self._tensors, Mapping) else self._tensors.get_slice(there).get_shape()
        return tuple(found)

    def renamed(self, names: Mapping[str, str]) -> Sample:
        """A view with the names that ``names`` maps from."""
        return Sample(self.label, self._tensors, {new: self._names[old] for new, old in names.items()})


class Trajectory(Sequence[Sample]):
    """Weights of several moments of one network, see :func:`read_trajectory`.

    Args:
        samples: in order.
    """

    def __init__(self, samples: Sequence[Sample]) -> None:
        self._samples = list(samples)

    @overload
    def __getitem__(self, index: int) -> Sample: ...

    @overload
    def __getitem__(self, index: slice) -> Trajectory: ...

    def __getitem__(self, index: int | slice) -> Sample | Trajectory:
        return Trajectory(self._samples[index]) if isinstance(index, slice) else self._samples[index]

    def __len__(self) -> int:
        return len(self._samples)

    def of(self, module: nn.Module) -> Trajectory:
        """The same under the names that ``module`` gives its parameters and buffers, whatever prefixes the files use.

        Every trainable parameter must be in every sample, in its shape, and beside them nothing that the network lacks; of
        buffers, those that are there are kept.

        Args:
            module: a network, or a training module that holds it.

        Raises:
            ValueError: naming the first sample of another network.
        """
        needed = {name: tuple(p.shape) for name, p in module.named_parameters() if p.requires_grad}
        wanted = {name: tuple(t.shape) for name, t in module.state_dict(keep_vars=True).items() if isinstance(t, Tensor)}
        roots = {name.partition(".")[0] for name in needed}
        root = f"{roots.pop()}." if len(roots) == 1 else ""  # beside it a training module may keep other things
        known = wanted.keys() | dict(module.named_buffers()).keys()
        matched = []
        for sample in self._samples:
            taken, put = _best_prefixes(sample, wanted)
            names = {put + name[len(taken) :]: name for name in sample if name.startswith(taken)}
            unknown = next((names[name] for name in names if name.startswith(root) and name not in known), None)
            if unknown is not None:
                raise ValueError(
                    f"{sample.label} holds {unknown}, which the network lacks: it holds the weights of another network"
                )
            names = {name: names[name] for name in wanted if name in names}
            for name, shape in needed.items():
                if name not in names:
                    raise ValueError(f"{sample.label} lacks {name}: it holds the weights of another network")
                if sample.shape(names[name]) != shape:
                    raise ValueError(
                        f"{sample.label} holds {name} of shape {sample.shape(names[name])}, and the network's is {shape}: "
                        "it holds the weights of another network"
                    )
            matched.append(sample.renamed(names))
        return Trajectory(matched)

    def layers(self, names: Sequence[str]) -> Layers:
        """The named tensors of all samples as matrices (t, n), each read when it is asked for."""
        return Layers(self._samples, names)

    def mean(self, name: str) -> Tensor:
        """Mean of one tensor over all samples, in float64 on the way."""
        total = sum(sample[name].to(torch.float64) for sample in self._samples)
        return (total / len(self)).to(_wide(self._samples[0][name]).dtype)


class Layers(Sequence[Tensor]):
    """Tensors of all samples, flat, (t, n) float32 each, or float64 if they were saved so.

    Args:
        samples: in order.
        names: of the tensors.
    """

    def __init__(self, samples: Sequence[Sample], names: Sequence[str]) -> None:
        self._samples, self._names = samples, list(names)

    def __getitem__(self, position: int) -> Tensor:  # type: ignore[override]
        return torch.stack([_wide(sample[self._names[position]]).flatten() for sample in self._samples])

    def __len__(self) -> int:
        return len(self._names)


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _files(folder: Path) -> list[Path]:
    files = [path for path in folder.iterdir() if path.is_file() and path.suffix in _SUFFIXES]
    return sorted(files, key=lambda path: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path.name)])


def _open(reference: str | os.PathLike[str] | Mapping[str, Tensor]) -> Sample:
    if isinstance(reference, Mapping):
        return Sample("a mapping", _unwrap(reference, "a mapping"))
    found = resolve(reference)
    if found.path.suffix == ".safetensors":
        if found.average is not None:
            raise ValueError(f"{found.path} holds raw weights alone: leave out #{found.average}, or name a checkpoint")
        try:
            return Sample(str(found), safe_open(found.path, "pt"))
        except SafetensorError as error:
            raise ValueError(f"{found.path} cannot be read: it is damaged or another format") from error
    checkpoint = _load(found.path)
    if found.average is not None:
        checkpoint = pick_average(checkpoint, found)
    return Sample(str(found), _unwrap(checkpoint, str(found.path)))


def _load(path: Path) -> Any:
    try:
        # Mapped, so that of a checkpoint with an optimizer's state only the tensors that are asked for are read.
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except PermissionError:
        raise
    except Exception as error:  # torch's parser meets garbage in many ways
        if isinstance(error, pickle.UnpicklingError) and "GLOBAL" in str(error):
            raise ValueError(f"{path} holds Python objects, which are never unpickled because they could run code") from error
        raise ValueError(f"{path} is no checkpoint that torch.load can read: it is damaged or another format") from error
