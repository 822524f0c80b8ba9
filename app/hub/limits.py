"""How fast, and how patiently: a rate limit that all connections share, and waits between tries."""

from __future__ import annotations

import email.utils
import random
import threading
import time
from collections.abc import Callable


class RateLimit:
    """A token bucket shared by threads; changeable while they run.

    Args:
        bytes_per_second: 0 means unlimited.
    """

    def __init__(self, bytes_per_second: float = 0.0) -> None:
        self._rate = bytes_per_second
        self._free_at = 0.0
        self._lock = threading.Lock()

    def change(self, bytes_per_second: float) -> None:
        """Set another limit; it holds from the next piece on."""
        with self._lock:
            self._rate = bytes_per_second
            self._free_at = time.monotonic()

    @property
    def piece(self) -> int:
        """A sensible read size, so that a low limit does not come in bursts of seconds. Bytes."""
        return 256 * 1024 if not self._rate else max(4096, min(256 * 1024, int(self._rate / 20)))

    def wait_for(self, count: int, cancelled: threading.Event) -> None:
        """Account for `count` bytes and sleep as long as that takes at the limit, or until cancelled."""
        with self._lock:
            if not self._rate:
                return
            now = time.monotonic()
            self._free_at = max(self._free_at, now - 0.1) + count / self._rate
            delay = self._free_at - now
        if delay > 0:
            cancelled.wait(delay)


def retry_delay(attempt: int, retry_after: str = "", now: Callable[[], float] = time.time) -> float:
    """Seconds to wait before try number `attempt` (from 1), with jitter; a Retry-After header is obeyed.

    Args:
        retry_after: seconds or an HTTP date, as RFC 9110 section 10.2.3 allows; anything else is ignored.
    """
    backoff = min(60.0, 0.5 * 2 ** (attempt - 1)) * random.uniform(0.5, 1.0)
    wanted = 0.0
    if retry_after.strip().isdigit():
        wanted = float(retry_after)
    elif retry_after:
        try:
            wanted = email.utils.parsedate_to_datetime(retry_after).timestamp() - now()
        except (TypeError, ValueError):
            wanted = 0.0
    return max(backoff, min(wanted, 3600.0))
