"""Fetch files of a repository into a folder. Resumes from what lies there; verified before anything has its final name."""

from __future__ import annotations

import threading
from pathlib import Path

import msgspec

from app.core.unfinished import DownloadNote
from app.engine.report import HostReport
from app.hub.fetch import Fetch
from app.hub.files import DownloadNews, DownloadResult, RemoteFile
from app.hub.limits import RateLimit
from app.hub.source import HttpSource


class Parameters(msgspec.Struct, frozen=True, kw_only=True):
    """What to fetch, and how.

    Attributes:
        endpoint: the hub's address. repo, revision, commit: which version; noted beside the files.
        files: which. folder: where they go. here: copies on this machine, by path.
        rate: bytes a second, 0 unlimited; `Adjust` changes it. connections: ranges of one file at once.
        proxy: "" for the system's. timeout: seconds without a byte. token: travels over the pipe and nowhere else.
    """

    endpoint: str
    repo: str
    revision: str
    commit: str
    files: tuple[RemoteFile, ...]
    folder: str
    here: dict[str, str] = {}
    rate: float = 0.0
    connections: int = 4
    proxy: str = ""
    timeout: float = 20.0
    token: str = ""


class Adjustment(msgspec.Struct, frozen=True, kw_only=True):
    """What can be changed while it runs. rate: bytes a second, 0 unlimited."""

    rate: float = 0.0


def run(parameters: Parameters, report: HostReport) -> DownloadResult:
    """Bring the files. Raises WeftError, see `Fetch.run`."""
    limit = RateLimit(parameters.rate)
    source = HttpSource(parameters.endpoint, parameters.token, parameters.proxy, parameters.timeout)
    encoder = msgspec.json.Encoder()

    def news(now: DownloadNews) -> None:
        report.news(encoder.encode(now).decode())
        report.progress(now.waiting or now.phase, now.done, now.total, "bytes")

    fetch = Fetch(
        source,
        parameters.files,
        Path(parameters.folder),
        note=DownloadNote(
            repo=parameters.repo,
            revision=parameters.revision,
            commit=parameters.commit,
            endpoint=parameters.endpoint,
        ),
        here=parameters.here,
        limit=limit,
        connections=parameters.connections,
        news=news,
        cancelled=threading.Event(),
    )
    report.on_cancel(fetch.stop)
    report.on_adjust(lambda text: limit.change(msgspec.json.decode(text, type=Adjustment).rate))
    try:
        return fetch.run()
    finally:
        source.close()
