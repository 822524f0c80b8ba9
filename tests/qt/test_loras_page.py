"""The LoRAs page: table, details, imports, stacks, combining, names and the trash, with adapters made anew for each run."""

from __future__ import annotations

import random
import shutil
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PySide6.QtCore import QMimeData, QPoint, QPointF, Qt, QUrl
from PySide6.QtGui import QDragEnterEvent, QDropEvent
from PySide6.QtWidgets import QAbstractButton, QApplication, QComboBox, QLineEdit, QPushButton, QWidget
from pytestqt.qtbot import QtBot

from app.core.adapter_import import Outcome
from app.core.adapter_plans import HealthReport, ModuleNorm
from app.core.combine_plan import METHODS, Combined
from app.core.errors import ErrorKind, WeftError
from app.core.jobs import Job, JobState
from app.core.library import AdapterEntry, ModelEntry
from app.core.paths import resources
from app.core.recognise import recognise_model
from app.core.stack import AdapterStack, StackedAdapter
from app.engine.client import EngineClient
from app.engine.environments import Environments
from app.store.refresh import refresh
from app.store.stacks import StackStore
from app.viewmodels.adapter_details import AdapterStudy
from app.viewmodels.adapter_import import AdapterImports, Imported
from app.viewmodels.adapter_jobs import AdapterJobs, clean_name, combined_words
from app.viewmodels.adapter_stack import StackModel
from app.viewmodels.adapter_table import ALPHA, FITS, AdapterTable
from app.viewmodels.drops import sort_out
from app.viewmodels.jobs import JobCenter
from app.viewmodels.loadout import LoadoutState
from app.viewmodels.model_table import ModelTable
from app.viewmodels.saved_stacks import SavedStacks
from app.viewmodels.tasks import TaskQueue
from app.views.loras.norm_chart import NormChart
from app.views.loras.page import LorasPage
from app.views.loras.sheets import AlphaSheet, NameSheet
from app.views.page import Notice
from app.views.saved_stacks_menu import fill_saved_stacks
from app.workers.task_worker import TaskWorker
from tests import seeds
from tests.fakes import library_files
from tests.qt.shell_parts import Rooms, model

VOICE = resources() / "starter" / "voice-adapter"
WAIT = 15_000


@pytest.fixture
def rng() -> random.Random:
    return random.Random(seeds.given())


class Queue(TaskQueue):
    """Keeps what was submitted instead of running it."""

    submitted: list[tuple[str, Any, str]]

    def submit(self, task: str, title: str, parameters: Any, **more: Any) -> Job:
        self.submitted.append((task, parameters, more.get("environment", "core")))
        return Job(id=len(self.submitted), task=task, title=title)


class Study(AdapterStudy):
    """Measures nothing unless it is told to: a child takes a moment to start."""

    asked: list[str]

    def _ask_norms(self, entry: AdapterEntry) -> None:
        self.asked.append(entry.path)


class Loras:
    """The page with all that it stands on, in a home of its own."""

    def __init__(self, rooms: Rooms, qtbot: QtBot) -> None:
        self.rooms, self.qtbot = rooms, qtbot
        self.folder = rooms.paths.adapters
        self.loadout = rooms.loadout()
        self.stack = StackModel(self.loadout)
        self.saved = SavedStacks(StackStore(rooms.database), self.stack)
        self.imports = AdapterImports(rooms.database, self.folder, lambda: [str(self.folder)])
        self.queue = Queue(rooms.jobs, make_client=lambda *_: None, make_worker=TaskWorker, logs=rooms.paths.logs)
        self.queue.submitted = []
        center = JobCenter(rooms.jobs, Environments(rooms.paths.environments), lambda *_: None, tasks=self.queue)
        self.center = center
        self.jobs = AdapterJobs(self.queue, center, self.folder)
        self.study = Study(rooms.database, self._no_client)
        self.study.asked = []
        self.models: list[ModelEntry] = []
        self.notices: list[Notice] = []
        self.errors: list[WeftError] = []
        self.ended: list[Imported] = []
        self.index()
        self.page = LorasPage(
            library=rooms.library,
            database=rooms.database,
            loadout=self.loadout,
            stack=self.stack,
            saved=self.saved,
            imports=self.imports,
            jobs=self.jobs,
            study=self.study,
            roots=rooms.roots,
            make_models=lambda: ModelTable(rooms.library),
            refresh=self.index,
        )
        self.page.notice.connect(self.notices.append)
        self.page.failed.connect(self.errors.append)
        self.imports.ended.connect(self.ended.append)
        self.imports.library_changed.connect(self.index)
        qtbot.addWidget(self.page)
        self.page.resize(1360, 800)
        self.page.show()

    @staticmethod
    def _no_client() -> EngineClient:
        raise WeftError(ErrorKind.ENVIRONMENT, "The engine is not installed.", "Install it.")

    def index(self) -> None:
        refresh(self.rooms.library, [r for r in self.rooms.roots.roots() if r.path == str(self.folder)])
        self.rooms.library.put(self.models)
        if hasattr(self, "page"):
            self.page.library_changed()

    def have(self, *entries: ModelEntry | None) -> None:
        """These models are in the library."""
        self.models = [entry for entry in entries if entry is not None]
        assert len(self.models) == len(entries)
        self.index()

    def names(self) -> list[str]:
        table = self.page.table
        return [str(table.index(row, 0).data()) for row in range(table.rowCount())]

    def take(self, *paths: Path, **more: Any) -> Imported:
        before = len(self.ended)
        self.imports.add(list(paths), **more)
        self.qtbot.waitUntil(lambda: len(self.ended) > before and not self.imports.busy, timeout=WAIT)
        return self.ended[-1]

    def close(self) -> None:
        self.page.shutdown()
        self.imports.close()
        self.queue.close()
        self.center.close()


