"""Bases that GPTQ, AWQ or HQQ has packed: their weight files as if they had never been packed, unpacked matrix by matrix."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from app.adapters.merge_files import TORCH_NAMES, BaseFiles, StoredTensor
from app.adapters.packed_grid import damaged
from app.adapters.packed_load import Stored
from app.core.errors import ErrorKind, WeftError

_KEPT = 2  # matrices that are remembered unpacked
_SAFETENSORS = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
_TURNED = frozenset(
    {"gpt2", "openai-gpt", "imagegpt", "decision_transformer"}
)  # whose 16-bit folders hold W as (in, out)


class PackedFiles(BaseFiles):
    """The tensors of a packed folder, each matrix under the name `….weight` that it would have in 16 bits.

    Args:
        table: the config's quantization_config, {} where there is none. model_type: of the config.
        dtype: of the matrices: `float16` and so on; bfloat16 where that is unknown.

    Raises:
        WeftError: CORRUPT, UNSUPPORTED.
    """

    def __init__(self, files: Iterable[Path], table: Mapping[str, Any], model_type: str, dtype: str) -> None:
        files = list(files)
        if any(path.suffix != ".safetensors" for path in files):
            raise WeftError(
                ErrorKind.UNSUPPORTED, "Packed weights are read from safetensors only.", "Get the model as safetensors."
            )
        super().__init__(files)
        try:
            self._stored = Stored(files, table)
            self._kept: OrderedDict[str, Tensor] = OrderedDict()
            self._unpacking = threading.Lock()
            self._shapes: dict[str, tuple[int, int]] = {}
            self._original = dict(self.tensors)
            self._turned = model_type in _TURNED
            item = _SAFETENSORS.get(dtype, "BF16")
            for name in self._original:
                if not name.endswith(".bias") and self._belongs(name):
                    del self.tensors[name]
            for stem in self._stored.parts:
                self._put(stem, item)
        except BaseException:
            self.close()
            raise
        self.method = self._stored.method

    def _belongs(self, name: str) -> bool:
        """Whether a tensor is of a packed matrix. Looked up by name: mixtures have tens of thousands of each."""
        while name:
            name = name.rpartition(".")[0]
            if name in self._stored.parts:
                return True
        return False

    def _put(self, stem: str, item: str) -> None:
        parts = self._stored.parts[stem]
        first = self._original[f"{stem}.{'W_q' if 'W_q' in parts else 'qweight'}"]
        out, inputs = self._shapes[stem] = self._shape(stem)
        shape = (inputs, out) if self._turned else (out, inputs)
        size = out * inputs * getattr(torch, TORCH_NAMES[item]).itemsize
        self.tensors[f"{stem}.weight"] = StoredTensor(f"{stem}.weight", item, shape, first.file, -1, size)

    def _shape(self, stem: str) -> tuple[int, int]:
        """(out, in) of a matrix, from what lies beside it."""
        parts = self._stored.parts[stem]
        if "W_q" in parts:
            told = self._original.get(f"{stem}.shape")
            if told is None or told.shape != (2,):
                raise damaged(stem, "it does not tell its shape")
            out, inputs = (int(v) for v in self._tensor(told))
        else:
            if "scales" not in parts or "qzeros" not in parts:
                raise damaged(stem, "its scales are missing")
            packed, zeros, scales = (parts[key].shape for key in ("qweight", "qzeros", "scales"))
            if len(packed) != 2 or len(zeros) != 2 or len(scales) != 2 or not scales[1]:
                raise damaged(stem, "its tensors are no matrices")
            out = scales[1]
            bits = zeros[1] * 32 // out
            told = parts.get("g_idx")
            known = told.shape[0] if told is not None and told.shape else packed[0] * 32 // max(1, bits)
            inputs = packed[0] if self._stored.method == "awq" else known
        if not (0 < out < 2**24 and 0 < inputs < 2**24):
            raise damaged(stem, f"its shape would be {out} x {inputs}")
        return out, inputs

    def _tensor(self, stored: StoredTensor) -> Tensor:
        data = bytearray(stored.bytes)
        BaseFiles.read(self, stored, 0, memoryview(data))
        return torch.frombuffer(data, dtype=getattr(torch, TORCH_NAMES[stored.dtype])).reshape(stored.shape)

    def matrix(self, name: str) -> Tensor:
        """A matrix by the name that it has in 16 bits: float32, (out, in)."""
        stem = name.removesuffix(".weight")
        parts = {
            key: self._tensor(self._original[f"{stem}.{key}"]) for key in self._stored.parts[stem] if key != "bias"
        }
        return self._stored.grid(stem, parts, self._shapes[stem]).weight()

    def read(self, tensor: StoredTensor, start: int, into: memoryview) -> None:
        """As `BaseFiles.read`, of the unpacked matrix."""
        name = tensor.key or tensor.name
        if tensor.offset >= 0 or name.removesuffix(".weight") not in self._shapes:
            super().read(tensor, start, into)
            return
        flat = self._unpacked(name, getattr(torch, TORCH_NAMES[tensor.dtype])).reshape(-1).view(torch.uint8)
        torch.frombuffer(into, dtype=torch.uint8).copy_(flat[start : start + len(into)])

    def _unpacked(self, name: str, dtype: torch.dtype) -> Tensor:
        with self._unpacking:
            if name in self._kept:
                self._kept.move_to_end(name)
            else:
                value = self.matrix(name)
                self._kept[name] = (value.T if self._turned else value).to(dtype).contiguous()
                while len(self._kept) > _KEPT:
                    self._kept.popitem(last=False)
            return self._kept[name]
