"""A base model's weight files, read piece by piece at our own offsets: nothing is ever loaded whole.

Safetensors through `pread`; pickled files through torch's restricted loader, mapped into memory, after a scan.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from app.core import pickle_scan
from app.core.errors import ErrorKind, WeftError
from app.core.gguf_header import os_error
from app.core.safetensors_header import DTYPES, read_safetensors_header

TORCH_NAMES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
    "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
}  # fmt: skip
_FROM_TORCH = {f"torch.{v}": k for k, v in TORCH_NAMES.items()}
FLOATS = frozenset({"F64", "F32", "F16", "BF16"})


class StoredTensor(NamedTuple):
    """A tensor of the base. `dtype` as safetensors names it, `shape` outermost first.

    Attributes:
        file: the weight file that holds it. offset: of its bytes there; -1 in a pickled file.
        key: its name there, where that is another (replicated layers).
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    bytes: int
    key: str = ""

    @property
    def width(self) -> int:
        """Elements of its last dimension; 1 for a single number."""
        return self.shape[-1] if self.shape else 1

    @property
    def rows(self) -> int:
        """How many such rows it has."""
        return math.prod(self.shape[:-1])

    @property
    def item(self) -> int:
        """Bytes of one element."""
        return DTYPES[self.dtype] // 8


class BaseFiles:
    """The tensors of a folder's weight files, by name, in the order in which they lie there. A context manager.

    Args:
        files: safetensors or pickled (`.bin`) files, checked to lie in the folder.

    Raises:
        WeftError: CORRUPT, HOSTILE, UNSUPPORTED, PERMISSION.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        self.tensors: dict[str, StoredTensor] = {}
        self.notes: list[str] = []
        self._files: dict[Path, int] = {}
        self._loaded: dict[str, Any] = {}  # bytes of pickled tensors, by name
        self._lock = threading.Lock()
        for path in files:
            if path.suffix == ".safetensors":
                found = read_safetensors_header(path).tensors
                self._add(StoredTensor(t.name, t.dtype, t.shape, path, t.offset, t.bytes) for t in found)
                self._open(path)
            else:
                self._add(self._unpickle(path))

    def _add(self, tensors: Iterable[StoredTensor]) -> None:
        for tensor in tensors:
            if tensor.name in self.tensors:
                raise WeftError(
                    ErrorKind.CORRUPT,
                    f"{tensor.name[:80]} stands in {tensor.file.name} and in {self.tensors[tensor.name].file.name}.",
                    "Download the model again.",
                )
            self.tensors[tensor.name] = tensor

    def _open(self, path: Path) -> None:
        try:
            self._files[path] = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0))
        except OSError as error:
            raise os_error(path, error) from error

    def _unpickle(self, path: Path) -> Iterable[StoredTensor]:
        import torch

        pickle_scan.check(path)
        try:
            try:
                loaded: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError as error:
                if "mmap" not in str(error):
                    raise
                # Files older than torch 1.6 cannot be mapped.
                loaded = torch.load(path, map_location="cpu", weights_only=True)
                self.notes.append(f"{path.name} has an old form that is read whole: it took its size in memory.")
        except (RuntimeError, ValueError, EOFError, OSError) as error:
            raise WeftError(
                ErrorKind.CORRUPT, f"{path.name} is damaged: {str(error)[:200]}", "Download the model again."
            ) from error
        if not isinstance(loaded, dict) or not all(
            isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in loaded.items()
        ):
            raise WeftError(ErrorKind.CORRUPT, f"{path.name} is no file of named tensors.", "Get the model again.")
        for name, tensor in loaded.items():
            dtype = _FROM_TORCH.get(str(tensor.dtype))
            if dtype is None:
                raise WeftError(
                    ErrorKind.UNSUPPORTED,
                    f"{path.name} holds {name[:80]} as {tensor.dtype}, which cannot be written as safetensors.",
                    "Get the model as safetensors.",
                )
            # One number counts as one row; what is no float is never calculated with.
            flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
            self._loaded[name] = flat
            yield StoredTensor(name, dtype, tuple(tensor.shape), path, -1, flat.numel())

    def read(self, tensor: StoredTensor, start: int, into: memoryview) -> None:
        """Fill `into` with a tensor's bytes from `start` on. Safe to call from several threads.

        Raises:
            WeftError: CORRUPT when the file has become shorter; PERMISSION for a read error.
        """
        if tensor.offset < 0:
            import torch

            count = len(into)
            torch.frombuffer(into, dtype=torch.uint8).copy_(
                self._loaded[tensor.key or tensor.name][start : start + count]
            )
            return
        done, offset = 0, tensor.offset + start
        try:
            while done < len(into):
                got = self._pread(self._files[tensor.file], into[done:], offset + done)
                if got == 0:
                    raise WeftError(
                        ErrorKind.CORRUPT,
                        f"{tensor.file.name} became shorter while it was read.",
                        "Download or copy it again.",
                    )
                done += got
        except OSError as error:
            raise os_error(tensor.file, error) from error

    def _pread(self, descriptor: int, into: memoryview, offset: int) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(descriptor, [into], offset)
        with self._lock:  # no positional read on Windows
            os.lseek(descriptor, offset, os.SEEK_SET)
            data = os.read(descriptor, len(into))
        into[: len(data)] = data
        return len(data)

    def fd(self, tensor: StoredTensor) -> int:
        """The open file of a tensor for the kernel to copy from; -1 where there are only bytes in memory."""
        return self._files[tensor.file] if tensor.offset >= 0 else -1

    def close(self) -> None:
        """Close all files."""
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()
        self._loaded.clear()

    def __enter__(self) -> BaseFiles:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
