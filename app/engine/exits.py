"""How an engine ended, in words: from an exit status to what a person can do about it."""

from __future__ import annotations

import re
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

from app.core.errors import ErrorKind, WeftError
from app.engine.failures import SMALLER_LOAD, mentions_out_of_memory

_IMPORT_ERROR = re.compile(r"(ModuleNotFoundError|ImportError): .{1,200}")
_WORDS = {
    "SIGSEGV": "a memory access error in native code",
    "SIGABRT": "a library gave up",
    "SIGBUS": "a file was shortened while it was in use, or the disk failed or was full",
    "SIGILL": "a library was built for another processor",
    "SIGFPE": "an arithmetic error in native code",
    "SIGTERM": "it was ended from outside",
    "SIGKILL": "it was killed from outside",
}


@dataclass(frozen=True, kw_only=True)
class EngineExit:
    """An engine's end.

    Attributes:
        code: the exit status; None when a signal ended it or it never started.
        signal: name of the signal that ended it (`SIGSEGV`), or "".
        asked: we wanted it to end (shutdown, kill, a cancel that it did not hear).
        out_of_memory: memory ran out, as far as one can tell.
        error: what to show: CRASHED, OUT_OF_MEMORY, PROTOCOL, ENVIRONMENT, or CANCELLED when it was asked for.
        pending: ids of the commands that it died with.
        log_tail: the last lines of its log.
    """

    code: int | None
    signal: str = ""
    asked: bool = False
    out_of_memory: bool = False
    error: WeftError
    pending: tuple[int, ...] = ()
    log_tail: str = ""

    @property
    def crashed(self) -> bool:
        """Whether it ended by itself: what a RestartPolicy counts."""
        return not self.asked


def describe_exit(
    status: int,
    *,
    asked: bool,
    killed: bool,
    cause: WeftError | None,
    pending: tuple[int, ...],
    tail: str,
    log_path: Path,
    oom_kills: int,
    ready: bool = True,
) -> EngineExit:
    """What an exit status means.

    Args:
        status: as subprocess gives it, negative for a signal.
        asked: we wanted it to end. killed: the kill was ours.
        cause: why we ended it, or what it said itself when it could not start.
        oom_kills: processes that the kernel killed for want of memory during its life.
        ready: it had come as far as its handshake.
    """
    name = _signal_name(-status) if status < 0 else ""
    foreign_kill = name == "SIGKILL" and not killed and not asked
    memory = (foreign_kill and oom_kills != 0) or (
        cause is None and not killed and status != 0 and mentions_out_of_memory(tail[-4096:])
    )
    if cause is not None:
        error = cause
        asked = asked or cause.kind is ErrorKind.CANCELLED
        memory = cause.kind is ErrorKind.OUT_OF_MEMORY
    elif asked:
        error = WeftError(ErrorKind.CANCELLED, "The engine was ended.")
    elif memory:
        error = WeftError(
            ErrorKind.OUT_OF_MEMORY,
            "The engine was ended by the system because memory ran out."
            if foreign_kill
            else "The engine ended because memory ran out.",
            SMALLER_LOAD,
        )
    elif foreign_kill:
        error = WeftError(
            ErrorKind.CRASHED,
            "The engine was killed from outside. Systems do that when memory runs short.",
            f"Send again to start it anew. If it happens again: {SMALLER_LOAD}",
        )
    elif not ready and (missing := _IMPORT_ERROR.search(tail)) is not None:
        error = WeftError(
            ErrorKind.ENVIRONMENT,
            f"The engine cannot start, its Python environment is incomplete: {missing.group()}.",
            "Repair the loader's environment in the settings.",
        )
    else:
        how = f"{name}: {_WORDS.get(name, 'a signal')}" if name else f"exit status {status}"
        error = WeftError(
            ErrorKind.CRASHED,
            f"The engine crashed ({how}).",
            f"Send again to start it anew. The log {log_path} says more.",
        )
    return EngineExit(
        code=status if status >= 0 else None,
        signal=name,
        asked=asked,
        out_of_memory=memory,
        error=error,
        pending=pending,
        log_tail=tail,
    )


def oom_kills() -> int:
    """How many processes the kernel has killed for want of memory since it started; 0 where it does not say.

    Counts all control groups (/proc/vmstat, Linux 4.13+).
    """
    if sys.platform.startswith("linux"):
        try:
            for line in Path("/proc/vmstat").read_text().splitlines():
                if line.startswith("oom_kill "):
                    return int(line.split()[1])
        except (OSError, ValueError):
            return 0
    return 0


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
