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

_MARK = "WEFT_PROCESS_TREE"  # an environment variable that finds descendants which left the group

if sys.platform != "win32":
    import signal


class ProcessTree:
    """One child with pipes for stdin, stdout and stderr, in its own session and process group.

    Raises:
        OSError: when the program cannot be started.
    """

    def __init__(self, arguments: Sequence[str], *, environment: Mapping[str, str], folder: Path) -> None:
        self._mark = uuid.uuid4().hex
        self._job: _Job | None = None
        flags = 0
        if sys.platform == "win32":
            self._job = _Job()
            suspended = 0x4  # so that it is in the job before it can start anything
            flags = subprocess.CREATE_NEW_PROCESS_GROUP | subprocess.CREATE_NO_WINDOW | suspended
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
        self._reaped = False
        self._lock = threading.Lock()  # between killing and reaping
        if self._job is not None:
            self._job.adopt(self.process)

    def wait(self) -> int:
        """Block until the child is dead, kill what it left behind, and return its status (negative: a signal).

        The child is reaped last: until then its number, and so its group's, cannot belong to anybody else.
        """
        if hasattr(os, "waitid"):
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
        self._kill_stragglers()
        if self._job is not None:
            self._job.close()
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
            if self._job is not None:
                self._job.kill()
        else:
            # EPERM is what macOS says of a group of zombies.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)

    def _kill_stragglers(self) -> None:
        # A descendant that made a session of its own and lost its parent is in no tree any more, but it
        # carries our mark in its environment.
        if sys.platform == "win32":
            return  # nobody leaves a job object
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if process.environ().get(_MARK) == self._mark:
                    process.kill()


def _descendants(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.Error:
        return []


class _Job:
    """A Windows job object: whatever is in it dies when the last handle closes, also by our own death."""

    def __init__(self) -> None:
        if sys.platform == "win32":
            import ctypes
            from ctypes import wintypes

            class BasicLimits(ctypes.Structure):
                _fields_ = [
                    ("PerProcessUserTimeLimit", ctypes.c_int64),
                    ("PerJobUserTimeLimit", ctypes.c_int64),
                    ("LimitFlags", wintypes.DWORD),
                    ("MinimumWorkingSetSize", ctypes.c_size_t),
                    ("MaximumWorkingSetSize", ctypes.c_size_t),
                    ("ActiveProcessLimit", wintypes.DWORD),
                    ("Affinity", ctypes.c_size_t),
                    ("PriorityClass", wintypes.DWORD),
                    ("SchedulingClass", wintypes.DWORD),
                ]

            class ExtendedLimits(ctypes.Structure):
                _fields_ = [
                    ("BasicLimitInformation", BasicLimits),
                    ("IoInfo", ctypes.c_uint64 * 6),
                    ("ProcessMemoryLimit", ctypes.c_size_t),
                    ("JobMemoryLimit", ctypes.c_size_t),
                    ("PeakProcessMemoryUsed", ctypes.c_size_t),
                    ("PeakJobMemoryUsed", ctypes.c_size_t),
                ]

            kernel = ctypes.WinDLL("kernel32", use_last_error=True)
            kernel.CreateJobObjectW.restype = wintypes.HANDLE
            kernel.AssignProcessToJobObject.argtypes = (wintypes.HANDLE, wintypes.HANDLE)
            kernel.TerminateJobObject.argtypes = (wintypes.HANDLE, wintypes.UINT)
            kernel.CloseHandle.argtypes = (wintypes.HANDLE,)
            kernel.SetInformationJobObject.argtypes = (wintypes.HANDLE, ctypes.c_int, ctypes.c_void_p, wintypes.DWORD)
            self._kernel = kernel
            self._handle = kernel.CreateJobObjectW(None, None)
            limits = ExtendedLimits()
            limits.BasicLimitInformation.LimitFlags = 0x2000  # JOB_OBJECT_LIMIT_KILL_ON_JOB_CLOSE
            extended = 9  # JobObjectExtendedLimitInformation
            if not self._handle or not kernel.SetInformationJobObject(
                self._handle, extended, ctypes.byref(limits), ctypes.sizeof(limits)
            ):
                raise ctypes.WinError(ctypes.get_last_error())

    def adopt(self, process: subprocess.Popen[bytes]) -> None:
        """Put a suspended process into the job and let it run."""
        if sys.platform == "win32":
            import ctypes
            from ctypes import wintypes

            handle = int(process._handle)  # pyright: ignore[reportAttributeAccessIssue]
            if not self._kernel.AssignProcessToJobObject(self._handle, handle):
                process.kill()
                raise ctypes.WinError(ctypes.get_last_error())
            resume = ctypes.WinDLL("ntdll").NtResumeProcess
            resume.argtypes = (wintypes.HANDLE,)
            resume(handle)

    def kill(self) -> None:
        """End everything in the job."""
        if sys.platform == "win32" and self._handle:
            self._kernel.TerminateJobObject(self._handle, 1)

    def close(self) -> None:
        """Give the handle back."""
        if sys.platform == "win32" and self._handle:
            self._kernel.CloseHandle(self._handle)
            self._handle = None
