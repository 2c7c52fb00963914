"""What a training cost, as a report shows it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

HEADINGS = ("training", "in all", "a sample")
_KINDS = {
    "forwards": "forward passes",
    "input_backwards": "backward passes to the input",
    "weight_backwards": "backward passes to the weights",
}


def cost_rows(cost: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Lines of a table, one cell for each of :data:`HEADINGS`.

    Args:
        cost: what :attr:`robust_pl.callbacks.ComputeMonitor.cost` holds.
    """
    seen = max(cost["samples"], 1)
    lines = []
    several = len(cost["networks"]) > 1
    for name, network in cost["networks"].items():
        for kind, said in _KINDS.items():
            passes = network["training"][kind]
            if passes or kind == "forwards":
                lines.append((f"{said} of {name}" if several else said, f"{passes:,}", f"{passes / seen:.4g}"))
    if cost["flops"] is not None:
        lines.append(("FLOPs", f"{cost['flops']:.4g}", f"{cost['flops'] / seen:.4g}"))
    lines.append(("seconds", f"{cost['seconds']:,.1f}", ""))
    lines.append((f"{cost['device']} hours", f"{cost['device_hours']:.4g}", ""))
    if cost["seconds"]:
        lines.append(("samples a second", f"{images_per_second(cost):,.4g}", ""))
    if cost.get("peak_memory") is not None:  # older runs do not know
        lines.append(("peak memory", f"{cost['peak_memory'] / 2**30:.2f} GiB", ""))
    return lines


def cost_note(cost: Mapping[str, Any]) -> str:
    """One sentence on what the lines do not hold."""
    samples, seconds = cost["samples"], cost["evaluation_seconds"]
    flops = cost["evaluation_flops"]
    spent = f"{seconds:,.1f} seconds" + ("" if flops is None else f" and {flops:.4g} FLOPs")
    memory = "" if cost.get("peak_memory") is None else f" Peak memory is that of {cost['peak_memory_of']}."
    return f"{samples:,} training samples, each epoch's counted. Validation and monitors took {spent} more.{memory}"


def images_per_second(cost: Mapping[str, Any]) -> float:
    """Training samples a second of training, over all processes."""
    return float(cost["samples"] / cost["seconds"])


def cost_figures(cost: Mapping[str, Any]) -> dict[str, float]:
    """The totals by name, for loggers."""
    tallies = [network["training"] for network in cost["networks"].values()]
    passes = {kind: float(sum(tally[kind] for tally in tallies)) for kind in _KINDS}
    others = ("samples", "flops", "seconds", "device_hours", "evaluation_seconds", "evaluation_flops", "peak_memory")
    found = passes | {key: float(cost[key]) for key in others if cost.get(key) is not None}
    return found | ({"images_per_second": images_per_second(cost)} if cost["seconds"] else {})
