"""A GGUF model in llama.cpp: loading with progress and cancel, its vocabulary, and errors in words."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from app.core.errors import ErrorKind, WeftError
from app.core.library import ModelShape
from app.generation.llama_log import LibraryLog
from app.generation.llama_option_text import Override, overrides, tensor_split
from app.generation.llama_options import Options

_PART = re.compile(r"^(.*)-(\d{5})-of-(\d{5})(\.gguf)$", re.IGNORECASE)


def parts_of(path: Path) -> list[Path]:
    """All files of a model, in order: one, or its parts when it is split. The library is handed the first.

    Raises:
        WeftError: NOT_FOUND, naming the file or the parts that are missing.
    """
    parts = [path]
    if found := _PART.match(path.name):
        count = int(found[3])
        parts = [
            path.with_name(f"{found[1]}-{i:05d}-of-{count:05d}{found[4]}") for i in range(1, min(count, 9_999) + 1)
        ]
    missing = [part.name for part in parts if not part.is_file()]
    if missing and len(parts) > 1:
        names = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        raise WeftError(
            ErrorKind.NOT_FOUND,
            f"{path.name} is one of {len(parts)} parts, of which {len(missing)} are missing: {names}.",
            f"Download the missing parts into {path.parent}.",
        )
    if missing:
        raise WeftError(
            ErrorKind.NOT_FOUND, f"There is no file {path}.", "Refresh the library, or download the model again."
        )
    return parts


class LlamaModel:
    """A loaded model. Owns the library's model; `close` gives it back.

    Args:
        library: the llama_cpp module. log: what the library says while loading.
        progress: told how much is read, from 0 to 1; answers whether to go on.

    Raises:
        WeftError: when the library cannot load it; CANCELLED when stopped.
    """

    def __init__(
        self, library: Any, log: LibraryLog, path: Path, options: Options, progress: Callable[[float], bool]
    ) -> None:
        self._library = library
        self.path = path
        self._buffer = ctypes.create_string_buffer(256)
        self._pieces: dict[int, bytes] = {}
        params = library.llama_model_default_params()
        with _keep_alive(library, params, options):
            stopped = False

            def advance(fraction: float, _: object) -> bool:
                nonlocal stopped
                stopped = stopped or not progress(fraction)
                return not stopped

            callback = library.llama_progress_callback(advance)
            params.progress_callback = callback
            log.clear()
            self.pointer = library.llama_model_load_from_file(os.fsencode(path), params)
        if not self.pointer:
            if stopped:
                raise WeftError(ErrorKind.CANCELLED, "Loading was stopped.")
            raise load_failure(path, log)
        self.vocab = library.llama_model_get_vocab(self.pointer)
        self.eog = functools.partial(library.llama_vocab_is_eog, self.vocab)

    def close(self) -> None:
        """Free the model; every context of it must be gone."""
        if self.pointer:
            self._library.llama_model_free(self.pointer)
            self.pointer = None

    # What the file says --------------------------------------------------------------------

    def meta(self, key: str) -> str:
        """A metadata entry as text, "" when there is none."""
        buffer = ctypes.create_string_buffer(512)
        length = self._library.llama_model_meta_val_str(self.pointer, key.encode(), buffer, len(buffer))
        return buffer.value.decode("utf-8", "replace") if length >= 0 else ""

    def number(self, key: str) -> float:
        """A metadata entry of this architecture (`rope.freq_base`) as a number, 0 when there is none."""
        with contextlib.suppress(ValueError):
            return float(self.meta(f"{self.meta('general.architecture')}.{key}"))
        return 0.0

    @property
    def shape(self) -> ModelShape:
        """The numbers of the architecture, as far as the library tells them."""
        library, model = self._library, self.pointer
        heads = max(1, library.llama_model_n_head(model))
        hidden = library.llama_model_n_embd(model)
        head = int(self.number("attention.key_length")) or hidden // heads
        return ModelShape(
            layers=library.llama_model_n_layer(model),
            hidden=hidden,
            heads=heads,
            kv_heads=library.llama_model_n_head_kv(model),
            head_dim=head,
            value_dim=int(self.number("attention.value_length")) or head,
            intermediate=int(self.number("feed_forward_length")),
            vocabulary=library.llama_vocab_n_tokens(self.vocab),
            context=library.llama_model_n_ctx_train(model),
            sliding_window=library.llama_model_n_swa(model),
        )

    @property
    def template(self) -> str:
        """The chat template of the file, "" when it has none."""
        raw = self._library.llama_model_chat_template(self.pointer, None)
        return raw.decode("utf-8", "replace") if raw else ""

    @property
    def bytes(self) -> int:
        return self._library.llama_model_size(self.pointer)

    # Tokens and text -----------------------------------------------------------------------

    @property
    def bos(self) -> int:
        """The beginning-of-sequence token that this tokenizer adds; -1 when it adds none."""
        added = self._library.llama_vocab_get_add_bos(self.vocab)
        return self._library.llama_vocab_bos(self.vocab) if added else -1

    def special_text(self, which: str) -> str:
        """The text of the `bos` or `eos` token, "" when there is none."""
        token = getattr(self._library, f"llama_vocab_{which}")(self.vocab)
        if token < 0:
            return ""
        return (self._library.llama_vocab_get_text(self.vocab, token) or b"").decode("utf-8", "replace")

    def tokenize(self, text: str, *, special: bool = True) -> list[int]:
        """Tokens of a text, no beginning-of-sequence added.

        Args:
            special: read `<|im_start|>` and the like as the tokens that they name.
        """
        data = text.encode("utf-8", "surrogatepass")
        room = len(data) + 8
        tokens = (ctypes.c_int32 * room)()
        count = self._library.llama_tokenize(self.vocab, data, len(data), tokens, room, False, special)
        if count < 0:  # more tokens than bytes: the library says how many
            room = -count
            tokens = (ctypes.c_int32 * room)()
            count = self._library.llama_tokenize(self.vocab, data, len(data), tokens, room, False, special)
        return tokens[:count]

    def with_bos(self, tokens: list[int]) -> list[int]:
        """The tokens with a beginning-of-sequence token before them, where this tokenizer adds one and none is there."""
        bos = self.bos
        return tokens if bos < 0 or tokens[:1] == [bos] else [bos, *tokens]

    def piece(self, token: int, strip: int = 0) -> bytes:
        """The bytes of a token; b"" for special ones. They may be a part of a character."""
        if not strip and (known := self._pieces.get(token)) is not None:
            return known
        buffer = self._buffer
        count = self._library.llama_token_to_piece(self.vocab, token, buffer, len(buffer), strip, False)
        if count < 0:
            self._buffer = ctypes.create_string_buffer(-count)
            return self.piece(token, strip)
        piece = buffer.raw[:count]
        if not strip:
            self._pieces[token] = piece
        return piece

    @property
    def adds_space(self) -> bool:
        """Whether this tokenizer puts a space before the first word (SentencePiece)."""
        return self._library.llama_vocab_type(self.vocab) == self._library.LLAMA_VOCAB_TYPE_SPM


@contextlib.contextmanager
def _keep_alive(library: Any, params: Any, options: Options) -> Iterator[None]:
    """Fill the model parameters; what they point to lives as long as the block."""
    params.n_gpu_layers = _gpu_layers(library, options)
    params.split_mode = getattr(library, f"LLAMA_SPLIT_MODE_{options.split_mode.upper()}")
    params.main_gpu = options.main_gpu
    params.use_extra_bufts = options.repack
    params.check_tensors = options.check_tensors
    params.load_mode = _load_mode(library, options)
    split: Any = None
    if shares := tensor_split(options.tensor_split, library.llama_max_devices()):
        split = (ctypes.c_float * max(library.llama_max_devices(), len(shares)))(*shares)
        params.tensor_split = split
    entries = overrides(options.override_kv)
    if entries:
        # The list ends with an empty key.
        table = (library.llama_model_kv_override * (len(entries) + 1))()
        for row, entry in zip(table, entries, strict=False):
            _fill_override(library, row, entry)
        params.kv_overrides = table
    if options.cpu:
        devices = (ctypes.c_void_p * 1)()  # an empty list, as opposed to none: no device but the CPU
        params.devices = ctypes.cast(devices, ctypes.c_void_p)
    else:
        devices = None
    yield
    del split, devices


def _fill_override(library: Any, row: Any, entry: Override) -> None:
    row.key = entry.key.encode()
    value = entry.value
    if isinstance(value, bool):
        row.tag, row.value.val_bool = library.LLAMA_KV_OVERRIDE_TYPE_BOOL, value
    elif isinstance(value, int):
        row.tag, row.value.val_i64 = library.LLAMA_KV_OVERRIDE_TYPE_INT, value
    elif isinstance(value, float):
        row.tag, row.value.val_f64 = library.LLAMA_KV_OVERRIDE_TYPE_FLOAT, value
    else:
        row.tag, row.value.val_str = library.LLAMA_KV_OVERRIDE_TYPE_STR, value.encode()


def _gpu_layers(library: Any, options: Options) -> int:
    if options.cpu or not library.llama_supports_gpu_offload():
        return 0
    return -1 if options.n_gpu_layers is None else options.n_gpu_layers


def _load_mode(library: Any, options: Options) -> int:
    if options.direct_io:
        return library.LLAMA_LOAD_MODE_DIRECT_IO
    if options.no_mmap or not library.llama_supports_mmap():
        return library.LLAMA_LOAD_MODE_MLOCK if options.mlock else library.LLAMA_LOAD_MODE_NONE
    return library.LLAMA_LOAD_MODE_MMAP_MLOCK if options.mlock else library.LLAMA_LOAD_MODE_MMAP


def load_failure(path: Path, log: LibraryLog) -> WeftError:
    """Why the library could not load a file, from what it logged."""
    reason = log.reason()
    words = " ".join(log.lines).lower()
    if found := re.search(r"unknown model architecture: '([^']*)'", words):
        return WeftError(
            ErrorKind.UNSUPPORTED,
            f"{path.name}: this llama.cpp does not know the architecture {found[1]!r}.",
            "Update the llama.cpp environment, or load the model's safetensors version with Transformers.",
        )
    if "clip cannot be used as main model" in words:
        return WeftError(
            ErrorKind.UNSUPPORTED,
            f"{path.name} is a vision projector, not a model.",
            "Load the model that it belongs to; the projector is then found beside it.",
        )
    if any(word in words for word in ("unable to allocate", "failed to allocate", "out of memory", "cannot allocate")):
        return WeftError(
            ErrorKind.OUT_OF_MEMORY,
            f"{path.name} does not fit: {reason}.",
            "Choose a smaller quantization or context length, or fewer GPU layers.",
        )
    if "unknown pre-tokenizer" in words or "unknown tokenizer" in words:
        return WeftError(
            ErrorKind.UNSUPPORTED,
            f"{path.name}: this llama.cpp does not know the model's tokenizer ({reason}).",
            "Update the llama.cpp environment, or choose a newer conversion of the model.",
        )
    return WeftError(
        ErrorKind.CORRUPT,
        f"{path.name} could not be loaded: {reason or 'llama.cpp gave no reason'}.",
        "Download the model again; if that does not help, the file was made for another version of llama.cpp.",
    )
