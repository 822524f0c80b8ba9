"""Where engine environments lie on disk, and what is done to their folders: each change in one step, or not at all.

Under the root lie, for an environment `core`: `core/` (a virtual environment, with a stamp that says which layers
are complete), `core.incomplete` (exists while an installation has begun and not ended), `core.lock` (held while one
runs), `core.log`, and `core.before-repair` while a repair runs: what was there, for the case that it fails.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import threading
import time
from collections.abc import Generator
from pathlib import Path

import msgspec

from app.core.errors import ErrorKind, WeftError


class Stamp(msgspec.Struct, kw_only=True):
    """What is complete in an environment.

    Attributes:
        layers: layer to fingerprint.
        failed: optional layers that failed, and `gpu` for GPU support, to the reason.
        probed: it was tried out and works.
        gpu: what was compiled can use a graphics card; None while nobody asked it.
    """

    layers: dict[str, str] = {}
    failed: dict[str, str] = {}
    probed: bool = False
    gpu: bool | None = None


class EnvironmentFolders:
    """The folders and files of every environment under one root, whether or not they are there."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def folder(self, name: str) -> Path:
        return self.root / name

    def marker(self, name: str) -> Path:
        """Exists from the beginning of an installation to its good end."""
        return self.root / f"{name}.incomplete"

    def aside(self, name: str) -> Path:
        """Where what was there lies while a repair runs."""
        return self.root / f"{name}.before-repair"

    def sweep(self, name: str) -> None:
        """Delete what was about to be deleted when somebody was killed. Under its lock."""
        for left in self.root.glob(f"{name}.*removing-*"):
            shutil.rmtree(left, ignore_errors=True)

    def log_path(self, name: str) -> Path:
        return self.root / f"{name}.log"

    def interpreter(self, name: str) -> Path:
        """Where the environment's Python lies, whether or not it is there."""
        folder = self.folder(name)
        return folder / "Scripts" / "python.exe" if os.name == "nt" else folder / "bin" / "python"

    def read_stamp(self, name: str) -> Stamp:
        """What is complete; an empty stamp when there is none or it cannot be read."""
        try:
            return msgspec.json.decode((self.folder(name) / "weft-stamp.json").read_bytes(), type=Stamp)
        except (OSError, msgspec.DecodeError):
            return Stamp()

    def write_stamp(self, name: str, stamp: Stamp) -> None:
        """Write the stamp in one step."""
        target = self.folder(name) / "weft-stamp.json"
        beside = target.with_suffix(".part")
        beside.write_bytes(msgspec.json.encode(stamp))
        beside.replace(target)

    @contextlib.contextmanager
    def locked(self, name: str, title: str) -> Generator[None]:
        """Hold a lock that the operating system drops with this process. Raises WeftError BUSY when another holds it."""
        with (self.root / f"{name}.lock").open("a+b") as lock:
            try:
                if sys.platform == "win32":
                    import msvcrt

                    msvcrt.locking(lock.fileno(), msvcrt.LK_NBLCK, 1)
                else:
                    import fcntl

                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise WeftError(
                    ErrorKind.BUSY,
                    f"The environment {title!r} is being installed or removed by another Weft.",
                    "Wait until that is done.",
                ) from error
            yield


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below a folder; what vanishes meanwhile is not counted."""
    total = 0
    stack = [folder]
    while stack:
        with contextlib.suppress(OSError), os.scandir(stack.pop()) as entries:
            for entry in entries:
                with contextlib.suppress(OSError):
                    if entry.is_dir(follow_symlinks=False):
                        stack.append(Path(entry.path))
                    else:
                        total += entry.stat(follow_symlinks=False).st_size
    return total


def discard(folder: Path, title: str) -> None:
    """Delete a folder so that it never looks whole while half of it is gone. Raises WeftError BUSY."""
    if not folder.exists():
        return
    away = _away(folder)
    try:
        folder.rename(away)
        shutil.rmtree(away)
    except OSError as error:
        raise WeftError(
            ErrorKind.BUSY,
            f"The environment {title!r} cannot be removed: {error}",
            "Unload the model that runs in it and try again.",
        ) from error


def discard_later(folder: Path) -> None:
    """The same without waiting for the deletion; if this process ends meanwhile, `sweep` does it."""
    if folder.exists():
        away = folder.rename(_away(folder))
        threading.Thread(target=shutil.rmtree, args=(away, True), name="discard", daemon=True).start()


def _away(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.removing-{os.getpid()}-{time.monotonic_ns()}")


@contextlib.contextmanager
def translated_os_errors(place: Path) -> Generator[None]:
    """Raises WeftError DISK_FULL or PERMISSION where the operating system refuses something."""
    try:
        yield
    except OSError as error:
        if error.errno in (28, 122):  # ENOSPC, EDQUOT
            kind, hint = ErrorKind.DISK_FULL, "Make room and install again; what was downloaded is kept."
        else:
            kind, hint = (
                ErrorKind.PERMISSION,
                "Check that the folder can be written, or set WEFT_ENVIRONMENTS to another.",
            )
        raise WeftError(kind, f"{error.filename or place}: {error.strerror or error}", hint) from error
