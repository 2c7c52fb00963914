"""DAT and its discretizers: codes by hand, what goes through them, what is attacked, and files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer
from torch import Tensor, nn

from robust_pl.callbacks import FGSM, PGD
from robust_pl.data import DigitsDataModule
from robust_pl.methods import DAT
from robust_pl.nets import VQGAN, Discretizer, IdentityDiscretizer, PatchCodebook, SmallCNN
from robust_pl.nets.discretizer import nearest
from robust_pl.nets.vqgan import Attention

from .test_methods import QUIET


class Coarse(Discretizer):
    """Pixels in steps of 1/10; remembers what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []
        self.scale = nn.Parameter(torch.tensor(10.0))

    def discretize(self, x: Tensor) -> Tensor:
        self.seen.append(x)
        return (x * self.scale).round() / self.scale


def method(discretizer: Discretizer | None = None, *arguments: object, **more: object) -> DAT:
    torch.manual_seed(0)
    return DAT(SmallCNN(width=4), Coarse() if discretizer is None else discretizer, *arguments, **more)


def batch(count: int = 12) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(count, 1, 8, 8, generator=generator), torch.arange(count) % 10, torch.arange(count)


# The method ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("random_start", [0.0, 1.0])
def test_what_is_attacked_is_the_discrete_image(random_start: float) -> None:
    dat = method(None, FGSM(0.5, 0.5, norm="l2"), random_start)
    x, y, index = batch()
    example = dat.craft((x, y, index))
    first, second = dat.discretizer.net.seen
    assert torch.equal(first, x) and torch.equal(example.x, x)
    discrete = (x * 10).round() / 10
    assert ((second - discrete).flatten(1).norm(dim=1) <= 0.5 + 1e-6).all() and not torch.equal(second, discrete)
    assert second.min() >= 0 and second.max() <= 1 and torch.equal(example.x_adv, (second * 10).round() / 10)
    if not random_start:
        expected = FGSM(0.5, 0.5, norm="l2")(dat, discrete, y)
        torch.testing.assert_close(second, expected)


def test_nothing_in_the_discretizer_learns_or_is_kept() -> None:
    dat = method(Coarse())
    dat.loss(dat.craft(batch())).backward()
    assert dat.discretizer.net.scale.grad is None and not dat.discretizer.net.scale.requires_grad
    assert all(p.grad is not None for p in dat.net.parameters())
    assert not any(name.startswith("discretizer") for name in dat.state_dict())
    assert not dat.train().discretizer.net.training


def test_without_budget_and_code_the_loss_is_twice_that_of_the_images() -> None:
    dat = method(IdentityDiscretizer(), FGSM(0.0, norm="l2"), random_start=0.0).eval()
    x, y, index = batch()
    torch.testing.assert_close(dat.loss(dat.craft((x, y, index))), 2 * F.cross_entropy(dat(x), y), rtol=0, atol=0)
    soft = F.one_hot(y, 10) * 0.9 + 0.01
    torch.testing.assert_close(dat.loss(dat.craft((x, soft, index))), 2 * F.cross_entropy(dat(x), soft), rtol=0, atol=0)


def test_the_start_is_one_coin_a_batch() -> None:
    dat = method()
    x = torch.full((4, 1, 8, 8), 0.5)
    norms = []
    for _ in range(300):
        norms.append((dat._start(x, None) - x).flatten(1).norm(dim=1))
        dat.attack.calls += 1
    found = torch.stack(norms)
    assert (found == 0).all(1).logical_or(((found - 0.1).abs() < 1e-5).all(1)).all()
    assert 0.73 < (found[:, 0] > 0).float().mean() < 0.87


def test_by_default_the_attack_is_that_of_the_paper() -> None:
    attack = method().attack
    assert isinstance(attack, FGSM) and attack.norm == "l2" and attack.bn_mode == "train"
    assert float(attack.eps) == float(attack.step_size) == 0.1


# The codebook --------------------------------------------------------------------------------------------------------


def test_autocast_rounds_no_perturbation_away() -> None:
    class Convolved(Discretizer):
        def discretize(self, x: Tensor) -> Tensor:
            return F.conv2d(x, torch.ones(1, 1, 1, 1))

    x = torch.tensor([0.9, 0.9001]).view(2, 1, 1, 1)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(Convolved()(x), x)


