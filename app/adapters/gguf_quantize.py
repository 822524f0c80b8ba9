"""Quantizing a GGUF file with llama.cpp's own quantizer."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from app.core.errors import ErrorKind, WeftError
from app.core.export_plan import gguf_type

_STEP = re.compile(r"\[\s*(\d+)/\s*(\d+)\]")


def quantize(
    source: Path,
    target: Path,
    kind: str,
    *,
    imatrix: Mapping[str, Any] | None = None,
    threads: int = 0,
    requantize: bool = False,
    progress: Callable[[int, int], None] = lambda *_: None,
) -> None:
    """Quantize `source` into `target`.

    Args:
        imatrix: tensor name to float32 numpy array of importances, one for each column (times experts).
        requantize: let it quantize what is quantized already.
        progress: told (tensors done, tensors in all).

    Raises:
        WeftError: BAD_INPUT when the type needs an importance matrix and there is none; UNSUPPORTED with llama.cpp's words.
    """
    import llama_cpp

    chosen = gguf_type(kind)
    if chosen.imatrix and not imatrix:
        raise needs_imatrix(kind)
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = chosen.ftype
    parameters.nthread = threads
    parameters.allow_requantize = requantize
    kept: list[Any] = []
    if imatrix:
        parameters.imatrix = _entries(llama_cpp, imatrix, kept)
    said: list[str] = []

    def hear(_level: int, text: bytes, _data: object) -> None:
        # Called from C: cheap, and never raising.
        line = text.decode("utf-8", "replace").strip()
        said.append(line)
        del said[:-40]
        if found := _STEP.search(line):
            progress(int(found[1]), int(found[2]))

    callback = llama_cpp.llama_log_callback(hear)
    llama_cpp.llama_log_set(callback, ctypes.c_void_p(0))
    try:
        status = llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(parameters))
    finally:
        quiet = llama_cpp.llama_log_callback(_nothing)
        _FOR_EVER.append(quiet)
        llama_cpp.llama_log_set(quiet, ctypes.c_void_p(0))
    if status != 0:
        target.unlink(missing_ok=True)
        reason = next((line for line in reversed(said) if "fail" in line or "error" in line), said[-1] if said else "")
        raise WeftError(
            ErrorKind.UNSUPPORTED,
            f"llama.cpp could not quantize to {chosen.name}: {reason.rpartition(': ')[2][:300] or 'it did not say why'}.",
            "Choose another type, such as q4_k_m or q8_0.",
        )


def needs_imatrix(kind: str) -> WeftError:
    """The refusal of a type that llama.cpp makes only with an importance matrix."""
    return WeftError(
        ErrorKind.BAD_INPUT,
        f"The type {kind} needs an importance matrix.",
        "Name a text with --imatrix (some hundred kilobytes like what the model will read), or choose q4_k_m.",
    )


_FOR_EVER: list[Any] = []  # llama.cpp keeps the last callback until the process ends


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
