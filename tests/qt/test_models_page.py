"""The Models page: the table, filter, details, drops, renaming, the trash."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from PySide6.QtCore import QMimeData, QPoint, QPointF, Qt, QUrl
from PySide6.QtGui import QDragEnterEvent, QDropEvent
from PySide6.QtWidgets import QApplication, QLabel, QLineEdit
from pytestqt.qtbot import QtBot

from app.core.errors import WeftError
from app.core.library import ModelEntry, ModelFormat
from app.viewmodels.library_roots import LibraryRoots, damage
from app.viewmodels.loadout import LoadoutState
from app.viewmodels.model_files import files_of, move_to_trash, trash_refusal
from app.viewmodels.model_table import ModelTable
from app.viewmodels.settings import SettingsView
from app.viewmodels.units import readable_bytes
from app.views.dialogs import ConfirmDialog
from app.views.models.page import ModelsPage
from app.views.page import Notice
from tests.fakes import library_files
from tests.fakes.fake_engine import Script
from tests.qt.shell_parts import GB, Rooms, model, touch


def models_page(rooms: Rooms) -> ModelsPage:
    return ModelsPage(
        library=rooms.library,
        loadout=rooms.loadout(),
        model_settings=rooms.model_settings,
        settings=SettingsView(rooms.settings),
        roots=rooms.roots,
        machine=rooms.watch(),
        refresh=lambda: None,
    )


@pytest.fixture
def page(rooms: Rooms, qtbot: QtBot) -> Iterator[ModelsPage]:
    rooms.library.put(
        [
            model("maker/small-7b", size=4 * GB),
            model("maker/large-13b", size=8 * GB),
            model("other/huge-70b", size=400 * GB),
            model("other/broken", problem="The file is cut short.", size=GB),
        ]
    )
    made = models_page(rooms)
    qtbot.addWidget(made)
    made.resize(1360, 800)
    made.show()
    yield made
    made.shutdown()


def names(page: ModelsPage) -> list[str]:
    return [str(page.table.index(row, 0).data()) for row in range(page.table.rowCount())]


def test_rows_fits_and_problems(page: ModelsPage) -> None:
    assert names(page) == ["maker/large-13b", "maker/small-7b", "other/broken", "other/huge-70b"]
    fits = {str(page.table.index(row, 0).data()): page.table.index(row, 6).data() for row in range(4)}
    assert fits["maker/small-7b"] == "RAM"
    assert fits["other/huge-70b"] == "No"
    tip = page.table.index(1, 6).data(Qt.ItemDataRole.ToolTipRole)
    assert "Weights " in tip
    assert "is free" in tip


def test_sort_and_filter_as_you_type(page: ModelsPage, qtbot: QtBot) -> None:
    page.view.sortByColumn(4, Qt.SortOrder.DescendingOrder)
    assert names(page)[0] == "other/huge-70b"
    qtbot.keyClicks(page.field, "maker 7b")
    qtbot.waitUntil(lambda: names(page) == ["maker/small-7b"], timeout=20_000)
    assert "1 of 4" in page._count.text()
    page.field.setText("nothing like it")
    qtbot.waitUntil(lambda: page._pages.currentWidget() is page._nothing, timeout=20_000)
    qtbot.keyClick(page.field, Qt.Key.Key_Escape)
    qtbot.waitUntil(lambda: page.table.rowCount() == 4, timeout=20_000)


def test_enter_loads_with_the_forms_options_and_they_are_saved(page: ModelsPage, rooms: Rooms, qtbot: QtBot) -> None:
    page.show_model("/models/maker/small-7b.gguf")
    form = page.details.form
    assert form is not None
    row = form.rows["n_ctx"]
    assert row.auto is not None
    row.auto.setChecked(False)
    row.control.setValue(512)  # type: ignore[attr-defined]
    assert page.details._saved.text() == "Saved for this model"
    qtbot.keyClick(page.view, Qt.Key.Key_Return)
    loadout = page._loadout
    qtbot.waitUntil(lambda: loadout.state is LoadoutState.READY, timeout=15_000)
    assert loadout.options == {"n_ctx": 512}
    spec = loadout.loader
    assert spec is not None
    assert rooms.model_settings.get("/models/maker/small-7b.gguf", spec.id)[1] == {"n_ctx": 512}
    assert page.details._load.text() == "Reload"
    row.control.setValue(1024)  # type: ignore[attr-defined]
    assert page.details._load.text() == "Reload to apply"
    page.details.restore()
    assert form.values() == {}
    page.details._unload.click()
    assert loadout.state is LoadoutState.EMPTY


def test_wrong_option_stops_the_load_before_it_starts(page: ModelsPage, rooms: Rooms) -> None:
    page.show_model("/models/maker/small-7b.gguf")
    form = page.details.form
    assert form is not None
    row = form.rows["n_ctx"]
    assert row.auto is not None
    row.auto.setChecked(False)
    row.control.setValue(1)  # type: ignore[attr-defined]
    assert not page.details._load.isEnabled()
    page.load_selected()
    assert rooms.made == []


def test_what_does_not_fit_is_said_before_the_load(page: ModelsPage) -> None:
    page.show_model("/models/other/huge-70b.gguf")
    assert "is free" in page.details._estimate.text.text()
    assert page.details._estimate.property("banner") == "warning"
    page.show_model("/models/other/broken.gguf")
    assert page.details._problem.isVisible()
    assert page.details._problem.text.text() == "The file is cut short."


def test_a_context_beyond_what_was_trained_is_said_at_the_field_and_nothing_jumps(
    page: ModelsPage, qtbot: QtBot
) -> None:
    page.show_model("/models/maker/small-7b.gguf")  # trained for 2048
    details = page.details
    form = details.form
    assert form is not None
    row = form.rows["n_ctx"]
    assert row.auto is not None
    details._scroll.ensureWidgetVisible(row)
    qtbot.wait(20)
    names = list(form.rows)
    below = form.rows[names[names.index("n_ctx") + 1]]

    def places() -> tuple[int, int, int]:
        qtbot.wait(20)
        return row.mapTo(details, QPoint()).y(), below.mapTo(details, QPoint()).y(), row.help.y()

    before = places()
    row.auto.setChecked(False)
    row.control.setValue(2048)  # type: ignore[attr-defined]
    assert row.advice.isHidden() and places() == before
    row.control.setValue(4096)  # type: ignore[attr-defined]
    assert row.advice.isVisible() and "trained for 2,048 tokens" in row.advice.text()
    assert details._load.isEnabled()  # it is advice
    assert abs(places()[1] - before[1]) <= 40 and places()[0] == before[0]
    row.control.setValue(1)  # type: ignore[attr-defined]
    assert row.problem.isVisible() and row.advice.isHidden()
    row.reset()
    assert row.help.isVisible() and row.advice.isHidden() and places() == before


def test_an_option_that_makes_it_not_fit_is_said_at_that_option(page: ModelsPage, rooms: Rooms) -> None:
    page.show_model("/models/maker/small-7b.gguf")
    form = page.details.form
    assert form is not None
    assert page.details._estimate.property("banner") == "info"
    row = form.rows["n_ctx"]
    assert row.auto is not None
    row.auto.setChecked(False)
    row.control.setValue(16_000_000)  # type: ignore[attr-defined]
    assert not form.problems()
    assert "is free" in row.advice.text()
    assert page.details._saved.text() == "Saved, but it does not fit"
    assert page.details._estimate.property("banner") == "warning"
    row.reset()
    assert row.advice.isHidden() and page.details._saved.text() == "Default options"


def test_enter_on_the_loaded_model_does_not_read_it_again(page: ModelsPage, rooms: Rooms, qtbot: QtBot) -> None:
    told: list[Notice] = []
    page.notice.connect(told.append)
    page.show_model("/models/maker/small-7b.gguf")
    page.view.setFocus()
    qtbot.keyClick(page.view, Qt.Key.Key_Return)
    qtbot.waitUntil(lambda: page._loadout.state is LoadoutState.READY, timeout=15_000)
    assert len(rooms.made) == 1
    qtbot.keyClick(page.view, Qt.Key.Key_Return)
    page.view.doubleClicked.emit(page.view.currentIndex())
    assert len(rooms.made) == 1 and "is loaded already" in told[-1].text
    form = page.details.form
    assert form is not None
    row = form.rows["n_ctx"]
    assert row.auto is not None
    row.auto.setChecked(False)
    qtbot.keyClick(page.view, Qt.Key.Key_Return)
    assert len(rooms.made) == 2  # with other options it is


def test_a_name_without_spaces_pushes_nothing_out_of_the_details(page: ModelsPage, rooms: Rooms, qtbot: QtBot) -> None:
    long = model(f"maker/{'a_long_name_' * 8}{'x' * 60}", problem=f"{'y' * 90} is damaged.")
    rooms.library.put([long])
    page.library_changed()
    page.show_model(long.id)
    page.resize(872, 600)
    details = page.details
    qtbot.waitUntil(lambda: details.more.mapTo(details, QPoint(details.more.width(), 0)).x() <= details.width())
    assert details._title.accessibleName() == long.name
    assert details._title.text().replace("\u200b", "") == long.name


def test_a_load_shows_its_progress_here_too(page: ModelsPage, rooms: Rooms, qtbot: QtBot) -> None:
    rooms.script = Script(load_seconds=1.5)
    details = page.details
    page.show_model("/models/maker/small-7b.gguf")
    assert details._bar.isHidden()
    page.load_selected()
    loadout = page._loadout
    qtbot.waitUntil(
        lambda: loadout.state is LoadoutState.LOADING and details._bar.maximum() == 1000 and details._bar.value() > 0,
        timeout=15_000,
    )
    assert details._bar.isVisible() and details._cancel.isVisible() and details._phase.text()
    qtbot.waitUntil(lambda: loadout.state is LoadoutState.READY, timeout=15_000)
    assert details._bar.isHidden() and not details._phase.text()


def drop(page: ModelsPage, *paths: Path) -> QDropEvent:
    data = QMimeData()
    data.setUrls([QUrl.fromLocalFile(str(path)) for path in paths])
    target = page
    enter = QDragEnterEvent(
        QPoint(50, 200), Qt.DropAction.CopyAction, data, Qt.MouseButton.LeftButton, Qt.KeyboardModifier.NoModifier
    )
    QApplication.sendEvent(target, enter)
    event = QDropEvent(
        QPointF(50, 200), Qt.DropAction.CopyAction, data, Qt.MouseButton.LeftButton, Qt.KeyboardModifier.NoModifier
    )
    if enter.isAccepted():
        QApplication.sendEvent(target, event)
    else:
        event.ignore()
    return event


def test_drops(page: ModelsPage, rooms: Rooms, qtbot: QtBot, tmp_path: Path) -> None:
    notices: list[Notice] = []
    page.notice.connect(notices.append)
    lone = touch(tmp_path / "downloads" / "a.gguf")
    folder = tmp_path / "my models"
    folder.mkdir()
    assert drop(page, lone).isAccepted()
    assert rooms.settings.settings.roots == (str(lone),)
    qtbot.waitUntil(lambda: len(notices) == 1)
    assert "listed where it lies" in notices[-1].text
    assert notices[-1].tone == "warning" and "a.gguf cannot be used" in notices[-1].text, "it is empty"
    assert drop(page, folder).isAccepted()
    qtbot.waitUntil(lambda: len(notices) == 2)
    assert "indexed from now on" in notices[-1].text
    assert notices[-1].tone == "positive"
    assert notices[-1].run is not None
    notices[-1].run()
    assert rooms.settings.settings.roots == (str(lone),)
    assert drop(page, lone).isAccepted()
    qtbot.waitUntil(lambda: len(notices) == 3)
    assert "already in the library" in notices[-1].text
    assert not drop(page, touch(tmp_path / "letter.txt")).isAccepted()


@pytest.mark.fault
def test_a_file_with_nothing_to_list_is_taken_off_again(
    page: ModelsPage, rooms: Rooms, qtbot: QtBot, tmp_path: Path
) -> None:
    notices: list[Notice] = []
    page.notice.connect(notices.append)
    weights = (library_files.write_folder(tmp_path / "model") / "model.safetensors").read_bytes()
    whole, cut = touch(tmp_path / "whole.safetensors"), touch(tmp_path / "cut.safetensors")
    whole.write_bytes(weights)
    cut.write_bytes(weights[:-7])
    for path, words in ((cut, "truncated"), (whole, "neither a model nor an adapter")):
        assert drop(page, path).isAccepted()
        qtbot.waitUntil(lambda: bool(notices))
        notice = notices.pop()
        assert words in notice.text and notice.tone == "warning" and not notice.action
        assert "folder" in notice.text, "the next step"
        assert rooms.settings.settings.roots == ()


def test_adding_says_what_is_wrong(rooms: Rooms, tmp_path: Path) -> None:
    roots = LibraryRoots(rooms.settings, rooms.paths)
    with pytest.raises(WeftError, match="not there"):
        roots.add([tmp_path / "gone.gguf"])
    with pytest.raises(WeftError, match="not a model"):
        roots.add([touch(tmp_path / "notes.txt")])


def test_a_damaged_folder_is_told_as_a_damaged_file_is(tmp_path: Path) -> None:
    whole = library_files.write_folder(tmp_path / "whole")
    cut = library_files.write_folder(tmp_path / "cut")
    weights = cut / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-7])
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    assert damage([whole, shelf]) == ""  # a folder of models is no model
    assert damage([whole, cut]).startswith("cut cannot be used: ")


def test_rename_shows_finds_and_survives_a_scan(page: ModelsPage, rooms: Rooms) -> None:
    entry = rooms.library.model("/models/maker/small-7b.gguf")
    page.rename(entry, "My favourite")
    assert "My favourite" in names(page)
    assert rooms.library.models("favourite")[0].id == entry.id
    assert rooms.library.find("My favourite").id == entry.id
    rooms.library.put([entry])  # as a scan does
    assert rooms.library.model(entry.id).name == "My favourite"
    page.rename(rooms.library.model(entry.id), "")
    assert "maker/small-7b" in names(page)


def test_a_name_is_edited_in_its_place(page: ModelsPage, rooms: Rooms, qtbot: QtBot) -> None:
    page.show_model("/models/maker/small-7b.gguf")
    page.view.setFocus()

    def edit() -> QLineEdit:
        qtbot.keyClick(page.view, Qt.Key.Key_F2)
        editor = page.view.findChild(QLineEdit)
        assert isinstance(editor, QLineEdit) and editor.isVisible() and editor.accessibleName()
        return editor

    editor = edit()
    assert editor.text() == "maker/small-7b"
    editor.setText("  My   favourite ")
    qtbot.keyClick(editor, Qt.Key.Key_Return)
    qtbot.waitUntil(lambda: "My favourite" in names(page), timeout=20_000)
    assert page.selected is not None and page.selected.name == "My favourite"
    editor = edit()
    editor.setText("something else")
    qtbot.keyClick(editor, Qt.Key.Key_Escape)
    qtbot.wait(20)
    assert "My favourite" in names(page)
    editor = edit()
    editor.clear()
    qtbot.keyClick(editor, Qt.Key.Key_Return)
    qtbot.waitUntil(lambda: "maker/small-7b" in names(page), timeout=20_000)
    assert rooms.made == []  # Enter in the editor is not Enter on the row


def test_trash_and_undo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bin_ = tmp_path / "share" / "Trash" / "files"
    bin_.mkdir(parents=True)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "share"))
    path = touch(tmp_path / "models" / "a.gguf")
    neighbour = touch(tmp_path / "models" / "b.gguf")
    path.write_bytes(b"weights")
    monkeypatch.setattr("send2trash.send2trash", lambda name: Path(name).rename(bin_ / Path(name).name))
    undo = move_to_trash(model("a", str(path.parent)))
    assert not path.exists()
    assert neighbour.exists(), "only the model's own files go"
    assert undo is not None
    undo()
    assert path.read_bytes() == b"weights"


def test_a_model_outside_wefts_folder_is_asked_about_before_the_trash(
    page: ModelsPage, rooms: Rooms, qtbot: QtBot, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone: list[str] = []

    def move(entry: ModelEntry) -> None:
        gone.append(entry.id)

    monkeypatch.setattr("app.views.models.page.move_to_trash", move)
    page.show_model("/models/maker/small-7b.gguf")
    page.trash_selected()
    dialog = next(child for child in page.findChildren(ConfirmDialog))
    said = " ".join(text.text() for text in dialog.findChildren(QLabel))
    assert "/models/maker/small-7b.gguf" in said and readable_bytes(4 * GB) in said
    assert dialog.no.isDefault() and not dialog.yes.isDefault()
    qtbot.keyClick(dialog, Qt.Key.Key_Return)
    qtbot.waitUntil(lambda: not page.findChildren(ConfirmDialog))
    assert not gone
    page.trash_selected()
    page.findChildren(ConfirmDialog)[0].yes.click()
    qtbot.waitUntil(lambda: gone == ["/models/maker/small-7b.gguf"])
    own = model("mine", str(rooms.paths.models))
    rooms.library.put([own])
    page.library_changed()
    page.show_model(own.id)
    page.trash_selected()
    qtbot.waitUntil(lambda: gone[-1] == own.id)


def test_what_cannot_go_to_the_trash_says_why() -> None:
    assert "another program" in trash_refusal(model(read_only=True))
    assert "Eject" in trash_refusal(model(), loaded=True)
    assert trash_refusal(model()) == ""


def test_a_hub_cache_entry_goes_as_a_whole(tmp_path: Path) -> None:
    entry = tmp_path / "hub" / "models--maker--m"
    snapshot = entry / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    assert files_of(model(format=ModelFormat.SAFETENSORS, path=str(snapshot))) == [entry]
    assert files_of(model(format=ModelFormat.SAFETENSORS, path=str(tmp_path))) == [tmp_path]


def test_menu_reasons(page: ModelsPage, rooms: Rooms) -> None:
    menu = page.make_menu(model(read_only=True, problem="Broken."), page)
    actions = {action.text(): action for action in menu.actions()}
    assert not actions["Move to trash"].isEnabled()
    assert "another program" in actions["Move to trash"].toolTip()
    assert not actions["Load"].isEnabled()
    assert {"Show in file manager", "Copy path", "Rename"} <= actions.keys()
    menu.close()


def test_ten_thousand_rows_stay_fluid(rooms: Rooms, qtbot: QtBot) -> None:
    rooms.library.put([model(f"maker{i % 97}/model-{i}", size=GB + i) for i in range(10_000)])
    table = ModelTable(rooms.library)
    began = time.process_time()
    table.refresh()
    table.sort(4, Qt.SortOrder.DescendingOrder)
    for row in range(40):
        for column in range(9):
            table.index(row, column).data()
    table.set_filter("maker5 99")
    took = time.process_time() - began
    assert table.rowCount() > 0
    assert len(table._rows) <= 1024
    print(f"10,000 rows: refresh, sort, 40 rows painted, filter: {took * 1000:.0f} ms")
    assert took < 2.0  # 50 ms on a quiet machine; Python proxies take seconds


def test_empty_state(rooms: Rooms, qtbot: QtBot) -> None:
    made = models_page(rooms)
    qtbot.addWidget(made)
    assert made._pages.currentWidget() is made._empty
    made.shutdown()


def test_autoload_and_advanced_options_follow_the_settings_at_once(page: ModelsPage, rooms: Rooms) -> None:
    view = page._settings
    assert page.autoload.isChecked() and page.autoload.isVisible()
    page.autoload.click()
    assert not rooms.settings.settings.autoload
    view.set("autoload", True)
    assert page.autoload.isChecked()
    form = page.details.form
    assert form is not None and form._advanced is not None
    assert not form._advanced.header.isChecked()
    view.set("show_advanced", True)
    assert form._advanced.header.isChecked()
    view.set("show_advanced", False)
    assert not form._advanced.header.isChecked()
