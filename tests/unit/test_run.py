"""run.py: old Pythons, `.venv`, Debian's libraries, the menu, and which interpreter runs which tests."""

from __future__ import annotations

import argparse
import ast
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

import run
from installer.launcher import checks, menu, say, start, system_libraries, virtual_environment

ROOT = Path(__file__).resolve().parents[2]

# Pythons ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [(2, 7, 18), (3, 6, 15), (3, 10, 13), (3, 15, 0)])
def test_a_python_that_cannot_run_weft_is_told_so_with_the_next_step(version: tuple[int, ...]) -> None:
    words = run.wrong_python(version)
    assert ".".join(map(str, version[:2])) in words
    assert "run.py" in words or "this file" in words


@pytest.mark.parametrize("version", [(3, 11, 0), (3, 12, 1), (3, 14, 9)])
def test_a_python_that_can_is_let_through(version: tuple[int, ...]) -> None:
    assert run.wrong_python(version) == ""


def test_run_py_is_readable_by_any_python() -> None:
    tree = ast.parse((ROOT / "run.py").read_text(encoding="utf-8"))
    modern = (ast.JoinedStr, ast.AnnAssign, ast.NamedExpr, ast.AsyncFunctionDef, ast.Match, ast.Starred, ast.Nonlocal)
    for node in ast.walk(tree):
        assert not isinstance(node, modern), f"line {getattr(node, 'lineno', '?')} is too modern"
        if isinstance(node, ast.FunctionDef):
            assert node.returns is None
            assert all(argument.annotation is None for argument in node.args.args)
            assert not node.args.kwonlyargs
        if isinstance(node, ast.ImportFrom):
            assert node.module != "__future__"


def test_an_old_python_says_it_in_words() -> None:
    old = next((found for name in ("python2.7", "python3.6", "python3.8", "python3.10") if (found := _runs(name))), None)
    if old is None:
        pytest.skip("no Python older than 3.11 on this machine")
    ran = subprocess.run([old, str(ROOT / "run.py")], capture_output=True, text=True, timeout=60)
    assert ran.returncode == 1
    assert "Weft needs Python 3.11 or newer" in ran.stderr
    assert "Traceback" not in ran.stderr


def _runs(name: str) -> str | None:
    path = shutil.which(name)
    if path is None:
        return None
    return path if subprocess.run([path, "-c", ""], capture_output=True, check=False).returncode == 0 else None


# .venv ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real virtual environment, made once: it takes seconds."""
    folder = tmp_path_factory.mktemp("fresh") / ".venv"
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    return folder


PIP_SAYS = """\
Looking in links: /wheels
Collecting PySide6-Essentials==6.11.3 (from -c constraints.txt (line 9))
  Downloading https://somewhere/PySide6_Essentials-6.11.3-cp310-abi3-manylinux_2_28_x86_64.whl.metadata (3.8 kB)
Collecting msgspec==0.22.0
  Using cached msgspec-0.22.0-cp311-cp311-manylinux_2_17_x86_64.whl (213 kB)
Downloading pyside6_essentials-6.11.3-cp310-abi3-manylinux_2_28_x86_64.whl (95.4 MB)
Installing collected packages: msgspec, PySide6-Essentials
Successfully installed PySide6-Essentials-6.11.3 msgspec-0.22.0
"""


