"""Settings, Engines: a card per environment, with what it is for, its state and what can be done about it."""

from __future__ import annotations

from PySide6.QtCore import Signal, Slot
from PySide6.QtWidgets import QFrame, QWidget

from app import backends
from app.engine.environment_spec import EnvironmentSpec
from app.engine.environments import USABLE, EnvironmentState
from app.viewmodels.settings import EngineList
from app.viewmodels.units import readable_bytes
from app.views.theme import title_font
from app.views.widgets import Chip, button, column, label, row

_STATES = {
    EnvironmentState.MISSING: ("Not installed", "plain"),
    EnvironmentState.INCOMPLETE: ("Partly installed", "warning"),
    EnvironmentState.READY: ("Installed", "positive"),
    EnvironmentState.OUTDATED: ("Update available", "warning"),
    EnvironmentState.BROKEN: ("Broken", "negative"),
}


class EngineCard(QFrame):
    """One environment."""

    remove_wanted = Signal(str)

    def __init__(self, name: str, spec: EnvironmentSpec, engines: EngineList, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self.setObjectName("card")
        self.name = name
        self._spec = spec
        self._engines = engines
        heading = label(spec.title)
        heading.setFont(title_font(heading, 0))
        self._chip = Chip()
        loaders = ", ".join(s.title for s in backends.specs().values() if s.environment == name)
        summary = label(f"{spec.summary} Loaders: {loaders}." if loaders else spec.summary, tone="muted", wrap=True)
        self._size = label(tone="muted", wrap=True)
        self._problems = label(tone="warning", wrap=True)
        self.install = button("Install", self._install, kind="primary")
        self.cancel = button("Cancel", lambda: engines.cancel(name))
        self.repair = button("Repair", lambda: engines.install(name, repair=True), tip="Make it anew")
        self.remove = button("Remove", lambda: self.remove_wanted.emit(name), kind="danger")
        for made in (self.install, self.cancel, self.repair, self.remove):
            made.setAccessibleName(f"{made.text()} {spec.title}")
        top = row(heading, self._chip, 1, self.install, self.cancel, self.repair, self.remove)
        outer = column(spacing=4, margins=(16, 12, 16, 12), parent=self)
        outer.addLayout(top)
        for widget in (summary, self._size, self._problems):
            outer.addWidget(widget)
        self.refresh()

    def _install(self) -> None:
        self._engines.install(self.name)

    def refresh(self) -> None:
        """Show what there is."""
        state = self._engines.state(self.name)
        installing = self._engines.is_installing(self.name)
        removing = self._engines.is_removing(self.name)
        word, tone = ("Installing…", "plain") if installing else ("Removing…", "plain") if removing else _STATES[state]
        self._chip.set(word, tone)
        there = state in USABLE
        outside = self._engines.outside(self.name) if there else ""
        size = self._engines.size(self.name)
        about = f"About {readable_bytes(self._spec.bytes)} and {self._spec.minutes} minutes to install."
        if outside:
            self._size.setText(f"Uses {outside}, as the environment variable says.")
        elif state is EnvironmentState.MISSING or not size:
            self._size.setText(about if not there else "")
        else:
            self._size.setText(f"{readable_bytes(size)} on disk." + ("" if there else f" {about}"))
        self._size.setVisible(bool(self._size.text()))
        problems = self._engines.problems(self.name) if there else {}
        self._problems.setText(
            "\n".join(f"{part} could not be installed: {reason}" for part, reason in problems.items())
        )
        self._problems.setVisible(bool(problems))
        idle = not installing and not removing and not outside
        words = {EnvironmentState.OUTDATED: "Update", EnvironmentState.INCOMPLETE: "Go on"}
        self.install.setText(words.get(state, "Install"))
        self.install.setVisible(
            idle and state in (EnvironmentState.MISSING, EnvironmentState.INCOMPLETE, EnvironmentState.OUTDATED)
        )
        self.cancel.setVisible(installing)
        self.repair.setVisible(idle and (there or state is EnvironmentState.BROKEN))
        self.remove.setVisible(idle and state is not EnvironmentState.MISSING)


class EnginesSection(QWidget):
    """All environments."""

    remove_wanted = Signal(str)

    def __init__(self, engines: EngineList, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self.cards: dict[str, EngineCard] = {}
        layout = column(spacing=8, parent=self)
        for name, spec in engines.specs().items():
            card = EngineCard(name, spec, engines)
            card.remove_wanted.connect(self.remove_wanted)
            self.cards[name] = card
            layout.addWidget(card)
        engines.changed.connect(self.refresh)

    @Slot()
    def refresh(self) -> None:
        for card in self.cards.values():
            card.refresh()
