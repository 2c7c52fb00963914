"""Encoders of images and texts as classifiers, low-rank weights, and Omniview-Tuning."""

from __future__ import annotations

import math
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from robust_pl import load_model
from robust_pl.callbacks import FGSM
from robust_pl.data import ProceduralViewsDataModule
from robust_pl.functional.contrastive import anchors, hard_views, image_text_contrastive, rows_of_objects, viewpoint_alignment
from robust_pl.methods import ContrastiveTraining, OmniviewTuning
from robust_pl.nets import ImageTextPair, LoRA, OpenClip, TinyClip, VIFormer
from robust_pl.nets.lora import LoRAAttention, LoRALinear, merge

from .conftest import CONFIGS

SMALL = {"image_size": 16, "train_objects": 2, "val_objects": 1, "test_objects": 1, "views_per_object": 6, "batch_size": 40}
TINY = {"width": 4, "dim": 8}


def pair(**arguments) -> ImageTextPair:
    return ImageTextPair(TinyClip(**TINY), **arguments)


def unit(*degrees: float) -> torch.Tensor:
    angle = torch.tensor(degrees).deg2rad()
    return torch.stack([angle.cos(), angle.sin()], 1)


# Formulas ------------------------------------------------------------------------------------------------------------


def test_contrastive_loss_by_hand():
    # Cosines [[1, 0], [0.6, 0.8]], factor 2.
    image, text = torch.tensor([[1.0, 0.0], [0.6, 0.8]]), torch.eye(2)
    a, b, c, d = (math.exp(2 * v) for v in (1, 0, 0.6, 0.8))
    by_hand = -(math.log(a / (a + b)) + math.log(d / (c + d)) + math.log(a / (a + c)) + math.log(d / (b + d))) / 4
    assert float(image_text_contrastive(image, text, 2.0)) == pytest.approx(by_hand, rel=1e-6)
    assert image_text_contrastive(image, text, 2.0) != image_text_contrastive(image, text.flip(0), 2.0)


def test_captions_that_come_twice_add_a_constant_and_no_gradient():
    z, t = unit(0, 0, 90, 90).requires_grad_(), unit(0, 0, 90, 90)
    loss = image_text_contrastive(z, t, 100.0)
    (gradient,) = torch.autograd.grad(loss, z)
    assert loss.item() == pytest.approx(math.log(2), rel=1e-5) and gradient.abs().max() < 1e-5


def test_alignment_by_hand():
    z, anchor = unit(0, 60, 90).requires_grad_(), unit(0, 0, 0) * 7
    chosen = torch.tensor([False, True, True])
    loss = viewpoint_alignment(z, anchor, chosen, 0.3)
    assert loss.item() == pytest.approx(((1 - 0.5) + (1 - 0.0)) / 2 + 0.3, rel=1e-6)
    with_margin, without = (torch.autograd.grad(viewpoint_alignment(z, anchor, chosen, m), z)[0] for m in (0.3, 0.0))
    assert torch.equal(with_margin, without) and not with_margin[0].any() and with_margin[1].any()
    assert viewpoint_alignment(z, anchor, torch.zeros(3, dtype=torch.bool)) == 0


def test_anchors_by_hand():
    # Object 1 has views at 0, 0 and 60 degrees among those of object 0; object 2 has none; object 3 a single one.
    views, of = unit(0, 90, 0, 60, 30), torch.tensor([1, 0, 1, 1, 3])
    mean = anchors(views, of, 4, "mean")
    torch.testing.assert_close(mean[1], views[[0, 2, 3]].mean(0))
    torch.testing.assert_close(mean[[0, 2, 3]], torch.stack([views[1], torch.zeros(2), views[4]]))
    isolated = anchors(views, of, 4)
    # Mean cosines to the other two: (1 + 0.5) / 2, the same, and 0.5: the last weighs most.
    weight = torch.tensor([4 / 3, 4 / 3, 2.0])
    torch.testing.assert_close(isolated[1], (weight / weight.sum()) @ views[[0, 2, 3]])
    torch.testing.assert_close(isolated[[0, 2, 3]], mean[[0, 2, 3]])
    # A cosine of 0 or less counts as 0.1.
    opposite = anchors(unit(0, 90, 180), torch.zeros(3, dtype=torch.int64), 1)
    torch.testing.assert_close(opposite, torch.tensor([[0.0, 1 / 3]]))


