"""Importance matrices: mean squares of what each matrix of a model is multiplied with, over a text.

What llama.cpp's `imatrix` tool measures (tools/imatrix/imatrix.cpp), through the same callback of its scheduler; used for
quantizing at once, so no file is written.
"""

from __future__ import annotations

import ctypes
import hashlib
import io
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from app.adapters.merge_staging import write_atomically
from app.core.errors import ErrorKind, WeftError

CHUNK = 512  # tokens that are read together, as llama.cpp's tool does by default
_F32, _I32 = 0, 26  # enum ggml_type
_BESIDE = 8  # tokens that two tokenizers may differ by: those at the begin and the end
_SURELY_ENOUGH = 65536  # bytes of which no tokenizer makes fewer tokens than a chunk has
_LEAST = 16  # rows of a product that count; smaller ones are of single tokens


class _Tensor(ctypes.Structure):
    """struct ggml_tensor of ggml.h, as far as its name; the layout is checked before it is used."""


_Tensor._fields_ = [
    ("type", ctypes.c_int),
    ("buffer", ctypes.c_void_p),
    ("ne", ctypes.c_int64 * 4),
    ("nb", ctypes.c_size_t * 4),
    ("op", ctypes.c_int),
    ("op_params", ctypes.c_int32 * 16),
    ("flags", ctypes.c_int32),
    ("src", ctypes.POINTER(_Tensor) * 10),
    ("view_src", ctypes.c_void_p),
    ("view_offs", ctypes.c_size_t),
    ("data", ctypes.c_void_p),
    ("name", ctypes.c_char * 64),
]


class _Ggml:
    """The functions of libggml-base that are needed; llama_cpp has loaded it already."""

    def __init__(self, llama_cpp: Any) -> None:
        folder = Path(llama_cpp.__file__).parent / "lib"
        found = [*folder.glob("libggml-base.so"), *folder.glob("libggml-base.dylib"), *folder.glob("ggml-base.dll")]
        if not found:
            raise WeftError(
                ErrorKind.ENVIRONMENT, "llama.cpp's ggml library was not found.", "Repair the engine `GGUF export`."
            )
        library = ctypes.CDLL(str(found[0]))
        self.nbytes: Any = library.ggml_nbytes
        self.nbytes.argtypes, self.nbytes.restype = [ctypes.c_void_p], ctypes.c_size_t
        self.get: Any = library.ggml_backend_tensor_get
        self.get.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t]
        self.get.restype = None
        name: Any = library.ggml_op_name
        name.argtypes, name.restype = [ctypes.c_int], ctypes.c_char_p
        self.operations = {name(number).decode(): number for number in range(48)}


