"""Which classes of ImageNet the test sets around it have; lists of WordNet numbers that come with the package.

Classes of ImageNet are numbered in the order of their WordNet numbers, as networks have them.
"""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from typing import Literal

ClassesOf = Literal["imagenet", "imagenet_a", "imagenet_r", "objectnet"]
"""Sets with a known part of ImageNet's classes."""


@cache
def imagenet_wnids() -> tuple[str, ...]:
    """WordNet numbers of ImageNet's 1,000 classes, in the order of a network's logits."""
    return tuple(_text("imagenet_wnids.txt").split())


@cache
def class_number(wnid: str) -> int | None:
    """Number of a class of ImageNet, None if it is none."""
    return _numbers().get(wnid)


def classes_of(name: ClassesOf) -> dict[str, list[int]]:
    """Class of a set -> numbers of the classes of ImageNet that it is, in the order of the set's labels.

    - ``imagenet``: all 1,000.
    - ``imagenet_a``, ``imagenet_r``: 200 WordNet numbers each (Hendrycks et al., arXiv 1907.07174 and 2006.16241), one class
      each.
    - ``objectnet``: the 113 folders of ObjectNet (Barbu et al. 2019) whose objects ImageNet has, 125 of its classes: a chair is
      a barber chair, a folding chair or a rocking chair.
    """
    if name == "objectnet":
        return _groups("objectnet_classes.txt")
    wnids = imagenet_wnids() if name == "imagenet" else _text(f"{name}_wnids.txt").split()
    return {wnid: [_numbers()[wnid]] for wnid in wnids}


def sixteen_classes() -> dict[str, list[int]]:
    """The sixteen classes of Geirhos et al. 2019 (arXiv 1811.12231), airplane to truck -> their classes of ImageNet, 207."""
    return _groups("sixteen_classes.txt")


def _groups(file: str) -> dict[str, list[int]]:
    lines = (line.split() for line in _text(file).splitlines())
    return {name: [_numbers()[wnid] for wnid in wnids] for name, *wnids in lines}


@cache
def _numbers() -> dict[str, int]:
    return {wnid: number for number, wnid in enumerate(imagenet_wnids())}


def _text(file: str) -> str:
    return files(__package__).joinpath(file).read_text("utf-8")
