"""A stack of adapters into a GGUF model: a new GGUF, written tensor by tensor. Needs numpy and llama.cpp's library, no torch.

Tensors that no adapter touches keep their bytes, keys keep theirs. What is changed is written in 16 bits (or in its own
float type), or quantized again.
"""

from __future__ import annotations

import contextlib
import math
import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, NamedTuple

from app.adapters.ggml import F16, F32, FLOATS, Ggml, ggml, unreadable
from app.adapters.gguf_edits import GgufBase, GgufEdit, GgufEdits, collect, open_base
from app.adapters.gguf_file_writer import Part, gone_if_it_fails, write_parts
from app.adapters.gguf_head import SPLIT, Placed, alignment_of, head_of, padded
from app.adapters.gguf_repeat import repeated_layers, with_repeated_layers
from app.adapters.merge_staging import require_space
from app.core.errors import ErrorKind, WeftError
from app.core.ggml import TYPES
from app.core.gguf_header import os_error
from app.core.stack import AdapterStack

if TYPE_CHECKING:
    from app.adapters.gguf_arithmetic import Change

# What changed tensors become: `open`: their own float type, f16 where they were quantized; `own`: what they were,
# quantized again; `q8_0`: eight bits where they were quantized.
Types = Literal["open", "own", "q8_0"]
VERSION = 1  # of what a merge's bytes depend on, beside base and stack
_Q8_0 = 8
_COPY = 8 * 1024 * 1024
_MARGIN = 16 * 1024 * 1024


class Planned(NamedTuple):
    """A tensor of the new file.

    Attributes:
        shape: innermost first. type: of the new one. bytes: that it takes.
        file, offset, old: where the base's lies and of which type; no file for one that the base lacks: zeros.
        edits: what is done to it; none for one that is copied.
    """

    name: str
    shape: tuple[int, ...]
    type: int
    bytes: int
    file: Path | None
    offset: int
    old: int
    edits: list[GgufEdit]

    @property
    def width(self) -> int:
        return self.shape[0] if len(self.shape) > 1 else 1  # a vector is rows of one number

    @property
    def rows(self) -> int:
        return math.prod(self.shape) // self.width


