"""What a user sees when something is wrong: one line that names the field, the value and the remedy."""

from __future__ import annotations

import difflib
import importlib
import inspect
import re
from collections.abc import Iterable

# Lines in which the parser lists what the value is not; the line that matters stands between them.
_NOISE = re.compile(
    r"Expected a <class|Expected a path but|Does not validate against|Subtypes:|Errors:|Given value|Parser key|"
    r"Problem with given class_path|Expected a Callable|Expected a List|Expected a dict|Expected type|validation failed"
)
_PACKAGES = ("methods", "callbacks", "data", "nets")


def public_names() -> list[str]:
    """Every short name that a config may use for a class of this library."""
    names: list[str] = []
    for package in _PACKAGES:
        names += importlib.import_module(f"robust_pl.{package}").__all__
    return names


def _nearest(word: str, known: Iterable[str]) -> str:
    lower = {name.lower(): name for name in known}
    close = difflib.get_close_matches(word.lower(), lower, n=1, cutoff=0.5)
    return f": did you mean {lower[close[0]]}?" if close else ""


def one_line(message: str) -> str:
    """The sentence that matters in a parser's message of many lines, with the field it is about."""
    message = message.strip()
    if "\n" not in message and not message.startswith("Parser key"):
        return message
    field = _field(message)
    where = f"{field}: " if field else ""
    if found := re.search(r"Expected a dot import path string: (\S+)", message):
        name = found.group(1).rsplit(".", 1)[-1]
        real = [line for line in _leaves(message) if "dot import path" not in line and name not in line]
        if not real:
            hint = _nearest(name, public_names())
            return f"{where}{name!r} is not a known class{hint or ', nor the dotted path of one: check the spelling'}"
    if found := re.search(r"Option '(\S+?)' is not accepted", message):
        option = found.group(1)
        owner = re.findall(r"class_path '([\w.]+)'", message)
        hint = _nearest(option.rsplit(".", 1)[-1], arguments_of(owner[-1])) if owner else ""
        return f"{where}{owner[-1].rsplit('.', 1)[-1] if owner else 'this'} has no argument {option!r}{hint}"
    leaves = [line for line in _leaves(message) if "dot import path" not in line]
    return where + (leaves[0] if leaves else " ".join(message.split()))


def _field(message: str) -> str:
    key = re.search(r'Parser key "([^"]+)"', message)
    nested = re.search(r"NestedArg\(key='([^']+)'", message)
    if key and nested and not key.group(1).endswith(nested.group(1)):
        return f"{key.group(1)}.{nested.group(1)}"
    return key.group(1) if key else ""


def _leaves(message: str) -> list[str]:
    lines = (re.sub(r"^(- )?(Not of type \w+: )?", "", line.strip()) for line in message.splitlines())
    return [line for line in lines if line and not _NOISE.search(line)]


def arguments_of(class_path: str) -> list[str]:
    """Names of the arguments that a class takes; none if there is no such class."""
    module, _, name = class_path.rpartition(".")
    try:
        return list(inspect.signature(getattr(importlib.import_module(module), name)).parameters)
    except (ImportError, AttributeError, ValueError):
        return []
