"""The Chat page: puts the list, the transcript, the composer and the panel together."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

from PySide6.QtCore import QCoreApplication, QEvent, Qt, QTimer, Slot
from PySide6.QtGui import QKeyEvent, QResizeEvent
from PySide6.QtWidgets import QWidget

from app.core.transcripts import TranscriptFormat
from app.store.chats import ChatStore
from app.store.settings import SettingsStore
from app.viewmodels.chat import ChatController
from app.viewmodels.chat_list import ConversationList
from app.viewmodels.chat_presets import Presets, Values
from app.views.chat.activity import Activity
from app.views.chat.commands import chat_commands
from app.views.chat.conversation_actions import ConversationActions
from app.views.chat.frame import ChatFrame
from app.views.chat.message_actions import MessageActions
from app.views.chat.panel_actions import PanelActions
from app.views.chat.transcript import Entry
from app.views.chat.warm_up import WarmUp
from app.views.page import Page, PaletteCommand
from app.views.trying import attempt, attempt_for
from app.views.widgets import action

if TYPE_CHECKING:
    from app.viewmodels.loadout import Loadout
    from app.views.chat.conversation_find import ConversationFind
    from app.views.chat.files import TranscriptFiles
    from app.views.chat.find import Finder
    from app.views.chat.find_bar import FindBar
    from app.views.chat.side_panel import SidePanel

NARROW = 900  # below this, list and panel are not shown together


class ChatPage(Page):
    """Talking to the loaded model. What the first look does not show is built when it is first wanted.

    Args:
        pick_model: opens the model picker of the loadout bar.
    """

    def __init__(
        self,
        store: ChatStore,
        loadout: Loadout,
        settings: SettingsStore,
        pick_model: Callable[[], object] | None = None,
        parent: QWidget | None = None,
    ) -> None:
        super().__init__(parent)
        self._store = store
        self.presets = Presets(settings)
        self._shown_conversation = -1
        self._warm_up = WarmUp(store, self)
        self.controller = ChatController(store, loadout, self.presets.of_new_chats, self)
        self.model = ConversationList(store, self)
        self._frame = frame = ChatFrame(self.model, self)
        self.side, self.transcript, self.welcome, self.composer = (
            frame.side,
            frame.transcript,
            frame.welcome,
            frame.composer,
        )
        self._title = frame.title
        self.setFocusProxy(self.composer.edit)
        self.messages = MessageActions(self.controller, frame, self)
        self.conversations = ConversationActions(self.controller, self.model, frame, self._leave, self)
        self.activity = Activity(self.controller, loadout, frame, pick_model, self)
        self._panels = PanelActions(self.controller, loadout, self.presets, self)
        self._connect()
        self._add_actions()
        application = QCoreApplication.instance()
        assert application is not None
        application.aboutToQuit.connect(self.shutdown)  # while the stores are still open
        self._refresh_list()
        self._opened()
        self._path_changed()
        self._activity_changed()
        if interrupted := attempt_for(self.controller.interrupted, 0, self.failed):
            self.open(interrupted)

    # Building ---------------------------------------------------------------------------------------

    @cached_property
    def panel(self) -> SidePanel:
        """System prompt and sampling of this chat."""
        panel = self._panels.make()
        panel.noticed.connect(self.conversations.undoable)
        panel.closed.connect(self.toggle_panel)
        self._frame.add_panel(panel)
        return panel

    @cached_property
    def files(self) -> TranscriptFiles:
        """Import and export."""
        from app.views.chat.files import TranscriptFiles

        files = TranscriptFiles(self._store, self)
        files.notice.connect(self.notice)
        files.failed.connect(self.failed)
        files.imported.connect(self._imported)
        return files

    @cached_property
    def finding(self) -> ConversationFind:
        """Ctrl+F."""
        from app.views.chat.conversation_find import ConversationFind

        finding = ConversationFind(self.transcript, self.controller, self)
        finding.closed.connect(self.composer.edit.setFocus)
        return finding

    @property
    def find_bar(self) -> FindBar:
        return self.finding.bar

    @property
    def finder(self) -> Finder:
        return self.finding.finder

    def _has(self, part: str) -> bool:
        """Whether one of these was ever wanted."""
        return part in self.__dict__

    @property
    def _panel_shown(self) -> bool:
        return self._has("panel") and not self.panel.isHidden()

    def _connect(self) -> None:
        controller, frame = self.controller, self._frame
        frame.side_button.clicked.connect(self.toggle_side)
        frame.find_button.clicked.connect(self.find_in_page)
        frame.panel_button.clicked.connect(self.toggle_panel)
        controller.opened.connect(self._opened)
        controller.path_changed.connect(self._path_changed)
        controller.message_changed.connect(self._message_changed)
        controller.streamed.connect(self.transcript.feed)
        controller.activity_changed.connect(self._activity_changed)
        controller.conversations_changed.connect(self._refresh_list)
        controller.failed.connect(self.failed)
        self.messages.notice.connect(self.notice)
        self.conversations.notice.connect(self.notice)
        self.conversations.failed.connect(self.failed)
        self._panels.failed.connect(self.failed)
        self.activity.conversation_wanted.connect(self.open)
        self.activity.page_wanted.connect(self.page_wanted)
        self.composer.sent.connect(self.send)
        self.composer.stopped.connect(controller.stop)
        self.composer.draft_changed.connect(self._draft_changed)
        self.welcome.asked.connect(self.send)
        self.side.chosen.connect(self.open)
        self.side.new_wanted.connect(self.new_chat)
        self.side.export_wanted.connect(self._ask_export)
        self.side.import_wanted.connect(self.ask_import)

    def _add_actions(self) -> None:
        for text, run, shortcut in (
            ("New chat", self.new_chat, "Ctrl+N"),
            ("Rename chat", self.conversations.rename_current, "F2"),
            ("System prompt and sampling", self.toggle_panel, "Ctrl+Shift+B"),
            ("Message before", partial(self.messages.walk, -1), "Alt+Up"),
            ("Message after", partial(self.messages.walk, 1), "Alt+Down"),
            ("Answer again", self.messages.regenerate_last, "Ctrl+R"),
            ("Undo the last deletion", self.conversations.undos.undo, "Ctrl+Z"),
        ):
            made = action(self, text, run, shortcut)
            made.setShortcutContext(Qt.ShortcutContext.WidgetWithChildrenShortcut)

    # Page -------------------------------------------------------------------------------------------

    def entered(self) -> None:
        self._warm_up.begin()
        self._leave()  # a new chat keeps what is typed
        self.controller.defaults_changed()
        self._refresh_list()
        self.composer.edit.setFocus()

    def commands(self) -> list[PaletteCommand]:
        return chat_commands(self, partial(self.page_wanted.emit, "chat"))

    def toggle_side(self) -> None:
        self.side.setVisible(self.side.isHidden())
        if not self.side.isHidden() and self.width() < NARROW and self._panel_shown:
            self.panel.hide()

    def toggle_panel(self) -> None:
        """Show or hide the panel with the system prompt and sampling."""
        self.panel.setVisible(self.panel.isHidden())
        if not self.panel.isHidden():
            if self.width() < NARROW:
                self.side.hide()
            self.panel.system.setFocus()
        else:
            self.composer.edit.setFocus()

    @property
    def answer_in_view(self) -> bool:
        """Whether the conversation in view is the one being answered: then a failure is told there."""
        return bool(self.controller.writing)

    def foot_height(self) -> int:
        return self._frame.foot.height()

    @Slot()
    def shutdown(self) -> None:
        """The window closes: stop the answer, save what came and what is typed."""
        self._leave()
        self.controller.shutdown()
        if self._has("files"):
            self.files.wait()
        self._warm_up.close()

    # The conversation in view -----------------------------------------------------------------------

    def open(self, conversation: int) -> None:
        """Bring a conversation into view."""
        if conversation == self.controller.conversation_id:
            return
        self._leave()
        attempt(lambda: self.controller.open(conversation), self.failed)
        self.composer.edit.setFocus()

    @Slot()
    def new_chat(self) -> None:
        """Begin a chat."""
        self._leave()
        self.controller.new()
        self.side.set_current(0)
        self.composer.edit.setFocus()

    def _leave(self) -> None:
        """Keep what is typed here before another conversation comes into view."""
        self.composer.flush()
        self._panels.flush()

    @Slot(str)
    def send(self, text: str) -> None:
        """Send a message; the composer keeps it when that fails."""
        self.composer.flush()
        typed = self.composer.text
        if self.controller.send(text):
            if typed == text:
                self.composer.clear()
            self.transcript.jump_to_latest()
        else:
            self.composer.set_text(typed or text)
        self.composer.edit.setFocus()

    @Slot()
    def _opened(self) -> None:
        controller = self.controller
        began = self._shown_conversation == 0 and controller.conversation is not None and len(controller.path) <= 1
        self._shown_conversation = controller.conversation_id
        self._title.setText(controller.conversation.title if controller.conversation else "New chat")
        if not began:  # a new chat that got its first message keeps what is typed
            self.composer.set_text(attempt_for(controller.draft, "", self.failed))
        self.side.set_current(controller.conversation_id)
        if self._has("finding"):
            self.finding.close()
        self._jump = True

    @Slot()
    def _path_changed(self) -> None:
        entries = self._entries()
        self._frame.show_messages(bool(entries))
        jump, self._jump = self._jump, False
        self.transcript.set_entries(entries, enabled=not self.controller.writing_conversation, jump=jump)
        self._activity_changed()

    def _entries(self) -> list[Entry]:
        controller = self.controller
        path, writing = controller.path, controller.writing
        unseen = controller.unseen
        return [
            Entry(
                message=message,
                text=controller.text(message.id),
                writing=message.id == writing,
                error=controller.error(message.id),
                branches=controller.branches(message.id),
                marker=bool(unseen) and index == unseen,
            )
            for index, message in enumerate(path)
        ]

    @Slot(int)
    def _message_changed(self, message: int) -> None:
        entries = self._entries()
        if any(entry.marker for entry in entries):
            self.transcript.set_entries(entries, enabled=not self.controller.writing_conversation, jump=False)
            return
        for entry in entries:
            if entry.message.id == message:
                self.transcript.update_entry(entry)

    @Slot()
    def _activity_changed(self) -> None:
        self.activity.show()
        self.model.set_writing(self.controller.writing_conversation)

    # Conversations ----------------------------------------------------------------------------------

    @Slot()
    def _refresh_list(self) -> None:
        attempt(self.model.refresh, self.failed)
        self.side.set_current(self.controller.conversation_id)
        if self.controller.conversation is not None:
            self._title.setText(self.controller.conversation.title)

    @Slot(list, str)
    def _ask_export(self, conversations: list[int], form: str) -> None:
        self.files.ask_export(conversations, form)

    @Slot()
    def ask_import(self) -> None:
        self.files.ask_import()

    def export(self, conversations: list[int], form: TranscriptFormat, path: Path) -> None:
        """Write conversations to a file, in the background."""
        self.files.export(conversations, form, path)

    def import_(self, paths: list[Path]) -> None:
        """Read conversations from files, in the background."""
        self.files.import_(paths)

    @Slot(list)
    def _imported(self, ids: list[int]) -> None:
        self._refresh_list()
        if ids:
            self.open(ids[0])

    def accepts(self, paths: list[Path]) -> bool:
        return bool(paths) and all(path.suffix.lower() in (".json", ".jsonl", ".md", ".markdown") for path in paths)

    def take(self, paths: list[Path]) -> None:
        self.import_(paths)

    # Panel and drafts -------------------------------------------------------------------------------

    def apply_preset(self, values: Values) -> None:
        """Answer with this sampling from now on."""
        self._panels.apply(values)

    @Slot(str)
    def _draft_changed(self, text: str) -> None:
        attempt(lambda: self.controller.set_draft(text), self.failed)

    # Find -------------------------------------------------------------------------------------------

    def find_in_page(self) -> None:
        if self.controller.path:
            self.finding.open()

    # Events -----------------------------------------------------------------------------------------

    def keyPressEvent(self, event: QKeyEvent) -> None:
        if event.key() == Qt.Key.Key_Escape and self.controller.writing:
            self.controller.stop()
        elif event.key() == Qt.Key.Key_Escape and self._has("finding") and self.finding.close():
            pass
        else:
            super().keyPressEvent(event)

    def resizeEvent(self, event: QResizeEvent) -> None:
        super().resizeEvent(event)
        if event.size().width() < NARROW and self._panel_shown and not self.side.isHidden():
            self.side.hide()
        self._frame.fit_composer()
        QTimer.singleShot(0, self, self._settle)

    def showEvent(self, event: object) -> None:
        super().showEvent(event)  # type: ignore[arg-type]
        self._frame.fit_composer()

    @Slot()
    def _settle(self) -> None:
        self._frame.fit_composer()
        if self._has("finding"):
            self.finding.place()

    def changeEvent(self, event: QEvent) -> None:
        super().changeEvent(event)
        if event.type() in (QEvent.Type.PaletteChange, QEvent.Type.FontChange) and hasattr(self, "transcript"):
            QTimer.singleShot(0, self, self.transcript.restyle)
