"""Tar archives, plain or packed, read from the front with bounds. POSIX ustar and pax, and GNU's long names; nothing else."""

from __future__ import annotations

import bz2
import lzma
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from app.core.archive_guard import CHUNK, Guard, Member, damaged, hostile

_BLOCK = 512
_MAX_HEADER = 64 * 1024  # bytes of a pax header or long name
_MAX_PADDING = 1 << 20  # bytes of zeros behind the end
_XZ_MEMORY = 128 << 20  # bytes that unpacking xz may take
_PACKED = 64 * 1024

Read = Callable[[int], bytes]


def tar_members(path: Path, read: Read, guard: Guard) -> Iterator[Member]:
    """Every file and folder, in order. What a consumer leaves unread of a member is stepped over.

    Raises:
        WeftError: HOSTILE for links, devices, sparse files and what `Guard` refuses; CORRUPT.
    """
    pending: dict[str, str] = {}
    empty = 0
    while True:
        header = _exactly(path, read, _BLOCK, end_allowed=True)
        if not header:
            return
        if not any(header):
            empty += 1
            if empty == 2:
                _rest(path, read)
                return
            continue
        empty = 0
        guard.entry()
        name, size, kind = _parse(path, header)
        if kind in "xLKg":
            pending |= _extended(path, read, kind, size)
            continue
        name, size = pending.get("path", name), _size(path, pending.get("size"), size)
        sparse = any(key.startswith("GNU.sparse") for key in pending)
        pending = {}
        if kind not in _PLAIN or sparse:
            raise hostile(path, f"{name[:80]!r} is {_KINDS.get(kind, 'of a strange kind')}, not a file")
        folder = kind == "5" or name.endswith("/")
        size = 0 if folder else size
        place = guard.take(name, size, folder)
        body = _Body(path, read, size)
        if place:
            yield Member(place, size, folder, body.chunks)
        body.skip()


def _rest(path: Path, read: Read) -> None:
    """Read to the very end, where packed archives have their checksum; nothing but zeros belongs there."""
    left = _MAX_PADDING
    while piece := read(CHUNK):
        left -= len(piece)
        if left < 0 or piece.count(0) != len(piece):
            raise damaged(path, "something stands behind its end")


_PLAIN = frozenset({"0", "\0", "7", "5"})
_KINDS = {"1": "a link", "2": "a link", "3": "a device", "4": "a device", "6": "a pipe", "S": "a sparse file"}


class _Body:
    """A member's bytes, and the padding behind them."""

    def __init__(self, path: Path, read: Read, size: int) -> None:
        self._path, self._read, self._left = path, read, size
        self._padding = -size % _BLOCK

    def chunks(self) -> Iterator[bytes]:
        while self._left:
            piece = self._read(min(CHUNK, self._left))
            if not piece:
                raise damaged(self._path, "it is cut short")
            self._left -= len(piece)
            yield piece

    def skip(self) -> None:
        for _ in self.chunks():
            pass
        _exactly(self._path, self._read, self._padding)
        self._padding = 0


def _exactly(path: Path, read: Read, count: int, end_allowed: bool = False) -> bytes:
    data = b""
    while len(data) < count:
        piece = read(count - len(data))
        if not piece:
            if end_allowed and not data:
                return b""
            raise damaged(path, "it is cut short")
        data += piece
    return data


def _parse(path: Path, header: bytes) -> tuple[str, int, str]:
    total = sum(header[:148]) + 8 * 32 + sum(header[156:])
    if _octal(path, header[148:156]) != total:
        raise damaged(path, "a header in it does not agree with its checksum")
    prefix = header[345:500] if header[257:263] == b"ustar\0" else b""
    name = b"/".join(part.split(b"\0", 1)[0] for part in (prefix, header[:100]) if part.split(b"\0", 1)[0])
    return _text(path, name), _octal(path, header[124:136]), chr(header[156])


