"""Which type llama.cpp's quantizer gives each tensor of a model, in the order in which it writes them: asked of itself, in a dry run."""

from __future__ import annotations

import ctypes
import functools
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from app.core.errors import ErrorKind, WeftError
from app.core.export_plan import GgufType
from app.core.ggml import TYPES

# `[   3/ 291] blk.0.attn_k.weight - [ 256, 256, 1, 1], type = f16, size = 0.12 MiB -> 0.04 MiB (q4_K)`: what it says of each.
_TENSOR = re.compile(
    r"\[ *\d+/ *\d+\] (\S+) +- \[[^\]]*\], type = +(\w+), size = +[\d.]+ MiB(?: -> +[\d.]+ MiB \((\w+)\))?"
)
_NUMBERS = {each.name.lower(): number for number, each in TYPES.items()}


def chosen_types(
    source: Path, kind: GgufType, imatrix: Mapping[str, Any] | None, *, requantize: bool
) -> list[tuple[str, int]]:
    """Tensors with their new types, as ggml numbers them. Nothing is written, and no weight is read.

    Args:
        imatrix: as for `quantize`: whether there is one makes a difference to the types.

    Raises:
        WeftError: UNSUPPORTED with llama.cpp's words.
    """
    import llama_cpp

    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = kind.ftype
    parameters.allow_requantize = requantize
    parameters.dry_run = True
    kept: list[Any] = []
    if imatrix:
        parameters.imatrix = _entries(llama_cpp, imatrix, kept)
    said: list[str] = []

    def hear(_level: int, text: bytes, _data: object) -> None:
        said.append(text.decode("utf-8", "replace"))  # called from C: cheap, and never raising

    callback = llama_cpp.llama_log_callback(hear)
    llama_cpp.llama_log_set(callback, ctypes.c_void_p(0))
    try:
        # It opens no file to write in a dry run, whatever the name.
        status = llama_cpp.llama_model_quantize(os.fsencode(source), b"", ctypes.byref(parameters))
    finally:
        llama_cpp.llama_log_set(_silence(), ctypes.c_void_p(0))
    if status != 0:
        lines = [line.strip() for line in "".join(said).splitlines() if line.strip()]
        reason = next((line for line in reversed(lines) if "fail" in line or "error" in line), "")
        raise refused(kind, reason.rpartition(": ")[2])
    found = [(name, _NUMBERS.get((new or old).lower(), -1)) for name, old, new in _TENSOR.findall("".join(said))]
    if unknown := next((name for name, number in found if number < 0), ""):
        raise refused(kind, f"{unknown[:80]} would be of a type that is not known here")
    return found


def refused(kind: GgufType, reason: str) -> WeftError:
    """What cannot be quantized, in words."""
    return WeftError(
        ErrorKind.UNSUPPORTED,
        f"llama.cpp could not quantize to {kind.name}: {reason[:300].rstrip('.') or 'it did not say why'}.",
        "Choose another type, such as q4_k_m or q8_0.",
    )


@functools.cache
def _silence() -> Any:
    """A log that says nothing. llama.cpp keeps the last one until the process ends."""
    import llama_cpp

    return llama_cpp.llama_log_callback(_nothing)


def _nothing(_level: int, _text: bytes, _data: object) -> None:
    return None


def _entries(llama_cpp: Any, imatrix: Mapping[str, Any], kept: list[Any]) -> Any:
    """llama.cpp's list of named arrays, which ends with an empty one. `kept` must live as long as it."""
    entries = (llama_cpp.llama_model_imatrix_data * (len(imatrix) + 1))()
    for entry, (name, values) in zip(entries, imatrix.items(), strict=False):
        text = name.encode()
        kept += [text, values]
        entry.name = text
        entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        entry.size = values.size
    kept.append(entries)
    return ctypes.cast(entries, ctypes.POINTER(llama_cpp.llama_model_imatrix_data))
