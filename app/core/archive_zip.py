"""Zip archives, read by their directory with bounds. Format: APPNOTE.TXT 6.3 of PKWARE, without what no adapter needs."""

from __future__ import annotations

import bz2
import struct
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import BinaryIO, NamedTuple

from app.core.archive_guard import CHUNK, Guard, Member, damaged, hostile
from app.core.errors import ErrorKind, WeftError

MAX_DIRECTORY = 4 << 20  # bytes; 4,096 entries with long names take less than 2 MiB
_STORED, _DEFLATED, _BZIP2 = 0, 8, 12


class _Entry(NamedTuple):
    name: str
    method: int
    crc: int
    packed: int
    size: int
    offset: int
    folder: bool


def zip_members(path: Path, file: BinaryIO, size: int, guard: Guard) -> Iterator[Member]:
    """Every entry in the directory's order. The whole directory is checked before the first is given out.

    Raises:
        WeftError: HOSTILE, CORRUPT, UNSUPPORTED.
    """
    entries: list[tuple[str, _Entry]] = []
    for entry in _directory(path, file, size, guard):
        if name := guard.take(entry.name, entry.size, entry.folder):
            entries.append((name, entry))
    guard.ratio(guard.total, sum(entry.packed for _, entry in entries))
    _no_overlaps(path, [entry for _, entry in entries], size)
    for name, entry in entries:
        yield Member(name, entry.size, entry.folder, partial(_chunks, path, file, entry))


def _directory(path: Path, file: BinaryIO, size: int, guard: Guard) -> Iterator[_Entry]:
    count, length, start = _end(path, file, size)
    if length > MAX_DIRECTORY or count * 46 > length:
        # Refused before a single entry is looked at: the directory is what a million entries would fill.
        raise hostile(path, f"its directory claims {count:,} entries in {length:,} bytes")
    file.seek(start)
    data = file.read(length)
    if len(data) != length:
        raise damaged(path, "its directory is cut short")
    at = 0
    for _ in range(count):
        guard.entry()
        if data[at : at + 4] != b"PK\x01\x02" or at + 46 > length:
            raise damaged(path, "its directory cannot be read")
        made, _, flags, method, _, _, crc, packed, unpacked, n, m, k, disk, _, outer, offset = struct.unpack_from(
            "<HHHHHHIIIHHHHHII", data, at + 4
        )
        raw, extra = data[at + 46 : at + 46 + n], data[at + 46 + n : at + 46 + n + m]
        at += 46 + n + m + k
        if at > length:
            raise damaged(path, "its directory cannot be read")
        packed, unpacked, offset = _zip64(path, extra, packed, unpacked, offset)
        name = _name(path, raw, flags)
        _plain(path, name, made >> 8, outer >> 16, flags, method, disk)
        yield _Entry(name, method, crc, packed, unpacked, offset, name.endswith("/"))


def _end(path: Path, file: BinaryIO, size: int) -> tuple[int, int, int]:
    """How many entries, the length of the directory, and where it begins."""
    tail = min(size, 65_557 + 20)
    file.seek(size - tail)
    data = file.read(tail)
    at = data.rfind(b"PK\x05\x06")
    if at < 0 or len(data) - at < 22:
        raise damaged(path, "it has no directory; it may be cut short")
    disk, first, here, count, length, start, comment = struct.unpack_from("<HHHHIIH", data, at + 4)
    if at + 22 + comment != len(data):
        raise damaged(path, "something stands behind its end")
    if at >= 20 and data[at - 20 : at - 16] == b"PK\x06\x07":
        place = struct.unpack_from("<Q", data, at - 12)[0]
        file.seek(min(place, size))
        record = file.read(56)
        if len(record) < 56 or record[:4] != b"PK\x06\x06":
            raise damaged(path, "its directory cannot be found")
        disk, first, here, count, length, start = struct.unpack_from("<IIQQQQ", record, 16)
    if disk or first or here != count:
        raise damaged(path, "it is one part of several")
    return count, length, start


