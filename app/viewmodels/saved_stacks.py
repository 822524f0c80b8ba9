"""Stacks saved under names: kept, put on, renamed, deleted with a way back."""

from __future__ import annotations

from collections.abc import Callable

from PySide6.QtCore import QObject, Signal

from app.core.stack import AdapterStack
from app.store.stacks import SavedStack, StackStore
from app.viewmodels.adapter_stack import StackModel


class SavedStacks(QObject):
    """What the menus show. `changed`: one was saved, renamed or deleted."""

    changed = Signal()

    def __init__(self, store: StackStore, stack: StackModel, parent: QObject | None = None) -> None:
        super().__init__(parent)
        self._store = store
        self._stack = stack

    def list(self) -> list[SavedStack]:
        """All, by name."""
        return self._store.list()

    @property
    def present(self) -> AdapterStack:
        """The stack on the bar, with the weights of what is switched off as 0."""
        return self._stack.stack

    def save(self, name: str, *, replace: bool = False) -> SavedStack:
        """Keep the stack on the bar. Raises WeftError: an empty name or stack, or a name that is taken."""
        saved = self._store.save(name, self.present, replace=replace)
        self.changed.emit()
        return saved

    def is_taken(self, name: str) -> bool:
        """Whether a stack bears this name."""
        folded = " ".join(name.split()).casefold()
        return any(saved.name.casefold() == folded for saved in self._store.list())

    def apply(self, saved: SavedStack) -> list[str]:
        """Put a saved stack on in place of the present one. Returns sentences about adapters that are gone."""
        return self._stack.replace_all(saved.stack)

    def rename(self, stack: int, name: str) -> None:
        """Raises WeftError: an empty name, or one that is taken."""
        self._store.rename(stack, name)
        self.changed.emit()

    def delete(self, stack: int) -> Callable[[], None] | None:
        """Forget one; returns what brings it back."""
        gone = self._store.delete(stack)
        self.changed.emit()
        if gone is None:
            return None

        def undo() -> None:
            self._store.save(gone.name, gone.stack, replace=True)
            self.changed.emit()

        return undo
