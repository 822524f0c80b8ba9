"""The Downloads window: what a person types, sees, chooses and is told."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec
import pytest
from PySide6.QtCore import QSettings, Qt
from PySide6.QtWidgets import QAbstractButton, QWidget
from pytestqt.qtbot import QtBot

from app.core.errors import ErrorKind, WeftError
from app.engine import machine
from app.house_downloads import DownloadsHouse
from app.hub.files import Listing
from app.store.downloads import DownloadState
from app.viewmodels import download_table, hub_tables
from app.viewmodels.hub_tables import FileTable
from app.views.downloads import finder
from app.views.downloads.window import MINIMUM, DownloadsWindow
from app.views.page import Notice
from app.views.settings.hub_section import HubSection
from tests.fakes.hub import FakeHub, Fault
from tests.fakes.hub_kit import random_bytes
from tests.qt.download_parts import WAIT, Manager, manager


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with FakeHub() as made:
        made.add(
            "user/tiny-GGUF",
            {f"tiny.{name}.gguf": random_bytes(20_000) for name in ("Q2_K", "Q4_K_M", "Q8_0")} | {"README.md": b"x"},
            tags=("gguf",),
            downloads=10,
        )
        made.add(
            "user/tiny",
            {"config.json": b"{}", "model.safetensors": b"1" * 1000, "pytorch_model.bin": b"2" * 1000},
            downloads=99,
        )
        made.add(
            "user/voice-lora",
            {"adapter_config.json": b"{}", "adapter_model.safetensors": b"3"},
            tags=("lora",),
            downloads=5,
        )
        made.add("user/gated", {"config.json": b"{}"}, private=True)
        yield made


@pytest.fixture
def here(hub: FakeHub, qapp: object) -> Iterator[Manager]:
    with manager(hub) as made:
        made.downloads.open()
        yield made


@pytest.fixture
def window(here: Manager, qtbot: QtBot) -> DownloadsWindow:
    return here.open_window(qtbot)


def listed(qtbot: QtBot, here: Manager, window: DownloadsWindow, text: str) -> Listing:
    window.finder.field.setText(text)
    with qtbot.waitSignal(here.queries.listed, timeout=WAIT) as got:
        qtbot.keyClick(window.finder.field, Qt.Key.Key_Return)
    return got.args[0]


def checked(window: DownloadsWindow) -> list[str]:
    return [row.title for row in window.finder.files.rows if row.checked]


def test_one_field_takes_names_addresses_and_words(window: DownloadsWindow, hub: FakeHub) -> None:
    box = window.finder
    for text, wanted in (
        ("llama 3", "Search"),
        ("user/tiny", "Get file list"),
        ("user/tiny:dev", "Get file list"),
        (f"{hub.endpoint}/user/tiny/tree/main", "Get file list"),
        ("weft://download?repo=user/tiny", "Get file list"),
    ):
        box.field.setText(text)
        assert box.start.text() == wanted and box.start.isEnabled()
    box.field.setText("")
    assert not box.start.isEnabled()


def test_search_filter_sort_and_open(qtbot: QtBot, here: Manager, window: DownloadsWindow) -> None:
    box = window.finder
    box.field.setText("user")
    with qtbot.waitSignal(here.queries.searched, timeout=WAIT):
        box.go()
    assert [hit.repo for hit in box.results.hits] == ["user/tiny", "user/tiny-GGUF", "user/voice-lora"]
    box.result_view.sortByColumn(hub_tables.DOWNLOADS, Qt.SortOrder.AscendingOrder)
    assert box.results.hits[0].repo == "user/voice-lora"
    with qtbot.waitSignal(here.queries.searched, timeout=WAIT):
        box.kind.setCurrentIndex(box.kind.findText("LoRA adapters"))
    assert [hit.repo for hit in box.results.hits] == ["user/voice-lora"]
    box.result_view.setCurrentIndex(box.results.index(0, 0))
    with qtbot.waitSignal(here.queries.listed, timeout=WAIT):
        qtbot.keyClick(box.result_view, Qt.Key.Key_Return)
    assert box.files.listing is not None and box.files.listing.kind == "adapter"
    assert "loras" in box._where.text()
    assert box.back.isVisible()


def test_a_file_list_proposes_what_people_want(qtbot: QtBot, here: Manager, window: DownloadsWindow) -> None:
    listed(qtbot, here, window, "user/tiny-GGUF")
    assert checked(window) == ["tiny.Q4_K_M.gguf"]
    row = window.finder.files.rows[1]
    assert row.quantization == "Q4_K_M" and row.fitting is not None and row.fitting.word == "RAM"
    listed(qtbot, here, window, "user/tiny")
    assert set(checked(window)) == {"config.json", "model.safetensors"}
    assert all(row.fitting is not None for row in window.finder.files.rows if row.title == "model.safetensors")
    window.finder.files.check("all")
    assert "pytorch_model.bin" in checked(window)
    window.finder.files.check("usual")
    assert "pytorch_model.bin" not in checked(window)
    window.finder.files.check("none")
    assert not window.finder.fetch.isEnabled()


def test_a_link_to_a_file_checks_that_file(qtbot: QtBot, here: Manager, window: DownloadsWindow, hub: FakeHub) -> None:
    listed(qtbot, here, window, f"{hub.endpoint}/user/tiny-GGUF/blob/main/tiny.Q8_0.gguf")
    assert checked(window) == ["tiny.Q8_0.gguf"]


def test_by_keyboard_alone_from_a_name_to_a_file(qtbot: QtBot, here: Manager, window: DownloadsWindow) -> None:
    listed(qtbot, here, window, "user/tiny-GGUF")
    view = window.finder.file_view
    assert view.hasFocus()
    qtbot.keyClick(view, Qt.Key.Key_Space)
    assert checked(window) == []
    qtbot.keyClick(view, Qt.Key.Key_Down)
    qtbot.keyClick(view, Qt.Key.Key_Space)
    assert checked(window) == ["tiny.Q8_0.gguf"]
    with qtbot.waitSignal(here.downloads.finished, timeout=WAIT):
        window.finder.fetch.click()
    assert (here.folder("user/tiny-GGUF") / "tiny.Q8_0.gguf").exists()
    assert [row.state for row in here.downloads.rows] == [DownloadState.DONE]
    assert [row.download.id for row in window.queue.selected] == [here.downloads.rows[0].download.id]
    window.queue.view.setFocus()
    qtbot.keyClick(window.queue.view, Qt.Key.Key_Delete)
    assert here.downloads.rows == []
    assert (here.folder("user/tiny-GGUF") / "tiny.Q8_0.gguf").exists()  # off the list is not off the disk


def test_failures_are_said_with_the_buttons_that_help(qtbot: QtBot, here: Manager, window: DownloadsWindow) -> None:
    window.finder.field.setText("user/tinny")
    with qtbot.waitSignal(here.queries.failed, timeout=WAIT):
        window.finder.go()
    banner = window.finder.banner
    assert banner.isVisible() and "user/tiny" in banner.text.text()
    window.finder.show_error(
        WeftError(
            ErrorKind.PERMISSION,
            "x is gated.",
            "Accept its licence at https://hub.example/x/y, and enter it in Settings.",
        )
    )
    assert window.finder.banner.page == "https://hub.example/x/y"
    assert window.finder.banner.open_page.isVisible() and window.finder.banner.open_settings.isVisible()
    assert not window.finder.banner.again.isVisible()
    window.finder.field.setText("https://example.org/user/tiny")
    window.finder.go()
    assert "not an address on the hub" in banner.text.text()


def test_a_link_from_outside_asks_first(qtbot: QtBot, here: Manager, window: DownloadsWindow, hub: FakeHub) -> None:
    asked = len(hub.requests)
    window.take_link("weft://open_from_hf?model=user/tiny-GGUF&file=tiny.Q2_K.gguf")
    assert window.dialog is not None and "user/tiny-GGUF" in window.dialog.accessibleName()
    qtbot.wait(100)
    assert len(hub.requests) == asked
    # No wider than its sentences want, and no gaps between them.
    sheet = window.dialog
    assert sheet.width() < 520 and sheet.height() == sheet.layout().totalHeightForWidth(sheet.width())
    window.dialog.reject()
    qtbot.wait(50)
    assert len(hub.requests) == asked
    window.take_link("weft://open_from_hf?model=user/tiny-GGUF&file=tiny.Q2_K.gguf")
    assert window.dialog is not None
    with qtbot.waitSignal(here.queries.listed, timeout=WAIT):
        window.dialog.yes.click()  # type: ignore[attr-defined]
    assert checked(window) == ["tiny.Q2_K.gguf"]
    assert not hub.transfers() and here.downloads.rows == []
    window.take_link("weft://x?model=../../etc")
    assert "does not name a model" in window.finder.banner.text.text()


def test_cancel_asks_whether_to_keep_what_came(
    qtbot: QtBot, here: Manager, window: DownloadsWindow, hub: FakeHub
) -> None:
    hub.add("user/big", {"big.gguf": random_bytes(6_000_000)})
    hub.total_rate = 2_000_000
    download = here.add(qtbot, "user/big")
    row = here.downloads.row(download)
    assert row is not None
    qtbot.waitUntil(lambda: row.done > 1_000_000, timeout=WAIT)
    window.queue.cancel.click()
    assert window.dialog is not None
    window.dialog.yes.click()  # type: ignore[attr-defined]
    qtbot.waitUntil(lambda: not here.downloads.rows, timeout=WAIT)
    qtbot.waitUntil(lambda: not here.folder("user/big").exists(), timeout=WAIT)


def test_the_queue_is_driven_and_read_in_the_window(
    qtbot: QtBot, here: Manager, window: DownloadsWindow, hub: FakeHub
) -> None:
    """Speed, time left, Retry-After, order, pause and resume, by what a person sees and presses."""
    for number in range(3):
        hub.add(f"user/m{number}", {f"m{number}.gguf": random_bytes(4_000_000)})
    hub.total_rate = 2_000_000
    hub.misbehave(Fault("status", path="m0.gguf", code=429, retry_after="60"))
    window.queue.at_once.setValue(1)
    ids = [here.add(qtbot, f"user/m{number}") for number in range(3)]
    queue, table = window.queue, window.queue.table
    ended: list[int] = []
    here.downloads.finished.connect(lambda download: ended.append(download.id))
    cell = lambda row, column: str(table.data(table.index(row, column)) or "")  # noqa: E731
    qtbot.waitUntil(lambda: "slow down. Goes on in" in cell(0, download_table.PROGRESS), timeout=WAIT)
    queue.show_download(ids[2])
    qtbot.keyClick(queue.view, Qt.Key.Key_Up, Qt.KeyboardModifier.AltModifier)
    qtbot.waitUntil(lambda: [row.download.id for row in table.rows] == [ids[0], ids[2], ids[1]], timeout=WAIT)
    assert [row.download.id for row in queue.selected] == [ids[2]]
    queue.pause.click()
    assert cell(1, download_table.PROGRESS).startswith("Paused") and queue.resume.isEnabled()
    queue.resume.click()
    assert cell(1, download_table.PROGRESS).startswith("Waiting")
    queue.show_download(ids[0])
    queue.pause.click()  # not for its minute: the next one's turn has come
    qtbot.waitUntil(lambda: "/s" in cell(1, download_table.SPEED), timeout=WAIT)
    assert "left" in queue._total.text() and "/s" in queue._total.text() and "2 to go" in queue._total.text()
    assert cell(1, download_table.LEFT) != "–" and " of 4.0 MB" in cell(1, download_table.PROGRESS)
    assert [cell(row, download_table.LEFT) for row in (0, 2)] == ["", ""]
    queue.resume.click()
    hub.total_rate = 0
    qtbot.waitUntil(lambda: len(ended) == 3, timeout=WAIT)
    assert ended == [ids[2], ids[0], ids[1]] and queue._total.text() == "3 done"


def test_limits_set_in_the_window_hold_and_are_kept(qtbot: QtBot, here: Manager, window: DownloadsWindow) -> None:
    window.queue.rate.setValue(1.5)
    window.queue.at_once.setValue(4)
    assert (here.downloads.rate, here.downloads.at_once) == (1_500_000, 4)
    assert here.settings_store.load().download_rate == 1_500_000
    window.queue.rate.setValue(0)
    assert window.queue.rate.text() == "No limit"


def test_every_control_has_a_name_and_takes_the_keyboard(qtbot: QtBot, here: Manager, window: DownloadsWindow) -> None:
    listed(qtbot, here, window, "user/tiny-GGUF")
    nameless = [
        type(widget).__name__
        for widget in window.findChildren(QWidget)
        if widget.isVisible()
        and widget.focusPolicy() & Qt.FocusPolicy.TabFocus
        and not widget.accessibleName()
        and not (isinstance(widget, QAbstractButton) and widget.text())
        and not widget.objectName().startswith("qt_")
    ]
    assert not nameless


def test_a_question_that_was_overtaken_is_not_answered(qtbot: QtBot, here: Manager, window: DownloadsWindow) -> None:
    got: list[list[object]] = []
    here.queries.searched.connect(got.append)
    for text in ("user", "tiny", "lora"):
        here.queries.search(text)
    qtbot.waitUntil(lambda: bool(got), timeout=WAIT)
    qtbot.wait(300)
    assert len(got) == 1
    assert [hit.repo for hit in got[0]] == ["user/voice-lora"]  # type: ignore[attr-defined]


def test_the_child_that_asks_can_die_and_the_next_question_is_answered(
    qtbot: QtBot, here: Manager, window: DownloadsWindow
) -> None:
    listed(qtbot, here, window, "user/tiny")
    assert here.queries._worker is not None
    here.queries._worker.kill()
    qtbot.waitUntil(lambda: here.queries._worker is None, timeout=WAIT)
    assert listed(qtbot, here, window, "user/voice-lora").kind == "adapter"


def test_files_that_are_here_are_offered(here: Manager, window: DownloadsWindow) -> None:
    listing = here.listing("user/tiny-GGUF")
    table: FileTable = window.finder.files
    window.finder._listed(
        Listing(
            **{
                **{name: getattr(listing, name) for name in listing.__struct_fields__},
                "here": {"tiny.Q4_K_M.gguf": "/x"},
            }
        )
    )
    assert not window.finder.copies.isHidden() and "20 kB" in window.finder.copies.text()
    assert "on this machine" in str(table.data(table.index(1, hub_tables.NOTE)))
    assert window.finder._stack.currentIndex() == finder.FILES


def test_usual_of_several_quantizations_is_the_one_that_is_proposed(
    qtbot: QtBot, here: Manager, window: DownloadsWindow
) -> None:
    listed(qtbot, here, window, "user/tiny-GGUF")
    window.finder.files.check("all")
    window.finder.files.check("usual")
    assert checked(window) == ["tiny.Q4_K_M.gguf"]


def test_a_list_of_something_else_goes_when_a_name_is_not_found(
    qtbot: QtBot, here: Manager, window: DownloadsWindow
) -> None:
    box = window.finder
    listed(qtbot, here, window, "user/tiny")
    box.field.setText("user/tinny")
    with qtbot.waitSignal(here.queries.failed, timeout=WAIT):
        box.go()
        assert not box.fetch.isEnabled()  # not while another list is on its way either
    assert box._stack.currentIndex() != finder.FILES and box.files.files == ()
    near = [made for made in box.banner.near if made.isVisible()]
    assert near and near[0].text() == "user/tiny" == near[0].accessibleName()
    with qtbot.waitSignal(here.queries.listed, timeout=WAIT):
        near[0].click()
    assert not box.banner.isVisible() and box.fetch.isEnabled()


def test_what_is_downloaded_says_so_and_is_not_offered_as_a_copy(
    qtbot: QtBot, here: Manager, window: DownloadsWindow
) -> None:
    listed(qtbot, here, window, "user/tiny-GGUF")
    with qtbot.waitSignal(here.downloads.finished, timeout=WAIT):
        qtbot.keyClick(window.finder.file_view, Qt.Key.Key_Return, Qt.KeyboardModifier.ControlModifier)
    listing = here.listing("user/tiny-GGUF")
    place = here.folder("user/tiny-GGUF") / "tiny.Q4_K_M.gguf"
    window.finder._listed(msgspec.structs.replace(listing, here={"tiny.Q4_K_M.gguf": str(place)}))
    box = window.finder
    assert box.files.data(box.files.index(1, hub_tables.NOTE)) == "downloaded"
    assert box.copies.isHidden() and box.fetch.text() == "Check again"
    with qtbot.waitSignal(here.downloads.finished, timeout=WAIT):
        box.fetch.click()
    assert here.downloads.rows[-1].download.here == {}


def test_the_newest_download_alone_is_selected_and_why_it_failed_is_in_view(
    qtbot: QtBot, here: Manager, window: DownloadsWindow, hub: FakeHub
) -> None:
    hub.add("user/denied", {"config.json": b"{}"}, denied=True)
    window.resize(*MINIMUM)
    for repo in ("user/tiny", "user/voice-lora", "user/tiny-GGUF"):
        with qtbot.waitSignal(here.downloads.finished, timeout=WAIT):
            here.add(qtbot, repo)
    listed(qtbot, here, window, "user/denied")
    with qtbot.waitSignal(here.downloads.broke, timeout=WAIT):
        qtbot.keyClick(window.finder.file_view, Qt.Key.Key_Return, Qt.KeyboardModifier.ControlModifier)
    assert [row.download.repo for row in window.queue.selected] == ["user/denied"]
    assert window.queue.banner.isVisible() and "denied your request" in window.queue.banner.text.text()
    assert window.queue._open_page.isVisible()
    view = window.queue.view
    qtbot.waitUntil(lambda: view.viewport().rect().contains(view.visualRect(view.currentIndex())), timeout=WAIT)
    assert window.queue._total.text() == "1 failed · 3 done"
    window.queue.clear.click()
    assert [row.download.repo for row in here.downloads.rows] == ["user/denied"]


def test_a_busy_hub_is_said_while_it_is_waited_for(
    qtbot: QtBot, here: Manager, window: DownloadsWindow, hub: FakeHub
) -> None:
    box = window.finder
    hub.misbehave(Fault("api_status", path="/api/models*", code=429, retry_after="2"))
    window.finder.field.setText("user/tiny")
    with qtbot.waitSignal(here.queries.waits, timeout=WAIT, check_params_cb=bool):
        window.finder.go()
    assert box.banner.isVisible() and "slow down" in box.banner.text.text() and not box.banner.again.isVisible()
    qtbot.waitUntil(lambda: box.files.listing is not None, timeout=WAIT)
    assert not box.banner.isVisible()


def test_the_desktop_hears_of_the_end_unless_the_queue_is_in_front(
    qtbot: QtBot, here: Manager, monkeypatch: pytest.MonkeyPatch
) -> None:
    house = DownloadsHouse(
        here.database,
        here.settings,
        here.paths,
        machine=machine.probe,
        state=QSettings(str(here.paths.config / "house.ini"), QSettings.Format.IniFormat),
    )
    monkeypatch.setenv("HF_ENDPOINT", "https://mirror.example")
    here.settings.set("hub_endpoint", "")
    house.window().finder.field.setText("https://mirror.example/user/tiny/tree/main")
    assert house.window().finder.start.text() == "Get file list"  # an address of the hub that the environment names
    told: list[Notice] = []
    house.notice.connect(told.append)
    house.downloads.open()
    listing = here.listing("user/tiny")
    with qtbot.waitSignal(house.downloads.finished, timeout=WAIT):
        house.downloads.add(listing, listing.files)
    assert [(notice.tone, notice.important) for notice in told] == [("positive", True)]
    assert "user/tiny" in told[0].text and "verified" in told[0].text
    window = house.window()
    monkeypatch.setattr(window, "isActiveWindow", lambda: True)
    other = here.listing("user/voice-lora", kind="adapter")
    with qtbot.waitSignal(house.downloads.finished, timeout=WAIT):
        house.downloads.add(other, other.files)
    assert len(told) == 1
    house.close()


def test_parts_of_a_model_stand_in_their_order(here: Manager, window: DownloadsWindow, hub: FakeHub) -> None:
    parts = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
    hub.add(
        "user/parts",
        {"config.json": b"{}", **{part: b"1" * size for part, size in zip(parts, (10, 30, 20), strict=True)}},
    )
    window.finder._listed(here.listing("user/parts"))
    assert [row.title for row in window.finder.files.rows] == [*parts, "config.json"]


def test_an_address_of_another_place_is_not_opened(window: DownloadsWindow) -> None:
    window.finder.field.setText("http://127.0.0.1:1/user/tiny")
    window.finder.go()
    assert window.finder.banner.isVisible() and not window.finder.banner.open_page.isVisible()


# Settings ---------------------------------------------------------------------------------------


@pytest.fixture
def section(here: Manager, qtbot: QtBot, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubSection]:
    import keyring
    from keyring.backends import fail

    monkeypatch.setattr(keyring.core, "_keyring_backend", fail.Keyring())
    made = HubSection(here.settings, here.tokens, here.queries)
    qtbot.addWidget(made)
    qtbot.waitUntil(lambda: bool(made.notes["token"].text()), timeout=WAIT)
    yield made
    made._work.close()


def test_a_wrong_address_or_proxy_says_so_at_its_field(here: Manager, section: HubSection) -> None:
    before = here.settings.now.hub_endpoint
    section.endpoint.setText("hub without a scheme")
    section.endpoint.editingFinished.emit()
    assert "https://" in section.notes["endpoint"].text() and here.settings.now.hub_endpoint == before
    section.endpoint.setText("http://mirror.example/")
    section.endpoint.editingFinished.emit()
    assert (
        here.settings.now.hub_endpoint == "http://mirror.example" and "Plain http" in section.notes["endpoint"].text()
    )
    section.proxy.setText("socks5://p:1")
    section.proxy.editingFinished.emit()
    assert here.settings.now.proxy == "" and "http proxies" in section.notes["proxy"].text()
    section.proxy.setText("proxy:3128")
    section.proxy.editingFinished.emit()
    assert here.settings.now.proxy == "http://proxy:3128"


def test_a_token_without_a_keyring_lives_for_the_session_and_says_so(
    qtbot: QtBot, here: Manager, section: HubSection, hub: FakeHub
) -> None:
    hub.tokens["hf_goodgoodgoodgoodgood"] = "ada"
    section.token.setText("hf_goodgoodgoodgoodgood")
    section.save.click()
    qtbot.waitUntil(lambda: "ada" in section.notes["token"].text(), timeout=WAIT)
    assert "no keyring" in section.notes["token"].text()
    assert section.token.text() == ""
    assert here.tokens.get(hub.endpoint) == ("hf_goodgoodgoodgoodgood", "session")
    assert here.tokens.get("https://other.example") == ("", "")
    section.token.setText("hf_wrongwrongwrongwrong")
    section.save.click()
    qtbot.waitUntil(lambda: "does not accept" in section.notes["token"].text(), timeout=WAIT)
    section.token.setText("two words")
    section.save.click()
    qtbot.waitUntil(lambda: "not a hub token" in section.notes["token"].text(), timeout=WAIT)
    section.forget.click()
    qtbot.waitUntil(lambda: here.tokens.get(hub.endpoint) == ("", ""), timeout=WAIT)
    for path in here.paths.data.rglob("*"):
        if path.is_file():
            assert b"hf_good" not in path.read_bytes() and b"hf_wrong" not in path.read_bytes(), path