def _zip64(path: Path, extra: bytes, packed: int, size: int, offset: int) -> tuple[int, int, int]:
    values = [size, packed, offset]
    if 0xFFFFFFFF not in values:
        return packed, size, offset
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, at)
        body = extra[at + 4 : at + 4 + length]
        at += 4 + length
        if kind != 1:
            continue
        for i, value in enumerate(values):
            if value == 0xFFFFFFFF:
                if len(body) < 8:
                    break
                values[i], body = struct.unpack_from("<Q", body)[0], body[8:]
        return values[1], values[0], values[2]
    raise damaged(path, "an entry's size cannot be read")


def _name(path: Path, raw: bytes, flags: int) -> str:
    try:
        return raw.decode("utf-8" if flags & 0x800 else "cp437")
    except UnicodeDecodeError as error:
        raise hostile(path, "an entry's name is no text") from error


def _plain(path: Path, name: str, system: int, mode: int, flags: int, method: int, disk: int) -> None:
    """Refuse links, devices, encryption and ways of packing that are not known."""
    kind = mode & 0xF000
    if system in (3, 19) and kind not in (0, 0x8000, 0x4000):
        raise hostile(path, f"{name[:80]!r} is a link or a device, not a file")
    if flags & 1 or flags & 0x40:
        raise WeftError(ErrorKind.UNSUPPORTED, f"{path.name} is encrypted.", "Unpack it yourself, and drop the folder.")
    if disk:
        raise damaged(path, "it is one part of several")
    if method not in (_STORED, _DEFLATED, _BZIP2):
        raise WeftError(
            ErrorKind.UNSUPPORTED,
            f"{path.name} is packed in a way that is not read here (method {method}).",
            "Unpack it yourself, and drop the folder.",
        )


def _no_overlaps(path: Path, entries: list[_Entry], size: int) -> None:
    """Bombs let many entries share the same bytes."""
    end = 0
    for entry in sorted(entries, key=lambda e: e.offset):
        if entry.offset < end:
            raise hostile(path, "its entries overlap")
        end = entry.offset + 30 + entry.packed
        if end > size:
            raise damaged(path, f"{entry.name[:80]!r} is cut short")


def _chunks(path: Path, file: BinaryIO, entry: _Entry) -> Iterator[bytes]:
    file.seek(entry.offset)
    header = file.read(30)
    if len(header) < 30 or header[:4] != b"PK\x03\x04":
        raise damaged(path, f"{entry.name[:80]!r} cannot be found")
    n, m = struct.unpack_from("<HH", header, 26)
    file.seek(n + m, 1)
    left, written, crc = entry.packed, 0, 0
    step = _unpacker(path, entry.method)
    while True:
        data = file.read(min(CHUNK // 16, left)) if left else b""
        left -= len(data)
        for piece in step(data):
            written += len(piece)
            if written > entry.size:
                raise hostile(path, f"{entry.name[:80]!r} unpacks to more than it claims")
            crc = zlib.crc32(piece, crc)
            yield piece
        if not data:
            break
    if written != entry.size or crc != entry.crc:
        raise damaged(path, f"{entry.name[:80]!r} is not what its checksum says")


def _unpacker(path: Path, method: int) -> Callable[[bytes], Iterator[bytes]]:
    """Packed bytes to pieces of at most `CHUNK`."""
    if method == _STORED:
        return lambda data: iter((data,) if data else ())
    return _inflate(path) if method == _DEFLATED else _bunzip(path)


def _inflate(path: Path) -> Callable[[bytes], Iterator[bytes]]:
    inflater = zlib.decompressobj(-15)

    def step(data: bytes) -> Iterator[bytes]:
        try:
            piece = inflater.decompress(data, CHUNK)
            while piece:
                yield piece
                piece = inflater.decompress(inflater.unconsumed_tail, CHUNK)
        except zlib.error as error:
            raise damaged(path, f"its packed data cannot be read ({error})") from error

    return step


def _bunzip(path: Path) -> Callable[[bytes], Iterator[bytes]]:
    inflater = bz2.BZ2Decompressor()

    def step(data: bytes) -> Iterator[bytes]:
        piece = b"" if inflater.eof else _bunzipped(path, inflater, data)
        while piece:
            yield piece
            piece = b"" if inflater.eof or inflater.needs_input else _bunzipped(path, inflater, b"")

    return step


def _bunzipped(path: Path, inflater: bz2.BZ2Decompressor, data: bytes) -> bytes:
    try:
        return inflater.decompress(data, CHUNK)
    except OSError as error:
        raise damaged(path, "its packed data cannot be read") from error
