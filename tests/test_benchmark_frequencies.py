"""The frequency benchmark's own parts: one attack for two analyses, and its tables and plots from records."""

from __future__ import annotations

import torch

from benchmarks import frequencies
from benchmarks.frequencies_plot import plot_filters, plot_maps, plot_spectra
from robust_pl.callbacks import PGD
from robust_pl.nets import SmallCNN


def test_one_attack_for_filters_and_spectrum_and_what_is_printed() -> None:
    torch.manual_seed(0)
    net = SmallCNN(width=2, in_channels=3).eval()
    x, y, index = torch.rand(4, 3, 32, 32), torch.arange(4), torch.arange(4)
    filters, spectrum, heat = frequencies.analyses(4, 1)
    attack, plain = filters.attack, PGD("8/255", step_size="2/255", steps=20, random_start=True)
    plain.name = attack.name
    record = filters(net, [(x, y, index)])
    spent = attack.forwards
    assert torch.equal(attack.run(net, x, y, index=index).x_adv, plain.run(net, x, y, index=index).x_adv)
    assert spent == 4 * 20 == attack.forwards
    records = {"pgd_at": [record, spectrum(net, [(x, y, index)]), heat(net, [(x, y, index)])]}
    assert attack.forwards == spent and spectrum.attack is attack
    lines = frequencies.table(records).splitlines()
    assert lines[0] == "| network | input | r = 32 | r = 28 | r = 24 | r = 20 | r = 16 | r = 12 | r = 8 |"
    clean = [f"{100 * record.figures[f'low_{r}']:.1f}" for r in frequencies.SIZES]
    assert lines[2].split(" | ")[2:] == [*clean[:-1], f"{clean[-1]} |"] and lines[3].startswith(
        "| PGD-AT, ResNet-20 | PGD-20 |"
    )
    titles = {"pgd_at": "PGD-AT"}
    assert [len(plot(titles, records).axes) for plot in (plot_filters, plot_maps, plot_spectra)] == [4, 3, 3]
