"""How fast, and how patiently: a rate limit that all connections share, and waits between tries."""

from __future__ import annotations

import email.utils
import random
import re
import threading
import time

LONGEST_WAIT = 3600.0  # seconds that a Retry-After is obeyed, at most


class RateLimit:
    """A token bucket shared by threads; changeable while they run.

    Args:
        bytes_per_second: 0 means unlimited.
    """

    def __init__(self, bytes_per_second: float = 0.0) -> None:
        self._rate = bytes_per_second
        self._free_at = 0.0
        self._changed = threading.Condition()

    def change(self, bytes_per_second: float) -> None:
        """Set another limit; it holds at once, also for those that wait now."""
        with self._changed:
            self._rate = max(0.0, bytes_per_second)
            self._free_at = time.monotonic()
            self._changed.notify_all()

    @property
    def piece(self) -> int:
        """A sensible read size, so that a low limit does not come in bursts of seconds. Bytes."""
        rate = self._rate
        return 256 * 1024 if not rate else max(4096, min(256 * 1024, int(rate / 20)))

    def wait_for(self, count: int, cancelled: threading.Event) -> None:
        """Account for `count` bytes and sleep as long as that takes at the limit, or until cancelled."""
        with self._changed:
            if not self._rate:
                return
            now, rate = time.monotonic(), self._rate
            self._free_at = max(self._free_at, now - 0.1) + count / rate
            until = self._free_at
            while self._rate == rate and not cancelled.is_set() and (delay := until - time.monotonic()) > 0:
                self._changed.wait(min(delay, 0.25))


def retry_delay(attempt: int, retry_after: str = "", date: str = "") -> float:
    """Seconds to wait before try number `attempt` (from 1), with jitter; a Retry-After header is obeyed.

    Args:
        retry_after: seconds or an HTTP date, as RFC 9110 section 10.2.3 allows; anything else is ignored.
        date: the answer's Date header, against which an HTTP date counts: this computer's clock may be wrong.
    """
    backoff = min(60.0, 0.5 * 2 ** (attempt - 1)) * random.uniform(0.5, 1.0)
    wanted = 0.0
    if re.fullmatch(r"[0-9]{1,12}", retry_after.strip()):
        wanted = float(retry_after)
    elif retry_after:
        try:
            then = email.utils.parsedate_to_datetime(retry_after).timestamp()
            wanted = then - (email.utils.parsedate_to_datetime(date).timestamp() if date else time.time())
        except (TypeError, ValueError, OverflowError):
            wanted = 0.0
    return max(backoff, min(wanted, LONGEST_WAIT))
