"""Folders whose files are still being downloaded: a note beside the files says which are not there yet.

The downloader writes it before the first byte and empties its list when all is there and checked, so that nobody
takes half a model for a broken one. It also remembers which files were verified, so that they need not be read again.
"""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

NOTE = ".weft-download.json"
MAX_BYTES = 4 * 1024 * 1024


class Verified(msgspec.Struct, frozen=True, kw_only=True):
    """A file whose content was compared with the hub's checksum; void when its size or time is another now."""

    size: int
    modified_ns: int
    checksum: str


class DownloadNote(msgspec.Struct, frozen=True, kw_only=True):
    """What lies in the note.

    Attributes:
        repo, revision, commit, endpoint: where the files come from.
        pending: paths in this folder that are wanted and not complete.
        verified: by path.
    """

    repo: str = ""
    revision: str = ""
    commit: str = ""
    endpoint: str = ""
    pending: tuple[str, ...] = ()
    verified: dict[str, Verified] = {}


def read_note(folder: Path) -> DownloadNote | None:
    """The note of a folder; None when there is none that can be read."""
    path = folder / NOTE
    try:
        if path.stat().st_size > MAX_BYTES:
            return None
        return msgspec.json.decode(path.read_bytes(), type=DownloadNote)
    except (OSError, msgspec.MsgspecError, ValueError, RecursionError):
        return None


def write_note(folder: Path, note: DownloadNote) -> None:
    """Write the note of a folder, at once or not at all. Raises OSError."""
    part = folder / f"{NOTE}.{os.getpid()}.part"
    try:
        part.write_bytes(msgspec.json.format(msgspec.json.encode(note), indent=1))
        part.replace(folder / NOTE)
    except OSError:
        part.unlink(missing_ok=True)
        raise


def pending_files(folder: Path) -> frozenset[str]:
    """Paths below a folder that a download still has to bring."""
    note = read_note(folder)
    return frozenset(note.pending) if note is not None else frozenset()