class Collector:
    """Sums of squares by the name of the matrix, and how many rows they are of."""

    def __init__(self, llama_cpp: Any) -> None:
        self._ggml = _Ggml(llama_cpp)
        self._product = self._ggml.operations["MUL_MAT"]
        self._chosen = self._ggml.operations["MUL_MAT_ID"]
        self.sums: dict[str, Any] = {}
        self.counts: dict[str, Any] = {}
        self.error: BaseException | None = None
        self.callback = llama_cpp.llama_cpp.ggml_backend_sched_eval_callback(self._hear)

    def _hear(self, address: Any, asks: bool, _data: Any) -> bool:
        # Called from C for every operation: what is raised here would vanish.
        try:
            tensor = ctypes.cast(address, ctypes.POINTER(_Tensor)).contents
            if asks:
                return self._wants(tensor)
            self._take(tensor)
            return True
        except BaseException as error:  # noqa: BLE001  (told after the computation)
            self.error = self.error or error
            return False

    def _wants(self, tensor: _Tensor) -> bool:
        if tensor.op == self._chosen:
            return True
        if tensor.op != self._product:
            return False
        given = tensor.src[1].contents
        return given.type == _F32 and given.ne[1] >= _LEAST and _name(tensor.src[0].contents).startswith("blk.")

    def _take(self, tensor: _Tensor) -> None:
        matrix, given = tensor.src[0].contents, tensor.src[1].contents
        name, width = _name(matrix), given.ne[0]
        x = self._array(given, np.float32)  # (ne3, ne2, ne1, ne0)
        if tensor.op == self._chosen:
            self._take_experts(name, matrix, x, self._array(tensor.src[2].contents, np.int32)[0, 0])
            return
        squares = np.square(x, dtype=np.float32).sum(axis=2)  # (ne3, ne2, ne0)
        matrices = matrix.ne[2] * matrix.ne[3]
        total = self.sums.setdefault(name, np.zeros((matrices, width), np.float64))
        for i3 in range(x.shape[0]):
            for i2 in range(x.shape[1]):
                total[(i3 % matrix.ne[3]) * matrix.ne[2] + i2 % matrix.ne[2]] += squares[i3, i2]
        rows = x.shape[0] * x.shape[1] * x.shape[2] // matrices
        self.counts.setdefault(name, np.zeros(matrices, np.int64))[:] += rows

    def _take_experts(self, name: str, matrix: _Tensor, x: Any, ids: Any) -> None:
        """`x` (1, tokens, 1 or chosen, width); `ids` (tokens, chosen): which experts each token goes to."""
        experts = matrix.ne[2]
        total = self.sums.setdefault(name, np.zeros((experts, x.shape[-1]), np.float64))
        counts = self.counts.setdefault(name, np.zeros(experts, np.int64))
        squares = np.square(x[0], dtype=np.float32)
        for place in range(ids.shape[1]):
            np.add.at(total, ids[:, place], squares[:, place % squares.shape[1]])
            np.add.at(counts, ids[:, place], 1)

    def _array(self, tensor: _Tensor, kind: Any) -> Any:
        """A tensor's values, from wherever they are, as an array of four dimensions, outermost first."""
        address = ctypes.addressof(tensor)
        data = np.empty(self._ggml.nbytes(address), np.uint8)
        self._ggml.get(address, data.ctypes.data, 0, data.size)
        return np.lib.stride_tricks.as_strided(
            data.view(kind) if data.size % 4 == 0 else data[: data.size // 4 * 4].view(kind),
            shape=tuple(reversed(tensor.ne)),
            strides=tuple(reversed(tensor.nb)),
        )

    def matrix(self) -> dict[str, Any]:
        """Name to float32 means of squares, one after the other for experts; 1 for an expert that no token went to."""
        found: dict[str, Any] = {}
        for name, total in self.sums.items():
            counts = self.counts[name][:, None]
            means = np.where(counts > 0, total / np.maximum(counts, 1), 1.0)
            found[name] = np.ascontiguousarray(means.reshape(-1), dtype=np.float32)
        return found


def _name(tensor: _Tensor) -> str:
    # The scheduler prefixes copies of weights with their device: `CUDA0#blk.0.attn_q.weight#0`.
    text = tensor.name.decode("utf-8", "replace")
    return text.split("#")[1] if text.count("#") >= 2 else text


def measure(
    model: Path,
    text: str,
    chunks: int,
    *,
    threads: int,
    gpu_layers: int = 0,
    progress: Callable[[int, int], None] = lambda *_: None,
    cancelled: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Measure the importance matrix of a GGUF model over a text.

    Args:
        chunks: how many pieces of 512 tokens at most; 0 for all of the text.

    Raises:
        WeftError: BAD_INPUT when the text is too short; CORRUPT when the model cannot be loaded or computes no numbers; CANCELLED.
    """
    import llama_cpp

    collector = Collector(llama_cpp)
    llama_cpp.llama_backend_init()
    parameters = llama_cpp.llama_model_default_params()
    parameters.n_gpu_layers = gpu_layers
    loaded = llama_cpp.llama_model_load_from_file(os.fsencode(model), parameters)
    if not loaded:
        raise WeftError(
            ErrorKind.CORRUPT, f"llama.cpp could not load {model.name}.", "Export without an importance matrix."
        )
    try:
        vocabulary = llama_cpp.llama_model_get_vocab(loaded)
        tokens = _tokens(llama_cpp, vocabulary, text)
        pieces = [tokens[i : i + CHUNK] for i in range(0, len(tokens) - CHUNK + 1, CHUNK)]
        pieces = pieces[:chunks] if chunks else pieces
        if not pieces:
            raise _too_short(len(tokens))
        _read(llama_cpp, loaded, collector, pieces, threads, progress, cancelled)
    finally:
        llama_cpp.llama_model_free(loaded)
    found = collector.matrix()
    if not all(np.isfinite(values).all() for values in found.values()):
        raise WeftError(
            ErrorKind.CORRUPT, "The model computes values that are no numbers.", "Check the model and its adapters."
        )
    return found


def require_enough(model: Path, text: str) -> None:
    """Refuse a text that is too short, before a model is converted for it: by the model's own tokenizer.

    Args:
        model: a GGUF file, or a staged folder (see `hf_files.Stage`).

    Raises:
        WeftError: BAD_INPUT.
    """
    size = len(text.encode())
    if size > _SURELY_ENOUGH:
        return
    if size + _BESIDE < CHUNK:  # no token is shorter than a byte
        raise _too_short(size, at_most=True)
    count = _count_gguf(model, text) if model.is_file() else _count_folder(model, text)
    if count is not None and count + _BESIDE < CHUNK:
        raise _too_short(count)


def _too_short(tokens: int, *, at_most: bool = False) -> WeftError:
    return WeftError(
        ErrorKind.BAD_INPUT,
        f"The text for the importance matrix has {'at most ' if at_most else ''}{tokens} tokens; at least {CHUNK} are needed.",
        "Give a longer text: some hundred kilobytes like what the model will read.",
    )


def _count_folder(folder: Path, text: str) -> int | None:
    """Tokens of a text; None where transformers has no such tokenizer: the converter says so, and measuring counts."""
    import transformers

    try:
        return len(
            transformers.AutoTokenizer.from_pretrained(str(folder), local_files_only=True)(text, verbose=False)[
                "input_ids"
            ]
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError):
        return None


def _count_gguf(model: Path, text: str) -> int | None:
    """The same, by the file's own vocabulary."""
    import llama_cpp

    llama_cpp.llama_backend_init()
    parameters = llama_cpp.llama_model_default_params()
    parameters.vocab_only = True
    loaded = llama_cpp.llama_model_load_from_file(os.fsencode(model), parameters)
    if not loaded:
        return None
    try:
        return len(_tokens(llama_cpp, llama_cpp.llama_model_get_vocab(loaded), text))
    finally:
        llama_cpp.llama_model_free(loaded)


def kept(file: Path, measured: Callable[[], dict[str, Any]]) -> tuple[dict[str, Any], str]:
    """A matrix that an earlier run has left in a file, else one that is measured and put there; and a hash of it."""
    try:
        data = file.read_bytes()
        with np.load(io.BytesIO(data), allow_pickle=False) as stored:
            return dict(stored), hashlib.sha256(data).hexdigest()
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):
        found = measured()
    out = io.BytesIO()
    np.savez(out, **found)
    write_atomically(file, out.getvalue())
    return found, hashlib.sha256(out.getvalue()).hexdigest()


def _tokens(llama_cpp: Any, vocabulary: Any, text: str) -> list[int]:
    data = text.encode()
    buffer = (llama_cpp.llama_token * (len(data) + 8))()
    count = llama_cpp.llama_tokenize(vocabulary, data, len(data), buffer, len(buffer), True, False)
    return list(buffer[: max(count, 0)])


def _read(
    llama_cpp: Any,
    loaded: Any,
    collector: Collector,
    pieces: list[list[int]],
    threads: int,
    progress: Callable[[int, int], None],
    cancelled: Callable[[], bool],
) -> None:
    parameters = llama_cpp.llama_context_default_params()
    parameters.n_ctx = parameters.n_batch = parameters.n_ubatch = CHUNK
    parameters.n_threads = parameters.n_threads_batch = threads
    parameters.cb_eval = collector.callback
    context = llama_cpp.llama_init_from_model(loaded, parameters)
    if not context:
        raise WeftError(
            ErrorKind.OUT_OF_MEMORY, "There is not enough memory to read the text.", "Close other programs."
        )
    batch = llama_cpp.llama_batch_init(CHUNK, 0, 1)
    try:
        first = llama_cpp.llama_vocab_bos(llama_cpp.llama_model_get_vocab(loaded))
        adds = llama_cpp.llama_vocab_get_add_bos(llama_cpp.llama_model_get_vocab(loaded))
        for done, piece in enumerate(pieces):
            if cancelled():
                raise WeftError(ErrorKind.CANCELLED, "Cancelled.")
            progress(done, len(pieces))
            given = [first, *piece[1:]] if adds else piece
            llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
            status = llama_cpp.llama_decode(context, _filled(batch, given))
            if collector.error is not None:
                raise collector.error
            if status != 0:
                raise WeftError(
                    ErrorKind.CORRUPT, f"llama.cpp could not read the text (status {status}).", "Try another text."
                )
    finally:
        llama_cpp.llama_batch_free(batch)
        llama_cpp.llama_free(context)


def _filled(batch: Any, tokens: list[int]) -> Any:
    # Outputs are asked for everywhere: the last layer is not computed for a place without one.
    batch.n_tokens = len(tokens)
    for place, token in enumerate(tokens):
        batch.token[place], batch.pos[place] = token, place
        batch.n_seq_id[place], batch.seq_id[place][0], batch.logits[place] = 1, 0, True
    return batch
