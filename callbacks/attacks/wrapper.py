"""The base of attacks that let another attack work, under other conditions."""

from __future__ import annotations

from torch import Tensor

from .base import Attack, ObjectiveName
from .problem import Objective, Problem


class Wrapper(Attack):
    """An attack that runs another one; radius, norm, target, objective and seed are those of the other.

    Args:
        attack: the other one.

    Raises:
        ValueError: if the other attack must see training data first, or brings its own network.
    """

    def __init__(self, attack: Attack) -> None:
        name = type(attack).__name__
        if attack.must_fit:
            raise ValueError(f"attack={name} must see training data first and cannot run inside of {type(self).__name__}")
        if isinstance(attack, Wrapper) and type(attack).run is not Attack.run:
            raise ValueError(f"attack={name} chooses its own network: put {type(self).__name__} inside of {name} instead")
        if type(attack).run is not Attack.run:
            raise ValueError(
                f"attack={name} cannot run inside of {type(self).__name__}: choose one of its parts, such as APGD, or for a "
                "random network AutoAttack(version='rand') by itself"
            )
        super().__init__(
            0.0,
            norm=attack.norm,
            random_start=attack.random_start,
            targeted=attack.targeted,
            objective=attack.objective,
            bn_mode=attack.bn_mode,
            seed=attack.seed,
        )
        self.attack = attack
        self.per_sample = attack.per_sample
        self.eps = attack.eps  # which may be infinite, where the smallest perturbation is looked for

    @property
    def is_random(self) -> bool:
        return self.attack.is_random

    def seen_by_attack(self, problem: Problem) -> Problem:
        """What the other attack works on instead of ``problem``."""
        return problem

    def perturb(self, problem: Problem, x: Tensor, y: Tensor) -> Tensor:
        return self.attack.attempt(self.seen_by_attack(problem))

    def _objective(self, problem: Problem, callers: ObjectiveName | Objective | None) -> Objective:
        return self.attack._objective(self.seen_by_attack(problem), callers)
