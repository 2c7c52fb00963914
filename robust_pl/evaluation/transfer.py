"""How well attacks made on one network fool others, beside how large their perturbations are."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import combinations

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from ..callbacks.attacks.base import Attack
from ..callbacks.attacks.prepare import evaluating
from ..callbacks.attacks.transfer import TransferEvaluation
from ..callbacks.outcome import check_names
from ..functional.perturbation import eight_bit, perturbation_sizes, saturated
from ..functional.transfer import succeeded
from .evaluate import Data, _batches, _limited

_UNEQUAL = 0.2


@dataclass(frozen=True)
class TransferRow:
    """One attack on one victim. Rates in [0, 1] count samples that were no success before the attack.

    Args:
        attack: its name; ``<name> (sign)`` is the attack with every pixel pushed to the edge of the ball.
        surrogate: name of the network that the attack was made on.
        victim: name of the network that it was tried on.
        white_box: success on the surrogate.
        black_box: success on the victim.
        l2: mean size of the perturbation.
        linf: likewise.
        saturation: mean share of the largest l2 size that the ball allows.
        samples: how many were attacked.
    """

    attack: str
    surrogate: str
    victim: str
    white_box: float
    black_box: float
    l2: float
    linf: float
    saturation: float
    samples: int


@dataclass(frozen=True)
class TransferTable:
    """What :func:`transfer_table` measured; ``print`` it for a table."""

    rows: list[TransferRow]

    def __str__(self) -> str:
        table = Table(title=f"transfer: {self.rows[0].samples} samples", title_justify="left")
        for heading in ("attack", "surrogate", "victim"):
            table.add_column(heading)
        for heading in ("white-box", "black-box", "l2", "linf", "saturation"):
            table.add_column(heading, justify="right")
        for row in self.rows:
            rates = (f"{row.white_box:.2%}", f"{row.black_box:.2%}")
            sizes = (f"{row.l2:.3f}", f"{row.linf * 255:.2f}/255", f"{row.saturation:.0%}")
            table.add_row(row.attack, row.surrogate, row.victim, *rates, *sizes)
        console = Console(width=120)
        with console.capture() as capture:
            console.print(table)
        return capture.get()


def transfer_table(
    surrogate: nn.Module,
    victims: Mapping[str, nn.Module],
    attacks: Mapping[str, Attack],
    data: Data,
    *,
    surrogate_name: str = "surrogate",
    batch_size: int = 128,
    limit: int | None = None,
    extreme: bool = False,
    round_pixels: bool = True,
) -> TransferTable:
    """Make attacks on one network and try them on others (protocol of Chen et al. 2021, arXiv 2102.10343).

    Warns if two of the attacks differ by more than 20 % in mean l2 size: at one linf radius the longer perturbation transfers
    better, so that the rates alone do not say which attack is better. Cost: the attacks' passes of the surrogate, two passes
    of the surrogate and two of each victim to judge, and two more each with ``extreme``.

    Args:
        surrogate: the network that is attacked; left as it was, like the victims.
        victims: by name; each may be on a device of its own.
        attacks: by name.
        data: as :func:`robust_pl.evaluate` takes them.
        surrogate_name: what the table calls the surrogate.
        batch_size: samples a batch where ``data`` are tensors.
        limit: only the first so many samples.
        extreme: judge also x + eps * sign(d) of each linf attack, which fills the ball: where that gains as much as one
            attack has over another, the gain is one of size.
        round_pixels: judge and measure images as a file keeps them, in 8 bits. For images that are multiples of 1/255 and an
            eps that is one this stays inside the ball.

    Raises:
        ValueError: if there is nothing to compare, or an attack refuses its input.
    """
    check_names(list(attacks))
    if not attacks or not victims:
        raise ValueError("a transfer table needs at least one attack and one victim")
    for name, attack in attacks.items():
        if isinstance(attack, TransferEvaluation):
            raise ValueError(
                f"the attack {name!r} chooses its own network: pass the attack inside of it, {type(attack).__name__}"
            )
    nets: dict[str | None, nn.Module] = {None: surrogate, **victims}
    tallies: dict[str, _Tally] = {}
    for x, y, index in _limited(_batches(data, batch_size), limit):
        clean = {key: _logits(net, x) for key, net in nets.items()}
        for name, attack in attacks.items():
            attack.name, goal = name, attack.aim(y, clean[None].shape[1], index)
            for label, x_adv in _crafted(attack, surrogate, x, goal, index, extreme).items():
                x_adv = eight_bit(x_adv) if round_pixels else x_adv
                tally = tallies.setdefault(label, _Tally())
                tally.measure(x_adv, x, attack)
                for key, net in nets.items():
                    hit = succeeded(clean[key].argmax(1), _logits(net, x_adv).argmax(1), goal, attack.targeted)
                    tally.count(key, *hit)
    if not tallies:
        raise ValueError("there is nothing to evaluate: the data hold no sample")
    _warn_of_unequal({name: tallies[name].sizes()[0] for name in attacks})
    return TransferTable(
        [
            TransferRow(label, surrogate_name, victim, tally.rate(None), tally.rate(victim), *tally.sizes(), tally.samples)
            for label, tally in tallies.items()
            for victim in victims
        ]
    )


@dataclass
class _Tally:
    """Sums over batches of one attack; the key None is the surrogate."""

    samples: int = 0
    totals: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])
    hits: Counter[str | None] = field(default_factory=Counter)
    chances: Counter[str | None] = field(default_factory=Counter)

    def measure(self, x_adv: Tensor, x: Tensor, attack: Attack) -> None:
        sums = [values.double().sum().item() for values in perturbation_sizes(x_adv, x, attack.eps, attack.norm)]
        self.totals = [total + new for total, new in zip(self.totals, sums, strict=True)]
        self.samples += len(x)

    def count(self, key: str | None, hit: Tensor, could: Tensor) -> None:
        self.hits[key] += int(hit.sum())
        self.chances[key] += int(could.sum())

    def rate(self, key: str | None) -> float:
        return self.hits[key] / max(1, self.chances[key])

    def sizes(self) -> tuple[float, float, float]:
        l2, linf, saturation = (total / self.samples for total in self.totals)
        return l2, linf, saturation


def _crafted(attack: Attack, surrogate: nn.Module, x: Tensor, goal: Tensor, index: Tensor, extreme: bool) -> dict[str, Tensor]:
    """What the table calls the images -> the images, beside ``x``."""
    device = _device(surrogate, x)
    x_adv = attack.run(surrogate, x.to(device), goal.to(device), index=index).x_adv.to(x.device)
    found = {str(attack.name): x_adv}
    if extreme and attack.norm == "linf":
        found[f"{attack.name} (sign)"] = saturated(x_adv, x, attack.eps)
    return found


def _device(net: nn.Module, x: Tensor) -> torch.device:
    return next((p.device for p in net.parameters()), x.device)


def _logits(net: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad(), evaluating(net):
        return net(x.to(_device(net, x))).to(x.device)


def _warn_of_unequal(l2: Mapping[str, float]) -> None:
    ratios = {pair: max(map(l2.get, pair)) / max(min(map(l2.get, pair)), 1e-12) for pair in combinations(l2, 2)}
    worst = max(ratios, key=ratios.get, default=None)
    if worst is not None and ratios[worst] > 1 + _UNEQUAL:
        longer, shorter = sorted(worst, key=l2.get, reverse=True)
        warnings.warn(
            f"{longer} makes perturbations {ratios[worst] - 1:.0%} longer than {shorter} in l2 ({l2[longer]:.3f} and "
            f"{l2[shorter]:.3f}), and longer ones transfer better: compare attacks at one l2 size before calling one better",
            stacklevel=3,
        )
