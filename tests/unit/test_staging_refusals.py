"""What a merge, an export or a quantizing is refused before it begins: places that cannot be, drives that are full."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from app.adapters.merge_staging import Staging, require_space
from app.core.errors import ErrorKind, WeftError


def test_a_folder_that_cannot_be_made_is_refused_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Path] = []

    def no_drive(self: Path, *_: Any, **__: Any) -> None:
        calls.append(self)
        assert len(calls) < 1000, "it tries for ever"
        raise FileNotFoundError(2, "No such file or directory", str(self))

    monkeypatch.setattr(Path, "mkdir", no_drive)
    with pytest.raises(WeftError) as refused:
        Staging(tmp_path / "gone" / "x.gguf")
    assert refused.value.kind is ErrorKind.NOT_FOUND and str(tmp_path / "gone") in refused.value.message
    assert "drive" in refused.value.hint


def test_small_sizes_and_the_reserve_are_told_with_the_drive_of_the_target(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": 3_200_000}))
    with Staging(tmp_path / "x.gguf") as staging, pytest.raises(WeftError) as refused:
        require_space(staging.root, 12_500_000, "The GGUF file", 64_000_000)
    said = refused.value.message
    assert "takes 12.5 MB" in said and "64.0 MB are kept free" in said and "3.2 MB are free" in said
    assert f"drive of {tmp_path}," in said and ".weft-merge" not in said
    assert "Free 73.3 MB" in refused.value.hint
