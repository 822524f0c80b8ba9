"""What a model's file says, in its details: the header and the chat template, read when one of them is open."""

from __future__ import annotations

from PySide6.QtCore import Slot
from PySide6.QtWidgets import QWidget

from app.core.library import ModelEntry
from app.viewmodels.background import Background
from app.viewmodels.model_facts import ModelFacts, read_facts
from app.views.dialogs import text_box
from app.views.widgets import Fold, column


class FileFolds(QWidget):
    """Two folds."""

    def __init__(self, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self._entry: ModelEntry | None = None
        self._shown = ""  # id of the model whose header it is
        self._background = Background(self)
        self._background.done.connect(self._read)
        self._header = text_box(name="The file's header")
        self._header.setMinimumHeight(240)
        self._template = text_box(name="Chat template")
        self._template.setMinimumHeight(200)
        self._folds = (Fold("Everything the file says", self._header), Fold("Chat template", self._template))
        column(*self._folds, spacing=12, parent=self)
        for fold in self._folds:
            fold.toggled.connect(self._look)

    def show_entry(self, entry: ModelEntry, *, other: bool) -> None:
        """Show this model's. other: it is another one than before."""
        self._entry = entry
        if other:
            self._header.clear()
            self._template.clear()
            self._shown = ""
        self._look(any(fold.header.isChecked() for fold in self._folds))

    def close_reading(self) -> None:
        """End the reading thread."""
        self._background.close()

    @Slot(bool)
    def _look(self, opened: bool) -> None:
        entry = self._entry
        if opened and entry is not None and self._shown != entry.id:
            self._shown = entry.id
            self._background.skip_waiting()
            self._background.run(entry.id, lambda: read_facts(entry))

    @Slot(object, object, object)
    def _read(self, key: object, result: object, error: object) -> None:
        if self._entry is None or key != self._entry.id:
            return
        facts = result if isinstance(result, ModelFacts) else ModelFacts(problem=str(error))
        lines = [facts.problem] if facts.problem else [f"{name} = {value}" for name, value in facts.facts]
        self._header.setPlainText("\n".join(lines))
        self._template.setPlainText(facts.template or "The model has no chat template. A plain one (ChatML) is used.")