@pytest.fixture
def loras(home: Path, qtbot: QtBot) -> Iterator[Loras]:
    rooms = Rooms.build()
    made = Loras(rooms, qtbot)
    yield made
    made.close()
    rooms.close()
    qtbot.wait(20)


def drop(widget: QWidget, *paths: Path) -> bool:
    data = QMimeData()
    data.setUrls([QUrl.fromLocalFile(str(path)) for path in paths])
    buttons, keys = Qt.MouseButton.LeftButton, Qt.KeyboardModifier.NoModifier
    enter = QDragEnterEvent(QPoint(5, 5), Qt.DropAction.CopyAction, data, buttons, keys)
    QApplication.sendEvent(widget, enter)
    if enter.isAccepted():
        QApplication.sendEvent(widget, QDropEvent(QPointF(5, 5), Qt.DropAction.CopyAction, data, buttons, keys))
    return enter.isAccepted()


def peft(folder: Path, rng: random.Random, rank: int | None = None, **more: object) -> Path:
    """A PEFT folder whose tensors no other run has."""
    made = library_files.write_peft(folder, rank=rank or rng.randint(2, 12), **more)
    weights = made / "adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    start = len(data) - 64
    data[start:] = rng.randbytes(64)
    data[start + 3 :: 4] = b"\x3d" * 16  # the exponents' byte: small numbers, no NaN
    weights.write_bytes(bytes(data))
    return made


# Adding ------------------------------------------------------------------------------------------------


def test_the_empty_page_takes_what_is_dropped_and_tells_each_ones_end(
    loras: Loras, qtbot: QtBot, tmp_path: Path, rng: random.Random
) -> None:
    page = loras.page
    assert page._pages.currentWidget() is page._empty
    first = peft(tmp_path / "drop" / "pirate", rng)
    shutil.copytree(first, tmp_path / "again")
    with zipfile.ZipFile(tmp_path / "formal.zip", "w") as archive:
        second = peft(tmp_path / "formal", rng)
        for path in second.iterdir():
            archive.write(path, f"formal/{path.name}")
    (tmp_path / "broken.zip").write_bytes(rng.randbytes(200))
    assert drop(page, first, tmp_path / "formal.zip", tmp_path / "again", tmp_path / "broken.zip")
    qtbot.waitUntil(lambda: bool(loras.ended) and not loras.imports.busy, timeout=WAIT)
    outcomes = [result.outcome for result in loras.ended[-1].results]
    assert outcomes == [Outcome.ADDED, Outcome.ADDED, Outcome.DUPLICATE, Outcome.FAILED]
    assert loras.names() == ["formal", "pirate"]
    assert page._pages.currentWidget() is page._splitter
    lines = page.results.lines
    assert "as pirate" in lines[2].text and lines[2].action == "Copy anyway"
    assert "broken.zip" in lines[3].text and lines[3].tone == "negative"
    assert page.selected is not None and page.selected.name == "pirate", "the first that was added is shown"
    assert lines[2].run is not None
    lines[2].run()
    qtbot.waitUntil(lambda: len(loras.ended) == 2 and not loras.imports.busy, timeout=WAIT)
    assert len(loras.names()) == 3
    assert not page.accepts([tmp_path / "notes.txt"])


