"""Any classifier of the timm collection, behind the same door as the networks here."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from .classifier import ImageClassifier


class TimmModel(ImageClassifier):
    """A network of timm (Wightman 2019, https://github.com/huggingface/pytorch-image-models) on pixels in [0, 1].

    Args:
        num_classes: the number K of classes.
        model_name: timm's name of the network.
        pretrained: start from timm's weights (they are downloaded), with a new head if ``num_classes`` differs.
        in_channels: the number C of image channels.
        drop_path_rate: stochastic depth, where the network has it; None leaves timm's default.
        mean: per-channel mean of the pixels. None means no normalisation for a fresh network, and for a pretrained
            one the constants it was trained with.
        std: per-channel standard deviation; None as for ``mean``.

    Raises:
        ImportError: if timm or torchvision cannot be imported.
    """

    def __init__(
        self,
        num_classes: int = 10,
        model_name: str = "resnet50",
        pretrained: bool = False,
        in_channels: int = 3,
        drop_path_rate: float | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        try:
            import timm
        except Exception as error:  # a torchvision built for another torch fails with RuntimeError
            raise ImportError(
                f"TimmModel needs timm and torchvision, install them with: pip install robust_pl[vision] ({error})"
            ) from error
        options = {} if drop_path_rate is None else {"drop_path_rate": drop_path_rate}
        net: nn.Module = timm.create_model(
            model_name, pretrained=pretrained, num_classes=num_classes, in_chans=in_channels, **options
        )
        if pretrained and mean is None and std is None:
            mean, std = net.pretrained_cfg["mean"], net.pretrained_cfg["std"]
        super().__init__(in_channels, mean, std)
        self.net = net

    @property
    def head(self) -> nn.Module:
        """The network's classifier layer."""
        return self.net.get_classifier()

    def features(self, z: Tensor) -> Tensor:
        return self.net.forward_head(self.net.forward_features(z), pre_logits=True)

    def forward(self, x: Tensor) -> Tensor:
        # Not head(features): a few of timm's networks average two heads.
        return self.net(self.normalize(self.check_input(x)))
