"""safetensors headers, read with bounds.

Format: https://github.com/huggingface/safetensors#format: 8 bytes of length, JSON, tensor data without holes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import msgspec

from app.core.errors import ErrorKind, WeftError
from app.core.gguf_header import os_error

MAX_HEADER = 32 * 1024 * 1024  # bytes; single files of the largest mixtures stay below 10 MiB
MAX_TENSORS = 200_000
MAX_DIMENSIONS = 16

# Bits of one element.
DTYPES: dict[str, int] = {
    "F64": 64,
    "F32": 32,
    "F16": 16,
    "BF16": 16,
    "I64": 64,
    "I32": 32,
    "I16": 16,
    "I8": 8,
    "U64": 64,
    "U32": 32,
    "U16": 16,
    "U8": 8,
    "BOOL": 8,
    "C64": 64,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "F4": 4,
}


class SafetensorsTensor(NamedTuple):
    """A tensor: dtype as the file names it, shape outermost first, where its data lie in the file, absolute."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    bytes: int

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


class SafetensorsHeader(NamedTuple):
    """What stands before the tensor data.

    Attributes:
        metadata: the free texts under `__metadata__`.
        tensors: in the order of their data.
        missing: bytes that a truncated file lacks at its end, else 0.
    """

    path: Path
    metadata: Mapping[str, str]
    tensors: tuple[SafetensorsTensor, ...]
    data_offset: int
    missing: int = 0


class _Info(msgspec.Struct):
    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


_ITEMS = msgspec.json.Decoder(dict[str, msgspec.Raw])
_INFO = msgspec.json.Decoder(_Info)
_METADATA = msgspec.json.Decoder(dict[str, str])


def read_safetensors_header(path: Path, *, complete: bool = True) -> SafetensorsHeader:
    """Read and check a safetensors header.

    Args:
        path: the file.
        complete: refuse a file that ends before its tensors do. False tells it in `missing`.

    Raises:
        WeftError: CORRUPT when the file is no safetensors, damaged or truncated; UNSUPPORTED for an element
            type that is not known; PERMISSION or NOT_FOUND from the operating system.
    """
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_HEADER):
                raise _not_one(path, size, length)
            text = file.read(length)
    except OSError as error:
        raise os_error(path, error) from error
    if len(text) != length or not text.startswith(b"{"):
        raise _corrupt(path, "its header is not JSON")
    items = _items(path, text)
    metadata: dict[str, str] = {}
    try:
        if "__metadata__" in items:
            metadata = _METADATA.decode(items.pop("__metadata__"))
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise _corrupt(path, f"its metadata cannot be read: {error}") from error
    tensors = sorted(
        (_tensor(path, name, raw, 8 + length) for name, raw in items.items()), key=lambda t: (t.offset, t.bytes)
    )
    end = 8 + length
    for tensor in tensors:
        if tensor.offset != end:
            raise _corrupt(path, f"the tensor {tensor.name[:80]!r} does not begin where the one before it ends")
        end += tensor.bytes
    if end > size and complete:
        raise WeftError(
            ErrorKind.CORRUPT,
            f"{path.name} is truncated: {end - size:,} bytes are missing at its end.",
            "Download or copy it again.",
        )
    if end < size:
        raise _corrupt(path, f"{size - end:,} bytes after its last tensor belong to nothing")
    return SafetensorsHeader(path, metadata, tuple(tensors), 8 + length, end - size)


def _items(path: Path, text: bytes) -> dict[str, msgspec.Raw]:
    # Four colons a tensor: bounds what a crafted header makes of memory before anything is decoded.
    if text.count(b'":') > 4 * MAX_TENSORS:
        raise _corrupt(path, f"it claims more than {MAX_TENSORS:,} tensors")
    try:
        items = _ITEMS.decode(text.rstrip(b" "))
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise _corrupt(path, f"its header is not JSON: {error}") from error
    # The key can stand unescaped only in a tensor's own entry; JSON objects silently drop repeated names.
    if text.count(b'"data_offsets"') != len(items) - ("__metadata__" in items):
        raise _corrupt(path, "a tensor stands in it twice, or one has no offsets")
    return items


def _tensor(path: Path, name: str, raw: msgspec.Raw, data_offset: int) -> SafetensorsTensor:
    try:
        info = _INFO.decode(raw)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise _corrupt(path, f"the tensor {name[:80]!r} cannot be read: {error}") from error
    if info.dtype not in DTYPES:
        raise WeftError(
            ErrorKind.UNSUPPORTED,
            f"{path.name} has a tensor {name[:80]!r} of the unknown type {info.dtype[:20]!r}.",
            "Update Weft, or get the model in another format.",
        )
    elements = 1
    for extent in info.shape[:MAX_DIMENSIONS]:
        elements *= extent
        if extent < 0 or elements >= 1 << 60:
            break
    begin, end = info.data_offsets
    bits = elements * DTYPES[info.dtype]
    if len(info.shape) > MAX_DIMENSIONS or not 0 <= begin <= end < 1 << 62 or bits != (end - begin) * 8:
        raise _corrupt(path, f"the tensor {name[:80]!r} has a shape that does not agree with its bytes")
    return SafetensorsTensor(name, info.dtype, tuple(info.shape), data_offset + begin, end - begin)


def _corrupt(path: Path, what: str) -> WeftError:
    return WeftError(
        ErrorKind.CORRUPT, f"{path.name} is damaged: {what}.", "Download it again, or get it from another place."
    )


def _not_one(path: Path, size: int, length: int) -> WeftError:
    if size < 8:
        return _corrupt(path, f"it has only {size} bytes")
    if length <= MAX_HEADER:
        return WeftError(
            ErrorKind.CORRUPT,
            f"{path.name} is truncated: it ends inside its header.",
            "Download or copy it again.",
        )
    return _corrupt(path, f"its header claims {length:,} bytes")
