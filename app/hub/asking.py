"""A hub for the tasks that ask it something: configured, telling the task's report why it waits, ended by its Cancel."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Protocol

from app.hub.listing import Hub
from app.hub.questions import configure


class Reporting(Protocol):
    """What of a task's report is used here."""

    def progress(self, phase: str) -> None: ...

    def on_cancel(self, callback: Callable[[], None]) -> None: ...


def connect(endpoint: str, proxy: str, token: str, report: Reporting, doing: str) -> Hub:
    """The hub to ask.

    Args:
        doing: what a person is told while nothing is amiss.

    Raises:
        WeftError: BAD_INPUT for an endpoint or proxy that is no address.
    """
    report.progress(doing)
    cancelled = threading.Event()
    report.on_cancel(cancelled.set)
    configure(endpoint, proxy)
    return Hub(endpoint, token, waiting=lambda words: report.progress(words or doing), cancelled=cancelled)
