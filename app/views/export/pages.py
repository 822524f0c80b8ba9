"""Pages one at a time, as high as the shown one is, which scrolls where the screen is too small for it."""

from __future__ import annotations

from PySide6.QtCore import Qt, Slot
from PySide6.QtWidgets import QFrame, QScrollArea, QStackedWidget, QWidget


class FittedPages(QStackedWidget):
    """A stack whose pages scroll."""

    def __init__(self, *pages: QWidget, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self._pages = pages
        for page in pages:
            self.addWidget(_Scroll(page))

    def wanted(self, width: int) -> int:
        """The height that shows all of the current page at a width."""
        page = self._pages[self.currentIndex()]
        layout = page.layout()
        if layout is None:
            return page.sizeHint().height()
        layout.activate()
        return layout.totalHeightForWidth(width) if layout.hasHeightForWidth() else layout.totalSizeHint().height()


class _Scroll(QScrollArea):
    def __init__(self, page: QWidget) -> None:
        super().__init__()
        self.setWidgetResizable(True)
        self.setFrameShape(QFrame.Shape.NoFrame)
        self.setHorizontalScrollBarPolicy(Qt.ScrollBarPolicy.ScrollBarAlwaysOff)
        self.setFocusPolicy(Qt.FocusPolicy.NoFocus)
        self.setWidget(page)
        for ground in (page, self.viewport()):
            ground.setAutoFillBackground(False)
        self.verticalScrollBar().rangeChanged.connect(self._reach)

    @Slot(int, int)
    def _reach(self, _least: int, most: int) -> None:
        """The keys scroll what does not fit; nothing stops at what does."""
        self.setFocusPolicy(Qt.FocusPolicy.TabFocus if most else Qt.FocusPolicy.NoFocus)