class MergeIntoGguf:
    """A merge that was found possible; nothing is written yet.

    Attributes:
        tensors: of the new file, in its order. bytes: that the new file takes.
        notes: sentences worth showing.

    Raises:
        WeftError: BAD_INPUT, UNSUPPORTED, CORRUPT, NOT_FOUND, ENVIRONMENT.
    """

    def __init__(self, base: Path, stack: AdapterStack, types: Types = "open") -> None:
        longer = with_repeated_layers(open_base(base), repeated_layers(stack))
        self.base: GgufBase = longer.base
        self._ggml: Ggml = ggml()
        self._types: Types = types
        edits: GgufEdits = collect(self.base, stack)
        self.notes = [*longer.notes, *edits.notes]
        self.tensors = self._plan(edits)
        first = self.base.headers[0]
        self._alignment = alignment_of(first)
        placed = [Placed(t.name, t.shape, t.type, t.bytes) for t in self.tensors]
        gone = [*(SPLIT if len(self.base.headers) > 1 else ()), *longer.keys]
        self._head = head_of(first, placed, without=gone, added=list(longer.keys.values()))
        self.bytes = len(self._head) + sum(padded(t.bytes, self._alignment) for t in self.tensors)

    # Planning ------------------------------------------------------------------------------------

    def _plan(self, edits: GgufEdits) -> list[Planned]:
        by_tensor = dict(edits.by_tensor)
        embedding = by_tensor.get("token_embd.weight", [])
        if self.base.tied and by_tensor.get("output.weight", []) == embedding:
            by_tensor.pop("output.weight", None)  # both change alike: they stay one
            embedding = []
        planned = [self._planned(name, by_tensor.get(name, [])) for name in self.base.tensors]
        new = [name for name in by_tensor if name not in self.base.tensors]
        if self.base.tied and embedding and "output.weight" not in new:
            new.append("output.weight")  # the head stays what it is: a copy of the embedding as it was
        planned += [self._added(name, by_tensor.get(name, [])) for name in new]
        if biases := [name for name in new if name.endswith(".bias")]:
            self.notes.append(_new_biases(biases))
        if self.base.tied and "output.weight" in new:
            self.notes.append(
                "The output head was the embedding's matrix; the stack parts them, so it has one of its own."
            )
        changed = [t for t in planned if t.edits and t.old not in FLOATS]
        if changed:
            self.notes.append(self._told(changed))
        if len(self.base.headers) > 1:
            self.notes.append(f"The base's {len(self.base.headers)} parts became one file.")
        return planned

    def _planned(self, name: str, edits: list[GgufEdit]) -> Planned:
        file, tensor = self.base.tensors[name]
        if not edits:
            return Planned(name, tensor.shape, tensor.type, tensor.bytes, file, tensor.offset, tensor.type, [])
        if f"{name.removesuffix('.weight')}.scale" in self.base.tensors:
            raise WeftError(
                ErrorKind.UNSUPPORTED,
                f"The model keeps a scale of its own for {name[:80]}, as models of three values a weight do.",
                "Merge into its safetensors instead.",
            )
        if not self._ggml.can_read(tensor.type):
            raise unreadable(tensor.type)
        kind = self._type(tensor.type, tensor.shape)
        return Planned(name, tensor.shape, kind, _size(tensor.shape, kind), file, tensor.offset, tensor.type, edits)

    def _added(self, name: str, edits: list[GgufEdit]) -> Planned:
        """A tensor that the base lacks: a head of its own, or a bias."""
        if name == "output.weight":
            made = self._planned("token_embd.weight", edits)
            return made._replace(name=name)
        value = edits[0].value
        owner = self.base.tensors.get(f"{name.removesuffix('.bias')}.weight")
        if not name.endswith(".bias") or owner is None or value is None:
            raise WeftError(ErrorKind.INTERNAL, f"The model has no {name[:80]}.", "Please report this.")
        rows = owner[1].shape[1]
        return Planned(name, (rows,), F32, 4 * rows, None, 0, F32, edits)

    def _type(self, old: int, shape: tuple[int, ...]) -> int:
        if old in FLOATS:
            return old
        if self._types == "own" and self._ggml.can_write(old):
            return old
        whole = shape[0] % TYPES[_Q8_0].block == 0
        return _Q8_0 if self._types != "open" and whole else F16

    def _told(self, changed: list[Planned]) -> str:
        """What became of quantized tensors that were changed."""
        kinds = {TYPES[t.type].name for t in changed}
        before, after = (sum(_size(t.shape, kind(t)) for t in changed) for kind in (lambda t: t.old, lambda t: t.type))
        start = f"{len(changed)} quantized tensors were changed"
        if all(t.type == t.old for t in changed):
            return (
                f"{start} and quantized again to their own types: what an adapter changes by less than a step of these is "
                "partly lost. A merge into the 16-bit model, exported to this type, loses less."
            )
        return (
            f"{start} and are {' and '.join(sorted(kinds))} now ({after / 1e9:.2f} GB instead of {before / 1e9:.2f} GB): "
            "what was rounded in the base stays rounded."
        )

    # Writing -------------------------------------------------------------------------------------

    def write(
        self, target: Path, progress: Callable[[int, int], None], cancelled: Callable[[], bool], made_of: str = ""
    ) -> int:
        """Write the new file. Whatever goes wrong leaves none behind; with `made_of`, a death leaves what is complete.

        Args:
            progress: told (bytes written, bytes in all).
            made_of: a fingerprint of base, stack and types: a later run with the same goes on from the last complete tensor.

        Returns:
            Bytes that an earlier run had written.

        Raises:
            WeftError: DISK_FULL before anything is written, or later; PERMISSION, CORRUPT, UNSUPPORTED, CANCELLED.
        """
        there = target.stat().st_size if made_of and target.is_file() else 0
        require_space(target.parent, self.bytes - there, "The merged GGUF file", _MARGIN)
        with gone_if_it_fails(target):
            with contextlib.ExitStack() as opened:
                pool = opened.enter_context(ThreadPoolExecutor(threads()))
                files = {header.path: opened.enter_context(_read_only(header.path)) for header in self.base.headers}
                parts = [self._part(tensor, files, pool) for tensor in self.tensors]
                _, found = write_parts(target, self._head, parts, self._alignment, made_of, progress, cancelled)
            self._check_new(target)
        return found

    def _part(self, tensor: Planned, files: Mapping[Path, BinaryIO], pool: ThreadPoolExecutor) -> Part:
        source = files.get(tensor.file) if tensor.file else None

        def write(out: BinaryIO, advance: Callable[[int], None]) -> None:
            if tensor.edits:
                self._write_changed(out, tensor, source, advance, pool)
            else:
                assert source is not None
                _copy(source, tensor, out, advance)

        return Part(tensor.bytes, write)

    def _check_new(self, target: Path) -> None:
        """Have llama.cpp load a file with biases that the base had not: only it knows whether they have a place."""
        new = [t.name for t in self.tensors if t.file is None]
        if not new:
            return
        import llama_cpp

        parameters = llama_cpp.llama_model_default_params()
        parameters.n_gpu_layers = 0
        model = llama_cpp.llama_model_load_from_file(os.fsencode(target), parameters)
        if not model:
            raise WeftError(
                ErrorKind.UNSUPPORTED,
                f"The stack trained biases ({new[0]}, {len(new)} in all) that llama.cpp has no place for in models of the "
                f"architecture {self.base.base.architecture}.",
                "Use the stack with Transformers, or train the adapter again without lora_bias.",
            )
        llama_cpp.llama_model_free(model)

    def _write_changed(
        self,
        out: BinaryIO,
        tensor: Planned,
        source: BinaryIO | None,
        advance: Callable[[int], None],
        pool: ThreadPoolExecutor,
    ) -> None:
        from app.adapters.gguf_arithmetic import Change, pieces

        experts = tensor.shape[2] if len(tensor.shape) > 2 else 0

        def rows(start: int, end: int) -> Any:
            import numpy

            if source is None:
                return numpy.zeros((end - start, tensor.width), numpy.float32)
            row = _size((tensor.width,), tensor.old)
            with reading:
                data = read_range(source, tensor.offset + start * row, (end - start) * row)
            return self._ggml.read(tensor.old, data, tensor.width)

        def made(piece: tuple[int, int]) -> Any:
            return self._ggml.write(tensor.type, change.apply(rows(*piece), piece[0]))

        reading = threading.Lock()
        change: Change = Change(tensor.edits, self.base.base, tensor.rows, tensor.width, experts, rows)
        for data in in_order(pool, made, pieces(tensor.rows, tensor.width), 2 * threads()):
            out.write(data)
            advance(len(data))


