"""The loadout over real engine processes that follow a script."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import psutil
import pytest
from pytestqt.qtbot import QtBot

from app.core.conversation import Message
from app.core.errors import ErrorKind, WeftError
from app.core.library import ModelEntry, ModelFormat
from app.engine.protocol import BatchRow, Generate, GenerateBatch, GeneratedBatch, Load
from app.store.chats import ChatStore
from app.viewmodels.chat import ChatController
from app.viewmodels.loadout import CodeQuestion, Loadout, LoadoutState
from app.workers.engine_worker import EngineWorker
from tests.fakes.fake_engine import Problem, Script
from tests.qt.shell_parts import GB, Rooms, model

ASK = Generate(messages=(Message(role="user", content="Hello"),))


def wait_for(qtbot: QtBot, loadout: Loadout, state: LoadoutState, timeout: int = 15_000) -> None:
    qtbot.waitUntil(lambda: loadout.state is state, timeout=timeout)


def test_load_generate_unload(rooms: Rooms, qtbot: QtBot) -> None:
    rooms.script = Script(answers=("one two three",), context=4096, memory=5 * GB)
    loadout = rooms.loadout()
    entry = model()
    rooms.library.put([entry])
    loadout.load(entry)
    wait_for(qtbot, loadout, LoadoutState.READY)
    assert loadout.context == 4096
    assert loadout.memory == 5 * GB
    assert rooms.library.model(entry.id).last_used > 0
    assert rooms.settings.settings.last_model == entry.id
    texts: list[str] = []
    loadout.tokens.connect(lambda _id, text, _count: texts.append(text))
    with qtbot.waitSignal(loadout.finished, timeout=10_000) as done:
        asked = loadout.generate(ASK)
        assert loadout.state is LoadoutState.BUSY
    assert done.args is not None
    assert done.args[0] == asked
    assert "".join(texts).split() == ["one", "two", "three"]
    assert loadout.state is LoadoutState.READY
    assert loadout._run.engine.session is not None
    process = psutil.Process(loadout._run.engine.session.worker.client.pid)
    loadout.unload()
    assert loadout.state is LoadoutState.EMPTY
    assert loadout.model is None
    qtbot.waitUntil(lambda: not process.is_running() or process.status() == psutil.STATUS_ZOMBIE, timeout=20_000)


def test_an_unused_model_is_unloaded_and_comes_back_with_the_next_request(rooms: Rooms, qtbot: QtBot) -> None:
    rooms.script = Script(tokens=3)
    rooms.settings.update(unload_idle_minutes=5)
    loadout = rooms.loadout()
    loadout.load(model())
    wait_for(qtbot, loadout, LoadoutState.READY)
    loadout._idle._look()
    assert loadout.is_loaded
    loadout._idle._last_use -= 301
    loadout._idle._look()
    assert loadout.state is LoadoutState.EMPTY and loadout.model == model()
    with qtbot.waitSignal(loadout.finished, timeout=15_000):
        loadout.generate(ASK)


def test_request_during_load_waits_for_it(rooms: Rooms, qtbot: QtBot) -> None:
    rooms.script = Script(load_seconds=0.4, tokens=3)
    loadout = rooms.loadout()
    loadout.load(model())
    with qtbot.waitSignal(loadout.finished, timeout=15_000):
        loadout.generate(ASK)


def test_cancel_of_a_load(rooms: Rooms, qtbot: QtBot) -> None:
    rooms.script = Script(load_seconds=30, load_ignores_cancel=True)
    loadout = rooms.loadout()
    loadout.load(model())
    wait_for(qtbot, loadout, LoadoutState.LOADING)
    failures: list[WeftError] = []
    loadout.failed.connect(lambda _id, error: failures.append(error))
    loadout.generate(ASK)
    loadout.cancel_load()
    assert loadout.state is LoadoutState.EMPTY
    assert loadout.model is not None
    qtbot.waitUntil(lambda: len(failures) == 1, timeout=20_000)
    assert failures[0].kind is ErrorKind.CANCELLED


def test_failed_load_says_why(rooms: Rooms, qtbot: QtBot) -> None:
    rooms.script = Script(
        load_error=Problem(kind="corrupt", message="The file is cut short.", hint="Download it again.")
    )
    loadout = rooms.loadout()
    with qtbot.waitSignal(loadout.load_failed, timeout=15_000) as failed:
        loadout.load(model())
    assert failed.args is not None
    assert failed.args[0].message == "The file is cut short."
    assert loadout.state is LoadoutState.FAILED


@pytest.mark.fault
def test_crash_is_told_and_the_next_request_starts_again(rooms: Rooms, qtbot: QtBot) -> None:
    rooms.script = Script(crash_at=2, tokens=5)
    loadout = rooms.loadout()
    loadout.load(model())
    wait_for(qtbot, loadout, LoadoutState.READY)
    ended: list[tuple[int, Any]] = []
    loadout.failed.connect(lambda number, error: ended.append((number, error)))
    with qtbot.waitSignal(loadout.crashed, timeout=15_000) as crash:
        first = loadout.generate(ASK)
    qtbot.waitUntil(lambda: len(ended) == 1, timeout=20_000)
    assert ended[0][0] == first
    assert ended[0][1].kind is ErrorKind.CRASHED
    assert crash.args is not None
    assert crash.args[0].again
    assert loadout.state is LoadoutState.FAILED
    rooms.script = Script(tokens=3)
    with qtbot.waitSignal(loadout.finished, timeout=15_000):
        loadout.generate(ASK)
    assert len(rooms.made) == 2


@pytest.mark.fault
def test_four_crashes_stop_the_restarts_and_say_so(rooms: Rooms, qtbot: QtBot) -> None:
    rooms.script = Script(crash_at=0)
    loadout = rooms.loadout()
    loadout.load(model())
    wait_for(qtbot, loadout, LoadoutState.READY)
    for again in (True, True, True, False):
        with qtbot.waitSignal(loadout.crashed, timeout=15_000) as crash:
            loadout.generate(ASK)
        assert crash.args is not None
        assert crash.args[0].again is again
        qtbot.wait(10)
    made = len(rooms.made)
    with qtbot.waitSignal(loadout.failed, timeout=20_000) as refused:
        loadout.generate(ASK)
    assert refused.args is not None
    assert "4 times" in refused.args[1].message
    assert len(rooms.made) == made


@pytest.mark.fault
def test_crash_while_loading(rooms: Rooms, qtbot: QtBot) -> None:
    rooms.script = Script(load_crash="segv")
    loadout = rooms.loadout()
    with qtbot.waitSignal(loadout.crashed, timeout=15_000):
        loadout.load(model())
    assert loadout.state is LoadoutState.FAILED
    assert loadout.error is not None


def test_too_big_is_asked_before_anything_starts(rooms: Rooms, qtbot: QtBot) -> None:
    rooms.free = GB
    loadout = rooms.loadout()
    entry = model(size=8 * GB)
    with qtbot.waitSignal(loadout.fit_asked, timeout=20_000) as asked:
        loadout.load(entry)
    assert not rooms.made
    assert asked.args is not None
    assert "is free" in asked.args[0].message
    loadout.load(entry, anyway=True)
    wait_for(qtbot, loadout, LoadoutState.READY)


@pytest.mark.parametrize("autoload", [True, False])
def test_a_damaged_model_is_refused_before_the_working_one_goes(rooms: Rooms, qtbot: QtBot, autoload: bool) -> None:
    rooms.settings.update(autoload=autoload)
    loadout = rooms.loadout()
    loadout.load(model())
    wait_for(qtbot, loadout, LoadoutState.READY)
    session = loadout._run.engine.session
    damaged = model("broken", problem="The file is cut short.")
    for pick in (loadout.select, loadout.load):
        with qtbot.waitSignal(loadout.load_failed, timeout=20_000) as failed:
            pick(damaged)
        assert failed.args is not None
        assert "cut short" in failed.args[0].message
        assert loadout.state is LoadoutState.READY and loadout._run.engine.session is session and loadout.error is None
        assert loadout.model == model()
    with qtbot.waitSignal(loadout.finished, timeout=10_000):
        loadout.generate(ASK)


@pytest.mark.parametrize("autoload", [True, False])
def test_a_model_that_no_loader_takes_leaves_the_working_one(rooms: Rooms, qtbot: QtBot, autoload: bool) -> None:
    rooms.settings.update(autoload=autoload)
    loadout = rooms.loadout()
    loadout.load(model())
    wait_for(qtbot, loadout, LoadoutState.READY)
    session = loadout._run.engine.session
    strange = model("strange", format=ModelFormat.EXL2)
    with pytest.raises(WeftError):
        loadout.planner.choose_loader(strange)
    for pick in (loadout.select, loadout.load):
        with qtbot.waitSignal(loadout.load_failed, timeout=20_000):
            pick(strange)
        assert (
            loadout.state is LoadoutState.READY and loadout._run.engine.session is session and loadout.model == model()
        )
    with qtbot.waitSignal(loadout.finished, timeout=10_000):
        loadout.generate(ASK)


def test_waits_for_its_environment(rooms: Rooms, qtbot: QtBot) -> None:
    loadout = rooms.loadout()
    entry = model()
    environment = loadout.planner.choose_loader(entry).environment
    rooms.environments.missing.add(environment)
    with qtbot.waitSignal(loadout.environment_wanted, timeout=20_000) as wanted:
        loadout.load(entry)
    assert wanted.args == [environment]
    assert loadout.state is LoadoutState.STARTING
    rooms.environments.missing.clear()
    loadout.environment_ready(environment)
    wait_for(qtbot, loadout, LoadoutState.READY)


def test_saved_options_are_loaded_and_stale_ones_left_out(rooms: Rooms, qtbot: QtBot) -> None:
    loadout = rooms.loadout()
    entry = model()
    spec = loadout.planner.choose_loader(entry)
    rooms.model_settings.set(entry.id, spec.id, {"n_ctx": 1024, "no_such_option": 3})
    loadout.load(entry)
    assert loadout.options == {"n_ctx": 1024}
    wait_for(qtbot, loadout, LoadoutState.READY)


def test_select_without_autoload_waits(rooms: Rooms) -> None:
    rooms.settings.update(autoload=False)
    loadout = rooms.loadout()
    loadout.select(model())
    assert loadout.state is LoadoutState.EMPTY
    assert loadout.model is not None
    assert not rooms.made


def test_no_model_is_said_later_never_from_within(rooms: Rooms, qtbot: QtBot) -> None:
    loadout = rooms.loadout()
    with qtbot.waitSignal(loadout.failed, timeout=20_000) as failed:
        number = loadout.generate(ASK)
    assert failed.args is not None
    assert failed.args[0] == number
    assert failed.args[1].kind is ErrorKind.NOT_FOUND


@pytest.mark.fault
def test_stopped_engine_is_noticed_and_can_be_ended(rooms: Rooms, qtbot: QtBot) -> None:
    rooms.script = Script(hang_at=1, hang="stop")
    loadout = rooms.loadout()
    loadout.load(model())
    wait_for(qtbot, loadout, LoadoutState.READY)
    loadout.generate(ASK)
    wait_for(qtbot, loadout, LoadoutState.UNRESPONSIVE, timeout=12_000)
    loadout.end_engine()
    assert loadout.state is LoadoutState.FAILED
    rooms.script = Script(tokens=2)
    with qtbot.waitSignal(loadout.finished, timeout=15_000):
        loadout.generate(ASK)


def test_custom_code_permission_holds_for_these_files_only(rooms: Rooms, tmp_path: Any) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "modeling.py").write_text("print('one')")
    entry = model(path=str(folder), custom_code=("modeling.py",))
    loadout = rooms.loadout()
    planner = loadout.planner
    assert not planner.trusts_code(entry)
    planner.allow_code(entry, planner.code(entry).digest)
    assert planner.trusts_code(entry)
    (folder / "modeling.py").write_text("print('two')")
    assert not planner.trusts_code(entry)


def outcomes(loadout: Loadout) -> list[tuple[str, int, Any]]:
    """What becomes of every request, in order, as it comes."""
    found: list[tuple[str, int, Any]] = []
    loadout.finished.connect(lambda number, result: found.append(("finished", number, result)))
    loadout.failed.connect(lambda number, error: found.append(("failed", number, error)))
    return found


def test_message_sent_while_the_engine_is_installed_is_answered(rooms: Rooms, qtbot: QtBot) -> None:
    rooms.environments.missing.add("llamacpp")
    rooms.script = Script(answers=("hi there",))
    loadout = rooms.loadout()
    chat = ChatController(ChatStore(rooms.database), loadout)
    loadout.load(model())
    assert not chat.cannot_send()
    assert chat.send("Hello")
    loadout.environment_ready("core")  # another one: nothing changes
    assert loadout.waiting_for == "llamacpp"
    assert chat.writing
    rooms.environments.missing.clear()
    loadout.environment_ready("llamacpp")
    qtbot.waitUntil(lambda: not chat.writing, timeout=15_000)
    assert [(m.role, m.content.strip(), m.complete) for m in chat.path] == [
        ("user", "Hello", True),
        ("assistant", "hi there", True),
    ]
    chat.shutdown()


def test_message_waits_on_when_its_model_is_loaded_again(rooms: Rooms, qtbot: QtBot) -> None:
    rooms.script = Script(tokens=3)
    loadout = rooms.loadout()
    entry = model()
    rooms.environments.missing.add("llamacpp")
    loadout.load(entry)
    ended = outcomes(loadout)
    asked = loadout.generate(ASK)
    rooms.environments.missing.clear()
    loadout.load(entry)
    qtbot.waitUntil(lambda: bool(ended), timeout=15_000)
    assert ended[0][:2] == ("finished", asked)


def test_message_to_a_picked_model_loads_it_and_is_answered(rooms: Rooms, qtbot: QtBot) -> None:
    rooms.settings.update(autoload=False)
    rooms.script = Script(tokens=3)
    loadout = rooms.loadout()
    ended = outcomes(loadout)
    loadout.select(model())
    asked = loadout.generate(ASK)
    qtbot.waitUntil(lambda: bool(ended), timeout=15_000)
    assert ended[0][:2] == ("finished", asked)


def test_message_does_not_go_to_another_model(rooms: Rooms, qtbot: QtBot) -> None:
    rooms.script = Script(load_seconds=5)
    loadout = rooms.loadout()
    loadout.load(model())
    ended = outcomes(loadout)
    asked = loadout.generate(ASK)
    rooms.script = Script(tokens=3)
    loadout.load(model("maker/other-1B"))
    qtbot.waitUntil(lambda: bool(ended), timeout=15_000)
    assert ended[0][:2] == ("failed", asked)
    assert ended[0][2].kind is ErrorKind.CANCELLED


@pytest.mark.fault
def test_unheard_cancel_is_no_crash(rooms: Rooms, qtbot: QtBot) -> None:
    rooms.script = Script(hang_at=2, hang="sleep", tokens=50)
    loadout = rooms.loadout()
    loadout.load(model())
    wait_for(qtbot, loadout, LoadoutState.READY)
    ended, crashes, notices = outcomes(loadout), list[Any](), list[str]()
    loadout.crashed.connect(crashes.append)
    loadout.notice.connect(notices.append)
    asked = loadout.generate(ASK)
    qtbot.wait(300)
    loadout.cancel(asked)
    qtbot.waitUntil(lambda: bool(ended), timeout=15_000)
    assert ended[0][:2] == ("failed", asked)
    assert ended[0][2].kind is ErrorKind.CANCELLED
    assert loadout.state is LoadoutState.EMPTY
    qtbot.wait(200)
    assert not crashes
    assert "did not stop" in notices[0]
    rooms.script = Script(tokens=2)
    for _ in range(4):  # not counted either: it may happen any number of times
        loadout._run.policy.check()
    with qtbot.waitSignal(loadout.finished, timeout=15_000):
        loadout.generate(ASK)


@pytest.mark.fault
def test_state_has_changed_when_a_request_is_told_to_have_failed(rooms: Rooms, qtbot: QtBot) -> None:
    rooms.script = Script(crash_at=2, tokens=5)
    loadout = rooms.loadout()
    loadout.load(model())
    wait_for(qtbot, loadout, LoadoutState.READY)
    states: list[LoadoutState] = []
    loadout.failed.connect(lambda *_: states.append(loadout.state))
    loadout.generate(ASK)
    qtbot.waitUntil(lambda: bool(states), timeout=15_000)
    assert states == [LoadoutState.FAILED]


@pytest.fixture
def coded(tmp_path: Any) -> ModelEntry:
    """A model that brings code of its own, for a loader that can run it."""
    folder = tmp_path / "coded"
    folder.mkdir()
    (folder / "modeling.py").write_text("from .helper import x")
    (folder / "helper.py").write_text("x = 1")
    return model("coded", path=str(folder), format=ModelFormat.SAFETENSORS, custom_code=("modeling.py",))


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[Load]:
    """Every Load that an engine is told."""
    told: list[Load] = []
    really = EngineWorker.send

    def send(worker: EngineWorker, command: Any) -> int:
        if isinstance(command, Load):
            told.append(command)
        return really(worker, command)

    monkeypatch.setattr(EngineWorker, "send", send)
    return told


def test_a_ticked_option_asks_before_anything_starts(
    rooms: Rooms, qtbot: QtBot, coded: ModelEntry, sent: list[Load]
) -> None:
    loadout = rooms.loadout()
    with qtbot.waitSignal(loadout.code_asked, timeout=20_000) as asked:
        loadout.load(coded, None, {"trust_remote_code": True})
    assert asked.args is not None
    question: CodeQuestion = asked.args[0]
    assert question.files == ("helper.py", "modeling.py")
    assert not rooms.made
    loadout.planner.allow_code(question.entry, question.digest)
    loadout.load(question.entry, question.loader.id, question.options)
    wait_for(qtbot, loadout, LoadoutState.READY)
    assert (sent[-1].trust_remote_code, sent[-1].options) == (True, {"trust_remote_code": True})


def test_a_refusal_asks_for_the_code_and_the_yes_loads_it(
    rooms: Rooms, qtbot: QtBot, coded: ModelEntry, sent: list[Load]
) -> None:
    rooms.script = Script(load_error=Problem(kind="unsupported", message="I do not know this architecture."))
    loadout = rooms.loadout()
    ended = outcomes(loadout)
    with qtbot.waitSignal(loadout.code_asked, timeout=15_000) as asked:
        loadout.load(coded)
        loadout.generate(ASK)
    assert asked.args is not None
    question: CodeQuestion = asked.args[0]
    assert not sent[-1].trust_remote_code
    qtbot.waitUntil(lambda: bool(ended), timeout=20_000)
    assert ended[0][2].kind is ErrorKind.UNSUPPORTED
    rooms.script = Script()
    loadout.planner.allow_code(question.entry, question.digest)
    loadout.load(question.entry, question.loader.id, question.options)
    wait_for(qtbot, loadout, LoadoutState.READY)
    assert (sent[-1].trust_remote_code, sent[-1].options) == (True, {"trust_remote_code": True})
    # A helper that changes afterwards takes the permission along.
    Path(coded.path, "helper.py").write_text("import os")
    loadout.load_again()
    wait_for(qtbot, loadout, LoadoutState.READY)
    assert not sent[-1].trust_remote_code


def test_what_an_engine_measured_goes_along_with_the_next_load(rooms: Rooms, qtbot: QtBot, sent: list[Load]) -> None:
    rooms.script = Script(calibration={"threads/8/30": 4})
    loadout = rooms.loadout()
    loadout.load(model())
    wait_for(qtbot, loadout, LoadoutState.READY)
    assert sent[-1].calibration == {}
    loadout.load_again()
    wait_for(qtbot, loadout, LoadoutState.READY)
    assert sent[-1].calibration == {"threads/8/30": 4}


def test_a_batch_brings_rows_and_loads_what_was_unloaded(rooms: Rooms, qtbot: QtBot) -> None:
    rooms.script = Script(answers=("one two", "three four"))
    loadout = rooms.loadout()
    loadout.load(model())
    texts: dict[int, str] = {}
    loadout.row_tokens.connect(lambda _id, row, text, _count: texts.update({row: texts.get(row, "") + text}))
    rows = (BatchRow(messages=ASK.messages), BatchRow(messages=ASK.messages))
    with qtbot.waitSignal(loadout.finished, timeout=15_000) as done:
        asked = loadout.generate_batch(GenerateBatch(rows=rows))  # waits for the load
    assert done.args is not None
    assert done.args[0] == asked and isinstance(done.args[1], GeneratedBatch)
    assert [row.tokens for row in done.args[1].rows] == [2, 1]
    assert texts == {0: "one two", 1: "three "}
    assert loadout.state is LoadoutState.READY
