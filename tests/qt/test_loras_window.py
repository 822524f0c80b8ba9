"""Adapters in the whole window: dropped anywhere, on the loadout bar, told apart from models; what the desktop is told."""

from __future__ import annotations

import random
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from PySide6.QtCore import QMimeData, QPoint, QPointF, Qt, QUrl
from PySide6.QtGui import QDragEnterEvent, QDropEvent
from PySide6.QtWidgets import QApplication, QPushButton, QWidget
from pytestqt.qtbot import QtBot

from app.core.library import ModelEntry
from app.core.paths import resources
from app.house import House
from app.house_loras import MEASURING
from app.views.loras.sheets import AlphaSheet
from tests import seeds
from tests.fakes import library_files
from tests.qt.house_kit import lived_in

VOICE = resources() / "starter" / "voice-adapter"
WAIT = 15_000


@pytest.fixture
def rng() -> random.Random:
    return random.Random(seeds.given())


@pytest.fixture
def house(qtbot: QtBot, home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[House]:
    for name in ("CORE", "LLAMACPP", "EXPORT"):
        monkeypatch.setenv(f"WEFT_PYTHON_{name}", sys.executable)
    yield from lived_in(qtbot, home)


def drop(widget: QWidget, *paths: Path) -> None:
    data = QMimeData()
    data.setUrls([QUrl.fromLocalFile(str(path)) for path in paths])
    buttons, keys = Qt.MouseButton.LeftButton, Qt.KeyboardModifier.NoModifier
    enter = QDragEnterEvent(QPoint(5, 5), Qt.DropAction.CopyAction, data, buttons, keys)
    QApplication.sendEvent(widget, enter)
    assert enter.isAccepted()
    QApplication.sendEvent(widget, QDropEvent(QPointF(5, 5), Qt.DropAction.CopyAction, data, buttons, keys))


def adapters(house: House) -> list[str]:
    return [entry.name for entry in house.library.adapters() if entry.root == str(house.paths.adapters)]


def test_an_adapter_dropped_anywhere_is_in_the_library_and_said(house: House, qtbot: QtBot, tmp_path: Path) -> None:
    shutil.copytree(VOICE, tmp_path / "pirate")
    data = bytearray((tmp_path / "pirate" / "adapter_model.safetensors").read_bytes())
    data[-2] ^= 1  # other tensors than the starter's
    (tmp_path / "pirate" / "adapter_model.safetensors").write_bytes(data)
    drop(house.window, tmp_path / "pirate")
    qtbot.waitUntil(lambda: adapters(house) == ["pirate"], timeout=WAIT)
    assert house.window.current == "chat"
    (toast,) = house.window.toasts.shown
    assert toast.notice.text == "pirate: Added to the library." and toast.notice.run is not None
    toast.notice.run()
    assert house.window.current == "loras"
    page = house.window.page("loras")
    qtbot.waitUntil(lambda: page.selected is not None and page.selected.name == "pirate", timeout=WAIT)  # type: ignore[attr-defined]


def test_many_dropped_anywhere_each_have_their_end(
    house: House, qtbot: QtBot, tmp_path: Path, rng: random.Random
) -> None:
    ranks = rng.sample(range(2, 30), 3)
    for rank in ranks:
        library_files.write_peft(tmp_path / f"rank{rank}", rank=rank)
    shutil.copytree(tmp_path / f"rank{ranks[0]}", tmp_path / "again")
    drop(house.window, *(tmp_path / f"rank{rank}" for rank in ranks), tmp_path / "again")
    qtbot.waitUntil(lambda: sorted(adapters(house)) == sorted(f"rank{rank}" for rank in ranks), timeout=WAIT)
    qtbot.waitUntil(lambda: bool(house.window.toasts.shown), timeout=WAIT)


def test_on_the_models_page_a_model_stays_where_it_is_and_an_adapter_is_copied(
    house: House, qtbot: QtBot, tmp_path: Path, rng: random.Random
) -> None:
    library_files.write_peft(tmp_path / "formal", rank=rng.randint(2, 30))
    library_files.write_gguf_adapter(tmp_path / "small.gguf", rank=rng.randint(2, 8))
    model = library_files.write_gguf_model(tmp_path / "model.gguf")
    house.window.show_page("models")
    page = house.window.page("models")
    drop(page, tmp_path / "formal", tmp_path / "small.gguf", model)
    qtbot.waitUntil(lambda: sorted(adapters(house)) == ["formal", "small"], timeout=WAIT)
    qtbot.waitUntil(lambda: str(model) in [entry.path for entry in house.library.models()], timeout=WAIT)
    assert house.settings.settings.roots == (str(model),), "nothing but the model is a root"


def test_on_the_bar_it_joins_the_stack_too_even_after_alpha_was_asked(
    house: House, qtbot: QtBot, tmp_path: Path, rng: random.Random
) -> None:
    bar = house.window.header
    assert bar is not None
    house.loadout._run.model = ModelEntry(id="m", name="m", path="m", format="gguf")  # type: ignore[arg-type]
    rank = rng.randint(2, 9)
    lone = tmp_path / "lone.safetensors"
    lone.write_bytes(library_files.safetensors_bytes(library_files.lora_tensors(rank)))
    library_files.write_peft(tmp_path / "whole", rank=rank + 1)
    drop(bar, lone, tmp_path / "whole")
    qtbot.waitUntil(lambda: isinstance(house.window.dialog, AlphaSheet), timeout=WAIT)
    assert [entry.name for entry in house.loras.stack.entries] == ["whole"]
    sheet = house.window.dialog
    assert isinstance(sheet, AlphaSheet)
    sheet.rows[0].twice.click()
    sheet._add()
    sheet.accept()
    qtbot.waitUntil(lambda: [e.name for e in house.loras.stack.entries] == ["whole", "lone"], timeout=WAIT)
    qtbot.waitUntil(lambda: sorted(adapters(house)) == ["lone", "whole"], timeout=WAIT)
    (entry,) = [each for each in house.library.adapters() if each.name == "lone"]
    assert entry.alpha == 2 * rank and not entry.needs_alpha


def test_the_models_page_lists_the_adapters_that_fit(house: House, qtbot: QtBot) -> None:
    house.window.show_page("models")
    page = house.window.page("models")
    page.show_model(house.library.find(str(resources() / "starter" / "model")).id)  # type: ignore[attr-defined]
    details = page.details  # type: ignore[attr-defined]
    details._adapters_fold.header.click()

    def show() -> list[QPushButton]:
        found = details._adapters_fold.content.findChildren(QPushButton)
        return [each for each in found if each.accessibleName() == "Show voice-adapter on the LoRAs page"]

    qtbot.waitUntil(lambda: len(show()) == 1, timeout=WAIT)
    show()[0].click()
    assert house.window.current == "loras"
    shown = house.window.page("loras")
    qtbot.waitUntil(lambda: shown.selected.name == "voice-adapter", timeout=WAIT)  # type: ignore[attr-defined]


def test_what_is_neither_is_said(house: House, qtbot: QtBot, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "photo.zip").write_bytes(b"no archive")
    house.window.take([tmp_path / "photo.zip"])
    qtbot.waitUntil(lambda: bool(house.window.toasts.shown), timeout=WAIT)
    assert "photo.zip is damaged" in house.window.toasts.shown[-1].notice.text


def test_the_page_opens_by_its_number_and_closes_with_the_window(house: House, qtbot: QtBot) -> None:
    number = house.window.rail.names.index("loras") + 1
    assert any(
        command.shortcut == f"Ctrl+{number}" and command.title == "LoRAs" for command in house.window.all_commands()
    )
    house.window.show_page("loras")
    qtbot.waitUntil(lambda: house.window.page("loras").table.rowCount() >= 1, timeout=WAIT)  # type: ignore[attr-defined]
    assert "Combine adapters…" in [command.title for command in house.window.all_commands()]


def test_measuring_and_converting_ask_for_environments_that_there_are(house: House) -> None:
    assert set(MEASURING) <= set(house.environments.specs())
