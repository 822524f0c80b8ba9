"""What the Chat page does while nothing else happens: imports what will be used soon, and empties the bin."""

from __future__ import annotations

import importlib
import logging
import threading

from PySide6.QtCore import QObject, QTimer, Slot

from app.store.chats import ChatStore
from app.viewmodels.background import Background

log = logging.getLogger("weft")
STEP_MS = 150
# What the first message needs and the first paint does not, in portions of some 20 ms; then the lexers.
_SOON = ("markdown_it", "pygments.lexers", "app.views.chat.message_view")


class WarmUp(QObject):
    """Runs once, in steps, from its `begin` on."""

    def __init__(self, store: ChatStore, parent: QObject) -> None:
        super().__init__(parent)
        self._store = store
        self._soon: list[str] | None = None  # what is still to be imported ahead of its use; None: not begun
        self._work = Background(self)
        self._work.done.connect(self._bin_emptied)

    def begin(self) -> None:
        """Begin, unless that was done before."""
        if self._soon is None:
            self._soon = list(_SOON)
            QTimer.singleShot(STEP_MS, self, self._step)

    def close(self) -> None:
        """The page is going: what runs in the background is waited for."""
        self._work.close()

    @Slot()
    def _step(self) -> None:
        if self._soon:
            importlib.import_module(self._soon.pop(0))
            QTimer.singleShot(STEP_MS if self._soon else 10 * STEP_MS, self, self._step)
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
