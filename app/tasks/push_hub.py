"""Put a folder or a file onto the hub: a repository of its own, private unless told otherwise."""

from __future__ import annotations

import threading

from app.core.push_plan import PushPlan, PushResult
from app.engine.pausing import Pausing
from app.engine.report import HostReport
from app.hub.push import Push

Parameters = PushPlan


def run(parameters: PushPlan, report: HostReport) -> PushResult:
    """Upload. Raises WeftError, see `Push.run`.

    While it is paused nothing is sent. A line that the hub gives up meanwhile is a try that failed: it is asked again, and only
    the file that was on its way begins anew.
    """
    cancelled = threading.Event()
    report.on_cancel(cancelled.set)
    report.progress("Asking the hub")

    pausing = Pausing(report)

    def progress(phase: str, done: int, total: int) -> None:
        report.progress(phase, done, total, "bytes")
        pausing.stopped()  # asked at each piece; a cancel ends it at the next

    return Push(
        parameters, progress=progress, waiting=lambda words: report.progress(words or "Uploading"), cancelled=cancelled
    ).run()
