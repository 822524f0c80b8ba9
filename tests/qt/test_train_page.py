"""The Train page: set-up, preview, a run's life, several runs in one chart, and a real training through it."""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from PySide6.QtCore import QObject, Qt, Signal
from PySide6.QtWidgets import QApplication
from pytestqt.qtbot import QtBot

from app.core.errors import ErrorKind, WeftError
from app.core.jobs import Job, JobState, Progress
from app.core.library import ModelFormat, ModelShape
from app.store.database import Database
from app.store.jobs import JobStore
from app.store.runs import RunStore
from app.training import run_file
from app.training.data_config import (
    BadRow,
    DataReport,
    FileReport,
    PreviewExample,
    PreviewParameters,
    PreviewResult,
    PreviewSpan,
)
from app.training.module_names import Modules, ModulesParameters
from app.training.run_config import TrainNews, TrainParameters, TrainResult
from app.viewmodels.train_draft import TrainDraft
from app.viewmodels.train_files import RunFiles
from app.viewmodels.train_runs import TrainRuns
from app.viewmodels.train_state import MOST_POINTS, Curve
from app.views.train.chart import Chart, Series, readable, thinned, ticks
from app.views.train.page import TrainPage
from tests import seeds
from tests.qt.shell_parts import GB, machine, model


class Lane(QObject):
    """A TaskLane that the test answers."""

    answered = Signal(object, object)
    failed = Signal(object, object)

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[PreviewParameters] = []
        self.modules: list[ModulesParameters] = []

    def ask(self, key: object, task: str, parameters: PreviewParameters | ModulesParameters) -> None:
        if isinstance(parameters, ModulesParameters):
            assert task == "train_modules"
            self.modules.append(parameters)
        else:
            assert task == "preview_data"
            self.asked.append(parameters)

    def answer(self, result: PreviewResult) -> None:
        self.answered.emit(self.asked[-1], msgspec.to_builtins(result))

    def answer_modules(self, **found: Any) -> None:
        known = {"linear": {"q_proj": 4, "v_proj": 4, "up_proj": 4}, "embeddings": ("embed_tokens", "lm_head")}
        answer = Modules(**{"experts": (), "layers": 4, "pattern": "layers", "flops": 1e10, **known, **found})
        self.answered.emit(self.modules[-1], msgspec.to_builtins(answer))


class Queue(QObject):
    """A TaskQueue over a real store; the test says what runs do."""

    changed = Signal()
    progressed = Signal(int, object)
    metric = Signal(int, int, object)
    news = Signal(int, str)
    warned = Signal(int, str)
    ended = Signal(object, object, object)

    def __init__(self, store: JobStore) -> None:
        super().__init__()
        self.store = store
        self.active: set[int] = set()
        self.told: list[Any] = []

    def submit(
        self, task: str, title: str, parameters: Any, *, environment: str = "core", resource: str = "cpu"
    ) -> Job:
        envelope = {"environment": environment, "parameters": parameters}
        job = self.store.create(task, title, resource, msgspec.json.encode(envelope).decode())
        self.active.add(job.id)
        self.store.update(job.id, state=JobState.RUNNING)
        self.changed.emit()
        return job

    def retry(self, number: int) -> Job:
        old = self.store.get(number)
        self.told.append(("retry", number))
        return self.submit("train", old.title, json.loads(old.parameters)["parameters"])

    def is_active(self, number: int) -> bool:
        return number in self.active

    is_running = is_active

    def adjust(self, number: int, what: object) -> None:
        self.told.append((number, what))

    def cancel(self, number: int) -> None:
        self.end(number, JobState.CANCELLED, None, WeftError(ErrorKind.CANCELLED, "Cancelled."))

    def end(self, number: int, state: JobState, result: Any, error: WeftError | None = None) -> None:
        self.active.discard(number)
        job = self.store.update(number, state=state, message=str(error or ""))
        self.ended.emit(job, None if result is None else msgspec.to_builtins(result), error)
        self.changed.emit()