def test_alpha_that_nobody_recorded_is_asked_for(
    loras: Loras, qtbot: QtBot, tmp_path: Path, rng: random.Random
) -> None:
    rank = rng.randint(2, 9)
    lone = tmp_path / "lone.safetensors"
    lone.write_bytes(library_files.safetensors_bytes(library_files.lora_tensors(rank)))
    asked: list[list[Any]] = []
    loras.imports.alpha_wanted.connect(asked.append)
    found = loras.take(lone)
    assert [result.outcome for result in found.results] == [Outcome.NEEDS_ALPHA]
    assert len(asked) == 1 and loras.names() == []
    sheet = AlphaSheet(asked[0], loras.imports.give_alphas, loras.page)
    qtbot.addWidget(sheet)
    sheet.show()
    (row,) = sheet.rows
    assert row.rank.text().startswith(str(rank)) and row.alpha == rank
    row.twice.click()
    assert row.alpha == 2 * rank
    row.own.click()
    assert row.value.isEnabled()
    row.value.setValue(3.5)
    sheet._add()
    qtbot.waitUntil(lambda: loras.names() == ["lone"] and not loras.imports.busy, timeout=WAIT)
    assert loras.page.table.index(0, ALPHA).data() == "3.5"
    assert [line.text for line in loras.page.results.lines] == ["Added to the library."], "the question's line is gone"


def test_only_those_of_an_archive_that_lacked_alpha_come_again(
    loras: Loras, tmp_path: Path, rng: random.Random
) -> None:
    with zipfile.ZipFile(tmp_path / "two.zip", "w") as archive:
        whole = peft(tmp_path / "whole", rng)
        for path in whole.iterdir():
            archive.write(path, f"whole/{path.name}")
        tensors = library_files.lora_tensors(rng.randint(13, 20))
        archive.writestr("bare/bare.safetensors", library_files.safetensors_bytes(tensors))
    found = loras.take(tmp_path / "two.zip")
    assert sorted(result.outcome for result in found.results) == [Outcome.ADDED, Outcome.NEEDS_ALPHA]
    (wanting,) = found.of(Outcome.NEEDS_ALPHA)
    before = len(loras.ended)
    loras.imports.give_alphas({wanting.source: 8.0})
    loras.qtbot.waitUntil(lambda: len(loras.ended) > before and not loras.imports.busy, timeout=WAIT)
    assert [result.outcome for result in loras.ended[-1].results] == [Outcome.ADDED]
    assert sorted(loras.names()) == ["bare", "whole"]


def test_a_cancelled_import_leaves_nothing_and_forgets_what_waits(
    loras: Loras, tmp_path: Path, rng: random.Random
) -> None:
    big = peft(tmp_path / "big", rng)
    with (big / "ballast.txt").open("wb") as file:
        file.truncate(64 << 20)
    before = len(loras.ended)
    loras.imports.add([big])
    loras.imports.add([peft(tmp_path / "second", rng)])
    loras.page.results.cancelled.emit()
    loras.qtbot.waitUntil(lambda: len(loras.ended) > before and not loras.imports.busy, timeout=WAIT)
    assert len(loras.ended) == before + 1 and loras.ended[-1].of(Outcome.ADDED) == []
    left = [path.name for path in loras.folder.iterdir()] if loras.folder.exists() else []
    assert left == [] and loras.names() == []
    assert loras.page.results._progress.isHidden()


def test_models_and_adapters_are_told_apart(tmp_path: Path, rng: random.Random) -> None:
    adapter = peft(tmp_path / "a", rng)
    gguf_adapter = library_files.write_gguf_adapter(tmp_path / "g.gguf")
    gguf_model = library_files.write_gguf_model(tmp_path / "m.gguf")
    folder = library_files.write_folder(_made(tmp_path / "model"))
    many = tmp_path / "many"
    peft(many / "one", rng)
    peft(many / "two", rng)
    mixed = tmp_path / "mixed"
    peft(mixed / "one", rng)
    library_files.write_gguf_model(_made(mixed / "deep") / "m.gguf")
    found = sort_out([adapter, gguf_adapter, gguf_model, folder or tmp_path / "model", many, mixed])
    assert found.adapters == [adapter, gguf_adapter, many]
    assert found.models == [gguf_model, folder or tmp_path / "model", mixed]


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def test_duplicates_of_the_library_are_found_by_content(
    loras: Loras, qtbot: QtBot, tmp_path: Path, rng: random.Random
) -> None:
    one = peft(tmp_path / "one", rng)
    loras.take(one, peft(tmp_path / "two", rng, rank=13))
    loras.page.find_duplicates()
    qtbot.waitUntil(lambda: loras.page.results.lines[0].text.startswith("No two"), timeout=WAIT)
    shutil.copytree(loras.folder / "one", loras.folder / "three")
    loras.index()
    loras.page.find_duplicates()
    qtbot.waitUntil(lambda: "same tensors as three" in loras.page.results.lines[0].text, timeout=WAIT)
    assert loras.page.results.lines[0].name == "one"
    loras.page.show_adapter(str(loras.folder / "two"))
    item = loras.page.results._column.itemAt(0)
    assert item is not None and item.widget() is not None
    show = item.widget().findChild(QPushButton)  # type: ignore[union-attr]
    assert show is not None and show.accessibleName() == "Show: one"
    show.click()
    assert loras.page.selected is not None and loras.page.selected.name == "one"


