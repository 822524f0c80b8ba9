"""One tensor of a merged model: its pieces, computed when they are asked for."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from app.adapters.merge_edits_torch import Edit
from app.adapters.merge_files import TORCH_NAMES, BaseFiles, StoredTensor
from app.adapters.merge_math_torch import Change, Matrices, pieces
from app.adapters.merge_names_torch import Block

ELEMENTS = 512 * 1024  # of one piece: small enough for the processor's cache


class Sources(Protocol):
    """Where a tensor's bytes come from: the base's files, and the adapters' matrices."""

    @property
    def files(self) -> BaseFiles: ...
    @property
    def matrices(self) -> Matrices: ...


class MergedTensor:
    """One tensor of the merged model.

    Attributes:
        name, dtype, shape: as it is to be written; dtype as safetensors names it.
        changed: adapters change it.
        source: the base's tensor that it comes from. copied: its bytes are exactly the source's.
    """

    def __init__(
        self, merge: Sources, name: str, dtype: str, shape: tuple[int, ...], source: StoredTensor, edits: list[list[Edit]],
        blocks: list[Block], grown: Any = None,
    ) -> None:  # fmt: skip
        self._merge, self.name, self.dtype, self.shape, self.source = merge, name, dtype, shape, source
        self._edits, self._blocks, self._grown = edits, blocks, grown
        self.changed = any(edits) or grown is not None
        self.copied = not self.changed and dtype == source.dtype

    @property
    def width(self) -> int:
        return 1 if len(self.shape) < 2 else self.shape[-1]

    @property
    def bytes(self) -> int:
        """How many bytes it takes."""
        count = 1
        for extent in self.shape:
            count *= extent
        return count * getattr(torch, TORCH_NAMES[self.dtype]).itemsize if self.dtype != self.source.dtype or (
            self._grown is not None
        ) else self.source.bytes  # fmt: skip

    @property
    def row_bytes(self) -> int:
        return self.width * getattr(torch, TORCH_NAMES[self.dtype]).itemsize

    def prepared(self) -> Prepared:
        """Read what adapters bring for it. Made once, used for all pieces."""
        return Prepared(self, self._merge, self._blocks, self._edits, self._grown)

    def chunks(self) -> Iterator[memoryview]:
        """Its bytes in order, little-endian, piece by piece. A piece is valid until the next is asked for."""
        if not self.bytes:
            return
        prepared = self.prepared()
        longest = max(end - start for start, end in prepared.pieces)
        buffer = memoryview(bytearray(longest * self.row_bytes))
        for start, end in prepared.pieces:
            piece = buffer[: (end - start) * self.row_bytes]
            prepared.fill(start, end, piece)
            yield piece


class Prepared:
    """A tensor whose pieces can be computed, from several threads at once.

    Attributes:
        pieces: ranges of rows (of a matrix as wide as the last dimension) that cover it, in order.
    """

    def __init__(
        self, tensor: MergedTensor, merge: Sources, blocks: list[Block], edits: list[list[Edit]], grown: Any
    ) -> None:
        self.tensor, self._merge, self._grown = tensor, merge, grown
        self._dtype: torch.dtype = getattr(torch, TORCH_NAMES[tensor.dtype])
        self._blocks = blocks
        self._local = threading.local()
        self.pieces = [
            (block.first + start, block.first + end)
            for block in blocks
            for start, end in pieces(block.rows, tensor.width, ELEMENTS)
        ]
        self._changes: list[Change | None] = []
        for block, found in zip(blocks, edits, strict=True):
            change = None
            if found:
                rows = block.start + block.rows
                change = Change(found, merge.matrices, block.expert, rows, tensor.width, self._rows_of(block))
            self._changes.append(None if change is None or change.nothing else change)

    def _rows_of(self, block: Block) -> Callable[[int, int], Tensor]:
        def rows(start: int, end: int) -> Tensor:
            made = torch.empty(end - start, self.tensor.width, dtype=self._dtype)
            self._read(block.first - block.start + start, block.first - block.start + end, made)
            return made

        return rows

    def _read(self, start: int, end: int, into: Tensor) -> None:
        """Read rows of the base in the dtype of the result; `into` (rows, width)."""
        if self._grown is not None:
            edit, info = self._grown
            into.copy_(self._merge.matrices.rows(edit, info, start, end))
            return
        source = self.tensor.source
        row = self.tensor.width * source.item
        if source.dtype == self.tensor.dtype:
            view = memoryview(into.view(torch.uint8).reshape(-1).numpy())
            self._merge.files.read(source, start * row, view)
            return
        stored = getattr(torch, TORCH_NAMES[source.dtype])
        scratch = getattr(self._local, "scratch", None)
        if scratch is None or len(scratch) < (end - start) * row:
            scratch = self._local.scratch = bytearray((end - start) * row)
        view = memoryview(scratch)[: (end - start) * row]
        self._merge.files.read(source, start * row, view)
        into.copy_(torch.frombuffer(view, dtype=stored).reshape(into.shape))

    def fill(self, start: int, end: int, buffer: memoryview) -> None:
        """Compute the rows of one of `pieces` into a buffer of their size."""
        made = torch.frombuffer(buffer, dtype=self._dtype).reshape(end - start, self.tensor.width)
        self._read(start, end, made)
        for block, change in zip(self._blocks, self._changes, strict=True):
            low, high = max(start, block.first), min(end, block.first + block.rows)
            if change is not None and low < high:
                change.apply(made[low - start : high - start], block.start + low - block.first)
