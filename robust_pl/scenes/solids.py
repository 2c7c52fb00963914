"""Ten classes of procedural textured solids: a data set of objects that needs no download."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from .mesh import Mesh
from .paint import Numbers, random_picture

SOLIDS = ("box", "cylinder", "cone", "torus", "capsule", "mug", "chair", "table", "car", "letter")
"""Names of the classes."""

_SHAPE, _PAINT = 1, 2


def make_solid(kind: str | int, seed: int) -> Mesh:
    """A random object of a class, upright, its front towards -y, its farthest vertex at distance 1 from the origin.

    Proportions are a function of the class and the seed, texture and colours one of the seed alone: what an object is made of
    says nothing about its class. Every part is closed and its faces look outwards. From some sides classes look alike: a
    cylinder, a cone and a capsule from below and above, a chair and a table from below, a letter, a table and a box from above.

    Args:
        kind: a name of ``SOLIDS`` or its index.
        seed: any integer that fits 64 bits.

    Raises:
        ValueError: for an unknown class.
    """
    if isinstance(kind, str) and kind not in SOLIDS:
        raise ValueError(f"kind={kind!r} is no solid: choose from {', '.join(SOLIDS)}")
    if isinstance(kind, int) and not 0 <= kind < len(SOLIDS):
        raise ValueError(f"kind={kind} is no solid: choose from 0 to {len(SOLIDS) - 1}")
    from .solid_shapes import SHAPES

    number = SOLIDS.index(kind) if isinstance(kind, str) else kind
    shape = SHAPES[SOLIDS[number]](Numbers(seed, _SHAPE, number))
    vertices, faces = (torch.from_numpy(np.array(part)) for part in (shape.vertices, shape.faces))
    mesh = Mesh(vertices, faces).fitted()
    paint = Numbers(seed, _PAINT)
    return Mesh(
        mesh.vertices, mesh.faces, normals=mesh.normals, uv=_box_projection(mesh, paint), textures=[random_picture(paint)]
    )


def _box_projection(mesh: Mesh, draw: Numbers) -> Tensor:
    """Texture coordinates by corner (F, 3, 2): the two axes that a face turns away from least, turned, scaled and shifted.

    Parts that overlap in a plane so get the same colours there.
    """
    corners = mesh.vertices[mesh.faces]
    normal = torch.linalg.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    axes = torch.tensor([[1, 2], [0, 2], [0, 1]])[normal.abs().round(decimals=5).argmax(1)]
    flat = corners.gather(2, axes.unsqueeze(1).expand(-1, 3, -1))
    angle, scale, shift = draw(0, math.pi), draw(0.7, 1.5), torch.tensor([draw(), draw()], dtype=torch.float32)
    turn = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    return scale * flat @ turn.T + shift
