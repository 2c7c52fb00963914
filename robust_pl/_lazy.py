"""Public names of a package, imported when they are first used.

``import robust_pl`` must stay cheap: the command line already pays for Lightning.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any


def attach(package: str, exports: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """Return ``__getattr__``, ``__dir__`` and ``__all__`` for a package (PEP 562).

    Args:
        package: the package's ``__name__``.
        exports: public name -> the submodule, relative to the package, that defines it.
    """

    def get(name: str) -> Any:
        if name not in exports:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f".{exports[name]}", package), name)

    return get, lambda: sorted(exports), sorted(exports)
