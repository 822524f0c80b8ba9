"""What the Chat page shows from its first look on, and where it lies: the list, the transcript, the composer."""

from __future__ import annotations

from PySide6.QtCore import Qt
from PySide6.QtWidgets import QFrame, QSplitter, QStackedLayout, QWidget

from app.viewmodels.chat_list import ConversationList
from app.views.chat.composer import Composer
from app.views.chat.conversation_list import ConversationPanel
from app.views.chat.style import GRID, INSET
from app.views.chat.transcript import Transcript
from app.views.chat.welcome import Welcome
from app.views.widgets import ElidedLabel, column, icon_button, row

SIDE_WIDTH = 248
PANEL_WIDTH = 320
UNBOUNDED = 16777215  # Qt's own greatest width


class ChatFrame:
    """The page's widgets, laid out in it.

    Attributes:
        side: the conversations. title: of the one in view. transcript, welcome: one of them is in view. composer: below them.
        side_button, find_button, panel_button: in the head.
        foot: what the composer stands in.
    """

    def __init__(self, model: ConversationList, page: QWidget) -> None:
        self.side = ConversationPanel(model)
        self.transcript = Transcript()
        self.welcome = Welcome()
        self.composer = Composer()
        self.title = ElidedLabel("")
        self.side_button = icon_button("side-bar", "Show or hide the chats", shortcut="Ctrl+B")
        self.find_button = icon_button("search", "Find in this chat", shortcut="Ctrl+F")
        self.panel_button = icon_button("side-panel", "System prompt and sampling", shortcut="Ctrl+Shift+B")
        self.foot = QWidget()
        self._middle = QWidget()
        self._stack = QStackedLayout(self._middle)
        self._stack.addWidget(self.transcript)
        self._stack.addWidget(self.welcome)
        self._splitter = QSplitter(Qt.Orientation.Horizontal)
        self._splitter.setHandleWidth(1)
        self._splitter.setChildrenCollapsible(False)
        for widget, least, most in ((self.side, 200, 420), (self._centre(), 320, UNBOUNDED)):
            widget.setMinimumWidth(least)
            widget.setMaximumWidth(most)
            self._splitter.addWidget(widget)
        self._splitter.setStretchFactor(1, 1)
        self._splitter.setSizes([SIDE_WIDTH, 920])
        column(self._splitter, spacing=0, parent=page)

    def _centre(self) -> QFrame:
        head = QFrame()
        head.setObjectName("pageHeader")
        row(
            self.side_button,
            self.title,
            self.find_button,
            self.panel_button,
            margins=(8, 4, 8, 4),
            spacing=4,
            parent=head,
        )
        foot = row(0, self.composer, 0, margins=(0, 0, 0, 4), spacing=0, parent=self.foot)
        foot.setStretch(0, 1)
        foot.setStretch(2, 1)
        centre = QFrame()
        centre.setObjectName("chatCentre")
        column(head, self._middle, self.foot, spacing=0, parent=centre).setStretch(1, 1)
        centre.setAutoFillBackground(True)
        centre.setBackgroundRole(self.transcript.viewport().backgroundRole())
        return centre

    def show_messages(self, there_are: bool) -> None:
        """Have the transcript in view, or the welcome of a chat without messages."""
        self._stack.setCurrentWidget(self.transcript if there_are else self.welcome)

    def add_panel(self, panel: QWidget) -> None:
        """Put the side panel beside the transcript, hidden."""
        panel.setMinimumWidth(280)
        panel.setMaximumWidth(480)
        side, centre = self._splitter.sizes()
        self._splitter.addWidget(panel)
        self._splitter.setSizes([side, centre - PANEL_WIDTH, PANEL_WIDTH])
        panel.hide()

    def fit_composer(self) -> None:
        """As wide as the text column, and a little wider."""
        room = self.foot.width() - 2 * GRID
        self.composer.setFixedWidth(max(240, min(room, self.transcript.style_in_use.column + 2 * INSET + 2 * GRID)))
