"""What merges and exports that were killed have left beside their targets: found again, gone on with, or cleared away."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from app.adapters.merge_staging import JOB, LOCK, PREFIX, is_held

_LARGEST = 1024 * 1024
_LONG = 30 * 86400  # seconds
_MOST = 2000  # folders that are looked into


class Leftover(NamedTuple):
    """A staging folder that nobody works in.

    Attributes:
        folder: it. bytes: on the disk.
        task, environment, parameters: the job that made it; "" and {} where that cannot be told.
    """

    folder: Path
    bytes: int
    task: str
    environment: str
    parameters: dict[str, Any]

    @property
    def target(self) -> str:
        return str(self.parameters.get("target") or "")

    @property
    def complete(self) -> bool:
        """Whether all is there that the same job needs to go on from it."""
        adapters = (self.parameters.get("stack") or {}).get("adapters") or []
        needed = [self.parameters.get("model"), *(a.get("path") for a in adapters if a.get("weight"))]
        return bool(self.target) and all(n and Path(n).exists() for n in needed)

    @property
    def useless(self) -> bool:
        """Whether nobody can go on from it: the target is made, or what it was made from has been gone for long.

        A drive that is not plugged in today may be so tomorrow.
        """
        if not self.target or Path(self.target).exists():
            return True
        try:
            return not self.complete and time.time() - self.folder.stat().st_mtime > _LONG
        except OSError:
            return False


def find_leftovers(roots: Iterable[Path]) -> list[Leftover]:
    """Look in folders and in those right below them, where merges and exports put their results."""
    found: dict[Path, Leftover] = {}
    for root in roots:
        for place in [root, *_below(root)]:
            for folder in _staging(place):
                if folder not in found and not is_held(folder):
                    found[folder] = _read(folder)
    return list(found.values())


def leftover_of(target: Path) -> Leftover | None:
    """What lies beside a target that is not made; None where nothing does, or somebody works on it."""
    for folder in _staging(target.parent):
        if not is_held(folder) and (left := _read(folder)).target == str(target):
            return left
    return None


def has_staging(place: Path) -> bool:
    """Whether staging folders lie in a folder, held or not."""
    return bool(_staging(place))


def sweep(left: Leftover) -> None:
    """Remove it, unless somebody has begun to work in it."""
    if not is_held(left.folder):
        shutil.rmtree(left.folder, ignore_errors=True)


def _below(root: Path) -> list[Path]:
    try:
        with os.scandir(root) as entries:
            return [Path(e.path) for e in entries if e.is_dir(follow_symlinks=False) and e.name[0] != "."][:_MOST]
    except OSError:
        return []


def _staging(place: Path) -> list[Path]:
    try:
        with os.scandir(place) as entries:
            named = [Path(e.path) for e in entries if e.name.startswith(PREFIX) and e.is_dir(follow_symlinks=False)]
    except OSError:
        return []
    return [folder for folder in named if (folder / LOCK).is_file()]


def _read(folder: Path) -> Leftover:
    size = 0
    for path in folder.rglob("*"):
        try:
            found = path.lstat()
        except OSError:
            continue
        size += found.st_blocks * 512 if hasattr(found, "st_blocks") else found.st_size
    try:
        with (folder / JOB).open("rb") as file:
            job = json.loads(file.read(_LARGEST))
        return Leftover(folder, size, str(job["task"]), str(job["environment"]), dict(job["parameters"]))
    except (OSError, ValueError, KeyError, TypeError):
        return Leftover(folder, size, "", "", {})
