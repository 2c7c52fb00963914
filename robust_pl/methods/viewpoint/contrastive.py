"""Training of a pair of image and text encoders on images and their captions."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW

from ...data.view_table import ViewTable
from ...functional.contrastive import image_text_contrastive
from ...nets.clip_pair import ImageTextPair, check_templates
from ...nets.weights import load_weights
from ..base import Method, OptimizerFactory
from ..example import Example
from ..schedules import Schedule


@dataclass
class CaptionedExample(Example):
    """A batch with its captions.

    Args:
        tokens: int64 (B, L).
    """

    tokens: Tensor | None = None


class ContrastiveTraining(Method):
    """Symmetric cross-entropy of images and captions, as CLIP trains (Radford et al. 2021, arXiv 2103.00020).

    Captions are those of the data module's ``train_metadata`` (:class:`robust_pl.data.ViewTable`), and where it has none, or an
    empty one, the class's name in ``caption``. Different captions are tokenised once, at the start, and kept on the device:
    8 bytes a token. What trains is what asks for gradients in the pair; with low-rank weights most does not. Validation and
    test are zero-shot: see :class:`ImageTextPair`. Negatives of a pair are those of its own process.

    Args:
        net: the encoders; without ``class_names`` it takes those of the data, which go into the checkpoint.
        caption: with ``{}`` for the class's name.
        optimizer: see :class:`Method`, and so all others.
        weights: of a run or a file to start from: of the encoders alone (``net.model``), whatever is trained on top of them.

    Raises:
        TypeError: if ``net`` is no :class:`ImageTextPair`.
        ValueError: if ``caption`` has no place for a name; before the first step, if the data have neither captions nor names
            of classes, or labels are mixed where a caption comes from them.

    Cost: one forward and one backward pass of both encoders a step; of a frozen one only forward.
    """

    def __init__(
        self,
        net: ImageTextPair,
        caption: str = "a picture of a {}",
        optimizer: OptimizerFactory = lambda params: AdamW(params, lr=1e-3, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.05),
        schedule: Schedule | None = None,
        weights: str | None = None,
        num_classes: int = 10,
    ) -> None:
        super().__init__(net, None, optimizer, schedule, weights, num_classes)
        if not isinstance(net, ImageTextPair):
            raise TypeError(f"net must be an ImageTextPair round two encoders, not a {type(net).__name__}")
        check_templates([caption])
        self.caption = caption
        self._tokens = torch.zeros(0, 0, dtype=torch.int64)
        self._caption_of: Tensor | None = None

    def clean(self, batch: tuple[Tensor, ...]) -> CaptionedExample:
        example = super().clean(batch)
        if self._caption_of is None and example.y.is_floating_point():
            raise ValueError("mixed labels name no single class for a caption: leave augmentations that mix images out")
        number = example.y if self._caption_of is None else self._caption_of[example.index]
        return CaptionedExample(**vars(example), tokens=self._tokens[number])

    def loss(self, example: CaptionedExample) -> Tensor:
        return self.contrast(self.net.encode_image(example.x), example)

    def contrast(self, image: Tensor, example: CaptionedExample) -> Tensor:
        """The loss of embeddings (B, d) of the images and their captions."""
        return image_text_contrastive(image, self.net.encode_text(example.tokens), self.net.scale)

    # Lightning's hooks -----------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        if self._weights is not None and self.trainer.ckpt_path is None:
            _start_from(self.net, self._weights)
            self._weights = None
        super().setup(stage)
        names = getattr(self.trainer.datamodule, "class_names", None)
        if self.net.class_names is None and names:
            self.net.class_names = list(names)
            stored: Any = self.hparams.get("net")
            if isinstance(stored, dict):  # a config, from which a checkpoint is rebuilt
                self.hparams["net"] = {**stored, "init_args": {**stored.get("init_args", {}), "class_names": list(names)}}

    def on_fit_start(self) -> None:
        super().on_fit_start()
        # Lightning's, of networks left in eval mode by mistake; frozen encoders are meant to be.
        warnings.filterwarnings("ignore", message=r"Found \d+ module\(s\) in eval mode at the start of training")
        self._read_captions()

    def _read_captions(self) -> None:
        """Tokenise each caption once."""
        table = getattr(self.trainer.datamodule, "train_metadata", None)
        of_classes = [self.caption.format(name) for name in self.net.class_names or []]
        if isinstance(table, ViewTable) and table.captions is not None:
            labels = table.labels.tolist()
            texts = [text or _of_class(of_classes, y) for text, y in zip(table.captions, labels, strict=True)]
            numbers = {text: i for i, text in enumerate(dict.fromkeys(texts))}
            self._caption_of = torch.tensor([numbers[text] for text in texts], device=self.device)
            texts = list(numbers)
        else:
            texts, self._caption_of = [_of_class(of_classes, y) for y in range(self.num_classes)], None
        self._tokens = self.net.tokenize(texts).to(self.device)


def _of_class(captions: list[str], label: int) -> str:
    if label >= len(captions):
        raise ValueError(f"there is no caption and no name of class {label}: use data with captions, or give net.class_names")
    return captions[label]


def _start_from(net: ImageTextPair, source: str) -> None:
    """Load the encoders' weights, to which those of low rank are added later."""
    report = load_weights(net.model, source, strict=False)
    own = tuple(name for name in report.missing if name.rpartition(".")[2] not in ("lora_A", "lora_B"))
    report = replace(report, missing=own)
    if not report.fits or not report.loaded:
        raise ValueError(f"{report}. Build the encoders that it was saved from.")
