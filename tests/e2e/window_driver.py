"""Runs the real window and uses it from inside, for a test that watches from outside and may kill it at any time.

python -m tests.e2e.window_driver EVENTS stream   the starter model begins an answer that never ends
python -m tests.e2e.window_driver EVENTS reopen   the newest chat is opened, a new one is asked a question, Weft is closed

EVENTS is a file to which one JSON document per line is appended: what happened, and when (time.time()).
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PySide6.QtCore import QTimer, Slot
from PySide6.QtWidgets import QApplication

from app import bootstrap, house
from app.core.errors import WeftError
from app.store.library import starter
from app.viewmodels.loadout import LoadoutState

ENDLESS = r"root ::= [a-z] root"
QUESTION = "Tell me a story without an end."
SHORT = "How do I add a LoRA?"


class DrivenHouse(house.House):
    """The house, with somebody in it."""

    events: Path
    mode: str

    def open(self, arguments: Sequence[str] = ()) -> None:
        super().open(arguments)
        self.tell("opened")
        self.window.show_page("chat")
        self.chat: Any = self.window.page("chat")
        self.chat.controller.streamed.connect(self._streamed)
        self.chat.controller.failed.connect(self._failed)
        self.loadout.finished.connect(self._finished)
        self.loadout.failed.connect(self._answer_failed)
        self.loadout.load_failed.connect(self._failed)
        self.loadout.changed.connect(self._loadout_changed)
        self._asked = False
        QTimer.singleShot(200, self, self._begin)

    def tell(self, event: str, **facts: object) -> None:
        with self.events.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"event": event, "at": time.time(), **facts}) + "\n")

    @Slot()
    def _begin(self) -> None:
        if self.mode == "reopen":
            self.chat.open(self.chats.conversations()[0].id)
            self.tell("reopened", texts=[self.chat.controller.text(m.id) for m in self.chat.controller.path])
        # A context that an endless answer does not fill within the test.
        self.loadout.load(starter("starter (gguf)"), "llama_cpp", {"n_ctx": 16384}, anyway=True)

    @Slot()
    def _loadout_changed(self) -> None:
        if self.loadout.state is LoadoutState.READY and not self._asked:
            self._asked = True
            self.chat.new_chat()
            streaming = self.mode == "stream"
            self.chat.controller.set_sampling({"grammar": ENDLESS} if streaming else {"temperature": 0.0})
            self.chat.composer.set_text(QUESTION if streaming else SHORT)
            self.chat.send(self.chat.composer.text)

    @Slot(int, str)
    def _streamed(self, _message: int, text: str) -> None:
        self.tell("received", text=text)

    @Slot(object)
    def _failed(self, error: WeftError) -> None:
        self.tell("failed", kind=error.kind.value, message=error.message)

    @Slot(int, object)
    def _answer_failed(self, _id: int, error: WeftError) -> None:
        self.tell("answer failed", kind=error.kind.value, message=error.message)

    @Slot(int, object)
    def _finished(self, _id: int, result: Any) -> None:
        self.tell("finished", reason=result.finish_reason)
        if self.mode == "reopen":
            QTimer.singleShot(100, self, self.window.close)


def main(events: str, mode: str) -> int:
    DrivenHouse.events, DrivenHouse.mode = Path(events), mode
    house.House = DrivenHouse  # pyright: ignore[reportAttributeAccessIssue]
    assert QApplication.instance() is None
    return bootstrap.main([])


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
