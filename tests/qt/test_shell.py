"""The window: pages, palette, keys, toasts, dialogs, geometry, and a whole start with the first paint and the end."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from PySide6.QtCore import QMimeData, QPoint, QPointF, QSettings, Qt, QUrl
from PySide6.QtGui import QDragEnterEvent, QDropEvent, QGuiApplication
from PySide6.QtWidgets import QAbstractButton, QApplication, QWidget
from pytestqt.qtbot import QtBot

from app import bootstrap, logs
from app.core.errors import ErrorKind, WeftError
from app.core.jobs import JobState
from app.core.memory import Machine
from app.core.paths import default_paths
from app.house import House
from app.viewmodels import machine_watch
from app.viewmodels.jobs import INSTALL
from app.viewmodels.loadout import Crash
from app.viewmodels.machine_watch import MachineWatch
from app.views.command_palette import CommandPalette, match
from app.views.dialogs import ConfirmDialog, CrashDialog, ErrorDialog, read_tail
from app.views.main_window import MainWindow
from app.views.model_picker import ModelPicker
from app.views.page import Notice, Page, PageSpec, PaletteCommand
from tests.qt.house_kit import lived_in
from tests.qt.shell_parts import model


class Sheet(Page):
    """A page that records what it is asked."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.asked: list[object] = []

    def find_in_page(self) -> None:
        self.asked.append("find_in_page")

    def toggle_side(self) -> None:
        self.asked.append("side")

    def entered(self) -> None:
        self.asked.append("entered")

    def accepts(self, paths: list[Path]) -> bool:
        return self.name == "two" and all(path.suffix == ".gguf" for path in paths)

    def take(self, paths: list[Path]) -> None:
        self.asked.append(paths)

    def commands(self) -> list[PaletteCommand]:
        return [PaletteCommand(title=f"Do {self.name}", group="Test", run=lambda: self.asked.append("did"))]


SPECS = (
    PageSpec(name="one", title="One", icon="chat", loadout_bar=True),
    PageSpec(name="two", title="Two", icon="models"),
    PageSpec(name="settings", title="Settings", icon="settings", bottom=True),
)


@pytest.fixture
def window(qtbot: QtBot, tmp_path: Path) -> MainWindow:
    made = MainWindow(SPECS, state=QSettings(str(tmp_path / "window.ini"), QSettings.Format.IniFormat))
    qtbot.addWidget(made)
    made.show_page("one")
    made.show()
    made.furnish(build=Sheet, header=QWidget)
    qtbot.waitExposed(made)
    made.activateWindow()
    return made


def sheet(window: MainWindow, name: str) -> Sheet:
    page = window.page(name)
    assert isinstance(page, Sheet)
    return page


def test_pages_are_built_when_first_shown(window: MainWindow, qtbot: QtBot) -> None:
    assert window.current == "one"
    assert window.built("two") is None
    assert window.header is not None
    assert window.header.isVisible()
    qtbot.keyClick(window, Qt.Key.Key_2, Qt.KeyboardModifier.ControlModifier)
    assert window.current == "two"
    assert not window.header.isVisible()
    assert sheet(window, "two").asked == ["entered"]
    qtbot.keyClick(window, Qt.Key.Key_Comma, Qt.KeyboardModifier.ControlModifier)
    assert window.current == "settings"


def test_shortcuts_reach_the_page_in_front(window: MainWindow, qtbot: QtBot) -> None:
    qtbot.keyClick(window, Qt.Key.Key_F, Qt.KeyboardModifier.ControlModifier)
    qtbot.keyClick(window, Qt.Key.Key_B, Qt.KeyboardModifier.ControlModifier)
    assert sheet(window, "one").asked == ["entered", "find_in_page", "side"]


def test_rail_by_keyboard(window: MainWindow, qtbot: QtBot) -> None:
    buttons = list(window.rail._buttons.values())
    buttons[0].setFocus()
    qtbot.keyClick(buttons[0], Qt.Key.Key_Down)
    assert buttons[1].hasFocus()
    qtbot.keyClick(buttons[1], Qt.Key.Key_Space)
    assert window.current == "two"
    qtbot.keyClick(buttons[1], Qt.Key.Key_Up)
    assert buttons[0].hasFocus()


