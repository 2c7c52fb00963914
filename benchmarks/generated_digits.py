"""Generated digits for ``ExtraDataMixture``: ``python -m benchmarks.generated_digits generated_digits.npz``.

A kernel density for each class, on principal components of the training digits, from which images are drawn; the width of the
kernel is the one under which digits that were left out are most likely. It takes seconds. The test digits are never looked
at, nor the validation digits of ``--seed``, which should be that of the run.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from sklearn.decomposition import PCA
from sklearn.model_selection import GridSearchCV
from sklearn.neighbors import KernelDensity

from robust_pl.data import DigitsDataModule

COMPONENTS, FOLDS, WHITE = 30, 5, 16


def generate(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Draw images uint8 (count, 8, 8, 1), 255 being white, and labels (count,), as many of each class as of any other.

    Args:
        count: a multiple of the number of classes.
        seed: of the draws, and of the data module whose training digits are learned from.

    Raises:
        ValueError: if the count cannot be shared out.
    """
    data = DigitsDataModule(seed=seed)
    if count < 1 or count % data.num_classes:
        raise ValueError(f"count={count} must be a multiple of {data.num_classes}, so that classes are balanced")
    x, y = data.train_set.read(data.split[0], None)
    pixels, labels = x.flatten(1).double().numpy() * WHITE, y.numpy()
    pca = PCA(COMPONENTS, random_state=seed).fit(pixels)
    widths = {"bandwidth": np.geomspace(0.5, 8, 13)}
    drawn = []
    for label in range(data.num_classes):
        search = GridSearchCV(KernelDensity(), widths, cv=FOLDS).fit(pca.transform(pixels[labels == label]))
        drawn.append(search.best_estimator_.sample(count // data.num_classes, random_state=seed * data.num_classes + label))
    images = pca.inverse_transform(np.concatenate(drawn)).clip(0, WHITE)
    images = (images * (255 / WHITE)).round().astype(np.uint8).reshape(count, 8, 8, 1)
    return images, np.repeat(np.arange(data.num_classes), count // data.num_classes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="the .npz file to write")
    parser.add_argument("--count", type=int, default=20_000, help="of images, a multiple of 10")
    parser.add_argument("--seed", type=int, default=0, help="of the draws and of the split")
    settings = parser.parse_args()
    images, labels = generate(settings.count, settings.seed)
    np.savez(settings.file, image=images, label=labels)  # not compressed, so that it is mapped where it lies
    print(f"{settings.file}: {len(images)} digits, {len(images) // 10} of each class")


if __name__ == "__main__":
    main()
