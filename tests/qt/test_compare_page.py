"""The Compare page: columns and stacks, streaming, verdicts that training reads, differences."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from PySide6.QtCore import Qt
from pytestqt.qtbot import QtBot

from app.core.errors import ErrorKind, WeftError
from app.core.library import AdapterEntry, AdapterFormat
from app.core.own_sampling import OwnSampling
from app.core.stack import AdapterStack, StackedAdapter
from app.engine.protocol import GenerateBatch, Generated, GeneratedBatch
from app.store.preferences import Preference, PreferenceStore
from app.store.settings import SettingsStore
from app.viewmodels.chat_presets import Presets
from app.viewmodels.compare import Compare
from app.viewmodels.text_difference import differences
from app.views.compare.page import ComparePage
from app.views.compare.stack_editor import StackEditor
from tests import seeds
from tests.fakes.fake_loadout import FakeLoadout


def entry(name: str) -> AdapterEntry:
    return AdapterEntry(id=f"/loras/{name}", name=name, path=f"/loras/{name}", format=AdapterFormat.PEFT)


def stack(*given: tuple[str, float]) -> AdapterStack:
    return AdapterStack(adapters=tuple(StackedAdapter(path=f"/loras/{n}", name=n, weight=w) for n, w in given))


class Loadout(FakeLoadout):
    """With a library of two adapters."""

    takes_adapters = True

    def adapters(self) -> list[AdapterEntry]:
        return [entry("pirate"), entry("formal")]

    def end(self, *reasons: str, note: str = "") -> None:
        rows = tuple(
            Generated(finish_reason=reason, tokens=4, prompt_tokens=3, seconds=0.5)  # type: ignore[arg-type]
            for reason in reasons
        )
        self.finished.emit(self.last, GeneratedBatch(rows=rows, note=note))


@pytest.fixture
def loadout(qapp: object) -> Loadout:
    made = Loadout()
    made.stack = stack(("pirate", 0.7))
    return made


@pytest.fixture
def page(qtbot: QtBot, loadout: Loadout, tmp_path: Path) -> Iterator[ComparePage]:
    model = Compare(loadout, PreferenceStore(tmp_path / "data" / "preferences.jsonl"))
    made = ComparePage(model, Presets(SettingsStore(tmp_path / "settings.toml")), pick_model=lambda: None)
    qtbot.addWidget(made)
    made.resize(1100, 700)
    made.show()
    yield made


def ask(page: ComparePage, text: str = "Hello?") -> None:
    page.composer.set_text(text)
    page.composer.sent.emit(text)


def test_all_columns_are_asked_at_once_with_one_seed_and_stream_side_by_side(
    page: ComparePage, loadout: Loadout
) -> None:
    assert [view.stack.full for view in page.columns] == ["base", "pirate 0.7"]
    page.seed.setValue(11)
    assert loadout.model is not None
    loadout.model = msgspec.structs.replace(loadout.model, own_sampling=OwnSampling(temperature=0.0))
    page.panel.system_changed.emit("Be brief.")
    ask(page)
    request = loadout.requests[-1]
    assert isinstance(request, GenerateBatch) and request.sampling.seed == 11 and request.sampling.max_tokens == 512
    assert request.sampling.temperature == 0, "as the model's maker says"
    assert page.panel.form.rows["temperature"].value() == 0 and "temperature 0" in page.panel.own.text()
    loadout.model = msgspec.structs.replace(loadout.model, own_sampling=OwnSampling(temperature=1.5))
    loadout.changed.emit()
    assert page.panel.form.rows["temperature"].value() == 1.5, "another model says something else"
    assert [row.adapters for row in request.rows] == [AdapterStack(), stack(("pirate", 0.7))]
    assert {tuple((m.role, m.content) for m in row.messages) for row in request.rows} == {
        (("system", "Be brief."), ("user", "Hello?"))
    }
    loadout.say_row(1, "Ahoy")
    loadout.say_row(0, "Hello")
    loadout.say_row(1, ", sailor")
    assert [view.text.toPlainText() for view in page.columns] == ["Hello", "Ahoy, sailor"]
    assert not page.columns[0].better.isVisible() and not page.add.isEnabled()
    loadout.end("stop", "length", note="One after the other: experts.")
    assert "8.0 tokens/s" in page.columns[0].facts.text() and "cut at the limit" in page.columns[1].facts.text()
    assert page.note.isVisible() and "One after the other" in page.note.text.text()


def test_a_verdict_becomes_rows_that_training_reads(page: ComparePage, loadout: Loadout, tmp_path: Path) -> None:
    from app.training.data_config import DataConfig
    from app.training.rows import load_rows

    page.add.click()
    page.add.click()
    ask(page, "Which?\nThis one.")
    for row, text in enumerate(("same", "better “ü”\nanswer", "same", "another")):
        loadout.say_row(row, text)
    loadout.end("stop", "stop", "stop", "stop")
    page.columns[1].better.click()
    file = tmp_path / "data" / "preferences.jsonl"
    rows = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    assert [(r["prompt"], r["chosen"], r["rejected"]) for r in rows] == [
        ("Which?\nThis one.", "better “ü”\nanswer", worse) for worse in ("same", "another")
    ], "an answer that two columns gave is one example"
    assert rows[0]["rejected_stack"] == "base" and "system" not in rows[0]
    assert page.collected.text() == "2 examples collected" and not page.columns[1].better.isEnabled()
    loaded = load_rows(DataConfig(files=(str(file),)))
    assert len(list(loaded)) == 2 and "preference" in json.dumps(str(loaded.report)).lower()


def test_equal_answers_have_no_better_one(page: ComparePage, loadout: Loadout) -> None:
    ask(page)
    loadout.say_row(0, "the same")
    loadout.say_row(1, "the same")
    loadout.end("stop", "stop")
    assert not page.columns[0].better.isEnabled() and not page.columns[1].better.isEnabled()


def test_a_column_gets_another_stack_from_the_library(page: ComparePage, loadout: Loadout, qtbot: QtBot) -> None:
    page.columns[0].stack.click()
    editor = page.findChild(StackEditor)
    assert editor is not None and [line.name for line in editor.lines] == ["pirate", "formal"]
    editor.field.setText("form")
    assert [line.isHidden() for line in editor.lines] == [True, False]
    editor.lines[1].switch.setChecked(True)
    editor.lines[1].weight.setValue(-0.5)
    assert page.columns[0].stack.full == "formal -0.5"
    editor.base.click()
    assert page.columns[0].stack.full == "base"


def test_until_somebody_chooses_the_last_column_shows_the_stack_that_is_on(page: ComparePage, loadout: Loadout) -> None:
    titles = lambda: [view.stack.full for view in page.columns]  # noqa: E731
    loadout.stack = stack(("formal", 0.5))
    loadout.changed.emit()
    assert titles() == ["base", "formal 0.5"]
    ask(page)
    loadout.say_row(1, "Yes.")
    loadout.end("stop", "stop")
    loadout.stack = AdapterStack()
    loadout.changed.emit()
    assert titles() == ["base", "formal 0.5"] and page.columns[1].text.toPlainText() == "Yes."


def test_two_to_six_columns(page: ComparePage, loadout: Loadout) -> None:
    for _ in range(9):
        page.add.click()
    assert len(page.columns) == 6 and not page.add.isEnabled()
    while page.columns[0].close_button.isVisible():
        page.columns[0].close_button.click()
    assert len(page.columns) == 2
    page.show_stacks([stack(("formal", 1.0))])
    assert [view.stack.full for view in page.columns] == ["formal 1", "base"]


def test_stopping_keeps_what_came_and_a_failure_is_told_once(page: ComparePage, loadout: Loadout) -> None:
    failures: list[WeftError] = []
    page.failed.connect(failures.append)
    ask(page)
    loadout.say_row(0, "half")
    page.composer.stopped.emit()
    assert loadout.cancelled == [1]
    loadout.end("cancelled", "cancelled")
    assert page.columns[0].text.toPlainText() == "half" and "stopped" in page.columns[0].facts.text()
    ask(page, "Again")
    assert page.columns[0].text.toPlainText() == ""
    loadout.fail(WeftError(ErrorKind.UNSUPPORTED, "It does not fit.", "Choose another."))
    assert len(failures) == 1 and page.add.isEnabled()
    ask(page, "Once more")
    loadout.fail(WeftError(ErrorKind.CANCELLED, "Cancelled."))
    assert len(failures) == 1


def test_answers_of_another_request_are_not_taken(page: ComparePage, loadout: Loadout) -> None:
    ask(page)
    loadout.row_tokens.emit(99, 0, "not mine", 1)
    loadout.finished.emit(99, GeneratedBatch(rows=()))
    assert page.columns[0].text.toPlainText() == "" and not page.add.isEnabled()


def test_differences_are_words_and_survive_letters_beyond_the_first_plane(page: ComparePage, loadout: Loadout) -> None:
    page.differences.setChecked(True)
    ask(page)
    loadout.say_row(0, "🧵 a red thread")
    loadout.say_row(1, "🧵 a blue thread")
    loadout.end("stop", "stop")
    for view, word in zip(page.columns, ("red", "blue"), strict=True):
        (mark,) = view.text.extraSelections()
        assert mark.cursor.selectedText() == word  # type: ignore[attr-defined]


def test_differences_of_random_texts_are_what_the_other_lacks() -> None:
    seed = seeds.fresh(1 << 30)
    print(f"seed {seed}")
    chance = random.Random(seed)
    for _ in range(50):
        words = [chance.choice("ab cd ef gh . , ü 🧵".split()) for _ in range(30)]
        other = [w for w in words if chance.random() > 0.2]
        text = " ".join(words)
        kept, last = [], 0
        for first, end in differences(text, " ".join(other)):
            assert last <= first < end <= len(text)
            kept.append(text[last:first])
            last = end
        kept.append(text[last:])
        rest = iter(other)
        assert all(word in rest for word in " ".join(kept).split()), "what is not marked stands in both, in this order"
    assert differences("one two", "") == ((0, 7),) and differences("one two", "one two") == ()


def test_differences_of_long_answers_do_not_stall_the_window() -> None:
    seed = seeds.fresh(1 << 30)
    print(f"seed {seed}")
    chance = random.Random(seed)
    often, seldom = "the a of and to in is it".split(), [f"word{n}" for n in range(600)]

    def answer() -> str:
        return " ".join(chance.choice(often if chance.random() < 0.4 else seldom) for _ in range(4000))

    began = time.process_time()
    assert differences(answer(), answer())
    assert time.process_time() - began < 0.5


def test_without_a_model_it_says_what_to_do(page: ComparePage, loadout: Loadout) -> None:
    from app.viewmodels.loadout import LoadoutState

    loadout.set_state(LoadoutState.EMPTY, model=False)
    assert page.composer.reason == "No model is loaded."
    ask(page)
    assert not loadout.requests


@pytest.mark.fault
def test_a_row_that_was_cut_short_never_joins_the_next(tmp_path: Path) -> None:
    store = PreferenceStore(tmp_path / "p.jsonl")
    store.add([Preference(prompt="a", chosen="b", rejected="c")])
    with store.path.open("ab") as file:
        file.write(b'{"prompt": "cut')
    store.add([Preference(prompt="d", chosen="e", rejected="f")])
    lines = store.path.read_text().splitlines()
    assert json.loads(lines[0])["prompt"] == "a" and json.loads(lines[2])["prompt"] == "d"


@pytest.mark.fault
def test_a_folder_that_cannot_be_written_is_told(page: ComparePage, loadout: Loadout, tmp_path: Path) -> None:
    (tmp_path / "data").write_text("a file where the folder should be")
    failures: list[Any] = []
    page.failed.connect(failures.append)
    ask(page)
    loadout.say_row(0, "one")
    loadout.say_row(1, "two")
    loadout.end("stop", "stop")
    page.columns[0].better.click()
    assert failures and failures[0].kind is ErrorKind.PERMISSION and page.columns[0].better.isEnabled()


def test_everything_has_a_name_for_screen_readers(page: ComparePage) -> None:
    from PySide6.QtWidgets import QAbstractButton, QLineEdit, QPlainTextEdit

    for kind in (QAbstractButton, QLineEdit, QPlainTextEdit):
        for widget in page.findChildren(kind):
            if widget.isVisible() and widget.focusPolicy() != Qt.FocusPolicy.NoFocus:
                assert widget.accessibleName() or getattr(widget, "text", lambda: "")(), widget


def test_long_names_hide_nothing_else(
    page: ComparePage, loadout: Loadout, qtbot: QtBot, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "an adapter with a very long name & many words 日本 " * 4
    monkeypatch.setattr(loadout, "adapters", lambda: [entry(name), entry("short")])
    page._model.set_stacks([stack((name, 0.5)), *[stack(("short", n / 4)) for n in range(1, 6)]])
    qtbot.wait(50)
    shown = page.columns[0].stack.text()
    assert (
        shown.endswith("…")
        and page.columns[0].stack.geometry().right() < page.columns[0].close_button.geometry().left()
    )
    qtbot.waitUntil(lambda: page.columns[1].stack.text() == "short 0.25")
    page.columns[0].stack.click()
    editor = page.findChild(StackEditor)
    assert editor is not None
    qtbot.wait(50)
    for line in editor.lines:
        right = line.weight.mapTo(editor, line.weight.rect().topRight()).x()
        assert line.weight.isVisible() and right < editor.width(), "the weight is in reach"
    editor.close()


def test_ten_thousand_adapters_open_at_once(
    page: ComparePage, loadout: Loadout, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loadout, "adapters", lambda: [entry(f"adapter {n:05}") for n in range(10_000)])
    page._model.set_stacks([stack(("adapter 09999", 0.125)), AdapterStack()])
    began = time.process_time()
    page.columns[0].stack.click()
    assert time.process_time() - began < 1.0
    editor = page.findChild(StackEditor)
    assert (
        editor is not None
        and editor.lines[0].name == "adapter 09999"
        and editor.stack == stack(("adapter 09999", 0.125))
    )
    editor.field.setText("07777")
    (line,) = [line for line in editor.lines if line.isVisible() and line.name.endswith("07777")]
    line.switch.click()
    assert page._model.columns[0].stack == stack(("adapter 09999", 0.125), ("adapter 07777", 1.0))
    editor.close()
