"""ConvertPlan: an adapter from PEFT's format to llama.cpp's or the other way, for one model. Plain data."""

from __future__ import annotations

import msgspec

from app.core.library import ModelEntry


class ConvertPlan(msgspec.Struct, frozen=True, kw_only=True):
    """What to convert.

    Attributes:
        adapter: a PEFT folder, a lone weight file, or a GGUF adapter: what it is decides the direction.
        model: the base: its headers say how llama.cpp and transformers name and order its matrices.
        to: the GGUF file, or the PEFT folder, that is made; it must not exist.
    """

    adapter: str
    model: ModelEntry
    to: str


class Converted(msgspec.Struct, frozen=True, kw_only=True):
    """What was made. notes: sentences worth showing, such as parts that have no place in the model."""

    adapter: str
    bytes: int
    notes: list[str] = []
