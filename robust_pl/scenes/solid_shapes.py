"""The shapes of the procedural solids, made by trimesh, whose import takes a while."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import trimesh
from trimesh import Trimesh
from trimesh.creation import box, capsule, cone, cylinder, revolve, torus

from .paint import Numbers

_SECTIONS = 48


def _block(low: Sequence[float], high: Sequence[float]) -> Trimesh:
    return box(bounds=[low, high])


def _box(draw: Numbers) -> Trimesh:
    return box([draw(0.5, 1), draw(0.5, 1), draw(0.5, 1)])


def _cylinder(draw: Numbers) -> Trimesh:
    return cylinder(0.5, draw(0.8, 1.8), sections=_SECTIONS)


def _cone(draw: Numbers) -> Trimesh:
    return cone(0.5, draw(0.8, 1.8), sections=_SECTIONS)


def _torus(draw: Numbers) -> Trimesh:
    return torus(0.5, draw(0.12, 0.24), major_sections=_SECTIONS, minor_sections=_SECTIONS // 2)


def _capsule(draw: Numbers) -> Trimesh:
    return capsule(draw(0.5, 1.3), 0.4, count=[_SECTIONS // 2, _SECTIONS // 2])


def _mug(draw: Numbers) -> Trimesh:
    """A cup turned on a lathe, and a tube as handle that ends within its wall."""
    radius, height, wall = draw(0.35, 0.5), draw(0.8, 1.1), draw(0.06, 0.09)
    outside = [[0, 0], [radius, 0], [radius, height]]
    inside = [[radius - wall, height], [radius - wall, wall], [0, wall]]
    cup = revolve(np.array(outside + inside), sections=_SECTIONS)
    reach, half, bend = draw(0.25, 0.4), draw(0.25, 0.35) * height, np.linspace(0, math.pi, 17)
    path = np.stack([radius - wall / 2 + reach * np.sin(bend), 0 * bend, height / 2 + half * np.cos(bend)], 1)
    return _join(cup, _tube(path, draw(0.05, 0.08)))


def _legs(draw: Numbers, width: float, depth: float, height: float) -> list[Trimesh]:
    """Four legs from z = 0 below the corners of a plate, a little inside."""
    thick = draw(0.06, 0.1)
    x, y = width / 2 - thick, depth / 2 - thick
    corners = [(i * x, j * y) for i in (-1, 1) for j in (-1, 1)]
    return [_block([a - thick / 2, b - thick / 2, 0], [a + thick / 2, b + thick / 2, height]) for a, b in corners]


def _chair(draw: Numbers) -> Trimesh:
    width, depth, seat, back = draw(0.45, 0.6), draw(0.45, 0.6), draw(0.4, 0.55), draw(0.4, 0.6)
    plate, x, y = draw(0.05, 0.1), width / 2, depth / 2
    parts = [*_legs(draw, width, depth, seat), _block([-x, -y, seat], [x, y, seat + plate])]
    rest = plate if draw() < 0.5 else 0.0
    if rest:
        parts.append(_block([-x, y - rest, seat], [x, y, seat + back]))
    else:  # two posts and two boards
        post = 0.08
        parts += [_block([a, y - post, seat], [a + post, y, seat + back]) for a in (-x, x - post)]
        parts += [_block([-x, y - post, seat + back * a], [x, y, seat + back * (a + 0.2)]) for a in (0.4, 0.8)]
    return _join(*parts)


def _table(draw: Numbers) -> Trimesh:
    width, depth, height, plate = draw(0.8, 1.2), draw(0.6, 0.9), draw(0.5, 0.7), draw(0.05, 0.1)
    if draw() < 0.6:
        top = _block([-width / 2, -depth / 2, height], [width / 2, depth / 2, height + plate])
        return _join(top, *_legs(draw, width, depth, height))
    radius = draw(0.04, 0.08)
    top, pillar, foot = (cylinder(r, h, sections=_SECTIONS) for r, h in ((width / 2, plate), (radius, height), (0.3, plate)))
    top.apply_translation([0, 0, height])
    pillar.apply_translation([0, 0, height / 2])
    return _join(top, pillar, foot)


def _car(draw: Numbers) -> Trimesh:
    """A body, a cabin that narrows upwards, four wheels; it drives along x."""
    length, width, body, cabin = draw(1.0, 1.4), draw(0.45, 0.6), draw(0.18, 0.28), draw(0.15, 0.25)
    wheel = draw(0.1, 0.14)
    lower = _block([-length / 2, -width / 2, wheel], [length / 2, width / 2, wheel + body])
    front, rear = draw(0.05, 0.2) * length, draw(0.25, 0.45) * length
    upper = _block([-rear, -0.45 * width, wheel + body], [front, 0.45 * width, wheel + body + cabin])
    roof = upper.vertices[:, 2] > wheel + body
    upper.vertices[roof] = (upper.vertices[roof] - [(front - rear) / 2, 0, 0]) * [0.7, 0.85, 1] + [(front - rear) / 2, 0, 0]
    parts = [lower, upper]
    for x in (-0.3 * length, 0.3 * length):
        for y in (-width / 2, width / 2):
            axle = [[x, y - 0.05, wheel], [x, y + 0.05, wheel]]
            parts.append(cylinder(wheel, segment=axle, sections=24))
    return _join(*parts)


_STROKES = {  # left, bottom, right, top in units of the letter, with t the thickness of a stroke
    "E": lambda t: [(0, 0, t, 1), (0, 0, 1, t), (0, 1 - t, 1, 1), (0, (1 - t) / 2, 0.8, (1 + t) / 2)],
    "F": lambda t: [(0, 0, t, 1), (0, 1 - t, 1, 1), (0, (1 - t) / 2, 0.8, (1 + t) / 2)],
    "H": lambda t: [(0, 0, t, 1), (1 - t, 0, 1, 1), (0, (1 - t) / 2, 1, (1 + t) / 2)],
    "L": lambda t: [(0, 0, t, 1), (0, 0, 1, t)],
    "T": lambda t: [((1 - t) / 2, 0, (1 + t) / 2, 1), (0, 1 - t, 1, 1)],
    "U": lambda t: [(0, 0, t, 1), (1 - t, 0, 1, 1), (0, 0, 1, t)],
}


def _letter(draw: Numbers) -> Trimesh:
    """A block letter of strokes that are boxes, to be read from -y."""
    strokes = list(_STROKES.values())[draw.below(len(_STROKES))](draw(0.18, 0.28))
    width, depth = draw(0.6, 0.9), draw(0.2, 0.4)
    return _join(*(_block([a * width, 0, b], [c * width, depth, d]) for a, b, c, d in strokes))


SHAPES: dict[str, Callable[[Numbers], Trimesh]] = {
    "box": _box,
    "cylinder": _cylinder,
    "cone": _cone,
    "torus": _torus,
    "capsule": _capsule,
    "mug": _mug,
    "chair": _chair,
    "table": _table,
    "car": _car,
    "letter": _letter,
}
"""Name of a class -> a random object of it."""


def _join(*parts: Trimesh) -> Trimesh:
    return trimesh.util.concatenate(list(parts))


def _tube(path: np.ndarray, radius: float, sections: int = 16) -> Trimesh:
    """A closed tube around a path (P, 3) in a plane y = const."""
    along = np.gradient(path, axis=0)
    along /= np.linalg.norm(along, axis=1, keepdims=True)
    beside = np.cross(along, [0.0, 1.0, 0.0])
    angle = np.linspace(0, 2 * math.pi, sections, endpoint=False)
    ring = np.cos(angle)[:, None] * beside[:, None] + np.sin(angle)[:, None] * np.array([0.0, 1.0, 0.0])
    rings = (path[:, None] + radius * ring).reshape(-1, 3)
    this, here = np.meshgrid(np.arange(len(path) - 1) * sections, np.arange(sections), indexing="ij")
    a, b = (this + here).ravel(), (this + (here + 1) % sections).ravel()
    c, d = a + sections, b + sections
    start, end = len(rings), len(rings) + 1
    near, far = np.arange(sections), (len(path) - 1) * sections + np.arange(sections)
    faces = np.concatenate(
        [
            np.stack([a, c, b], 1),
            np.stack([b, c, d], 1),
            np.stack([np.full(sections, start), near, np.roll(near, -1)], 1),
            np.stack([np.full(sections, end), np.roll(far, -1), far], 1),
        ]
    )
    tube = Trimesh(np.concatenate([rings, path[[0, -1]]]), faces, process=False)
    if tube.volume < 0:
        tube.invert()
    return tube
