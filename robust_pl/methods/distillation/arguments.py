"""What several distillations refuse in their arguments."""

from __future__ import annotations


def check_share(name: str, value: float) -> None:
    """Refuse what is no share."""
    if not 0 <= value <= 1:
        raise ValueError(f"{name}={value} is a share: choose from [0, 1]")


def check_temperature(temperature: float) -> None:
    """Refuse a temperature at which there is no softmax."""
    if temperature <= 0:
        raise ValueError(f"temperature={temperature} must be above 0")


def check_introspection(beta: float, begin: int) -> None:
    """Refuse a trust that grows where the teacher is wrong, and an epoch before the first."""
    for name, value in (("beta", beta), ("begin", begin)):
        if value < 0:
            raise ValueError(f"{name}={value} must be at least 0")