@pytest.fixture
def venv(tmp_path: Path, fresh: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A place for a virtual environment, and a pip that installs nothing."""
    real = subprocess.run

    def without_pip(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        if command[1:3] == ["-m", "venv"]:
            shutil.copytree(fresh, command[3], symlinks=True, dirs_exist_ok=True)
            return subprocess.CompletedProcess(command, 0, "", "")
        return real(command, **options)

    real_pip = virtual_environment._run_pip

    def pip(command: list[str], log: Path) -> tuple[int, str]:
        asked.append(command)
        status = failures.pop() if failures else 0
        return real_pip([sys.executable, "-c", f"print({PIP_SAYS!r}); raise SystemExit({status})"], log)

    asked: list[list[str]] = []
    failures: list[int] = []
    monkeypatch.setattr(virtual_environment.subprocess, "run", without_pip)
    monkeypatch.setattr(virtual_environment, "_run_pip", pip)
    folder = tmp_path / "with space" / ".venv"
    folder.parent.mkdir()
    monkeypatch.setattr(virtual_environment, "asked", asked, raising=False)
    monkeypatch.setattr(virtual_environment, "failures", failures, raising=False)
    return folder


def test_the_first_start_makes_it_and_the_second_does_nothing(venv: Path) -> None:
    python = virtual_environment.ensure(venv=venv)
    assert subprocess.run([python, "-c", "import pip"], check=False).returncode == 0
    (command,) = virtual_environment.asked
    assert "PySide6-Essentials==6.11.3" in command
    assert "--constraint" in command
    started = time.perf_counter()
    virtual_environment.ensure(venv=venv)
    assert time.perf_counter() - started < 1
    assert len(virtual_environment.asked) == 1


def test_of_what_pip_says_only_the_news_are_shown(venv: Path, capsys: pytest.CaptureFixture[str]) -> None:
    virtual_environment.ensure(venv=venv)
    shown = capsys.readouterr().err.splitlines()
    assert shown[-2:] == ["weft:   downloading pyside6_essentials (95.4 MB)", "weft:   unpacking 2 packages"]
    assert "constraints.txt" not in "".join(shown)
    assert (venv / "weft-pip.log").read_text(encoding="utf-8").strip() == PIP_SAYS.strip()
    assert virtual_environment.pip_news("Collecting llama-cpp-python[server]>=0.3 (from x)") == "looking for llama-cpp-python"


@pytest.mark.fault
def test_an_installation_that_failed_is_completed_by_the_next_start(venv: Path) -> None:
    virtual_environment.failures.append(1)
    with pytest.raises(say.Stop, match="start again") as stop:
        virtual_environment.ensure(venv=venv)
    assert "Looking in links" in stop.value.text and "weft-pip.log" in stop.value.text
    assert not virtual_environment.is_ready(venv=venv)
    virtual_environment.ensure(venv=venv)
    assert virtual_environment.is_ready(venv=venv)
    assert len(virtual_environment.asked) == 2


@pytest.mark.fault
@pytest.mark.parametrize("damage", ["no python", "no pip", "empty", "other version"])
def test_a_half_made_one_is_made_anew(venv: Path, damage: str) -> None:
    if damage == "empty":
        venv.mkdir()
    else:
        virtual_environment.ensure(venv=venv)
        (venv / "weft-stamp.json").unlink()
        python = virtual_environment.python_of(venv)
        if damage == "no python":
            python.unlink()
        elif damage == "no pip":
            for path in venv.rglob("pip"):
                if path.is_dir():
                    shutil.rmtree(path)
        else:
            python.unlink()
            python.write_text("#!/bin/sh\necho 3.4.0\n")
            python.chmod(0o755)
    python = virtual_environment.ensure(venv=venv)
    assert subprocess.run([python, "-c", "import pip"], check=False).returncode == 0


def test_changed_pins_install_again(venv: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    virtual_environment.ensure(venv=venv)
    monkeypatch.setattr(virtual_environment, "requirements", lambda group="": ["other==1"])
    assert not virtual_environment.is_ready(venv=venv)
    virtual_environment.ensure(venv=venv)
    assert "other==1" in virtual_environment.asked[-1]


def test_what_tests_need_includes_what_the_window_needs(venv: Path) -> None:
    virtual_environment.ensure("dev", venv=venv)
    assert virtual_environment.is_ready(venv=venv)
    assert virtual_environment.is_ready("dev", venv=venv)


def test_nothing_changed_means_under_a_second() -> None:
    if not virtual_environment.is_ready():
        pytest.skip("there is no complete .venv in this folder: these tests were not started by run.py")
    times: list[float] = []
    for _ in range(5):
        started = time.perf_counter()
        ran = subprocess.run([sys.executable, str(ROOT / "run.py"), "--version"], capture_output=True, text=True, timeout=60)
        times.append(time.perf_counter() - started)
        assert ran.stdout.startswith("weft ")
    assert min(times) < 1.0


# Debian's libraries -----------------------------------------------------------------------------


linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="shared libraries of Qt are looked for on Linux only")


@linux
def test_missing_libraries_are_named_by_package() -> None:
    found = system_libraries.missing(x11=True, can_load=lambda soname: soname not in ("libEGL.so.1", "libxcb-cursor.so.0"))
    assert found == {"libEGL.so.1": "libegl1", "libxcb-cursor.so.0": "libxcb-cursor0"}
    assert system_libraries.missing(x11=False, can_load=lambda soname: "xcb" not in soname) == {}


@linux
def test_the_exact_line_is_shown_and_nothing_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    commands = _bare_debian(monkeypatch, root=False)
    with pytest.raises(say.Stop) as stop:
        system_libraries.ensure(yes=True, x11=False)
    assert "sudo apt-get install -y libegl1 libgl1" in stop.value.text
    assert commands == []


@linux
@pytest.mark.parametrize("how", ["yes", "CI"])
def test_as_root_with_consent_they_are_installed(monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    commands = _bare_debian(monkeypatch, root=True)
    if how == "CI":
        monkeypatch.setenv("CI", "true")
    system_libraries.ensure(yes=how == "yes", x11=False, more=("build-essential",))
    assert [command[:2] for command in commands] == [["apt-get", "update"], ["apt-get", "install"]]
    assert commands[1][-3:] == ["build-essential", "libegl1", "libgl1"]


@linux
def test_as_root_without_consent_they_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    commands = _bare_debian(monkeypatch, root=True)
    with pytest.raises(say.Stop, match="--yes"):
        system_libraries.ensure(x11=False)
    assert commands == []


def _bare_debian(monkeypatch: pytest.MonkeyPatch, *, root: bool) -> list[list[str]]:
    commands: list[list[str]] = []

    def apt(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        return subprocess.CompletedProcess(command, 0)

    def missing(*, x11: bool) -> dict[str, str]:
        return {} if commands else {"libGL.so.1": "libgl1", "libEGL.so.1": "libegl1"}

    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setattr(system_libraries, "missing", missing)
    monkeypatch.setattr(system_libraries.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(system_libraries.os, "geteuid", lambda: 0 if root else 1000, raising=False)
    monkeypatch.setattr(system_libraries.subprocess, "run", apt)
    return commands


# The menu ---------------------------------------------------------------------------------------


def test_the_desktop_entry_starts_this_folder(tmp_path: Path) -> None:
    written = menu.write_desktop_file(tmp_path)
    text = written.read_text(encoding="utf-8")
    assert f'Exec="{sys.executable}" "{ROOT / "run.py"}" %F' in text
    assert (tmp_path / "icons/hicolor/scalable/apps/weft.svg").exists()
    if validator := shutil.which("desktop-file-validate"):
        ran = subprocess.run([validator, written], capture_output=True, text=True)
        assert ran.returncode == 0, ran.stdout
    link = (written.parent / "weft-link.desktop").read_text()
    assert "MimeType=x-scheme-handler/weft;" in link and "%u" in link and "NoDisplay=true" in link


@pytest.mark.parametrize(
    ("argument", "expected"),
    [("/a b/c", '"/a b/c"'), ("/100%", '"/100%%"'), ("/$x", '"/\\\\$x"'), ("/a\\b", '"/a\\\\\\\\b"')],
)
def test_the_exec_line_is_quoted_as_the_specification_has_it(argument: str, expected: str) -> None:
    assert menu.quote(argument) == expected


def test_the_mac_application_starts_this_folder(tmp_path: Path) -> None:
    bundle = menu.write_mac_application(tmp_path)
    script = bundle / "Contents" / "MacOS" / "weft"
    assert str(ROOT / "run.py") in script.read_text()
    if os.name != "nt":
        assert os.access(script, os.X_OK)


# Arguments --------------------------------------------------------------------------------------


def test_anything_else_goes_to_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    become: list[list[str]] = []
    monkeypatch.setattr(start, "become", lambda command: become.append(command) or 0)
    monkeypatch.setattr(virtual_environment, "ensure", lambda group="": Path("/v/python"))
    monkeypatch.setattr(system_libraries, "ensure", lambda **options: become.append(["libraries"]))
    start.main(["chat", "starter", "-p", "Hello"])
    start.main([])
    start.main(["environments", "list"])
    assert become == [
        [str(Path("/v/python")), "-m", "app", "chat", "starter", "-p", "Hello"],
        ["libraries"],
        [str(Path("/v/python")), "-m", "app"],
        [str(Path("/v/python")), "-m", "app.engine.environment_command", "list"],
    ]


def test_a_stop_is_words_and_a_status(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def stop(arguments: list[str], *, yes: bool) -> int:
        raise say.Stop("The reason.\nThe next step.", 3)

    monkeypatch.setattr(start, "open_weft", stop)
    assert start.main([]) == 3
    assert "The next step." in capsys.readouterr().err


# Tests ------------------------------------------------------------------------------------------


def _options(**given: bool) -> argparse.Namespace:
    return argparse.Namespace(**{"slow": False, "gpu": False, "bench": False, "display": False, "yes": False, **given})


def test_the_default_tier_runs_in_both_interpreters() -> None:
    plan = checks.targets([], _options())
    assert plan[checks.WINDOW][:1] == ["tests/unit"]
    assert plan[checks.ENGINES] == ["tests/engine"]


def test_a_named_file_runs_in_the_interpreter_it_belongs_to() -> None:
    here = os.path.relpath(__file__)
    assert checks.targets([f"{here}::test_x", "-x"], _options()) == {checks.WINDOW: [f"{Path(__file__).resolve()}::test_x"]}
    engine = ROOT / "tests" / "engine"
    assert checks.targets([str(engine)], _options()) == {checks.ENGINES: [str(engine)]}


def test_an_option_and_its_value_go_to_pytest() -> None:
    assert checks._options(["-k", "some and thing", os.path.relpath(__file__)]) == ["-k", "some and thing"]


@pytest.mark.parametrize(
    ("outcomes", "status"),
    [
        ([("window's tests", True), ("engines' tests", True)], 0),
        ([("ruff", False), ("window's tests", True)], 1),
        ([("window's tests", None), ("engines' tests", True)], 0),  # -k chose tests of one side only
        ([("ruff", True), ("window's tests", None), ("engines' tests", None)], 5),
    ],
)
def test_the_summary_decides_the_status(
    outcomes: list[tuple[str, bool | None]], status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert checks._summary([checks.Outcome(name, ok, "", 1.0) for name, ok in outcomes]) == status
    assert all(name in capsys.readouterr().out for name, _ in outcomes[:1])


def test_counts_come_from_pytests_report(tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    report.write_text('<testsuites><testsuite tests="9" failures="1" errors="1" skipped="2"/></testsuites>')
    assert checks._counts(report) == "5 passed, 1 failed, 1 errors, 2 skipped"
    assert checks._counts(tmp_path / "none.xml") == ""


def test_the_engines_tests_are_shared_out_evenly_and_none_is_lost() -> None:
    files = list((ROOT / "tests" / "engine").glob("test_*.py"))
    for count in (1, 2, 3):
        lists = checks.shards(files, count)
        assert len(lists) == count
        assert sorted(name for names in lists for name in names) == sorted(str(f.relative_to(ROOT)) for f in files)
        sizes = [sum((ROOT / name).stat().st_size for name in names) for names in lists]
        assert max(sizes) - min(sizes) < max(file.stat().st_size for file in files)
    assert checks.shards(files[:1], 4) == [[str(files[0].relative_to(ROOT))]]
