"""One run of uv: found, fed, watched, niced, cancelled, and its failure put into words."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import psutil

import app
from app.core.errors import ErrorKind, WeftError
from app.core.jobs import Progress
from app.engine.process_tree import ProcessTree


class LogFile(Protocol):
    """Where an installation's words go: an open text file, or what passes them on."""

    def write(self, text: str, /) -> object: ...
    def flush(self) -> None: ...


Report = Callable[[Progress], None]
Cancelled = Callable[[], bool]

# A frozen program has no `-m`; there uv is started as it is.
_WATCHED = () if getattr(sys, "frozen", False) else (sys.executable, "-m", "app.engine.run_watched")
_POLL = 0.2  # seconds between looks at cancellation
_MEASURE = 1.0  # seconds between looks at sizes
_GRACE = 3.0  # seconds between asking a tree to end and killing it


def find_uv() -> Path:
    """uv's program: WEFT_UV, else the one installed beside us, else the one on PATH.

    Raises:
        WeftError: ENVIRONMENT when there is none.
    """
    own = Path(sys.executable).parent / ("uv.exe" if os.name == "nt" else "uv")
    found = os.environ.get("WEFT_UV") or (str(own) if own.exists() else shutil.which("uv"))
    if not found:
        raise WeftError(
            ErrorKind.ENVIRONMENT,
            "uv, which makes the engines' environments, is not installed.",
            "Start Weft with `python3 run.py`, which installs it, or install uv and put it on PATH.",
        )
    return Path(found)


class UvRun:
    """Runs uv commands one after the other for one installation.

    Args:
        variables: added to the environment of uv.
        report, cancelled: how far it is; whether to stop. `cancelled` is asked several times a second.
        log: gets every line that uv prints, and the commands.
        measure: bytes that this installation has brought so far; expected: about how many it will.
        folder: where uv runs; no configuration file lies in it.
    """

    def __init__(
        self,
        *,
        variables: Mapping[str, str],
        report: Report,
        cancelled: Cancelled,
        log: LogFile,
        measure: Callable[[], int],
        expected: int,
        folder: Path,
    ) -> None:
        self._environment = {**os.environ, **variables, "NO_COLOR": "1", "UV_NO_PROGRESS": "1"}
        # What Weft's own start set would leak into the builds' Pythons.
        for name in ("PYTHONHOME", "VIRTUAL_ENV", "UV_PROJECT_ENVIRONMENT"):
            self._environment.pop(name, None)
        self._environment |= {"PYTHONPATH": str(Path(app.__file__).resolve().parents[1]), "PYTHONSAFEPATH": "1"}
        self._folder = folder
        self._report = report
        self._cancelled = cancelled
        self._log = log
        self._measure = measure
        self._expected = expected

    def run(self, command: Sequence[str | Path], phase: str, *, variables: Mapping[str, str] | None = None) -> list[str]:
        """Run one command to its end, saying `phase` (and what uv says it does) meanwhile.

        Returns: the lines it printed.

        Raises:
            WeftError: CANCELLED, or what `failure` makes of its last words.
        """
        self._log.write(f"$ {' '.join(map(str, command))}\n")
        self._log.flush()
        if self._cancelled():
            raise cancelled_error()
        lines: list[str] = []
        tree = ProcessTree(
            [*_WATCHED, *(str(part) for part in command)], environment=self._environment | dict(variables or {}), folder=self._folder
        )
        _be_nice(tree.pid)
        status: list[int] = []
        waiter = threading.Thread(target=lambda: status.append(tree.wait()), name="uv", daemon=True)
        reader = threading.Thread(target=self._read, args=(tree, lines), name="uv output", daemon=True)
        waiter.start()
        reader.start()
        try:
            self._watch(waiter, lines, phase)
        finally:
            if waiter.is_alive():
                _end(tree, waiter)
            reader.join(_GRACE)
            for pipe in (tree.process.stdin, tree.process.stdout, None if reader.is_alive() else tree.process.stderr):
                if pipe is not None:
                    pipe.close()
        if status != [0]:
            raise failure(lines, status[0] if status else -1)
        return lines

    def _read(self, tree: ProcessTree, lines: list[str]) -> None:
        assert tree.process.stderr is not None
        for raw in tree.process.stderr:
            line = raw.decode("utf-8", errors="replace")
            lines.append(line.rstrip())
            with contextlib.suppress(ValueError):  # the log was closed: the installation has been given up
                self._log.write(line)
                self._log.flush()

    def _watch(self, waiter: threading.Thread, lines: list[str], phase: str) -> None:
        started = measured = time.monotonic()
        size = 0
        shown = ""
        while waiter.is_alive():
            if self._cancelled():
                self._log.write("cancelled\n")
                raise cancelled_error()
            now = time.monotonic()
            words = phase_in_words(lines, phase, now - started)
            if now - measured >= _MEASURE or words != shown:
                size, measured, shown = max(size, self._measure()), now, words
                self._report(Progress(phase=words, done=size, total=max(size, self._expected), unit="bytes"))
            waiter.join(_POLL)


