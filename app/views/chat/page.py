"""The Chat page: puts the list, the transcript, the composer and the panel together."""

from __future__ import annotations

import importlib
import logging
import threading
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from PySide6.QtCore import QCoreApplication, QEvent, QObject, Qt, QTimer, Slot
from PySide6.QtGui import QGuiApplication, QKeyEvent, QKeySequence, QResizeEvent
from PySide6.QtWidgets import QFrame, QSplitter, QStackedLayout, QWidget

from app.core.errors import WeftError
from app.core.jobs import Progress
from app.core.paths import resources
from app.core.transcripts import TranscriptFormat
from app.store.chats import ChatStore
from app.store.settings import SettingsStore
from app.viewmodels.background import Background
from app.viewmodels.chat import ChatController
from app.viewmodels.chat_list import ConversationList
from app.viewmodels.chat_presets import Presets, Values
from app.viewmodels.chat_reasoning import without_reasoning
from app.views.chat.composer import Composer
from app.views.chat.conversation_list import ConversationPanel
from app.views.chat.style import GRID, INSET
from app.views.chat.transcript import Entry, Transcript
from app.views.chat.welcome import Welcome
from app.views.page import Notice, Page, PaletteCommand
from app.views.widgets import ElidedLabel, action, column, icon_button, row

if TYPE_CHECKING:
    from app.viewmodels.loadout import Loadout
    from app.views.chat.conversation_find import ConversationFind
    from app.views.chat.files import TranscriptFiles
    from app.views.chat.find import Finder
    from app.views.chat.find_bar import FindBar
    from app.views.chat.side_panel import SidePanel

