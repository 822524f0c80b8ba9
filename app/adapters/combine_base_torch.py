"""The matrices of a base that DoRA's differences are taken from, one at a time: nothing else of the model is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from app.adapters.base_torch import kind_of
from app.adapters.live_names import Names
from app.adapters.merge_files import FLOATS, TORCH_NAMES, BaseFiles, StoredTensor
from app.adapters.merge_names_torch import Block, Layout, meta_model, skeleton, through_transformers
from app.core.adapter_file import AdaptedModule, LoraTensors
from app.core.errors import ErrorKind, WeftError


class BaseMatrices:
    """A base model's matrices by the modules that adapters name. A context manager.

    Args:
        files: its weight files. config: its config.json, cleaned. stage: a folder that transformers may read the config from.

    Raises:
        WeftError: CORRUPT, HOSTILE, UNSUPPORTED, PERMISSION.
    """

    def __init__(self, files: Sequence[Path], config: Mapping[str, Any], stage: str) -> None:
        self._config, self._stage = config, stage
        self._files = BaseFiles(files)
        self._through = False  # whether transformers was asked for the names
        try:
            self._use(skeleton(self._files.tensors, str(config.get("model_type", ""))) or self._asked())
        except BaseException:
            self._files.close()
            raise

    def __enter__(self) -> BaseMatrices:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._files.close()

    def _asked(self) -> Layout:
        self._through = True
        return through_transformers(self._files.tensors, meta_model(self._stage, self._config, {}))

    def _use(self, layout: Layout) -> None:
        self._layout, self._names = layout, Names(layout.model)
        self._blocks: dict[str, list[tuple[StoredTensor, Block]]] = {}
        for name, blocks in layout.blocks.items():
            for block in blocks:
                self._blocks.setdefault(block.parameter, []).append((self._files.tensors[name], block))

    def matrix(self, module: AdaptedModule, lora: LoraTensors) -> Tensor:
        """W of what a pair adapts, as (out, in) in float32; an embedding as (width, vocabulary), as PEFT takes it.

        Raises:
            WeftError: UNSUPPORTED when the base has no such matrix, or keeps it packed.
        """
        target = self._names.find(module)
        if not target.name and not self._through:
            self._use(self._asked())
            target = self._names.find(module)
        owner = self._names.modules.get(target.name) if target.name else None
        kind = kind_of(owner) if owner is not None else ""
        parameter = f"{target.name}.weight"
        if not kind or target.expert >= 0 or parameter in self._layout.strange:
            raise self._misfit(module, "has no such matrix")
        if parameter == self._layout.head and self._layout.tied:
            parameter = self._layout.embedding
        parts = sorted(self._blocks.get(parameter, ()), key=lambda part: part[1].start)
        whole = torch.cat([self._rows(tensor, block) for tensor, block in parts]) if parts else torch.empty(0, 0)
        if kind in ("conv1d", "embedding"):
            whole = whole.T
        found = whole[target.first : target.first + lora.outputs]
        if tuple(found.shape) != (lora.outputs, lora.inputs):
            raise self._misfit(
                module, f"has {tuple(whole.shape)} there, where {(lora.outputs, lora.inputs)} is adapted"
            )
        return found.contiguous()

    def _rows(self, tensor: StoredTensor, block: Block) -> Tensor:
        if tensor.dtype not in FLOATS:
            raise WeftError(
                ErrorKind.UNSUPPORTED,
                f"The base keeps {tensor.name[:80]} as {tensor.dtype}, which no difference is taken from.",
                "Choose the model in 16 or 32 bits.",
            )
        row = tensor.width * tensor.item
        data = bytearray(block.rows * row)
        self._files.read(tensor, block.first * row, memoryview(data))
        stored = getattr(torch, TORCH_NAMES[tensor.dtype])
        return torch.frombuffer(data, dtype=stored).reshape(block.rows, tensor.width).float()

    def _misfit(self, module: AdaptedModule, why: str) -> WeftError:
        return WeftError(
            ErrorKind.UNSUPPORTED,
            f"The base does not fit: for {module.name[-80:]} it {why}.",
            "Choose the model that the DoRA was trained on.",
        )
