"""`.venv`, in which the window runs: made, completed, and made anew when it is half-made or broken.

A stamp in it (a hash of the pins and of the Python) is written when an installation is complete. While it
matches, nothing is done. An installation that was interrupted leaves no stamp, so the next start completes it.
"""

from __future__ import annotations

import collections
import contextlib
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

from installer.launcher.say import Stop, say, say_briefly

ROOT = Path(__file__).resolve().parents[2]
VENV = ROOT / ".venv"
LAST_LINES = 25  # of pip, shown when it fails
CONSTRAINTS = ROOT / "resources" / "environments" / "constraints.txt"


def python_of(venv: Path = VENV) -> Path:
    """The interpreter inside a virtual environment."""
    return venv / "Scripts" / "python.exe" if os.name == "nt" else venv / "bin" / "python"


def requirements(group: str = "") -> list[str]:
    """The window's pinned requirements, and those of an extra of pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return project["dependencies"] + (project["optional-dependencies"][group] if group else [])


def fingerprint(pins: list[str]) -> str:
    """What an installation depends on: its pins, those of what they bring along, and the Python."""
    parts = [*pins, CONSTRAINTS.read_text(encoding="utf-8"), sys.version, sys.base_prefix]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def is_ready(group: str = "", venv: Path = VENV) -> bool:
    """Whether `.venv` holds exactly what is wanted. Takes a few milliseconds."""
    return _stamps(venv).get(group or "window") == fingerprint(requirements(group)) and python_of(venv).exists()


def ensure(group: str = "", venv: Path = VENV) -> Path:
    """Make `.venv` hold the window's requirements and those of `group`. Returns its interpreter.

    Raises:
        Stop: when it cannot, with pip's reason above it.
    """
    if is_ready(group, venv):
        return python_of(venv)
    with _only_one(venv):
        if not is_ready(group, venv):  # another start may have done it while we waited
            _make(venv)
            _install(requirements(group), group or "window", venv)
    return python_of(venv)


def _make(venv: Path) -> None:
    if venv.exists():
        if _works(venv):
            return
        say(f"{venv.name} is half-made or belongs to another Python; making it anew")
        shutil.rmtree(venv, ignore_errors=True)
        if venv.exists():
            raise Stop(f"{venv} cannot be removed. Close whatever uses it, delete it, and start again.")
    _need_ensurepip()
    say(f"making {venv.name} with Python {'.'.join(map(str, sys.version_info[:3]))}")
    result = subprocess.run([sys.executable, "-m", "venv", str(venv)], capture_output=True, text=True, check=False)
    if result.returncode:
        shutil.rmtree(venv, ignore_errors=True)
        raise Stop(f"Python could not make {venv}:\n{(result.stdout + result.stderr).strip()}")


def _works(venv: Path) -> bool:
    """Whether the environment's Python is this very version and its pip runs."""
    code = "import sys, pip; print(sys.version)"
    try:
        result = subprocess.run([python_of(venv), "-c", code], capture_output=True, text=True, check=False, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return result.returncode == 0 and result.stdout.strip() == sys.version.strip()


def _need_ensurepip() -> None:
    try:
        import ensurepip  # noqa: F401
    except ImportError:
        name = f"python3.{sys.version_info.minor}-venv"
        raise Stop(
            f"This Python cannot make virtual environments: {name} is not installed.\n"
            f"Run:  {'' if _is_root() else 'sudo '}apt-get install -y {name}\nand start again."
        ) from None


def _is_root() -> bool:
    return hasattr(os, "geteuid") and os.geteuid() == 0


def _install(pins: list[str], name: str, venv: Path) -> None:
    say(f"installing {len(pins)} packages for the {'window' if name == 'window' else 'tests'} into {venv.name}")
    _forget(venv, name)
    command = [str(python_of(venv)), "-m", "pip", "install", "--disable-pip-version-check"]
    command += ["--no-color", "--progress-bar", "off", "--constraint", str(CONSTRAINTS), *pins]
    log = venv / "weft-pip.log"
    status, end = _run_pip(command, log)
    if status:
        raise Stop(
            f"{end}\npip could not install what Weft needs; its reason stands above, and all it said in {log}. "
            "Check the connection (or pip's configuration) and start again: what was downloaded is kept."
        )
    _stamp(venv, name, fingerprint(pins))
    if name != "window":
        _stamp(venv, "window", fingerprint(requirements()))  # a group includes the window's


def _run_pip(command: list[str], log: Path) -> tuple[int, str]:
    """Run pip, whose every word goes into `log` and whose news are shown. Returns its status and its last lines."""
    last: collections.deque[str] = collections.deque(maxlen=LAST_LINES)
    with (
        log.open("w", encoding="utf-8") as file,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, encoding="utf-8", errors="replace"
        ) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            file.write(line)
            last.append(line.rstrip())
            if news := pip_news(line):
                say_briefly(news)
    say_briefly("")
    return process.returncode, "\n".join(last)


def pip_news(line: str) -> str:
    """What one of pip's lines says to somebody who waits; "" for nothing."""
    word, _, rest = line.strip().partition(" ")
    rest = rest.strip()
    if word == "Collecting":
        return "looking for " + re.split(r"[^\w.-]", rest)[0]
    if word == "Downloading" and not rest.endswith(".metadata") and ".metadata (" not in rest:
        name, _, size = rest.rpartition("/")[2].partition(" ")
        return f"downloading {name.partition('-')[0]} {size}".rstrip()
    if word == "Building":
        return f"building {rest.partition(' (')[0].removeprefix('wheel for ').removeprefix('wheels for ')}"
    if line.startswith("Installing collected packages:"):
        return f"unpacking {len(rest.split(','))} packages"
    return ""


def _stamps(venv: Path) -> dict[str, str]:
    try:
        return json.loads((venv / "weft-stamp.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _stamp(venv: Path, name: str, value: str) -> None:
    target = venv / "weft-stamp.json"
    beside = target.with_suffix(".part")
    beside.write_text(json.dumps({**_stamps(venv), name: value}), encoding="utf-8")
    beside.replace(target)


def _forget(venv: Path, name: str) -> None:
    """Take stamps back before anything is changed: pins of one group may move packages of the other."""
    if _stamps(venv):
        (venv / "weft-stamp.json").unlink()


@contextlib.contextmanager
def _only_one(venv: Path) -> Iterator[None]:
    """Hold a lock that the operating system drops when this process ends, however it ends."""
    with venv.with_name(venv.name + ".lock").open("a+b") as lock:
        if os.name == "nt":
            import msvcrt

            msvcrt.locking(lock.fileno(), msvcrt.LK_LOCK, 1)
        else:
            import fcntl

            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                say("waiting for another start that is installing")
                fcntl.flock(lock, fcntl.LOCK_EX)
        yield
