"""`weft convert`: what is wrong with the target is said before a process starts. (The conversion itself: tests/engine.)"""

from __future__ import annotations

from pathlib import Path

import pytest

from app.cli import main
from app.core.paths import resources
from tests.fakes import library_files

VOICE = resources() / "starter" / "voice-adapter"


@pytest.mark.parametrize(("back", "target"), [(False, "folder"), (True, "file.gguf")])
def test_the_target_must_be_of_the_other_kind(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], back: bool, target: str
) -> None:
    adapter = library_files.write_gguf_adapter(tmp_path / "a.gguf") if back else VOICE
    assert main(["convert", str(adapter), "starter", "--to", str(tmp_path / target)]) == 1
    said = capsys.readouterr().err
    assert f"{target} is not" in said and "Give another --to" in said
    assert not (tmp_path / target).exists()
