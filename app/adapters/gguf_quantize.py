"""Quantizing a GGUF file: byte for byte what llama.cpp's own quantizer makes of it, but one that can be told to stop.

llama.cpp chooses the types (gguf_types.py) and its functions round; reading and writing are ours, so that there is progress
in bytes, a pause, a cancel, little memory, and after a kill a file to go on from.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from app.adapters import merge_gguf
from app.adapters.ggml import FLOATS, Ggml, ggml, unreadable
from app.adapters.gguf_file_writer import Part, gone_if_it_fails, write_parts
from app.adapters.gguf_head import SPLIT, Placed, alignment_of, head_of, whole_number
from app.adapters.gguf_types import chosen_types, refused
from app.adapters.merge_gguf import in_order, read_range
from app.core.errors import ErrorKind, WeftError
from app.core.export_check import needs_imatrix
from app.core.export_plan import GgufType, gguf_type
from app.core.formats import GgufHeader, read_gguf_header
from app.core.ggml import TYPES
from app.core.gguf_header import GgufTensor
from app.core.recognise_gguf import parts_of

_QUANTIZATION_VERSION = 2  # GGML_QNT_VERSION of ggml.h
# Under these, llama.cpp wants to know what matters in a matrix (but not in embedding and head).
_WEIGHED = frozenset(number for number, each in TYPES.items() if each.name in ("IQ3_XXS", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ1_M", "IQ1_S"))  # fmt: skip
_Q2_K, _Q2_K_S = 10, "q2_k_s"
_EMBEDDINGS = ("token_embd.weight", "per_layer_token_embd.weight")


class _Work(NamedTuple):
    """A tensor with what becomes of it. importances: float32, of each column, or of each expert's columns in turn."""

    file: Path
    tensor: GgufTensor
    type: int
    importances: Any


def quantize(
    source: Path,
    target: Path,
    kind: str,
    *,
    imatrix: Mapping[str, Any] | None = None,
    threads: int = 0,
    requantize: bool = False,
    progress: Callable[[int, int], None] = lambda *_: None,
    cancelled: Callable[[], bool] = lambda: False,
    made_of: str = "",
) -> int:
    """Quantize `source` into `target`. Returns the bytes that an earlier run had written.

    Args:
        imatrix: tensor name to float32 numpy array of importances, one for each column (times experts).
        threads: 0 for all. requantize: let it quantize what is quantized already.
        progress: told (bytes written, bytes in all). cancelled: asked as it goes.
        made_of: a fingerprint of source, type and matrix: what a killed run has left is gone on with. "" begins anew.

    Raises:
        WeftError: BAD_INPUT when the type needs an importance matrix and there is none; UNSUPPORTED with llama.cpp's words;
            CORRUPT; DISK_FULL, PERMISSION, CANCELLED: then no file is left.
    """
    chosen = gguf_type(kind)
    if chosen.imatrix and not imatrix:
        raise needs_imatrix(kind)
    headers = [read_gguf_header(file) for file in parts_of(source)[0]]
    types = chosen_types(source, chosen, imatrix, requantize=requantize)
    work = _planned(headers, types, chosen, imatrix, requantize=requantize)
    placed = [Placed(w.tensor.name, _shape(w.tensor), w.type, _size(w.tensor.shape, w.type)) for w in work]
    version, file_type = "general.quantization_version", "general.file_type"
    head = head_of(
        headers[0],
        placed,
        without=(*SPLIT, version, file_type),
        added=(whole_number(version, _QUANTIZATION_VERSION), whole_number(file_type, chosen.ftype)),
    )
    count = threads or merge_gguf.threads(most=64)
    with gone_if_it_fails(target), contextlib.ExitStack() as opened:
        pool = opened.enter_context(ThreadPoolExecutor(count))
        files = {header.path: opened.enter_context(header.path.open("rb")) for header in headers}
        parts = [
            Part(each.bytes, partial(_write, w, files[w.file], pool, count))
            for w, each in zip(work, placed, strict=True)
        ]
        _, found = write_parts(target, head, parts, alignment_of(headers[0]), made_of, progress, cancelled)
    return found


