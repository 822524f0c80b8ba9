"""Putting an adapter on the loaded model, or loading a model that it fits."""

from __future__ import annotations

from pathlib import Path

from PySide6.QtCore import QObject, Qt, Signal, Slot
from PySide6.QtWidgets import QMenu

from app.core.library import AdapterEntry, ModelEntry
from app.viewmodels.adapter_stack import StackModel
from app.viewmodels.loadout import Loadout
from app.views.icons import icon
from app.views.loras.details import AdapterDetails
from app.views.page import Notice

OFFERED = 8  # models, of those that it fits


class Using(QObject):
    """What Use does.

    Args:
        details: know how the adapter that is shown fits.

    Signals:
        notice(Notice), alpha_wanted(AdapterEntry): it must be said first.
    """

    notice = Signal(object)
    alpha_wanted = Signal(object)

    def __init__(self, loadout: Loadout, stack: StackModel, details: AdapterDetails, parent: QObject) -> None:
        super().__init__(parent)
        self._loadout = loadout
        self._stack = stack
        self._details = details

    @Slot(object)
    def use(self, entry: AdapterEntry) -> None:
        """Add it to the stack of the loaded model, or offer the models that it fits; take it out when it is in."""
        model = self._loadout.model
        fit = self._details.fit_with(entry, model)
        misfits = fit is not None and fit.compatibility.matched == 0
        if self._stack.holds(entry.path):
            self._stack.remove(entry.path)
        elif entry.needs_alpha:
            self.alpha_wanted.emit(entry)
        elif self._loadout.takes_adapters and not misfits:
            self._join(entry)
        else:
            self._offer_bases(entry)

    @Slot(object, object)
    def use_with(self, entry: AdapterEntry, model: ModelEntry) -> None:
        """Load a model, and put the adapter into its stack."""
        now = self._loadout
        if not (now.is_loaded and now.model is not None and now.model.id == model.id):
            now.load(model)
        if now.model is not None and now.model.id == model.id:  # else it asks first, or refused
            self._join(entry)

    def _join(self, entry: AdapterEntry) -> None:
        if not self._stack.add(Path(entry.path), entry.name):
            return
        model = self._loadout.model
        where = f" of {model.name}" if model is not None else ""
        partly, fit = "", self._details.fit_with(entry, model)
        if fit is not None and fit.compatibility.matched < fit.compatibility.total:
            found = fit.compatibility
            partly = f" Only {found.matched:,} of its {found.total:,} modules match; the details say why."
        undo = entry.path
        self.notice.emit(
            Notice(
                text=f"{entry.name} is in the stack{where}.{partly}",
                tone="warning" if partly else "positive",
                action="Take out",
                run=lambda: self._stack.remove(undo),
            )
        )

    def _offer_bases(self, entry: AdapterEntry) -> None:
        ranked = self._details.ranked_for(entry)
        if not ranked:
            self._say_no_base(entry)
            return
        menu = QMenu(self._details)
        menu.setAttribute(Qt.WidgetAttribute.WA_DeleteOnClose)
        menu.addAction("Load a model that it fits").setEnabled(False)
        for each in ranked[:OFFERED]:
            found = each.compatibility
            text = f"{each.model.name}  ({found.matched:,} of {found.total:,})".replace("&", "&&")
            menu.addAction(icon("load"), text, lambda _=False, model=each.model: self.use_with(entry, model))
        anchor = self._details.use
        menu.popup(anchor.mapToGlobal(anchor.rect().bottomLeft()))

    def _say_no_base(self, entry: AdapterEntry) -> None:
        loaded = self._loadout.model if self._loadout.takes_adapters else None
        first = f"It does not fit {loaded.name}" if loaded is not None else "No model is loaded"
        text = f"{first}, and the library has none that {entry.name} fits."
        if entry.base:
            text += f" It records {entry.base} as its base."
        self.notice.emit(Notice(text=text, tone="warning"))
