"""Shape-texture debiased training: the loss by hand, which BatchNorms images go through, labels, a run."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer

from robust_pl.data import CropAndFlip, DigitsDataModule, PixelAdaIN
from robust_pl.data.hashing import VERSIONS, hash_keys
from robust_pl.methods import ShapeTexture
from robust_pl.nets import DualBatchNorm, DualNet, SmallCNN

from .test_methods import QUIET, sgd


def method(style_label: float = 0.2, **more: object) -> ShapeTexture:
    torch.manual_seed(0)
    return ShapeTexture(DualNet(SmallCNN(width=4)), PixelAdaIN(0.5, 1.0, style_label), **more)


def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(12, 1, 8, 8, generator=generator), torch.arange(12) % 10, torch.arange(12)


def test_the_loss_by_hand() -> None:
    shaped = method().eval()
    x, y, index = batch()
    keys = hash_keys(hash_keys(0, VERSIONS, 0, index), 0)
    labels = F.one_hot(y, 10).float()
    x_style, y_style = shaped.augmentation(x, labels, keys)
    with torch.no_grad():
        clean = shaped(x).log_softmax(1)
        with shaped.net.through("aux"):
            styled = shaped(x_style).log_softmax(1)
        expected = -((labels * clean).sum(1).mean() + (y_style * styled).sum(1).mean()) / 2
        torch.testing.assert_close(shaped.loss(shaped.craft((x, y, index))), expected)
    example = shaped.craft((x, y, index))
    assert example.y_style.amax() <= 1 and (example.y_style.gather(1, y.unsqueeze(1)) > 0.79).all()


def test_each_kind_of_image_has_its_batch_norms() -> None:
    shaped = method()
    norm = next(m for m in shaped.modules() if isinstance(m, DualBatchNorm))
    example = shaped.train().craft(batch())
    shaped.loss(example)
    for part, images in ((norm.clean, example.x), (norm.adv, example.x_style)):
        torch.testing.assert_close(part.running_mean, 0.1 * shaped.net.net.layers[0](images).mean((0, 2, 3)))


@pytest.mark.parametrize("style_label", [0.0, 0.2])
def test_a_run(style_label: float) -> None:
    shaped = method(style_label, optimizer=sgd)
    before = [p.detach().clone() for p in shaped.parameters()]
    Trainer(max_steps=2, limit_val_batches=0, **QUIET).fit(shaped, DigitsDataModule(batch_size=16))
    assert all(not torch.equal(p, q) for p, q in zip(shaped.parameters(), before, strict=True))


def test_without_a_seed_of_its_own_it_takes_that_of_the_data() -> None:
    crafted = []
    for seed, own in ((0, None), (5, None), (0, 5)):
        shaped = method(seed=own, optimizer=sgd)
        data = DigitsDataModule(batch_size=16, seed=seed)
        Trainer(max_steps=1, limit_val_batches=0, **QUIET).fit(shaped, data)
        crafted.append(shaped.craft(batch()).x_style)
    assert torch.equal(crafted[1], crafted[2]) and not torch.equal(crafted[0], crafted[1])


def test_bad_arguments() -> None:
    with pytest.raises(TypeError, match="net is a SmallCNN: ShapeTexture trains a network with two BatchNorms"):
        ShapeTexture(SmallCNN(), CropAndFlip())
    with pytest.raises(TypeError, match=r"augmentation=Linear.* is no augmentation: take Stylize"):
        ShapeTexture(DualNet(SmallCNN()), torch.nn.Linear(1, 1))
