"""Read checkpoints without running what they carry.

A checkpoint is data: it is loaded with ``weights_only=True``, and the classes that it names are imported only from this
library, torch and timm, or where the user's own config or command line names them too.
"""

from __future__ import annotations

import importlib
import importlib.util
import pickle
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch

TRUSTED = ("robust_pl", "torch", "timm", "lightning")
CONFIG_KEY = "robust_pl_config"
_DOTTED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+\Z")


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """The content of a checkpoint, on the CPU.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is damaged, or carries objects.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"ckpt_path={path} is not a file: name a checkpoint, such as runs/NAME/checkpoints/best.ckpt")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} carries objects that are not plain weights, and loading them could run code, so it is refused: "
            "save a state dict instead"
        ) from error
    except (RuntimeError, EOFError, OSError, KeyError) as error:
        raise ValueError(f"{path} cannot be read as a checkpoint; it may be truncated: use another one") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__} and not a checkpoint")
    return content


def stored_config(checkpoint: dict[str, Any], path: str | Path, named_by_user: str = "") -> dict[str, Any]:
    """The experiment that a checkpoint was trained by, after a look at every class it names.

    Args:
        checkpoint: what :func:`read_checkpoint` returned.
        path: for messages.
        named_by_user: command line and configs of the user; a class that stands in it may be imported.

    Raises:
        ValueError: if the checkpoint holds no config, or names a class that it may not.
    """
    config = checkpoint.get(CONFIG_KEY)
    if not isinstance(config, dict):
        raise ValueError(f"{path} does not say by which experiment it was trained: pass the experiment's YAML with -c")
    check_classes(config, path, named_by_user)
    return config


def check_classes(config: Any, path: str | Path, named_by_user: str = "") -> None:
    """Refuse a stored config that names classes outside of the allowed packages.

    Raises:
        ValueError: naming the class and the remedy.
    """
    for where, name in _names(config):
        root = name.split(".")[0]
        if _stands_in(name, named_by_user):
            continue
        if root not in TRUSTED:
            raise ValueError(
                f"the checkpoint {path} names {name} for {where}, which is neither in {', '.join(TRUSTED)} nor named by you: "
                f"if you trust it, name it yourself, with -c CONFIG or --model {name}"
            )
        if not isinstance(_resolve(name), type):
            raise ValueError(f"the checkpoint {path} names {name} for {where}, which is not a class: pass the YAML with -c")


def _names(config: Any, where: str = "config", key: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(config, dict):
        for key, value in config.items():
            yield from _names(value, f"{where}.{key}", str(key))
    elif isinstance(config, list | tuple):
        for value in config:
            yield from _names(value, where, key)
    elif isinstance(config, str) and (key == "class_path" or _could_import(config)):
        yield where, config


def _could_import(text: str) -> bool:
    """Whether a string outside of ``class_path`` could be read as something to import, too: ``os.system``, say."""
    if not _DOTTED.match(text):
        return False
    try:
        return importlib.util.find_spec(text.split(".")[0]) is not None
    except (ValueError, ImportError):
        return False


def _stands_in(name: str, text: str) -> bool:
    return bool(re.search(rf"(?<![\w.]){re.escape(name)}(?![\w.])", text))


def _resolve(name: str) -> Any:
    module, _, attribute = name.rpartition(".")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError):
        return None


def user_text(arguments: Collection[str]) -> str:
    """Everything that the user wrote: the command line and the configs that it names."""
    parts = list(arguments)
    for argument in arguments:
        candidate = Path(argument.partition("=")[2] or argument)
        if candidate.suffix in (".yaml", ".yml") and candidate.is_file():
            parts.append(candidate.read_text())
    return "\n".join(parts)
