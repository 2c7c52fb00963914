"""robust_pl: train, attack and measure robust vision models with Lightning."""

from __future__ import annotations

from pathlib import Path

from ._lazy import attach

__version__ = "0.1.0"

# In a checkout `callbacks/` and `configs/` lie beside this package, and a wheel installs them inside it.
# Python puts a checkout on sys.path before the installed copy, so the checkout must find them itself.
_root = Path(__file__).resolve().parent.parent
if (_root / "setup.cfg").is_file() and (_root / "callbacks").is_dir():
    __path__.append(str(_root))

__getattr__, __dir__, __all__ = attach(
    __name__,
    {"evaluate": "evaluation.evaluate", "load_model": "evaluation.loading"},
)
