"""The arithmetic of a merge on some rows of one tensor, in the order that gives PEFT's bits.

Where PEFT's `merge_and_unload` follows the definition of a stack (LoRA and rsLoRA, one DoRA, one whole matrix, one
set of trained tokens) its order of roundings is kept. All other stacks are summed in float64 and rounded once.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from app.adapters.merge_edits_torch import Edit
from app.adapters.tensors_torch import OpenAdapter
from app.core.tensor_info import TensorInfo

STEP = 16  # rows: a matrix product's last bits depend on how short its tail is, so pieces are multiples of this
_HELD = 4 * 1024 * 1024  # elements of an adapter's matrix that are held; longer ones are read piece by piece
_KEPT = 4  # matrices of experts that are remembered between tensors
_PANEL = 2 * 1024 * 1024  # elements of a column panel

Rows = Callable[[int, int], Tensor]  # rows of the base's tensor, in the dtype of the result


def pieces(rows: int, width: int, elements: int) -> list[tuple[int, int]]:
    """Ranges of rows of about so many elements, multiples of STEP; a short tail joins the piece before it."""
    step = max(STEP, elements // max(1, width) // STEP * STEP)
    starts = list(range(0, rows, step))
    if len(starts) > 1 and rows - starts[-1] < STEP:
        starts.pop()
    return [(start, end) for start, end in zip(starts, [*starts[1:], rows], strict=True)]


class Matrices:
    """Reads adapters' matrices, float32, and remembers the last ones: experts share theirs."""

    def __init__(self, adapters: Sequence[OpenAdapter]) -> None:
        self._adapters = adapters
        self._kept: OrderedDict[tuple[int, str], Tensor] = OrderedDict()
        self._lock = threading.Lock()
        self._local = threading.local()

    def scratch(self, name: str, shape: torch.Size) -> Tensor:
        """Memory of this thread, float32: fresh pages for each piece would cost more than the arithmetic."""
        held: Any = getattr(self._local, name, None)
        if held is None or held.numel() < shape.numel():
            held = torch.empty(shape.numel(), dtype=torch.float32)
            setattr(self._local, name, held)
        return held[: shape.numel()].view(shape)

    def whole(self, edit: Edit, info: TensorInfo) -> Tensor:
        key = (edit.adapter, info.name)
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        value = self._adapters[edit.adapter].read(info)
        if (edit.experts or edit.kind == "rows") and value.numel() <= 8 * _HELD:
            with self._lock:
                self._kept[key] = value
                while len(self._kept) > _KEPT:
                    self._kept.popitem(last=False)
        return value

    def read(self, edit: Edit, info: TensorInfo) -> Tensor:
        """A matrix, not remembered."""
        return self._adapters[edit.adapter].read(info)

    def rows(self, edit: Edit, info: TensorInfo, start: int, end: int) -> Tensor:
        """Some rows of a matrix (or numbers of a vector), without reading the others where the file allows it."""
        read = self._adapters[edit.adapter].read
        if info.file.suffix != ".safetensors":
            return read(info)[start:end]
        row = info.bytes // max(1, info.shape[0])
        shape = (end - start, *info.shape[1:])
        return read(info._replace(shape=shape, offset=info.offset + start * row, bytes=(end - start) * row))

    def columns(self, edit: Edit, info: TensorInfo, start: int, end: int) -> Tensor:
        """Some columns of a matrix."""
        read = self._adapters[edit.adapter].read
        if info.file.suffix != ".safetensors":
            return read(info)[:, start:end]
        row, item = info.bytes // info.shape[0], info.bytes // (info.shape[0] * info.shape[1])
        made = torch.empty(info.shape[0], end - start)
        for i in range(info.shape[0]):
            offset = info.offset + i * row + start * item
            made[i] = read(info._replace(shape=(end - start,), offset=offset, bytes=(end - start) * item))
        return made


