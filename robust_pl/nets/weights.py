"""Load published weights into a network, and say exactly what fitted."""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from .frozen import Frozen
from .reference import find_file, pick_average, resolve

_WRAPPER_KEYS = ("state_dict", "model_state_dict", "model", "net")
_PREFIXES = ("module.", "net.", "model.", "_orig_mod.")
_SHOWN = 3
SAFETENSORS = ".safetensors"
__all__ = ["SAFETENSORS", "Mismatch", "WeightsReport", "fill", "find_file", "load_weights", "read_tensors", "rename"]


class Mismatch(NamedTuple):
    """A tensor whose name fits and whose shape does not."""

    name: str
    in_file: tuple[int, ...]
    in_net: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.name} {self.in_file} in the file, {self.in_net} in the network"


@dataclass(frozen=True)
class WeightsReport:
    """Which tensors of a file fitted which of a network.

    Args:
        source: the file, or ``a mapping``.
        loaded: names, in the network, of the tensors that were copied.
        missing: names that the network has and the file lacks.
        unexpected: names, in the file, that the network lacks.
        mismatched: names that both have, in different shapes.
        left_out: names, in the file, that lie outside the network it contains (a training module's other parts).
    """

    source: str
    loaded: tuple[str, ...]
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    mismatched: tuple[Mismatch, ...] = ()
    left_out: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        """True if nothing is missing, unexpected or of another shape."""
        return not (self.missing or self.unexpected or self.mismatched)

    def __str__(self) -> str:
        total = len(self.loaded) + len(self.missing) + len(self.mismatched)
        text = f"{self.source}: {len(self.loaded)} of the network's {total} tensors fitted"
        for label in ("missing", "unexpected", "mismatched", "left_out"):
            names = getattr(self, label)
            if names:
                more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
                text += f"; {len(names)} {label.replace('_', ' ')}: {', '.join(map(str, names[:_SHOWN]))}{more}"
        return text


def load_weights(net: nn.Module, source: str | os.PathLike[str] | Mapping[str, Any], *, strict: bool = True) -> WeightsReport:
    """Copy the tensors of a checkpoint into ``net``, in place, and report what fitted.

    A file is read without unpickling objects and onto the CPU, wherever it was saved. Wrapping keys (``state_dict``,
    ``model``, ...) are opened, and prefixes that DataParallel, ``torch.compile`` or a training module add to the names
    are removed, on either side. A missing ``num_batches_tracked``, and a constant that the net holds with the same
    value outside its ``state_dict`` (such as ``normalize.mean``), count as fitting. Files that end in ``.safetensors`` are
    read, too.

    Args:
        net: the network to fill.
        source: a mapping of names to tensors, a file, or the folder of a run; ``PATH#ema`` is the average of that name in a
            checkpoint. A relative path is tried as it is, then under the folder in the environment variable
            ``ROBUST_PL_DATA``.
        strict: refuse, leaving ``net`` untouched, unless everything fits. Otherwise load what does.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is no checkpoint, holds objects other than tensors, lacks the average, or does not fit and
            ``strict`` is set.
    """
    if isinstance(source, Mapping):
        return fill(net, _unwrap(source, "a mapping"), "a mapping", strict=strict)
    reference = resolve(source)
    if reference.average is None:
        tensors = read_tensors(reference.path)
    else:
        tensors = _unwrap(pick_average(_read(reference.path), reference), str(reference))
    return fill(net, tensors, str(reference), strict=strict)


def fill(net: nn.Module, tensors: Mapping[str, Tensor], label: str, *, strict: bool = True) -> WeightsReport:
    """Copy named tensors into ``net``; :func:`load_weights` without the reading. ``label`` says where they come from."""
    net = net.net if isinstance(net, Frozen) else net  # which keeps its tensors out of its state_dict
    fitting, report = _compare(net, tensors, label)
    if strict and not report.fits:
        raise ValueError(f"{report}. Build the network that it was saved from, for example with its num_classes.")
    net.load_state_dict(fitting, strict=False)
    return report


def read_tensors(path: Path, part: str | None = None) -> dict[str, Tensor]:
    """The named tensors of a checkpoint file, on the CPU, with wrapping keys opened.

    Args:
        path: the file.
        part: the key to open first, where a file holds several networks.

    Raises:
        ValueError: if the file is no checkpoint, holds objects other than tensors, or lacks ``part``.
    """
    checkpoint = _read(path)
    if part is not None:
        if not isinstance(checkpoint, Mapping) or part not in checkpoint:
            raise ValueError(f"{path} lacks the key {part!r}, under which the wanted network should be: it is another file")
        checkpoint = checkpoint[part]
    return _unwrap(checkpoint, str(path))


