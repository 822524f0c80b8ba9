"""Where one tensor of an adapter lies, and its bytes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from app.core.errors import ErrorKind, WeftError
from app.core.gguf_header import os_error


class TensorInfo(NamedTuple):
    """Where a tensor lies. `type` is the dtype as safetensors (or GGML, in lower case) names it; `shape` outermost first."""

    name: str
    type: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    bytes: int


def read_tensor(tensor: TensorInfo) -> bytes:
    """All of its bytes.

    Raises:
        WeftError: CORRUPT when the file has become shorter; PERMISSION or NOT_FOUND where it cannot be read.
    """
    try:
        with tensor.file.open("rb") as file:
            file.seek(tensor.offset)
            data = file.read(tensor.bytes)
    except OSError as error:
        raise os_error(tensor.file, error) from error
    if len(data) != tensor.bytes:
        raise WeftError(ErrorKind.CORRUPT, f"{tensor.file.name} became shorter while it was read.", "Get it again.")
    return data


def tensor_pieces(tensor: TensorInfo, size: int) -> Iterator[bytes]:
    """Its bytes, up to `size` of them at a time, as far as the file has them.

    Raises:
        WeftError: PERMISSION or NOT_FOUND where the file cannot be read.
    """
    try:
        with tensor.file.open("rb") as file:
            file.seek(tensor.offset)
            left = tensor.bytes
            while left > 0 and (piece := file.read(min(size, left))):
                left -= len(piece)
                yield piece
    except OSError as error:
        raise os_error(tensor.file, error) from error
