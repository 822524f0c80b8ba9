"""What becomes of adapters that are being added: progress, then a line for each."""

from __future__ import annotations

from pathlib import Path

from PySide6.QtCore import QObject, Signal, Slot

from app.core.adapter_import import ImportResult, Outcome
from app.viewmodels.adapter_import import AdapterImports, Imported, given, summary, words
from app.views.loras.results import Line, Results


class Arrivals(QObject):
    """Tells in `results` what `imports` do.

    Signals:
        show_wanted(str): show the adapter with this id.
    """

    show_wanted = Signal(str)

    def __init__(self, imports: AdapterImports, results: Results, parent: QObject) -> None:
        super().__init__(parent)
        self._imports = imports
        self._results = results
        imports.changed.connect(self._moved)
        imports.ended.connect(self._ended)
        results.cancelled.connect(imports.cancel)

    @Slot()
    def _moved(self) -> None:
        self._results.show_progress(self._imports.progress)

    @Slot(object)
    def _ended(self, found: Imported) -> None:
        heading, _ = summary(found)
        lines = [self._line(result, found) for result in found.results]
        if found.error is not None:
            lines.append(Line(name="Import", text=str(found.error), tone="negative"))
        self._results.add(heading, lines)
        if found.here:
            entry = found.here[0].entry
            assert entry is not None
            self.show_wanted.emit(entry.id)

    def _line(self, result: ImportResult, found: Imported) -> Line:
        text, tone = words(result)
        name = result.entry.name if result.entry is not None else Path(result.source).name
        line = Line(name=name, text=text, tone=tone, source=result.source)
        if result.outcome is Outcome.DUPLICATE:
            source, path = result.source, given(result.source, found.batch.paths)
            line.name = Path(source).name
            line.action, line.run = "Copy anyway", lambda: self._imports.add_again({source: path})
        elif result.entry is not None:
            adapter = result.entry.id
            line.action, line.run = "Show", lambda: self.show_wanted.emit(adapter)
        return line
