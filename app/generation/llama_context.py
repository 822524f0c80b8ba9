"""A llama.cpp context: tokens go in by batches, logits come out, and what was read is not read again."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Sequence
from typing import Any

from app.core.errors import ErrorKind, WeftError
from app.generation.prefix import common_prefix

_ABORTED = 2  # llama_decode's answer when the abort callback said so


class AbortFlag:
    """Stops a llama_decode from another thread.

    The library asks its abort callback before every node of the graph. A callback in Python would take the interpreter
    lock each time and slow decoding down; so the callback is the C library's strlen, and its argument a buffer of
    ours: an empty string is 0, which is false, and a string of one character is 1, which is true.
    """

    def __init__(self, library: Any) -> None:
        self._text = ctypes.create_string_buffer(2)
        self._address = ctypes.cast(self._text, ctypes.c_void_p)
        self._callback = self._native(library) or library.ggml_abort_callback(self._ask)

    @staticmethod
    def _native(library: Any) -> Any:
        if not sys.platform.startswith(("linux", "darwin")):
            return None
        return ctypes.cast(ctypes.CDLL(None).strlen, library.ggml_abort_callback)

    def _ask(self, _: object) -> bool:
        return self._text.raw[0] != 0

    def attach(self, library: Any, context: Any) -> None:
        """Have this context ask this flag."""
        library.llama_set_abort_callback(context, self._callback, self._address)

    def set(self) -> None:
        """Stop the decode at work, and every further one until `clear`. From any thread."""
        self._text[0] = b"\x01"

    def clear(self) -> None:
        """Let decodes run again."""
        self._text[0] = b"\x00"

    @property
    def is_set(self) -> bool:
        return self._text.raw[0] != 0


class LlamaContext:
    """One sequence in one llama_context. Not to be used by two threads at once, but for `abort`.

    Args:
        library: the llama_cpp module.
        pointer: the llama_context, which this object owns from now on.
        chunk: tokens of a prompt that are handed over at a time.
        rows: tokens that may have logits in one batch (n_outputs_max).
        sliding_window: of the model, where its cache is cut to that; 0 where everything is kept.

    Attributes:
        pointer: for the sampler.
        size: tokens that prompt and answer share.
        rows: tokens that `logits` takes at most.
        tokens: what lies in the KV cache, by position.
    """

    def __init__(self, library: Any, pointer: Any, *, chunk: int, rows: int = 1, sliding_window: int = 0) -> None:
        self._library = library
        self.pointer = pointer
        self.size: int = library.llama_n_ctx(pointer)
        self.tokens: list[int] = []
        self.abort = AbortFlag(library)
        self.abort.attach(library, pointer)
        self._memory = library.llama_get_memory(pointer)
        self._window = sliding_window
        self._chunk = max(1, min(chunk, library.llama_n_batch(pointer)))
        self.rows = min(rows, self._chunk)
        self._batch = library.llama_batch_init(self._chunk, 0, 1)
        for i in range(self._chunk):
            self._batch.n_seq_id[i] = 1
            self._batch.seq_id[i][0] = 0
            self._batch.logits[i] = 0
        # Each access through the structure makes a new pointer object; the loop wants none.
        self._token, self._position, self._wanted = self._batch.token, self._batch.pos, self._batch.logits

    def close(self) -> None:
        """Free the context."""
        if self.pointer:
            self._library.llama_batch_free(self._batch)
            self._library.llama_free(self.pointer)
            self.pointer = None

    def clear(self) -> None:
        """Forget everything that was read."""
        self.tokens.clear()
        if self._memory:
            self._library.llama_memory_clear(self._memory, False)

    def reuse(self, prompt: Sequence[int]) -> int:
        """Keep of the cache what this prompt begins with, and drop the rest.

        Returns:
            How many tokens need not be read again. Always less than the prompt has: the last one is decoded
            again, since its logits are wanted.
        """
        kept = min(common_prefix(self.tokens, prompt), len(prompt) - 1)
        if kept <= 0:
            self.clear()
            return 0
        if kept < len(self.tokens) and not self._cut(kept):
            self.clear()
            return 0
        return kept

    def _cut(self, kept: int) -> bool:
        # Recurrent states cannot go back: the library refuses. A sliding-window cache can, but may no longer
        # hold the tokens that the window before the cut needs.
        if not self._library.llama_memory_seq_rm(self._memory, 0, kept, -1):
            return False
        del self.tokens[kept:]
        if self._window:
            oldest = self._library.llama_memory_seq_pos_min(self._memory, 0)
            return 0 <= oldest <= max(0, kept - self._window)
        return True

    def read(self, tokens: Sequence[int], progress: Callable[[int], None] | None = None) -> bool:
        """Append tokens to the sequence; the logits of the last one are then there to be sampled from.

        Args:
            progress: told how many are done, after every batch.

        Returns:
            False when it was stopped by `abort`. The cache then holds what was read whole.

        Raises:
            WeftError: OUT_OF_MEMORY or INTERNAL when the library fails.
        """
        batch = self._batch
        for start in range(0, len(tokens), self._chunk):
            if self.abort.is_set:
                return False
            part = tokens[start : start + self._chunk]
            position = len(self.tokens)
            for i, token in enumerate(part):
                self._token[i] = token
                self._position[i] = position + i
            batch.n_tokens = len(part)
            last = start + len(part) == len(tokens)
            self._wanted[len(part) - 1] = last
            answer = self._library.llama_decode(self.pointer, batch)
            self._wanted[len(part) - 1] = 0
            if answer:
                return self._stopped(answer, position)
            self.tokens.extend(part)
            if progress:
                progress(start + len(part))
        return True

    def step(self, token: int) -> bool:
        """Append one token. As `read`, but as lean as can be."""
        batch = self._batch
        tokens = self.tokens
        batch.n_tokens = 1
        self._token[0] = token
        self._position[0] = len(tokens)
        self._wanted[0] = 1
        answer = self._library.llama_decode(self.pointer, batch)
        self._wanted[0] = 0
        if answer:
            return self._stopped(answer, len(tokens))
        tokens.append(token)
        return True

    def _stopped(self, answer: int, position: int) -> bool:
        # What came before the batch that was stopped is whole. Batches are split into physical ones,
        # of which some may have gone through: cut back to what `tokens` says.
        if not position or not self._library.llama_memory_seq_rm(self._memory, 0, position, -1):
            self.clear()
        if answer == _ABORTED:
            return False
        self.clear()
        if answer == 1:
            raise WeftError(
                ErrorKind.OUT_OF_MEMORY,
                f"The context of {self.size} tokens is full.",
                "Start a new chat, or load the model with a larger context length.",
            )
        if answer == -2:
            raise WeftError(
                ErrorKind.OUT_OF_MEMORY,
                "llama.cpp could not get the memory to compute with.",
                "Load the model with a smaller context length, a smaller batch size or fewer GPU layers.",
            )
        raise WeftError(
            ErrorKind.INTERNAL,
            f"llama.cpp failed to compute (llama_decode returned {answer}).",
            "Load the model again.",
        )

    def logits(self, tokens: Sequence[int], first: int) -> Any:
        """Append a batch of at most `rows` tokens.

        Args:
            first: index in `tokens` from which on logits are wanted.

        Returns:
            float32 array of shape [len(tokens) - first, vocabulary], valid until the next decode; None when stopped.
        """
        import numpy

        batch = self._batch
        position = len(self.tokens)
        for i, token in enumerate(tokens):
            self._token[i] = token
            self._position[i] = position + i
            self._wanted[i] = i >= first
        batch.n_tokens = len(tokens)
        answer = self._library.llama_decode(self.pointer, batch)
        for i in range(len(tokens)):
            self._wanted[i] = 0
        if answer:
            self._stopped(answer, position)
            return None
        self.tokens.extend(tokens)
        rows = len(tokens) - first
        vocabulary = self._library.llama_vocab_n_tokens(
            self._library.llama_model_get_vocab(self._library.llama_get_model(self.pointer))
        )
        if not rows:
            return numpy.empty((0, vocabulary), dtype=numpy.float32)
        return numpy.ctypeslib.as_array(self._library.llama_get_logits(self.pointer), shape=(rows, vocabulary))
