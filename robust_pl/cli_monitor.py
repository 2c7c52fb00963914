"""Which metric chooses the best checkpoint."""

from __future__ import annotations

from collections.abc import Sequence

from lightning.pytorch import Callback

from .callbacks import Attack
from .callbacks.weights.averaging import MAX, WeightAverage
from .metrics.scoreboard import HIGHER_IS_BETTER

_KINDS = (*HIGHER_IS_BETTER, "nsd")


def choose_monitor(
    asked: str | None, attacks: Sequence[str], callbacks: Sequence[Callback], more_to_come: bool, averages_too: bool = True
) -> str:
    """``run.monitor``, or what it is by default.

    Args:
        asked: what the user names.
        attacks: names of the attacks in validation.
        callbacks: those of the trainer.
        more_to_come: whether the method adds callbacks of its own.
        averages_too: whether averaged weights are evaluated.

    Raises:
        ValueError: if that metric will never be logged, or its highest value is its worst.
    """
    attacked = attacks or any(isinstance(callback, Attack) for callback in callbacks)
    monitor = asked or ("val/acc_worst" if attacked else "val/acc_clean")
    averages = [callback.name for callback in callbacks if isinstance(callback, WeightAverage)]
    prefix, _, figure = monitor.partition("/")
    name = prefix.removeprefix("val_")
    averaged, highest = name != prefix, prefix == f"val_{MAX}"
    if averaged and not averages_too:
        raise ValueError(f"run.monitor={monitor!r} needs averaged weights evaluated: set evaluation.averages to true")
    if highest and not averages and not more_to_come:
        raise ValueError(
            f"run.monitor={monitor!r} is the higher figure of raw and averaged weights, and there is no average: add one to "
            f"trainer.callbacks, such as EMA, or take val/{figure}"
        )
    if averaged and not highest and name not in averages and not more_to_come:
        raise ValueError(f"run.monitor={monitor!r} needs the average {name!r}: add one to trainer.callbacks, such as EMA")
    if asked and not attacked and monitor.endswith("worst"):
        raise ValueError(f"run.monitor={monitor} needs an attack in validation: name one with --attacks")
    kind = next((kind for kind in _KINDS if f"/{kind}_" in monitor), None)
    if kind == "nsd":
        raise ValueError(
            f"run.monitor={monitor!r} is better the smaller, and the best checkpoint is that of the highest figure: "
            f"take {monitor.replace('/nsd_', '/fair_')}, accuracy plus worst class"
        )
    if highest and kind is None:
        better = ", ".join(f"val_{MAX}/{kind}_..." for kind in HIGHER_IS_BETTER)
        raise ValueError(f"run.monitor={monitor!r} will never be logged: choose one of what is better the higher, {better}")
    prefixes = ("val", *(f"val_{average}" for average in (*averages, *([MAX] if averages else []))))
    known = [f"{place}/{kind}_{attack}" for place in prefixes for attack in ("clean", *attacks, "worst")]
    others = any(not isinstance(callback, WeightAverage) for callback in callbacks)
    if kind and prefix in prefixes and not others and monitor not in known:
        raise ValueError(f"run.monitor={monitor!r} will never be logged: choose one of {', '.join(known)}")
    return monitor
