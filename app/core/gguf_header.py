"""GGUF headers, read with bounds: no count, length or offset in the file is believed.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 1 to 3.

Files are read, not mapped: a file that is cut short while it is mapped kills the process (SIGBUS), and the
window reads files that may still be downloading. Arrays of strings (a vocabulary has 150,000) are stepped
over and read only when asked for.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO, NamedTuple

from app.core.errors import ErrorKind, WeftError
from app.core.ggml import TYPES

MAX_HEADER = 64 * 1024 * 1024  # bytes; the largest vocabularies take about 16 MiB
MAX_TENSORS = 65_536
MAX_KEYS = 16_384
MAX_NAME = 1024  # bytes; ggml itself stops at 64
MAX_STRING = 4 * 1024 * 1024  # bytes; the longest chat templates take 100 KiB
MAX_TEXT = 16 * 1024 * 1024  # bytes of all strings kept together
MAX_STRINGS = 4_000_000  # elements of all string arrays together
MAX_SMALL = 4096  # arrays of up to so many numbers are read at once,
MAX_NUMBERS = 200_000  # up to so many in the whole file
_FIRST_READ = 512 * 1024

_STRING, _ARRAY = 8, 9
_SCALARS: dict[int, struct.Struct] = {
    0: struct.Struct("<B"),
    1: struct.Struct("<b"),
    2: struct.Struct("<H"),
    3: struct.Struct("<h"),
    4: struct.Struct("<I"),
    5: struct.Struct("<i"),
    6: struct.Struct("<f"),
    7: struct.Struct("<?"),
    10: struct.Struct("<Q"),
    11: struct.Struct("<q"),
    12: struct.Struct("<d"),
}
_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")

Number = int | float | bool


@dataclass(frozen=True, slots=True)
class GgufArray:
    """An array that was stepped over: `count` elements of `type` begin at byte `offset` of the file."""

    type: int
    count: int
    offset: int


class GgufTensor(NamedTuple):
    """A tensor.

    Attributes:
        shape: innermost dimension first, as GGUF orders them.
        type: number in core.ggml.TYPES; other numbers are of a type newer than this program.
        offset: of its data in the file, absolute. bytes: that these take; 0 when the type is unknown.
    """

    name: str
    shape: tuple[int, ...]
    type: int
    offset: int
    bytes: int

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """What stands before a GGUF file's tensors.

    Attributes:
        metadata: numbers, strings, tuples of numbers; longer arrays and all arrays of strings as GgufArray.
        tensors: in the order of the file.
        data_offset: where tensor data begin. missing: bytes that a truncated file lacks at its end, else 0.
        spans: where each key with its value lies in the file: (first byte, end).
    """

    path: Path
    version: int
    metadata: Mapping[str, Number | str | tuple[Number, ...] | GgufArray]
    tensors: tuple[GgufTensor, ...]
    data_offset: int
    missing: int = 0
    spans: Mapping[str, tuple[int, int]] = field(default_factory=dict[str, tuple[int, int]])

    def text(self, key: str) -> str:
        """A string of the metadata, "" when there is none."""
        value = self.metadata.get(key)
        return value if isinstance(value, str) else ""

    def number(self, key: str) -> int:
        """A whole number of the metadata (the largest of an array of them), 0 when there is none."""
        value = self.metadata.get(key)
        if isinstance(value, tuple):
            value = max((v for v in value if isinstance(v, int)), default=0)
        return int(value) if isinstance(value, int) else 0

    def count(self, key: str) -> int:
        """How many elements an array of the metadata has, 0 when there is none."""
        value = self.metadata.get(key)
        if isinstance(value, GgufArray):
            return value.count
        return len(value) if isinstance(value, tuple) else 0

    def strings(self, key: str) -> list[str]:
        """Read an array of strings now. Empty when there is none.

        Raises:
            WeftError: CORRUPT when the file changed since its header was read.
        """
        value = self.metadata.get(key)
        if not isinstance(value, GgufArray) or value.type != _STRING:
            return []
        with _opened(self.path) as file:
            reader = _Reader(file, self.path, self.version)
            reader.position = value.offset
            return [
                reader.take(reader.length("a length"), "a string").decode("utf-8", "replace")
                for _ in range(value.count)
            ]


def read_gguf_header(path: Path, *, complete: bool = True) -> GgufHeader:
    """Read and check a GGUF header.

    Args:
        path: the file.
        complete: refuse a file that ends before its tensors do. False tells it in `missing`.

    Raises:
        WeftError: CORRUPT when the file is no GGUF, damaged or truncated; UNSUPPORTED for a version or byte
            order that cannot be read; PERMISSION or NOT_FOUND from the operating system.
    """
    with _opened(path) as file:
        reader = _Reader(file, path, 3)
        if reader.take(4, "the magic number") != b"GGUF":
            raise reader.corrupt("it does not begin with GGUF")
        version = reader.u32("the version")
        if version not in (1, 2, 3):
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
            if swapped in (2, 3):
                raise WeftError(
                    ErrorKind.UNSUPPORTED,
                    f"{path.name} is a big-endian GGUF file.",
                    "Get the usual little-endian file of this model.",
                )
            raise WeftError(
                ErrorKind.UNSUPPORTED,
                f"{path.name} is GGUF version {version}; versions 1 to 3 can be read.",
                "Update Weft, or get another file of this model.",
            )
        reader.version = version
        tensor_count = reader.length("the number of tensors")
        key_count = reader.length("the number of keys")
        # 13 and 24 bytes are the least that a key and a tensor take.
        if key_count > MAX_KEYS or key_count * 13 > reader.size:
            raise reader.corrupt(f"it claims {key_count} keys")
        if tensor_count > MAX_TENSORS or tensor_count * 24 > reader.size:
            raise reader.corrupt(f"it claims {tensor_count} tensors")
        metadata: dict[str, Number | str | tuple[Number, ...] | GgufArray] = {}
        spans: dict[str, tuple[int, int]] = {}
        for _ in range(key_count):
            start = reader.position
            key = reader.string(MAX_NAME, "a key").decode("utf-8", "replace")
            if key in metadata:
                raise reader.corrupt(f"the key {key[:80]!r} stands in it twice")
            metadata[key] = _value(reader, key)
            spans[key] = (start, reader.position)
        tensors = _tensors(reader, tensor_count, metadata.get("general.alignment", 32))
        return replace(_checked(reader, metadata, tensors, complete), spans=spans)


def _value(reader: _Reader, key: str) -> Number | str | tuple[Number, ...] | GgufArray:
    kind = reader.u32(f"the type of {key[:80]!r}")
    if kind == _STRING:
        return reader.string(MAX_STRING, f"the text of {key[:80]!r}").decode("utf-8", "replace")
    if kind in _SCALARS:
        return reader.scalar(_SCALARS[kind], key)
    if kind != _ARRAY:
        raise reader.corrupt(f"{key[:80]!r} has the unknown type {kind}")
    element = reader.u32(f"the type of {key[:80]!r}")
    count = reader.length(f"the length of {key[:80]!r}")
    start = reader.position
    if element == _STRING:
        reader.skip_strings(count, key)
        return GgufArray(element, count, start)
    if element not in _SCALARS:
        raise reader.corrupt(f"{key[:80]!r} is an array of the unsupported type {element}")
    layout = _SCALARS[element]
    if count * layout.size > reader.size - start:
        raise reader.corrupt(f"{key[:80]!r} claims {count} elements")
    if count > MAX_SMALL or reader.numbers + count > MAX_NUMBERS:
        reader.skip(count * layout.size, key)
        return GgufArray(element, count, start)
    reader.numbers += count
    data = reader.take(count * layout.size, key)
    return tuple(value for (value,) in layout.iter_unpack(data))


def _tensors(reader: _Reader, count: int, alignment: object) -> tuple[list[GgufTensor], int]:
    """Tensor infos with offsets made absolute, and where the data begin."""
    if not isinstance(alignment, int) or not 0 < alignment <= 1 << 20 or alignment & (alignment - 1):
        raise reader.corrupt(f"its alignment is {alignment}")
    found: list[GgufTensor] = []
    names: set[str] = set()
    for _ in range(count):
        name = reader.string(MAX_NAME, "a tensor's name").decode("utf-8", "replace")
        if name in names:
            raise reader.corrupt(f"the tensor {name[:80]!r} stands in it twice")
        names.add(name)
        dimensions = reader.u32(f"the shape of {name[:80]!r}")
        if dimensions > 4:
            raise reader.corrupt(f"the tensor {name[:80]!r} claims {dimensions} dimensions")
        shape = tuple(reader.length(f"the shape of {name[:80]!r}") for _ in range(dimensions))
        kind = reader.u32(f"the type of {name[:80]!r}")
        offset = reader.u64(f"the offset of {name[:80]!r}")
        elements = 1
        for size in shape:
            elements *= size
        # A stored zero-sized or astronomically large tensor is a lie in either case.
        if elements >= 1 << 48 or offset % alignment or offset >= 1 << 62:
            raise reader.corrupt(f"the tensor {name[:80]!r} has an impossible shape or offset")
        taken = 0
        if kind in TYPES:
            block = TYPES[kind]
            if shape and shape[0] % block.block:
                raise reader.corrupt(
                    f"the tensor {name[:80]!r} has rows of {shape[0]}, not a multiple of {block.block}"
                )
            taken = elements // block.block * block.bytes
        found.append(GgufTensor(name, shape, kind, offset, taken))
    data = -(-reader.position // alignment) * alignment
    return [tensor._replace(offset=tensor.offset + data) for tensor in found], data


def _checked(
    reader: _Reader,
    metadata: Mapping[str, Number | str | tuple[Number, ...] | GgufArray],
    tensors: tuple[list[GgufTensor], int],
    complete: bool,
) -> GgufHeader:
    """Overlaps and the end of the file."""
    found, data_offset = tensors
    end, before = data_offset, ""
    for tensor in sorted(found, key=lambda tensor: tensor.offset):
        if tensor.offset < end and tensor.bytes:
            raise reader.corrupt(f"the tensors {before[:80]!r} and {tensor.name[:80]!r} overlap")
        end, before = max(end, tensor.offset + tensor.bytes), tensor.name
    missing = max(0, end - reader.size) if found else 0
    if missing and complete:
        raise WeftError(
            ErrorKind.CORRUPT,
            f"{reader.path.name} is truncated: {missing:,} bytes are missing at its end.",
            "Download or copy it again.",
        )
    return GgufHeader(reader.path, reader.version, metadata, tuple(found), data_offset, missing)


class _Reader:
    """Steps through the beginning of a file that is read in growing pieces."""

    def __init__(self, file: BinaryIO, path: Path, version: int) -> None:
        self.path = path
        self.version = version
        self.position = 0
        self.size = file.seek(0, 2)
        self._file = file
        file.seek(0)
        self._data = file.read(min(_FIRST_READ, self.size))
        self.numbers = 0
        self._strings = 0
        self._text = 0

    def corrupt(self, what: str) -> WeftError:
        return WeftError(
            ErrorKind.CORRUPT,
            f"{self.path.name} is damaged: {what}.",
            "Download it again, or get it from another place.",
        )

    def need(self, end: int, what: str) -> None:
        """Have the file's first `end` bytes in memory."""
        if end <= len(self._data):
            return
        if end > self.size:
            raise WeftError(
                ErrorKind.CORRUPT,
                f"{self.path.name} is truncated: it ends inside {what}.",
                "Download or copy it again.",
            )
        if end > MAX_HEADER:
            raise self.corrupt(f"its header is longer than {MAX_HEADER // 2**20} MiB")
        wanted = min(self.size, max(end, 2 * len(self._data)), MAX_HEADER)
        self._data += self._file.read(wanted - len(self._data))
        if end > len(self._data):
            raise self.corrupt(f"it became shorter while it was read, inside {what}")

    def take(self, count: int, what: str) -> bytes:
        start = self.position
        self.need(start + count, what)
        self.position = start + count
        return self._data[start : start + count]

    def skip(self, count: int, what: str) -> None:
        self.need(self.position + count, what)
        self.position += count

    def scalar(self, layout: struct.Struct, what: str) -> Number:
        return layout.unpack(self.take(layout.size, what))[0]

    def u32(self, what: str) -> int:
        return int.from_bytes(self.take(4, what), "little")

    def u64(self, what: str) -> int:
        return int.from_bytes(self.take(8, what), "little")

    def length(self, what: str) -> int:
        """A count or length: 32 bits in version 1, 64 since."""
        return self.u32(what) if self.version == 1 else self.u64(what)

    def string(self, limit: int, what: str) -> bytes:
        count = self.length(what)
        self._text += count
        if count > limit or self._text > MAX_TEXT:
            raise self.corrupt(f"{what} claims {count} bytes")
        return self.take(count, what)

    def skip_strings(self, count: int, what: str) -> None:
        """Step over `count` strings as fast as Python can."""
        width = 4 if self.version == 1 else 8
        self._strings += count
        if self._strings > MAX_STRINGS or count * width > self.size - self.position:
            raise self.corrupt(f"{what[:80]!r} claims {count} elements")
        unpack = (_U32 if width == 4 else _U64).unpack_from
        position, data, done = self.position, self._data, 0
        while done < count:
            try:
                for done in range(done, count):  # noqa: B007, B020  (it goes on where it stopped)
                    position += unpack(data, position)[0] + width
                done = count
            except (struct.error, OverflowError):
                # Beyond what is in memory, or beyond the file: then this raises.
                self.need(position + width, what)
                data = self._data
        self.need(position, what)
        self.position = position


def _opened(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise os_error(path, error) from error


def os_error(path: Path, error: OSError) -> WeftError:
    """The operating system's refusal to read a file, in words."""
    if isinstance(error, FileNotFoundError):
        return WeftError(ErrorKind.NOT_FOUND, f"{path} does not exist.", "Refresh the library, or check the path.")
    if isinstance(error, PermissionError):
        return WeftError(
            ErrorKind.PERMISSION,
            f"{path} may not be read.",
            "Give your user the right to read it, then refresh the library.",
        )
    return WeftError(
        ErrorKind.CORRUPT,
        f"{path} cannot be read: {error.strerror or error}.",
        "Check the disk, or copy the file again.",
    )
