"""What a user sees when something is wrong: one line that names the field, the value and the remedy."""

from __future__ import annotations

import difflib
import importlib
import inspect
import re
from collections.abc import Iterable, Sequence

# Lines in which the parser lists what the value is not; the line that matters stands between them.
_NOISE = re.compile(
    r"Expected a (<class|path but|dot import|Callable|List|dict)|Expected type|Does not validate against|Subtypes:|"
    r"Errors:|Given value|Parser key|Problem with given class_path|validation failed"
)
_PACKAGES = ("methods", "callbacks", "data", "nets")


def public_names() -> list[str]:
    """Every short name that a config may use for a class of this library."""
    return [name for package in _PACKAGES for name in importlib.import_module(f"robust_pl.{package}").__all__]


def arguments_of(class_path: str) -> list[str]:
    """Names of the arguments that a config may give a class, also through its ``**kwargs``; none if there is no such class."""
    from jsonargparse._parameter_resolvers import get_signature_parameters

    module, _, name = class_path.rpartition(".")
    try:
        return [p.name for p in get_signature_parameters(getattr(importlib.import_module(module), name), "__init__")]
    except (ImportError, AttributeError, ValueError):
        return []


def one_line(message: str, arguments: Sequence[str] = ()) -> str:
    """The sentence that matters in a parser's message of many lines, with the field it is about.

    Args:
        message: of the parser, or of any other error.
        arguments: the command line; the parser often names only the last part of a field, and this tells the rest.
    """
    message = message.strip()
    if found := re.search(r"found duplicate key (\S+)", message):
        line = re.findall(r"line (\d+)", message)[-1]
        return f"the config has {found[1]!r} twice in one map (again in line {line}): give each its own name"
    if found := re.search(r"Option '(\S+?)' is not accepted", message):
        return _unknown_argument(found[1], message, arguments)
    if "arguments are required" in message and "model" in message:
        return f"{message}: name an experiment, such as -c configs/quickstart.yaml"
    keys = re.findall(r'Parser key "([^"]+)"', message)
    if not keys and "\n" not in message:
        return message
    field = _full_field(keys[-1], arguments) if keys else ""
    value = (re.findall(r"Given value: (.*)", message) or re.findall(r"Got value: (\S+)", message) or [""])[0].strip()
    if specific := re.findall(r"Not of type \w+: (.*)", message):
        return f"{field}: {specific[0]}"
    if choices := re.search(r"Literal\[(.*?)\]", message):
        return f"{field}={value!r} is unknown: choose one of {choices[1].replace(chr(39), '')}"
    leaves = [re.sub(r"^- ", "", line) for line in map(str.strip, message.splitlines())]
    leaves = [line for line in leaves if line and not _NOISE.search(line)]
    if missing := re.search(r"Problem with given class_path '([^']+)'", message):
        where = f"{field}: " if field else ""  # what fails when it is built, and not when it is read, has no field
        return f"{where}cannot use {missing[1]}: {leaves[0] if leaves else 'check the spelling'}"
    if found := re.search(r"Expected a dot import path string: (\S+)", message):
        name = found[1].rsplit(".", 1)[-1]
        if name in public_names():
            return f"{field}={found[1]!r} is no class of the kind that is needed there: see the docstring of what takes it"
        hint = _nearest(name, public_names())
        return f"{field}={found[1]!r} is not a known class{hint or ', nor the dotted path of one: check the spelling'}"
    if leaves:
        return f"{field}: {leaves[0]}" if field else leaves[0]
    expected = dict.fromkeys(re.findall(r"Expected a <class '([\w.]+)'>", message))
    if expected:
        kinds = " or ".join(kind.replace("NoneType", "null") for kind in expected)
        return f"{field}={value!r} is not a valid value: expected {kinds}"
    text = " ".join(re.sub(r'Parser key "[^"]+":', "", message).split())
    return f"{field}: {text}" if field else text


def _unknown_argument(name: str, message: str, arguments: Sequence[str]) -> str:
    owners = re.findall(r"class_path '([\w.]+)'", message)
    leaf = name.rsplit(".", 1)[-1]
    known = set(arguments_of(owners[-1])) if owners else set()
    if not known:
        from . import callbacks, data, methods, nets

        packages = (callbacks, data, methods, nets)
        classes = [getattr(package, public) for package in packages for public in package.__all__]
        known = {argument for cls in classes for argument in inspect.signature(cls).parameters}
    owner = f"{owners[-1].rsplit('.', 1)[-1]} has" if owners else "there is"
    return f"{_full_field(name, arguments)}: {owner} no argument {leaf!r}{_nearest(leaf, known - {leaf})}"


def _full_field(key: str, arguments: Sequence[str]) -> str:
    """The option of the command line that ends with this key, if there is one."""
    for argument in reversed(arguments):
        option = argument.partition("=")[0]
        if option.startswith("--") and (option[2:] == key or option.endswith(f".{key}")):
            return option[2:]
    options = [a.partition("=")[0][2:] for a in arguments if a.startswith(f"--{key}.")]
    return options[-1] if options else key


def _nearest(word: str, known: Iterable[str]) -> str:
    lower = {name.lower(): name for name in known}
    close = difflib.get_close_matches(word.lower(), lower, n=1, cutoff=0.5)
    return f": did you mean {lower[close[0]]}?" if close else ""
