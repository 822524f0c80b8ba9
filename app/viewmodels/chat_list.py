"""The conversations as a list model: pinned first, then by date, searched through all their text."""

from __future__ import annotations

import datetime
import html
from enum import IntEnum
from typing import Any

from PySide6.QtCore import QAbstractListModel, QModelIndex, QObject, QPersistentModelIndex, Qt, Signal

from app.core.conversation import Conversation
from app.store.chats import ChatStore

_Index = QModelIndex | QPersistentModelIndex
_ROOT = QModelIndex()


class ListRole(IntEnum):
    """Beyond Qt's own roles."""

    ID = Qt.ItemDataRole.UserRole + 1
    PINNED = Qt.ItemDataRole.UserRole + 2
    WRITING = Qt.ItemDataRole.UserRole + 3
    HEADING = Qt.ItemDataRole.UserRole + 4


def date_group(when: float, now: datetime.datetime) -> str:
    """Under which heading a conversation of this moment stands."""
    day = datetime.datetime.fromtimestamp(when).date()
    age = (now.date() - day).days
    if age <= 0:
        return "Today"  # a clock that was set back makes no group of its own
    if age == 1:
        return "Yesterday"
    if age < 7:
        return "Last 7 days"
    if age < 30:
        return "Last 30 days"
    if day.year == now.year:
        return day.strftime("%B")
    return str(day.year)


class ConversationList(QAbstractListModel):
    """Rows are conversations and the headings between them; all of one height, so ten thousand cost nothing.

    Signals:
        renamed: a title was edited in place: the conversation and its new title.
    """

    renamed = Signal(int, str)

    def __init__(self, store: ChatStore, parent: QObject | None = None) -> None:
        super().__init__(parent)
        self._store = store
        self._text = ""
        self._rows: list[Conversation | str] = []
        self._row_of: dict[int, int] = {}
        self._writing = 0
        self.now = datetime.datetime.now  # tests set the clock

    @property
    def text(self) -> str:
        """What is searched for."""
        return self._text

    @property
    def conversations(self) -> list[Conversation]:
        return [row for row in self._rows if isinstance(row, Conversation)]

    def search(self, text: str) -> None:
        """Show only conversations in whose title or messages this stands."""
        if text != self._text:
            self._text = text
            self.refresh()

    def refresh(self) -> None:
        """Read the store again. Raises WeftError when it cannot be read."""
        now = self.now()
        rows: list[Conversation | str] = []
        heading = ""
        for conversation in self._store.conversations(self._text):
            group = "Pinned" if conversation.pinned else date_group(conversation.modified, now)
            if group != heading:
                heading = group
                rows.append(group)
            rows.append(conversation)
        if [_key(row) for row in rows] == [_key(row) for row in self._rows]:
            self._rows = rows  # the same order: only what is painted changes
            if rows:
                self.dataChanged.emit(self.index(0), self.index(len(rows) - 1))
            return
        self.beginResetModel()
        self._rows = rows
        self._row_of = {row.id: i for i, row in enumerate(rows) if isinstance(row, Conversation)}
        self.endResetModel()

    def set_writing(self, conversation: int) -> None:
        """Mark the conversation that an answer is being written into; 0 for none."""
        if conversation != self._writing:
            changed, self._writing = (self._writing, conversation), conversation
            for id in changed:
                if id in self._row_of:
                    index = self.index(self._row_of[id])
                    self.dataChanged.emit(index, index)

    def row_of(self, conversation: int) -> int:
        """Its row, or -1."""
        return self._row_of.get(conversation, -1)

    def conversation(self, row: int) -> Conversation | None:
        """The conversation in a row; None for a heading."""
        found = self._rows[row] if 0 <= row < len(self._rows) else None
        return found if isinstance(found, Conversation) else None

    # Qt ---------------------------------------------------------------------------------------------

    def rowCount(self, parent: _Index = _ROOT) -> int:
        return 0 if parent.isValid() else len(self._rows)

    def data(self, index: _Index, role: int = Qt.ItemDataRole.DisplayRole) -> Any:
        row = self._rows[index.row()]
        if isinstance(row, str):
            if role == Qt.ItemDataRole.DisplayRole:
                return row
            return True if role == ListRole.HEADING else None
        if role in (Qt.ItemDataRole.DisplayRole, Qt.ItemDataRole.EditRole):
            return row.title
        if role == ListRole.ID:
            return row.id
        if role == ListRole.PINNED:
            return row.pinned
        if role == ListRole.WRITING:
            return row.id == self._writing
        if role == Qt.ItemDataRole.ToolTipRole:
            # Escaped: a tooltip that looks like HTML is read as HTML, local images included.
            when = datetime.datetime.fromtimestamp(row.modified)
            return f"<qt>{html.escape(row.title)}<br>{when:%d %B %Y, %H:%M}</qt>"
        if role == Qt.ItemDataRole.AccessibleTextRole:
            return (
                f"{row.title}{', pinned' if row.pinned else ''}{', being answered' if row.id == self._writing else ''}"
            )
        return None

    def setData(self, index: _Index, value: Any, role: int = Qt.ItemDataRole.EditRole) -> bool:
        conversation = self.conversation(index.row())
        if role != Qt.ItemDataRole.EditRole or conversation is None or not str(value).strip():
            return False
        self.renamed.emit(conversation.id, str(value))
        return True

    def flags(self, index: _Index) -> Qt.ItemFlag:
        if isinstance(self._rows[index.row()], str):
            return Qt.ItemFlag.NoItemFlags
        return Qt.ItemFlag.ItemIsSelectable | Qt.ItemFlag.ItemIsEnabled | Qt.ItemFlag.ItemIsEditable


def _key(row: Conversation | str) -> object:
    return row if isinstance(row, str) else row.id
