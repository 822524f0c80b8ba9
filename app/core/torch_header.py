"""Which tensors a torch checkpoint (`.bin`, `.pt`) holds, and where their bytes lie: without torch, and without unpickling.

The pickle is read as data: its few instructions are followed on values of ours, and nothing it names is ever looked up.
Only the zip format of torch 1.6 and later is read; `pickle_scan.check` has to let the file through first.
"""

from __future__ import annotations

import pickletools
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any, NamedTuple, cast

from app.core import pickle_scan
from app.core.errors import ErrorKind, WeftError
from app.core.gguf_header import os_error
from app.core.safetensors_header import DTYPES

MAX_TENSORS = 100_000
_STORAGES = {
    "torch FloatStorage": "F32",
    "torch HalfStorage": "F16",
    "torch BFloat16Storage": "BF16",
    "torch DoubleStorage": "F64",
    "torch LongStorage": "I64",
    "torch IntStorage": "I32",
    "torch ByteStorage": "U8",
    "torch CharStorage": "I8",
    "torch BoolStorage": "BOOL",
}


class TorchTensor(NamedTuple):
    """A tensor of a checkpoint. `dtype` as safetensors names it; `offset` in the file; rows lie one after another."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    bytes: int


class _Global(NamedTuple):
    name: str


class _Storage(NamedTuple):
    dtype: str
    key: str


class _Tensor(NamedTuple):
    storage: _Storage
    first: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Mark:
    pass


_OPAQUE = object()


def read_torch_header(path: Path) -> list[TorchTensor]:
    """The tensors of a checkpoint that is a dictionary of tensors.

    Raises:
        WeftError: HOSTILE or CORRUPT as `pickle_scan.check`; UNSUPPORTED for what is no plain dictionary of tensors in
            torch's zip format.
    """
    pickle_scan.check(path)
    try:
        with path.open("rb") as file:
            if file.read(2) != b"PK":
                raise _unsupported(path, "is in the format of torch before 1.6")
            with zipfile.ZipFile(file) as archive:
                inner = next((n for n in archive.namelist() if n.rpartition("/")[2] == "data.pkl"), "data.pkl")
                prefix = inner.removesuffix("data.pkl")
                found = _follow(path, archive.read(inner))
                order = archive.read(f"{prefix}byteorder") if f"{prefix}byteorder" in archive.namelist() else b"little"
                if order.strip() != b"little":
                    raise _unsupported(path, "was written by a machine of the other byte order")
                places = {member.filename: member for member in archive.infolist()}
                return [_placed(path, file, places, prefix, name, tensor) for name, tensor in found.items()]
    except OSError as error:
        raise os_error(path, error) from error
    except (
        zipfile.BadZipFile,
        ValueError,
        struct.error,
        NotImplementedError,
        EOFError,
        RuntimeError,
        zlib.error,
    ) as error:
        raise WeftError(ErrorKind.CORRUPT, f"{path.name} is damaged: {error}.", "Download it again.") from error


def _placed(
    path: Path, file: Any, places: dict[str, zipfile.ZipInfo], prefix: str, name: str, tensor: _Tensor
) -> TorchTensor:
    member = places.get(f"{prefix}data/{tensor.storage.key}")
    if member is None or member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1:
        raise _unsupported(path, "keeps its tensors packed")
    size = DTYPES[tensor.storage.dtype] // 8
    count, expected = 1, 1
    for extent, stride in zip(reversed(tensor.shape), reversed(tensor.strides), strict=True):
        if extent > 1 and stride != expected:
            raise _unsupported(path, f"keeps {name[:80]!r} in an unusual order")
        expected *= extent
        count *= extent
    if (
        tensor.first < 0
        or any(extent < 0 for extent in tensor.shape)
        or (tensor.first + count) * size > member.file_size
    ):
        raise _beyond(path, name)
    file.seek(member.header_offset + 26)
    n, m = struct.unpack("<HH", file.read(4))
    start = member.header_offset + 30 + n + m + tensor.first * size
    if start + count * size > file.seek(0, 2):
        raise _beyond(path, name)
    return TorchTensor(name, tensor.storage.dtype, tensor.shape, start, count * size)


def _follow(path: Path, data: bytes) -> dict[str, _Tensor]:
    """The dictionary that a pickle makes, with tensors described and everything else left blank."""
    try:
        result = _Machine().run(data)
    except (IndexError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise WeftError(
            ErrorKind.CORRUPT, f"{path.name} is damaged: its pickle makes no sense.", "Get it again."
        ) from error
    if not isinstance(result, dict) or not result:
        raise _unsupported(path, "is no file of named tensors")
    found: dict[str, _Tensor] = {}
    for name, value in result.items():  # pyright: ignore[reportUnknownVariableType]
        if not isinstance(name, str) or not isinstance(value, _Tensor):
            raise _unsupported(path, "holds more than named tensors")
        found[name] = value
    if len(found) > MAX_TENSORS:
        raise _unsupported(path, f"holds more than {MAX_TENSORS:,} tensors")
    return found


class _Machine:
    """The instructions that `pickle_scan` lets through, on values that are only described."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self, data: bytes) -> Any:
        for opcode, given, _ in pickletools.genops(data):
            argument: Any = given
            name = opcode.name
            if name == "STOP":
                return self.stack.pop()
            if name in ("PROTO", "FRAME"):
                continue
            if name in ("BINPUT", "LONG_BINPUT"):
                self.memo[argument] = self.stack[-1]
            elif name in ("BINGET", "LONG_BINGET"):
                self.stack.append(self.memo[argument])
            elif name == "GLOBAL":
                self.stack.append(_Global(argument))
            elif name in _CONSTANTS:
                self.stack.append(_CONSTANTS[name])
            elif name in ("EMPTY_DICT", "EMPTY_LIST", "EMPTY_TUPLE", "EMPTY_SET"):
                self.stack.append(
                    {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple, "EMPTY_SET": list}[name]()
                )
            elif name == "MARK":
                self.stack.append(_Mark)
            elif argument is not None:
                self.stack.append(argument)  # numbers and texts
            else:
                self._combine(name)
        raise ValueError("its pickle has no end")

    def _to_mark(self) -> list[Any]:
        items: list[Any] = []
        while (item := self.stack.pop()) is not _Mark:
            items.append(item)
        return items[::-1]

    def _combine(self, name: str) -> None:
        stack = self.stack
        if name == "TUPLE":
            stack.append(tuple(self._to_mark()))
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            count = int(name[-1])
            stack[-count:] = [tuple(stack[-count:])]
        elif name == "SETITEM":
            value, key = stack.pop(), stack.pop()
            self._put(stack[-1], key, value)
        elif name == "SETITEMS":
            items = self._to_mark()
            for key, value in zip(items[::2], items[1::2], strict=True):
                self._put(stack[-1], key, value)
        elif name in ("APPENDS", "ADDITEMS"):
            items = self._to_mark()
            self._extend(stack[-1], items)
        elif name == "APPEND":
            item = stack.pop()
            self._extend(stack[-1], [item])
        elif name == "BUILD":
            stack.pop()  # attributes such as a state dict's metadata
        elif name == "BINPERSID":
            stack.append(_storage(stack.pop()))
        elif name in ("REDUCE", "NEWOBJ"):
            arguments, called = stack.pop(), stack.pop()
            stack.append(_called(called, arguments))
        else:
            raise ValueError(f"its pickle has the instruction {name}")

    @staticmethod
    def _extend(target: Any, items: list[Any]) -> None:
        if isinstance(target, list):
            cast("list[Any]", target).extend(items)

    @staticmethod
    def _put(target: Any, key: Any, value: Any) -> None:
        if isinstance(target, dict):
            target[key if isinstance(key, (str, int)) else repr(key)] = value


