"""Bases that GPTQ, AWQ or HQQ has packed: their weight files as if they had never been packed, unpacked matrix by matrix."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from app.adapters.merge_unpacking_torch import STORED_AS, UnpackingFiles
from app.adapters.packed_grid import damaged
from app.adapters.packed_load import Stored
from app.core.errors import ErrorKind, WeftError

_TURNED = frozenset(
    {"gpt2", "openai-gpt", "imagegpt", "decision_transformer"}
)  # whose 16-bit folders hold W as (in, out)


class PackedFiles(UnpackingFiles):
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
            self._shapes: dict[str, tuple[int, int]] = {}
            self._original = dict(self.tensors)
            self._turned = model_type in _TURNED
            item = STORED_AS.get(dtype, "BF16")
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
        self.promise(f"{stem}.weight", item, shape, first.file)

    def _shape(self, stem: str) -> tuple[int, int]:
        """(out, in) of a matrix, from what lies beside it."""
        parts = self._stored.parts[stem]
        if "W_q" in parts:
            told = self._original.get(f"{stem}.shape")
            if told is None or told.shape != (2,):
                raise damaged(stem, "it does not tell its shape")
            out, inputs = (int(v) for v in self.stored_tensor(told))
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

    def matrix(self, name: str) -> Tensor:
        """A matrix by the name that it has in 16 bits: float32."""
        stem = name.removesuffix(".weight")
        parts = {
            key: self.stored_tensor(self._original[f"{stem}.{key}"])
            for key in self._stored.parts[stem]
            if key != "bias"
        }
        value = self._stored.grid(stem, parts, self._shapes[stem]).weight()
        return value.T if self._turned else value