class Bench:
    """The page and all around it."""

    def __init__(self, tmp_path: Path) -> None:
        self.database = Database(tmp_path / "weft.db")
        self.store = JobStore(self.database)
        self.queue, self.lane = Queue(self.store), Lane()
        self.adapters = tmp_path / "loras"
        self.adapters.mkdir()
        self.draft = TrainDraft(
            queue=self.queue,  # type: ignore[arg-type]
            lane=self.lane,  # type: ignore[arg-type]
            adapters=self.adapters,
            machine=machine,
        )
        self.page = TrainPage(
            self.draft,
            TrainRuns(self.store, self.queue, RunStore(self.database)),  # type: ignore[arg-type]
            make_table=lambda: None,  # type: ignore[arg-type,return-value]
            run_files=RunFiles(lambda name: trainable()),
        )
        self.data = tmp_path / "examples.jsonl"
        self.data.write_text('{"prompt": "a", "completion": "b"}\n')

    def prepare(self, qtbot: QtBot) -> None:
        """Model and data chosen, the preview answered."""
        self.draft.set_model(trainable())
        self.draft.add_files([self.data])
        qtbot.waitUntil(lambda: bool(self.lane.asked), timeout=20_000)
        self.lane.answer(preview())

    def start(self, qtbot: QtBot) -> Job:
        self.prepare(qtbot)
        self.page.setup.start.click()
        return self.store.jobs()[0]


