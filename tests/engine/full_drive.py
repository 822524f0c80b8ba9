"""Exports on a drive that is too small, in a process of their own: the converter's gguf must be the first one there.

Run as `python -m tests.engine.full_drive`: a list of steps on stdin, a list of outcomes on stdout, both JSON.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import msgspec

from app.core.errors import WeftError
from app.core.export_plan import ExportPlan
from app.tasks.export_gguf import run
from tests.engine.backend_kit import FakeReport


class Step(msgspec.Struct):
    """One export.

    Attributes:
        free: bytes that the drive says to have; None for what it really has.
        full: name of the file for which it has room for `limit` bytes, whatever it says; "" for none.
    """

    plan: ExportPlan
    free: int | None = None
    full: str = ""
    limit: int = 0


class Outcome(msgspec.Struct):
    """What came of it. left: what lies in the target's folder then, by name."""

    left: list[str]
    kind: str = ""
    message: str = ""


class _Full(io.FileIO):
    """A file that takes no more than some bytes, and of the last ones a part, as a drive does."""

    limit = 0

    def write(self, data: Any) -> int:
        room = self.limit - self.tell()
        if room <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(memoryview(data)[:room])


def _faults(step: Step) -> contextlib.ExitStack:
    made, really = contextlib.ExitStack(), Path.open
    if step.free is not None:
        told = SimpleNamespace(total=1 << 40, used=(1 << 40) - step.free, free=step.free)
        made.enter_context(mock.patch.object(shutil, "disk_usage", lambda _: told))

    def opened(path: Path, mode: str = "r", *more: Any, **settings: Any) -> Any:
        if path.name != step.full or mode != "wb":
            return really(path, mode, *more, **settings)
        raw = _Full(path, mode)
        raw.limit = step.limit
        return io.BufferedWriter(raw)

    made.enter_context(mock.patch.object(Path, "open", opened))
    return made


def outcomes(steps: Sequence[Step]) -> list[Outcome]:
    """Do all of them, one after the other."""
    found: list[Outcome] = []
    for step in steps:
        kind = message = ""
        with _faults(step):
            try:
                run(step.plan, FakeReport())
            except WeftError as error:
                kind, message = error.kind.value, error.message
        folder = Path(step.plan.target).parent
        found.append(Outcome(sorted(path.name for path in folder.iterdir()), kind, message))
    return found


if __name__ == "__main__":
    print(msgspec.json.encode(outcomes(msgspec.json.decode(sys.stdin.buffer.read(), type=list[Step]))).decode())
