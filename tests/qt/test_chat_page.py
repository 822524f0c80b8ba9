"""The Chat page as somebody uses it."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from PySide6.QtCore import QObject, Qt
from PySide6.QtGui import QGuiApplication
from PySide6.QtWidgets import QAbstractButton, QComboBox, QLineEdit, QPlainTextEdit, QTextEdit, QWidget
from pytestqt.qtbot import QtBot

from app.core.errors import ErrorKind, WeftError
from app.core.jobs import Progress
from app.core.library import ModelEntry, ModelFormat
from app.core.own_sampling import OwnSampling
from app.core.paths import resources
from app.store.chats import ChatStore
from app.store.database import Database
from app.store.settings import SettingsStore
from app.viewmodels.chat_list import ListRole
from app.viewmodels.loadout import LoadoutState
from app.viewmodels.settings import SettingsView
from app.views.chat.link_dialog import LinkDialog
from app.views.chat.page import ChatPage
from app.views.page import Notice
from app.views.settings.new_chats import NewChatsSection
from tests.fakes.fake_loadout import FakeLoadout


class Desk:
    """The page on a desk, with everything that it tells."""

    def __init__(self, qtbot: QtBot, folder: Path) -> None:
        self.qtbot, self.folder = qtbot, folder
        self.database = Database(folder / "weft.sqlite")
        self.store = ChatStore(self.database)
        self.settings = SettingsStore(folder / "settings.toml")
        self.loadout = FakeLoadout()
        self.notices: list[Notice] = []
        self.failures: list[WeftError] = []
        self.picked = 0
        self.page = self.open_page()

    def open_page(self) -> ChatPage:
        page = ChatPage(self.store, self.loadout, self.settings, self._pick)  # type: ignore[arg-type]
        page.notice.connect(self.notices.append)
        page.failed.connect(self.failures.append)
        self.qtbot.addWidget(page)
        page.resize(1100, 700)
        page.show()
        self.qtbot.waitExposed(page)
        page.composer.edit.setFocus()
        return page

    def _pick(self) -> None:
        self.picked += 1

    def type(self, text: str) -> None:
        self.qtbot.keyClicks(self.page.composer.edit, text)

    def press(self, key: Qt.Key, modifier: Qt.KeyboardModifier = Qt.KeyboardModifier.NoModifier) -> None:
        self.qtbot.keyClick(self.page.composer.edit, key, modifier)

    def ask(self, question: str, answer: str, **fields: object) -> None:
        assert self.page.controller.send(question)
        self.loadout.answer(answer, **fields)

    def view(self, at: int = -1) -> object:
        self.settle()
        return self.page.transcript.view_of(self.page.controller.path[at].id)

    def settle(self) -> None:
        self.qtbot.wait(30)
        self.qtbot.waitUntil(lambda: not any(v.view.busy and not v._writing for v in self.page.transcript.views))


@pytest.fixture
def desk(qtbot: QtBot, tmp_path: Path) -> Iterator[Desk]:
    made = Desk(qtbot, tmp_path)
    yield made
    made.page.shutdown()
    made.database.close()


def test_enter_sends_shift_enter_breaks_and_escape_stops(desk: Desk) -> None:
    desk.type("one")
    desk.press(Qt.Key.Key_Return, Qt.KeyboardModifier.ShiftModifier)
    desk.type("two")
    desk.press(Qt.Key.Key_Return)
    assert desk.loadout.requests[0].messages[-1].content == "one\ntwo"
    assert desk.page.composer.text == ""
    desk.loadout.say("half")
    desk.press(Qt.Key.Key_Escape)
    assert desk.loadout.cancelled == [1]
    desk.loadout.finish("cancelled")
    assert "Stopped" in desk.view().footer.statistics  # type: ignore[attr-defined]


def test_an_answer_streams_into_view_with_its_numbers(desk: Desk) -> None:
    desk.page.send("q")
    for piece in ("Some **bo", "ld** text", "\n\n```py\nx = 1", "\n```\n"):
        desk.loadout.say(piece)
        desk.qtbot.wait(40)
    desk.loadout.finish(tokens=12, seconds=2.2)
    view = desk.view()
    assert view.view.toPlainText() == "Some bold text\nx = 1"  # type: ignore[attr-defined]
    text = view.footer.statistics  # type: ignore[attr-defined]
    assert "Model · base · 12 tokens · 5.0 tokens/s · first token" in text


def test_the_next_answer_does_not_begin_with_how_far_the_last_one_was(desk: Desk) -> None:
    desk.page.send("one")
    desk.loadout.progress.emit(1, Progress(phase="Reading the prompt", done=9, total=10))
    assert desk.view()._activity == "Reading the prompt · 90%"  # type: ignore[attr-defined]
    desk.loadout.answer("1")
    desk.page.send("two")
    assert desk.view()._activity == "Reading…"  # type: ignore[attr-defined]


def test_the_button_in_the_head_finds(desk: Desk) -> None:
    desk.ask("where is it?", "here")
    (find,) = [b for b in desk.page.findChildren(QAbstractButton) if b.accessibleName() == "Find in this chat"]
    find.click()
    assert desk.page.find_bar.isVisible()


def test_reasoning_is_folded_with_its_time(desk: Desk) -> None:
    desk.page.send("q")
    desk.loadout.say("<think>secret ")
    desk.qtbot.wait(50)
    view = desk.view()
    assert view.reasoning.title.startswith("Thinking")  # type: ignore[attr-defined]
    desk.loadout.say("thoughts</think>answer")
    desk.loadout.finish()
    assert view.view.toPlainText() == "" or desk.view().view.toPlainText() == "answer"  # type: ignore[attr-defined]
    assert view.reasoning.title.startswith("Thought for")  # type: ignore[attr-defined]
    view.reasoning.set_open(True)  # type: ignore[attr-defined]
    desk.settle()
    assert view.reasoning.view.toPlainText() == "secret thoughts"  # type: ignore[attr-defined]
    desk.page.messages.requested(view.message.id, "copy")  # type: ignore[attr-defined]
    assert QGuiApplication.clipboard().text() == "answer"


def test_a_prompt_that_fails_stays_in_the_composer(desk: Desk) -> None:
    desk.loadout.refuse = WeftError(ErrorKind.ENVIRONMENT, "No engine.", "Install.")
    desk.type("precious")
    desk.press(Qt.Key.Key_Return)
    assert desk.page.composer.text == "precious" and desk.failures


def test_a_crash_shows_what_to_do_and_keeps_the_text(desk: Desk) -> None:
    desk.page.send("q")
    desk.loadout.say("received")
    desk.loadout.fail(WeftError(ErrorKind.CRASHED, "The engine crashed.", "Send again to start it anew."))
    view = desk.view()
    assert "received" in view.view.toPlainText()  # type: ignore[attr-defined]
    assert "what was received is kept" in view.footer.statistics  # type: ignore[attr-defined]
    assert "Send again" in view.banner.text.text()  # type: ignore[attr-defined]
    assert not [made for made in view.banner.findChildren(QAbstractButton) if made.text() == "Open log"]  # type: ignore[attr-defined]
    view._retry()  # type: ignore[attr-defined]
    assert desk.loadout.requests[-1].continue_last
    again = WeftError(ErrorKind.CRASHED, "The engine crashed.", "Send again.")
    again.log = Path("/logs/engine.log")  # type: ignore[attr-defined]
    desk.loadout.fail(again)
    buttons = {made.text() for made in desk.view().banner.findChildren(QAbstractButton)}  # type: ignore[attr-defined]
    assert buttons == {"Try again", "Open log"}


def test_drafts_survive_switching_and_restarting(desk: Desk) -> None:
    desk.ask("one", "1")
    first = desk.page.controller.conversation_id
    desk.type("draft in one")
    desk.page.new_chat()
    assert desk.page.composer.text == ""
    desk.type("draft in new")
    desk.page.open(first)
    assert desk.page.composer.text == "draft in one"
    desk.page.shutdown()
    again = desk.open_page()
    assert again.composer.text == "draft in new"
    again.open(first)
    assert again.composer.text == "draft in one"
    again.shutdown()


def test_without_a_model_the_reason_and_a_way_out_are_shown(desk: Desk) -> None:
    desk.loadout.set_state(LoadoutState.EMPTY, model=False)
    assert desk.page.composer.reason == "No model is loaded."
    desk.type("kept")
    desk.press(Qt.Key.Key_Return)
    assert desk.page.composer.text == "kept" and not desk.loadout.requests
    desk.page.composer._help.click()
    assert desk.picked == 1


def test_suggestions_stand_there_only_for_the_starter_model(desk: Desk) -> None:
    assert desk.page.welcome._questions.isHidden()
    assert desk.loadout.model is not None
    import msgspec

    desk.loadout.model = msgspec.structs.replace(desk.loadout.model, path=str(resources() / "starter" / "model"))
    desk.loadout.changed.emit()
    assert not desk.page.welcome._questions.isHidden()
    desk.page.welcome.buttons[0].click()
    assert desk.loadout.requests[0].messages[-1].content == "What is Weft?"


def test_edit_in_place_and_go_between_versions(desk: Desk) -> None:
    desk.ask("one", "1")
    view = desk.view(0)
    view._request("edit")  # type: ignore[attr-defined]
    view.editor._edit.setPlainText("uno")  # type: ignore[attr-defined]
    desk.qtbot.keyClick(view.editor._edit, Qt.Key.Key_Return, Qt.KeyboardModifier.ControlModifier)  # type: ignore[attr-defined]
    desk.loadout.answer("2")
    question = desk.view(0)
    assert question.footer._count.text() == "2/2"  # type: ignore[attr-defined]
    question.footer._previous.click()  # type: ignore[attr-defined]
    assert [m.content for m in desk.page.controller.path] == ["one", "1"]


def test_what_is_done_with_a_message_gives_the_keyboard_back_to_the_composer(desk: Desk) -> None:
    desk.ask("one", "1", reason="length")

    def click(name: str, at: int = -1) -> None:
        footer = desk.view(at).footer  # type: ignore[attr-defined]
        button = {"previous": footer._previous, "next": footer._next, **footer._buttons}[name]
        footer.set_actions(shown=True, stay=True, enabled=True, can_continue=True)
        button.setFocus()
        button.click()
        desk.qtbot.wait(20)
        assert desk.page.composer.edit.hasFocus(), name

    click("continue")
    desk.loadout.answer(" and more")
    assert desk.page.composer.edit.hasFocus()
    click("regenerate")
    desk.loadout.answer("2")
    assert desk.page.composer.edit.hasFocus()
    click("previous")
    click("next")
    click("delete")
    click("delete", 0)


def test_an_editor_that_is_given_up_changes_nothing(desk: Desk) -> None:
    desk.ask("one", "1")
    view = desk.view(1)
    view._request("edit")  # type: ignore[attr-defined]
    view.editor._edit.setPlainText("changed")  # type: ignore[attr-defined]
    desk.qtbot.keyClick(view.editor._edit, Qt.Key.Key_Escape)  # type: ignore[attr-defined]
    assert not view.editing and [m.content for m in desk.page.controller.path] == ["one", "1"]  # type: ignore[attr-defined]


def test_the_list_searches_all_text_groups_by_date_and_renames(desk: Desk) -> None:
    desk.ask("about zebras", "They have stripes.")
    desk.page.new_chat()
    desk.ask("about soup", "Lentils.")
    model = desk.page.model
    assert [model.data(model.index(row)) for row in range(model.rowCount())] == ["Today", "about soup", "about zebras"]
    desk.page.side.field.setText("strip")
    desk.qtbot.waitUntil(lambda: model.rowCount() == 2)
    assert model.conversations[0].title == "about zebras"
    desk.page.side.field.setText("")
    desk.qtbot.waitUntil(lambda: model.rowCount() == 3)
    desk.page.conversations.rename_current()
    editor = desk.page.side.list.findChild(QLineEdit)
    assert editor is not None
    editor.setText("Soup!")
    desk.qtbot.keyClick(editor, Qt.Key.Key_Return)
    desk.qtbot.waitUntil(lambda: model.conversations[0].title == "Soup!")
    desk.page.controller.set_pinned(model.conversations[1].id, True)
    assert model.data(model.index(0)) == "Pinned" and model.data(model.index(1), ListRole.PINNED)


def test_deleting_a_chat_offers_undo(desk: Desk) -> None:
    desk.ask("one", "1")
    id = desk.page.controller.conversation_id
    desk.page.conversations.delete(id)
    assert desk.page.model.rowCount() == 0
    undo = desk.notices[-1]
    assert undo.action == "Undo" and undo.run is not None
    undo.run()
    assert desk.page.controller.conversation_id == id


def test_ctrl_z_takes_back_deletions_and_typing_in_their_order(desk: Desk) -> None:
    desk.ask("one", "1")
    control = Qt.KeyboardModifier.ControlModifier
    path = [message.content for message in desk.page.controller.path]
    id = desk.page.controller.conversation_id
    desk.type("draft")
    desk.view(0).footer.requested.emit("delete")  # type: ignore[attr-defined]
    assert not desk.page.controller.path
    desk.type(" more")
    desk.press(Qt.Key.Key_Z, control)
    assert not desk.page.controller.path, "what was typed since goes first"
    assert "more" not in desk.page.composer.text
    desk.press(Qt.Key.Key_Z, control)
    assert [message.content for message in desk.page.controller.path] == path
    desk.page.conversations.delete(id)
    assert desk.page.model.rowCount() == 0
    desk.press(Qt.Key.Key_Z, control)
    assert desk.page.controller.conversation_id == id
    assert not desk.page.conversations.undos
    desk.page.conversations.delete(id)
    undo = desk.notices[-1].run
    assert undo is not None
    undo()
    assert not desk.page.conversations.undos, "the toast's Undo and Ctrl+Z take back one deletion once"


def test_ten_thousand_chats_stay_fluid(desk: Desk) -> None:
    now = time.time()
    with desk.database.transaction() as connection:
        connection.executemany(
            "INSERT INTO conversations (title, created, modified) VALUES (?, ?, ?)",
            [(f"Chat {i}", now, now - i * 3600) for i in range(10_000)],
        )
    before = time.thread_time()
    desk.page._refresh_list()
    desk.page.side.list.grab()
    spent = time.thread_time() - before
    print(f"10,000 chats listed and painted in {spent * 1000:.0f} ms")
    assert len(desk.page.model.conversations) == 10_000
    assert spent < 0.4


def test_find_walks_through_matches_as_they_are_shown(desk: Desk) -> None:
    for i in range(30):
        desk.ask(f"question {i}", f"Answer with a ne**edl**e and text {i}.\n\n" + "filler\n\n" * 10)
    desk.page.find_in_page()
    assert desk.page.find_bar.isVisible()
    desk.page.find_bar.field.setText("needle")
    desk.qtbot.keyClick(desk.page.find_bar.field, Qt.Key.Key_Return)
    desk.qtbot.waitUntil(lambda: not desk.page.finder.working)
    assert desk.page.finder.count == 30 and desk.page.find_bar.count_text == "1 of 30"
    desk.qtbot.keyClick(desk.page.find_bar.field, Qt.Key.Key_Return, Qt.KeyboardModifier.ShiftModifier)
    assert desk.page.find_bar.count_text == "30 of 30"
    desk.qtbot.keyClick(desk.page.find_bar.field, Qt.Key.Key_Return)
    view = desk.view(1)
    assert view is not None and view.isVisible() and view.view.extraSelections()  # type: ignore[attr-defined]
    desk.page.find_bar.field.setText("nowhere")
    desk.qtbot.waitUntil(lambda: desk.page.find_bar.count_text == "no matches")
    desk.qtbot.keyClick(desk.page.find_bar.field, Qt.Key.Key_Escape)
    assert not desk.page.find_bar.isVisible()


def test_a_match_is_never_below_the_bar_that_found_it(desk: Desk) -> None:
    for i in range(8):
        desk.ask(f"question {i}", "needle at its beginning\n\n" + "filler\n\n" * 20)
    desk.page.resize(900, 260)  # a quarter of what is in view is less than the bar takes
    desk.page.find_in_page()
    desk.page.find_bar.field.setText("needle")
    desk.qtbot.keyClick(desk.page.find_bar.field, Qt.Key.Key_Return)
    desk.qtbot.waitUntil(lambda: not desk.page.finder.working and desk.page.finder.count == 8)
    transcript = desk.page.transcript
    bottom = desk.page.find_bar.geometry().bottom()
    for step in (-1, -1, -1, 1, 1, 1, 1):
        desk.page.finder.step(step)
        desk.settle()
        at = desk.page.controller.path[2 * desk.page.finder.at - 1].id
        view = transcript.view_of(at)
        assert view is not None
        top = view.mapTo(transcript.viewport(), view.view.geometry().topLeft()).y()
        assert top >= bottom, (step, top, bottom)
    assert desk.page.finding.close()
    assert transcript.covered == 0


def test_a_match_in_the_first_line_of_all_is_seen_too(desk: Desk) -> None:
    desk.ask("needle", "hay")
    first = desk.page.controller.path[0].id
    transcript = desk.page.transcript
    desk.settle()

    def top() -> int:
        desk.settle()
        view = transcript.view_of(first)
        assert view is not None
        return view.y()

    before = top()
    desk.page.find_in_page()
    desk.page.find_bar.field.setText("needle")
    desk.qtbot.keyClick(desk.page.find_bar.field, Qt.Key.Key_Return)
    desk.qtbot.waitUntil(lambda: desk.page.finder.count == 1)
    assert top() >= desk.page.find_bar.geometry().bottom()
    desk.page.finding.close()
    assert top() == before


def test_it_follows_the_answer_until_the_user_scrolls_up(desk: Desk) -> None:
    desk.ask("q", "line\n\n" * 80)
    desk.page.send("more")
    bar = desk.page.transcript.verticalScrollBar()
    desk.loadout.say("text\n\n" * 30)
    desk.qtbot.waitUntil(lambda: bar.value() == bar.maximum() and bar.maximum() > 500)
    bar.triggerAction(bar.SliderAction.SliderPageStepSub)
    place = bar.value()
    assert not desk.page.transcript.following
    desk.loadout.say("text\n\n" * 60)
    desk.qtbot.wait(120)
    assert bar.value() == place and desk.page.transcript._latest.isVisible()
    desk.page.transcript._latest.click()
    assert bar.value() == bar.maximum()
    desk.loadout.say("text\n\n" * 30)
    desk.qtbot.waitUntil(lambda: bar.value() == bar.maximum())
    desk.loadout.finish()


def test_a_thousand_messages_have_few_widgets_and_open_at_once(desk: Desk) -> None:
    conversation = desk.store.create("Long")
    parent = 0
    with desk.database.transaction() as connection:
        for i in range(1000):
            parent = (
                connection.execute(
                    "INSERT INTO messages (conversation, parent, role, content, created) VALUES (?, ?, ?, ?, 0)",
                    (conversation.id, parent, "assistant" if i % 2 else "user", f"message {i} " + "text " * (i % 90)),
                ).lastrowid
                or 0
            )
    desk.store.set_leaf(conversation.id, parent)
    before = time.thread_time()
    desk.page.open(conversation.id)
    desk.page.transcript.grab()
    spent = time.thread_time() - before
    print(f"1,000 messages opened in {spent * 1000:.0f} ms with {len(desk.page.transcript.views)} widgets")
    assert spent < 0.5 and len(desk.page.transcript.views) < 40
    bar = desk.page.transcript.verticalScrollBar()
    for share in (0.0, 0.3, 0.7, 1.0):
        bar.setValue(round(bar.maximum() * share))
        shown = [v for v in desk.page.transcript.views if v.isVisible()]
        assert shown and len(desk.page.transcript.views) < 80


def test_dropped_turns_are_marked_in_place(desk: Desk) -> None:
    for i in range(4):
        desk.ask(f"q{i}", f"a{i}", dropped_messages=4 if i == 3 else 0)
    entries = desk.page._entries()
    assert [entry.marker for entry in entries] == [False] * 4 + [True] + [False] * 3


def test_the_welcome_has_room_for_long_names_in_a_narrow_window(desk: Desk) -> None:
    assert desk.loadout.model is not None
    desk.loadout.model = msgspec.structs.replace(desk.loadout.model, name="user/" + "a-very-long-name-" * 8)
    desk.loadout.changed.emit()
    for width in (700, 960, 1440):
        desk.page.resize(width, 600)
        desk.qtbot.wait(10)
        line = desk.page.welcome._sentence
        assert line.height() >= line.heightForWidth(line.width()), "all of it is seen"
        assert line.width() <= desk.page.welcome.width()


def test_the_numbers_of_an_answer_are_seen_however_long_the_models_name_is(desk: Desk) -> None:
    assert desk.loadout.model is not None
    desk.loadout.model = msgspec.structs.replace(desk.loadout.model, name="user/" + "a-very-long-name-" * 12)
    desk.ask("q", "a", tokens=12, seconds=2.2)
    line = desk.view().footer._statistics  # type: ignore[attr-defined]
    assert line.shown != line.text() and line.shown.startswith("user/a-very")
    assert "tokens/s · first token" in line.shown and "a-very-long-name-" * 12 in line.toolTip()


def test_sampling_presets_and_reset(desk: Desk) -> None:
    desk.page.toggle_panel()
    panel = desk.page.panel
    panel.preset.setCurrentText("Precise")
    panel.preset.activated.emit(panel.preset.currentIndex())
    assert desk.page.controller.sampling["temperature"] == 0.2
    panel.set_values("", {"temperature": 0.33})
    desk.page.controller.set_sampling({"temperature": 0.33})
    assert panel.preset.currentText() == "Changed"
    panel.save_preset("Mine")
    assert panel.preset.currentText() == "Mine"
    assert SettingsStore(desk.folder / "settings.toml").settings.sampling_presets == {"Mine": {"temperature": 0.33}}
    panel.save_preset("precise")
    assert desk.failures and "comes with Weft" in desk.failures[-1].message
    panel.rename_preset("Mine", "Ours")
    panel.delete_preset("Ours")
    assert "Ours" not in desk.settings.settings.sampling_presets
    assert desk.notices[-1].run is not None
    desk.notices[-1].run()
    assert "Ours" in desk.settings.settings.sampling_presets
    panel.system.setPlainText("Be brief.")
    panel.flush()
    desk.page.send("q")
    assert desk.loadout.requests[0].messages[0].content == "Be brief."
    panel._reset_all()
    assert desk.page.controller.sampling == {} and desk.page.controller.system == ""


def test_the_panel_shows_what_the_model_says_of_itself(desk: Desk) -> None:
    assert desk.loadout.model is not None
    own = OwnSampling(temperature=0.0, top_p=0.9, notes=("top_k cannot be 'x' and is left out.",))
    desk.loadout.model = msgspec.structs.replace(desk.loadout.model, own_sampling=own)
    desk.page.toggle_panel()
    panel = desk.page.panel
    temperature = panel.form.rows["temperature"]
    assert panel.preset.currentText() == "The model's own" and panel.own_notes.text() == own.notes[0]
    assert "temperature 0, top-p 0.9" in panel.own.text() and panel.own.isVisible()
    assert (temperature.value(), temperature.is_changed) == (
        0.0,
        False,
    ) and "The model's own: 0." in temperature.help.text()
    temperature.control.setValue(0.8)  # type: ignore[attr-defined]
    assert desk.page.controller.sampling == {"temperature": 0.8} and panel.preset.currentText() == "Changed"
    desk.loadout.model = ModelEntry(id="n", name="Other", path="/n.gguf", format=ModelFormat.GGUF)
    desk.loadout.changed.emit()
    assert panel.own.isHidden() and panel.own_notes.isHidden() and panel.form.rows["top_p"].value() == 0.95
    assert desk.page.controller.sampling == {"temperature": 0.8}, "it was chosen, and stays when another model comes"
    desk.loadout.model = msgspec.structs.replace(desk.loadout.model, own_sampling=own)
    desk.loadout.changed.emit()
    assert temperature.value() == 0.8 and "model's own" in temperature._reset.toolTip()
    temperature.reset()
    assert temperature.value() == 0.0 and desk.page.controller.sampling == {}
    panel.preset.setCurrentText("Precise")
    panel.preset.activated.emit(panel.preset.currentIndex())
    panel.preset.setCurrentText("The model's own")
    panel.preset.activated.emit(panel.preset.currentIndex())
    assert desk.page.controller.sampling == {} and temperature.value() == 0.0


def test_a_preset_is_named_in_its_place(desk: Desk) -> None:
    desk.page.toggle_panel()
    panel = desk.page.panel
    panel.form.rows["temperature"].control.setValue(0.3)  # type: ignore[attr-defined]
    panel._ask_save()
    assert panel.name.isVisible() and panel.preset.isHidden() and panel.name.hasFocus()
    desk.qtbot.keyClicks(panel.name, "Mine")
    desk.qtbot.keyClick(panel.name, Qt.Key.Key_Return)
    assert panel.preset.isVisible() and panel.preset.currentText() == "Mine"
    panel._ask_rename()
    assert panel.name.text() == "Mine"
    panel.name.setText("Ours")
    desk.qtbot.keyClick(panel.name, Qt.Key.Key_Escape)
    assert panel.preset.currentText() == "Mine"
    panel._ask_rename()
    panel.name.setText("Ours")
    desk.page.composer.edit.setFocus()  # gone elsewhere
    assert panel.preset.isVisible() and panel.preset.currentText() == "Mine"
    panel._ask_rename()
    panel.name.setText("Ours")
    desk.qtbot.keyClick(panel.name, Qt.Key.Key_Return)
    assert panel.preset.currentText() == "Ours"
    panel._ask_save()
    desk.qtbot.keyClick(panel.name, Qt.Key.Key_Return)  # no name, no preset
    assert panel.preset.currentText() == "Ours" and not desk.failures


def test_a_chat_that_was_interrupted_by_a_kill_is_open_at_the_next_start(desk: Desk) -> None:
    desk.ask("an older one", "answered")
    desk.page.new_chat()
    desk.page.send("the question")
    desk.loadout.say("half an ans")
    desk.page.controller._writer.save()
    fresh = desk.open_page()  # the window was killed, and starts again
    assert [fresh.controller.text(m.id) for m in fresh.controller.path] == ["the question", "half an ans"]
    desk.loadout.finish()
    assert desk.open_page().controller.conversation is None
    fresh.shutdown()


def test_export_and_import_run_beside_the_window(desk: Desk) -> None:
    desk.ask("one", "1")
    path = desk.folder / "out.json"
    desk.page.export([desk.page.controller.conversation_id], "json", path)
    desk.qtbot.waitUntil(lambda: any("exported" in n.text for n in desk.notices))
    assert json.loads(path.read_text())["conversations"][0]["title"] == "one"
    assert desk.page.accepts([path]) and not desk.page.accepts([Path("x.gguf")])
    desk.page.take([path])
    desk.qtbot.waitUntil(lambda: any("imported" in n.text for n in desk.notices))
    assert len(desk.page.model.conversations) == 2
    bad = desk.folder / "bad.json"
    bad.write_text("[1]")
    desk.page.import_([path, bad])
    desk.qtbot.waitUntil(lambda: bool(desk.failures))
    assert len(desk.store.conversations()) == 2


@pytest.mark.attack
def test_tooltips_of_titles_are_no_html(desk: Desk) -> None:
    hostile = "<img src='file:///etc/passwd'> " + "x" * 300
    desk.ask("q", "a")
    desk.page.controller.rename(desk.page.controller.conversation_id, hostile)
    desk.qtbot.wait(20)
    model = desk.page.model
    tips = [str(model.data(model.index(1), Qt.ItemDataRole.ToolTipRole)), desk.page._title.toolTip()]
    assert all("<img" not in tip and "&lt;img" in tip for tip in tips)


def test_a_suggestion_does_not_take_what_is_typed(desk: Desk) -> None:
    desk.type("my own words")
    desk.page.send("How do I add a LoRA?")
    assert desk.page.composer.text == "my own words"


@pytest.mark.attack
def test_a_link_asks_before_it_opens(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    monkeypatch.setattr(
        "app.views.chat.link_dialog.QDesktopServices.openUrl", lambda url: opened.append(url.toString())
    )
    desk.page.messages.link("https://example.org/x")
    dialog = desk.page.findChild(LinkDialog)
    assert dialog is not None and "https://example.org/x" in dialog.text() and opened == []
    dialog.open_button.click()
    assert opened == ["https://example.org/x"]


def test_every_control_has_a_name_and_the_keyboard_reaches_messages(desk: Desk) -> None:
    desk.page.toggle_panel()
    desk.ask("one", "<think>a</think>two\n\n```py\nx\n```")
    desk.settle()
    nameless = [
        f"{type(widget).__name__} {widget.objectName()}"
        for widget in desk.page.findChildren(QWidget)
        if isinstance(widget, QAbstractButton | QComboBox | QLineEdit | QPlainTextEdit | QTextEdit)
        and widget.focusPolicy() & Qt.FocusPolicy.TabFocus
        and not (widget.accessibleName() or getattr(widget, "text", str)())
        and not _inside_a_control(widget)
    ]
    assert nameless == []
    desk.page.messages.walk(-1)
    assert desk.page.transcript.view_of(desk.page.controller.path[-1].id).hasFocus()  # type: ignore[union-attr]
    desk.page.messages.walk(-1)
    view = desk.page.transcript.view_of(desk.page.controller.path[0].id)
    assert view is not None and view.hasFocus() and view.accessibleName() == "You: one"


def _inside_a_control(widget: QObject) -> bool:
    parent = widget.parent()
    return isinstance(parent, QComboBox) or "SpinBox" in type(parent).__name__ or "NumberBox" in type(parent).__name__


def test_side_bar_and_panel_toggle_and_share_narrow_windows(desk: Desk) -> None:
    desk.page.toggle_side()
    assert desk.page.side.isHidden()
    desk.page.toggle_side()
    desk.page.resize(800, 560)
    desk.qtbot.wait(20)
    desk.page.toggle_panel()
    assert desk.page.side.isHidden() and not desk.page.panel.isHidden()


def test_a_theme_switch_keeps_an_open_editor(desk: Desk) -> None:
    desk.ask("one", "1")
    view = desk.view(0)
    view._request("edit")  # type: ignore[attr-defined]
    view.editor._edit.setPlainText("typed")  # type: ignore[attr-defined]
    desk.page.transcript.restyle()
    assert view.editor.text == "typed"  # type: ignore[attr-defined]


@pytest.mark.fault
@pytest.mark.parametrize("error", [WeftError(ErrorKind.BUSY, "Held.", "Wait."), RuntimeError("a defect")])
def test_an_import_that_breaks_is_told_and_lets_go_of_the_database(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    path = desk.folder / "chat.json"
    path.write_text('{"messages": [{"role": "user", "content": "q"}]}')

    def broken(_: object) -> None:
        desk.store.conversations()  # a connection of that thread
        raise error

    before = len(desk.database._connections)
    monkeypatch.setattr(desk.store, "import_transcripts", broken)
    desk.page.import_([path])
    desk.qtbot.waitUntil(lambda: len(desk.failures) == 1, timeout=20_000)
    desk.page.files.wait()
    known = isinstance(error, WeftError)
    assert desk.failures[0].kind is (ErrorKind.BUSY if known else ErrorKind.INTERNAL)
    assert known or "a defect" in desk.failures[0].message
    assert len(desk.database._connections) == before


def test_what_lay_in_the_bin_for_long_is_deleted_once_the_page_is_there(desk: Desk) -> None:
    conversation = desk.store.create("Old oak")
    desk.store.add(conversation.id, 0, "user", "acorns")
    desk.store.delete(conversation.id)
    desk.database.execute("UPDATE conversations SET deleted = deleted - ?", (31 * 24 * 3600,))
    before = len(desk.database._connections)
    desk.page.entered()
    desk.qtbot.waitUntil(lambda: desk.database.row("SELECT count(*) FROM messages") == (0,), timeout=20_000)
    desk.qtbot.waitUntil(lambda: len(desk.database._connections) == before, timeout=20_000)


def test_what_new_chats_begin_with_is_chosen_in_the_settings(desk: Desk) -> None:
    desk.type("a draft")
    section = NewChatsSection(SettingsView(desk.settings))
    desk.qtbot.addWidget(section)
    section.show()
    desk.qtbot.keyClicks(section.preset, "Precise")
    section._chosen(section.preset.currentIndex())
    desk.qtbot.keyClicks(section.system, "Be brief.")
    section.hide()  # at once, as when another page is shown
    assert (desk.settings.load().sampling, desk.settings.settings.system_prompt) == ("Precise", "Be brief.")
    desk.page.entered()
    assert desk.page.controller.system == "Be brief." and desk.page.composer.text == "a draft"
    desk.ask("one", "1")
    request = desk.loadout.requests[0]
    assert request.messages[0].content == "Be brief." and request.sampling.temperature == 0.2
    section.show()
    section.system.clear()
    section.hide()
    desk.page.entered()
    assert desk.page.controller.system == "Be brief.", "a chat that has begun keeps its own"


def test_a_default_preset_that_was_deleted_says_so(desk: Desk) -> None:
    desk.settings.update(sampling="Mine")
    section = NewChatsSection(SettingsView(desk.settings))
    desk.qtbot.addWidget(section)
    assert section.preset.currentText() == "Mine (deleted: as Balanced)"
    section.preset.setCurrentIndex(0)
    section._chosen(0)
    assert desk.settings.load().sampling == ""


def test_what_the_first_look_does_not_show_is_built_when_it_is_wanted(desk: Desk) -> None:
    page = desk.page
    assert not {"panel", "files", "finding"} & page.__dict__.keys()
    page.controller.set_system("Be brief.")
    page.toggle_panel()
    assert page.panel.isVisible() and page.panel.system.toPlainText() == "Be brief."
    desk.qtbot.wait(20)
    assert 280 <= page.panel.width() <= 360
