"""The conversation's logic: what is asked, where answers go, what stays after anything, without widgets."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from pytestqt.qtbot import QtBot

from app.core.conversation import Message, Role, StoredMessage
from app.core.errors import ErrorKind, WeftError
from app.core.library import ModelEntry, ModelFormat
from app.core.own_sampling import OwnSampling
from app.core.sampling import Sampling
from app.core.stack import AdapterStack, StackedAdapter
from app.store.chats import ChatStore
from app.store.database import Database
from app.viewmodels.chat import ChatController
from app.viewmodels.chat_reasoning import split_reasoning
from app.viewmodels.loadout import LoadoutState
from tests.fakes.fake_loadout import FakeLoadout


class Room:
    """A controller with its store and a fake loadout."""

    def __init__(self, folder: Path) -> None:
        self.database = Database(folder / "weft.sqlite")
        self.store = ChatStore(self.database)
        self.loadout = FakeLoadout()
        self.controller = ChatController(self.store, self.loadout)  # type: ignore[arg-type]
        self.failures: list[WeftError] = []
        self.undos: list[object] = []
        self.controller.failed.connect(self.failures.append)
        self.controller.undoable.connect(lambda _text, undo: self.undos.append(undo))

    def texts(self) -> list[str]:
        return [self.controller.text(message.id) for message in self.controller.path]

    def again(self) -> ChatController:
        """What a restarted window sees."""
        return ChatController(self.store, FakeLoadout())  # type: ignore[arg-type]


@pytest.fixture
def room(qtbot: QtBot, tmp_path: Path) -> Iterator[Room]:
    made = Room(tmp_path)
    yield made
    made.controller.shutdown()
    made.database.close()


def test_a_first_message_begins_a_conversation_with_a_title(room: Room) -> None:
    room.controller.set_system("Be brief.")
    assert room.controller.send("How do I **add** a LoRA?\nPlease.")
    assert room.controller.conversation is not None
    assert room.controller.conversation.title == "How do I add a LoRA?"
    request = room.loadout.requests[0]
    assert request.messages == (
        Message(role="system", content="Be brief."),
        Message(role="user", content="How do I **add** a LoRA?\nPlease."),
    )
    room.loadout.answer("Drop it.", dropped_messages=0)
    last = room.controller.path[-1]
    assert (last.content, last.complete) == ("Drop it.", True)
    assert last.statistics is not None
    assert last.statistics.model == "Model" and last.statistics.tokens == 5 and last.statistics.finish_reason == "stop"
    assert last.statistics.tokens_per_second == pytest.approx(8)


def test_the_next_question_carries_the_branch_in_view_and_no_old_thoughts(room: Room) -> None:
    room.controller.send("one")
    room.loadout.answer("<think>hm, *one*</think>\nfirst")
    room.controller.send("two")
    assert [m.content for m in room.loadout.requests[1].messages] == ["one", "first", "two"]


def test_sampling_is_kept_per_conversation_and_sent(room: Room) -> None:
    room.controller.set_sampling({"temperature": 0.1})
    room.controller.send("a")
    room.loadout.answer("b")
    assert room.loadout.requests[0].sampling.temperature == 0.1
    first = room.controller.conversation_id
    room.controller.new()
    assert room.controller.sampling == {}
    room.controller.open(first)
    assert room.controller.sampling == {"temperature": 0.1}


def test_editing_makes_a_branch_and_arrows_go_between(room: Room) -> None:
    room.controller.send("one")
    room.loadout.answer("1")
    question = room.controller.path[0].id
    room.controller.edit(question, "uno")
    room.loadout.answer("1!")
    assert room.texts() == ["uno", "1!"]
    assert room.controller.branches(room.controller.path[0].id) == (2, 2)
    room.controller.switch_branch(room.controller.path[0].id, -1)
    assert room.texts() == ["one", "1"]
    fresh = room.again()
    fresh.open(room.controller.conversation_id)
    assert [m.content for m in fresh.path] == ["one", "1"]


def test_what_cannot_be_asked_anew_leaves_the_branch_in_view(room: Room) -> None:
    for said in ("one", "two"):
        room.controller.send(said)
        room.loadout.answer(said.upper())
    room.controller.send("three")
    room.loadout.fail(WeftError(ErrorKind.OUT_OF_MEMORY, "Too big.", "Smaller."))
    shown = ["one", "ONE", "two", "TWO", "three", ""]
    assert room.texts() == shown
    room.loadout.refuse = WeftError(ErrorKind.NOT_FOUND, "No model is loaded.", "Choose one.")
    question, answer, last = (room.controller.path[at].id for at in (0, 1, -1))
    assert not room.controller.regenerate(answer) and room.texts() == shown
    assert not room.controller.edit(question, "uno") and room.texts() == shown
    assert not room.controller.regenerate(last) and room.texts() == shown and room.controller.error(last)
    fresh = room.again()
    fresh.open(room.controller.conversation_id)
    assert [m.content for m in fresh.path] == shown
    assert fresh.branches(question) == fresh.branches(answer) == (1, 1)


def test_editing_an_answer_keeps_both(room: Room) -> None:
    room.controller.send("one")
    room.loadout.answer("wrong")
    room.controller.edit(room.controller.path[1].id, "right")
    assert room.texts() == ["one", "right"]
    assert len(room.loadout.requests) == 1
    room.controller.send("next")
    assert [m.content for m in room.loadout.requests[1].messages] == ["one", "right", "next"]


def test_regenerate_and_continue(room: Room) -> None:
    room.controller.send("one")
    room.loadout.answer("a")
    room.controller.regenerate(room.controller.path[1].id)
    room.loadout.say("b")
    room.loadout.finish("length")
    assert room.controller.branches(room.controller.path[1].id) == (2, 2)
    room.controller.continue_(room.controller.path[1].id)
    request = room.loadout.requests[-1]
    assert request.continue_last and request.messages[-1] == Message(role="assistant", content="b")
    room.loadout.answer("cd")
    assert room.texts() == ["one", "bcd"]
    assert room.controller.path[1].statistics is not None and room.controller.path[1].statistics.tokens == 10


def test_a_continue_that_is_refused_leaves_the_answer_complete(room: Room) -> None:
    room.controller.send("one")
    room.loadout.answer("whole")
    answer = room.controller.path[-1].id
    room.loadout.refuse = WeftError(ErrorKind.BUSY, "Busy.", "Wait.")
    assert not room.controller.continue_(answer)
    assert room.store.message(answer).complete and room.controller.message(answer).complete


def test_a_continue_that_is_taken_counts_as_cut_short_until_it_ends(room: Room) -> None:
    room.controller.send("one")
    room.loadout.answer("half", reason="length")
    answer = room.controller.path[-1].id
    room.controller.continue_(answer)
    assert not room.store.message(answer).complete
    room.loadout.answer(" whole")
    assert room.store.message(answer).complete and room.texts() == ["one", "half whole"]


def test_the_model_used_last_is_remembered(room: Room) -> None:
    room.controller.send("one")
    room.loadout.answer("a")
    assert room.store.get(room.controller.conversation_id).model == "m"
    assert room.loadout.model is not None
    room.loadout.model = msgspec.structs.replace(room.loadout.model, id="other")
    room.controller.send("two")
    assert room.store.get(room.controller.conversation_id).model == "other"


@pytest.mark.fault
@pytest.mark.parametrize("full_at", ["user", "assistant"])
def test_a_first_message_that_the_disk_does_not_take_leaves_no_chat(
    room: Room, monkeypatch: pytest.MonkeyPatch, full_at: str
) -> None:
    add = room.store.add

    def full(conversation: int, parent: int, role: Role, content: str, **fields: bool) -> StoredMessage:
        if role == full_at:
            raise WeftError(ErrorKind.DISK_FULL, "The disk is full.", "Free some space.")
        return add(conversation, parent, role, content, **fields)

    monkeypatch.setattr(room.store, "add", full)
    room.controller.set_system("Be brief.")
    assert not room.controller.send("one")
    assert room.store.conversations() == [] and room.controller.conversation is None
    assert [error.kind for error in room.failures] == [ErrorKind.DISK_FULL]
    monkeypatch.undo()
    assert room.controller.send("one") and room.controller.system == "Be brief."


def test_stop_keeps_what_came(room: Room) -> None:
    room.controller.send("one")
    room.loadout.say("half")
    room.controller.stop()
    room.controller.stop()
    assert room.loadout.cancelled == [1]
    room.loadout.finish("cancelled")
    last = room.controller.path[-1]
    assert last.content == "half" and last.statistics is not None and last.statistics.finish_reason == "cancelled"
    assert not room.controller.writing


@pytest.mark.fault
def test_a_crash_keeps_what_came_and_can_be_continued(room: Room) -> None:
    room.controller.send("one")
    room.loadout.say("received")
    room.loadout.fail(WeftError(ErrorKind.CRASHED, "The engine crashed.", "Send again."))
    last = room.controller.path[-1]
    assert last.content == "received" and not last.complete
    assert last.statistics is not None and last.statistics.finish_reason == "crashed"
    assert room.controller.error(last.id) is not None
    assert room.controller.continue_(last.id)
    assert room.controller.error(last.id) is None
    room.loadout.answer(" more")
    assert room.texts()[-1] == "received more" and room.controller.path[-1].complete


@pytest.mark.fault
def test_a_failure_before_the_first_word_leaves_the_question_and_is_tried_again_in_place(room: Room) -> None:
    room.controller.send("one")
    room.loadout.fail(WeftError(ErrorKind.OUT_OF_MEMORY, "Too big.", "Smaller."))
    assert room.texts() == ["one", ""]
    room.controller.regenerate(room.controller.path[1].id)
    room.loadout.answer("ok")
    assert room.texts() == ["one", "ok"]
    assert room.controller.branches(room.controller.path[1].id) == (1, 1)


@pytest.mark.fault
def test_a_prompt_that_cannot_be_sent_is_not_lost(room: Room) -> None:
    room.loadout.refuse = WeftError(ErrorKind.ENVIRONMENT, "No engine.", "Install it.")
    assert not room.controller.send("precious")
    assert room.failures and room.controller.path == []
    assert room.controller.conversation is None and room.store.conversations() == []
    room.loadout.refuse = None
    assert room.controller.send("precious")
    assert room.texts() == ["precious", ""]


@pytest.mark.fault
def test_a_killed_window_loses_at_most_what_came_since_the_last_save(room: Room, qtbot: QtBot) -> None:
    room.controller.send("one")
    room.loadout.say("first ")
    qtbot.waitUntil(lambda: room.store.messages(1)[1].content == "first ", timeout=20_000)
    room.loadout.say("lost")
    # The window is gone; another one opens the same store.
    fresh = room.again()
    fresh.open(room.controller.conversation_id)
    last = fresh.path[-1]
    assert last.content == "first " and not last.complete and last.statistics is None


@pytest.mark.fault
def test_a_full_disk_is_told_once_and_what_came_is_saved_when_there_is_room(
    room: Room, qtbot: QtBot, monkeypatch: pytest.MonkeyPatch
) -> None:
    room.controller.send("one")
    append = room.store.append

    def full(message: int, text: str) -> None:
        raise WeftError(ErrorKind.DISK_FULL, "The disk is full.", "Free some space.")

    monkeypatch.setattr(room.store, "append", full)
    room.loadout.say("kept")
    qtbot.wait(1300)
    assert len(room.failures) == 1
    monkeypatch.setattr(room.store, "append", append)
    qtbot.waitUntil(lambda: room.store.messages(1)[1].content == "kept", timeout=20_000)


@pytest.mark.fault
def test_an_answer_that_ends_on_a_full_disk_is_saved_when_there_is_room(
    room: Room, qtbot: QtBot, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise WeftError(ErrorKind.DISK_FULL, "The disk is full.", "Free some space.")

    room.controller.send("one")
    first = room.controller.conversation_id
    with monkeypatch.context() as patched:
        patched.setattr(room.store, "append", full)
        patched.setattr(room.store, "update", full)
        room.loadout.say("precious")
        room.loadout.finish()
        assert len(room.failures) == 1
        room.controller.new()
        room.controller.open(first)
        assert room.texts() == ["one", "precious"], "it is in view though the store lacks it"
    qtbot.waitUntil(lambda: room.store.messages(first)[1].content == "precious", timeout=20_000)
    assert room.store.messages(first)[1].complete and len(room.failures) == 1
    with monkeypatch.context() as patched:
        patched.setattr(room.store, "update", full)
        room.controller.send("two")
        room.loadout.answer("dear")
    room.controller.shutdown()
    assert room.store.messages(first)[-1].content == "dear"


def test_an_answer_goes_on_into_its_own_conversation(room: Room) -> None:
    room.controller.send("one")
    first = room.controller.conversation_id
    room.loadout.say("a")
    room.controller.new()
    assert room.controller.cannot_send() == "The model is answering in “one”."
    assert not room.controller.send("two")
    room.loadout.say("b")
    room.controller.open(first)
    assert room.texts() == ["one", "ab"] and room.controller.writing
    room.controller.new()
    room.loadout.finish()
    room.controller.open(first)
    assert room.texts() == ["one", "ab"] and room.controller.path[-1].complete


def test_quitting_stops_and_saves(room: Room) -> None:
    room.controller.send("one")
    room.loadout.say("half")
    room.controller.shutdown()
    assert room.loadout.cancelled
    last = room.store.messages(room.controller.conversation_id)[-1]
    assert last.content == "half" and last.statistics is not None and last.statistics.finish_reason == "cancelled"


def test_deleting_messages_and_conversations_can_be_undone(room: Room) -> None:
    room.controller.send("one")
    room.loadout.answer("a")
    room.controller.send("two")
    room.loadout.answer("b")
    room.controller.delete_message(room.controller.path[2].id)
    assert room.texts() == ["one", "a"]
    room.undos.pop()()  # type: ignore[operator]
    assert room.texts() == ["one", "a", "two", "b"]
    conversation = room.controller.conversation_id
    room.controller.delete(conversation)
    assert room.controller.conversation is None and room.store.conversations() == []
    room.undos.pop()()  # type: ignore[operator]
    assert room.controller.conversation_id == conversation and len(room.texts()) == 4


def test_deleting_an_answer_that_is_being_written_stops_it(room: Room) -> None:
    room.controller.send("one")
    room.loadout.say("a")
    room.controller.delete_message(room.controller.path[0].id)
    assert room.loadout.cancelled and room.texts() == []
    room.loadout.finish("cancelled")
    assert room.texts() == []


def test_what_the_model_no_longer_sees_is_known(room: Room) -> None:
    for text in ("one", "two", "three"):
        room.controller.send(text)
        room.loadout.answer("x", dropped_messages=2 if text == "three" else 0)
    assert room.controller.unseen == 2


def test_messages_without_text_do_not_count_as_dropped(room: Room) -> None:
    room.controller.send("one")
    room.loadout.finish("cancelled")  # an answer without a word
    room.controller.send("two")
    room.loadout.answer("x")
    room.controller.send("three")
    room.loadout.answer("y", dropped_messages=1)
    path = room.controller.path
    assert [m.content for m in path] == ["one", "", "two", "x", "three", "y"]
    assert path[room.controller.unseen].content == "two", "of what was sent, only “one” was dropped"


def test_drafts_are_kept_per_conversation(room: Room) -> None:
    room.controller.set_draft("new one")
    room.controller.send("a")
    room.loadout.answer("b")
    room.controller.set_draft("follow-up")
    fresh = room.again()
    assert fresh.draft() == "", "what was sent is no draft any more"
    fresh.open(room.controller.conversation_id)
    assert fresh.draft() == "follow-up"


@pytest.mark.parametrize(
    ("state", "model", "reason"),
    [
        (LoadoutState.READY, True, ""),
        (LoadoutState.LOADING, True, ""),
        (LoadoutState.EMPTY, True, ""),
        (LoadoutState.FAILED, True, ""),
        (LoadoutState.EMPTY, False, "No model is loaded."),
        (LoadoutState.BUSY, True, "The model is busy."),
        (LoadoutState.UNRESPONSIVE, True, "The model does not respond at the moment."),
    ],
)
def test_why_nothing_can_be_sent(room: Room, state: LoadoutState, model: bool, reason: str) -> None:
    room.loadout.set_state(state, model=model)
    assert room.controller.cannot_send() == reason
    assert room.controller.send("x") is (reason == "")


@pytest.mark.parametrize(
    ("text", "reasoning", "answer"),
    [
        ("plain", "", "plain"),
        ("<think>a\nb</think>\n\nc", "a\nb", "c"),
        ("<think>\n</think>\nc", "", "c"),
        ("  <thinking>a</thinking>b", "a", "b"),
        ("<reasoning>a</reasoning>b", "a", "b"),
        ("[THINK]a[/THINK]b", "a", "b"),
        ("no opening</think>b", "no opening", "b"),
        ("<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>final<|message|>b<|return|>", "a", "b"),
        ("say `</think>` in code", "", "say `</think>` in code"),
        ("<think>a</think><think>b</think>c", "a\n\nb", "c"),
        ("text <think> in the middle", "", "text <think> in the middle"),
    ],
)
def test_reasoning_is_told_from_the_answer(text: str, reasoning: str, answer: str) -> None:
    split = split_reasoning(text)
    assert (split.reasoning, split.answer, split.thinking) == (reasoning, answer, False)


def test_streamed_reasoning_never_shows_half_a_mark() -> None:
    text = "<think>some thoughts</think>\nThe answer <b>."
    seen = [split_reasoning(text[:end], streaming=True) for end in range(len(text) + 1)]
    assert all("<" not in s.reasoning and "think>" not in s.reasoning for s in seen)
    assert all(s.answer == "" for s in seen[: len("<think>some thoughts</think>")])
    answers = [s.answer for s in seen]
    assert all(later.startswith(earlier) for earlier, later in zip(answers, answers[1:], strict=False))


def test_the_line_under_an_answer_names_the_adapters_that_gave_it(room: Room) -> None:
    room.loadout.stack = AdapterStack(
        adapters=(StackedAdapter(path="/a", name="pirate", weight=0.7), StackedAdapter(path="/b", name="off", weight=0))
    )
    room.controller.send("one")
    room.loadout.stack = AdapterStack()  # taken away while it is written
    room.loadout.answer("Aye")
    statistics = room.controller.path[-1].statistics
    assert statistics is not None and statistics.stack == "pirate 0.7"


def test_the_chat_that_a_kill_interrupted_is_known_at_the_next_start(room: Room, qtbot: QtBot) -> None:
    assert room.controller.interrupted() == 0
    room.controller.send("one")
    assert room.again().interrupted() == room.controller.conversation_id  # as if the window were gone now
    room.loadout.answer("done")
    assert room.again().interrupted() == 0
    room.controller.send("two")
    room.loadout.say("some")
    room.loadout.fail(WeftError(ErrorKind.CRASHED, "The engine crashed.", "Send again."))
    assert room.again().interrupted() == 0  # that was told, and the window was closed by somebody
    room.controller.continue_(room.controller.path[-1].id)
    room.loadout.say("more")
    room.controller._writer.save()
    assert room.again().interrupted() == room.controller.conversation_id
    room.loadout.finish()
    room.controller.new()
    room.controller.send("a newer chat")
    room.loadout.answer("done")
    assert room.again().interrupted() == 0


def test_the_first_token_is_counted_from_when_the_engine_has_the_request(room: Room, qtbot: QtBot) -> None:
    room.controller.send("one")
    qtbot.wait(1500)  # the model is being loaded
    room.loadout.begun.emit(room.loadout.last)
    qtbot.wait(50)
    room.loadout.answer("done")
    statistics = room.controller.path[-1].statistics
    assert statistics is not None and 0.04 < statistics.seconds_to_first_token < 1.4


def test_an_answer_is_sampled_as_chosen_else_as_the_model_says_else_as_weft_does(room: Room) -> None:
    own = OwnSampling(temperature=0.0, top_k=7)
    room.loadout.model = msgspec.structs.replace(room.loadout.model, own_sampling=own)  # type: ignore[type-var]
    room.controller.send("a")
    room.loadout.answer("b")
    assert room.loadout.requests[-1].sampling == Sampling(temperature=0.0, top_k=7)
    room.controller.set_sampling({"temperature": 0.8})  # Weft's own default, and chosen all the same
    room.controller.send("c")
    room.loadout.answer("d")
    assert room.loadout.requests[-1].sampling == Sampling(temperature=0.8, top_k=7)
    assert room.controller.sampling == {"temperature": 0.8}, "what the model says is not kept as if it was chosen"
    room.loadout.model = ModelEntry(id="n", name="Other", path="/n.gguf", format=ModelFormat.GGUF)
    room.controller.send("e")
    assert room.loadout.requests[-1].sampling == Sampling(temperature=0.8)
