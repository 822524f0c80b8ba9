"""Merge and export in the whole window: made, compared, uploaded, in the library, and its certificate found again."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from pytestqt.qtbot import QtBot

from app.core.library import ModelEntry, ModelFormat
from app.core.merge_plan import MergePlan
from app.core.paths import resources
from app.core.stack import AdapterStack, StackedAdapter
from app.house import House
from app.store.library import starter
from app.views.export.certificate import CertificateDialog
from tests.fakes.hub import FakeHub
from tests.qt.house_kit import lived_in

CORE = os.environ.get("WEFT_PYTHON_CORE")
TOKEN = "hf_secretOfAlice42"
VOICE = resources() / "starter" / "voice-adapter"
WAIT = 20_000


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with FakeHub() as made:
        made.tokens, made.roles = {TOKEN: "alice"}, {TOKEN: "write"}
        yield made


@pytest.fixture
def house(qtbot: QtBot, home: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> Iterator[House]:
    for name in ("LLAMACPP", "EXPORT"):
        monkeypatch.setenv(f"WEFT_PYTHON_{name}", sys.executable)
    monkeypatch.setenv("WEFT_PYTHON_CORE", CORE or sys.executable)

    def signed_in(house: House) -> None:
        house.downloads.tokens._session[hub.endpoint] = TOKEN

    yield from lived_in(qtbot, home, settings=f'hub_endpoint = "{hub.endpoint}"\n', ready=signed_in)


def voice_stack() -> AdapterStack:
    return AdapterStack(adapters=(StackedAdapter(path=str(VOICE), name="voice"),))


@pytest.mark.skipif(not CORE, reason="WEFT_PYTHON_CORE names no interpreter with PyTorch")
def test_merged_compared_uploaded_and_found_again(house: House, hub: FakeHub, qtbot: QtBot, home: Path) -> None:
    house.exports.open(starter(), voice_stack())
    dialog = house.exports.dialog
    assert dialog is not None
    dialog.form.push.setChecked(True)
    dialog.form.repo.setText("alice/voice")
    uploaded: list[object] = []
    dialog._draft.pushed.connect(uploaded.append)
    made = dialog._draft.target
    dialog.start.click()
    qtbot.waitUntil(lambda: bool(uploaded), timeout=120_000)
    assert dialog.certificate.isVisible() and "alice/voice" in dialog.uploaded.text()
    dialog.close()
    # The hub has all of it, for nobody else to see; the certificate came along.
    repo = hub.repos["alice/voice"]
    there = {name: file for name, file in (repo.files("main") or {}).items() if not name.startswith(".")}
    assert repo.private and set(there) == {path.name for path in made.iterdir()} and "certificate.json" in there
    assert isinstance(there["README.md"].source, bytes) and b"## Certificate" in there["README.md"].source
    assert there["model.safetensors"].source == (made / "model.safetensors").read_bytes()
    # The token lies nowhere.
    qtbot.waitUntil(lambda: not house.tasks.busy, timeout=WAIT)
    for path in [p for p in home.rglob("*") if p.is_file()]:
        assert TOKEN.encode() not in path.read_bytes(), path
    # The result is in the library, and the certificate in its menu.
    qtbot.waitUntil(lambda: any(entry.path == str(made) for entry in house.library.models()), timeout=WAIT)
    entry = next(entry for entry in house.library.models() if entry.path == str(made))
    house.window.show_page("models")
    page = house.window.page("models")
    menu = page.make_menu(entry, page)  # type: ignore[attr-defined]
    next(action for action in menu.actions() if action.text() == "Certificate…").trigger()
    qtbot.waitUntil(lambda: bool(house.window.findChildren(CertificateDialog)), timeout=WAIT)
    (shown,) = house.window.findChildren(CertificateDialog)
    assert shown.view.values["top1"].text() == "100.00 %"
    shown.close()


def test_an_export_goes_on_in_the_background_and_is_told_when_it_ends_badly(
    house: House, qtbot: QtBot, home: Path, tmp_path: Path
) -> None:
    """The dialog is closed; what follows must not need it."""
    entry = msgspec.structs.replace(starter(), path=str(tmp_path / "gone"))
    house.exports.open(entry, voice_stack())
    dialog = house.exports.dialog
    assert dialog is not None and isinstance(dialog._draft.plan(), MergePlan)
    dialog.start.click()
    dialog.close()
    told: list[str] = []
    real = house.window.show_notice
    house.window.show_notice = lambda notice: (told.append(notice.text), real(notice))[1]  # type: ignore[method-assign]
    qtbot.waitUntil(lambda: any("failed" in text for text in told), timeout=60_000)


def quantized(folder: Path, base: str) -> ModelEntry:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"_name_or_path": base}), "utf-8")
    return msgspec.structs.replace(starter(), name=folder.name, path=str(folder), format=ModelFormat.EXL2)


def test_a_quantized_base_leads_to_the_model_in_the_library(house: House, qtbot: QtBot, tmp_path: Path) -> None:
    here = next(e for e in house.library.models() if e.format is ModelFormat.SAFETENSORS)
    house.exports.open(quantized(tmp_path / "packed-exl2", f"weft/{here.name}"), voice_stack())
    first = house.exports.dialog
    assert first is not None
    qtbot.waitUntil(first.form.base_note.isVisible, timeout=WAIT)
    assert first.form.use_base.text() == "Use it" and not first.start.isEnabled()
    first.form.use_base.click()
    second = house.exports.dialog
    assert second is not None and second is not first and second._draft.entry.id == here.id
    assert second._draft.stack == voice_stack() and second.start.isEnabled()
    qtbot.wait(50)
    assert house.exports.dialog is second, "the first one's end does not take the second one away"
    second.close()


def test_a_quantized_base_that_is_not_here_is_looked_for_on_the_hub(
    house: House, hub: FakeHub, qtbot: QtBot, tmp_path: Path
) -> None:
    hub.add("maker/whole-8B", {"config.json": b"{}", "model.safetensors": b"x" * 1000})
    house.exports.open(quantized(tmp_path / "whole-8B-exl2", "maker/whole-8B"), voice_stack())
    dialog = house.exports.dialog
    assert dialog is not None
    qtbot.waitUntil(dialog.form.base_note.isVisible, timeout=WAIT)
    dialog.form.use_base.click()
    window = house.downloads.window()
    assert window.isVisible() and window.finder.field.text() == "maker/whole-8B"
    qtbot.waitUntil(lambda: any("/maker/whole-8B" in r.path for r in hub.requests), timeout=WAIT)
