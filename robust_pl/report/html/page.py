"""The page: one file that holds all it needs, and asks no network for anything."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from typing import Any

from ...metrics.effective_robustness import Baseline
from .accuracy import accuracy_sections, class_sections
from .analyses import analysis_sections
from .blocks import Section, anchored
from .run import Run
from .settings import config_sections, overview_section, setting_section
from .shifts import shift_sections
from .training import cost_sections, training_sections
from .views import view_sections


def as_page(runs: Sequence[Run], title: str = "Robustness report", baselines: Mapping[str, Baseline] | None = None) -> str:
    """HTML over everything that the runs measured, side by side.

    Args:
        runs: at least one.
        title: of the page.
        baselines: data set -> accuracies to be expected under that shift, for effective robustness.

    Raises:
        ImportError: if plotly or jinja2 are not installed.
        ValueError: if there is no run.
    """
    if not runs:
        raise ValueError("there is nothing to report: name at least one run, such as runs/quickstart")
    environment = _environment()
    scripts = [_plotly(), (files(__package__) / "templates" / "page.js").read_text(encoding="utf-8")]
    sections = anchored(_sections(runs, baselines or {}))
    # The browser runs these two scripts, known by their sums, and no other, whatever a name or a config may hold.
    sums = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    return environment.get_template("page.html.j2").render(
        title=title,
        runs=runs,
        sections=sections,
        style=(files(__package__) / "templates" / "style.css").read_text(encoding="utf-8"),
        scripts=scripts,
        sums=sums,
    )


def _sections(runs: Sequence[Run], baselines: Mapping[str, Baseline]) -> list[Section]:
    return [
        overview_section(runs),
        *accuracy_sections(runs),
        *class_sections(runs),
        *shift_sections(runs, baselines),
        *analysis_sections(runs),
        *view_sections(runs),
        *cost_sections(runs),
        *training_sections(runs),
        *config_sections(runs),
        setting_section(runs),
    ]


def _environment() -> Any:
    try:
        from jinja2 import Environment, PackageLoader, StrictUndefined
    except ImportError as error:
        raise _missing("jinja2") from error
    loader = PackageLoader(__package__, "templates")
    return Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)


@cache
def _plotly() -> str:
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise _missing("plotly") from error
    return str(get_plotlyjs())


def _missing(name: str) -> ImportError:
    return ImportError(f"robust-pl report needs {name}, which is not installed: pip install 'robust_pl[report]'")