# The table ---------------------------------------------------------------------------------------------


def test_ten_thousand_adapters_are_fluid(loras: Loras, qtbot: QtBot) -> None:
    loras.rooms.library.put(library_files.adapter_entries(10_000))
    page = loras.page
    began = time.perf_counter()
    page.library_changed()
    shown = time.perf_counter() - began
    assert page.table.rowCount() == 10_000
    worst = 0.0
    for step in range(0, 10_000, 499):
        began = time.perf_counter()
        page.view.scrollTo(page.table.index(step, 0))
        page.view.viewport().repaint()
        worst = max(worst, time.perf_counter() - began)
    began = time.perf_counter()
    page.field.setText("adapter-99 lora")
    page._filter()
    filtered = time.perf_counter() - began
    print(f"shown {shown * 1000:.0f} ms, a page {worst * 1000:.0f} ms, filtered {filtered * 1000:.0f} ms")
    assert 0 < page.table.rowCount() < 200
    assert max(shown, worst, filtered) < 0.5
    assert len(page.table._rows) <= 1024


def test_sorted_and_filtered_by_the_store(loras: Loras, qtbot: QtBot, tmp_path: Path, rng: random.Random) -> None:
    loras.take(peft(tmp_path / "big", rng, rank=12), peft(tmp_path / "small", rng, rank=2, target_modules=["k_proj"]))
    page = loras.page
    page.view.sortByColumn(3, Qt.SortOrder.AscendingOrder)
    assert loras.names() == ["small", "big"]
    page.view.sortByColumn(FITS, Qt.SortOrder.AscendingOrder)  # not in the index: the order stays
    assert loras.names() == ["small", "big"]
    qtbot.keyClicks(page.field, "k_proj")
    qtbot.waitUntil(lambda: loras.names() == ["small"], timeout=20_000)
    page.field.setText("nothing like it")
    qtbot.waitUntil(lambda: page._pages.currentWidget() is page._nothing, timeout=20_000)
    qtbot.keyClick(page.field, Qt.Key.Key_Escape)
    qtbot.waitUntil(lambda: len(loras.names()) == 2, timeout=20_000)


def test_fits_are_counted_behind_and_anew_when_models_come(loras: Loras, qtbot: QtBot) -> None:
    loras.take(VOICE)
    table = loras.page.table
    qtbot.waitUntil(lambda: table.index(0, FITS).data() == "0", timeout=WAIT)
    folder = resources() / "starter"
    loras.have(recognise_model(folder / "model"), recognise_model(next(folder.glob("*.gguf"))))
    qtbot.waitUntil(lambda: table.index(0, FITS).data() == "2", timeout=WAIT)
    assert "2 of 2" in table.index(0, FITS).data(Qt.ItemDataRole.ToolTipRole)


# The details -------------------------------------------------------------------------------------------


def test_how_it_fits_which_modules_do_not_and_the_best_bases(
    loras: Loras, qtbot: QtBot, tmp_path: Path, rng: random.Random
) -> None:
    starter = recognise_model(resources() / "starter" / "model")
    assert starter is not None
    loras.have(starter, model("maker/other-1B"))
    loras.take(VOICE)
    details = loras.page.details
    qtbot.waitUntil(lambda: bool(details.bases), timeout=WAIT)
    assert details.bases[0].model.id == starter.id
    qtbot.waitUntil(lambda: details.verdict.text() == "28 of 28 modules match", timeout=WAIT)
    assert details.verdict.property("chip") == "positive" and not details._unmatched.isVisible()
    assert "base_model_name_or_path = " in details._said_box.toPlainText()
    assert "adapter_model.safetensors" in details._files_box.toPlainText()
    loras.take(peft(tmp_path / "misfit", rng))
    loras.loadout.load(starter)
    qtbot.waitUntil(lambda: loras.loadout.state is LoadoutState.READY, timeout=WAIT)
    qtbot.waitUntil(lambda: details.verdict.text().startswith("0 of 2"), timeout=WAIT)
    assert details.verdict.property("chip") == "negative"
    assert details._unmatched.isVisible() and "q_proj: it is " in details._unmatched_box.toPlainText()
    assert details.reasons.text()
    loras.page.use(loras.page.selected)  # type: ignore[arg-type]
    assert not loras.stack.entries and f"does not fit {starter.name}" in loras.notices[-1].text
    other = loras.models[1]
    popup = loras.page.pick_model()
    popup.picked.emit(other)
    popup.close()
    assert details.model.currentText() == other.name
    qtbot.waitUntil(lambda: details.fit is not None and details.fit.model == other, timeout=WAIT)


