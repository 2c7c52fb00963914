"""Parameters of the corruptions at severity 1 to 5: those of ImageNet-C, for 224 pixels, and of CIFAR-10-C, for 32."""

from __future__ import annotations

from typing import Literal

Table = Literal["cifar", "imagenet"]
Severity = Literal[1, 2, 3, 4, 5]
Parameters = tuple[tuple[float, ...], ...]

SEVERITIES: tuple[Severity, ...] = (1, 2, 3, 4, 5)

PARAMETERS: dict[str, dict[Table, Parameters]] = {
    # Standard deviation.
    "gaussian_noise": {
        "imagenet": ((0.08,), (0.12,), (0.18,), (0.26,), (0.38,)),
        "cifar": ((0.04,), (0.06,), (0.08,), (0.09,), (0.10,)),
    },
    # Photons that a white value stands for.
    "shot_noise": {
        "imagenet": ((60,), (25,), (12,), (5,), (3,)),
        "cifar": ((500,), (250,), (100,), (75,), (50,)),
    },
    # Share of the values.
    "impulse_noise": {
        "imagenet": ((0.03,), (0.06,), (0.09,), (0.17,), (0.27,)),
        "cifar": ((0.01,), (0.02,), (0.03,), (0.05,), (0.07,)),
    },
    # Radius of the disk, and of the blur of its edge.
    "defocus_blur": {
        "imagenet": ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)),
        "cifar": ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),
    },
    # Standard deviation of both blurs, largest way of a pixel, and how often it is moved.
    "glass_blur": {
        "imagenet": ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)),
        "cifar": ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)),
    },
    # Radius and standard deviation of the streak.
    "motion_blur": {
        "imagenet": ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15)),
        "cifar": ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)),
    },
    # Largest factor, as an open end, and step.
    "zoom_blur": {
        "imagenet": ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03)),
        "cifar": ((1.06, 0.01), (1.11, 0.01), (1.16, 0.01), (1.21, 0.01), (1.26, 0.01)),
    },
    # Mean and deviation of the flakes, their size, threshold, radius and deviation of their streaks, share of the image.
    "snow": {
        "imagenet": (
            (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
            (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
            (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
            (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
            (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
        ),
        "cifar": (
            (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
            (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
            (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
            (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
            (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
        ),
    },
    # Factors of the image and of the ice.
    "frost": {
        "imagenet": ((1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75)),
        "cifar": ((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45)),
    },
    # Density, and how fast the details of the fog vanish.
    "fog": {
        "imagenet": ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)),
        "cifar": ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)),
    },
    # Added to the value of HSV.
    "brightness": {
        "imagenet": ((0.1,), (0.2,), (0.3,), (0.4,), (0.5,)),
        "cifar": ((0.05,), (0.1,), (0.15,), (0.2,), (0.3,)),
    },
    # Factor.
    "contrast": {
        "imagenet": ((0.4,), (0.3,), (0.2,), (0.1,), (0.05,)),
        "cifar": ((0.75,), (0.5,), (0.4,), (0.3,), (0.15,)),
    },
    # Size and smoothness of the displacement, and how far the corners move, in pixels. For 224 pixels the benchmark took 244,
    # by mistake; its images were made so.
    "elastic_transform": {
        "imagenet": tuple(
            tuple(244 * part for part in parts)
            for parts in ((2, 0.7, 0.1), (2, 0.08, 0.2), (0.05, 0.01, 0.02), (0.07, 0.01, 0.02), (0.12, 0.01, 0.02))
        ),
        "cifar": tuple(
            tuple(32 * part for part in parts)
            for parts in ((0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03))
        ),
    },
    # Scale.
    "pixelate": {
        "imagenet": ((0.6,), (0.5,), (0.4,), (0.3,), (0.25,)),
        "cifar": ((0.95,), (0.9,), (0.85,), (0.75,), (0.65,)),
    },
    # Quality.
    "jpeg_compression": {
        "imagenet": ((25,), (18,), (15,), (10,), (7,)),
        "cifar": ((80,), (65,), (58,), (50,), (40,)),
    },
    # Standard deviation, as a share of the value.
    "speckle_noise": {
        "imagenet": ((0.15,), (0.2,), (0.35,), (0.45,), (0.6,)),
        "cifar": ((0.06,), (0.1,), (0.12,), (0.16,), (0.2,)),
    },
    # Standard deviation.
    "gaussian_blur": {
        "imagenet": ((1,), (2,), (3,), (4,), (6,)),
        "cifar": ((0.4,), (0.6,), (0.7,), (0.8,), (1,)),
    },
    # Mean and deviation of the liquid, its smoothness, threshold, strength (of water) or smoothness (of mud), and 1 for mud.
    "spatter": {
        "imagenet": (
            (0.65, 0.3, 4, 0.69, 0.6, 0),
            (0.65, 0.3, 3, 0.68, 0.6, 0),
            (0.65, 0.3, 2, 0.68, 0.5, 0),
            (0.65, 0.3, 1, 0.65, 1.5, 1),
            (0.67, 0.4, 1, 0.65, 1.5, 1),
        ),
        "cifar": (
            (0.62, 0.1, 0.7, 0.7, 0.5, 0),
            (0.65, 0.1, 0.8, 0.7, 0.5, 0),
            (0.65, 0.3, 1, 0.69, 0.5, 0),
            (0.65, 0.1, 0.7, 0.69, 0.6, 1),
            (0.65, 0.1, 0.5, 0.68, 0.6, 1),
        ),
    },
    # Factor of the saturation of HSV, and what is added to it.
    "saturate": {
        "imagenet": ((0.3, 0), (0.1, 0), (2, 0), (5, 0.1), (20, 0.2)),
        "cifar": ((0.3, 0), (0.1, 0), (1.5, 0), (2, 0.1), (2.5, 0.2)),
    },
}

CORRUPTIONS = tuple(PARAMETERS)
BENCHMARK, EXTRA = CORRUPTIONS[:15], CORRUPTIONS[15:]
"""The 15 over which the benchmark's figures are taken, and the 4 that are meant for validation."""