def phase_in_words(lines: Iterable[str], phase: str, seconds: float) -> str:
    """What uv is doing, from what it printed last."""
    downloading: list[str] = []
    building = ""
    for line in lines:
        words = line.split()
        if len(words) < 2:
            continue
        if words[0] == "Downloading":
            downloading.append(" ".join(words[1:]))
        elif words[0] == "Downloaded":
            downloading = [d for d in downloading if d.split()[0] != words[1]]
        elif words[0] == "Building":
            building = words[1].split("==")[0]
        elif words[0] in ("Built", "Prepared", "Installed"):
            building = ""
    if building:
        return f"Compiling {building} ({seconds / 60:.0f} min so far)" if seconds >= 30 else f"Compiling {building}"
    if downloading:
        return f"Downloading {', '.join(downloading[:3])}{' …' if len(downloading) > 3 else ''}"
    return phase


def cancelled_error() -> WeftError:
    """What a cancelled installation raises."""
    return WeftError(ErrorKind.CANCELLED, "The installation was cancelled. What is complete is kept.", "Install again to go on.")


_NETWORK = re.compile(
    r"dns error|error sending request|connection (refused|reset|closed)|timed? ?out|failed to (fetch|download)|"
    r"network is unreachable|certificate|tls|http status|request failed",
    re.IGNORECASE,
)
_COMPILER = re.compile(r"CMAKE_C(XX)?_COMPILER|No CMAKE_C|unable to find a build program|command 'g?cc' failed|Visual Studio", re.IGNORECASE)


def failure(lines: Sequence[str], status: int) -> WeftError:
    """uv's last words as an error with the next step."""
    text = "\n".join(lines)
    told = [line.strip(" ×╰─▶│├") for line in lines if line.strip(" ×╰─▶│├")]
    reason = next((line for line in told if line.startswith("error:")), "") or "; ".join(told[-3:]) or f"exit status {status}"
    reason = reason.removeprefix("error: ")[:500]
    if "No space left" in text or "os error 28" in text or "os error 112" in text:
        return WeftError(
            ErrorKind.DISK_FULL, f"The disk is full: {reason}", "Make room and install again; what was downloaded is kept."
        )
    if _COMPILER.search(text):
        from app.engine import compiler  # here: it asks the system things that nobody needs otherwise

        return WeftError(ErrorKind.ENVIRONMENT, f"Compiling failed: {reason}", compiler.hint())
    if _NETWORK.search(text):
        return WeftError(
            ErrorKind.NETWORK,
            f"Packages could not be downloaded: {reason}",
            "Check the connection and install again; what was downloaded is kept.",
        )
    if "Permission denied" in text or "os error 13" in text:
        return WeftError(ErrorKind.PERMISSION, f"Not allowed: {reason}", "Check who owns the folder, then install again.")
    return WeftError(ErrorKind.ENVIRONMENT, f"The installation failed: {reason}", "Read its log, then try Repair.")


def _be_nice(pid: int) -> None:
    """On Windows, let the rest of the machine go first; elsewhere run_watched does it before it starts anything."""
    if sys.platform == "win32":
        with contextlib.suppress(psutil.Error, OSError):
            psutil.Process(pid).nice(psutil.BELOW_NORMAL_PRIORITY_CLASS)


def _end(tree: ProcessTree, waiter: threading.Thread) -> None:
    """End a process and everything it started: asked first, so that it tidies up; killed after a grace."""
    if sys.platform != "win32":
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(tree.pid, signal.SIGTERM)
        waiter.join(_GRACE)
    tree.kill()
    waiter.join(_GRACE)