class Pair:
    """B and A of one edit for one expert, read once for all pieces of a tensor, or piece by piece where they are long."""

    def __init__(self, edit: Edit, matrices: Matrices, expert: int) -> None:
        assert edit.a is not None and edit.b is not None
        self.edit, self._matrices = edit, matrices
        self._a: Tensor | None = None
        self._b: Tensor | None = None
        if edit.swapped:
            self._a, self._b = matrices.whole(edit, edit.a).T.contiguous(), matrices.whole(edit, edit.b).T.contiguous()
        elif edit.experts:
            rank = edit.a.shape[0] // edit.experts
            self._a = matrices.rows(edit, edit.a, expert * rank, (expert + 1) * rank)
            b = matrices.whole(edit, edit.b)
            self._b = b.reshape(b.shape[0], rank, edit.experts)[:, :, expert].contiguous()
        else:
            long_a = edit.transposed and edit.a.shape[0] * edit.a.shape[1] > _HELD
            long_b = not edit.transposed and edit.b.shape[0] * edit.b.shape[1] > _HELD
            self._a = None if long_a else matrices.whole(edit, edit.a)
            self._b = None if long_b else matrices.whole(edit, edit.b)
        b_shape = edit.b.shape[::-1] if edit.swapped else edit.b.shape
        self.outputs = b_shape[0]

    def a(self, start: int = 0, end: int | None = None) -> Tensor:
        """A, or the columns of it from `start` to `end`."""
        if self._a is not None:
            return self._a if end is None else self._a[:, start:end]
        assert self.edit.a is not None
        return self._matrices.columns(self.edit, self.edit.a, start, self.edit.a.shape[1] if end is None else end)

    def b(self, start: int = 0, end: int | None = None) -> Tensor:
        """B, or the rows of it from `start` to `end`."""
        if self._b is not None:
            return self._b if end is None else self._b[start:end]
        assert self.edit.b is not None
        return self._matrices.rows(self.edit, self.edit.b, start, self.outputs if end is None else end)

    def span(self, start: int, end: int) -> tuple[int, int]:
        """Which rows of a piece from row `start` to `end` of the parameter it changes, counted from the piece's first."""
        if self.edit.transposed:
            return 0, end - start
        low = max(start, self.edit.first)
        return low - start, max(low, min(end, self.edit.first + self.outputs)) - start

    def product(self, start: int, end: int, dtype: torch.dtype) -> Tensor:
        """B·A for rows `start` to `end` of the parameter (all of which it changes), without s."""
        if self.edit.transposed:
            return (self.b().to(dtype) @ self.a(start, end).to(dtype)).T
        first = self.edit.first
        return self.b(start - first, end - first).to(dtype) @ self.a().to(dtype)


