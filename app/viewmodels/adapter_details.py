"""The adapter that is looked at: how it fits, which bases are best, what its files say, how large its changes are."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec
from PySide6.QtCore import QObject, QTimer, Signal, Slot

from app.core.adapter_plans import HealthPlan, HealthReport
from app.core.errors import ErrorKind, WeftError
from app.core.library import AdapterEntry, ModelEntry
from app.store.database import Database
from app.viewmodels.adapter_facts import AdapterFacts, read_adapter_facts, read_fit, read_ranked, read_troubles
from app.viewmodels.background import Background
from app.viewmodels.task_lane import TaskLane

if TYPE_CHECKING:
    from app.engine.client import EngineClient

AGAIN_MS = 500  # a scan tells of many changes
LOOKED_THROUGH = 512 << 20  # bytes: of larger ones only the child that measures reads all
MEASURE_MS = 300  # rows that are only passed by are not measured
_KEPT = 64


class AdapterStudy(QObject):
    """Reads one adapter at a time, in threads and in a child process.

    Args:
        make_client: makes the child that measures, not started; raises WeftError when no environment for it is installed.

    Signals:
        fit(Fit, or WeftError), ranked(list of Ranked, or WeftError), facts(AdapterFacts): about the adapter and model shown.
        troubles(list of sentences): zero, NaN and infinite tensors; follows a moment after.
        norms(HealthReport, or WeftError): its norms, which are measured when `want_norms` is on.
    """

    fit = Signal(object)
    ranked = Signal(object)
    facts = Signal(object)
    troubles = Signal(list)
    norms = Signal(object)

    def __init__(
        self, database: Database, make_client: Callable[[], EngineClient], parent: QObject | None = None
    ) -> None:
        super().__init__(parent)
        self._database = database
        self._make_client = make_client
        self._entry: AdapterEntry | None = None
        self._model: ModelEntry | None = None
        self._want_norms = False
        self._looked = ("", 0.0)
        self._measured: dict[tuple[str, float], HealthReport] = {}
        self._background = Background(self, threads=2)
        self._background.done.connect(self._read)
        self._lane = TaskLane(make_client, self)
        self._lane.answered.connect(self._answered)
        self._lane.failed.connect(self._failed)
        self._later = QTimer(self)
        self._later.setSingleShot(True)
        self._later.setInterval(MEASURE_MS)
        self._later.timeout.connect(self._measure)
        self._again = QTimer(self)
        self._again.setSingleShot(True)
        self._again.setInterval(AGAIN_MS)
        self._again.timeout.connect(self._rank)

    def show(self, entry: AdapterEntry | None, model: ModelEntry | None) -> None:
        """Look at this adapter beside this model."""
        same = self._entry is not None and entry is not None and self._is_same(entry)
        if not same:
            self._looked = ("", 0.0)
        self._entry = entry
        if not same:
            self._background.skip_waiting()
            self._lane.forget()
            self._later.stop()
        self.hold_against(model)
        if entry is None or same:
            return
        self._background.run(("facts", entry.id, ""), lambda: read_adapter_facts(entry))
        self._rank()
        self._later.start()

    def hold_against(self, model: ModelEntry | None) -> None:
        """Check the adapter against another model."""
        self._model = model
        entry = self._entry
        if entry is not None and model is not None:
            self._background.run(("fit", entry.id, model.id), lambda: read_fit(entry, model))

    def library_changed(self) -> None:
        """Models came or went: rank them anew, soon."""
        if not self._again.isActive():
            self._again.start()

    @Slot()
    def _rank(self) -> None:
        entry, database = self._entry, self._database
        if entry is not None:
            self._background.run(("ranked", entry.id, ""), lambda: read_ranked(database, entry))

    def want_norms(self, wanted: bool) -> None:
        """Whether norms are looked at: measuring reads all of an adapter's data."""
        self._want_norms = wanted
        if wanted and self._entry is not None:
            self._later.start()

    def close(self) -> None:
        """For the window's end."""
        self._later.stop()
        self._again.stop()
        self._lane.close()
        self._background.close()

    def _is_same(self, entry: AdapterEntry) -> bool:
        return self._entry is not None and self._entry.id == entry.id and self._entry.modified == entry.modified

    @Slot()
    def _measure(self) -> None:
        entry = self._entry
        if entry is None:
            return
        if entry.bytes <= LOOKED_THROUGH and not entry.problem and self._looked != (entry.id, entry.modified):
            self._looked = (entry.id, entry.modified)
            self._background.run(("troubles", entry.id, ""), lambda: read_troubles(entry))
        if self._want_norms:
            self._ask_norms(entry)

    def _ask_norms(self, entry: AdapterEntry) -> None:
        known = self._measured.get((entry.id, entry.modified))
        if known is not None:
            self.norms.emit(known)
        elif entry.problem:
            self.norms.emit(WeftError(ErrorKind.CORRUPT, "It cannot be read, so there is nothing to measure."))
        else:
            self._lane.ask((entry.id, entry.modified), "adapter_health", HealthPlan(path=entry.path))

    @Slot(object, object)
    def _answered(self, key: object, result: object) -> None:
        entry = self._entry
        report = msgspec.convert(result, HealthReport)
        assert isinstance(key, tuple)
        while len(self._measured) >= _KEPT:
            self._measured.pop(next(iter(self._measured)))
        self._measured[key] = report
        if entry is not None and key == (entry.id, entry.modified):
            self.norms.emit(report)

    @Slot(object, object)
    def _failed(self, key: object, error: object) -> None:
        if self._entry is not None and key == (self._entry.id, self._entry.modified):
            self.norms.emit(error)

    @Slot(object, object, object)
    def _read(self, key: object, result: object, error: object) -> None:
        assert isinstance(key, tuple)
        what, adapter, model = key
        if self._entry is None or adapter != self._entry.id:
            return
        found = result if error is None else error
        if what == "facts":
            self.facts.emit(found if isinstance(found, AdapterFacts) else AdapterFacts(problem=str(found)))
        elif what == "troubles":
            self.troubles.emit(result if isinstance(result, list) else [])
        elif what == "ranked":
            self.ranked.emit(found)
        elif self._model is not None and self._model.id == model:
            self.fit.emit(found)
