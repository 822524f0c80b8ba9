"""The Chat page over the real loadout and a real (fake-brained) engine process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from pytestqt.qtbot import QtBot

from app.core.conversation import StoredMessage
from app.store.chats import ChatStore
from app.viewmodels.loadout import Loadout, LoadoutState
from app.views.chat.page import ChatPage
from tests.fakes.fake_engine import Script
from tests.qt.shell_parts import Rooms, model


class Parlour:
    def __init__(self, qtbot: QtBot) -> None:
        self.qtbot = qtbot
        self.rooms = Rooms.build()
        self.store = ChatStore(self.rooms.database)
        self.loadout: Loadout = self.rooms.loadout()
        self.page = ChatPage(self.store, self.loadout, self.rooms.settings)
        qtbot.addWidget(self.page)
        self.page.resize(1100, 700)
        self.page.show()

    def load(self, script: Script) -> None:
        self.rooms.script = script
        self.loadout.load(model())
        self.qtbot.waitUntil(lambda: self.loadout.state is LoadoutState.READY, timeout=20_000)

    def wait(self) -> StoredMessage:
        """Until the answer has ended."""
        self.qtbot.waitUntil(lambda: not self.page.controller.writing_conversation, timeout=20_000)
        return self.page.controller.path[-1]


@pytest.fixture
def parlour(qtbot: QtBot) -> Iterator[Parlour]:
    made = Parlour(qtbot)
    yield made
    made.page.shutdown()
    made.rooms.close()


def test_a_question_is_answered_and_the_next_one_too(parlour: Parlour) -> None:
    parlour.load(Script(answers=("A **LoRA** is small.", "Yes."), dropped_messages=0))
    parlour.page.send("What is a LoRA?")
    first = parlour.wait()
    assert first.content == "A **LoRA** is small." and first.complete
    assert first.statistics is not None and first.statistics.model == "maker/tiny-1B"
    assert first.statistics.finish_reason == "stop" and first.statistics.tokens > 0
    parlour.page.send("Really?")
    assert parlour.wait().content == "Yes."
    assert len(parlour.page.controller.path) == 4


def test_what_is_sent_while_the_model_loads_is_answered(parlour: Parlour) -> None:
    parlour.rooms.script = Script(load_seconds=0.5, answers=("Here I am.",))
    parlour.loadout.load(model())
    parlour.page.send("Are you there?")
    assert parlour.wait().content == "Here I am."


def test_stop_ends_a_long_answer_at_once(parlour: Parlour) -> None:
    parlour.load(Script(tokens=5000, rate=100))
    parlour.page.send("Go on for ever")
    parlour.qtbot.waitUntil(lambda: parlour.page.controller.received, timeout=10_000)
    parlour.page.composer._clicked()
    last = parlour.wait()
    assert last.content.startswith("word0") and last.statistics is not None
    assert last.statistics.finish_reason == "cancelled"


@pytest.mark.fault
def test_an_engine_that_dies_leaves_what_came_and_the_next_message_starts_it_again(parlour: Parlour) -> None:
    parlour.load(Script(tokens=50, rate=200, crash_at=12, crash="segv"))
    parlour.page.send("Crash, please")
    last = parlour.wait()
    assert last.content.startswith("word0 ") and not last.complete
    assert last.statistics is not None and last.statistics.finish_reason == "crashed"
    assert parlour.store.message(last.id).content == last.content
    error = parlour.page.controller.error(last.id)
    assert error is not None and error.hint
    parlour.rooms.script = Script(answers=("Back again.",))
    parlour.qtbot.waitUntil(lambda: not parlour.page.controller.cannot_send(), timeout=10_000)
    parlour.page.send("Are you back?")
    assert parlour.wait().content == "Back again."


@pytest.mark.fault
def test_quitting_in_the_middle_of_an_answer_saves_it(parlour: Parlour) -> None:
    parlour.load(Script(tokens=5000, rate=200))
    parlour.page.send("Go")
    parlour.qtbot.waitUntil(lambda: parlour.page.controller.received, timeout=10_000)
    seen = parlour.page.controller.text(parlour.page.controller.writing)
    id = parlour.page.controller.writing
    parlour.page.shutdown()
    assert parlour.store.message(id).content.startswith(seen) and seen
