"""What is named as a text is one."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest

from app.core.errors import ErrorKind, WeftError
from app.core.plain_text import read_plain


@pytest.mark.parametrize("text", ["", "Straße, façade, 日本語 🙂\n" * 50, "a" * 10], ids=["empty", "accents", "plain"])
def test_text_is_read(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.txt").write_text(text, "utf-8", newline="")
    assert read_plain(tmp_path / "a.txt") == text


def test_a_character_that_is_cut_and_accents_of_an_old_encoding_are_no_reason_to_refuse(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("日本語".encode())
    assert read_plain(tmp_path / "a.txt", 4) == "日\ufffd"
    (tmp_path / "b.txt").write_bytes(("Die Straße führt über den Fluß. " * 9).encode("latin-1"))
    assert read_plain(tmp_path / "b.txt").startswith("Die Stra\ufffde")


def test_what_is_no_text_is_refused(tmp_path: Path) -> None:
    noise = tmp_path / "noise"
    noise.write_bytes(bytes(random.Random().choices(range(128, 256), k=5000)))
    wide = tmp_path / "wide.txt"
    wide.write_text("Hello\n" * 20, "utf-16")
    for path in (noise, wide, Path(sys.executable)):
        with pytest.raises(WeftError, match="is no text in UTF-8") as refused:
            read_plain(path)
        assert refused.value.kind is ErrorKind.BAD_INPUT
    with pytest.raises(WeftError) as refused:
        read_plain(tmp_path / "none")
    assert refused.value.kind is ErrorKind.NOT_FOUND