def _planned(
    headers: list[GgufHeader],
    types: list[tuple[str, int]],
    kind: GgufType,
    imatrix: Mapping[str, Any] | None,
    *,
    requantize: bool,
) -> list[_Work]:
    """All tensors in llama.cpp's order; what it would refuse on the way is refused now."""
    library = ggml()
    tensors = {tensor.name: (header.path, tensor) for header in headers for tensor in header.tensors}
    if sorted(tensors) != sorted(name for name, _ in types):
        raise refused(kind, "it sees other tensors in the file than its header names")
    found: list[_Work] = []
    for name, number in types:
        file, tensor = tensors[name]
        importances = _importances(imatrix, tensor, kind) if number != tensor.type and imatrix else None
        if number != tensor.type:
            if not library.can_read(tensor.type):
                raise unreadable(tensor.type)
            if tensor.type not in FLOATS and not requantize:
                raise refused(kind, f"{name[:80]} is quantized already")
            if importances is None and (_is_weighed(name, number, kind) or library.needs_importances(number)):
                raise refused(kind, f"the importance matrix lacks {name[:80]}, and it would come out as garbage")
        found.append(_Work(file, tensor, number, importances))
    return found


def _is_weighed(name: str, number: int, kind: GgufType) -> bool:
    """llama.cpp's tensor_requires_imatrix."""
    if name in (*_EMBEDDINGS, "output.weight"):
        return False
    return number in _WEIGHED or (number == _Q2_K and kind.name == _Q2_K_S)


def _importances(imatrix: Mapping[str, Any], tensor: GgufTensor, kind: GgufType) -> Any:
    """Of a tensor's columns; None where the matrix has none."""
    values = imatrix.get(tensor.name)
    if values is None:
        return None
    experts = math.prod(tensor.shape[2:3])  # 1 where there is but one matrix
    if values.size == tensor.shape[0] * experts:
        return values
    if tensor.name in _EMBEDDINGS:
        return None
    raise refused(
        kind,
        f"the importance matrix has {values.size} numbers for {tensor.name[:80]}, which has {tensor.shape[0] * experts} columns",
    )


def _write(
    work: _Work, source: BinaryIO, pool: ThreadPoolExecutor, threads: int, out: BinaryIO, advance: Callable[[int], None]
) -> None:
    """Write one tensor."""
    tensor, library = work.tensor, ggml()
    width, rows = tensor.shape[0], math.prod(tensor.shape[1:])
    row = _size((width,), tensor.type)
    together = tensor.shape[1] if len(tensor.shape) > 1 else 1  # rows that are weighed alike
    reading = threading.Lock()

    def made(piece: tuple[int, int]) -> Any:
        start, end = piece
        with reading:
            data = read_range(source, tensor.offset + start * row, (end - start) * row)
        weights = work.importances
        if weights is not None and weights.size > width:
            expert = start // together
            weights = weights[expert * width : (expert + 1) * width]
        return _rounded(library, work, data, weights)

    for data in in_order(pool, made, _pieces(rows, together, width), 2 * threads):
        out.write(data)
        advance(len(data))


def _rounded(library: Ggml, work: _Work, data: bytes, importances: Any) -> Any:
    """Some rows in their new type."""
    tensor = work.tensor
    if not library.valid(tensor.type, data):
        raise WeftError(
            ErrorKind.CORRUPT,
            f"{tensor.name[:80]} holds numbers that are none (NaN, or infinite).",
            "Check the model and the adapters: such a model cannot answer. `weft info ADAPTER` tells of an adapter's tensors.",
        )
    if work.type == tensor.type:
        return data
    made = library.quantize(work.type, library.read(tensor.type, data, tensor.shape[0]), importances)
    if not library.valid(work.type, made):
        raise WeftError(
            ErrorKind.UNSUPPORTED,
            f"{tensor.name[:80]} holds numbers that {TYPES[work.type].name} cannot.",
            "Choose another type, such as q8_0, or lower the adapters' weights.",
        )
    return made


def _pieces(rows: int, expert: int, width: int) -> Iterator[tuple[int, int]]:
    """Ranges of rows of about a million numbers, none of which belongs to two experts."""
    from app.adapters.gguf_arithmetic import pieces

    for first in range(0, rows, expert):
        for start, end in pieces(min(expert, rows - first), width):
            yield first + start, first + end


def _shape(tensor: GgufTensor) -> tuple[int, ...]:
    """Its sizes, as llama.cpp counts them: without the ones at the end."""
    shape = tensor.shape
    while len(shape) > 1 and shape[-1] == 1:
        shape = shape[:-1]
    return shape


def _size(shape: tuple[int, ...], kind: int) -> int:
    return math.prod(shape) // TYPES[kind].block * TYPES[kind].bytes
