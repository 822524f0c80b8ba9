"""When is an engine unresponsive? Pure arithmetic over the times at which it was asked and heard."""

from __future__ import annotations

PING_EVERY = 2.0  # seconds
SILENCE = 5.0  # seconds without an answer until it counts as unresponsive
_ASLEEP = 2.5  # seconds between two looks, where one is usual: then it was we who stood still


class Heartbeat:
    """Decides when to ping, and when an engine stopped or started to answer. Times are time.monotonic()."""

    def __init__(self, now: float) -> None:
        self.responsive = True
        self.heard_at = now
        self._asked_at: float | None = None
        self._tick_at = now

    def heard(self, now: float) -> None:
        """Something came from the engine: that is life, whatever it was."""
        self.heard_at = now

    def tick(self, now: float, *, stopped: bool) -> tuple[bool, bool | None]:
        """Look. Call it about once a second.

        Args:
            stopped: the system says that the process stands still.

        Returns:
            whether to ping now, and the new state where it changed (True: it answers again).
        """
        asleep = now - self._tick_at > _ASLEEP
        self._tick_at = now
        if self._asked_at is not None and self.heard_at >= self._asked_at:
            self._asked_at = None
        elif self._asked_at is not None and asleep:
            # We were stopped ourselves (a suspended machine, Ctrl+Z): nobody could have been heard.
            self._asked_at = now
        ping = self._asked_at is None and now - self.heard_at >= PING_EVERY
        silent = self._asked_at is not None and now - self._asked_at >= SILENCE
        if ping:
            self._asked_at = now
        responsive = not (stopped or silent)
        changed = responsive != self.responsive
        if changed and responsive and self._asked_at is not None:
            changed = False  # running again, but it has not answered yet
        if changed:
            self.responsive = responsive
        return ping, responsive if changed else None
