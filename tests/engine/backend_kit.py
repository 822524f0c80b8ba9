"""What tests of a backend share: a Report that remembers, and a way to ask in one line."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

from app.backends.base import Backend
from app.core.conversation import Message
from app.core.library import ModelEntry
from app.core.options import OptionValue
from app.core.sampling import Sampling
from app.engine.protocol import Generate, Generated, Load, Loaded


class FakeReport:
    """Collects what a backend says. `cancel_when` is asked at each look at `cancelled`."""

    def __init__(self, cancel_when: Callable[[FakeReport], bool] = lambda _: False) -> None:
        self.pieces: list[str] = []
        self.count = 0
        self.phases: list[tuple[str, float, float]] = []
        self.events: list[Loaded] = []
        self.logs: list[str] = []
        self.times: list[float] = []
        self.cancelled_at: float | None = None
        self._cancel_when = cancel_when
        self._callbacks: list[Callable[[], None]] = []

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    def progress(self, phase: str, done: float = 0, total: float = 0, unit: str = "") -> None:
        self.phases.append((phase, done, total))

    def tokens(self, text: str, count: int, row: int = 0) -> None:
        self.pieces.append(text)
        self.count += count
        self.times.append(time.perf_counter())

    def loaded(self, event: Loaded) -> None:
        self.events.append(event)

    def log(self, level: str, text: str) -> None:
        self.logs.append(text)

    @property
    def cancelled(self) -> bool:
        if self.cancelled_at is None and self._cancel_when(self):
            self.cancel()
        return self.cancelled_at is not None

    def on_cancel(self, callback: Callable[[], None]) -> None:
        self._callbacks.append(callback)

    def on_adjust(self, callback: Callable[[str], None]) -> None:
        self.adjust = callback

    def cancel(self) -> None:
        self.cancelled_at = time.perf_counter()
        for callback in self._callbacks:
            threading.Thread(target=callback).start()


@contextmanager
def loaded(backend: Backend, model: ModelEntry, **options: OptionValue) -> Iterator[tuple[Backend, Loaded]]:
    """A backend with a model in it, unloaded at the end."""
    report = FakeReport()
    backend.load(Load(model=model, options=options), report)
    try:
        yield backend, report.events[0]
    finally:
        backend.unload()


def ask(
    backend: Backend, text: str | tuple[Message, ...], report: FakeReport | None = None, **parameters: Any
) -> tuple[str, Generated]:
    """Generate from a raw text or messages. `parameters` are fields of Sampling, `continue_last` or `reserve`.

    Greedy and 16 tokens unless told otherwise.
    """
    report = report or FakeReport()
    extra = {k: parameters.pop(k) for k in ("continue_last", "reserve") if k in parameters}
    sampling = Sampling(**{"temperature": 0, "max_tokens": 16, **parameters})
    request = (
        Generate(prompt=text, sampling=sampling, **extra)
        if isinstance(text, str)
        else Generate(messages=text, sampling=sampling, **extra)
    )
    done = backend.generate(request, report)
    assert done.tokens == report.count
    return report.text, done


class Said(NamedTuple):
    """An answer under transformers, and how much of it does not hang on rounding.

    Two ways to compute the same logits, such as with a cache and without, differ in their last bits. Where two tokens of
    a random model are as good as equally likely, each way may take another one, and neither is wrong; after that
    the texts have nothing to do with each other.

    Attributes:
        sure: the text before the first token that other last bits could have turned into another one.
    """

    text: str
    done: Generated
    sure: str

    @property
    def whole(self) -> bool:
        """Whether no token of it hangs on rounding."""
        return self.sure == self.text

    def same_as(self, text: str) -> bool:
        """Whether a text is this answer, computed in another way."""
        return text == self.text if self.whole else text.startswith(self.sure)


ROUNDING = 1e-4  # of logits; ten times what ways to compute the same ones were found to differ by
TRIES = 8


def ask_surely(backend: Backend, text: str | tuple[Message, ...], **parameters: Any) -> Said:
    """`ask`, and remember from where on rounding may have chosen."""
    from app.generation.hf_answer import Answer

    report, plain, ends = FakeReport(), Answer.choose, []

    def choose(answer: Answer, logits: Any) -> int:
        if not ends and _hangs_on_rounding(answer._sampler, logits):
            ends.append(len(report.text))
        return plain(answer, logits)

    with mock.patch.object(Answer, "choose", choose):
        found, done = ask(backend, text, report, **parameters)
    return Said(found, done, found[: ends[0]] if ends else found)


def _hangs_on_rounding(sampler: Any, logits: Any) -> bool:
    """Whether the sampler, in the state in which it is, takes another token from logits that differ a little."""
    import torch

    state = sampler._generator.get_state()

    def taken(scores: torch.Tensor) -> int:
        sampler._generator.set_state(state)
        return sampler.choose(scores)

    scores = logits.detach().to("cpu", torch.float32)
    token = taken(scores)
    less = scores.clone()
    less[token] -= 2 * ROUNDING
    others = [less, *(scores + torch.empty_like(scores).uniform_(-ROUNDING, ROUNDING) for _ in range(TRIES))]
    found = any(taken(other) != token for other in others)
    sampler._generator.set_state(state)
    return found


def user(text: str) -> Message:
    return Message(role="user", content=text)


def assistant(text: str) -> Message:
    return Message(role="assistant", content=text)


def system(text: str) -> Message:
    return Message(role="system", content=text)