def test_command_palette(window: MainWindow, qtbot: QtBot) -> None:
    window.show_palette()
    palette = window.findChild(CommandPalette)
    assert palette is not None
    qtbot.keyClicks(palette.field, "do o")
    assert palette.model.rows[0].title == "Do one"
    qtbot.keyClick(palette.field, Qt.Key.Key_Return)
    assert "did" in sheet(window, "one").asked


def test_matching_prefers_beginnings() -> None:
    assert match("set", "Settings") > match("set", "Reset") > 0
    assert match("new chat", "New chat") > 0
    assert match("xyz", "New chat") == 0
    assert match("model", "Eject", "Model") > 0


def test_toasts_stack_act_and_go(window: MainWindow, qtbot: QtBot) -> None:
    undone: list[int] = []
    window.show_notice(Notice(text="Deleted.", action="Undo", run=lambda: undone.append(1)))
    window.show_notice(Notice(text="Deleted."))
    for number in range(6):
        window.show_notice(Notice(text=f"Note {number}"))
    assert len(window.toasts.shown) == 4
    window.show_notice(Notice(text="Deleted again.", action="Undo", run=lambda: undone.append(2)))
    assert window.toasts.shown[-1]._timer.interval() >= 10_000 > window.toasts.shown[-2]._timer.interval()
    window.toasts.shown[-1].button.click()
    assert undone == [2]
    bottoms = [toast.geometry().bottom() for toast in window.toasts.shown]
    assert bottoms == sorted(bottoms)
    assert max(bottoms) < window.height()
    for toast in window.toasts.shown:  # beside the rail, and not over what stands at the right
        assert toast.geometry().left() >= window.rail.width()
        assert toast.geometry().right() < window.width() // 2 + 160
    before = max(bottoms)
    window.page("one").foot_height = lambda: 70  # type: ignore[method-assign]
    window.toasts.place()
    assert max(toast.geometry().bottom() for toast in window.toasts.shown) == before - 70
    window.show_page("two")
    assert max(toast.geometry().bottom() for toast in window.toasts.shown) == before
    window.resize(window.width(), window.height() + 40)
    assert max(toast.geometry().bottom() for toast in window.toasts.shown) == before + 40


