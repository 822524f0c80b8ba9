"""Compare: one prompt, answered side by side under several adapter stacks, and which answer was better."""

from __future__ import annotations

import random
from typing import Any

from PySide6.QtCore import QObject, Signal, Slot

from app.backends.base import Spec
from app.core.conversation import Message
from app.core.errors import ErrorKind, WeftError
from app.core.library import AdapterEntry, ModelEntry
from app.core.options import OptionValue, build
from app.core.sampling import Sampling
from app.core.stack import AdapterStack, StackedAdapter
from app.engine.protocol import BatchRow, GenerateBatch, Generated, GeneratedBatch
from app.store.preferences import Preference, PreferenceStore
from app.viewmodels.chat_request import own_values
from app.viewmodels.text_difference import differences

LEAST, MOST = 2, 6


class Column:
    """One column: a stack and what it answered.

    Attributes:
        statistics: of the last answer, None while there is none.
        chosen: this answer was called the better one.
    """

    def __init__(self, stack: AdapterStack) -> None:
        self.stack = stack
        self.text = ""
        self.tokens = 0
        self.statistics: Generated | None = None
        self.chosen = False

    @property
    def title(self) -> str:
        return self.stack.title


class Compare(QObject):
    """The columns and the run.

    Signals:
        columns_changed: columns came, went or got another stack.
        text_came(column, text): what an answer got in addition. cleared: the answers are empty again.
        state_changed: a run began or ended, or an answer was chosen.
        failed(WeftError).
    """

    columns_changed = Signal()
    text_came = Signal(int, str)
    cleared = Signal()
    state_changed = Signal()
    failed = Signal(object)

    def __init__(self, loadout: Any, preferences: PreferenceStore, parent: QObject | None = None) -> None:
        super().__init__(parent)
        self._loadout = loadout
        self._preferences = preferences
        self.columns = [Column(AdapterStack()), Column(loadout.stack)]
        self.system = ""
        self.sampling: dict[str, OptionValue] = {"max_tokens": 512}  # what differs from the model's own settings
        self.seed = random.randrange(1 << 31)
        self.prompt = ""
        self.note = ""
        self.collected = preferences.count()
        self._request = 0
        self._answered_system = ""
        self._answered_model = ""
        self._untouched = (
            True  # nobody has chosen columns or asked anything yet: the last one shows the stack that is on
        )
        loadout.row_tokens.connect(self._tokens)
        loadout.finished.connect(self._finished)
        loadout.failed.connect(self._failed)
        loadout.changed.connect(self._loadout_changed)
        loadout.stack_set.connect(self._loadout_changed)

    @Slot()
    def _loadout_changed(self) -> None:
        if self._untouched and self.columns[-1].stack != self._loadout.stack:
            self.columns[-1] = Column(self._loadout.stack)
            self.columns_changed.emit()
        else:
            self.state_changed.emit()

    # Columns --------------------------------------------------------------------------------------

    def known(self) -> list[AdapterEntry]:
        """Adapters of the library that can be used."""
        return [entry for entry in self._loadout.adapters() if not entry.problem]

    def add(self, stack: AdapterStack | None = None) -> None:
        """Another column, with the stack of the loadout unless one is given."""
        if len(self.columns) < MOST and not self.running:
            self._untouched = False
            self.columns.append(Column(self._loadout.stack if stack is None else stack))
            self.columns_changed.emit()

    def remove(self, column: int) -> None:
        """Take a column away; two remain."""
        if len(self.columns) > LEAST and not self.running:
            del self.columns[column]
            self.columns_changed.emit()

    def set_stack(self, column: int, stack: AdapterStack) -> None:
        """Give a column another stack. What it answered under the old one goes."""
        if not self.running:
            self._untouched = False
            self.columns[column] = Column(stack)
            self.columns_changed.emit()

    def set_stacks(self, stacks: list[AdapterStack]) -> None:
        """Begin with these columns."""
        if not self.running:
            self._untouched, self.note = False, ""
            given = [*stacks[:MOST]]
            while len(given) < LEAST:
                given.append(AdapterStack())
            self.columns = [Column(stack) for stack in given]
            self.columns_changed.emit()

    # Running --------------------------------------------------------------------------------------

    @property
    def running(self) -> bool:
        return self._request != 0

    @property
    def ready(self) -> bool:
        """Whether there is a model that can be asked, or that is on its way."""
        return self._loadout.model is not None

    @property
    def model(self) -> ModelEntry | None:
        """The model that is asked."""
        return self._loadout.model

    @property
    def loader(self) -> Spec | None:
        return self._loadout.loader

    @property
    def takes_adapters(self) -> bool:
        return bool(self._loadout.takes_adapters)

    def run(self, prompt: str) -> None:
        """Ask all columns. The answers that were there go."""
        if self.running or not prompt.strip() or not self.ready:
            return
        for column in self.columns:
            column.text, column.tokens, column.statistics, column.chosen = "", 0, None, False
        self.prompt, self.note, self._untouched = prompt, "", False
        self._answered_system = self.system
        self._answered_model = self._loadout.model.name
        self.cleared.emit()
        messages = [Message(role="user", content=prompt)]
        if self.system.strip():
            messages.insert(0, Message(role="system", content=self.system))
        rows = tuple(BatchRow(adapters=column.stack, messages=tuple(messages)) for column in self.columns)
        sampling = build(Sampling, {**own_values(self.model), **self.sampling, "seed": self.seed})
        self._request = self._loadout.generate_batch(GenerateBatch(rows=rows, sampling=sampling))
        self.state_changed.emit()

    def stop(self) -> None:
        """End the run; what was answered stays."""
        if self._request:
            self._loadout.cancel(self._request)

    @Slot(int, int, str, int)
    def _tokens(self, request: int, row: int, text: str, count: int) -> None:
        if request == self._request and row < len(self.columns):
            column = self.columns[row]
            column.text += text
            column.tokens += count
            self.text_came.emit(row, text)

    @Slot(int, object)
    def _finished(self, request: int, result: object) -> None:
        if request != self._request or not isinstance(result, GeneratedBatch):
            return
        self._request = 0
        self.note = result.note
        for column, statistics in zip(self.columns, result.rows, strict=False):
            column.statistics = statistics
        self.state_changed.emit()

    @Slot(int, object)
    def _failed(self, request: int, error: WeftError) -> None:
        if request != self._request:
            return
        self._request = 0
        self.state_changed.emit()
        if error.kind is not ErrorKind.CANCELLED:
            self.failed.emit(error)

    # Judging --------------------------------------------------------------------------------------

    def marks(self, column: int) -> tuple[tuple[int, int], ...]:
        """Where a column's answer differs from the first one's, in characters. The first is held against the second."""
        other = self.columns[0 if column else 1]
        return differences(self.columns[column].text, other.text)

    def can_prefer(self, column: int) -> bool:
        """Whether this answer can be called better: the run has ended, and another answer differs."""
        answer = self.columns[column]
        return not self.running and bool(answer.text) and not answer.chosen and bool(self._rejected(column))

    def _rejected(self, column: int) -> list[Column]:
        """Every other answer once, however many columns gave it."""
        mine = self.columns[column].text
        others = {other.text: other for other in reversed(self.columns) if other.text and other.text != mine}
        return list(reversed(others.values()))

    def prefer(self, column: int) -> None:
        """Keep this answer as better than every other one that differs: rows that training reads."""
        if not self.can_prefer(column):
            return
        better = self.columns[column]
        rows = [
            Preference(
                prompt=self.prompt,
                chosen=better.text,
                rejected=worse.text,
                system=self._answered_system,
                model=self._answered_model,
                chosen_stack=better.title,
                rejected_stack=worse.title,
            )
            for worse in self._rejected(column)
        ]
        try:
            self.collected = self._preferences.add(rows)
        except WeftError as error:
            self.failed.emit(error)
            return
        for other in self.columns:
            other.chosen = other is better
        self.state_changed.emit()

    @property
    def preferences_path(self) -> str:
        """The file of what was collected."""
        return str(self._preferences.path)


def stack_of(entries: list[tuple[AdapterEntry, float]]) -> AdapterStack:
    """A stack of library entries with their weights."""
    return AdapterStack(
        adapters=tuple(StackedAdapter(path=entry.path, name=entry.name, weight=weight) for entry, weight in entries)
    )