def merge_into_gguf(
    base: Path,
    stack: AdapterStack,
    target: Path,
    progress: Callable[[int, int], None],
    cancelled: Callable[[], bool],
    types: Types = "open",
) -> list[str]:
    """Write a GGUF model with a stack merged in. Returns sentences worth showing.

    Args:
        base: a GGUF model, by its first file where it is split. target: the new file, overwritten where it is there.
        progress: told (bytes written, bytes in all). types: of tensors that were changed.

    Raises:
        WeftError: BAD_INPUT, UNSUPPORTED, CORRUPT, NOT_FOUND, ENVIRONMENT, DISK_FULL before anything is written;
            PERMISSION, CORRUPT, CANCELLED, DISK_FULL while it is: then no file is left.
    """
    merge = MergeIntoGguf(base, stack, types)
    merge.write(target, progress, cancelled)
    return merge.notes


def threads(most: int = 8) -> int:
    """How many pieces are worked on at once."""
    wanted = os.environ.get("WEFT_MERGE_THREADS", "")
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 2
    return int(wanted) if wanted.isdecimal() and int(wanted) else max(1, min(most, usable))


def in_order(
    pool: ThreadPoolExecutor, work: Callable[[tuple[int, int]], Any], pieces: Iterable[tuple[int, int]], most: int
) -> Generator[Any]:
    """Results in the order of the pieces, of which at most so many are begun ahead."""
    begun: deque[Future[Any]] = deque()
    try:
        for piece in pieces:
            begun.append(pool.submit(work, piece))
            if len(begun) >= most:
                yield begun.popleft().result()
        while begun:
            yield begun.popleft().result()
    finally:
        for waiting in begun:
            waiting.cancel()


def _new_biases(names: list[str]) -> str:
    """One sentence for biases that the base lacks: an adapter may bring hundreds."""
    kinds = sorted({name.removesuffix(".bias").rpartition(".")[2] for name in names})
    what = "1 bias is" if len(names) == 1 else f"{len(names):,} biases are"
    return f"{what} new ({', '.join(kinds)}): the base has none there."


def _size(shape: tuple[int, ...], kind: int) -> int:
    return math.prod(shape) // TYPES[kind].block * TYPES[kind].bytes


@contextlib.contextmanager
def _read_only(path: Path) -> Generator[BinaryIO]:
    try:
        file = path.open("rb")
    except OSError as error:
        raise os_error(path, error) from error
    with file:
        yield file


def read_range(source: BinaryIO, start: int, count: int) -> bytes:
    """Bytes of a file. Raises WeftError CORRUPT when it has become shorter."""
    source.seek(start)
    data = source.read(count)
    if len(data) != count:
        raise WeftError(ErrorKind.CORRUPT, f"{source.name} became shorter while it was read.", "Get it again.")
    return data


def _copy(source: BinaryIO, tensor: Planned, out: BinaryIO, advance: Callable[[int], None]) -> None:
    for start in range(0, tensor.bytes, _COPY):
        data = read_range(source, tensor.offset + start, min(_COPY, tensor.bytes - start))
        out.write(data)
        advance(len(data))
