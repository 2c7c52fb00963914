"""One linf PGD by ours, by the plain loop of ``benchmarks/lean.py`` and by each peer, behind one call: attack(x, y) -> x_adv.

Each is called as its documentation shows, and pays for what it does then: foolbox returns whether each sample is fooled (one
forward pass more), ART takes and returns numpy arrays and logs how many are (two more).
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import numpy as np
import torch
from torch import Tensor, nn

from robust_pl.callbacks import PGD

from . import lean
from .environment import Packages

# foolbox imports GitPython for its downloads, which else refuses a machine without git.
os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
Attack = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Budget:
    """What every side may do: linf radius, step size, number of steps. All start at a random point of the ball."""

    eps: float
    step_size: float
    steps: int


def by_ours(net: nn.Module, budget: Budget, x: Tensor) -> Attack:
    """What a user of this library writes."""
    attack = PGD(budget.eps, budget.step_size, budget.steps)
    return lambda x, y: attack(net, x, y)


def by_hand(net: nn.Module, budget: Budget, x: Tensor) -> Attack:
    """The plain loop, which asks for frozen parameters."""
    net.requires_grad_(False)
    return lambda x, y: lean.pgd(net, x, y, budget.eps, budget.step_size, budget.steps)


def by_torchattacks(net: nn.Module, budget: Budget, x: Tensor) -> Attack:
    """By torchattacks (Kim 2020, arXiv 2010.01950)."""
    import torchattacks

    return torchattacks.PGD(net, eps=budget.eps, alpha=budget.step_size, steps=budget.steps, random_start=True)


def by_foolbox(net: nn.Module, budget: Budget, x: Tensor) -> Attack:
    """By foolbox (Rauber et al. 2017, arXiv 1707.04131)."""
    import foolbox

    model = foolbox.PyTorchModel(net, bounds=(0, 1), device=x.device)
    attack = foolbox.attacks.LinfPGD(abs_stepsize=budget.step_size, steps=budget.steps, random_start=True)
    return lambda x, y: attack(model, x, y, epsilons=budget.eps)[1]


def by_art(net: nn.Module, budget: Budget, x: Tensor) -> Attack:
    """By ART, the Adversarial Robustness Toolbox (Nicolae et al. 2018, arXiv 1807.01069)."""
    from art.attacks.evasion import ProjectedGradientDescent
    from art.estimators.classification import PyTorchClassifier

    with torch.no_grad():
        classes = net(x[:1]).shape[1]
    classifier = PyTorchClassifier(
        net,
        loss=nn.CrossEntropyLoss(),
        input_shape=tuple(x.shape[1:]),
        nb_classes=classes,
        clip_values=(0.0, 1.0),
        device_type="gpu" if x.device.type == "cuda" else "cpu",
    )
    attack = ProjectedGradientDescent(
        classifier,
        norm=np.inf,
        eps=budget.eps,
        eps_step=budget.step_size,
        max_iter=budget.steps,
        num_random_init=1,
        batch_size=len(x),
        verbose=False,
    )
    return lambda x, y: torch.from_numpy(attack.generate(x=x.cpu().numpy(), y=y.cpu().numpy())).to(x.device)


@dataclass(frozen=True)
class Peer:
    """A package that attacks, too.

    Args:
        package: name and version at the registry; this version's calls were checked.
        module: what is imported.
        build: makes the attack.
        least: by how many times ours is to be faster, in CPU time at the defaults.
        alone: installed without what it asks for.
    """

    package: str
    module: str
    build: Callable[[nn.Module, Budget, Tensor], Attack]
    least: float
    alone: bool = False

    def missing(self) -> str | None:
        """Why it cannot be used here, or None."""
        try:
            importlib.import_module(self.module)
        except Exception as error:  # a binary that does not fit to torch raises more than ImportError
            return f"import {self.module}: {error}"
        return None

    def version(self) -> str:
        """As installed."""
        try:
            return version(self.package.split("==")[0])
        except PackageNotFoundError:
            return "unknown"


PEERS = {
    "torchattacks": Peer("torchattacks==3.5.1", "torchattacks", by_torchattacks, least=1.2, alone=True),
    "foolbox": Peer("foolbox==3.3.4", "foolbox", by_foolbox, least=1.8),
    "art": Peer("adversarial-robustness-toolbox==1.20.1", "art.attacks.evasion", by_art, least=1.8),
}
PACKAGES = [Packages((peer.package,), peer.alone) for peer in PEERS.values()]
