"""Is it the file that the hub means: sha256 for large files, git's own hash for the rest."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from pathlib import Path

from app.core.errors import ErrorKind, WeftError
from app.hub.files import RemoteFile

PIECE = 4 * 1024 * 1024


class Checksum:
    """Follows a file's bytes in order; at the end says whether they are the hub's."""

    def __init__(self, file: RemoteFile) -> None:
        if file.sha256:
            self._digest, self._wanted = hashlib.sha256(), file.sha256
        else:
            # Git's blob hash: nothing secret rests on it, it is what the hub knows of a plain file.
            self._digest = hashlib.sha1(b"blob %d\0" % file.size, usedforsecurity=False)
            self._wanted = file.git_oid

    def update(self, data: bytes) -> None:
        self._digest.update(data)

    @property
    def matches(self) -> bool:
        """Whether it is the hub's; true when the hub names none."""
        return not self._wanted or self._digest.hexdigest() == self._wanted


def checksum_name(file: RemoteFile) -> str:
    """What the hub knows this content by."""
    return file.sha256 or file.git_oid


def is_file(
    path: Path, file: RemoteFile, cancelled: threading.Event, progress: Callable[[int], None] = lambda _: None
) -> bool:
    """Whether the file at `path` holds exactly what the hub says, by reading all of it.

    Args:
        progress: told of the bytes read so far.

    Raises:
        WeftError: CANCELLED.
    """
    try:
        if path.stat().st_size != file.size:
            return False
        checksum, position = Checksum(file), 0
        with path.open("rb") as stream:
            while piece := stream.read(PIECE):
                if cancelled.is_set():
                    raise WeftError(ErrorKind.CANCELLED, "The download was stopped; what has arrived is kept.")
                checksum.update(piece)
                position += len(piece)
                progress(position)
    except OSError:
        return False
    return position == file.size and checksum.matches
