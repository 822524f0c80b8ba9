"""When to stop starting an engine again."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

from app.core.errors import ErrorKind, WeftError

CRASHES = 4
WITHIN = 300.0  # seconds


class RestartPolicy:
    """Four crashes in five minutes: no more restarts, until something is changed (`reset`).

    Whoever restarts an engine calls `crashed()` with every exit that nobody asked for, and `check()` before
    every start. One policy serves one model with its options.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        # A monotonic clock: setting the machine's clock must not forgive or invent crashes.
        self._clock = clock
        self._times: deque[float] = deque(maxlen=CRASHES)
        self._reason = ""

    def crashed(self, reason: str = "") -> None:
        """An engine died that nobody had asked to end. `reason`: EngineExit.error.message."""
        self._times.append(self._clock())
        self._reason = reason

    def reset(self) -> None:
        """Something was changed (another model, other options), or the user insists: start counting anew."""
        self._times.clear()

    @property
    def allowed(self) -> bool:
        """Whether the engine may be started again."""
        return len(self._times) < CRASHES or self._clock() - self._times[0] > WITHIN

    def check(self) -> None:
        """Raises WeftError (CRASHED), saying why, when the engine may not be started again."""
        if not self.allowed:
            minutes = round(WITHIN / 60)
            last = f" The last time: {self._reason}" if self._reason else ""
            raise WeftError(
                ErrorKind.CRASHED,
                f"The engine crashed {CRASHES} times within {minutes} minutes and is not started again.{last}",
                "Load the model with other options (a shorter context length, fewer layers on the graphics card) or with another "
                "loader, or look into the engine's log.",
            )
