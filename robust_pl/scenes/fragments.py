"""Which pixels a triangle covers and which triangle is nearest there, for many triangles in many views at once.

A face is turned into fragments by its edge functions in homogeneous coordinates (Olano and Greer 1997): with its corners
v_0, v_1, v_2 in the camera, x right and y down in pixels from the middle of the image at depth 1, z forwards, they are

    e_k(x, y) = A_k x + B_k y + C_k,  (A, B, C)_k = v_i x v_j,  (i, j, k) a cyclic permutation,

times the sign of the volume v_0 . (v_1 x v_2), and the point (x, y) lies inside where none is negative. That holds for faces
that cross the plane of the camera, too: nothing is clipped. In a row, y is fixed, and e_k >= 0 bounds x from one side: that
gives the first and the last pixel, and no pixel outside is ever tested. Neighbours have the same functions on their common
edge bit for bit, up to the sign, and pixels on it belong to both: there are no cracks. e_k / (e_0 + e_1 + e_2) are the
weights of the corners in space, correct in perspective, and 1 / z = (e_0 + e_1 + e_2) / volume.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

NEAR = 1e-3
"""Nothing nearer than this in front of a camera is seen, in units of the scene."""
FRAGMENTS = 1 << 18
"""About how many fragments a CPU holds at a time, of some 100 bytes: few enough for its caches."""
MARGIN = 1e-3
"""Pixels by which bounds are widened against rounding, so that the edges alone decide what lies inside."""


class Faces(NamedTuple):
    """M faces, each in one of several views."""

    edges: Tensor  # (9, M): A of the three edges, then B, then C
    bounds: Tensor  # (4, M): left, right, top and bottom, in pixels from the middle; nothing to draw where left > right
    depth: Tensor  # (3, M): 1 / z = a x + b y + c
    nearness: Tensor  # (2, M): smallest and largest 1 / z
    side: Tensor  # (M,): 1 where the front is seen, -1 where the back is
    view: Tensor  # (M,): in which view
    face: Tensor  # (M,): which face of the mesh

    @staticmethod
    def of(corners: Tensor, view: Tensor, face: Tensor) -> Faces:
        """Of corners in the camera, (coordinate, corner, M)."""
        edges = []
        for i, j in ((1, 2), (2, 0), (0, 1)):
            # v_i x v_j as the middle times the difference: exactly opposite for the neighbour, and without cancellation.
            middle, along = (corners[:, i] + corners[:, j]) * 0.5, corners[:, j] - corners[:, i]
            edges.append(_cross(middle, along))
        x, y, z = corners
        normal = _cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
        volume = normal[0] * x[0] + normal[1] * y[0] + normal[2] * z[0]
        turned = volume.sign()
        whole = (z > NEAR).all(0)
        near = 1 / z.clamp(min=NEAR)
        u, v = x * near, y * near
        bounds = torch.stack([u.amin(0), u.amax(0), v.amin(0), v.amax(0)])
        everywhere = bounds.new_tensor([-torch.inf, torch.inf, -torch.inf, torch.inf]).unsqueeze(1)
        bounds = torch.where(whole, bounds, everywhere)
        # Also where the pose is not finite; such a face is nowhere.
        drawn = (z > NEAR).any(0) & (volume.abs() > 0) & (volume.abs() < torch.inf)
        bounds = torch.where(drawn, bounds, -everywhere)
        nearness = torch.stack([torch.where(whole, near.amin(0), 0.0), torch.where(whole, near.amax(0), torch.inf)])
        return Faces(torch.stack(edges, 1).flatten(0, 1) * turned, bounds, normal / volume, nearness, -turned, view, face)

    def weights(self, which: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """Shares (3, S) of the corners in points of faces (S,), pixels from the middle (S,)."""
        edges = self.edges.index_select(1, which)
        inside = (edges[:3] * x + edges[3:6] * y + edges[6:]).clamp(min=0.0)
        return inside / (inside[0] + inside[1] + inside[2]).clamp(min=torch.finfo(inside.dtype).tiny)

    def nearest(self, views: int, height: int, width: int) -> Tensor:
        """What each pixel centre sees, int64 (views * height * width,): 0 for nothing, else see :func:`face_of`.

        The upper half holds the bits of 1 / z, which as positive floats sort like integers, the lower one the number of the
        face: one maximum finds both, and between equals the same face wins always.
        """
        seen = torch.zeros(views * height * width, dtype=torch.int64, device=self.view.device)
        left, right, top, bottom = self.bounds
        shift = (height - 1) / 2
        first = (top + (shift - MARGIN)).clamp(0, height).ceil().long()
        last = (bottom + (shift + MARGIN)).clamp(-1, height - 1).floor().long()
        aside = (left > right) | (left > width / 2) | (right < -width / 2)
        for face, step in _expanded((last - first + 1).clamp(min=0).masked_fill(aside, 0)):
            row = first.index_select(0, face) + step
            y = row - shift
            begin, count = self._spans(face, y, width)
            start = (self.view.index_select(0, face) * height + row) * width
            a, b, c = self.depth.index_select(1, face)
            slope = torch.stack([a, b * y + c, *self.nearness.index_select(1, face)])
            for line, column in _expanded(count):
                column += begin.index_select(0, line)
                a, c, low, high = slope.index_select(1, line)
                # Seen at a grazing angle the plane may leave the range of its corners by rounding.
                near = (a * (column - (width - 1) / 2) + c).clamp(low, high)
                key = (near.view(torch.int32).long() << 32) | face.index_select(0, line)
                seen.scatter_reduce_(0, column.add_(start.index_select(0, line)), key.masked_fill_(near > 1 / NEAR, 0), "amax")
        return seen

    def _spans(self, face: Tensor, y: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """First column and number of columns, (L,) each, that faces cover in rows."""
        edges = self.edges.index_select(1, face)
        slope, rest = edges[:3], edges[3:6] * y + edges[6:]
        cut = -rest / slope
        low = torch.where(slope > 0, cut, -torch.inf)
        high = torch.where(slope < 0, cut, torch.inf)
        low = torch.where((slope == 0) & (rest < 0), torch.inf, low)
        left, right = self.bounds[:2].index_select(1, face)
        low = torch.maximum(torch.maximum(low[0], low[1]), torch.maximum(low[2], left - MARGIN))
        high = torch.minimum(torch.minimum(high[0], high[1]), torch.minimum(high[2], right + MARGIN))
        shift = (width - 1) / 2
        begin = (low + shift).clamp(0, width).ceil().long()
        end = (high + shift).clamp(-1, width - 1).floor().long()
        return begin, (end - begin + 1).clamp(min=0)


def at_once(device: torch.device) -> int:
    """About how many fragments, faces or pixels to hold at a time."""
    return FRAGMENTS if device.type == "cpu" else 32 * FRAGMENTS


def face_of(seen: Tensor) -> Tensor:
    """Number of the face, in :class:`Faces`, of what a pixel sees."""
    return seen & 0xFFFFFFFF


def _expanded(count: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Owner and running number, from 0, of what each owner counts; piece by piece."""
    pieces = math.ceil(int(count.sum()) / at_once(count.device))
    for owners in torch.arange(len(count), device=count.device).chunk(max(1, pieces)):
        of_each = count[owners]
        place = torch.repeat_interleave(of_each)
        start = of_each.cumsum(0) - of_each
        yield owners.index_select(0, place), torch.arange(len(place), device=count.device) - start.index_select(0, place)


def _cross(a: Tensor, b: Tensor) -> Tensor:
    """Product of vectors (3, M): elementwise, so that exchanging a and b only changes the sign."""
    return torch.stack([a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0]])
