"""What a merge and an export will take is said on the command line before anything is made."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from app import cli, cli_export, cli_merge, cli_quantize, cli_train
from app.core.errors import ErrorKind, WeftError
from app.core.paths import resources


class Begun(WeftError):
    """The task would run now."""


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Any:
    def begin(*_: object, **__: object) -> None:
        raise Begun(ErrorKind.CANCELLED, "begun")

    monkeypatch.setenv("WEFT_HOME", str(tmp_path / "home"))
    for module in (cli_export, cli_quantize):
        monkeypatch.setattr(module, "ensure_environment", lambda _: None)
    for module in (cli_export, cli_merge, cli_quantize):
        monkeypatch.setattr(module, "run_task", begin)

    def run(*arguments: str) -> str:
        parsed = cli._parser().parse_args(arguments)
        with pytest.raises(Begun):
            parsed.run(parsed)
        return capsys.readouterr().err

    return run


def test_an_export_says_what_lies_on_the_drive_on_the_way(said: Any, tmp_path: Path) -> None:
    small = said("export", "starter", "--type", "q4_k_m", "--to", str(tmp_path / "a.gguf"))
    assert "16-bit file" in small and "are free" in small
    # 4.2 M weights: 8.4 MB of 16 bits on the way.
    assert "about 8.4 MB more" in small
    direct = said("export", "starter", "--type", "q8_0", "--to", str(tmp_path / "b.gguf"))
    assert "16-bit file" not in direct and "takes about 4.5 MB" in direct


def test_a_merge_says_what_it_takes_of_disk_and_memory(said: Any, tmp_path: Path) -> None:
    voice = str(resources() / "starter" / "voice-adapter")
    text = said("merge", "starter", "--adapter", voice, "--to", str(tmp_path / "merged"))
    assert f"drive of {tmp_path}" in text and "are free" in text and "of memory" in text


def test_a_quantizing_says_what_it_takes_of_the_disk(said: Any, tmp_path: Path) -> None:
    text = said("quantize", "starter", "--method", "gptq", "--to", str(tmp_path / "packed"))
    assert "packed takes about" in text and "more while it is made" not in text
    voice = str(resources() / "starter" / "voice-adapter")
    text = said("quantize", "starter", "--method", "gptq", "--adapter", voice, "--to", str(tmp_path / "packed"))
    assert "packed takes about" in text and "more while it is made" in text
    assert f"are free on the drive of {tmp_path}" in text


@pytest.mark.parametrize(
    "command",
    [("export", "--type", "iq2_xs", "--imatrix"), ("quantize", "--method", "gptq", "--calibration")],
    ids=["export", "quantize"],
)
def test_a_program_is_no_text(command: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEFT_HOME", str(tmp_path / "home"))
    parsed = cli._parser().parse_args(
        [command[0], "starter", *command[1:], sys.executable, "--to", str(tmp_path / "a.gguf")]
    )
    with pytest.raises(WeftError, match="is no text in UTF-8"):
        parsed.run(parsed)


def test_a_target_that_is_there_is_refused_before_anything_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WEFT_HOME", str(tmp_path / "home"))
    (tmp_path / "a.gguf").write_bytes(b"x")
    voice = str(resources() / "starter" / "voice-adapter")
    for command in (("export",), ("quantize", "--method", "gptq"), ("merge", "--adapter", voice)):
        parsed = cli._parser().parse_args([command[0], "starter", *command[1:], "--to", str(tmp_path / "a.gguf")])
        with pytest.raises(WeftError, match="exists already"):
            parsed.run(parsed)
    assert capsys.readouterr().err == ""


def test_a_training_that_cannot_begin_there_is_refused_before_pytorch_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WEFT_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(cli_train, "_environment", lambda: pytest.fail("it begins"))
    (tmp_path / "data.jsonl").write_text('{"text": "one"}\n', "utf-8")
    file = tmp_path / "run.toml"
    file.write_text('[model]\npath = "starter"\n[data]\nfiles = ["data.jsonl"]\n[output]\ndir = "made"\n', "utf-8")
    parsed = cli._parser().parse_args(["train", str(file), "--resume"])
    with pytest.raises(WeftError, match="no unfinished run"):
        parsed.run(parsed)
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "adapter_config.json").write_text("{}", "utf-8")
    parsed = cli._parser().parse_args(["train", str(file)])
    with pytest.raises(WeftError, match="is there already"):
        parsed.run(parsed)


def test_the_command_line_holds_no_qt_for_that() -> None:
    code = "import sys, app.cli_export, app.cli_merge, app.cli_quantize; sys.exit(any(m.startswith('PySide6') for m in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
