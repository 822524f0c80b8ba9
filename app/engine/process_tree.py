"""A child process and everything it starts, ended together: a process group on POSIX, a job object on Windows."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

if sys.platform == "win32":
    from app.engine.windows_job import CREATION_FLAGS, Job
else:
    import signal

_MARK = "WEFT_PROCESS_TREE"  # an environment variable that finds descendants which left the group


class ProcessTree:
    """One child with pipes for stdin, stdout and stderr, in its own session and process group.

    Raises:
        OSError: when the program cannot be started.
    """

    def __init__(self, arguments: Sequence[str], *, environment: Mapping[str, str], folder: Path) -> None:
        self._mark = uuid.uuid4().hex
        self._lock = threading.Lock()  # between killing and reaping
        self._reaped = False
        flags = 0
        if sys.platform == "win32":
            self._job = Job()
            flags = CREATION_FLAGS
        self.process = subprocess.Popen(
            list(arguments),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            cwd=folder,
            env={**environment, _MARK: self._mark},
            start_new_session=True,
            creationflags=flags,
        )
        self.pid = self.process.pid
        if sys.platform == "win32":
            self._job.adopt(self.process)

    def wait(self) -> int:
        """Block until the child is dead, kill what it left behind, and return its status (negative: a signal)."""
        if sys.platform == "linux":
            # Reaped last: until then its number, and so its group's, cannot belong to anybody else.
            os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
            with self._lock:
                self._kill_group()
                status = self.process.wait()
                self._reaped = True
        else:
            status = self.process.wait()
            with self._lock:
                self._kill_group()
                self._reaped = True
        if sys.platform == "win32":
            self._job.close()
        else:
            self._kill_stragglers()
        return status

    def kill(self) -> None:
        """Kill the child and all that descends from it, at once. Does nothing when it is dead."""
        with self._lock:
            if self._reaped:
                return
            descendants = _descendants(self.pid)
            self._kill_group()
        for process in descendants:
            with contextlib.suppress(psutil.Error):
                process.kill()

    def stopped(self) -> bool:
        """Whether the child stands still (SIGSTOP, a debugger)."""
        try:
            return not self._reaped and psutil.Process(self.pid).status() in (
                psutil.STATUS_STOPPED,
                psutil.STATUS_TRACING_STOP,
            )
        except psutil.Error:
            return False

    def _kill_group(self) -> None:
        if sys.platform == "win32":
            self._job.kill()
        else:
            # EPERM is what macOS says of a group of zombies.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)

    def _kill_stragglers(self) -> None:
        # A descendant that made a session of its own and lost its parent is in no tree any more, but it
        # carries our mark in its environment.
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if process.environ().get(_MARK) == self._mark:
                    process.kill()


def _descendants(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.Error:
        return []