def rename(tensors: Mapping[str, Tensor], rules: Mapping[str, str | None]) -> dict[str, Tensor]:
    """Give tensors other names, behind whatever prefixes DataParallel or a training module added.

    Args:
        tensors: by name.
        rules: name -> the new one, or None to leave the tensor out. With a dot at its end it is the beginning of names.
    """
    prefixes = re.compile(f"(?:{'|'.join(map(re.escape, _PREFIXES))})*")
    renamed = {}
    for name, tensor in tensors.items():
        start = prefixes.match(name).end()
        rest = name[start:]
        rule = next((old for old in rules if rest == old or (old.endswith(".") and rest.startswith(old))), None)
        if rule is None:
            renamed[name] = tensor
        elif (new := rules[rule]) is not None:
            renamed[name[:start] + new + rest[len(rule) :]] = tensor
    return renamed


def _read(path: Path) -> Any:
    try:
        return load_file(path) if path.suffix == SAFETENSORS else torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError:
        raise
    except Exception as error:  # torch's parser meets garbage in many ways
        if isinstance(error, pickle.UnpicklingError) and "GLOBAL" in str(error):
            raise ValueError(
                f"{path} holds Python objects, which are never unpickled because they could run code: "
                "save only its state_dict, with torch.save, where you trust the file"
            ) from error
        reader = "safetensors" if path.suffix == SAFETENSORS else "torch.load"
        raise ValueError(f"{path} is no checkpoint that {reader} can read: it is damaged or another format") from error


def _unwrap(checkpoint: Any, label: str) -> dict[str, Tensor]:
    while isinstance(checkpoint, Mapping):
        inner = next((checkpoint[k] for k in _WRAPPER_KEYS if isinstance(checkpoint.get(k), Mapping)), None)
        if inner is None:
            break
        checkpoint = inner
    if not isinstance(checkpoint, Mapping):
        raise ValueError(f"{label} holds a {type(checkpoint).__name__}, not a state_dict of named tensors")
    tensors = {str(name): value for name, value in checkpoint.items() if isinstance(value, Tensor)}
    if not tensors:
        keys = ", ".join(str(key) for key in list(checkpoint)[:5]) or "none"
        raise ValueError(f"{label} holds no tensors beside names; its keys are: {keys}. Pass the inner state_dict")
    return tensors


def _compare(net: nn.Module, tensors: Mapping[str, Tensor], label: str) -> tuple[dict[str, Tensor], WeightsReport]:
    wanted = {name: value for name, value in net.state_dict().items() if isinstance(value, Tensor)}
    file_prefix, net_prefix = _best_prefixes(tensors, wanted)
    inside = {net_prefix + n[len(file_prefix) :]: n for n in tensors if n.startswith(file_prefix)}
    constants = dict(net.named_buffers())
    fitting: dict[str, Tensor] = {}
    unexpected, mismatched = [], []
    for name, original in inside.items():
        tensor = tensors[original]
        if name not in wanted:
            if not _same_constant(constants.get(name), tensor):
                unexpected.append(original)
        elif tensor.shape != wanted[name].shape:
            mismatched.append(Mismatch(name, tuple(tensor.shape), tuple(wanted[name].shape)))
        else:
            fitting[name] = tensor
    return fitting, WeightsReport(
        source=label,
        loaded=tuple(fitting),
        missing=tuple(n for n in wanted if n not in inside and not n.endswith("num_batches_tracked")),
        unexpected=tuple(unexpected),
        mismatched=tuple(mismatched),
        left_out=tuple(n for n in tensors if not n.startswith(file_prefix)),
    )


def _best_prefixes(tensors: Iterable[str], wanted: Iterable[str]) -> tuple[str, str]:
    """Return the prefix to take off the file's names and the one to put before them, so that most names fit."""
    names, targets = list(tensors), set(wanted)

    def fits(pair: tuple[str, str]) -> int:
        taken, put = pair
        return sum(name.startswith(taken) and put + name[len(taken) :] in targets for name in names)

    pairs = [(taken, put) for taken in _prefixes(names) for put in _prefixes(targets)]
    # Of equals the first and shortest wins: leave names alone where that fits as well.
    return max(sorted(pairs, key=lambda pair: (len(pair[0]) + len(pair[1]), pair)), key=fits)


def _prefixes(names: Iterable[str]) -> set[str]:
    found = {""}
    for name in names:
        end = 0
        while (step := next((p for p in _PREFIXES if name.startswith(p, end)), None)) is not None:
            end += len(step)
            found.add(name[:end])
    return found


def _same_constant(constant: Tensor | None, tensor: Tensor) -> bool:
    if constant is None or constant.numel() != tensor.numel():
        return False
    rounded = constant.detach().cpu().to(tensor.dtype)  # as a file in half precision holds it
    return torch.allclose(rounded.float().flatten(), tensor.float().flatten())
