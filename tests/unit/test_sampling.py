"""Sampling's stop strings: what a person writes, and the texts that the loaders look for."""

from __future__ import annotations

import random

from app.core.sampling import Sampling


def test_stop_strings_read_escapes_and_nothing_else() -> None:
    assert Sampling(stop="a\\nb\n\n  \n\\\\n\\t\\x").stop_strings() == ("a\nb", "\\n\t\\x")


def test_any_character_can_stand_in_a_stop_string() -> None:
    """Also those that an escape could be hidden behind meanwhile: NUL never matched once, because it became a backslash."""
    characters = "\0\1\x1a\ue000\uffff\U0010ffffé" + chr(random.randrange(0x20, 0xD800))
    for character in characters.replace("\\", ""):
        assert Sampling(stop=f"{character}x\\\\{character}").stop_strings() == (f"{character}x\\{character}",)