T = TypeVar("T")
log = logging.getLogger("weft")
SIDE_WIDTH = 248
PANEL_WIDTH = 320
NARROW = 900  # below this, list and panel are not shown together
# What the first message needs and the first paint does not, in portions of some 20 ms; then the lexers.
_SOON = ("markdown_it", "pygments.lexers", "app.views.chat.message_view")
WARM_UP_MS = 150
UNDOS = 20  # deletions that Ctrl+Z takes back


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
        self._store, self._loadout, self._settings = store, loadout, settings
        self._pick_model = pick_model
        self._presets = Presets(settings)
        self._shown_conversation = -1
        self._progress_text = ""
        self._undos: list[tuple[Callable[[], None], str]] = []  # with what was typed then
        self._soon: list[str] | None = None  # what is still to be imported ahead of its use; None: not begun
        self._work = Background(self)
        self._work.done.connect(self._bin_emptied)
        self.controller = ChatController(store, loadout, self._defaults, self)
        self.model = ConversationList(store, self)
        self._build()
        self._connect()
        self._add_actions()
        application = QCoreApplication.instance()
        assert application is not None
        application.aboutToQuit.connect(self.shutdown)  # while the stores are still open
        self._refresh_list()
        self._opened()
        self._path_changed()
        self._activity_changed()
        if interrupted := self._read(self.controller.interrupted, 0):
            self.open(interrupted)

    # Building ---------------------------------------------------------------------------------------

    def _build(self) -> None:
        self.side = ConversationPanel(self.model)
        self.transcript = Transcript()
        self.welcome = Welcome()
        self.composer = Composer()
        self._title = ElidedLabel("")
        self._side_button = icon_button("side-bar", "Show or hide the chats", shortcut="Ctrl+B")
        self._side_button.clicked.connect(self.toggle_side)
        self._panel_button = icon_button("side-panel", "System prompt and sampling", shortcut="Ctrl+Shift+B")
        self._panel_button.clicked.connect(self.toggle_panel)
        find = icon_button("search", "Find in this chat", shortcut="Ctrl+F")
        find.clicked.connect(self.find)
        head = QFrame()
        head.setObjectName("pageHeader")
        row(self._side_button, self._title, find, self._panel_button, margins=(8, 4, 8, 4), spacing=4, parent=head)
        middle = QWidget()
        self._stack = QStackedLayout(middle)
        self._stack.addWidget(self.transcript)
        self._stack.addWidget(self.welcome)
        centre = QFrame()
        centre.setObjectName("chatCentre")
        self._foot = QWidget()
        foot = row(0, self.composer, 0, margins=(0, 0, 0, 4), spacing=0, parent=self._foot)
        foot.setStretch(0, 1)
        foot.setStretch(2, 1)
        column(head, middle, self._foot, spacing=0, parent=centre).setStretch(1, 1)
        centre.setAutoFillBackground(True)
        centre.setBackgroundRole(self.transcript.viewport().backgroundRole())
        self._splitter = QSplitter(Qt.Orientation.Horizontal)
        self._splitter.setHandleWidth(1)
        self._splitter.setChildrenCollapsible(False)
        for widget, least, most in ((self.side, 200, 420), (centre, 320, 16777215)):
            widget.setMinimumWidth(least)
            widget.setMaximumWidth(most)
            self._splitter.addWidget(widget)
        self._splitter.setStretchFactor(1, 1)
        self._splitter.setSizes([SIDE_WIDTH, 920])
        column(self._splitter, spacing=0, parent=self)
        self.setFocusProxy(self.composer.edit)

    @cached_property
    def panel(self) -> SidePanel:
        """System prompt and sampling of this chat."""
        from app.views.chat.side_panel import SidePanel

        panel = SidePanel(self._presets)
        panel.setMinimumWidth(280)
        panel.setMaximumWidth(480)
        panel.system_changed.connect(self._set_system)
        panel.sampling_changed.connect(self._set_sampling)
        panel.failed.connect(self.failed)
        panel.noticed.connect(self._undoable)
        panel.closed.connect(self.toggle_panel)
        side, centre = self._splitter.sizes()
        self._splitter.addWidget(panel)
        self._splitter.setSizes([side, centre - PANEL_WIDTH, PANEL_WIDTH])
        panel.hide()
        self._fill_panel(panel)
        self._serve_panel(panel)
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
        controller, loadout = self.controller, self._loadout
        controller.opened.connect(self._opened)
        controller.path_changed.connect(self._path_changed)
        controller.message_changed.connect(self._message_changed)
        controller.streamed.connect(self.transcript.feed)
        controller.activity_changed.connect(self._activity_changed)
        controller.conversations_changed.connect(self._refresh_list)
        controller.undoable.connect(self._undoable)
        controller.failed.connect(self.failed)
        loadout.progress.connect(self._progress)
        self.transcript.requested.connect(self._requested)
        self.transcript.edited.connect(self._edited)
        self.transcript.link_activated.connect(self._link)
        self.composer.edit.installEventFilter(self)
        self.composer.sent.connect(self.send)
        self.composer.stopped.connect(controller.stop)
        self.composer.draft_changed.connect(self._draft_changed)
        self.composer.help_wanted.connect(self._help)
        self.welcome.asked.connect(self.send)
        self.side.chosen.connect(self.open)
        self.side.new_wanted.connect(self.new_chat)
        self.side.pin_wanted.connect(self._try2(controller.set_pinned))
        self.side.delete_wanted.connect(self._delete)
        self.side.export_wanted.connect(self._ask_export)
        self.side.import_wanted.connect(self._ask_import)
        self.model.renamed.connect(self._rename)

    def _add_actions(self) -> None:
        for text, run, shortcut in (
            ("New chat", self.new_chat, "Ctrl+N"),
            ("Rename chat", self._rename_current, "F2"),
            ("System prompt and sampling", self.toggle_panel, "Ctrl+Shift+B"),
            ("Message before", lambda: self._walk(-1), "Alt+Up"),
            ("Message after", lambda: self._walk(1), "Alt+Down"),
            ("Answer again", self._regenerate_last, "Ctrl+R"),
            ("Undo the last deletion", self._undo, "Ctrl+Z"),
        ):
            made = action(self, text, run, shortcut)
            made.setShortcutContext(Qt.ShortcutContext.WidgetWithChildrenShortcut)

    # Page -------------------------------------------------------------------------------------------

    def entered(self) -> None:
        if self._soon is None:
            self._soon = list(_SOON)
            QTimer.singleShot(WARM_UP_MS, self, self._warm_up)
        self._leave()  # a new chat keeps what is typed
        self.controller.defaults_changed()
        self._refresh_list()
        self.composer.edit.setFocus()

    @Slot()
    def _warm_up(self) -> None:
        """Import what will be used soon, while nothing else happens."""
        if self._soon:
            importlib.import_module(self._soon.pop(0))
            QTimer.singleShot(WARM_UP_MS if self._soon else 10 * WARM_UP_MS, self, self._warm_up)
            return
        from app.views.chat.highlight import warm_up

        # Importing a lexer takes up to a tenth of a second: not when the first code block comes.
        threading.Thread(target=warm_up, name="lexers", daemon=True).start()
        self._work.run("bin", self._empty_bin)

    def _empty_bin(self) -> int:  # in a thread
        try:
            return self._store.purge()
        finally:
            self._store.release()

    @Slot(object, object, object)
    def _bin_emptied(self, _key: object, count: object, error: object) -> None:
        # Nobody asked for it: a full disk is not worth a dialog here. The next start tries again.
        if error is not None:
            log.warning("Old chats in the bin could not be deleted: %s", error)
        elif count:
            log.info("%s old chats and messages in the bin were deleted for good", count)

    def commands(self) -> list[PaletteCommand]:
        busy = bool(self.controller.writing_conversation)
        found = [
            PaletteCommand(
                title="New chat", group="Chat", run=self._come_and(self.new_chat), shortcut="Ctrl+N", icon="plus"
            ),
            PaletteCommand(title="Import chats…", group="Chat", run=self._come_and(self._ask_import), icon="import"),
            PaletteCommand(
                title="Stop the answer",
                group="Chat",
                run=self.controller.stop,
                shortcut="Esc",
                icon="stop",
                enabled=busy,
            ),
            PaletteCommand(
                title="System prompt and sampling",
                group="Chat",
                run=self._come_and(self.toggle_panel),
                shortcut="Ctrl+Shift+B",
                icon="side-panel",
            ),
        ]
        for name, values in self._presets.all().items():
            found.append(
                PaletteCommand(
                    title=f"Sampling: {name}",
                    group="Preset",
                    run=lambda values=values: self._apply_preset(values),
                    icon="settings",
                )
            )
        for conversation in self.model.conversations[:200]:
            found.append(
                PaletteCommand(
                    title=conversation.title,
                    group="Chat",
                    run=self._come_and(lambda id=conversation.id: self.open(id)),
                    icon="chat",
                )
            )
        return found

    def _come_and(self, run: Callable[[], object]) -> Callable[[], None]:
        def go() -> None:
            self.page_wanted.emit("chat")
            run()

        return go

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
        return self._foot.height()

    @Slot()
    def shutdown(self) -> None:
        """The window closes: stop the answer, save what came and what is typed."""
        self._leave()
        self.controller.shutdown()
        if self._has("files"):
            self.files.wait()
        self._work.close()

    # The conversation in view -----------------------------------------------------------------------

    def _defaults(self) -> tuple[str, Values]:  # what a new chat begins with
        settings = self._settings.settings
        values = self._presets.all().get(settings.sampling, {}) if hasattr(self, "_presets") else {}
        return settings.system_prompt, dict(values)

    def open(self, conversation: int) -> None:
        """Bring a conversation into view."""
        if conversation == self.controller.conversation_id:
            return
        self._leave()
        self._try(lambda: self.controller.open(conversation))
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
        if self._has("panel"):
            self.panel.flush()

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
            self.composer.set_text(self._read(controller.draft, ""))
        if self._has("panel"):
            self._fill_panel(self.panel)
        self.side.set_current(controller.conversation_id)
        if self._has("finding"):
            self.finding.close()
        self._jump = True

    def _fill_panel(self, panel: SidePanel) -> None:
        panel.defaults = self._defaults()
        panel.set_values(self.controller.system, self.controller.sampling)

    def _serve_panel(self, panel: SidePanel) -> None:
        loader = self._loadout.loader
        panel.set_served(loader.sampling if loader else None, f"{loader.title} does not have it." if loader else "")

    @Slot()
    def _path_changed(self) -> None:
        entries = self._entries()
        self._stack.setCurrentWidget(self.transcript if entries else self.welcome)
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
        controller, loadout = self.controller, self._loadout
        writing = bool(controller.writing)
        reason = "" if writing else controller.cannot_send()
        starter = loadout.model is not None and Path(loadout.model.path).is_relative_to(resources() / "starter")
        self.composer.set_state(reason=reason, help_text=self._help_text(reason), writing=writing)
        self.transcript.set_enabled(not controller.writing_conversation)
        self.welcome.set_model(
            loadout.model.name if loadout.model else "", starter=starter, can_ask=not reason and not writing
        )
        self.model.set_writing(controller.writing_conversation)
        if self._has("panel"):
            self._serve_panel(self.panel)
        if writing:
            self._show_activity()

    def _show_activity(self) -> None:
        """What the model does before the first word comes."""
        state = self._loadout.state.name
        name = self._loadout.model.name if self._loadout.model else "the model"
        if state in ("STARTING", "LOADING"):
            text = f"Loading {name}\N{HORIZONTAL ELLIPSIS}"
            if self._loadout.waiting_for:
                text = f"Waiting for the installation that {name} needs\N{HORIZONTAL ELLIPSIS}"
        elif self.controller.received:
            text = ""
        else:
            text = self._progress_text or "Reading\N{HORIZONTAL ELLIPSIS}"
        self.transcript.set_activity(self.controller.writing, text)

    @Slot(int, object)
    def _progress(self, _id: int, progress: Progress) -> None:
        share = progress.fraction
        self._progress_text = progress.phase + (f" · {share:.0%}" if share is not None else "\N{HORIZONTAL ELLIPSIS}")
        if self.controller.writing:
            self._show_activity()

    def _help_text(self, reason: str) -> str:
        loadout = self._loadout
        if not reason:
            return ""
        if self.controller.writing_conversation:
            return "Go there"
        if loadout.state.name == "UNRESPONSIVE":
            return "End the engine"
        if loadout.model is None or loadout.state.name == "EMPTY":
            return "Choose a model"
        return ""

    @Slot()
    def _help(self) -> None:
        """The button beside the reason why nothing can be sent."""
        if self.controller.writing_conversation:
            self.open(self.controller.writing_conversation)
        elif self._loadout.state.name == "UNRESPONSIVE":
            self._loadout.end_engine()
        elif self._pick_model is not None:
            self._pick_model()
        else:
            self.page_wanted.emit("models")

    # What is done with messages ---------------------------------------------------------------------

    @Slot(int, str)
    def _requested(self, message: int, what: str) -> None:
        controller = self.controller
        if what == "copy":
            text = controller.text(message)
            role = controller.message(message).role
            QGuiApplication.clipboard().setText(without_reasoning(text) if role == "assistant" else text)
            self.notice.emit(Notice(text="Message copied."))
        elif what == "show":
            self.transcript.show_message(message)
        elif controller.writing_conversation:
            return
        elif what != "edit":
            # Its button goes or is disabled: the keyboard would land on whatever comes next.
            self.composer.edit.setFocus()
            self._change(message, what)

    def _change(self, message: int, what: str) -> None:
        controller = self.controller
        if what == "regenerate":
            controller.regenerate(message)
            self.transcript.jump_to_latest()
        elif what == "continue":
            controller.continue_(message)
        elif what == "delete":
            controller.delete_message(message)
        elif what in ("previous", "next"):
            controller.switch_branch(message, -1 if what == "previous" else 1)

    @Slot(int, str)
    def _edited(self, message: int, text: str) -> None:
        if self.controller.edit(message, text):
            self.composer.edit.setFocus()
        elif (view := self.transcript.view_of(message)) is not None:
            view.edit(text)  # nothing typed is lost

    def _regenerate_last(self) -> None:
        path = self.controller.path
        if path and not self.controller.writing_conversation:
            self._requested(path[-1].id, "regenerate")

    def _walk(self, step: int) -> None:
        """Move the keyboard from message to message."""
        current = next((view.message.id for view in self.transcript.views if view.hasFocus()), 0)
        target = self.transcript.neighbour(current, step)
        if target:
            self.transcript.focus_message(target)
        elif step > 0:
            self.composer.edit.setFocus()

    @Slot(str)
    def _link(self, target: str) -> None:
        from app.views.chat.link_dialog import LinkDialog

        LinkDialog(target, self).open()

    # Conversations ----------------------------------------------------------------------------------

    @Slot()
    def _refresh_list(self) -> None:
        self._try(self.model.refresh)
        self.side.set_current(self.controller.conversation_id)
        if self.controller.conversation is not None:
            self._title.setText(self.controller.conversation.title)

    @Slot(int, str)
    def _rename(self, conversation: int, title: str) -> None:
        # Later: the view is still closing its editor, and the list is about to be read again.
        QTimer.singleShot(0, self, lambda: self._try(lambda: self.controller.rename(conversation, title)))

    def _rename_current(self) -> None:
        focused = self.side.list.currentIndex() if self.side.list.hasFocus() else None
        row_ = self.model.conversation(focused.row()) if focused is not None and focused.isValid() else None
        id = row_.id if row_ is not None else self.controller.conversation_id
        if id:
            self.side.show()
            self.side.rename(id)

    @Slot(int)
    def _delete(self, conversation: int) -> None:
        self._leave()
        self._try(lambda: self.controller.delete(conversation))

    @Slot(str, object)
    def _undoable(self, text: str, undo: Callable[[], object]) -> None:
        def once() -> None:
            self._undos[:] = [entry for entry in self._undos if entry[0] is not once]
            self._try(undo)

        self._undos.append((once, self.composer.text))
        del self._undos[:-UNDOS]
        self.notice.emit(Notice(text=text, action="Undo", run=once))

    def _undo(self) -> None:
        """Take back the last deletion, as its toast does."""
        if self._undos:
            self._undos[-1][0]()

    def _undoes_typing(self) -> bool:
        """Whether Ctrl+Z in the composer belongs to its text: something was typed since the last deletion, or none is left."""
        if not self._undos:
            return True
        return self.composer.text != self._undos[-1][1] and self.composer.edit.document().isUndoAvailable()

    @Slot(list, str)
    def _ask_export(self, conversations: list[int], form: str) -> None:
        self.files.ask_export(conversations, form)

    @Slot()
    def _ask_import(self) -> None:
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

    @Slot(str)
    def _set_system(self, text: str) -> None:
        self._try(lambda: self.controller.set_system(text))

    @Slot(dict)
    def _set_sampling(self, values: Values) -> None:
        self._try(lambda: self.controller.set_sampling(values))  # type: ignore[arg-type]

    def _apply_preset(self, values: Values) -> None:
        if self._has("panel"):
            self.panel.set_values(self.controller.system, values)  # type: ignore[arg-type]
        self._set_sampling(values)

    @Slot(str)
    def _draft_changed(self, text: str) -> None:
        self._try(lambda: self.controller.set_draft(text))

    # Find -------------------------------------------------------------------------------------------

    def find_in_page(self) -> None:
        if self.controller.path:
            self.finding.open()

    # Events -----------------------------------------------------------------------------------------

    def eventFilter(self, watched: QObject, event: QEvent) -> bool:
        if (
            event.type() == QEvent.Type.ShortcutOverride
            and isinstance(event, QKeyEvent)
            and event.matches(QKeySequence.StandardKey.Undo)
            and not self._undoes_typing()
        ):
            event.ignore()  # the page's shortcut has it, not the text
            return True
        return super().eventFilter(watched, event)

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
        self._fit_composer()
        QTimer.singleShot(0, self, self._settle)

    def showEvent(self, event: object) -> None:
        super().showEvent(event)  # type: ignore[arg-type]
        self._fit_composer()

    @Slot()
    def _settle(self) -> None:
        self._fit_composer()
        if self._has("finding"):
            self.finding.place()

    def _fit_composer(self) -> None:
        """As wide as the text column, and a little wider."""
        room = self._foot.width() - 2 * GRID
        self.composer.setFixedWidth(max(240, min(room, self.transcript.style_in_use.column + 2 * INSET + 2 * GRID)))

    def changeEvent(self, event: QEvent) -> None:
        super().changeEvent(event)
        if event.type() in (QEvent.Type.PaletteChange, QEvent.Type.FontChange) and hasattr(self, "transcript"):
            QTimer.singleShot(0, self, self.transcript.restyle)

    # Helpers ----------------------------------------------------------------------------------------

    def _try(self, run: Callable[[], object]) -> None:
        try:
            run()
        except WeftError as error:
            self.failed.emit(error)

    def _try2(self, run: Callable[[int, bool], object]) -> Callable[[int, bool], None]:
        return lambda id, value: self._try(lambda: run(id, value))

    def _read(self, run: Callable[[], T], default: T) -> T:
        try:
            return run()
        except WeftError as error:
            self.failed.emit(error)
            return default
