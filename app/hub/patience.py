"""Waits between tries: told while they last, ended by a stop, and what a server asks for holds for all connections."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TypeVar

from app.core.errors import WeftError
from app.hub.limits import retry_delay
from app.hub.progressing import Progressing
from app.hub.source import HttpTrouble
from app.hub.trouble import stopped

TRIES = 8  # of one connection, without a byte in between on any
_SLOW = "The hub asks to slow down."
_T = TypeVar("_T")


class Patience:
    """Of one transfer, shared by its connections.

    Args:
        progress: told of each wait. stopping: whether there is still something to wait for.
        give_up: the failure that a person is shown for a trouble that is not tried again.
    """

    def __init__(
        self,
        progress: Progressing,
        cancelled: threading.Event,
        stopping: Callable[[], bool],
        give_up: Callable[[HttpTrouble], WeftError],
    ) -> None:
        self._progress, self._cancelled, self._stopping, self._give_up = progress, cancelled, stopping, give_up
        self._lock = threading.Lock()
        self._not_before = 0.0  # time.monotonic: the server asked to wait until then
        self._waiting = 0

    def tried(self, action: Callable[[], _T]) -> _T:
        """What `action` returns, once it raises no trouble. Raises WeftError as `before_another_try`."""
        tries = 0
        while True:
            try:
                return action()
            except HttpTrouble as trouble:
                tries += 1
                self.before_another_try(trouble, tries)

    def before_another_try(self, trouble: HttpTrouble, tries: int) -> None:
        """Wait before the next try, `tries` have failed.

        Raises:
            WeftError: there is to be none; CANCELLED.
        """
        if not trouble.retry or tries > TRIES:
            raise self._give_up(trouble) from trouble
        until = time.monotonic() + retry_delay(tries, trouble.retry_after, trouble.date)
        if trouble.retry_after:  # it is meant for all connections
            with self._lock:
                self._not_before = max(self._not_before, until)
        self._sleep_until(until, _SLOW if trouble.status == 429 else trouble.words)

    def wait_for_turn(self) -> None:
        """Wait as long as the server asked any connection to. Raises WeftError CANCELLED."""
        self._sleep_until(self._not_before, _SLOW)

    def _sleep_until(self, moment: float, why: str) -> None:
        seconds = moment - time.monotonic()
        if seconds <= 0:
            return
        with self._lock:
            self._waiting += 1
        self._progress.waiting(seconds, why)
        while not self._stopping() and (rest := moment - time.monotonic()) > 0:
            self._cancelled.wait(min(rest, 0.5))
        with self._lock:
            self._waiting -= 1
            last = not self._waiting
        if last:
            self._progress.waiting(0, "")
        if self._cancelled.is_set():
            raise stopped()
