"""A loadout without an engine: records requests, and says what a test tells it to say."""

from __future__ import annotations

from typing import Any

from PySide6.QtCore import QObject, Signal

from app.core.errors import WeftError
from app.core.library import ModelEntry, ModelFormat
from app.core.stack import AdapterStack
from app.engine.protocol import Generate, GenerateBatch, Generated
from app.viewmodels.loadout import LoadoutState


class FakeLoadout(QObject):
    """The part of viewmodels.loadout.Loadout that chats use."""

    changed = Signal()
    stack_set = Signal()
    tokens = Signal(int, str, int)
    row_tokens = Signal(int, int, str, int)
    progress = Signal(int, object)
    begun = Signal(int)
    finished = Signal(int, object)
    failed = Signal(int, object)

    def __init__(self) -> None:
        super().__init__()
        self.state = LoadoutState.READY
        self.model: ModelEntry | None = ModelEntry(id="m", name="Model", path="/m.gguf", format=ModelFormat.GGUF)
        self.loader = None
        self.stack = AdapterStack()
        self.waiting_for = ""
        self.requests: list[Any] = []  # Generate or GenerateBatch
        self.cancelled: list[int] = []
        self.refuse: WeftError | None = None

    def generate(self, request: Generate) -> int:
        if self.refuse is not None:
            raise self.refuse
        self.requests.append(request)
        return len(self.requests)

    def generate_batch(self, request: GenerateBatch) -> int:
        if self.refuse is not None:
            raise self.refuse
        self.requests.append(request)
        return len(self.requests)

    def say_row(self, row: int, text: str, count: int = 1) -> None:
        self.row_tokens.emit(self.last, row, text, count)

    def cancel(self, id: int) -> None:
        self.cancelled.append(id)

    # What a test makes it say -----------------------------------------------------------------------

    @property
    def last(self) -> int:
        return len(self.requests)

    def say(self, text: str, count: int = 1) -> None:
        self.tokens.emit(self.last, text, count)

    def finish(self, reason: str = "stop", **fields: object) -> None:
        values = {"tokens": 5, "prompt_tokens": 7, "seconds": 0.5} | fields
        self.finished.emit(self.last, Generated(finish_reason=reason, **values))  # type: ignore[arg-type]

    def answer(self, text: str, **fields: object) -> None:
        self.say(text)
        self.finish(**fields)  # type: ignore[arg-type]

    def fail(self, error: WeftError) -> None:
        self.failed.emit(self.last, error)

    def set_state(self, state: LoadoutState, *, model: bool = True) -> None:
        self.state = state
        if not model:
            self.model = None
        self.changed.emit()
