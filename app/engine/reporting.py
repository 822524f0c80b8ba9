"""Report: how a backend or a task speaks while it works. The host implements it (`report.HostReport`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, Protocol

from app.engine.protocol import Loaded


class Report(Protocol):
    """How a backend speaks while it works. All methods may be called from any thread and never block for long."""

    def progress(self, phase: str, done: float = 0, total: float = 0, unit: str = "") -> None:
        """Say how far it is; the host thins this out to 30 a second."""
        ...

    def tokens(self, text: str, count: int, row: int = 0) -> None:
        """Hand on generated text; the host batches this to one event every 16 ms."""
        ...

    def loaded(self, event: Loaded) -> None:
        """Say what was loaded."""
        ...

    def metric(self, step: int, values: Mapping[str, float]) -> None:
        """Named numbers at a step of a task (loss, learning rate)."""
        ...

    def news(self, json: str) -> None:
        """What a task has to tell its worker, as JSON; a few times a second at most."""
        ...

    def log(self, level: Literal["debug", "info", "warning", "error"], text: str) -> None:
        """Write to the engine's log; warnings and errors are shown."""
        ...

    @property
    def cancelled(self) -> bool:
        """Whether Cancel has come for the command at work. Look often."""
        ...

    def on_cancel(self, callback: Callable[[], None]) -> None:
        """Have `callback` run (in the reader thread) as soon as Cancel comes for the command at work."""
        ...

    def on_adjust(self, callback: Callable[[str], None]) -> None:
        """Have `callback` run (in the reader thread) with the JSON of each Adjust for the task at work."""
        ...
