"""Archives from the internet, unpacked as if each were an attack: nothing is written outside, nothing half done stays.

The readers (`archive_zip.py`, `archive_tar.py`) are our own: the standard library's make an object of each of a million
entries, read headers of any length into memory, and know links, devices and sparse files, none of which an adapter needs.
Every entry passes `Guard` before a byte of it is written; files go into a staging folder beside the target, which is
renamed when all of them are there.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import msgspec

from app.core.errors import ErrorKind, WeftError
from app.core.gguf_header import os_error

SUFFIXES = (".zip", ".tar", ".tgz", ".tar.gz", ".tbz2", ".tar.bz2", ".txz", ".tar.xz")
UNREADABLE = (".7z", ".rar", ".tar.zst", ".tzst", ".zst")
_RESERVED = re.compile(r"(con|prn|aux|nul|conin\$|conout\$|com[0-9¹²³]|lpt[0-9¹²³])(\..*)?", re.IGNORECASE)
_FORBIDDEN = re.compile(r'[\x00-\x1f\x7f<>:"|?*\\]')
_LITTER = re.compile(r"(^|/)(__MACOSX(/|$)|\.DS_Store$|Thumbs\.db$|\._[^/]*$)")
CHUNK = 1 << 20


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """What an archive may be.

    Attributes:
        entries: files and folders. total: bytes unpacked. depth: folders within each other.
        ratio: unpacked over packed bytes, looked at from `ratio_from` unpacked bytes on.
    """

    entries: int = 4096
    total: int = 64 << 30
    depth: int = 12
    ratio: int = 100
    ratio_from: int = 64 << 20


class Member(NamedTuple):
    """One entry, as its header claims. `chunks` yields its bytes when asked; it must be read before the next member."""

    name: str
    size: int
    folder: bool
    chunks: Callable[[], Iterator[bytes]]


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


class Guard:
    """What has been let through of one archive, and what is refused."""

    def __init__(self, path: Path, limits: Limits) -> None:
        self._path, self._limits = path, limits
        self._seen: dict[str, tuple[str, bool]] = {}  # folded name to (name, whether a folder)
        self._files: set[str] = set()
        self._entries = 0
        self.total = 0

    def entry(self) -> None:
        """Count an entry of any kind."""
        self._entries += 1
        if self._entries > self._limits.entries:
            raise hostile(self._path, f"it holds more than {self._limits.entries:,} entries")

    def take(self, name: str, size: int, folder: bool) -> str:
        """Check one entry.

        Returns:
            Its path inside the target, with `/`; "" for what is passed over (a Mac's litter, the root itself).

        Raises:
            WeftError: HOSTILE.
        """
        told = repr(name[:80])
        if name.startswith(("/", "\\")) or re.match(r"[A-Za-z]:", name):
            raise hostile(self._path, f"{told} is an absolute path")
        parts = [part for part in name.split("/") if part not in ("", ".")]
        if ".." in parts or ".." in re.split(r"[/\\]", name):
            raise hostile(self._path, f"{told} leads out of the folder")
        if _FORBIDDEN.search(name) or not name.isprintable():
            raise hostile(self._path, f"{told} has characters that no file name may have")
        if not parts or _LITTER.search("/".join(parts)):
            return ""
        for part in parts:
            if _RESERVED.fullmatch(part) or part[-1] in ". ":
                raise hostile(self._path, f"{told} is a name that Windows keeps for itself")
            if len(os.fsencode(part)) > 240:
                raise hostile(self._path, "an entry has a name of more than 240 bytes")
        if len(parts) > self._limits.depth:
            raise hostile(self._path, f"its folders are nested deeper than {self._limits.depth} levels")
        self._unique(parts, folder)
        if size < 0:
            raise hostile(self._path, f"{told} claims {size} bytes")
        self.total += size
        if self.total > self._limits.total:
            raise hostile(self._path, f"it unpacks to more than {self._limits.total >> 30} GiB")
        return "/".join(parts)

    def _unique(self, parts: list[str], folder: bool) -> None:
        for depth in range(1, len(parts) + 1):
            name = "/".join(parts[:depth])
            inner = folder or depth < len(parts)
            folded = unicodedata.normalize("NFKC", name).casefold()
            before = self._seen.setdefault(folded, (name, inner))
            if before != (name, inner):
                raise hostile(self._path, f"{name[:80]!r} and {before[0][:80]!r} are one name on many systems")
            if not inner and name in self._files:
                raise hostile(self._path, f"{name[:80]!r} stands in it twice")
            if not inner:
                self._files.add(name)

    def ratio(self, unpacked: int, packed: int) -> None:
        """Refuse what unpacks to far more than it is."""
        if unpacked > self._limits.ratio_from and unpacked > self._limits.ratio * max(packed, 1):
            raise hostile(self._path, f"it is a bomb: {packed:,} bytes unpack to more than {unpacked:,}")


def hostile(path: Path, what: str) -> WeftError:
    """An archive that tries something."""
    return WeftError(
        ErrorKind.HOSTILE,
        f"{path.name} was not unpacked: {what}.",
        "Get the adapter from somebody you trust, or unpack it yourself and drop the folder.",
    )


def damaged(path: Path, what: str) -> WeftError:
    """An archive that cannot be read."""
    return WeftError(ErrorKind.CORRUPT, f"{path.name} is damaged: {what}.", "Download or copy it again.")


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
    from app.core.archive_tar import packed_stream, tar_members
    from app.core.archive_zip import zip_members

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