def test_anchors_take_the_five_nearest_and_are_those_of_a_loop():
    z = F.normalize(torch.randn(60, 5, generator=torch.Generator().manual_seed(0)) + 1, dim=1)
    of = torch.arange(60) * 7 % 4
    for i, anchor in enumerate(anchors(z, of, 4)):
        own = z[of == i]
        cosine = own @ own.T - 9 * torch.eye(15)
        weight = 1 / cosine.topk(5).values.mean(1).clamp_min(0.1)
        torch.testing.assert_close(anchor, (weight / weight.sum()) @ own)
    assert torch.equal(rows_of_objects(torch.tensor([1, 0, 1]), 3), torch.tensor([[1, -1], [0, 2], [-1, -1]]))


def test_hard_views_by_hand():
    views, of = unit(0, 80, 20, 50, 10, 30), torch.tensor([0, 0, 0, 0, 1, 2])
    anchor = unit(0, 0, 0)
    assert hard_views(views, of, anchor, 2).tolist() == [False, True, False, True, False, False]
    assert hard_views(views, of, anchor, 9).tolist() == [True] * 4 + [False] * 2  # a single view never is
    assert hard_views(unit(5, 5, 5), torch.zeros(3, dtype=torch.int64), anchor[:1], 1).tolist() == [True, False, False]


# Low-rank weights ----------------------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, batch_first=batch_first)
        self.fc, self.other = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.other(self.fc(self.attn(x, x, x, need_weights=False)[0]))


@pytest.mark.parametrize("batch_first", [True, False])
def test_lora_changes_nothing_at_first_trains_alone_and_merges(batch_first):
    torch.manual_seed(0)
    block, x = Block(batch_first).eval(), torch.randn(3, 5, 8)
    before, plain = block(x), set(block.state_dict())
    assert LoRA(rank=2, alpha=6.0, targets=["attn", "fc"]).add_to(block) == ["attn", "fc"]
    torch.testing.assert_close(block(x), before)
    trained = {name for name, p in block.named_parameters() if p.requires_grad}
    assert trained == {"attn.lora_A", "attn.lora_B", "fc.lora_A", "fc.lora_B"} == set(block.state_dict()) - plain
    assert block.attn.lora_A.shape == (2, 8) and block.attn.lora_B.shape == (24, 2)
    torch.optim.SGD([p for p in block.parameters() if p.requires_grad], lr=1.0).step()
    for name in ("attn", "fc"):
        nn.init.normal_(block.get_submodule(name).lora_B)
    tuned = block(x)
    assert not torch.allclose(tuned, before)
    torch.testing.assert_close(
        block.fc(x[0]), F.linear(x[0], block.fc.weight + 3.0 * block.fc.lora_B @ block.fc.lora_A, block.fc.bias)
    )
    merge(block)
    assert set(block.state_dict()) == plain and type(block.attn) is nn.MultiheadAttention and type(block.fc) is nn.Linear
    torch.testing.assert_close(block(x), tuned)


def test_lora_inside_torchs_transformer_is_not_passed_by_in_evaluation():
    torch.manual_seed(0)
    layer, x = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval(), torch.randn(2, 3, 8)
    LoRA(targets=["self_attn"]).add_to(layer)
    with torch.no_grad():
        before = layer(x)
        nn.init.normal_(layer.self_attn.lora_B)
        assert not torch.allclose(layer(x), before)


def test_lora_refuses():
    with pytest.raises(
        ValueError, match=r"targets=\['qkv'\] names no layer of the image encoder, whose linear ones are: hidden"
    ):
        pair(lora=LoRA(targets=["qkv"]))
    with pytest.raises(ValueError, match="rank=0 must be at least 1"):
        LoRA(rank=0)
    with pytest.raises(ValueError, match="keys and values of an attention have other sizes"):
        LoRAAttention(nn.MultiheadAttention(8, 2, kdim=4), 1, 1.0)


# Pair and head -------------------------------------------------------------------------------------------------------


