"""What the LoRAs page can make of adapters: others, by combining, resizing and converting; and what is the same twice."""

from __future__ import annotations

import threading
from pathlib import Path

from PySide6.QtCore import Slot
from PySide6.QtWidgets import QDialog

from app.core.errors import ErrorKind, WeftError
from app.core.library import AdapterEntry, AdapterFormat, ModelFormat
from app.store.database import Database
from app.store.library import LibraryStore
from app.viewmodels.adapter_facts import find_duplicates
from app.viewmodels.adapter_jobs import AdapterJobs, Made
from app.viewmodels.adapter_stack import StackModel
from app.viewmodels.adapter_table import AdapterTable
from app.viewmodels.background import Background
from app.views.loras.combine_sheet import CombineSheet
from app.views.loras.details import AdapterDetails
from app.views.loras.results import Line, Results
from app.views.loras.sheets import ConvertSheet
from app.views.page import Page

CONVERTIBLE = 40  # models that are offered


class MakingPage(Page):
    """The part of the page that begins jobs and tells how they end. `LorasPage` makes the attributes."""

    _library: LibraryStore
    _database: Database
    _stack_model: StackModel
    _jobs: AdapterJobs
    _searching: Background
    _stop_searching: threading.Event
    _dialog: QDialog | None
    _wanted_path: str
    details: AdapterDetails
    results: Results

    @property
    def chosen(self) -> list[AdapterEntry]:
        """All that are selected, in the order of the table."""
        raise NotImplementedError

    def show_adapter(self, adapter: str) -> None:
        """Select an adapter and show its details, as soon as it is in the index."""
        raise NotImplementedError

    @Slot()
    def combine_selected(self) -> None:
        """Combine what is selected; when that is one, with what is in the stack."""
        chosen = [(entry, 1.0) for entry in self.chosen if not entry.problem]
        if len(chosen) < 2 and self._stack_model.entries:
            known = {entry.path for entry, _ in chosen}
            weights = {entry.path: entry.weight for entry in self._stack_model.entries}
            stacked = self._library.adapters_by_id(list(weights))
            chosen = [(e, weights.get(e.path, w)) for e, w in chosen]
            chosen += [(entry, weights[entry.path]) for entry in stacked if entry.path not in known]
        table = AdapterTable(self._library, self._database)
        sheet = CombineSheet(self._jobs, chosen, table, parent=self.window())
        table.setParent(sheet)
        self._show(sheet)

    def resize_rank(self, entry: AdapterEntry) -> None:
        """Bring an adapter to another rank."""
        self._show(CombineSheet(self._jobs, [(entry, 1.0)], None, resize=True, parent=self.window()))

    def convert(self, entry: AdapterEntry) -> None:
        """To GGUF, or from GGUF to PEFT."""
        back = entry.format is AdapterFormat.GGUF
        ranked = self.details.ranked if self.details.entry is not None and self.details.entry.id == entry.id else []
        models = [each.model for each in ranked if not back or each.model.format is not ModelFormat.GGUF][:CONVERTIBLE]
        if not models:
            what = "a safetensors model that it fits" if back else "a model that it fits"
            hint = "Its headers say how the matrices are named and ordered. Download it, then convert."
            self.failed.emit(WeftError(ErrorKind.NOT_FOUND, f"The library needs {what} to convert {entry.name}.", hint))
            return
        suffix = "" if back else ".gguf"
        text = (
            "A PEFT folder for transformers and most trainers; the numbers keep their bits."
            if back
            else "A .gguf adapter for llama.cpp and programs that are built on it, for this model and its quantizations."
        )
        sheet = ConvertSheet(
            f"Convert {entry.name} to {'PEFT' if back else 'GGUF'}",
            text,
            models,
            self._jobs.free_name(Path(entry.path).stem if back else entry.name.rpartition("/")[2], suffix),
            lambda name: self._jobs.refusal(name, suffix),
            lambda model, name: self._jobs.convert(entry, model, name),
            self.window(),
        )
        self._show(sheet)

    def _show(self, sheet: QDialog) -> None:
        self._dialog = sheet
        sheet.open()

    @Slot(object)
    def _made(self, made: Made) -> None:
        line = Line(name=made.title, text=made.text, tone=made.tone)
        if made.path:
            line.action, line.run = "Show", lambda: self.show_adapter(made.path)
            self._wanted_path = made.path
        self.results.add(made.title, [line])

    @Slot()
    def find_duplicates(self) -> None:
        """Look through the library for adapters that hold the same tensors under several names."""
        self.results.add("Looking for duplicates…", [])
        database = self._database
        self._searching.run("duplicates", lambda: find_duplicates(database, self._stop_searching.is_set))

    @Slot(object, object, object)
    def _duplicates_found(self, _key: object, found: object, error: object) -> None:
        if isinstance(error, WeftError):
            if error.kind is not ErrorKind.CANCELLED:
                self.failed.emit(error)
            return
        groups = found if isinstance(found, list) else []
        lines: list[Line] = []
        for group in groups:
            names = ", ".join(entry.name for entry in group[1:])
            line = Line(name=group[0].name, text=f"The same tensors as {names}.", source=f"duplicates {group[0].id}")
            line.action, line.run = "Show", lambda adapter=group[0].id: self.show_adapter(adapter)
            lines.append(line)
        if not lines:
            lines = [
                Line(
                    name="Duplicates",
                    text="No two adapters hold the same tensors.",
                    tone="positive",
                    source="duplicates",
                )
            ]
        self.results.add("Duplicates", lines)
