"""Whether a model may run the Python code that it brings, in its details."""

from __future__ import annotations

from PySide6.QtCore import Signal
from PySide6.QtWidgets import QWidget

from app.core.errors import WeftError
from app.core.library import ModelEntry
from app.viewmodels.loadout import Loadout
from app.views.widgets import Banner, button


class OwnCodeBanner(Banner):
    """Shown for models with code of their own.

    Signals:
        code_wanted(ModelEntry): the files that would run are to be shown.
    """

    code_wanted = Signal(object)

    def __init__(self, loadout: Loadout, parent: QWidget | None = None) -> None:
        super().__init__("warning", parent=parent)
        self._planner = loadout.planner
        self._entry: ModelEntry | None = None
        self._answer = button("Review…", self._review, kind="link")
        self.add(self._answer)

    def show_entry(self, entry: ModelEntry | None) -> None:
        """Say how it stands with this model's code."""
        self._entry = entry
        needs = entry is not None and bool(entry.custom_code)
        self.setVisible(needs)
        if not needs or entry is None:
            return
        try:
            count = len(self._planner.code(entry).files)
        except WeftError as error:
            self.set_tone("warning")
            self.text.setText(f"{error.message} It does not run.")
            self._answer.hide()
            return
        self._answer.show()
        files = "1 Python file" if count == 1 else f"{count} Python files"
        if self._planner.trusts_code(entry):
            self.set_tone("info")
            self.text.setText(f"This model may run its own code ({files}), as you allowed.")
            self._answer.setText("Withdraw")
        else:
            self.set_tone("warning")
            self.text.setText(f"This model brings its own code ({files}). It does not run unless you allow it.")
            self._answer.setText("Review…")

    def _review(self) -> None:
        entry = self._entry
        if entry is None:
            return
        if self._planner.trusts_code(entry):
            self._planner.allow_code(entry, "")
            self.show_entry(entry)
        else:
            self.code_wanted.emit(entry)
