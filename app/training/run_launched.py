"""A run under `accelerate launch`: one process of several. JSON lines on stdout instead of an engine's pipe.

    accelerate launch --config_file CONFIG -m app.training.run_launched PARAMETERS.json

PARAMETERS.json holds a TrainParameters struct. In an exported run's folder relative paths count from that file. The first process
speaks: one line per event, {"kind": "metric" | "news" | "progress" | "log" | "started" | "done" | "failed", …}.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from app.core.errors import WeftError
from app.engine.protocol import Loaded
from app.training.run_config import TrainParameters
from app.training.run_file import beside

_EVERY = 0.2  # seconds between progress lines


class LineReport:
    """Report for a process without an engine around it. silent: a process that is not the first says nothing."""

    def __init__(self, *, silent: bool) -> None:
        self.silent = silent
        self._shown = 0.0

    def _say(self, **fields: Any) -> None:
        if not self.silent:
            sys.stdout.write(msgspec.json.encode(fields).decode() + "\n")
            sys.stdout.flush()

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


def main(arguments: list[str]) -> int:
    """Run. Returns the exit status: 0 done, 1 failed (`failed` says why)."""
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

    report = LineReport(silent=os.environ.get("RANK", "0") != "0")
    accelerator = None
    try:
        accelerator = distributed_torch.make_accelerator(config)
        report.silent = not accelerator.is_main_process
        several = accelerator.num_processes > 1
        report._say(
            kind="started", processes=accelerator.num_processes, distribution=accelerator.distributed_type.value
        )
        result = run_torch.run(parameters, report, accelerator if several else None)  # type: ignore[arg-type]
    except WeftError as error:
        report._say(kind="failed", error=error.kind.value, message=error.message, hint=error.hint)
        return 1
    finally:
        if accelerator is not None:
            accelerator.end_training()
    report._say(kind="done", result=result)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
