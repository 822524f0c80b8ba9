"""What is done with the side panel: it is kept as the chat in view is, and the chat as is chosen there."""

from __future__ import annotations

from typing import TYPE_CHECKING

from PySide6.QtCore import QObject, Signal, Slot
from PySide6.QtWidgets import QWidget

from app.viewmodels.chat import ChatController
from app.viewmodels.chat_presets import Presets, Values
from app.views.trying import attempt

if TYPE_CHECKING:
    from app.viewmodels.loadout import Loadout
    from app.views.chat.side_panel import SidePanel


class PanelActions(QObject):
    """Does what the panel asks for. The panel itself comes with `make`, when it is first wanted.

    Signals:
        failed: as the page's.
    """

    failed = Signal(object)

    def __init__(self, controller: ChatController, loadout: Loadout, presets: Presets, page: QWidget) -> None:
        super().__init__(page)
        self._controller, self._loadout, self._presets = controller, loadout, presets
        self._panel: SidePanel | None = None
        controller.opened.connect(self._fill)
        controller.activity_changed.connect(self._serve)

    def make(self) -> SidePanel:
        """The panel, as the chat in view is."""
        from app.views.chat.side_panel import SidePanel

        self._panel = panel = SidePanel(self._presets)
        panel.system_changed.connect(self._set_system)
        panel.sampling_changed.connect(self._set_sampling)
        panel.failed.connect(self.failed)
        self._fill()
        self._serve()
        return panel

    def flush(self) -> None:
        """Keep what is typed there."""
        if self._panel is not None:
            self._panel.flush()

    def apply(self, values: Values) -> None:
        """Answer with this sampling from now on."""
        if self._panel is not None:
            self._panel.set_values(self._controller.system, values)
        self._set_sampling(values)

    @Slot()
    def _fill(self) -> None:
        if self._panel is not None:
            self._panel.defaults = self._presets.of_new_chats()
            self._panel.set_values(self._controller.system, self._controller.sampling)

    @Slot()
    def _serve(self) -> None:
        if self._panel is not None:
            self._panel.set_loaded(self._loadout.model, self._loadout.loader)

    @Slot(str)
    def _set_system(self, text: str) -> None:
        attempt(lambda: self._controller.set_system(text), self.failed)

    @Slot(dict)
    def _set_sampling(self, values: Values) -> None:
        attempt(lambda: self._controller.set_sampling(values), self.failed)
