"""What becomes of a network's BatchNorms where their statistics are those of all processes together."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def refuse_to_sync(net: nn.Module) -> None:
    """Refuse a network of which ``Trainer(sync_batchnorm=True)`` would make another one.

    Lightning replaces every BatchNorm by ``torch.nn.SyncBatchNorm``, with its weights, statistics and mode. One that does more
    than to normalise, such as timm's BatchNormAct2d, which also activates, would lose that without a word.

    Raises:
        ValueError: naming the first such layer.
    """
    for name, module in net.named_modules():
        own = type(module).forward not in (_BatchNorm.forward, nn.SyncBatchNorm.forward)
        if isinstance(module, _BatchNorm) and own:
            raise ValueError(
                f"{name} is a {type(module).__name__}, of which trainer.sync_batchnorm would keep the normalisation alone: "
                "leave sync_batchnorm out, or convert the network yourself"
            )
