"""A folder for the temporary files of one child, which goes when the child does.

What a child leaves behind when it is killed, offloaded weights of many gigabytes among it, would lie in the system's folder
for temporary files for ever. A lock that its owner holds tells folders in use from those that a killed window has left.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import shutil
import tempfile
from pathlib import Path

_PREFIX = "weft-scratch-"
_LOCK = ".owner"


class Scratch:
    """One such folder, in the system's folder for temporary files; what others left there is removed on the way.

    Attributes:
        path: the folder.

    Raises:
        OSError: it cannot be made.
    """

    def __init__(self) -> None:
        for left in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
            _remove_abandoned(left)
        self.path = Path(tempfile.mkdtemp(prefix=_PREFIX))
        self._lock = os.open(self.path / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
        _taken(self._lock)

    @property
    def variables(self) -> dict[str, str]:
        """What has a child keep its temporary files there."""
        return dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(self.path))

    def remove(self) -> None:
        """Remove it with all that lies in it; what the system does not let go is left to the next start."""
        os.close(self._lock)  # first: Windows removes no open file
        shutil.rmtree(self.path, ignore_errors=True)


def _remove_abandoned(folder: Path) -> None:
    try:
        lock = os.open(folder / _LOCK, os.O_RDWR)
    except OSError:
        return  # somebody else's, or one that is being made
    try:
        abandoned = _taken(lock)
    finally:
        os.close(lock)
    if abandoned:
        shutil.rmtree(folder, ignore_errors=True)


def _taken(lock: int) -> bool:
    """Lock an open file; False when another holds it. A child does not inherit it: Python closes files there."""
    with contextlib.suppress(ImportError):
        fcntl = importlib.import_module("fcntl")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        return True
    msvcrt = importlib.import_module("msvcrt")
    try:
        msvcrt.locking(lock, msvcrt.LK_NBLCK, 1)
    except OSError:
        return False
    return True
