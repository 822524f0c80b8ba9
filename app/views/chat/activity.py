"""What the model does, and why nothing can be sent now: the line in the transcript, the reason beside the composer and its button."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from PySide6.QtCore import QObject, Signal, Slot

from app.core.jobs import Progress
from app.core.paths import resources
from app.viewmodels.chat import ChatController
from app.views.chat.frame import ChatFrame

if TYPE_CHECKING:
    from app.viewmodels.loadout import Loadout


class Activity(QObject):
    """Keeps the page's widgets at the state of the model.

    Args:
        pick_model: opens the model picker; without it the Models page is wanted.

    Signals:
        conversation_wanted(id), page_wanted(name): where the button beside the composer leads.
    """

    conversation_wanted = Signal(int)
    page_wanted = Signal(str)

    def __init__(
        self,
        controller: ChatController,
        loadout: Loadout,
        frame: ChatFrame,
        pick_model: Callable[[], object] | None,
        parent: QObject,
    ) -> None:
        super().__init__(parent)
        self._controller, self._loadout, self._frame = controller, loadout, frame
        self._pick_model = pick_model
        self._progress_text = ""
        loadout.progress.connect(self._progress)
        frame.composer.help_wanted.connect(self._help)

    @Slot()
    def show(self) -> None:
        """A generation began or ended, or the model's state changed."""
        controller, loadout, frame = self._controller, self._loadout, self._frame
        writing = bool(controller.writing)
        reason = "" if writing else controller.cannot_send()
        starter = loadout.model is not None and Path(loadout.model.path).is_relative_to(resources() / "starter")
        frame.composer.set_state(reason=reason, help_text=self._help_text(reason), writing=writing)
        frame.transcript.set_enabled(not controller.writing_conversation)
        frame.welcome.set_model(
            loadout.model.name if loadout.model else "", starter=starter, can_ask=not reason and not writing
        )
        if writing:
            self._show_doing()
        else:
            self._progress_text = ""  # of an answer that is over

    def _show_doing(self) -> None:
        """What the model does before the first word comes."""
        state = self._loadout.state.name
        name = self._loadout.model.name if self._loadout.model else "the model"
        if state in ("STARTING", "LOADING"):
            text = f"Loading {name}\N{HORIZONTAL ELLIPSIS}"
            if self._loadout.waiting_for:
                text = f"Waiting for the installation that {name} needs\N{HORIZONTAL ELLIPSIS}"
        elif self._controller.received:
            text = ""
        else:
            text = self._progress_text or "Reading\N{HORIZONTAL ELLIPSIS}"
        self._frame.transcript.set_activity(self._controller.writing, text)

    @Slot(int, object)
    def _progress(self, _id: int, progress: Progress) -> None:
        share = progress.fraction
        self._progress_text = progress.phase + (f" · {share:.0%}" if share is not None else "\N{HORIZONTAL ELLIPSIS}")
        if self._controller.writing:
            self._show_doing()

    def _help_text(self, reason: str) -> str:
        loadout = self._loadout
        if not reason:
            return ""
        if self._controller.writing_conversation:
            return "Go there"
        if loadout.state.name == "UNRESPONSIVE":
            return "End the engine"
        if loadout.model is None or loadout.state.name == "EMPTY":
            return "Choose a model"
        return ""

    @Slot()
    def _help(self) -> None:
        """The button beside the reason why nothing can be sent."""
        if self._controller.writing_conversation:
            self.conversation_wanted.emit(self._controller.writing_conversation)
        elif self._loadout.state.name == "UNRESPONSIVE":
            self._loadout.end_engine()
        elif self._pick_model is not None:
            self._pick_model()
        else:
            self.page_wanted.emit("models")