def test_zero_and_nan_are_told_without_an_engine(
    loras: Loras, qtbot: QtBot, tmp_path: Path, rng: random.Random
) -> None:
    broken = peft(tmp_path / "broken", rng)
    weights = broken / "adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-4:] = b"\x00\x00\xc0\x7f"
    weights.write_bytes(bytes(data))
    loras.take(broken)
    details = loras.page.details
    qtbot.waitUntil(lambda: details.troubles.isVisible(), timeout=WAIT)
    assert "NaN" in details.troubles.text.text()
    blank = library_files.write_peft(tmp_path / "blank", rank=rng.randint(13, 30))
    loras.take(blank)
    qtbot.waitUntil(lambda: "changes nothing" in details.troubles.text.text(), timeout=WAIT)


def test_norms_are_drawn_and_told_in_words(qtbot: QtBot, rng: random.Random) -> None:
    norms = [rng.uniform(0.5, 9.0) for _ in range(6)]
    modules = [
        ModuleNorm(layer=n % 3, module=f"layers.{n % 3}.{tail}", tail=tail, norm=norms[n], rank=8, used=8)
        for n, tail in enumerate(["self_attn.q_proj"] * 3 + ["mlp.up_proj"] * 3)
    ]
    modules.append(
        ModuleNorm(layer=1, module="layers.1.x", tail="x", norm=None, rank=8, used=0, trouble="NaN.", kind="broken")
    )
    modules.append(ModuleNorm(layer=2, module="layers.2.y", tail="y", norm=0.0, rank=8, used=0, kind="zero"))
    chart = NormChart()
    qtbot.addWidget(chart)
    chart.resize(360, 220)
    chart.show_report(HealthReport(modules=tuple(modules)))
    chart.grab()
    assert len(chart._points) == len(modules)
    for place, one in chart._points:
        assert chart.nearest(place) is not None
        assert 0 <= place.x() <= 360 and 0 <= place.y() <= 220, one
    said = chart.accessibleDescription()
    assert f"{min(norms[:3]):.3g} to {max(norms[:3]):.3g}" in said and "1 marked" in said
    chart.show_report(None)
    chart.grab()
    assert not chart._points and chart.accessibleDescription() == ""


def test_norms_come_from_a_child_and_only_for_the_adapter_that_stays(
    home: Path, qtbot: QtBot, tmp_path: Path, rng: random.Random
) -> None:
    rooms = Rooms.build()
    from app.core.recognise import recognise_adapter

    study = AdapterStudy(rooms.database, Loras._no_client)
    said: list[object] = []
    study.norms.connect(said.append)
    entry = recognise_adapter(peft(tmp_path / "a", rng))
    assert entry is not None
    study.want_norms(True)
    study.show(entry, None)
    qtbot.waitUntil(lambda: bool(said), timeout=WAIT)
    assert isinstance(said[0], WeftError) and "not installed" in said[0].message
    study.close()
    rooms.close()


# Using -------------------------------------------------------------------------------------------------


def test_enter_uses_and_a_dot_shows_what_is_in_the_stack(loras: Loras, qtbot: QtBot) -> None:
    loras.take(VOICE)
    starter = recognise_model(resources() / "starter" / "model")
    assert starter is not None
    loras.loadout.load(starter)
    qtbot.waitUntil(lambda: loras.loadout.state is LoadoutState.READY, timeout=WAIT)
    page = loras.page
    qtbot.keyClick(page.view, Qt.Key.Key_Return)
    assert [entry.name for entry in loras.stack.entries] == ["voice-adapter"]
    assert "in the stack" in page.table.index(0, 0).data(Qt.ItemDataRole.AccessibleTextRole)
    assert page.details.use.text() == "Take out"
    assert loras.notices[-1].action == "Take out"
    page.trash_selected()
    assert "Take it out first" in loras.notices[-1].text
    page.details.use.click()
    assert loras.stack.entries == [] and page.details.use.text() == "Use"


def test_with_nothing_loaded_a_base_is_loaded_with_the_adapter_on(loras: Loras, qtbot: QtBot) -> None:
    starter = recognise_model(resources() / "starter" / "model")
    assert starter is not None
    loras.have(starter)
    loras.take(VOICE)
    page = loras.page
    qtbot.waitUntil(lambda: bool(page.details.bases), timeout=WAIT)
    page.details.bases[0].load.click()
    qtbot.waitUntil(lambda: loras.loadout.state is LoadoutState.READY, timeout=WAIT)
    assert loras.loadout.model == starter
    assert [adapter.path for adapter in loras.loadout.stack.adapters] == [page.selected.path]  # type: ignore[union-attr]


