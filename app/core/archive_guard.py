"""What is let through of an archive: every entry passes here before a byte of it is written."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import msgspec

from app.core.errors import ErrorKind, WeftError

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