def test_viformer_is_a_map_of_each_sample_and_by_hand():
    torch.manual_seed(0)
    head, z = VIFormer(8, hidden=16), torch.randn(5, 8) * 3
    out = head(z)
    torch.testing.assert_close(out.norm(dim=1), torch.ones(5))
    torch.testing.assert_close(head(z[2:3]), out[2:3])
    h = z
    for layer in head.encoder.layers:  # attention over one token is its value's way
        value = F.linear(h, layer.self_attn.in_proj_weight[16:], layer.self_attn.in_proj_bias[16:])
        h = layer.norm1(h + layer.self_attn.out_proj(value))
        h = layer.norm2(h + layer.linear2(F.relu(layer.linear1(h))))
    torch.testing.assert_close(out, F.normalize(z + 0.1 * h, dim=1))
    assert head(z).equal(head(z))  # no dropout
    with pytest.raises(ValueError, match="dimension 6 cannot be shared out to 4 heads"):
        VIFormer(6)


def test_zero_shot_logits_by_hand():
    torch.manual_seed(0)
    net, x = pair(class_names=["mug", "box"], templates=["a photo of a {}", "one {} there"]), torch.rand(3, 3, 16, 16)

    def text(sentence):
        return F.normalize(net.model.encode_text(net.tokenize([sentence]))[0], dim=0)

    classes = [text("a photo of a mug") + text("one mug there"), text("a photo of a box") + text("one box there")]
    expected = F.normalize(net.model.encode_image(x), dim=1) @ torch.stack([F.normalize(c, dim=0) for c in classes]).T / 0.07
    torch.testing.assert_close(net(x), expected)
    with torch.no_grad():
        net.model.logit_scale.fill_(9.0)
    torch.testing.assert_close(net(x), expected * 0.07 * 100)


def test_class_embeddings_follow_weights_and_names_and_serve_attacks():
    net, x = pair(class_names=["mug", "box"]), torch.rand(3, 3, 16, 16)
    with torch.inference_mode():
        first = net.class_embeddings()
    assert net.class_embeddings() is first and not first.is_inference()
    adversarial = FGSM(eps=0.1)(net, x, torch.tensor([0, 1, 0]))
    assert 0 < (adversarial - x).abs().max() <= 0.1 + 1e-6
    net.load_state_dict({**net.state_dict(), "model.text_projection.weight": torch.eye(8)})
    assert not torch.allclose(net.class_embeddings(), first)
    net.class_names = ["mug", "box", "cone"]
    assert net(x).shape == (3, 3)


def test_pair_freezes_what_it_says():
    net = pair(lora=LoRA(rank=2, targets=["hidden"]), head=VIFormer(8, hidden=16))
    trained = {name for name, p in net.named_parameters() if p.requires_grad and not name.startswith("head.")}
    assert trained == {"model.logit_scale", "model.visual.hidden.lora_A", "model.visual.hidden.lora_B"}
    assert net.training and net.head.training and not net.model.training
    whole = pair()
    whole.freeze_text()
    frozen = {name for name, p in whole.named_parameters() if not p.requires_grad}
    assert frozen == {"model.word.weight", "model.text_projection.weight"}
    nn.init.normal_(net.model.visual.hidden.lora_B)
    merged, x = net.merged(), torch.rand(2, 3, 16, 16)
    torch.testing.assert_close(merged.encode_image(x), net.encode_image(x))
    TinyClip(**TINY).load_state_dict(merged.model.state_dict())
    assert isinstance(net.model.visual.hidden, LoRALinear)


def test_words():
    model = TinyClip(**TINY, words=4)
    tokens = model.tokenize(["A photo of a mug!", "a PHOTO, of a cone"])
    assert tokens.shape == (2, 4) and tokens[0].equal(tokens[1]) and tokens[0, 0] == tokens[0, 3]
    assert model.tokenize(["mug a"]).tolist()[0][2:] == [0, 0]
    torch.testing.assert_close(model.encode_text(model.tokenize(["mug a"])), model.encode_text(model.tokenize(["a Mug"])))
    with pytest.raises(ValueError, match=r"the text '\.\.\.' has no word"):
        model.tokenize(["..."])


