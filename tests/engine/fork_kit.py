"""Work in a process of its own that begins as this one is, under limits that only it has (Linux)."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import select
import signal
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


class Failed(Exception):
    """What the work raised there, in words."""


def in_a_fork(work: Callable[[], Any], deadline: float = 240.0) -> Any:
    """What `work` returns there, through JSON. Raises Failed, also where it takes longer than so many seconds: it is killed then."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        said = b"{}"
        try:
            said = json.dumps({"result": work()}).encode()
        except BaseException as error:
            traceback.print_exc()
            said = json.dumps({"error": f"{type(error).__name__}: {error}"}).encode()
        finally:
            with contextlib.suppress(OSError):  # nobody waits for it any more
                os.write(writing, said)
            os._exit(0)
    os.close(writing)
    text, ends, late = b"", time.monotonic() + deadline, False
    try:
        while True:
            late = not select.select([reading], [], [], max(0.0, ends - time.monotonic()))[0]
            piece = b"" if late else os.read(reading, 1 << 16)
            if not piece:
                break
            text += piece
    finally:
        os.close(reading)
        if late or not text:  # it hangs, or the test was interrupted
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
    if late:
        raise Failed(f"it had not ended after {deadline:g} seconds")
    said = json.loads(text or b"{}")
    if "result" not in said:
        raise Failed(said.get("error", f"it ended with status {status}"))
    return said["result"]


def private_memory() -> int:
    """Bytes of private memory that this process has asked the system for: what `allow` limits."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmData:"))
    return int(line.split()[1]) * 1024


def allow(more: int) -> None:
    """Have the system refuse private memory beyond what is held now and `more` bytes (mapped files are no private memory)."""
    resource = importlib.import_module("resource")
    resource.setrlimit(resource.RLIMIT_DATA, (private_memory() + more, resource.RLIM_INFINITY))


_HOARD: list[torch.Tensor] = []


def allow_only(more: int | None) -> None:
    """`allow`, after all was taken that the allocator still had in hand: what is needed from now on comes from the system. None: no limit."""
    allow(0)
    with contextlib.suppress(RuntimeError):
        while True:
            _HOARD.append(torch.empty(64 * 1024))
    allow(1 << 50 if more is None else more)
