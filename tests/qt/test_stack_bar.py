"""The adapter stack: chips, what the engine is told, and drops on the bar."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from PySide6.QtCore import QMimeData, QPoint, QPointF, Qt, QUrl
from PySide6.QtGui import QDragEnterEvent, QDropEvent
from PySide6.QtWidgets import QApplication
from pytestqt.qtbot import QtBot

from app.core.conversation import Message
from app.core.errors import ErrorKind, WeftError
from app.core.stack import AdapterStack
from app.engine.environments import Environments
from app.engine.protocol import Generate, Load, SetAdapters
from app.viewmodels.adapter_stack import StackEntry, StackModel
from app.viewmodels.jobs import JobCenter
from app.viewmodels.loadout import Loadout, LoadoutState
from app.viewmodels.loadout_teller import StackTeller
from app.viewmodels.model_table import ModelTable
from app.views.loadout_bar import LoadoutBar
from app.views.stack_bar import AdapterChip, StackBar
from app.workers.engine_worker import EngineWorker
from tests.qt.shell_parts import Rooms, machine, model

VOICE = Path(__file__).resolve().parents[2] / "resources" / "starter" / "voice-adapter"
ASK = Generate(messages=(Message(role="user", content="Hello"),))


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What engines were told."""
    commands: list[Any] = []
    plain = EngineWorker.send

    def send(worker: EngineWorker, command: Any) -> int:
        commands.append(command)
        return plain(worker, command)

    monkeypatch.setattr(EngineWorker, "send", send)
    return commands


def ready(rooms: Rooms, qtbot: QtBot) -> Loadout:
    loadout = rooms.loadout()
    loadout.load(model())
    qtbot.waitUntil(lambda: loadout.state is LoadoutState.READY, timeout=15_000)
    return loadout


def stacks(sent: list[Any]) -> list[list[float]]:
    return [[a.weight for a in c.adapters.adapters] for c in sent if isinstance(c, SetAdapters)]


def test_chips_change_what_the_engine_is_told(rooms: Rooms, qtbot: QtBot, sent: list[Any]) -> None:
    loadout = ready(rooms, qtbot)
    stack = StackModel(loadout)
    bar = StackBar(stack)
    qtbot.addWidget(bar)
    bar.show()
    assert stack.add(VOICE) and len(bar.chips) == 1
    (chip,) = bar.chips
    qtbot.waitUntil(lambda: stacks(sent) == [[1.0]] and not loadout._stack.command)
    chip.slider.setValue(70)
    qtbot.waitUntil(lambda: stacks(sent)[-1] == [0.7] and not loadout._stack.command)
    chip.switch.click()
    qtbot.waitUntil(lambda: stacks(sent)[-1] == [0.0] and not loadout._stack.command)
    chip.switch.click()
    chip.number.setValue(-3)
    qtbot.waitUntil(lambda: stacks(sent)[-1] == [-3.0] and not loadout._stack.command)
    assert chip.slider.value() == 0 and stack.entries[0].weight == -3.0
    qtbot.mouseDClick(chip.slider, Qt.MouseButton.LeftButton)
    qtbot.waitUntil(lambda: stacks(sent)[-1] == [1.0] and not loadout._stack.command)
    assert all(child.accessibleName() for child in (chip.switch, chip.slider, chip.number, chip.close_button))
    chip.close_button.click()
    qtbot.waitUntil(lambda: stacks(sent)[-1] == [] and not bar.chips)


def test_dragging_a_weight_tells_the_engine_no_more_than_it_can_take(
    rooms: Rooms, qtbot: QtBot, sent: list[Any]
) -> None:
    loadout = ready(rooms, qtbot)
    stack = StackModel(loadout)
    stack.add(VOICE)
    for number in range(100):
        stack.set_weight(str(VOICE), number / 100)
    with qtbot.waitSignal(loadout.finished, timeout=10_000):
        loadout.generate(ASK)
    commands = [c for c in sent if isinstance(c, (SetAdapters, Generate))]
    assert isinstance(commands[-1], Generate) and isinstance(commands[-2], SetAdapters)
    assert commands[-2].adapters.adapters[0].weight == 0.99, "the answer is of the newest stack"
    assert len(commands) < 10


def test_the_stack_goes_with_every_load_of_its_model_and_with_no_other(
    rooms: Rooms, qtbot: QtBot, sent: list[Any]
) -> None:
    loadout = ready(rooms, qtbot)
    stack = StackModel(loadout)
    stack.add(VOICE)
    qtbot.waitUntil(lambda: not loadout._stack.command)
    loadout.reload()
    qtbot.waitUntil(lambda: loadout.state is LoadoutState.READY, timeout=15_000)
    assert [a.weight for a in [c for c in sent if isinstance(c, Load)][-1].adapters.adapters] == [1.0]
    loadout.load(model("maker/other-1B"))
    qtbot.waitUntil(lambda: loadout.state is LoadoutState.READY, timeout=15_000)
    assert sent[-1].adapters == AdapterStack() and stack.entries == []