def test_pair_refuses():
    with pytest.raises(TypeError, match="Linear is no pair of image and text encoders, for it lacks: visual, logit_scale"):
        ImageTextPair(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"the template 'a photo' must have one \{\}"):
        pair(templates=["a photo"])
    with pytest.raises(ValueError, match="knows no classes: set class_names"):
        pair()(torch.rand(1, 3, 16, 16))


def test_open_clip_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(ImportError, match=r"pip install robust_pl\[clip\]"):
        OpenClip("ViT-B-32")


def test_open_clip_between_pixels_and_its_encoders(monkeypatch):
    tiny = TinyClip(**TINY)
    fake = SimpleNamespace(
        create_model=lambda name, pretrained=None: tiny,
        get_tokenizer=lambda name: tiny.tokenize,
        get_model_preprocess_cfg=lambda model: {"size": 16, "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.2, 0.1)},
    )
    monkeypatch.setitem(sys.modules, "open_clip", fake)
    net, x = ImageTextPair(OpenClip("ViT-B-32"), ["mug", "box"], lora=LoRA(targets=["hidden"])), torch.rand(2, 3, 16, 16)
    normalised = (x - torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1)) / torch.tensor([0.2, 0.2, 0.1]).view(3, 1, 1)
    torch.testing.assert_close(net.encode_image(x), F.normalize(tiny.visual(normalised), dim=1))
    assert net(x).shape == (2, 2) and isinstance(tiny.visual.hidden, LoRALinear)
    assert len(list(net.text_parameters())) == 2
    with pytest.raises(ValueError, match="takes images of 16 x 16 pixels, not 8 x 8: set the data's image_size"):
        net(x[:, :, :8, :8])


# Training ------------------------------------------------------------------------------------------------------------


def trainer(folder: Path, **more) -> Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return Trainer(default_root_dir=folder, **{**quiet, "max_epochs": 1, "enable_checkpointing": False, **more})


def tuned() -> OmniviewTuning:
    seed_everything(0)
    net = pair(lora=LoRA(rank=2, targets=["hidden", "projection"]), head=VIFormer(8, hidden=16))
    return OmniviewTuning(net, hard_views=2, optimizer=lambda params: torch.optim.Adam(params, lr=0.01))


def test_a_run_finds_hard_views_trains_and_classifies(tmp_path):
    method, data = tuned(), ProceduralViewsDataModule(**SMALL)
    before = {name: value.clone() for name, value in method.net.state_dict().items()}
    run = trainer(tmp_path)
    run.fit(method, data)
    assert method.net.class_names == data.class_names and method.net.templates == ["a photo of a {}."]
    assert method.views.anchors.shape == (30, 8) and int(method.views.epoch) == 0
    hard = method.views.hard.view(30, 6)
    assert (hard[:20].sum(1) == 2).all() and not hard[20:].any()  # the last objects are those of validation
    after = method.net.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    frozen = {name for name in before if name.startswith("model.") and "lora" not in name and "logit_scale" not in name}
    assert not moved & frozen and {"model.visual.hidden.lora_B", "model.logit_scale"} <= moved
    assert "train/hard_view_cosine" in run.callback_metrics
    assert run.callback_metrics["train/hard_view_cosine"] < run.callback_metrics["train/view_cosine"]
    assert 0 <= run.callback_metrics["val/acc_clean"] <= 1


def test_loss_of_a_batch_by_hand(tmp_path):
    method, data = tuned(), ProceduralViewsDataModule(**SMALL)
    seen = []
    plain = method.loss
    method.loss = lambda example: seen.append((example, plain(example))) or seen[-1][1]
    trainer(tmp_path, max_steps=1, limit_val_batches=0, num_sanity_val_steps=0).fit(method, data)
    example, loss = seen[0]
    fresh = tuned()  # the weights before the step
    z = fresh.net.encode_image(example.x)
    words = [f"a picture of a {data.class_names[y]}" for y in example.y]
    contrast = image_text_contrastive(z, fresh.net.encode_text(fresh.net.tokenize(words)), fresh.net.scale)
    objects = data.train_metadata.object[example.index]
    index, table = data.split[0], data.train_metadata.object
    all_z = fresh.net.encode_image(data.train_set.read(index, None)[0]).detach()
    anchor = anchors(all_z, table[index], 30)
    torch.testing.assert_close(example.anchor, anchor[objects], atol=1e-5, rtol=1e-4)
    rows = example.hard.nonzero().squeeze(1)
    assert 0 < len(rows) < len(z)
    pull = (1 - F.cosine_similarity(z[rows], anchor[objects[rows]])).mean() + 0.3
    torch.testing.assert_close(loss, contrast + pull, atol=1e-4, rtol=1e-4)


