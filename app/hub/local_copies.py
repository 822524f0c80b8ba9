"""Files of a repository that lie on this machine already: in the Hugging Face cache, or in another root of the library.

They are found by name, size and (in the cache) checksum; nothing is read here. Whoever uses one verifies it first.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections.abc import Sequence
from pathlib import Path

from app.core.errors import ErrorKind, WeftError
from app.hub.checksum import PIECE, checksum_name
from app.hub.files import RemoteFile
from app.hub.part import write_error
from app.hub.places import local_path

SMALL = 1024 * 1024  # bytes up to which a file is copied: people edit config.json, and a hard link would change both


def find_copies(files: Sequence[RemoteFile], roots: Sequence[Path], folder: Path) -> dict[str, str]:
    """Where copies lie, by path in the repository.

    Args:
        files: of one repository. roots: of the library. folder: where the files shall go; what lies there is not a copy.
    """
    found: dict[str, str] = {}
    if not files:
        return found
    user, _, name = files[0].repo.partition("/")
    # Only folders that are there are looked into: a question for each file and drive would take long.
    caches = [place for root in roots if (place := root / f"models--{user}--{name}" / "blobs").is_dir()]
    libraries = [place for root in roots if (place := root / user / name).is_dir() and place != folder]
    for file in files:
        places = [cache / checksum for cache in caches if (checksum := checksum_name(file))]
        places += [local_path(library, file.path) for library in libraries]
        for place in places:
            if file.size and file.path not in found and folder not in place.parents and _size(place) == file.size:
                found[file.path] = str(place)
    return found


def take_copy(source: Path, target: Path, cancelled: threading.Event | None = None) -> None:
    """Put a copy of `source` at `target`, without using the space twice where the disk can: as a reflink, a hard link, or a copy.

    Raises:
        WeftError: DISK_FULL or PERMISSION; CANCELLED. Nothing is left at `target` then.
    """
    real = source.resolve()  # the cache's files are links
    try:
        target.unlink(missing_ok=True)
        if _reflink(real, target):
            return
        if real.stat().st_size > SMALL:
            with contextlib.suppress(OSError):
                os.link(real, target)
                return
        _copy(real, target, cancelled or threading.Event())
    except OSError as error:
        with contextlib.suppress(OSError):
            target.unlink(missing_ok=True)
        raise write_error(error, target) from error
    except WeftError:
        with contextlib.suppress(OSError):
            target.unlink(missing_ok=True)
        raise


def _copy(source: Path, target: Path, cancelled: threading.Event) -> None:
    """Piece by piece, so that it can be stopped; on the disk when it returns."""
    with source.open("rb") as here, target.open("wb") as there:
        while piece := here.read(PIECE):
            if cancelled.is_set():
                raise WeftError(ErrorKind.CANCELLED, "The download was stopped; what has arrived is kept.")
            there.write(piece)
        there.flush()
        os.fsync(there.fileno())


def _reflink(source: Path, target: Path) -> bool:
    """A copy that shares its blocks until one of the two is changed (btrfs, XFS, bcachefs)."""
    try:
        import fcntl
    except ImportError:
        return False
    ficlone = 0x40049409  # linux/fs.h
    with source.open("rb") as here, target.open("wb") as there:
        try:
            fcntl.ioctl(there.fileno(), ficlone, here.fileno())
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise
        else:
            return True
    target.unlink()
    return False


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1