_CONSTANTS: dict[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}


def _storage(given: Any) -> Any:
    if isinstance(given, tuple) and len(given) >= 3 and given[0] == "storage" and isinstance(given[1], _Global):  # pyright: ignore[reportUnknownArgumentType]
        dtype = _STORAGES.get(given[1].name)
        if dtype is not None and isinstance(given[2], str):
            return _Storage(dtype, given[2])
    return _OPAQUE


def _called(called: Any, given: Any) -> Any:
    if not isinstance(called, _Global) or not isinstance(given, tuple):
        return _OPAQUE
    arguments: tuple[Any, ...] = given  # pyright: ignore[reportUnknownVariableType]
    if called.name == "collections OrderedDict":
        return {}
    if called.name in ("torch._utils _rebuild_parameter", "torch._utils _rebuild_parameter_with_state"):
        return arguments[0]
    if called.name == "torch Size":
        return tuple(arguments[0])
    if called.name in ("torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_tensor"):
        storage, first, shape, strides = arguments[:4]
        whole = (first, *shape, *strides)
        if isinstance(storage, _Storage) and all(type(n) is int for n in whole) and len(shape) == len(strides):
            return _Tensor(storage, first, tuple(shape), tuple(strides))
    return _OPAQUE


def _beyond(path: Path, name: str) -> WeftError:
    return WeftError(
        ErrorKind.CORRUPT, f"{path.name} is damaged: {name[:80]!r} reaches beyond its data.", "Download it again."
    )


def _unsupported(path: Path, what: str) -> WeftError:
    return WeftError(
        ErrorKind.UNSUPPORTED, f"{path.name} {what}, so its headers cannot be read.", "Save it as safetensors."
    )
