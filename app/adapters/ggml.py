"""ggml's own conversions between its tensor types and float32, through the library that llama-cpp-python brings.

Every type that this llama.cpp knows, quick, and bit for bit what llama.cpp itself computes with. Needs numpy alone.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app.core.errors import ErrorKind, WeftError
from app.core.ggml import TYPES

if TYPE_CHECKING:
    import numpy

F32, F16, BF16 = 0, 1, 30
FLOATS = (F32, F16, BF16)


class _Traits(ctypes.Structure):
    """struct ggml_type_traits of ggml.h; held against our own table before it is used."""

    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
        ("from_float_ref", ctypes.c_void_p),
    )


class Ggml:
    """The functions of libggml-base that convert."""

    def __init__(self, library: Any) -> None:
        self._traits: Any = library.ggml_get_type_traits
        self._traits.argtypes, self._traits.restype = [ctypes.c_int], ctypes.POINTER(_Traits)
        self._quantize: Any = library.ggml_quantize_chunk
        self._quantize.argtypes = [
            ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p,
        ]  # fmt: skip
        self._quantize.restype = ctypes.c_size_t
        self._requires: Any = library.ggml_quantize_requires_imatrix
        self._requires.argtypes, self._requires.restype = [ctypes.c_int], ctypes.c_bool
        self._valid: Any = library.ggml_validate_row_data
        self._valid.argtypes, self._valid.restype = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t], ctypes.c_bool

    def can_read(self, kind: int) -> bool:
        """Whether tensors of a type can be made float32."""
        return kind in FLOATS or self._to_float(kind) is not None

    def can_write(self, kind: int) -> bool:
        """Whether a type can be made without an importance matrix."""
        if kind in FLOATS:
            return True
        # The rest are whole numbers, types for computing only, and such as are made by training.
        known = (2, 3, 6, 7, 8, 10, 11, 12, 13, 14, 18, 20, 21, 22, 23, 34, 35, 39)
        return kind in known and self._to_float(kind) is not None and not self._requires(kind)

    def needs_importances(self, kind: int) -> bool:
        """Whether the library can make a type with an importance matrix alone."""
        return bool(self._requires(kind))

    def valid(self, kind: int, data: bytes | memoryview) -> bool:
        """Whether rows hold numbers only: llama.cpp's own check of what it reads and writes."""
        import numpy

        raw = numpy.frombuffer(data, numpy.uint8)
        return bool(self._valid(kind, raw.ctypes.data, raw.size))

    def _to_float(self, kind: int) -> Any:
        block = TYPES.get(kind)
        if block is None:
            return None
        traits = self._traits(kind)
        if not traits or traits.contents.blck_size != block.block or traits.contents.type_size != block.bytes:
            return None
        return traits.contents.to_float or None

    def read(self, kind: int, data: bytes | bytearray | memoryview, width: int) -> numpy.ndarray:
        """Rows of `width` elements as float32, [rows, width].

        Raises:
            WeftError: UNSUPPORTED for a type that this llama.cpp cannot read.
        """
        import numpy

        if kind == F32:
            return numpy.frombuffer(data, "<f4").reshape(-1, width).astype(numpy.float32)
        if kind == F16:
            return numpy.frombuffer(data, "<f2").astype(numpy.float32).reshape(-1, width)
        if kind == BF16:
            wide = numpy.frombuffer(data, "<u2").astype(numpy.uint32) << 16
            return wide.view(numpy.float32).reshape(-1, width)
        convert = self._to_float(kind)
        if convert is None:
            raise unreadable(kind)
        raw = numpy.frombuffer(data, numpy.uint8)
        block = TYPES[kind]
        found = numpy.empty(raw.size // block.bytes * block.block, numpy.float32)
        convert(raw.ctypes.data, found.ctypes.data, found.size)
        return found.reshape(-1, width)

    def write(self, kind: int, rows: numpy.ndarray) -> bytes | memoryview:
        """float32 rows as a type.

        Raises:
            WeftError: UNSUPPORTED for values that the type cannot hold.
        """
        import numpy

        rows = numpy.ascontiguousarray(rows, numpy.float32)
        if kind == F32:
            return rows.data.cast("B")
        if kind == BF16:
            bits = rows.view(numpy.uint32)
            rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
            return rounded.astype("<u2").data.cast("B")
        if kind == F16:
            with numpy.errstate(over="ignore"):
                half = rows.astype("<f2")
            if not numpy.isfinite(half).all():
                raise WeftError(
                    ErrorKind.UNSUPPORTED,
                    "A merged weight is larger than 16-bit floats of the type f16 hold (65,504).",
                    "Lower the adapters' weights, or merge into a base of the type bf16 or f32.",
                )
            return half.data.cast("B")
        return self.quantize(kind, rows)

    def quantize(self, kind: int, rows: numpy.ndarray, importances: numpy.ndarray | None = None) -> memoryview:
        """float32 rows as a type, rounded as llama.cpp's quantizer does, without a look at what comes out.

        Args:
            importances: float32 of each column, by which it weighs its errors.
        """
        import numpy

        rows = numpy.ascontiguousarray(rows, numpy.float32)
        made = numpy.empty(rows.size // TYPES[kind].block * TYPES[kind].bytes, numpy.uint8)
        weights = None if importances is None else numpy.ascontiguousarray(importances, numpy.float32)
        given = None if weights is None else weights.ctypes.data
        size = self._quantize(kind, rows.ctypes.data, made.ctypes.data, 0, rows.shape[0], rows.shape[1], given)
        if size != made.size:
            raise WeftError(ErrorKind.INTERNAL, f"ggml wrote {size} bytes for {made.size}.", "Please report this.")
        return made.data


def unreadable(kind: int) -> WeftError:
    """The refusal of a type that cannot be made float32."""
    name = TYPES[kind].name if kind in TYPES else f"number {kind}"
    return WeftError(
        ErrorKind.UNSUPPORTED,
        f"This llama.cpp cannot turn tensors of the type {name} into plain numbers.",
        "Use another quantization of the model, or merge into its safetensors.",
    )


@lru_cache(maxsize=1)
def ggml() -> Ggml:
    """The library of this environment's llama-cpp-python.

    Raises:
        WeftError: ENVIRONMENT when it is not there.
    """
    try:
        import llama_cpp
    except (ImportError, OSError, RuntimeError) as error:
        raise WeftError(
            ErrorKind.ENVIRONMENT, f"llama-cpp-python cannot be imported: {error}.", "Repair the engine llama.cpp."
        ) from error
    folder = Path(str(llama_cpp.__file__)).parent / "lib"
    names = ("libggml-base.so", "libggml-base.dylib", "ggml-base.dll", "libggml-base.dll")
    found = next((folder / name for name in names if (folder / name).is_file()), None)
    if found is None:
        raise WeftError(
            ErrorKind.ENVIRONMENT, f"llama.cpp's ggml library is not in {folder}.", "Repair the engine llama.cpp."
        )
    return Ggml(ctypes.CDLL(str(found)))