def test_with_no_base_at_all_it_says_which_to_get(
    loras: Loras, qtbot: QtBot, tmp_path: Path, rng: random.Random
) -> None:
    loras.take(peft(tmp_path / "lonely", rng))
    entry = loras.page.selected
    assert entry is not None
    loras.page.use(entry)
    assert "user/base" in loras.notices[-1].text and not loras.stack.entries


def test_stacks_are_saved_put_on_renamed_and_deleted_with_a_way_back(
    loras: Loras, qtbot: QtBot, tmp_path: Path, rng: random.Random
) -> None:
    one, two = peft(tmp_path / "one", rng), peft(tmp_path / "two", rng)
    weight = round(rng.uniform(-2, 2), 2) or 0.5
    loras.stack.add(one)
    loras.stack.add(two)
    loras.stack.set_weight(str(one), weight)
    loras.stack.set_on(str(two), False)
    loras.saved.save("Evening")
    loras.stack.replace_all(AdapterStack())
    assert loras.stack.entries == []
    menu = loras.page.stacks.menu()
    assert menu is not None
    loras.page._fill_stacks()
    next(action for action in menu.actions() if action.text() == "Evening").trigger()
    assert [(e.name, e.weight, e.on) for e in loras.stack.entries] == [("one", weight, True), ("two", 1.0, False)]
    sheet = NameSheet(
        "Rename", "", "Rename", lambda name: loras.saved.rename(loras.saved.list()[0].id, name), name="Evening"
    )
    qtbot.addWidget(sheet)
    sheet.field.setText("")
    assert not sheet.yes.isEnabled()
    sheet.field.setText("Morning")
    sheet.yes.click()
    assert [saved.name for saved in loras.saved.list()] == ["Morning"]
    shutil.rmtree(two)
    assert "two is not at" in loras.saved.apply(loras.saved.list()[0])[0]
    undo = loras.saved.delete(loras.saved.list()[0].id)
    assert loras.saved.list() == [] and undo is not None
    undo()
    assert [saved.name for saved in loras.saved.list()] == ["Morning"]


# Making ------------------------------------------------------------------------------------------------


def test_combining_asks_for_what_a_method_needs_and_no_more(
    loras: Loras, qtbot: QtBot, tmp_path: Path, rng: random.Random
) -> None:
    loras.take(peft(tmp_path / "one", rng), peft(tmp_path / "two", rng))
    page = loras.page
    page.view.selectAll()
    assert page.combine.text() == "Combine 2…"
    page.combine_selected()
    sheet: Any = page._dialog
    assert [part.entry.name for part in sheet.parts] == ["one", "two"]
    assert sheet.field.text() == "one+two"
    for name, text in METHODS.items():
        sheet.method.setCurrentIndex(sheet.method.findData(name))
        assert sheet.help.text() == text
        shown = {w for w in ("density", "sign", "rank", "clamp", "seed") if sheet._form.isRowVisible(getattr(sheet, w))}
        assert ("density" in shown) == name.startswith(("ties", "dare", "magnitude"))
        assert ("sign" in shown) == ("ties" in name) and ("rank" in shown) == name.endswith("svd")
        assert ("seed" in shown) == name.startswith("dare")
        sheet.plan()
    weight = round(rng.uniform(-3, 3), 3)
    sheet.parts[0].weight.setValue(weight)
    sheet.method.setCurrentIndex(sheet.method.findData("dare_ties_svd"))
    sheet.rank.setValue(5)
    sheet.seed.setValue(11)
    (loras.folder / "taken").mkdir()
    sheet.field.setText("taken")
    sheet._name_typed("taken")
    assert "already" in sheet.problem.text() and not sheet.yes.isEnabled()
    sheet.field.setText("mixed")
    sheet._name_typed("mixed")
    sheet.yes.click()
    ((task, plan, environment),) = loras.queue.submitted
    assert (task, environment) == ("combine", "core")
    assert plan.to == str(loras.folder / "mixed") and (plan.rank, plan.seed, plan.method) == (5, 11, "dare_ties_svd")
    assert [adapter.weight for adapter in plan.adapters.adapters] == [weight, 1.0]


