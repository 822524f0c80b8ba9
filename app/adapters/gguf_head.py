"""What stands before the tensors of a GGUF file that is made from another: that one's keys as they are, and a new list of tensors."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from app.core.formats import GgufHeader
from app.core.gguf_header import os_error

ALIGNMENT = 32  # bytes, where a file does not say otherwise
SPLIT = ("split.no", "split.count", "split.tensors.count")


class Placed(NamedTuple):
    """A tensor of the new file. shape: innermost first. type: ggml's number. bytes: that it takes."""

    name: str
    shape: tuple[int, ...]
    type: int
    bytes: int


def alignment_of(header: GgufHeader) -> int:
    """Bytes at whose multiples a file's tensors begin."""
    return header.number("general.alignment") or ALIGNMENT


def padded(size: int, alignment: int) -> int:
    """The next multiple."""
    return -(-size // alignment) * alignment


def whole_number(key: str, value: int) -> bytes:
    """A key with a uint32, as it stands in a file."""
    name = key.encode()
    return struct.pack("<Q", len(name)) + name + struct.pack("<II", 4, value)


def head_of(
    first: GgufHeader, tensors: Sequence[Placed], *, without: Iterable[str] = (), added: Sequence[bytes] = ()
) -> bytes:
    """A whole header, padded.

    Args:
        first: of the file whose keys are kept. without: keys that are not. added: keys that come after them.

    Raises:
        WeftError: PERMISSION, NOT_FOUND when the file cannot be read any more.
    """
    alignment = alignment_of(first)
    gone = set(without)
    spans = [span for key, span in first.spans.items() if key not in gone]
    try:
        with first.path.open("rb") as file:
            raw = file.read(first.data_offset)
    except OSError as error:
        raise os_error(first.path, error) from error
    head = bytearray(b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(spans) + len(added)))
    for start, end in spans:
        head += raw[start:end]
    for key in added:
        head += key
    offset = 0
    for tensor in tensors:
        name = tensor.name.encode()
        head += struct.pack("<Q", len(name)) + name + struct.pack("<I", len(tensor.shape))
        head += b"".join(struct.pack("<Q", size) for size in tensor.shape)
        head += struct.pack("<IQ", tensor.type, offset)
        offset += padded(tensor.bytes, alignment)
    return bytes(head) + bytes(padded(len(head), alignment) - len(head))
