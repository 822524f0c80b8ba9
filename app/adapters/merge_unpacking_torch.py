"""Weight files that some program has packed, read as if it never had: each matrix is unpacked when it is asked for."""

from __future__ import annotations

import abc
import math
import threading
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from app.adapters.merge_files import TORCH_NAMES, BaseFiles, StoredTensor

STORED_AS = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}  # what unpacked matrices may be; in safetensors
_KEPT = 2  # matrices that are remembered unpacked


class UnpackingFiles(BaseFiles, abc.ABC):
    """A packed folder's files. Who derives from it tells each packed matrix by `promise` and makes it in `matrix`.

    Args:
        files: as of BaseFiles.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        super().__init__(files)
        self._promised: set[str] = set()
        self._kept: OrderedDict[str, Tensor] = OrderedDict()
        self._unpacking = threading.Lock()

    @abc.abstractmethod
    def matrix(self, name: str) -> Tensor:
        """A packed matrix of the shape that was promised, of any float dtype. Called by one thread at a time.

        Raises:
            WeftError: CORRUPT, UNSUPPORTED.
        """

    def promise(self, name: str, dtype: str, shape: tuple[int, ...], file: Path) -> None:
        """Put a packed matrix among `tensors` as what it will be unpacked: `dtype` as safetensors names it."""
        size = math.prod(shape) * getattr(torch, TORCH_NAMES[dtype]).itemsize
        self.tensors[name] = StoredTensor(name, dtype, shape, file, -1, size)
        self._promised.add(name)

    def stored_bytes(self, tensor: StoredTensor) -> bytearray:
        """All bytes of a tensor as it lies in its file."""
        data = bytearray(tensor.bytes)
        BaseFiles.read(self, tensor, 0, memoryview(data))
        return data

    def stored_tensor(self, tensor: StoredTensor) -> Tensor:
        """A tensor as it lies in its file."""
        dtype = getattr(torch, TORCH_NAMES[tensor.dtype])
        return torch.frombuffer(self.stored_bytes(tensor), dtype=dtype).reshape(tensor.shape)

    def read(self, tensor: StoredTensor, start: int, into: memoryview) -> None:
        """As `BaseFiles.read`, of the unpacked matrix."""
        name = tensor.key or tensor.name
        if tensor.offset >= 0 or name not in self._promised:
            super().read(tensor, start, into)
            return
        flat = self._unpacked(name, getattr(torch, TORCH_NAMES[tensor.dtype])).reshape(-1).view(torch.uint8)
        torch.frombuffer(into, dtype=torch.uint8).copy_(flat[start : start + len(into)])

    def _unpacked(self, name: str, dtype: torch.dtype) -> Tensor:
        with self._unpacking:
            if name in self._kept:
                self._kept.move_to_end(name)
            else:
                self._kept[name] = self.matrix(name).to(dtype).contiguous()
                while len(self._kept) > _KEPT:
                    self._kept.popitem(last=False)
            return self._kept[name]
