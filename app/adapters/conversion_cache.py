"""Converted adapters on disk: found again by their content, and taken away when they were not used for longest."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

DEFAULT_BYTES = 8 << 30
_RECENT = 600.0
_STALE = 24 * 3600.0  # seconds after which a stage belongs to nobody


class Cache:
    """A folder of files and folders under keys.

    Args:
        limit: bytes that all of it may take; WEFT_ADAPTER_CACHE_BYTES says otherwise.
        recent: seconds: what was used so lately stays, since it may be being read by another engine.
    """

    def __init__(self, folder: Path, limit: int | None = None, recent: float = _RECENT) -> None:
        self._recent = recent
        given = os.environ.get("WEFT_ADAPTER_CACHE_BYTES", "")
        self._folder = folder
        self._limit = limit if limit is not None else int(given) if given.isdecimal() else DEFAULT_BYTES

    def path(self, key: str) -> Path:
        """Where a key's content is, or would be."""
        return self._folder / key

    def get(self, key: str) -> Path | None:
        """What is there under a key, now used last; None when there is nothing."""
        path = self.path(key)
        try:
            os.utime(path)
        except OSError:
            return path if path.exists() else None  # a cache that may only be read serves all the same
        return path

    @contextmanager
    def making(self, key: str) -> Generator[Path]:
        """Fill a new folder for a key within the block; it appears when the block ends well. Then make room.

        Two engines may make the same one at once: the first stays.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        stage = self._folder / f".making-{os.getpid()}-{time.monotonic_ns()}"
        stage.mkdir()
        try:
            yield stage
            if not self.path(key).exists():
                with suppress(FileExistsError, OSError):
                    stage.rename(self.path(key))
            if not self.path(key).exists():
                stage.rename(self.path(key))  # raises what stood in the way
        finally:
            shutil.rmtree(stage, ignore_errors=True)
        self.trim(keep=key)

    def trim(self, keep: str = "") -> int:
        """Take away what was not used for longest until the rest is within the limit. Returns bytes taken away.

        Args:
            keep: a key that stays. What was used lately stays too.
        """
        now = time.time()
        found: list[tuple[float, int, Path]] = []
        try:
            listed = list(self._folder.iterdir())
        except OSError:
            return 0
        for path in listed:
            with suppress(OSError):
                status = path.stat()
                if path.name.startswith(".making-") or path.name.endswith(".part"):
                    if now - status.st_mtime > _STALE:
                        _remove(path)
                    continue
                found.append((status.st_mtime, _size(path), path))
        total, freed = sum(size for _, size, _ in found), 0
        for used, size, path in sorted(found):
            if total - freed <= self._limit:
                break
            if path.name != keep and now - used > self._recent:
                _remove(path)
                freed += size
        return freed


def cache_folder() -> Path:
    """Where converted adapters are kept: under WEFT_CACHE, which the parent sets, or for this process alone."""
    folder = os.environ.get("WEFT_CACHE")
    return Path(folder) / "adapters" if folder else Path(tempfile.gettempdir()) / f"weft-adapters-{os.getpid()}"


def _size(path: Path) -> int:
    if not path.is_dir():
        return path.stat().st_size
    return sum(inner.stat().st_size for inner in path.rglob("*") if inner.is_file())


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
