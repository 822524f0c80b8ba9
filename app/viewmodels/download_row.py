"""One download of the queue, with what is known of it while the window lives."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from app.hub.files import DownloadNews
from app.store.downloads import Download, DownloadState
from app.viewmodels.transfer_rates import Speed

if TYPE_CHECKING:
    from app.workers.download_worker import DownloadWorker


class Row:
    """One download with what is known of it while the window lives."""

    def __init__(self, download: Download) -> None:
        self.download = download
        self.worker: DownloadWorker | None = None
        self.speed = Speed()
        self.wanted: DownloadState | None = None  # what it becomes when its worker has stopped
        self.forget: bool | None = None  # remove it then, with its parts or without
        self.tries = 0
        self.not_before = 0.0  # time.monotonic

    @property
    def news(self) -> DownloadNews | None:
        return self.worker.latest if self.worker is not None else None

    @property
    def state(self) -> DownloadState:
        return self.download.state

    @property
    def done(self) -> int:
        news = self.news
        return news.done if news is not None else self.download.done

    @property
    def fraction(self) -> float:
        total = self.download.total
        return 1.0 if self.state is DownloadState.DONE else min(1.0, self.done / total) if total else 0.0

    @property
    def left(self) -> float | None:
        """Seconds, or None while unknown."""
        return self.speed.left(self.download.total - self.done) if self.worker is not None else None

    @property
    def waits(self) -> float:
        """Seconds until it is tried again; 0 when it does not wait for that."""
        return max(0.0, self.not_before - time.monotonic()) if self.state is DownloadState.QUEUED else 0.0
