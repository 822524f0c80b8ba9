"""What can be made of adapters: others, by combining, resizing and converting; and what is the same twice."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

from PySide6.QtCore import QObject, Signal, Slot
from PySide6.QtWidgets import QWidget

from app.core.compatibility import same_base
from app.core.errors import ErrorKind, WeftError
from app.core.library import AdapterEntry, AdapterFormat, ModelEntry, ModelFormat
from app.store.database import Database
from app.store.library import LibraryStore
from app.viewmodels.adapter_facts import find_duplicates
from app.viewmodels.adapter_jobs import AdapterJobs, Made
from app.viewmodels.adapter_stack import StackModel
from app.viewmodels.adapter_table import AdapterTable
from app.viewmodels.background import Background
from app.views.loras.combine_sheet import CombineSheet
from app.views.loras.results import Line, Results
from app.views.loras.sheets import ConvertSheet

CONVERTIBLE = 40  # models that are offered


class Making(QObject):
    """Asks what is to be made, begins the jobs, and tells in `results` how they end.

    Signals:
        failed(WeftError). sheet_wanted(QDialog): open it. show_wanted(str): show the adapter with this id.
        coming(str): an adapter with this id was made, and is about to be indexed.
    """

    failed = Signal(object)
    sheet_wanted = Signal(object)
    show_wanted = Signal(str)
    coming = Signal(str)

    def __init__(
        self,
        window: QWidget,
        results: Results,
        jobs: AdapterJobs,
        stack: StackModel,
        library: LibraryStore,
        database: Database,
    ) -> None:
        super().__init__(window)
        self._window, self._results, self._jobs = window, results, jobs
        self._stack, self._library, self._database = stack, library, database
        self._stop_searching = threading.Event()
        self._searching = Background(self)
        self._searching.done.connect(self._duplicates_found)
        jobs.made.connect(self._made)

    def close(self) -> None:
        """End what runs in the background."""
        self._stop_searching.set()
        self._searching.close()

    def combine(self, entries: Sequence[AdapterEntry]) -> None:
        """Combine these; when that is one, with what is in the stack."""
        chosen = [(entry, 1.0) for entry in entries if not entry.problem]
        if len(chosen) < 2 and self._stack.entries:
            known = {entry.path for entry, _ in chosen}
            weights = {entry.path: entry.weight for entry in self._stack.entries}
            stacked = self._library.adapters_by_id(list(weights))
            chosen = [(e, weights.get(e.path, w)) for e, w in chosen]
            chosen += [(entry, weights[entry.path]) for entry in stacked if entry.path not in known]
        table = AdapterTable(self._library, self._database)
        bases = self._bases([entry for entry, _ in chosen])
        sheet = CombineSheet(self._jobs, chosen, table, bases=bases, parent=self._window.window())
        table.setParent(sheet)
        self.sheet_wanted.emit(sheet)

    def resize_rank(self, entry: AdapterEntry) -> None:
        """Bring an adapter to another rank."""
        bases = self._bases([entry])
        self.sheet_wanted.emit(
            CombineSheet(self._jobs, [(entry, 1.0)], None, resize=True, bases=bases, parent=self._window.window())
        )

    def _bases(self, entries: Sequence[AdapterEntry]) -> list[ModelEntry]:
        """Models that differences can be taken from, those that the adapters record as their base first."""
        plain = [m for m in self._library.models() if m.format in (ModelFormat.SAFETENSORS, ModelFormat.TORCH_BIN)]
        plain.sort(key=lambda model: not any(same_base(entry.base, model) for entry in entries))
        return plain[:CONVERTIBLE]

    def convert(self, entry: AdapterEntry, fitting: Sequence[ModelEntry]) -> None:
        """To GGUF, or from GGUF to PEFT. fitting: models that it fits, the best first."""
        back = entry.format is AdapterFormat.GGUF
        models = [model for model in fitting if not back or model.format is not ModelFormat.GGUF][:CONVERTIBLE]
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
            self._window.window(),
        )
        self.sheet_wanted.emit(sheet)

    @Slot(object)
    def _made(self, made: Made) -> None:
        line = Line(name=made.title, text=made.text, tone=made.tone)
        if made.path:
            line.action, line.run = "Show", lambda: self.show_wanted.emit(made.path)
            self.coming.emit(made.path)
        self._results.add(made.title, [line])

    # Duplicates -------------------------------------------------------------------------------------

    @Slot()
    def find_duplicates(self) -> None:
        """Look through the library for adapters that hold the same tensors under several names."""
        self._results.add("Looking for duplicates…", [])
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
            line.action, line.run = "Show", lambda adapter=group[0].id: self.show_wanted.emit(adapter)
            lines.append(line)
        if not lines:
            none = "No two adapters hold the same tensors."
            lines = [Line(name="Duplicates", text=none, tone="positive", source="duplicates")]
        self._results.add("Duplicates", lines)