def test_what_was_combined_is_told_with_the_energy_that_was_kept(
    loras: Loras, tmp_path: Path, rng: random.Random
) -> None:
    made = Combined(
        adapter=str(loras.folder / "mixed"), rank=5, modules=28, energy=0.8765, lowest=0.5, lowest_module="m"
    )
    assert "Energy kept: 87.65%" in combined_words(made) and "50.00% (m)" in combined_words(made)
    assert "exact" in combined_words(Combined(adapter="x", rank=5, modules=28, energy=1.0))
    job = Job(id=1, task="combine", title="Combine one + two", state=JobState.DONE)
    peft(loras.folder / "mixed", rng)
    loras.jobs.library_changed.connect(loras.index)
    loras.queue.ended.emit(job, {"adapter": made.adapter, "rank": 5, "modules": 28, "energy": 0.8765}, None)
    assert "87.65%" in loras.page.results.lines[0].text
    assert loras.names() == ["mixed"] and loras.page.results.lines[0].action == "Show"
    loras.queue.ended.emit(job, None, WeftError(ErrorKind.UNSUPPORTED, "It is a DoRA.", "Use a stack."))
    assert "It is a DoRA." in loras.page.results.lines[0].text


def test_a_dora_is_combined_by_svd_with_its_base_and_by_nothing_else(
    loras: Loras, tmp_path: Path, rng: random.Random
) -> None:
    tensors = library_files.lora_tensors(4)
    out = next(shape[0] for name, (_, shape) in tensors.items() if ".lora_B" in name)
    start = next(name for name in tensors if ".lora_B" in name).partition(".lora_B")[0]
    odd = peft(tmp_path / "odd", rng, 4, use_dora=True)
    more = {**tensors, f"{start}.lora_magnitude_vector": ("F32", (out,))}
    (odd / "adapter_model.safetensors").write_bytes(library_files.safetensors_bytes(more))
    loras.take(peft(tmp_path / "one", rng), odd)
    loras.page.view.selectAll()
    loras.page.combine_selected()
    sheet: Any = loras.page._dialog
    assert {part.entry.kind for part in sheet.parts} == {"LoRA", "DoRA"}
    assert "odd is a DoRA" in sheet.problem.text() and not sheet.yes.isEnabled()
    assert not sheet._form.isRowVisible(sheet.base)
    sheet.method.setCurrentIndex(sheet.method.findData("svd"))
    assert "depends on its base" in sheet.problem.text() and not sheet.yes.isEnabled()
    next(part for part in sheet.parts if part.entry.name == "odd").remove.click()
    assert sheet.yes.isEnabled() and sheet.problem.text() == "" and not sheet._form.isRowVisible(sheet.base)
    sheet.reject()
    starter = recognise_model(resources() / "starter" / "model")
    assert starter is not None
    loras.have(starter)
    loras.page.view.selectAll()
    loras.page.combine_selected()
    sheet = loras.page._dialog
    sheet.method.setCurrentIndex(sheet.method.findData("ties_svd"))
    assert sheet._form.isRowVisible(sheet.base) and sheet.yes.isEnabled(), sheet.problem.text()
    sheet.yes.click()
    ((_, plan, _),) = loras.queue.submitted
    assert (plan.method, plan.base) == ("ties_svd", starter.path)


def test_resizing_begins_with_one_adapter_and_its_rank(loras: Loras, tmp_path: Path, rng: random.Random) -> None:
    loras.take(peft(tmp_path / "big", rng, rank=12))
    entry = loras.page.selected
    assert entry is not None
    loras.page.resize_rank(entry)
    sheet: Any = loras.page._dialog
    sheet.rank.setValue(4)
    assert sheet.field.text() == "big-r4"
    sheet.yes.click()
    ((_, plan, _),) = loras.queue.submitted
    assert (plan.method, plan.rank, len(plan.adapters.adapters)) == ("svd", 4, 1)


def test_converting_offers_models_that_it_fits(loras: Loras, qtbot: QtBot) -> None:
    loras.take(VOICE)
    entry = loras.page.selected
    assert entry is not None
    loras.page.convert(entry)
    assert loras.errors and "needs a model" in loras.errors[-1].message
    starter = recognise_model(resources() / "starter" / "model")
    assert starter is not None
    loras.have(starter)
    qtbot.waitUntil(lambda: bool(loras.page.details.ranked), timeout=WAIT)
    loras.page.convert(entry)
    sheet: Any = loras.page._dialog
    assert sheet.field.text() == "voice-adapter"
    sheet.yes.click()
    ((task, plan, _),) = loras.queue.submitted
    assert task == "convert_adapter" and plan.to == str(loras.folder / "voice-adapter.gguf") and plan.model == starter


@pytest.mark.parametrize(
    ("typed", "clean"), [("a/b\\c", "a-b-c"), ("  x  y ", "x y"), ("..", ""), ("CON", "CON-"), ("ok.", "ok"), ("", "")]
)
def test_names_of_new_adapters_are_names_that_every_system_takes(typed: str, clean: str) -> None:
    assert clean_name(typed) == clean


# Names, trash, keyboard ---------------------------------------------------------------------------------


