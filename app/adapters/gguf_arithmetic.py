"""The arithmetic of a merge on rows of one GGUF tensor, in numpy alone: W' = W + sum of w·D, norms from the base's W.

Sums are float32 (norms float64): the result is rounded to 16 bits or fewer in nearly all files. See adapter_arithmetic.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from app.adapters.gguf_edits import GgufEdit
from app.adapters.to_gguf import Base, read_array, reordered
from app.core.tensor_info import TensorInfo

Rows = Callable[[int, int], Any]  # float32 rows of the base's tensor: [end - start, width]
_PIECE = 1 << 20  # elements that are worked on at a time
_HELD = 1 << 25  # elements of a whole matrix that are held; of longer ones rows are read as they are needed


class _Pair(NamedTuple):
    """D = scale·left·right on rows from `first` on. gain: of DoRA, by columns; magnitude: by rows."""

    weight: float
    scale: float
    first: int
    left: Any
    right: Any
    magnitude: Any = None
    gain: Any = None


class Change:
    """What a stack does to one tensor, taken as rows of `width` numbers.

    Args:
        rows: how many there are (of all experts). base: reads rows of the base's.
        model: for the order of rows. experts: how many matrices the tensor stacks; 0 for one.
    """

    def __init__(self, edits: Sequence[GgufEdit], model: Base, rows: int, width: int, experts: int, base: Rows) -> None:
        self._model, self._rows, self._width, self._experts = model, rows, width, experts
        self._steps: list[Callable[[Any, Any, int], None]] = []
        for edit in edits:
            if edit.kind in ("pair", "dora"):
                self._steps += [_step_of(pair) for pair in self._pairs(edit, base)]
            elif edit.kind == "rows":
                self._steps.append(self._tokens(edit))
            elif edit.kind == "bias":
                self._steps.append(self._bias(edit))
            else:
                self._steps.append(self._whole(edit))

    def apply(self, base: Any, start: int) -> Any:
        """The merged rows, float32, of the base's rows from `start` on."""
        total = base.copy()
        for step in self._steps:
            step(total, base, start)
        return total

    def _ordered(self, values: Any, edit: GgufEdit) -> Any:
        """Rows in llama.cpp's order."""
        if edit.ordered or values.shape[0] == 1:
            return values
        return reordered(values, edit.role, self._model)

    # Pairs ---------------------------------------------------------------------------------------

    def _pairs(self, edit: GgufEdit, base: Rows) -> list[_Pair]:
        import numpy

        lora = edit.lora
        assert lora is not None
        a, b = read_array(lora.a), read_array(lora.b)
        if lora.transposed:
            a, b = a.T, b.T
        if lora.embedding:
            if edit.ordered:  # a GGUF adapter's A of an embedding lies transposed, its shape is told as everybody's
                a = a.reshape(lora.a.shape[::-1]).T
            pair = _Pair(edit.weight, edit.scale, 0, numpy.ascontiguousarray(a.T), numpy.ascontiguousarray(b.T))
            return [self._with_column_gain(pair, edit, base)]
        if self._experts and edit.expert < 0:
            return self._of_experts(edit, a, b)
        first = max(edit.expert, 0) * b.shape[0] + edit.first
        pair = _Pair(edit.weight, edit.scale, first, numpy.ascontiguousarray(self._ordered(b, edit)), a)
        if lora.magnitude is not None:
            magnitude = read_array(lora.magnitude).reshape(-1, 1)
            pair = pair._replace(magnitude=self._ordered(magnitude, edit).astype(numpy.float64))
        return [pair]

    def _of_experts(self, edit: GgufEdit, a: Any, b: Any) -> list[_Pair]:
        import numpy

        experts, rank = self._experts, a.shape[0] // self._experts
        a = a.reshape(experts, rank, -1)
        b = b.reshape(b.shape[0], rank, experts)
        out = self._rows // experts
        if edit.part >= 0:
            b = b[edit.part * out : (edit.part + 1) * out]
        return [
            _Pair(edit.weight, edit.scale, e * out, numpy.ascontiguousarray(b[:, :, e]), a[e]) for e in range(experts)
        ]

    def _with_column_gain(self, pair: _Pair, edit: GgufEdit, base: Rows) -> _Pair:
        import numpy

        assert edit.lora is not None
        if edit.lora.magnitude is None:
            return pair
        squares = numpy.zeros(self._width, numpy.float64)
        for start, end in pieces(self._rows, self._width):
            x = base(start, end) + (pair.left[start:end] @ pair.right) * numpy.float32(pair.scale)
            squares += numpy.square(x, dtype=numpy.float64).sum(0)
        magnitude = read_array(edit.lora.magnitude).reshape(-1).astype(numpy.float64)
        return pair._replace(gain=_gain(magnitude, numpy.sqrt(squares)).astype(numpy.float32))

    # What was trained whole ----------------------------------------------------------------------

    def _whole(self, edit: GgufEdit) -> Callable[[Any, Any, int], None]:
        import numpy

        info = edit.value
        assert info is not None
        plain = edit.ordered or edit.role not in ("attn_q", "attn_k", "attn_qkv")
        streamed = plain and not edit.turned and self._rows * self._width > _HELD
        held: Any = None
        if not streamed:
            held = read_array(info)
            held = (held.T if edit.turned else held).reshape(self._rows, self._width)
            held = self._ordered(held, edit)

        def step(total: Any, base: Any, start: int) -> None:
            end = start + base.shape[0]
            value = _rows_of(info, start, end) if streamed else held[start:end]
            _add_difference(total, base, value + numpy.float32(edit.plus), edit.weight)

        return step

    def _tokens(self, edit: GgufEdit) -> Callable[[Any, Any, int], None]:
        import numpy

        assert edit.value is not None
        values: Any = read_array(edit.value)
        indices = numpy.asarray(edit.indices)

        def step(total: Any, base: Any, start: int) -> None:
            inside = numpy.nonzero((indices >= start) & (indices < start + base.shape[0]))[0]
            for number in inside:
                row = slice(indices[number] - start, indices[number] - start + 1)
                _add_difference(total[row], base[row], values[number : number + 1], edit.weight)

        return step

    def _bias(self, edit: GgufEdit) -> Callable[[Any, Any, int], None]:
        assert edit.value is not None
        values = self._ordered(read_array(edit.value).reshape(-1, 1), edit)

        def step(total: Any, base: Any, start: int) -> None:
            low, high = _overlap(edit.first, len(values), start, base.shape[0])
            if low < high:
                at = low + start - edit.first
                total[low:high] += values[at : at + high - low] * (edit.weight * edit.scale)

        return step


