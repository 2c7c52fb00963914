"""Read checkpoints without running what they carry.

A checkpoint is data: it is loaded with ``weights_only=True``. What it names is imported only from robust_pl and from the
parts of torch, timm and lightning that a config needs, or where the user's own config or command line names it, too. Two
guards stand in line: :func:`check_classes` looks at the stored config and says clearly what it refuses; :func:`guarded`
closes the one door through which the config parser imports, for whatever the first did not foresee.
"""

from __future__ import annotations

import importlib
import importlib.util
import pickle
import re
from argparse import ArgumentError
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ._quick import quickly

TRUSTED = (
    "robust_pl",
    "torch.nn",
    "torch.optim",
    "timm",
    "lightning.pytorch.callbacks",
    "lightning.pytorch.loggers",
    "lightning.pytorch.plugins",
    "lightning.pytorch.profilers",
    "lightning.pytorch.strategies",
)
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
    with quickly("torch"):
        import torch

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


def stored_config(checkpoint: dict[str, Any], path: str | Path, named: Collection[str] = ()) -> dict[str, Any]:
    """The experiment that a checkpoint was trained by, after a look at every class it names.

    Args:
        checkpoint: what :func:`read_checkpoint` returned.
        path: for messages.
        named: class paths that the user named, see :func:`named_by`.

    Raises:
        ValueError: if the checkpoint holds no config, or names a class that it may not.
    """
    config = checkpoint.get(CONFIG_KEY)
    if not isinstance(config, dict):
        raise ValueError(f"{path} does not say by which experiment it was trained: pass the experiment's YAML with -c")
    check_classes(config, path, named)
    return config


def check_classes(config: Any, path: str | Path, named: Collection[str] = ()) -> None:
    """Refuse a stored config that names classes outside of the allowed packages.

    Raises:
        ValueError: naming the class and the remedy.
    """
    for where, name in _names(config):
        if name in named:
            continue
        if "${" in name or not any(name == root or name.startswith(f"{root}.") for root in TRUSTED):
            option = where.removesuffix(".class_path")
            raise ValueError(
                f"the checkpoint {path} names {name} for {option}, which is neither part of robust_pl, torch, timm or "
                f"lightning nor named by you: if you trust it, name it yourself, with -c CONFIG or --{option} {name}, or "
                f"load_model(..., named=[{name!r}])"
            )
        if not isinstance(_resolve(name), type):
            raise ValueError(f"the checkpoint {path} names {name} for {where}, which is not a class: pass the YAML with -c")


@contextmanager
def guarded(named: Collection[str] = ()) -> Iterator[None]:
    """While this lasts, the config parser imports nothing but what is trusted or ``named``."""
    from jsonargparse import _common, set_parsing_settings

    from . import fractions as fractions  # which configs hold

    before = dict(_common.parsing_settings)  # there is no public way back
    set_parsing_settings(
        instantiate_subclass_spec_in_any=False,
        import_path_denylist=["*"],
        import_path_allowlist=[*TRUSTED, *named],
    )
    try:
        yield
    except ArgumentError as error:  # what a parser that must not exit raises
        raise ValueError(f"the stored config cannot be used: {' '.join(str(error).split())}") from error
    finally:
        _common.parsing_settings.update(before)


def named_by(arguments: Sequence[str]) -> set[str]:
    """Every dotted path that the user wrote as a value: on the command line, or in the configs that it names."""
    import yaml

    found: set[str] = set()
    previous = ""
    for argument in arguments:
        option, _, value = argument.partition("=") if argument.startswith("-") else (previous, "", argument)
        previous = argument
        if option in ("--ckpt_path", "ckpt_path"):
            continue  # the name of the checkpoint's own file vouches for nothing
        if option in ("-c", "--config") and Path(value).is_file():
            found |= set(_strings(yaml.safe_load(Path(value).read_text())))
        found.add(value)
    return {text for text in found if _DOTTED.match(text)}


def _strings(config: Any) -> Iterator[str]:
    if isinstance(config, dict):
        for value in config.values():
            yield from _strings(value)
    elif isinstance(config, list):
        for value in config:
            yield from _strings(value)
    elif isinstance(config, str):
        yield config


def _names(config: Any, where: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(config, dict):
        for key, value in config.items():
            yield from _names(value, f"{where}.{key}" if where else str(key))
    elif isinstance(config, list | tuple):
        for value in config:
            yield from _names(value, where)
    elif isinstance(config, str) and (where.endswith("class_path") or "${" in config or _could_import(config)):
        yield where, config


def _could_import(text: str) -> bool:
    """Whether a string outside of ``class_path`` could be read as something to import, too: ``os.system``, say."""
    if not _DOTTED.match(text):
        return False
    try:
        return importlib.util.find_spec(text.split(".")[0]) is not None
    except (ValueError, ImportError):
        return False


def _resolve(name: str) -> Any:
    module, _, attribute = name.rpartition(".")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError):
        return None