def trainable() -> Any:
    return model("maker/tiny-1B", size=GB // 10, format=ModelFormat.SAFETENSORS, quantization="BF16")


def preview(**report: Any) -> PreviewResult:
    spans = (PreviewSpan("Question ", False), PreviewSpan("Answer ü🧵", True))
    example = PreviewExample(number=0, file="/x/examples.jsonl", line=1, tokens=9, trained_tokens=4, spans=spans)
    file = FileReport(
        file="/x/examples.jsonl",
        format="prompt_completion",
        columns=("prompt", "completion", "note"),
        mapping={"prompt": "prompt", "completion": "completion"},
        rows=12,
        kept=10,
        bad=2,
    )
    bad = [BadRow("/x/examples.jsonl", 7, "It has no completion.")]
    numbers: dict[str, Any] = {"rows": 12, "kept": 10, "bad": 2, "examples": 10, "tokens": 90, "trained_tokens": 40}
    return PreviewResult(
        examples=(example,), report=DataReport(**{"files": [file], "bad_rows": bad, **numbers, **report})
    )


@pytest.fixture
def bench(qtbot: QtBot, tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path)
    qtbot.addWidget(made.page)
    made.page.resize(1200, 800)
    made.page.show()
    yield made
    made.database.close()


def test_it_says_what_is_missing_one_thing_after_the_other(bench: Bench, qtbot: QtBot) -> None:
    setup = bench.page.setup
    assert "Choose the model" in setup.note.text.text() and not setup.start.isEnabled()
    assert setup.preview.empty.isVisible()
    bench.draft.set_model(trainable())
    assert "Add the examples" in setup.note.text.text()
    bench.draft.add_files([bench.data])
    assert setup.name.text() == "tiny-1B-examples"
    assert setup.start.isEnabled(), setup.note.text.text()
    (bench.adapters / "tiny-1B-examples").mkdir()
    bench.draft.changed.emit()
    assert "already" in setup.note.text.text() and not setup.start.isEnabled()
    bench.draft.set_name("mine")
    assert setup.start.isEnabled()
    bench.draft.set_model(model(format=ModelFormat.EXL2))
    assert "cannot be trained on (EXL2)" in setup.note.text.text() and not setup.start.isEnabled()
    bench.draft.set_model(model("maker/tiny-1B", size=GB // 10, format=ModelFormat.GPTQ))
    assert setup.start.isEnabled(), setup.note.text.text()
    bench.draft.set_values("method", {**bench.draft.values["method"], "init": "pissa"})
    assert "was quantized" in setup.note.text.text() and not setup.start.isEnabled()


def test_the_preview_colours_what_is_trained_and_lists_what_is_left_out(bench: Bench, qtbot: QtBot) -> None:
    bench.prepare(qtbot)
    pane = bench.page.setup.preview
    text = pane.text.toPlainText()
    assert "Question Answer ü🧵" in text and "4 of 9 tokens trained" in text
    cursor = pane.text.textCursor()
    colours = {}
    for word in ("Question", "Answer"):
        cursor.setPosition(text.index(word) + 1)
        colours[word] = cursor.charFormat().foreground().color().name()
    assert colours["Question"] != colours["Answer"]
    assert pane.bad.item(0, 1).text() == "7" and "no completion" in pane.bad.item(0, 2).text()  # type: ignore[union-attr]
    assert "10 of 12 rows used, as prompt/completion" in pane.summary.text() and "2 left out" in pane.summary.text()


def test_a_changed_column_reads_the_data_again(bench: Bench, qtbot: QtBot) -> None:
    bench.prepare(qtbot)
    asked = len(bench.lane.asked)
    bench.draft.set_mapping({"completion": "note"})
    qtbot.waitUntil(lambda: len(bench.lane.asked) > asked, timeout=20_000)
    assert bench.lane.asked[-1].data.mapping == {"completion": "note"}
    assert "Reading the data" in bench.page.setup.preview.summary.text()
    bench.lane.failed.emit(bench.lane.asked[-1], WeftError(ErrorKind.CORRUPT, "It is damaged.", "Save it again."))
    assert "Save it again." in bench.page.setup.preview.note.text.text()
    assert not bench.page.setup.start.isEnabled()


def test_answers_to_older_questions_are_not_shown(bench: Bench, qtbot: QtBot) -> None:
    bench.prepare(qtbot)
    old = bench.lane.asked[-1]
    bench.draft.set_values("train", {"max_length": 64})
    qtbot.waitUntil(lambda: bench.lane.asked[-1] != old, timeout=20_000)
    bench.lane.answered.emit(old, msgspec.to_builtins(preview(rows=99)))
    assert "Reading the data" in bench.page.setup.preview.summary.text()


def test_presets_and_forms_follow_each_other(bench: Bench, qtbot: QtBot) -> None:
    setup = bench.page.setup
    setup.preset.setCurrentText("Least memory")
    setup.preset.activated.emit(setup.preset.currentIndex())
    assert setup.train_form.values()["optimizer"] == "adamw_8bit" and setup.method_form.values()["r"] == 8
    bench.draft.set_values("method", {"r": 3})
    assert setup.preset.currentText() == "Own settings" and setup.method_form.values() == {"r": 3}
    bench.prepare(qtbot)
    bench.draft.set_values("method", {"init": "pissa"})
    bench.draft.set_values("model", {"quantization": "nf4"})
    assert "quantized base cannot take" in setup.note.text.text() and not setup.start.isEnabled()


def test_a_run_is_submitted_with_absolute_paths_and_watched(bench: Bench, qtbot: QtBot) -> None:
    job = bench.start(qtbot)
    parameters = msgspec.convert(json.loads(job.parameters)["parameters"], TrainParameters)
    assert parameters.config.output.dir == str(bench.adapters / "tiny-1B-examples")
    assert (parameters.resume == "if_there" and "[train]" in parameters.run_file) or "[data]" in parameters.run_file
    view = bench.page.run
    assert bench.page.stack.currentWidget() is view and view.name.text() == "tiny-1B-examples"
    queue = bench.queue
    queue.progressed.emit(job.id, Progress(phase="Training", done=2, total=10, unit="steps"))
    for step in range(3):
        values = {
            "loss": 2.0 - step / 2,
            "learning_rate": 2e-4,
            "grad_norm": 1.0,
            "tokens_per_second": 1234.0,
            "seconds_left": 90,
        }
        queue.metric.emit(job.id, step, values)
    queue.metric.emit(job.id, 2, {"held_out_loss": 1.5})
    asked = TrainNews(kind="samples", step=2, samples=(("Who?", "Ahoy."),))
    queue.news.emit(job.id, msgspec.json.encode(asked).decode())
    queue.news.emit(job.id, "not json")
    qtbot.waitUntil(lambda: "1,234 tokens/s" in view.figures.text(), timeout=20_000)
    assert (
        "loss 1" in view.figures.text()
        and "held out 1.5" in view.figures.text()
        and "2 min left" in view.figures.text()
    )
    qtbot.waitUntil(lambda: "train: 1" in view.loss.accessibleDescription(), timeout=5000)
    assert "Ahoy." in view.samples.toPlainText()
    view.pause.click()
    queue.news.emit(job.id, msgspec.json.encode(TrainNews(kind="state", text="paused")).decode())
    qtbot.waitUntil(lambda: view.pause.text() == "Go on", timeout=20_000)
    view.pause.click()
    view.stop.click()
    assert [what["action"] for _, what in queue.told] == ["pause", "resume", "stop"]
    (bench.adapters / "tiny-1B-examples").mkdir()
    result = TrainResult(
        adapter="x", ended="stopped", steps=3, losses=(2.0, 1.5, 1.0), held_out_losses=((0, 2.1), (2, 1.5))
    )
    queue.end(job.id, JobState.DONE, result)
    qtbot.waitUntil(lambda: view.use.isVisible(), timeout=20_000)
    assert "Stopped by you" in view.note.text.text() and not view.resume.isVisible()
    used: list[str] = []
    bench.page.use_wanted.connect(used.append)
    view.use.click()
    assert used == [str(bench.adapters / "tiny-1B-examples")]


def test_a_cancelled_run_resumes_with_its_curves(bench: Bench, qtbot: QtBot) -> None:
    job = bench.start(qtbot)
    bench.queue.metric.emit(job.id, 1, {"loss": 3.0})
    view = bench.page.run
    (bench.adapters / "tiny-1B-examples.training").mkdir()
    view.cancel.click()
    qtbot.waitUntil(lambda: view.resume.isVisible(), timeout=20_000)
    assert "checkpoints are kept" in view.note.text.text()
    view.resume.click()
    assert ("retry", job.id) in bench.queue.told and view.job is not None and view.job.id != job.id
    assert view.loss.accessibleDescription() == "train: 3"


def test_a_failure_says_what_to_do_and_settings_can_be_used_again(bench: Bench, qtbot: QtBot) -> None:
    bench.draft.set_values("method", {"r": 5})
    job = bench.start(qtbot)
    bench.queue.end(job.id, JobState.FAILED, None, WeftError(ErrorKind.OUT_OF_MEMORY, "Too large.", "A smaller batch."))
    view = bench.page.run
    qtbot.waitUntil(lambda: "A smaller batch." in view.note.text.text(), timeout=20_000)
    bench.draft.set_values("method", {})
    view.again.click()
    assert bench.page.stack.currentWidget() is bench.page.setup and bench.page.setup.method_form.values() == {"r": 5}


def test_several_runs_lie_in_one_chart(bench: Bench, qtbot: QtBot) -> None:
    first = bench.start(qtbot)
    bench.queue.metric.emit(first.id, 1, {"loss": 3.0})
    bench.queue.end(first.id, JobState.DONE, None)
    bench.page.new_run()
    bench.draft.set_name("second")
    bench.page.setup.start.click()
    second = bench.store.jobs()[0]
    bench.queue.metric.emit(second.id, 1, {"loss": 2.0})
    bench.page.list.selectAll()
    qtbot.waitUntil(lambda: bench.page.run.loss.accessibleDescription().count("train") + 1 >= 2, timeout=20_000)
    described = bench.page.run.loss.accessibleDescription()
    assert ": 3" in described and ": 2" in described
    bench.page._remove([bench.store.get(first.id)])
    assert bench.page.list.count() == 1


def test_the_models_own_modules_are_offered(bench: Bench, qtbot: QtBot) -> None:
    modules = bench.page.setup.modules
    bench.prepare(qtbot)
    assert not modules.isVisible() and bench.lane.modules[-1].model == bench.draft.model
    bench.lane.answer_modules()
    assert modules.isVisible() and "4 layers" in modules.header.text()
    modules.header.click()
    names = [modules.list.item(n).text().split()[0] for n in range(modules.list.count())]
    assert names == ["q_proj", "v_proj", "up_proj", "embed_tokens", "lm_head"]
    checked = [modules.list.item(n).checkState() is Qt.CheckState.Checked for n in range(5)]
    assert checked == [True, True, True, False, False], "all linear ones are the default"
    modules.list.setFocus()
    modules.list.setCurrentRow(2)
    qtbot.keyClick(modules.list, Qt.Key.Key_Space)
    assert bench.draft.config().method.targets == "q_proj, v_proj"
    assert bench.page.setup.method_form.values()["targets"] == "q_proj, v_proj"
    qtbot.keyClick(modules.list, Qt.Key.Key_Space)
    assert bench.draft.config().method.targets == "all-linear"
    modules.attention.click()
    bench.draft.set_values("method", {"targets": "v_proj, lm_head, model.layers.0.mlp.up_proj"})
    checked = [modules.list.item(n).checkState() is Qt.CheckState.Checked for n in range(5)]
    assert checked == [False, True, False, False, True]
    modules.list.item(0).setCheckState(Qt.CheckState.Checked)
    assert bench.draft.targets == ["q_proj", "v_proj", "lm_head", "model.layers.0.mlp.up_proj"], "what was typed stays"
    bench.draft.set_model(model("other/one", format=ModelFormat.GGUF))
    assert not modules.isVisible(), "these were the other model's"


def test_the_first_rows_are_shown_before_all_are_read(bench: Bench, qtbot: QtBot) -> None:
    bench.draft.set_model(trainable())
    bench.draft.add_files([bench.data])
    qtbot.waitUntil(lambda: bool(bench.lane.asked), timeout=20_000)
    bench.lane.answer(preview(partial=True))
    bench.lane.answer_modules()
    first, whole = bench.lane.asked
    assert first.most_rows > 0 and whole.most_rows == 0
    pane = bench.page.setup.preview
    assert "being read" in pane.summary.text() and "Takes about" not in bench.page.setup.need.text()
    bench.lane.answer(preview(rows=70_000, kept=69_990, tokens=5_000_000, examples=69_990))
    assert "69,990 of 70,000" in pane.summary.text() and "being read" not in pane.summary.text()
    assert "Takes about" in bench.page.setup.need.text()
    assert len(bench.lane.asked) == 2


def test_columns_are_asked_for_where_they_are_not_recognised(bench: Bench, qtbot: QtBot) -> None:
    bench.draft.set_model(trainable())
    bench.draft.add_files([bench.data])
    qtbot.waitUntil(lambda: bool(bench.lane.asked), timeout=20_000)
    unknown = FileReport(file="/x/a.csv", columns=("frage", "antwort"), problem="Its format is not recognised.")
    bench.lane.answer(preview(files=[unknown], rows=5, kept=0, examples=0))
    form = bench.page.setup.columns
    assert form.format is not None and not form.combos and "not recognised" in bench.page.setup.preview.summary.text()
    form.format.setCurrentIndex(form.format.findData("prompt_completion"))
    form.format.activated.emit(form.format.currentIndex())
    assert list(form.combos) == ["prompt", "completion", "system"]
    for field, column in (("prompt", "frage"), ("completion", "antwort")):
        combo = form.combos[field]
        combo.setCurrentIndex(combo.findData(column))
        combo.activated.emit(combo.currentIndex())
    qtbot.waitUntil(lambda: bench.lane.asked[-1].data.mapping != {}, timeout=20_000)
    asked = bench.lane.asked[-1].data
    assert asked.format == "prompt_completion" and asked.mapping == {"prompt": "frage", "completion": "antwort"}
    bench.draft.remove_file(str(bench.data))
    assert bench.draft.mapping == {}


def test_what_this_machine_cannot_do_is_said_before_the_start(bench: Bench, qtbot: QtBot) -> None:
    bench.prepare(qtbot)
    note, start = bench.page.setup.note.text, bench.page.setup.start
    for section, values, word in (
        ("model", {"device": "cuda"}, "no graphics card"),
        ("model", {"attention": "flash_attention_2"}, "flash_attention_2"),
        ("train", {"objective": "dpo"}, "chosen and rejected"),
    ):
        bench.draft.set_values(section, values)
        assert word in note.text() and not start.isEnabled(), (values, note.text())
        bench.draft.set_values(section, {})
    assert start.isEnabled()
    bench.draft.set_values("train", {"optimizer": "paged_adamw_8bit"})
    assert "keeps its state in a file" in note.text() and start.isEnabled()
    assert "of the disk" in bench.page.setup.need.text()
    bench.draft.set_values("train", {})
    assert "of the disk" not in bench.page.setup.need.text()
    bench.draft.set_values("method", {"dora": True, "dora_offload": True})
    assert "dora_offload has no effect" in note.text() and start.isEnabled()
    bench.draft.set_values("method", {"init": "off"})
    assert "debugging" in note.text() and start.isEnabled()
    bench.draft.set_values("data", {"held_out": 0.0})
    bench.draft.set_values("train", {"early_stopping": 2})
    assert any("Nothing is held out" in told for told in bench.draft.notes())


def test_everything_is_reached_by_the_keyboard(bench: Bench, qtbot: QtBot) -> None:
    bench.prepare(qtbot)
    bench.lane.answer_modules()
    bench.page.activateWindow()
    bench.page.entered()
    reached: list[str] = []
    for _ in range(80):
        widget = QApplication.focusWidget()
        assert widget is not None
        reached.append(widget.accessibleName() or getattr(widget, "text", str)())
        if reached[-1] == "Start training":
            break
        qtbot.keyClick(widget, Qt.Key.Key_Tab)
    assert all(reached), reached
    wanted = ["Add files…", "Leave examples.jsonl out", "Preset", "Rank", "Name of the adapter", "Start training"]
    assert [name for name in reached if name in wanted] == wanted, reached


def test_preferences_are_not_trained_as_answers(bench: Bench, qtbot: QtBot) -> None:
    bench.prepare(qtbot)
    file = FileReport(file="/x/a.jsonl", format="preference", columns=("prompt", "chosen", "rejected"), rows=3, kept=3)
    bench.lane.answer(preview(files=[file], rows=3, kept=3))
    assert "dpo or orpo" in bench.page.setup.note.text.text() and not bench.page.setup.start.isEnabled()
    bench.draft.set_values("train", {"objective": "dpo"})
    bench.lane.answer(preview(files=[file], rows=3, kept=3))
    assert bench.page.setup.start.isEnabled(), bench.page.setup.note.text.text()


def test_a_small_model_learns_at_a_higher_rate(bench: Bench) -> None:
    small = msgspec.structs.replace(trainable(), shape=ModelShape(layers=4, hidden=256, vocabulary=2048, heads=4))
    bench.draft.set_model(small)
    assert bench.draft.preset == "Balanced" and 1e-3 < bench.draft.config().train.learning_rate < 5e-3
    bench.draft.use_preset("Voice or style")
    bench.draft.set_model(msgspec.structs.replace(trainable(), shape=ModelShape(layers=32, hidden=4096)))
    assert bench.draft.preset == "Voice or style" and bench.draft.config().train.learning_rate == 2e-4
    bench.draft.set_values("train", {"learning_rate": 7e-4})
    bench.draft.set_model(small)
    assert bench.draft.config().train.learning_rate == 7e-4, "what somebody chose stays"


def test_two_runs_of_one_name_do_not_wait_for_each_other(bench: Bench, qtbot: QtBot) -> None:
    bench.prepare(qtbot)
    bench.draft.set_name("mine")
    bench.page.setup.start.click()
    bench.page.new_run()
    assert bench.draft.name != "mine"
    bench.draft.set_name("mine")
    assert "already" in bench.page.setup.note.text.text() and not bench.page.setup.start.isEnabled()


def test_curves_and_answers_outlive_a_restart(bench: Bench, qtbot: QtBot) -> None:
    job = bench.start(qtbot)
    queue, runs = bench.queue, bench.page._runs
    for step in range(1, 6):
        queue.metric.emit(job.id, step, {"loss": 5.0 - step, "grad_norm": 1.0})
    queue.news.emit(
        job.id, msgspec.json.encode(TrainNews(kind="samples", step=5, samples=(("Who?", "Ahoy."),))).decode()
    )
    runs.close()
    queue.end(job.id, JobState.CRASHED, None, WeftError(ErrorKind.CRASHED, "It died.", ""))
    again = TrainRuns(bench.store, queue, RunStore(bench.database))  # type: ignore[arg-type]
    state = again.state(bench.store.get(job.id))
    assert state.series("loss") == tuple((float(n), 5.0 - n) for n in range(1, 6)) and state.series("grad_norm")
    assert state.samples == [(5, (("Who?", "Ahoy."),))]
    made = queue.retry(job.id)  # as from the Jobs page
    queue.metric.emit(made.id, 4, {"loss": 0.5})
    assert again.state(made).series("loss")[-2:] == ((3.0, 2.0), (4.0, 0.5)), "it goes on from its checkpoint"


def test_long_runs_stay_small() -> None:
    curve = Curve()
    for step in range(60_000):
        curve.add(step, 100.0 if step == 12_345 else float(step % 7))
    assert len(curve) <= MOST_POINTS and max(value for _, value in curve.points) == 100.0
    assert [step for step, _ in curve.points] == sorted(step for step, _ in curve.points)
    assert curve.points[-1] == (59_999.0, float(59_999 % 7))


def test_a_run_is_saved_opened_and_exported(bench: Bench, qtbot: QtBot, tmp_path: Path) -> None:
    bench.prepare(qtbot)
    setup = bench.page.setup
    bench.draft.set_values("method", {"r": 5, "init": "pissa"})
    bench.draft.add_files([bench.data], held_out=True)
    told: list[Any] = []
    bench.page.notice.connect(told.append)
    bench.page.failed.connect(told.append)
    setup.save_run(tmp_path / "my run")
    qtbot.waitUntil(lambda: bool(told), timeout=20_000)
    config = run_file.read(tmp_path / "my run.toml")
    assert config == bench.draft.config()
    bench.draft.set_values("method", {})
    bench.draft.remove_file(str(bench.data), held_out=True)
    assert bench.page.accepts([tmp_path / "my run.toml"])
    bench.page.take([tmp_path / "my run.toml"])
    qtbot.waitUntil(lambda: bench.draft.values["method"] == {"r": 5, "init": "pissa"}, timeout=20_000)
    assert bench.draft.held_out_files == (str(bench.data),)
    folder = tmp_path / "weights"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    bench.draft.set_model(msgspec.structs.replace(trainable(), path=str(folder), files=()))
    told.clear()
    setup.export_run(tmp_path / "away")
    qtbot.waitUntil(lambda: bool(told), timeout=20_000)
    assert (tmp_path / "away" / "start.sh").exists() and (tmp_path / "away" / "model" / "weights").is_dir(), told
    assert "torch==" in (tmp_path / "away" / "requirements.txt").read_text()
    told.clear()
    setup.export_run(tmp_path / "away")
    qtbot.waitUntil(lambda: bool(told), timeout=20_000)
    assert isinstance(told[0], WeftError) and "there already" in told[0].message
    (tmp_path / "bad.toml").write_text("[train]\nepoch = 3")
    told.clear()
    bench.page.take([tmp_path / "bad.toml"])
    qtbot.waitUntil(lambda: bool(told), timeout=20_000)
    assert "epochs" in told[0].hint
    menu = setup.open_menu()
    assert [action.isEnabled() for action in menu.actions()] == [True, True, True]
    menu.close()


def test_checkpoints_of_a_run_that_is_removed_go_into_the_trash(
    bench: Bench, qtbot: QtBot, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone: list[list[Path]] = []
    monkeypatch.setattr("app.viewmodels.model_files.trash_files", gone.append)
    job = bench.start(qtbot)
    left = bench.adapters / "tiny-1B-examples.training"
    left.mkdir()
    bench.queue.end(job.id, JobState.CRASHED, None, WeftError(ErrorKind.CRASHED, "It died.", ""))
    assert bench.page.run.resume.isVisible()
    with qtbot.waitSignal(bench.page._runs.trashed, timeout=20_000):
        bench.page._remove([bench.store.get(job.id)], checkpoints=True)
    assert gone == [[left]] and bench.page.list.count() == 0


def test_dropped_files_that_hold_no_examples_are_named(bench: Bench, tmp_path: Path) -> None:
    told: list[WeftError] = []
    bench.page.failed.connect(told.append)
    bench.page.take([tmp_path / "a.png", bench.data])
    assert "a.png" in told[0].message and bench.draft.files == (str(bench.data),)
    assert bench.page.accepts([tmp_path / "x.jsonl"]) and not bench.page.accepts([tmp_path / "x.gguf"])


def test_a_chart_loses_no_peak_and_its_numbers_are_round() -> None:
    points = [(float(n), 1.0) for n in range(10_000)]
    points[5_555] = (5555.0, 9.0)
    kept = thinned(points, 200)
    assert len(kept) <= 210 and (5555.0, 9.0) in kept and kept[0] == points[0] and kept[-1] == points[-1]
    assert [p[0] for p in kept] == sorted(p[0] for p in kept)
    assert ticks(0, 10, 5) == [0, 2, 4, 6, 8, 10] and ticks(3, 3, 5) == [3]
    assert ticks(0, 2, 11, whole=True) == [0, 1, 2]
    assert [readable(v) for v in (0, 2.31234, 0.0002, 12400)] == ["0", "2.312", "2.0e-04", "12,400"]


def test_ten_thousand_noisy_steps_do_not_hold_the_window(bench: Bench, qtbot: QtBot) -> None:
    """Each piece of work that an update brings takes less than a frame of 16 ms of this thread's own time."""
    job = bench.start(qtbot)
    rng = random.Random(seeds.fresh())
    names = ("loss", "learning_rate", "grad_norm", "tokens_per_second")
    for step in range(10_000):
        bench.queue.metric.emit(job.id, step, {name: rng.random() for name in names})
    view = bench.page.run
    view._show_curves()
    for show, chart in ((view.show_state, view.bar), (view._show_loss, view.loss), (view._show_speed, view.speed)):
        taken: list[float] = []
        for _ in range(5):
            began = time.thread_time()
            show()
            chart.repaint()
            taken.append(time.thread_time() - began)
        assert min(taken) < 0.016, (show, taken)


def test_a_chart_takes_anything(qtbot: QtBot) -> None:
    chart = Chart("Loss", logarithmic=True)
    qtbot.addWidget(chart)
    chart.resize(300, 160)
    for series in (
        [],
        [Series("one", ((1.0, 2.0),))],
        [Series("strange", ((0.0, float("nan")), (1.0, float("inf")), (2.0, -1.0), (3.0, 0.5)))],
        [Series("flat", tuple((float(n), 1e-9) for n in range(5)))],
    ):
        chart.set_series(series)
        assert not chart.grab().isNull()


@pytest.mark.skipif(not os.environ.get("WEFT_PYTHON_CORE"), reason="WEFT_PYTHON_CORE names no interpreter with PyTorch")
def test_a_real_training_through_the_page(qtbot: QtBot, tmp_path: Path) -> None:
    from app.core.paths import default_paths, resources
    from app.core.recognise import recognise_adapter, recognise_model
    from app.engine import launch
    from app.viewmodels.task_lane import TaskLane
    from app.viewmodels.tasks import TaskQueue
    from app.workers.task_worker import TaskWorker

    database = Database(tmp_path / "weft.db")
    store = JobStore(database)
    queue = TaskQueue(
        store,
        make_client=lambda name, log: launch.task_engine(name, default_paths(), log.stem),
        make_worker=TaskWorker,
        logs=tmp_path / "logs",
    )
    lane = TaskLane(lambda: launch.task_engine("core", default_paths(), "preview"))
    adapters = tmp_path / "loras"
    adapters.mkdir()
    draft = TrainDraft(queue=queue, lane=lane, adapters=adapters, machine=machine)
    runs = TrainRuns(store, queue, RunStore(database))
    page = TrainPage(
        draft,
        runs,
        make_table=lambda: None,  # type: ignore[arg-type,return-value]
        run_files=RunFiles(lambda name: recognise_model(resources() / "starter" / "model")),  # type: ignore[arg-type,return-value]
    )
    qtbot.addWidget(page)
    page.show()
    data = tmp_path / "voice.jsonl"
    rows = [{"prompt": f"Say number {n}.", "completion": f"Arr, {n} it be!"} for n in range(12)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    try:
        draft.set_model(recognise_model(resources() / "starter" / "model"))
        draft.add_files([data])
        draft.set_values("train", {"max_steps": 3, "batch_size": 2, "gradient_accumulation": 1, "max_length": 64})
        qtbot.waitUntil(lambda: "Arr, 0 it be!" in page.setup.preview.text.toPlainText(), timeout=90_000)
        page.setup.start.click()
        with qtbot.waitSignal(queue.ended, timeout=180_000) as got:
            pass
        assert got.args[2] is None, got.args[2]
        made = recognise_adapter(adapters / "model-voice") or recognise_adapter(next(adapters.iterdir()))
        assert made is not None and not made.problem
        qtbot.waitUntil(lambda: page.run.use.isVisible(), timeout=10_000)
        assert len(TrainRuns(store, queue).state(store.jobs()[0]).metrics["loss"]) == 3, (
            "curves come back from the record"
        )
    finally:
        lane.close()
        queue.close()
        database.close()