def test_as_many_codes_as_squares_keep_images_as_they_are() -> None:
    x = torch.rand(6, 3, 8, 12, generator=torch.Generator().manual_seed(0))
    book = PatchCodebook(patch=4, codes=6 * 6)
    book.begin(lambda count: x)
    torch.testing.assert_close(book(x), x)


def test_k_means_finds_the_middle_of_two_groups() -> None:
    groups = torch.cat([0.1 + 0.02 * torch.rand(30, 1, 2, 2), 0.8 + 0.02 * torch.rand(10, 1, 2, 2)])
    for seed in range(5):
        book = PatchCodebook(patch=2, codes=2, seed=seed)
        book.begin(lambda count: groups)
        found = book.codes[book.codes[:, 0].argsort()]
        torch.testing.assert_close(found, torch.stack([groups[:30].mean(0), groups[30:].mean(0)]).flatten(1))


def test_twice_is_once_and_more_codes_are_nearer() -> None:
    x = torch.rand(40, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    errors = []
    for codes in (4, 16, 64):
        book = PatchCodebook(patch=4, codes=codes)
        book.begin(lambda count: x[:count])
        once = book(x)
        assert torch.equal(book(once), once) and once.min() >= 0 and once.max() <= 1
        assert len(torch.unique(F.unfold(once, 4, stride=4).transpose(1, 2).flatten(0, 1), dim=0)) <= codes
        errors.append((once - x).square().mean())
    assert errors[0] > errors[1] > errors[2]


def test_the_nearest_code_however_it_is_chunked(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors, codes = torch.randn(50, 6), torch.randn(9, 6)
    expected = torch.cdist(vectors, codes).argmin(1)
    assert torch.equal(nearest(vectors, codes), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(nearest(codes, codes + 1e-3 * torch.randn(9, 6)), torch.arange(9))
        near = torch.stack([torch.ones(6), torch.full((6,), 1.001)])
        assert torch.equal(nearest(near, near), torch.arange(2))
    monkeypatch.setattr("robust_pl.nets.discretizer._CHUNK", 30)
    assert torch.equal(nearest(vectors, codes), expected)


def test_a_run_learns_its_codes_first_and_a_test_needs_none(tmp_path: Path) -> None:
    found = []
    for _ in range(2):
        dat = method(PatchCodebook(patch=4, codes=16))
        trainer = Trainer(max_steps=1, limit_val_batches=0, **QUIET)
        trainer.fit(dat, DigitsDataModule(batch_size=16))
        found.append(dat.discretizer.net.codes)
    assert trainer.callback_metrics["train/discrete_change"] == 0, "a codebook's images are too far from other words for 0.1"
    assert found[0].shape == (16, 16) and torch.equal(*found)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    other = method(PatchCodebook(patch=4, codes=16))
    other.load_state_dict(torch.load(tmp_path / "x.ckpt", weights_only=True)["state_dict"])
    Trainer(limit_test_batches=1, **QUIET).test(other, DigitsDataModule(), verbose=False)


# VQGAN ---------------------------------------------------------------------------------------------------------------


def small(weights: Path | str) -> VQGAN:
    torch.manual_seed(0)
    return VQGAN(str(weights), codes=20, code_dim=4, z_channels=8, channels=32, multipliers=[1, 2], blocks=1)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of random weights, beside what a public checkpoint also holds."""
    path = tmp_path_factory.mktemp("vqgan") / "vqgan.pt"
    torch.manual_seed(7)
    tensors = {name: t + 0.05 * torch.randn_like(t) for name, t in small("").state_dict().items()}
    torch.save({"state_dict": {**tensors, "loss.discriminator.main.0.weight": torch.zeros(2, 2)}}, path)
    return path


def test_tensors_are_called_as_in_public_files() -> None:
    with torch.device("meta"):
        net = VQGAN("")
    shapes = {name: tuple(t.shape) for name, t in net.state_dict().items()}
    for name, shape in {
        "encoder.conv_in.weight": (128, 3, 3, 3),
        "encoder.down.0.block.1.norm2.weight": (128,),
        "encoder.down.0.downsample.conv.weight": (128, 128, 3, 3),
        "encoder.down.1.block.0.nin_shortcut.weight": (256, 128, 1, 1),
        "encoder.down.3.attn.1.proj_out.bias": (512,),
        "encoder.mid.attn_1.q.weight": (512, 512, 1, 1),
        "encoder.conv_out.weight": (4, 512, 3, 3),
        "quantize.embedding.weight": (16384, 4),
        "quant_conv.weight": (4, 4, 1, 1),
        "post_quant_conv.weight": (4, 4, 1, 1),
        "decoder.conv_in.weight": (512, 4, 3, 3),
        "decoder.up.3.block.2.conv1.weight": (512, 512, 3, 3),
        "decoder.up.3.attn.2.k.weight": (512, 512, 1, 1),
        "decoder.up.2.block.0.nin_shortcut.weight": (256, 512, 1, 1),
        "decoder.up.1.upsample.conv.weight": (256, 256, 3, 3),
        "decoder.up.0.block.0.nin_shortcut.weight": (128, 256, 1, 1),
        "decoder.norm_out.weight": (128,),
        "decoder.conv_out.weight": (3, 128, 3, 3),
    }.items():
        assert shapes[name] == shape, name
    assert not any(
        name.startswith(("encoder.down.3.downsample", "decoder.up.0.upsample", "encoder.down.2.attn")) for name in shapes
    )


def test_a_vqgan_reads_its_file_and_gives_images(weights: Path) -> None:
    net = small(weights)
    net.begin(lambda count: torch.zeros(0))
    saved = torch.load(weights, weights_only=True)["state_dict"]
    assert all(torch.equal(t, saved[name]) for name, t in net.state_dict().items())
    x = torch.rand(2, 3, 16, 12)
    out = net(x)
    assert out.shape == x.shape and out.min() >= 0 and out.max() <= 1 and not out.requires_grad
    z = net.quant_conv(net.encoder(2 * x - 1))
    assert z.shape == (2, 4, 8, 6)
    words = torch.cdist(z.movedim(1, -1).flatten(0, 2), net.quantize.embedding.weight).argmin(1)
    code = net.quantize.embedding.weight[words].view(2, 8, 6, 4).permute(0, 3, 1, 2)
    torch.testing.assert_close(out, ((net.decoder(net.post_quant_conv(code)) + 1) / 2).clamp(0, 1))


def test_attention_by_hand() -> None:
    torch.manual_seed(0)
    layer, z = Attention(32), torch.randn(2, 32, 3, 4)
    q, k, v = (one(layer.norm(z)).flatten(2) for one in (layer.q, layer.k, layer.v))
    weight = (torch.einsum("bci,bcj->bij", q, k) / 32**0.5).softmax(2)
    seen = torch.einsum("bij,bcj->bci", weight, v).view(2, 32, 3, 4)
    torch.testing.assert_close(layer(z), z + layer.proj_out(seen))


# Bad input -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: method(nn.Identity()), TypeError, "discretizer is a Identity: take VQGAN, PatchCodebook"),
        (lambda: method(random_start=1.5), ValueError, "random_start=1.5 is a probability"),
        (lambda: method(None, FGSM()), ValueError, "begins on the sphere of l2, and attack is a FGSM with norm='linf'"),
        (lambda: method(None, PGD(0.1, norm="l2")), ValueError, "random_start=True and restarts=1: take FGSM"),
        (lambda: PatchCodebook(codes=1), ValueError, "codes=1 must be at least 2"),
        (lambda: PatchCodebook(patch=0), ValueError, "patch=0 must be at least 1"),
        (lambda: PatchCodebook(codes=20).begin(lambda n: torch.rand(2, 1, 8, 8)), ValueError, "codes=20 is more than the 8"),
        (lambda: PatchCodebook(3, 2).begin(lambda n: torch.rand(9, 1, 8, 8)), ValueError, "patch=3 does not divide"),
        (lambda: PatchCodebook()(torch.rand(1, 1, 8, 8)), ValueError, "has no codes yet"),
        (lambda: small("").discretize(torch.rand(1, 3, 7, 8)), ValueError, "sides that 2 divides"),
        (lambda: VQGAN("", channels=20), ValueError, "channels=20 must be a multiple of 32"),
        (lambda: VQGAN("", multipliers=[]), ValueError, "must name one number"),
        (lambda: small("nowhere.pt").begin(lambda n: torch.zeros(0)), FileNotFoundError, "no file of weights at nowhere.pt"),
    ],
)
def test_bad_arguments(build: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build()


def test_a_missing_file_is_told_before_training(tmp_path: Path) -> None:
    dat = method(small(tmp_path / "none.pt"))
    with pytest.raises(FileNotFoundError, match=r"none\.pt"):
        Trainer(max_steps=1, **QUIET).fit(dat, DigitsDataModule(batch_size=16))