def test_a_name_of_ones_own_stays_over_scans_and_is_found(
    loras: Loras, qtbot: QtBot, tmp_path: Path, rng: random.Random
) -> None:
    loras.take(peft(tmp_path / "plain", rng))
    page = loras.page
    qtbot.keyClick(page.view, Qt.Key.Key_F2)
    editor = page.view.findChild(QLineEdit)
    assert editor is not None
    editor.setText("Captain")
    qtbot.keyClick(editor, Qt.Key.Key_Return)
    qtbot.waitUntil(lambda: loras.names() == ["Captain"], timeout=20_000)
    loras.index()
    assert loras.names() == ["Captain"]
    assert loras.rooms.library.find_adapter("captain").path == str(loras.folder / "plain")
    entry = page.selected
    assert entry is not None
    page.rename(entry, "")
    assert loras.names() == ["plain"]


def test_the_trash_gives_back(loras: Loras, qtbot: QtBot, tmp_path: Path, rng: random.Random) -> None:
    loras.take(peft(tmp_path / "one", rng), peft(tmp_path / "two", rng))
    qtbot.keyClick(loras.page.view, Qt.Key.Key_Delete)
    qtbot.waitUntil(lambda: loras.names() == ["two"], timeout=WAIT)
    assert not (loras.folder / "one").exists()
    notice = loras.notices[-1]
    if notice.run is None:
        pytest.skip("this system's trash does not tell where things went")
    notice.run()
    assert loras.names() == ["one", "two"]


def test_every_control_has_a_name_and_the_starters_adapter_stays(loras: Loras) -> None:
    loras.take(VOICE)
    page = loras.page
    unnamed = [
        widget
        for kind in (QAbstractButton, QComboBox, QLineEdit)
        for widget in page.findChildren(kind)
        if not widget.accessibleName()
        and not (isinstance(widget, QAbstractButton) and widget.text())
        and not widget.objectName().startswith("qt_")
        and not isinstance(widget.parent(), QLineEdit)
    ]
    own = [w for w in unnamed if type(w).__module__.startswith("app") or w.isVisible()]
    assert [w for w in own if type(w).__name__ != "QTableCornerButton"] == []
    entry = page.selected
    assert entry is not None
    import msgspec

    shipped = msgspec.structs.replace(entry, path=str(VOICE))
    assert "belongs to Weft" in page._trash_refusal(shipped)
    menu = page.make_menu(entry, page)
    texts = [action.text() for action in menu.actions() if action.text()]
    for wanted in ("Use", "Change the rank…", "Convert to GGUF…", "Merge and export…", "Rename", "Move to trash"):
        assert wanted in texts


def test_compare_and_export_are_asked_for_with_the_stack(loras: Loras) -> None:
    loras.take(VOICE)
    compared: list[AdapterStack] = []
    exported: list[Any] = []
    loras.page.compare_wanted.connect(compared.append)
    loras.page.export_wanted.connect(lambda *given: exported.append(given))
    entry = loras.page.selected
    assert entry is not None
    loras.page.details.compare.click()
    loras.page._export(entry)
    wanted = AdapterStack(adapters=(StackedAdapter(path=entry.path, name=entry.name),))
    assert compared == [wanted] and exported == [(None, wanted)]


def test_the_menu_of_the_chips_saves_and_lists(loras: Loras, qtbot: QtBot, tmp_path: Path, rng: random.Random) -> None:
    from PySide6.QtWidgets import QMenu

    menu = QMenu()
    qtbot.addWidget(menu)
    fill_saved_stacks(menu, loras.saved, loras.stack, loras.page, notice=loras.notices.append)
    keep = menu.actions()[0]
    assert not keep.isEnabled() and keep.toolTip()
    loras.stack.add(peft(tmp_path / "one", rng))
    menu.clear()
    fill_saved_stacks(menu, loras.saved, loras.stack, loras.page, notice=loras.notices.append)
    menu.actions()[0].trigger()
    sheet = loras.page.findChild(NameSheet)
    assert sheet is not None
    sheet.field.setText("Mine")
    sheet.yes.click()
    assert [saved.name for saved in loras.saved.list()] == ["Mine"]


def test_a_table_of_its_own_ends_with_the_sheet(loras: Loras, qtbot: QtBot, tmp_path: Path, rng: random.Random) -> None:
    loras.take(peft(tmp_path / "one", rng), peft(tmp_path / "other", rng))
    loras.page.combine_selected()
    sheet: Any = loras.page._dialog
    sheet.show()
    qtbot.keyClicks(sheet.finder, "other")
    assert sheet.found.isVisible() and isinstance(sheet._table, AdapterTable)
    qtbot.keyClick(sheet.finder, Qt.Key.Key_Return)
    assert "other" in [part.entry.name for part in sheet.parts]
    sheet.reject()