def _octal(path: Path, field: bytes) -> int:
    if field[:1] == b"\x80":  # GNU: a binary number
        return int.from_bytes(field[1:], "big")
    text = field.replace(b"\0", b" ").strip()
    try:
        return int(text or b"0", 8)
    except ValueError as error:
        raise damaged(path, "a header in it has no number where one belongs") from error


def _text(path: Path, raw: bytes) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise hostile(path, "an entry's name is no text") from error


def _extended(path: Path, read: Read, kind: str, size: int) -> dict[str, str]:
    """What a header says about the entry behind it."""
    if size > _MAX_HEADER:
        raise hostile(path, f"a header in it is {size:,} bytes long")
    data = _exactly(path, read, size + (-size % _BLOCK))[:size]
    if kind == "L":
        return {"path": _text(path, data.rstrip(b"\0"))}
    if kind in "Kg":
        return {}
    found: dict[str, str] = {}
    at = 0
    while at < len(data):
        space = data.find(b" ", at, at + 8)
        length = int(data[at:space]) if space > at and data[at:space].isdigit() else 0
        line = data[space + 1 : at + length]
        if length < 5 or at + length > len(data) or not line.endswith(b"\n") or b"=" not in line:
            raise damaged(path, "a header in it cannot be read")
        key, _, value = line[:-1].partition(b"=")
        found[_text(path, key)] = value.decode("utf-8", "replace") if key != b"path" else _text(path, value)
        at += length
    return found


def _size(path: Path, told: str | None, size: int) -> int:
    if told is None:
        return size
    if not (told.isascii() and told.isdecimal() and len(told) < 20):
        raise damaged(path, "a header in it has no number where one belongs")
    return int(told)


# Packed ---------------------------------------------------------------------------------------------


def packed_stream(path: Path, file: BinaryIO, start: bytes, guard: Guard) -> PackedStream | None:
    """The unpacked bytes of a gzip, bzip2 or xz file; None for anything else."""
    if start[:2] == b"\x1f\x8b":
        return PackedStream(path, file, guard, partial(zlib.decompressobj, 31))
    if start[:3] == b"BZh":
        return PackedStream(path, file, guard, bz2.BZ2Decompressor)
    if start[:6] == b"\xfd7zXZ\0":
        return PackedStream(path, file, guard, partial(lzma.LZMADecompressor, lzma.FORMAT_XZ, _XZ_MEMORY))
    return None


class PackedStream:
    """Reads a packed file in small pieces, and stops where it turns out to be a bomb."""

    def __init__(self, path: Path, file: BinaryIO, guard: Guard, fresh: Callable[[], Any]) -> None:
        self._path, self._file, self._guard, self._fresh = path, file, guard, fresh
        self._inner = fresh()
        self._rest = b""  # packed bytes that were read and not taken yet
        self._taken = self._given = 0

    def read(self, count: int) -> bytes:
        """At most `count` bytes; none at the end."""
        while True:
            if self._inner.eof:
                self._rest = (getattr(self._inner, "unused_data", b"") or self._rest).lstrip(b"\0")
                self._rest = self._rest or self._more().lstrip(b"\0")
                if not self._rest:
                    return b""
                self._inner = self._fresh()  # one packed stream behind another
            piece = self._step(min(count, CHUNK))
            if piece:
                self._given += len(piece)
                self._guard.ratio(self._given, self._taken)
                return piece
            if self._inner.eof:
                continue
            if not self._rest and getattr(self._inner, "needs_input", True):
                self._rest = self._more()
                if not self._rest:
                    raise damaged(self._path, "it is cut short")

    def _more(self) -> bytes:
        data = self._file.read(_PACKED)
        self._taken += len(data)
        return data

    def _step(self, count: int) -> bytes:
        data, self._rest = self._rest, b""
        try:
            piece = self._inner.decompress(data, count)
        except (zlib.error, lzma.LZMAError, OSError) as error:
            if "memory" in str(error).lower():
                raise hostile(self._path, f"it takes more than {_XZ_MEMORY >> 20} MiB to unpack") from error
            raise damaged(self._path, f"its packed data cannot be read ({error})") from error
        self._rest = getattr(self._inner, "unconsumed_tail", b"")
        return piece
