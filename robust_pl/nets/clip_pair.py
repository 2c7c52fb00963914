"""A pair of encoders of images and texts as a classifier of whatever classes have names."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .lora import LoRA, merge

PHOTO = ("a photo of a {}.",)
_TEXTS = 256
_MAX_SCALE = 100.0


@runtime_checkable
class ImageTextEncoders(Protocol):
    """What a pair of encoders offers, such as :class:`TinyClip` or :class:`OpenClip`; a module of torch."""

    visual: nn.Module
    """The image encoder; all other parameters but ``logit_scale`` are the text encoder's."""
    logit_scale: nn.Parameter
    """Logarithm of the factor of cosines, of dimension 0."""

    def encode_image(self, x: Tensor) -> Tensor:
        """Embeddings (B, d), not normalised, of pixels (B, 3, H, W) in [0, 1]."""
        ...

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Embeddings (B, d), not normalised, of tokens int64 (B, L)."""
        ...

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Tokens int64 (B, L) on the CPU; L is the same for all texts."""
        ...


class ImageTextPair(nn.Module):
    """CLIP-like encoders (Radford et al. 2021, arXiv 2103.00020) as a zero-shot classifier, pixels in [0, 1] to logits.

    The embedding of a class is the normalised mean of those, each normalised, of its name in every template; logits are
    ``exp(logit_scale)``, at most 100, times the cosines to them. They are computed when first needed and again after the text
    encoder's weights change, and no gradient flows into them; in float32 whatever the precision of the run. So attacks,
    evaluation and monitors see a classifier like any other.

    Args:
        model: the encoders, see :class:`ImageTextEncoders`.
        class_names: of the classes, K; None takes those of the data in a run of a method that trains such a pair.
        templates: sentences with ``{}`` in the place of the name.
        lora: low-rank weights for the image encoder. All of the encoders is then frozen but for these and ``logit_scale``, and
            in eval mode; a whole image encoder trains without it.
        head: behind the image encoder, from its embeddings (B, d) to normalised ones, such as :class:`VIFormer`.

    Raises:
        TypeError: if ``model`` is not such a pair.
        ValueError: if a template has no place for a name, or there is no layer for ``lora``; when it classifies, if it knows no
            class names.
    """

    def __init__(
        self,
        model: nn.Module,
        class_names: Sequence[str] | None = None,
        templates: Sequence[str] = PHOTO,
        lora: LoRA | None = None,
        head: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(model, ImageTextEncoders):
            needed = ("visual", "logit_scale", "encode_image", "encode_text", "tokenize")
            lacking = ", ".join(name for name in needed if not hasattr(model, name))
            raise TypeError(f"{type(model).__name__} is no pair of image and text encoders, for it lacks: {lacking}")
        check_templates(templates)
        self.model, self.head, self.lora = model, head, lora
        self.templates, self.class_names = list(templates), None if class_names is None else list(class_names)
        self._classes: tuple[object, Tensor] | None = None
        if lora is not None:
            model.requires_grad_(False)
            lora.add_to(model.visual)
            model.logit_scale.requires_grad_(True)
            self.train()

    def train(self, mode: bool = True) -> ImageTextPair:
        """As usual, but frozen encoders stay in eval mode."""
        super().train(mode)
        if self.lora is not None:
            self.model.eval()
        return self

    @property
    def scale(self) -> Tensor:
        """Factor of the cosines, of dimension 0."""
        return self.model.logit_scale.exp().clamp(max=_MAX_SCALE)

    def encode_image(self, x: Tensor) -> Tensor:
        """Normalised embeddings (B, d) of pixels (B, 3, H, W) in [0, 1]."""
        z = self.model.encode_image(x)
        return F.normalize(z if self.head is None else self.head(z), dim=1)

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Normalised embeddings (B, d) of tokens (B, L)."""
        return F.normalize(self.model.encode_text(tokens), dim=1)

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Tokens int64 (B, L)."""
        return self.model.tokenize(list(texts))

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, K) of pixels (B, 3, H, W) in [0, 1]."""
        return self.scale * self.encode_image(x) @ self.class_embeddings().T

    def class_embeddings(self) -> Tensor:
        """Of each class, normalised, (K, d). Costs K * T texts where they are not known yet."""
        if not self.class_names:
            raise ValueError("the zero-shot classifier knows no classes: set class_names, one name for each")
        parameters = list(self.text_parameters())
        # Every change in place raises _version, also one that copies an average in; a move to a device changes the address.
        stamp = (list(self.class_names), list(self.templates), [(p.data_ptr(), p._version) for p in parameters])
        if self._classes is None or self._classes[0] != stamp:
            texts = [template.format(name) for name in self.class_names for template in self.templates]
            # Not an inference tensor, which could not be saved for the gradient of an attack.
            with torch.inference_mode(False), torch.no_grad(), torch.autocast(parameters[0].device.type, enabled=False):
                tokens = self.tokenize(texts).to(parameters[0].device)
                z = torch.cat([self.encode_text(some) for some in tokens.split(_TEXTS)])
                z = F.normalize(z.view(len(self.class_names), len(self.templates), -1).mean(1), dim=1)
            self._classes = (stamp, z)
        return self._classes[1]

    def text_parameters(self) -> Iterator[nn.Parameter]:
        """Those of the text encoder."""
        others = {id(p) for p in self.model.visual.parameters()} | {id(self.model.logit_scale)}
        return (p for p in self.model.parameters() if id(p) not in others)

    def freeze_text(self) -> None:
        """Leave the text encoder as it is from now on."""
        for parameter in self.text_parameters():
            parameter.requires_grad_(False)

    def merged(self) -> ImageTextPair:
        """A copy whose low-rank weights are in those of the encoder; its ``model`` is one of the kind that it was made from."""
        pair = copy.deepcopy(self)
        merge(pair.model.visual)
        pair.lora = None
        return pair


def check_templates(templates: Sequence[str]) -> None:
    """Refuse sentences without a place for a name.

    Raises:
        ValueError: if there are none, or one has no ``{}``.
    """
    if isinstance(templates, str) or not templates:
        raise ValueError(f"templates={templates!r} must be a list of sentences, such as 'a photo of a {{}}.'")
    for template in templates:
        if template.count("{}") != 1:
            raise ValueError(f"the template {template!r} must have one {{}}, in the place of a class's name")