def _step_of(pair: _Pair) -> Callable[[Any, Any, int], None]:
    import numpy

    def step(total: Any, base: Any, start: int) -> None:
        low, high = _overlap(pair.first, len(pair.left), start, base.shape[0])
        if low >= high:
            return
        at = low + start - pair.first
        d = pair.left[at : at + high - low] @ pair.right
        if pair.magnitude is None and pair.gain is None:
            d *= numpy.float32(pair.weight * pair.scale)
            total[low:high] += d
            return
        d *= numpy.float32(pair.scale)
        d += base[low:high]
        if pair.gain is not None:
            d *= pair.gain
        elif pair.magnitude is not None:
            norms = numpy.sqrt(numpy.square(d, dtype=numpy.float64).sum(1, keepdims=True))
            d *= _gain(pair.magnitude[at : at + high - low], norms).astype(numpy.float32)
        d -= base[low:high]
        d *= numpy.float32(pair.weight)
        total[low:high] += d

    return step


def _gain(magnitude: Any, norm: Any) -> Any:
    """m/‖x‖; nothing is changed where x is all zeros."""
    import numpy

    return numpy.divide(magnitude, norm, out=numpy.zeros_like(magnitude), where=norm > 0)


def _overlap(first: int, count: int, start: int, rows: int) -> tuple[int, int]:
    """Which of the rows `start` to `start + rows` lie in `first` to `first + count`, counted from `start`."""
    low = min(max(first - start, 0), rows)
    return low, max(low, min(first + count - start, rows))


def _add_difference(total: Any, base: Any, value: Any, weight: float) -> None:
    """total += weight·(value − base), so that alone at weight 1 it is the value, bit for bit."""
    import numpy

    wide = total.astype(numpy.float64)
    wide += weight * (value.astype(numpy.float64) - base)
    total[...] = wide


def pieces(rows: int, width: int) -> list[tuple[int, int]]:
    """Ranges of rows of about a million numbers."""
    step = max(1, _PIECE // max(1, width))
    return [(start, min(start + step, rows)) for start in range(0, rows, step)]


def _rows_of(info: TensorInfo, start: int, end: int) -> Any:
    row = info.bytes // max(1, info.shape[0])
    shape = (end - start, *info.shape[1:])
    return read_array(info._replace(shape=shape, offset=info.offset + start * row, bytes=(end - start) * row))
