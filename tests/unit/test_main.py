"""Which arguments open the window, and which are commands."""

from __future__ import annotations

from pathlib import Path

import pytest

from app.__main__ import wants_window


@pytest.mark.parametrize(
    ("arguments", "window"),
    [
        ([], True),
        (["./models"], True),
        (["models"], False),
        (["chat", "starter"], False),
        (["tiny.gguf"], True),
        (["missing.gguf"], False),
        (["weft://download?model=user/tiny"], True),
        (["--help"], False),
    ],
)
def test_a_bare_word_is_a_command_even_where_a_folder_bears_its_name(
    arguments: list[str], window: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    (tmp_path / "chat").mkdir()
    (tmp_path / "tiny.gguf").write_bytes(b"GGUF")
    assert wants_window(arguments) is window