def test_the_stack_does_not_go_over_to_another_model_by_way_of_eject_or_a_pick(
    rooms: Rooms, qtbot: QtBot, sent: list[Any]
) -> None:
    loadout = ready(rooms, qtbot)
    stack = StackModel(loadout)
    stack.add(VOICE)
    loadout.unload()
    loadout.load(model())
    qtbot.waitUntil(lambda: loadout.state is LoadoutState.READY, timeout=15_000)
    assert sent[-1].adapters.adapters, "it comes back with its own model"
    loadout.unload()
    loadout.load(model("maker/other-1B"))
    qtbot.waitUntil(lambda: loadout.state is LoadoutState.READY, timeout=15_000)
    assert sent[-1].adapters == AdapterStack() and stack.entries == []
    stack.add(VOICE)
    rooms.settings.update(autoload=False)
    loadout.select(model())
    assert stack.entries == [] and loadout.stack == AdapterStack()
    loadout.unload()
    stack.add(VOICE)  # with no model in sight: it is for the next
    loadout.load(model())
    qtbot.waitUntil(lambda: loadout.state is LoadoutState.READY, timeout=15_000)
    assert sent[-1].adapters.adapters and stack.entries


def test_a_refused_stack_is_put_back_and_said(rooms: Rooms, qtbot: QtBot, monkeypatch: pytest.MonkeyPatch) -> None:
    loadout = ready(rooms, qtbot)
    stack = StackModel(loadout)
    stack.add(VOICE)
    qtbot.waitUntil(lambda: not loadout._stack.command)
    said: list[str] = []
    loadout.notice.connect(said.append)
    stack.set_weight(str(VOICE), 0.5)
    loadout._command_failed(
        loadout._stack.command, WeftError(ErrorKind.UNSUPPORTED, "It does not fit.", "Choose another.")
    )
    assert said == ["It does not fit. Choose another."]
    assert stack.entries[0].weight == 1.0 and loadout.stack.adapters[0].weight == 1.0


def test_what_is_no_adapter_is_refused_in_words(rooms: Rooms, qtbot: QtBot, tmp_path: Path) -> None:
    stack = StackModel(ready(rooms, qtbot))
    said: list[str] = []
    stack.refused.connect(said.append)
    (tmp_path / "notes.txt").write_text("x")
    assert not stack.add(tmp_path / "notes.txt")
    assert "no LoRA adapter" in said[0] and not stack.entries


def test_an_adapter_dropped_on_the_bar_joins_the_stack(rooms: Rooms, qtbot: QtBot, tmp_path: Path) -> None:
    shutil.copytree(VOICE, tmp_path / "voice")
    loadout = ready(rooms, qtbot)
    jobs = JobCenter(rooms.jobs, Environments(rooms.paths.environments), lambda *_: None)
    bar = LoadoutBar(loadout=loadout, jobs=jobs, make_table=lambda: ModelTable(rooms.library), machine=machine)
    qtbot.addWidget(bar)
    bar.show()
    data = QMimeData()
    data.setUrls([QUrl.fromLocalFile(str(tmp_path / "voice"))])
    buttons, keys = Qt.MouseButton.LeftButton, Qt.KeyboardModifier.NoModifier
    enter = QDragEnterEvent(QPoint(5, 5), Qt.DropAction.CopyAction, data, buttons, keys)
    QApplication.sendEvent(bar, enter)
    assert enter.isAccepted()
    QApplication.sendEvent(bar, QDropEvent(QPointF(5, 5), Qt.DropAction.CopyAction, data, buttons, keys))
    assert [chip.switch.text() for chip in bar.stack_bar.chips] == ["voice"]


def test_baking_in_is_a_switch_that_the_engine_is_told(
    rooms: Rooms, qtbot: QtBot, sent: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    loadout = ready(rooms, qtbot)
    monkeypatch.setattr(StackTeller, "bakes", True)
    bar = StackBar(StackModel(loadout))
    qtbot.addWidget(bar)
    bar.show()
    assert not bar.bake.isVisible(), "there is nothing to bake in"
    assert bar._model.add(VOICE)
    qtbot.waitUntil(lambda: stacks(sent) == [[1.0]])
    assert bar.bake.isVisible() and not bar.bake.isChecked()
    for on in (True, False):
        bar.bake.click()
        qtbot.waitUntil(lambda on=on: [c.baked for c in sent if isinstance(c, SetAdapters)][-1] is on)
        qtbot.waitUntil(lambda: not loadout._stack.command)
    bar.bake.click()
    bar.chips[0].number.setValue(0.5)
    qtbot.waitUntil(lambda: stacks(sent)[-1] == [0.5] and not loadout._stack.command)
    assert [c for c in sent if isinstance(c, SetAdapters)][-1].baked, "another weight is baked in, too"


def test_a_dragged_weight_is_told_once_when_it_is_let_go(qtbot: QtBot) -> None:
    chip = AdapterChip(StackEntry(path="/loras/a", name="a"))
    qtbot.addWidget(chip)
    told: list[float] = []
    chip.weighed.connect(lambda _path, weight: told.append(weight))
    chip.slider.setSliderDown(True)
    for place in (120, 140, 170):
        chip.slider.setSliderPosition(place)
        assert chip.number.value() == place / 100 and not told
    chip.slider.setSliderDown(False)
    assert told == [1.7]
    chip.number.setValue(-3.0)
    assert told == [1.7, -3.0] and chip.slider.value() == 0
    chip.slider.setValue(50)
    assert told == [1.7, -3.0, 0.5] and chip.number.value() == 0.5
