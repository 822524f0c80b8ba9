"""Archives from the internet, unpacked as if each were an attack: nothing is written outside, nothing half done stays.

The readers (`archive_zip.py`, `archive_tar.py`) are our own: the standard library's make an object of each of a million
entries, read headers of any length into memory, and know links, devices and sparse files, none of which an adapter needs.
Every entry passes `archive_guard.py` before a byte of it is written; files go into a staging folder beside the target, which is
renamed when all of them are there.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import BinaryIO

from app.core.archive_guard import Guard, Limits, Member, damaged
from app.core.archive_tar import packed_stream, tar_members
from app.core.archive_zip import zip_members
from app.core.errors import ErrorKind, WeftError
from app.core.gguf_header import os_error

SUFFIXES = (".zip", ".tar", ".tgz", ".tar.gz", ".tbz2", ".tar.bz2", ".txz", ".tar.xz")
UNREADABLE = (".7z", ".rar", ".tar.zst", ".tzst", ".zst")


def is_archive(path: Path) -> bool:
    """Whether a file goes by an archive's name. (Checkpoints of torch are zip files too, and go by other names.)"""
    return path.name.lower().endswith((*SUFFIXES, *UNREADABLE))


def archive_stem(path: Path) -> str:
    """An archive's name without its endings."""
    name = path.name
    for suffix in sorted((*SUFFIXES, *UNREADABLE), key=len, reverse=True):
        if name.lower().endswith(suffix):
            return name[: -len(suffix)] or "archive"
    return path.stem


def unpack(
    path: Path,
    folder: Path,
    *,
    limits: Limits | None = None,
    progress: Callable[[int, int], None] = lambda _done, _of: None,
    cancelled: Callable[[], bool] = lambda: False,
) -> int:
    """Unpack a zip, tar, tar.gz, tar.bz2 or tar.xz into a folder that appears when it is complete.

    Args:
        folder: must not exist; its parent must. progress: told bytes read of the archive, and its size.

    Returns:
        How many files were written.

    Raises:
        WeftError: HOSTILE, CORRUPT, UNSUPPORTED (a format that is not known, encryption), DISK_FULL, PERMISSION,
            CANCELLED, BAD_INPUT (the folder exists). Then nothing of it is left.
    """
    if folder.exists():
        raise WeftError(ErrorKind.BAD_INPUT, f"{folder} exists already.", "Choose another name.")
    stage = folder.with_name(f".{folder.name[:100]}.unpacking-{os.getpid()}")
    shutil.rmtree(stage, ignore_errors=True)
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            guard = Guard(path, limits or Limits())
            stage.mkdir()
            written = _write(stage, _members(path, file, size, guard), guard, file, (progress, size), cancelled)
        if not written:
            raise damaged(path, "it holds no files")
        stage.rename(folder)
        return written
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise WeftError(
                ErrorKind.DISK_FULL,
                f"There is no room to unpack {path.name}.",
                f"Free space on the disk of {folder.parent}.",
            ) from error
        raise os_error(path, error) from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _members(path: Path, file: BinaryIO, size: int, guard: Guard) -> Iterable[Member]:
    start = file.read(512)
    file.seek(0)
    if start[:2] == b"PK":
        return zip_members(path, file, size, guard)
    if start[257:262] == b"ustar" or (len(start) == 512 and path.name.lower().endswith(".tar")):
        return tar_members(path, file.read, guard)
    stream = packed_stream(path, file, start, guard)
    if stream is not None:
        return tar_members(path, stream.read, guard)
    kinds = {b"7z\xbc\xaf": "7-Zip", b"Rar!": "RAR", b"\x28\xb5\x2f\xfd": "Zstandard"}
    kind = kinds.get(start[:4])
    if kind is None:
        raise damaged(path, "it is no zip or tar archive")
    raise WeftError(
        ErrorKind.UNSUPPORTED,
        f"{path.name} is packed with {kind}, which is not read here.",
        "Unpack it, and drop the folder.",
    )


def _write(
    stage: Path,
    members: Iterable[Member],
    guard: Guard,
    file: BinaryIO,
    told: tuple[Callable[[int, int], None], int],
    cancelled: Callable[[], bool],
) -> int:
    written: list[Path] = []
    for member in members:
        target = stage / member.name
        if member.folder:
            target.mkdir(parents=True, exist_ok=True)
            continue
        if shutil.disk_usage(stage).free < member.size:
            raise OSError(errno.ENOSPC, "no space")
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("xb") as out:
            for chunk in member.chunks():
                if cancelled():
                    raise WeftError(ErrorKind.CANCELLED, "Unpacking was cancelled.")
                out.write(chunk)
                told[0](file.tell(), told[1])
        written.append(target)
    # Only what is kept is worth the wait for the disk: an attack of thousands of small files is refused before.
    for target in written:
        with target.open("rb+") as out:
            os.fsync(out.fileno())
    return len(written)
