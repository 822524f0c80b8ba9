"""The queue of downloads: it outlives the window, so that quitting and starting again loses nothing."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Any

import msgspec

from app.core.errors import ErrorKind, WeftError
from app.hub.files import Listing, RemoteFile
from app.store.database import Database


class DownloadState(StrEnum):
    """QUEUED and RUNNING go on by themselves, PAUSED and FAILED when somebody says so."""

    QUEUED = "queued"
    RUNNING = "running"
    PAUSED = "paused"
    DONE = "done"
    FAILED = "failed"

    @property
    def active(self) -> bool:
        return self in (DownloadState.QUEUED, DownloadState.RUNNING)


class Download(msgspec.Struct, frozen=True, kw_only=True):
    """Files of one repository on their way into one folder.

    Attributes:
        id, position: row number; place in the queue, smaller is earlier.
        title: what a person sees: `user/model`, or with the quantization that was chosen.
        repo, revision, commit, endpoint, kind: see `hub.files.Listing`.
        folder, files, here: where they go, which, and copies on this machine by path.
        total, done: bytes. failure: an ErrorKind, with message and hint, when it failed.
        created, ended: seconds since the epoch.
    """

    id: int
    position: float
    state: DownloadState
    title: str
    repo: str
    revision: str
    commit: str
    endpoint: str
    kind: str
    folder: str
    files: tuple[RemoteFile, ...]
    here: dict[str, str] = {}
    total: int = 0
    done: int = 0
    failure: str = ""
    message: str = ""
    hint: str = ""
    created: float = 0.0
    ended: float = 0.0

    @property
    def page(self) -> str:
        """The repository's page on the hub."""
        return f"{self.endpoint}/{self.repo}"


_COLUMNS = (
    "id, position, state, title, repo, revision, commit_hash, endpoint, kind, folder, files, here, total, done,"
    " failure, message, hint, created, ended"
)
_CHANGEABLE = frozenset({"state", "done", "failure", "message", "hint", "ended", "position"})


class DownloadStore:
    """All downloads. Every method may be called from any thread, and raises WeftError as `Database.execute` does."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def add(
        self,
        listing: Listing,
        files: Sequence[RemoteFile],
        folder: str,
        title: str,
        *,
        here: Mapping[str, str] | None = None,
        state: DownloadState = DownloadState.QUEUED,
    ) -> Download:
        """A new download at the end of the queue."""
        copies = {file.path: (here or {})[file.path] for file in files if file.path in (here or {})}
        row = self._database.execute(
            "INSERT INTO downloads (position, state, title, repo, revision, commit_hash, endpoint, kind, folder, files,"
            " here, total, created) SELECT coalesce(max(position), 0) + 1, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ? FROM downloads",
            (
                state.value,
                title,
                listing.repo,
                listing.revision,
                listing.commit,
                listing.endpoint,
                listing.kind,
                folder,
                msgspec.json.encode(files).decode(),
                msgspec.json.encode(copies).decode(),
                sum(file.size for file in files),
                time.time(),
            ),
        ).lastrowid
        assert row is not None
        return self.get(row)

    def downloads(self) -> list[Download]:
        """All, in the order of the queue."""
        return [
            _download(row) for row in self._database.rows(f"SELECT {_COLUMNS} FROM downloads ORDER BY position, id")
        ]

    def get(self, download: int) -> Download:
        """One. Raises WeftError NOT_FOUND."""
        row = self._database.row(f"SELECT {_COLUMNS} FROM downloads WHERE id = ?", (download,))
        if row is None:
            raise WeftError(
                ErrorKind.NOT_FOUND, f"There is no download {download}.", "It may have been removed from the list."
            )
        return _download(row)

    def update(self, download: int, **fields: object) -> None:
        """Change fields of a download. Raises TypeError for a field that never changes."""
        if unknown := fields.keys() - _CHANGEABLE:
            raise TypeError(f"a download's {', '.join(sorted(unknown))} cannot be set")
        assignments = ", ".join(f"{name} = ?" for name in fields)
        values = [value.value if isinstance(value, DownloadState) else value for value in fields.values()]
        self._database.execute(f"UPDATE downloads SET {assignments} WHERE id = ?", (*values, download))

    def reorder(self, order: Sequence[int]) -> None:
        """Give the downloads with these ids the places 1, 2, …"""
        with self._database.transaction() as connection:
            connection.executemany(
                "UPDATE downloads SET position = ? WHERE id = ?", [(place, key) for place, key in enumerate(order, 1)]
            )

    def remove(self, download: int) -> None:
        """Take it off the list. Files stay."""
        self._database.execute("DELETE FROM downloads WHERE id = ?", (download,))

    def requeue_interrupted(self) -> None:
        """At start: what ran when Weft ended goes on."""
        self._database.execute(
            "UPDATE downloads SET state = ? WHERE state = ?", (DownloadState.QUEUED.value, DownloadState.RUNNING.value)
        )

    def release(self) -> None:
        """Close this thread's connection; a thread that ends calls it last."""
        self._database.release()


def _download(row: Any) -> Download:
    values = dict(zip(Download.__struct_fields__, row, strict=True))
    values["state"] = DownloadState(values["state"])
    values["files"] = msgspec.json.decode(values["files"], type=tuple[RemoteFile, ...])
    values["here"] = msgspec.json.decode(values["here"], type=dict[str, str])
    return Download(**values)
