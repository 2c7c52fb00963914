"""Teaches the config parser to read fractions such as 8/255. To import it is enough."""

from __future__ import annotations

from jsonargparse.typing import register_type

from .functional.ratio import Ratio

register_type(Ratio, serializer=str, deserializer=Ratio)
