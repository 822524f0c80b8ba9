"""A run under `accelerate launch`: one process of several. JSON lines on stdout instead of an engine's pipe.

    accelerate launch --config_file CONFIG -m app.training.run_launched PARAMETERS.json

PARAMETERS.json holds a TrainParameters struct. In an exported run's folder relative paths count from that file. The first process
speaks: one line per event, {"kind": "metric" | "news" | "progress" | "log" | "started" | "done" | "failed", …}. Whichever process
fails says `failed`, with its number and its machine's name, and writes the same to stderr.
"""

from __future__ import annotations

import os
import platform
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from app.core.errors import ErrorKind, WeftError
from app.engine.failures import failed
from app.engine.protocol import Loaded, RunTask
from app.training.run_config import TrainParameters
from app.training.run_file import beside

_EVERY = 0.2  # seconds between progress lines


class LineReport:
    """Report for a process without an engine around it.

    Args:
        silent: a process that is not the first says nothing, except why it fails.
        process: its number among all, from 0.
    """

    def __init__(self, *, silent: bool, process: int = 0) -> None:
        self.silent = silent
        self.process = process
        self._shown = 0.0

    def _say(self, **fields: Any) -> None:
        if not self.silent:
            _write(fields)

    def failed(self, error: WeftError) -> None:
        """Why this process ends, whichever it is: the others cannot know. On stderr too, which is the log's."""
        _write(
            {"kind": "failed", "error": error.kind.value, "message": error.message, "hint": error.hint}
            | {"process": self.process, "machine": platform.node()}
        )
        sys.stderr.write(f"Process {self.process} on {platform.node()} failed: {error}\n")
        sys.stderr.flush()

    def progress(self, phase: str, done: float = 0, total: float = 0, unit: str = "") -> None:
        """At most five times a second."""
        now = time.monotonic()
        if now - self._shown >= _EVERY:
            self._shown = now
            self._say(kind="progress", phase=phase, done=done, total=total, unit=unit)

    def metric(self, step: int, values: Mapping[str, float]) -> None:
        """All of them."""
        self._say(kind="metric", step=step, values=dict(values))

    def news(self, json: str) -> None:
        """As JSON in JSON."""
        self._say(kind="news", json=json)

    def log(self, level: str, text: str) -> None:
        """A sentence."""
        self._say(kind="log", level=level, text=text)

    def tokens(self, text: str, count: int, row: int = 0) -> None:
        """Training generates nothing that streams."""

    def loaded(self, event: Loaded) -> None:
        """Training tells its model in news."""

    @property
    def cancelled(self) -> bool:
        """Ctrl+C ends the launcher, and with it this process."""
        return False

    def on_cancel(self, callback: Callable[[], None]) -> None:
        """Never called."""

    def on_adjust(self, callback: Callable[[str], None]) -> None:
        """Never called."""


def _write(fields: dict[str, Any]) -> None:
    sys.stdout.write(msgspec.json.encode(fields).decode() + "\n")
    sys.stdout.flush()


def main(arguments: list[str]) -> int:
    """Run. Returns the exit status: 0 done, 1 failed (`failed` says why). Raises what nothing is known of."""
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", DO_NOT_TRACK="1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    place = Path(arguments[0]).absolute()
    parameters = msgspec.json.decode(place.read_bytes(), type=TrainParameters)
    config = beside(parameters.config, place.parent)
    model = parameters.model
    if not Path(model.path).is_absolute():
        model = msgspec.structs.replace(model, path=str(place.parent / model.path))
    parameters = msgspec.structs.replace(parameters, config=config, model=model)
    from app.training import distributed_torch, run_torch

    process = int(os.environ.get("RANK") or 0)
    report = LineReport(silent=process != 0, process=process)
    accelerator = None
    try:
        accelerator = distributed_torch.make_accelerator(config)
        report.silent = not accelerator.is_main_process
        several = accelerator.num_processes > 1
        report._say(
            kind="started", processes=accelerator.num_processes, distribution=accelerator.distributed_type.value
        )
        result = run_torch.run(parameters, report, accelerator if several else None)  # type: ignore[arg-type]
    except Exception as error:
        known = _known(error)
        if known is None:
            raise  # its traceback is what can be said
        if known is not error:
            traceback.print_exc()
        report.failed(known)
        return 1
    finally:
        if accelerator is not None:
            accelerator.end_training()
    report._say(kind="done", result=result)
    return 0


def _known(error: Exception) -> WeftError | None:
    """What is wrong in words, where there are some: memory, disk, permission, a missing file."""
    if isinstance(error, WeftError):
        return error
    told = failed(RunTask(id=1, task="train"), error, cancelled=False)
    kind = ErrorKind(told.kind)
    return None if kind is ErrorKind.INTERNAL else WeftError(kind, told.message, told.hint)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