class Change:
    """What a stack does to one parameter (to one expert of it). Made once for a tensor, applied to its pieces.

    Args:
        edits: those of this parameter, in the order of the stack.
        rows, width: of the parameter, as it lies in memory. base: reads its rows.
    """

    def __init__(
        self, edits: Sequence[Edit], matrices: Matrices, expert: int, rows: int, width: int, base: Rows | None
    ) -> None:
        self._edits = [e for e in edits if e.expert in (-1, expert)]
        self._matrices, self._rows, self._width, self._expert = matrices, rows, width, expert
        self._pairs = {i: Pair(e, matrices, expert) for i, e in enumerate(self._edits) if e.a is not None}
        self.exact = is_exact(self._edits)
        self._gains: dict[int, Tensor] = {}
        for i, edit in enumerate(self._edits):
            if edit.kind == "dora" and edit.transposed:
                assert base is not None
                self._gains[i] = self._gain_of_columns(i, edit, base)

    @property
    def nothing(self) -> bool:
        """Whether no edit concerns this expert."""
        return not self._edits

    def apply(self, w: Tensor, start: int) -> None:
        """Change rows in place.

        Args:
            w: (rows, width), the parameter's rows from `start` on.
        """
        if self.exact:
            for i, edit in enumerate(self._edits):
                self._as_peft(i, edit, w, start)
        else:
            self._by_definition(w, start)

    # As PEFT does it ----------------------------------------------------------------------------

    def _as_peft(self, i: int, edit: Edit, w: Tensor, start: int) -> None:
        end = start + w.shape[0]
        if edit.kind == "whole":
            assert edit.value is not None
            w.copy_(self._value(edit, start, end))
        elif edit.kind == "rows":
            inside, where = self._inside(edit, start, end)
            if len(inside):
                assert edit.value is not None
                w[where] = self._matrices.whole(edit, edit.value)[inside].to(w.dtype)
        elif edit.kind == "bias":
            low, high, values = self._bias(edit, start, end)
            w[low:high] += values[:, None] * edit.exact
        else:
            pair = self._pairs[i]
            low, high = pair.span(start, end)
            if low == high:
                return
            part = w[low:high]
            d = self._d(pair, start + low, start + high, part).mul_(edit.exact)
            if edit.kind == "dora":
                self._dora(i, edit, part, d, start + low)
            elif edit.cast:
                part.add_(d.to(w.dtype))
            elif w.dtype == torch.float32:
                part.add_(d)
            else:
                # The same as part.add_(d), which rounds once too, and takes longer.
                x = self._matrices.scratch("x", part.shape)
                x.copy_(part)
                part.copy_(x.add_(d))

    def _d(self, pair: Pair, start: int, end: int, part: Tensor) -> Tensor:
        """B·A of some rows, in memory that is used again for the next."""
        if pair.edit.transposed:
            return pair.product(start, end, torch.float32)
        first = pair.edit.first
        out = self._matrices.scratch("d", part.shape)
        return torch.mm(pair.b(start - first, end - first), pair.a(), out=out)

    def _dora(self, i: int, edit: Edit, part: Tensor, d: Tensor, start: int) -> None:
        x = part + d
        if edit.transposed:
            part.copy_(self._gains[i][None, :] * x)
            return
        assert edit.magnitude is not None
        first = start - edit.first
        m = self._matrices.rows(edit, _flat(edit.magnitude), first, first + part.shape[0])
        part.copy_(_gain(m, torch.linalg.norm(x, dim=1))[:, None] * x)

    def _gain_of_columns(self, i: int, edit: Edit, base: Rows) -> Tensor:
        """m/‖W + D‖ where W lies transposed: norms go over all rows, so a panel of columns is taken at a time."""
        assert edit.magnitude is not None
        magnitude = self._matrices.whole(edit, edit.magnitude).reshape(-1)
        if not self.exact:
            return _gain(magnitude.double(), self._norms_by_definition(i, edit, base))
        found = []
        pair = self._pairs[i]
        reading = pieces(self._rows, self._width, _PANEL // 4)
        for start, end in pieces(self._width, self._rows, _PANEL):
            # Column panels keep the order of memory that PEFT's transposed view has: its bits depend on it.
            x = torch.empty(self._rows, end - start)
            for low, high in reading:
                x[low:high] = base(low, high)[:, start:end]
                d = pair.b(start, end) @ pair.a(low, high) if len(reading) > 1 else pair.b(start, end) @ pair.a()
                x[low:high] += d.mul_(edit.exact).T
            found.append(torch.linalg.norm(x.T, dim=1))
        return _gain(magnitude, torch.cat(found))

    # By definition ------------------------------------------------------------------------------

    def _norms_by_definition(self, i: int, edit: Edit, base: Rows) -> Tensor:
        total = torch.zeros(self._width, dtype=torch.float64)
        for start, end in pieces(self._rows, self._width, _PANEL // 4):
            d = self._pairs[i].product(start, end, torch.float64) * edit.scale
            total += (base(start, end).double() + d).square().sum(0)
        return total.sqrt()

    def _by_definition(self, w: Tensor, start: int) -> None:
        end = start + w.shape[0]
        base = w.double()
        total = base.clone()
        for i, edit in enumerate(self._edits):
            if edit.kind == "whole":
                total += edit.weight * (self._value(edit, start, end).double() - base)
            elif edit.kind == "rows":
                inside, where = self._inside(edit, start, end)
                assert edit.value is not None
                rows = self._matrices.whole(edit, edit.value)[inside].double()
                total[where] += edit.weight * (rows - base[where])
            elif edit.kind == "bias":
                low, high, values = self._bias(edit, start, end)
                total[low:high] += values[:, None].double() * (edit.weight * edit.scale)
            else:
                self._pair_by_definition(i, edit, base, total, start, end)
        w.copy_(total)

    def _pair_by_definition(self, i: int, edit: Edit, base: Tensor, total: Tensor, start: int, end: int) -> None:
        pair = self._pairs[i]
        low, high = pair.span(start, end)
        if low == high:
            return
        d = pair.product(start + low, start + high, torch.float64) * edit.scale
        if edit.kind != "dora":
            total[low:high] += edit.weight * d
            return
        x = base[low:high] + d
        if edit.transposed:
            gain = self._gains[i][None, :]
        else:
            assert edit.magnitude is not None
            first = start + low - edit.first
            m = self._matrices.rows(edit, _flat(edit.magnitude), first, first + high - low).double()
            gain = _gain(m, x.square().sum(1).sqrt())[:, None]
        total[low:high] += edit.weight * (gain * x - base[low:high])

    # Values that an adapter brings whole --------------------------------------------------------

    def _value(self, edit: Edit, start: int, end: int) -> Tensor:
        assert edit.value is not None
        info = edit.value
        if len(info.shape) == 3:
            offset = max(0, self._expert) * info.shape[1]
            info = info._replace(shape=(info.shape[0] * info.shape[1], info.shape[2]))
            return self._matrices.rows(edit, info, offset + start, offset + end)
        return self._matrices.rows(edit, info, start, end).reshape(end - start, -1)

    def _inside(self, edit: Edit, start: int, end: int) -> tuple[Tensor, Tensor]:
        """Which of the trained rows lie in a piece: their numbers among those trained, and in the piece."""
        indices = torch.tensor(edit.indices)
        inside = torch.nonzero((indices >= start) & (indices < end)).reshape(-1)
        return inside, indices[inside] - start

    def _bias(self, edit: Edit, start: int, end: int) -> tuple[int, int, Tensor]:
        assert edit.value is not None
        info = _flat(edit.value)
        low = max(start, edit.first)
        high = max(low, min(end, edit.first + info.shape[0]))
        return low - start, high - start, self._matrices.rows(edit, info, low - edit.first, high - edit.first)


def is_exact(edits: Sequence[Edit]) -> bool:
    """Whether PEFT's merge of these edits of one parameter is what a stack means, so that its bits are kept."""
    kinds = {edit.kind for edit in edits}
    if kinds <= {"pair"} or kinds == {"bias"}:
        return True
    return len(edits) == 1 and edits[0].weight == 1


def _gain(magnitude: Tensor, norm: Tensor) -> Tensor:
    # A row of zeros has no direction: it stays what it is.
    return torch.where(norm > 0, magnitude / norm, 1.0)


def _flat(info: TensorInfo) -> TensorInfo:
    return info._replace(shape=(math.prod(info.shape),))