def test_important_notice_reaches_the_desktop_when_in_the_background(
    window: MainWindow, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    window.furnish(build=Sheet, notify=lambda _, text: told.append(text))
    monkeypatch.setattr(window, "isActiveWindow", lambda: False)
    window.show_notice(Notice(text="Done.", important=True))
    window.show_notice(Notice(text="By the way."))
    assert told == ["Done."]


def test_errors_show_message_hint_and_can_be_copied(window: MainWindow, qtbot: QtBot) -> None:
    window.show_error(WeftError(ErrorKind.CORRUPT, "a.gguf is cut short.", "Download it again."))
    window.show_error(WeftError(ErrorKind.NETWORK, "No answer.", "Try later."))
    first = window.dialog
    assert isinstance(first, ErrorDialog)
    first._copy()
    assert QGuiApplication.clipboard().text() == "a.gguf is cut short.\n\nDownload it again."
    first.reject()
    qtbot.waitUntil(lambda: window.dialog is not None and window.dialog is not first, timeout=20_000)
    assert isinstance(window.dialog, ErrorDialog)
    assert window.dialog.error.message == "No answer."
    window.dialog.reject()
    window.show_error(WeftError(ErrorKind.CANCELLED, "Cancelled by you."))
    assert window.toasts.shown[-1].notice.text == "Cancelled by you."


def test_crash_dialog_shows_the_logs_end(qtbot: QtBot, tmp_path: Path) -> None:
    log = tmp_path / "engine.log"
    log.write_bytes(b"first\n" * 40_000 + b"last words \xff\n")
    again: list[int] = []
    dialog = CrashDialog(WeftError(ErrorKind.CRASHED, "It crashed.", "Try again."), log, lambda: again.append(1))
    qtbot.addWidget(dialog)
    assert "last words" in dialog._tail
    assert len(read_tail(log)) <= 64 * 1024
    names = {made.text(): made for made in dialog.findChildren(QAbstractButton)}
    names["Start again"].click()
    assert again == [1]
    stopped = CrashDialog(WeftError(ErrorKind.CRASHED, "4 times.", "Change something."), None, None)
    qtbot.addWidget(stopped)
    assert "Start again" not in {made.text() for made in stopped.findChildren(QAbstractButton)}


def test_code_question_shows_the_files_and_no_is_the_default(qtbot: QtBot, tmp_path: Path) -> None:
    code = tmp_path / "modeling_x.py"
    code.write_text("import os\n")
    said: list[str] = []
    dialog = ConfirmDialog("Own code", "May it?", "Allow", lambda: said.append("yes"), danger=True, files=[code])
    qtbot.addWidget(dialog)
    dialog.show()
    assert dialog.no.hasFocus() or dialog.focusWidget() is dialog.no
    dialog.no.click()
    assert said == []


def test_drop_goes_to_the_page_that_wants_it(window: MainWindow) -> None:
    def send(name: str) -> None:
        data = QMimeData()
        data.setUrls([QUrl.fromLocalFile(f"/x/{name}")])
        event = QDropEvent(
            QPointF(400, 300), Qt.DropAction.CopyAction, data, Qt.MouseButton.LeftButton, Qt.KeyboardModifier.NoModifier
        )
        enter = QDragEnterEvent(
            QPoint(400, 300), Qt.DropAction.CopyAction, data, Qt.MouseButton.LeftButton, Qt.KeyboardModifier.NoModifier
        )
        QApplication.sendEvent(window, enter)
        assert enter.isAccepted()
        QApplication.sendEvent(window, event)

    send("model.gguf")
    assert window.current == "two"
    assert sheet(window, "two").asked[-1] == [Path("/x/model.gguf")]
    send("letter.txt")
    assert "no use for letter.txt" in window.toasts.shown[-1].notice.text


def test_geometry_and_page_are_remembered(qtbot: QtBot, tmp_path: Path) -> None:
    path = str(tmp_path / "w.ini")
    first = MainWindow(SPECS, state=QSettings(path, QSettings.Format.IniFormat))
    qtbot.addWidget(first)
    first.furnish(build=Sheet)
    first.show()
    first.resize(1111, 666)  # the offscreen screen is 800 wide: a restored window is fitted into what there is
    first.show_page("two")
    first.close()
    second = MainWindow(SPECS, state=QSettings(path, QSettings.Format.IniFormat))
    qtbot.addWidget(second)
    second.show()
    assert second.height() == 666
    assert second.remembered_page("one") == "two"
    assert second.minimumWidth() == 960
    assert second.minimumHeight() == 600


# The whole house ---------------------------------------------------------------------------------------


@pytest.fixture
def house(qtbot: QtBot, home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[House]:
    for name in ("CORE", "LLAMACPP"):
        monkeypatch.setenv(f"WEFT_PYTHON_{name}", sys.executable)
    yield from lived_in(qtbot, home)


@pytest.mark.fault
@pytest.mark.parametrize(
    ("failure", "said"),
    [
        (ImportError("cannot import name 'x'"), "ImportError: cannot import name 'x'"),
        (PermissionError(13, "Permission denied", "/x"), "Permission denied"),
        (WeftError(ErrorKind.DISK_FULL, "The disk is full.", "Make room."), "The disk is full."),
    ],
)
def test_a_start_that_fails_says_why_and_leaves_no_empty_frame(
    qtbot: QtBot,
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    failure: Exception,
    said: str,
) -> None:
    def fails(*_: object) -> None:
        raise failure

    monkeypatch.setattr("app.house.House", fails)
    monkeypatch.setattr("app.logs.install", lambda _folder: logs.Reporter())
    application = QApplication.instance()
    assert isinstance(application, QApplication)
    start = bootstrap.Start(application, default_paths(), None, [])  # type: ignore[arg-type]
    qtbot.addWidget(start.window)
    qtbot.waitUntil(lambda: start.status == 1, timeout=20_000)
    assert not start.window.isVisible()
    assert said in capsys.readouterr().err
    start.close()
    start.deleteLater()


def test_whole_window(house: House, qtbot: QtBot) -> None:
    window = house.window
    for name in window.rail.names:
        window.show_page(name)
        qtbot.wait(20)
        page = house.downloads.window() if name == "downloads" else window.page(name)
        nameless = [
            f"{type(w).__name__} on {name}"
            for w in page.findChildren(QWidget)
            if w.isVisible()
            and w.focusPolicy() & Qt.FocusPolicy.TabFocus
            and not w.accessibleName()
            and not (isinstance(w, QAbstractButton) and w.text())
            and not w.objectName().startswith("qt_")
        ]
        assert not nameless, nameless
    titles = [command.title for command in window.all_commands()]
    assert {"Chat", "Models", "Choose a model…", "Dark colours", "Load starter"} <= set(titles)


def test_theme_switch_and_settings(house: House, qtbot: QtBot) -> None:
    house.settings_view.set("appearance", "dark")
    assert house.theme.dark
    assert house.settings.load().appearance == "dark"
    house.settings_view.set("appearance", "light")
    assert not house.theme.dark


def test_picker_filters_and_picks(house: House, qtbot: QtBot) -> None:
    house.settings.update(autoload=False)
    house.pages.open_picker()
    picker = house.window.findChild(ModelPicker)
    assert picker is not None
    qtbot.keyClicks(picker.field, "gguf")
    assert picker._model.rowCount() == 1
    qtbot.keyClick(picker.field, Qt.Key.Key_Return)
    assert house.loadout.model is not None
    assert house.loadout.model.name == "starter (GGUF)"


def test_popups_have_no_black_corners_where_nothing_composes(house: House) -> None:
    house.pages.open_picker()
    house.window.show_palette()
    for kind in (ModelPicker, CommandPalette):
        popup = house.window.findChild(kind)
        assert popup is not None
        for corner in (popup.rect().topLeft(), popup.rect().bottomRight()):
            assert not popup.mask().contains(corner)
        assert popup.mask().contains(popup.rect().center())
        popup.close()


def test_a_crash_is_told_once(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    error = WeftError(ErrorKind.CRASHED, "The engine crashed.", "Send again.")
    house.window.show_page("chat")
    with monkeypatch.context() as answering:
        answering.setattr(type(house.window.page("chat").controller), "writing", 1)  # type: ignore[attr-defined]
        house.loadout.crashed.emit(Crash(error=error, log="", again=True, lost=1))
    assert house.window.dialog is None  # the answer that broke off says it, with its way on
    for crash, page in (
        (Crash(error=error, log="", again=True), "chat"),
        (Crash(error=error, log="", again=True, lost=1), "chat"),  # another conversation's answer, or another page's
        (Crash(error=error, log="", again=True, lost=1), "models"),
        (Crash(error=error, log="", again=False, lost=1), "chat"),
    ):
        house.window.show_page(page)
        house.loadout.crashed.emit(crash)
        assert isinstance(house.window.dialog, CrashDialog), crash
        house.window.dialog.reject()


def test_settings_name_every_folder_differently_and_look_at_what_is_added(
    house: House, qtbot: QtBot, tmp_path: Path
) -> None:
    lone = tmp_path / "lone.gguf"
    lone.write_bytes(b"GGUF no more")
    house.window.show_page("settings")
    page = house.window.page("settings")
    page._folders_chosen([str(lone)])  # type: ignore[attr-defined]
    qtbot.waitUntil(lambda: bool(house.window.toasts.shown), timeout=20_000)
    notice = house.window.toasts.shown[-1].notice
    assert notice.tone == "warning" and "lone.gguf" in notice.text and notice.action == "Undo"
    titles = [page._root_title(root) for root in house.roots.roots()]  # type: ignore[attr-defined]
    assert titles[-1] == "File" and len(titles) == len(set(titles)), titles


def test_the_settings_stand_in_full_at_their_first_sight(house: House, qtbot: QtBot) -> None:
    house.window.show_page("settings")
    page = house.window.page("settings")
    for _ in range(3):
        qtbot.wait(15)
        for card in page.engines.cards.values():  # type: ignore[attr-defined]
            assert card.height() >= card.heightForWidth(card.width())


def test_a_damaged_last_model_gives_way_to_the_starter(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[str] = []
    monkeypatch.setattr(house.loadout, "load", lambda entry: loaded.append(entry.name))
    broken = model("broken", problem="The file is cut short.")
    monkeypatch.setattr(house.library, "model", lambda _id: broken)
    house.settings.update(last_model=broken.id)
    house.running.load_first_model()
    assert loaded == ["starter"]
    assert "cut short" in house.window.toasts.shown[-1].notice.text


def test_a_model_picked_before_the_machine_is_measured_stays(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[str] = []
    monkeypatch.setattr(house.loadout, "load", lambda entry: loaded.append(entry.name))
    monkeypatch.setattr(house.running, "prepare_environments", lambda: None)
    house.settings.update(load_last=True)
    house.loadout._run.pick(model("chosen"))
    house.running.machine_known()
    assert loaded == [] and house.loadout.model is not None and house.loadout.model.name == "chosen"
    house.loadout.unload()
    house.running.machine_known()
    assert loaded == ["starter"]


def test_unexpected_exception_is_told_with_its_trace(house: House, qtbot: QtBot) -> None:
    house.questions.unexpected("ValueError: boom", "Traceback …\nValueError: boom")
    assert isinstance(house.window.dialog, ErrorDialog)
    assert "boom" in house.window.dialog.error.message
    house.window.dialog.reject()


def test_first_start_prepares_every_engine_and_a_cancelled_one_stays_cancelled(
    house: House, qtbot: QtBot, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WEFT_PYTHON_CORE")
    monkeypatch.delenv("WEFT_PYTHON_LLAMACPP")
    wanted: list[str] = []
    monkeypatch.setattr(house.jobs, "install", wanted.append)
    house.running.prepare_environments()
    assert wanted == [name for name, spec in house.environments.specs().items() if not spec.on_demand]
    wanted.clear()
    jobs = house.job_store
    job = jobs.create(INSTALL, "Install core", parameters='{"name": "core"}')
    jobs.update(job.id, state=JobState.CANCELLED)
    job = jobs.create(INSTALL, "Install llama.cpp", parameters='{"name": "llamacpp"}')
    jobs.update(job.id, state=JobState.CRASHED)
    house.running.prepare_environments()
    assert "core" not in wanted
    assert "llamacpp" in wanted


@pytest.mark.fault
def test_closing_ends_every_thread_though_the_disk_is_full(
    house: House, qtbot: QtBot, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    full = WeftError(ErrorKind.DISK_FULL, "The disk is full.", "Make room.")

    def fails() -> None:
        raise full

    worker = house._library_worker
    assert worker is not None and worker.isRunning()
    with monkeypatch.context() as broken:
        broken.setattr(logs.log, "propagate", True)
        for part in (house.loadout, house.downloads, house.jobs):
            broken.setattr(part, "close", fails)
        broken.setattr(house.window.page("models"), "shutdown", fails)
        house.close()
        told = [record.getMessage() for record in caplog.records if record.exc_info]
    assert [text.removeprefix("Closing ").removesuffix(" failed") for text in told] == [
        "the pages",
        "the loaded model",
        "downloads",
        "jobs",
    ]
    assert not worker.isRunning()
    assert not house.machine._timer.isActive()
    full.__traceback__ = None  # it would keep the house, and have some other thread free it
    caplog.clear()


def test_machine_is_measured_off_the_window_s_thread(qtbot: QtBot, monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[int] = []
    release = threading.Event()
    figures = Machine(system="linux", cpu_count=2, ram_total=8, ram_free=4)

    def slow() -> Machine:
        threads.append(threading.get_ident())
        release.wait(10)
        return figures

    monkeypatch.setattr(machine_watch, "_probe", slow)
    watch = MachineWatch()
    watch.start()
    began = time.perf_counter()
    assert watch.now().ram_free == 0  # not known yet
    assert time.perf_counter() - began < 0.05
    with qtbot.waitSignal(watch.known, timeout=20_000):
        release.set()
    assert watch.now() is figures
    assert watch.measured() is figures
    assert threads and threading.get_ident() not in threads
    watch.close()
    watch.deleteLater()
    qtbot.wait(10)


def test_first_model_is_loaded_once_the_machine_is_known(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[str] = []
    monkeypatch.setattr(house.loadout, "load", lambda entry: loaded.append(entry.name))
    house.settings.update(load_last=True)
    house.machine._told = False
    house.machine._probed("machine", house.machine.measured(), None)
    house.machine._probed("machine", house.machine.measured(), None)
    assert loaded == ["starter"]
