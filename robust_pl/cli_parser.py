"""What the command line adds to Lightning's parser."""

from __future__ import annotations

import os
import sys
from typing import Any

from lightning.pytorch.cli import LightningArgumentParser, _InstantiatorFn

from . import fractions as fractions
from .cli_errors import arguments_of, one_line

NET = "model.init_args.net.init_args"


class Parser(LightningArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str, ex: Exception | None = None) -> None:  # type: ignore[override]
        if os.environ.get("ROBUST_PL_TRACEBACK"):
            super().error(message, ex)
        print(f"robust-pl: error: {one_line(message, sys.argv)}", file=sys.stderr)
        sys.exit(2)


class Instantiator(_InstantiatorFn):
    """Stores as hyper-parameters what the data linked to the network only where the network takes it.

    Lightning writes every link down, so that a network without ``in_channels`` could not be rebuilt from a checkpoint.
    """

    def __call__(self, class_type: type[Any], *args: Any, applied_instantiation_links: dict[str, Any], **kwargs: Any) -> Any:
        self.cli._dump_config()
        net = self.cli.config_dump.get(self.key, {}).get("init_args", {}).get("net") or {}
        links = applied_instantiation_links
        if "class_path" in net:
            net.setdefault("init_args", {})
            taken = arguments_of(net["class_path"])
            links = {k: v for k, v in links.items() if not k.startswith(NET) or k.rsplit(".", 1)[-1] in taken}
        return super().__call__(class_type, *args, applied_instantiation_links=links, **kwargs)


def link_data_to_net(parser: LightningArgumentParser) -> None:
    """The data know how many classes and channels there are."""
    parser.link_arguments("data.net_classes", "model.init_args.num_classes", apply_on="instantiate")
    parser.link_arguments("data.net_classes", f"{NET}.num_classes", apply_on="instantiate")
    parser.link_arguments("data.in_channels", f"{NET}.in_channels", apply_on="instantiate")
