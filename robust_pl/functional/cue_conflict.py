"""Shape or texture: what decides where both are there and say different things (Geirhos et al. 2019, arXiv 1811.12231)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class CueDecisions:
    """How often a classifier said the class of the shape, that of the texture, or another one.

    Args:
        shape: images whose predicted class is that of their shape.
        texture: images whose predicted class is that of their texture.
        total: images in which the two differ.
    """

    shape: int
    texture: int
    total: int

    @property
    def shape_bias(self) -> float | None:
        """Share of shape among the decisions for either, in [0, 1]; None where there is none."""
        decided = self.shape + self.texture
        return self.shape / decided if decided else None

    @property
    def decided(self) -> float | None:
        """Cue-conflict accuracy: share of the images that were decided for either, in [0, 1]; None where there is no image.

        A shape bias says little where this is low.
        """
        return (self.shape + self.texture) / self.total if self.total else None


def count_decisions(prediction: Tensor, shape: Tensor, texture: Tensor) -> CueDecisions:
    """Count the decisions for shape and for texture; images of which both say the same are left out.

    Args:
        prediction: predicted classes (N,).
        shape: classes of the shapes (N,).
        texture: classes of the textures (N,).
    """
    conflict = shape != texture
    says_shape, says_texture = (prediction == shape) & conflict, (prediction == texture) & conflict
    return CueDecisions(int(says_shape.sum()), int(says_texture.sum()), int(conflict.sum()))
