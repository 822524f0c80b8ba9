"""What the llama.cpp tests share: a report that records, a backend that is always unloaded, a bare decode loop."""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from app.backends.llama_cpp import Backend
from app.core.conversation import Message
from app.core.library import ModelEntry
from app.core.sampling import Sampling
from app.engine.protocol import Generate, Generated, Load, Loaded

GREEDY = Sampling(temperature=0, max_tokens=32)


class Recorder:
    """A Report that keeps everything. `at` calls a function at the n-th token."""

    def __init__(self) -> None:
        self.pieces: list[str] = []
        self.count = 0
        self.event: Loaded | None = None
        self.phases: list[tuple[str, float, float]] = []
        self.lines: list[tuple[str, str]] = []
        self.cancelled = False
        self.callbacks: list[Callable[[], None]] = []
        self.at: tuple[int, Callable[[], None]] | None = None
        self.on_progress: Callable[[str], None] | None = None
        self.waiting = threading.Event()

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    def progress(self, phase: str, done: float = 0, total: float = 0, unit: str = "") -> None:
        self.phases.append((phase, done, total))
        if self.on_progress:
            self.on_progress(phase)

    def tokens(self, text: str, count: int, row: int = 0) -> None:
        self.pieces.append(text)
        self.count += count
        if self.at and self.count >= self.at[0]:
            self.at[1]()

    def loaded(self, event: Loaded) -> None:
        self.event = event

    def log(self, level: str, text: str) -> None:
        self.lines.append((level, text))

    def metric(self, step: int, values: Any) -> None:
        """Generations have none."""

    def on_cancel(self, callback: Callable[[], None]) -> None:
        self.callbacks.append(callback)

    def cancel(self) -> None:
        """What the engine does when Cancel comes."""
        self.cancelled = True
        for callback in self.callbacks:
            callback()


@contextlib.contextmanager
def loaded(entry: ModelEntry, **options: Any) -> Iterator[tuple[Backend, Loaded]]:
    """A backend with this model; unloaded in the end."""
    backend, report = Backend(), Recorder()
    options.setdefault("threads", 1)
    try:
        backend.load(Load(model=entry, options=options), report)
        assert report.event is not None
        yield backend, report.event
    finally:
        backend.unload()


def say(backend: Backend, *contents: str, sampling: Sampling = GREEDY, **fields: Any) -> tuple[str, Generated]:
    """Answer a conversation that the user begins and in which the roles alternate."""
    report = Recorder()
    result = backend.generate(Generate(messages=conversation(*contents), sampling=sampling, **fields), report)
    assert report.count == result.tokens
    return report.text, result


def write_on(backend: Backend, prompt: str, sampling: Sampling = GREEDY) -> tuple[str, Generated]:
    """Continue a raw text."""
    report = Recorder()
    result = backend.generate(Generate(prompt=prompt, sampling=sampling), report)
    return report.text, result


def conversation(*contents: str) -> tuple[Message, ...]:
    return tuple(Message(role="assistant" if i % 2 else "user", content=text) for i, text in enumerate(contents))


class Bare:
    """llama.cpp driven by hand, as plainly as can be: the reference."""

    def __init__(self, path: Path | str, context: int = 2048, threads: int = 1, **fields: Any) -> None:
        import llama_cpp

        self.library: Any = llama_cpp
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        assert self.model, f"llama.cpp cannot load {path}"
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_threads, params.n_threads_batch = context, threads, threads
        for name, value in fields.items():
            setattr(params, name, value)
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        self.vocab = llama_cpp.llama_model_get_vocab(self.model)
        self.size = llama_cpp.llama_vocab_n_tokens(self.vocab)

    def __enter__(self) -> Bare:
        return self

    def __exit__(self, *_: object) -> None:
        self.library.llama_free(self.context)
        self.library.llama_model_free(self.model)

    def tokenize(self, text: str, special: bool = True) -> list[int]:
        """With the beginning-of-sequence token, as the tokenizer adds it."""
        data = text.encode()
        tokens = (ctypes.c_int32 * (len(data) + 16))()
        count = self.library.llama_tokenize(self.vocab, data, len(data), tokens, len(tokens), True, special)
        return tokens[:count]

    def decode(self, tokens: list[int]) -> None:
        array = (ctypes.c_int32 * len(tokens))(*tokens)
        assert self.library.llama_decode(self.context, self.library.llama_batch_get_one(array, len(tokens))) == 0

    def logits(self) -> Any:
        import numpy

        return numpy.ctypeslib.as_array(self.library.llama_get_logits_ith(self.context, -1), shape=(self.size,)).copy()

    def greedy(self, prompt: list[int], most: int) -> list[int]:
        """The likeliest tokens after a prompt, up to the end of the answer."""
        self.library.llama_memory_clear(self.library.llama_get_memory(self.context), True)
        self.decode(prompt)
        found: list[int] = []
        while len(found) < most:
            token = int(self.logits().argmax())
            if self.library.llama_vocab_is_eog(self.vocab, token):
                break
            found.append(token)
            self.decode([token])
        return found
