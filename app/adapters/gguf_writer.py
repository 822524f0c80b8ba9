"""Writes GGUF files of float tensors: what an adapter for llama.cpp is. Needs numpy alone.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, version 3.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy

_ALIGNMENT = 32


def write_gguf(path: Path, metadata: Mapping[str, str | float | int], tensors: Mapping[str, numpy.ndarray]) -> None:
    """Write a file, complete when it appears.

    Args:
        metadata: texts, float32 numbers and uint32 numbers.
        tensors: float32, written as they are (their last dimension is GGUF's first).
    """
    head = bytearray(b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata)))
    for key, value in metadata.items():
        head += _text(key)
        if isinstance(value, str):
            head += struct.pack("<I", 8) + _text(value)
        elif isinstance(value, float):
            head += struct.pack("<If", 6, value)
        else:
            head += struct.pack("<II", 4, value)
    offset = 0
    for name, tensor in tensors.items():
        head += _text(name) + struct.pack("<I", tensor.ndim)
        head += b"".join(struct.pack("<Q", size) for size in reversed(tensor.shape)) + struct.pack("<IQ", 0, offset)
        offset += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
    head += b"\0" * (-len(head) % _ALIGNMENT)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            file.write(head)
            for tensor in tensors.values():
                data = tensor.astype("<f4", copy=False).tobytes()
                file.write(data + b"\0" * (-len(data) % _ALIGNMENT))
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data
