"""Any pair of encoders of the OpenCLIP collection."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from .normalize import Normalize


class OpenClip(nn.Module):
    """Encoders of OpenCLIP (Cherti et al. 2022, arXiv 2212.07143), extra ``clip``, on pixels in [0, 1], for an
    :class:`ImageTextPair`.

    The image encoder is called ``visual`` and keeps the collection's names inside; its attentions are called ``attn``. A
    pretrained ``logit_scale`` is kept, where Omniview-Tuning's authors start anew at log(1 / 0.07).

    Args:
        name: of the architecture, as the collection has it.
        pretrained: name of its weights, which are downloaded, or a file of them; None starts at random.

    Raises:
        ImportError: if open_clip or torchvision, which it needs, cannot be imported.
        ValueError: if images do not have the size that the encoder takes.
    """

    def __init__(self, name: str = "ViT-B-32", pretrained: str | None = None) -> None:
        super().__init__()
        try:
            import open_clip
        except Exception as error:  # a torchvision built for another torch fails with RuntimeError
            raise ImportError(
                f"OpenClip needs open_clip and torchvision, install them with: pip install robust_pl[clip] ({error})"
            ) from error
        self.clip: nn.Module = open_clip.create_model(name, pretrained=pretrained)
        self._tokenizer = open_clip.get_tokenizer(name)
        config = open_clip.get_model_preprocess_cfg(self.clip)
        self.normalize = Normalize(config["mean"], config["std"])
        size = config["size"]
        self.image_size = (size, size) if isinstance(size, int) else tuple(size)

    @property
    def visual(self) -> nn.Module:
        """The image encoder."""
        return self.clip.visual

    @property
    def logit_scale(self) -> nn.Parameter:
        """Logarithm of the factor of cosines."""
        return self.clip.logit_scale

    def encode_image(self, x: Tensor) -> Tensor:
        """Embeddings (B, d) of pixels (B, 3, H, W) in [0, 1]."""
        if tuple(x.shape[2:]) != self.image_size:
            raise ValueError(
                f"the image encoder takes images of {self.image_size[0]} x {self.image_size[1]} pixels, not "
                f"{x.shape[2]} x {x.shape[3]}: set the data's image_size"
            )
        return self.clip.encode_image(self.normalize(x))

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Embeddings (B, d) of tokens (B, L)."""
        return self.clip.encode_text(tokens)

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Tokens int64 (B, L)."""
        return self._tokenizer(list(texts))