def test_a_resumed_run_goes_on_with_the_epochs_anchors(tmp_path):
    # 3 steps an epoch: the checkpoint lies within the second.
    keep = ModelCheckpoint(tmp_path, "a", every_n_train_steps=4, save_top_k=-1)
    more = {"max_epochs": 2, "limit_val_batches": 0, "num_sanity_val_steps": 0}
    whole, resumed = tuned(), tuned()
    trainer(tmp_path, callbacks=[keep], enable_checkpointing=True, **more).fit(whole, ProceduralViewsDataModule(**SMALL))
    trainer(tmp_path, **more).fit(resumed, ProceduralViewsDataModule(**SMALL), ckpt_path=tmp_path / "a.ckpt")
    assert int(whole.views.epoch) == 1 and resumed.views.hard.dtype == torch.bool
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], value, rtol=0, atol=0, msg=name)


def test_bad_input(tmp_path):
    with pytest.raises(TypeError, match="net must be an ImageTextPair round two encoders, not a Linear"):
        OmniviewTuning(nn.Linear(2, 2))
    for arguments, message in (
        ({"lmbda": -1.0}, "lmbda=-1.0 must be at least 0"),
        ({"hard_views": 0}, "hard_views=0 must be at least 1"),
        ({"anchor_weights": "dense"}, "anchor_weights"),
        ({"caption": "a picture"}, r"the template 'a picture' must have one \{\}"),
    ):
        with pytest.raises(ValueError, match=message):
            OmniviewTuning(pair(), **arguments)
    from robust_pl.data import DigitsDataModule

    small = ImageTextPair(TinyClip(in_channels=1, **TINY))
    with pytest.raises(ValueError, match="must know which object is in each training image"):
        trainer(tmp_path).fit(OmniviewTuning(small), DigitsDataModule())


def test_captions_of_metadata_or_else_of_classes(tmp_path):
    data = ProceduralViewsDataModule(**SMALL)
    data.setup("fit")
    captions = ["" if i % 2 else f"number {i} of all" for i in range(180)]
    object.__setattr__(data.train_metadata, "captions", captions)
    method = ContrastiveTraining(pair(), caption="some {}")
    trainer(tmp_path, max_steps=1, limit_val_batches=0).fit(method, data)
    index = torch.tensor([4, 5, 60])
    example = method.clean((torch.rand(3, 3, 16, 16), data.train_metadata.labels[index], index))
    expected = ["number 4 of all", f"some {data.class_names[0]}", "number 60 of all"]
    assert example.tokens.equal(method.net.tokenize(expected))


# Command line --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_accuracy_from_unusual_views_rises(robust_pl, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    views = (
        "[{class_path: NaturalViews, init_args: {eval_samples: 50}}, {class_path: RandomViews, init_args: {eval_samples: 50}}]"
    )
    accuracy = {}
    for name in ("clip_tiny", "omniview_tiny"):
        quiet = ("--trainer.logger", "false", "--trainer.enable_progress_bar", "false", "--trainer.callbacks", "[]")
        robust_pl("fit", "-c", CONFIGS / "views" / f"{name}.yaml", "--trainer.max_epochs", 6, *quiet)
        capsys.readouterr()
        robust_pl("test", "--ckpt_path", f"runs/{name}/checkpoints/best.ckpt", "--trainer.callbacks", views)
        printed = capsys.readouterr().out
        accuracy[name] = {a: float(v) for a, v in re.findall(r"(naturalviews|randomviews)\D+([\d.]+)%", printed)}
    before, after = accuracy["clip_tiny"], accuracy["omniview_tiny"]
    assert before["naturalviews"] > before["randomviews"] + 15
    assert after["randomviews"] > before["randomviews"] + 4
    net = load_model("runs/omniview_tiny/checkpoints/best.ckpt")  # which knows its classes without the data
    assert net(torch.rand(2, 3, 32, 32)).shape == (2, 10)
    print(accuracy)
