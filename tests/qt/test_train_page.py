"""The Train page: set-up, preview, a run's life, several runs in one chart, and a real training through it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from PySide6.QtCore import QObject, Signal
from pytestqt.qtbot import QtBot

from app.core.errors import ErrorKind, WeftError
from app.core.jobs import Job, JobState, Progress
from app.core.library import ModelFormat
from app.store.database import Database
from app.store.jobs import JobStore
from app.store.runs import RunStore
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
from app.views.train.chart import Chart, Series, readable, thinned, ticks
from app.views.train.page import TrainPage
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
        qtbot.waitUntil(lambda: bool(self.lane.asked), timeout=5000)
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
    return PreviewResult(examples=(example,), report=DataReport(files=[file], bad_rows=bad, **{**numbers, **report}))


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
    bench.draft.set_model(model(format=ModelFormat.GPTQ))
    assert "needs a loader" in setup.note.text.text()


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
    qtbot.waitUntil(lambda: len(bench.lane.asked) > asked, timeout=5000)
    assert bench.lane.asked[-1].data.mapping == {"completion": "note"}
    assert "Reading the data" in bench.page.setup.preview.summary.text()
    bench.lane.failed.emit(bench.lane.asked[-1], WeftError(ErrorKind.CORRUPT, "It is damaged.", "Save it again."))
    assert "Save it again." in bench.page.setup.preview.note.text.text()
    assert not bench.page.setup.start.isEnabled()


def test_answers_to_older_questions_are_not_shown(bench: Bench, qtbot: QtBot) -> None:
    bench.prepare(qtbot)
    old = bench.lane.asked[-1]
    bench.draft.set_values("train", {"max_length": 64})
    qtbot.waitUntil(lambda: bench.lane.asked[-1] != old, timeout=5000)
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
    qtbot.waitUntil(lambda: "1,234 tokens/s" in view.figures.text(), timeout=5000)
    assert (
        "loss 1" in view.figures.text()
        and "held out 1.5" in view.figures.text()
        and "2 min left" in view.figures.text()
    )
    assert "train: 1" in view.loss.accessibleDescription() and "Ahoy." in view.samples.toPlainText()
    view.pause.click()
    queue.news.emit(job.id, msgspec.json.encode(TrainNews(kind="state", text="paused")).decode())
    qtbot.waitUntil(lambda: view.pause.text() == "Go on", timeout=5000)
    view.pause.click()
    view.stop.click()
    assert [what["action"] for _, what in queue.told] == ["pause", "resume", "stop"]
    (bench.adapters / "tiny-1B-examples").mkdir()
    result = TrainResult(
        adapter="x", ended="stopped", steps=3, losses=(2.0, 1.5, 1.0), held_out_losses=((0, 2.1), (2, 1.5))
    )
    queue.end(job.id, JobState.DONE, result)
    qtbot.waitUntil(lambda: view.use.isVisible(), timeout=5000)
    assert "Stopped by you" in view.note.text.text() and not view.resume.isVisible()
    used: list[str] = []
    bench.page.use_wanted.connect(used.append)
    view.use.click()
    assert used == [str(bench.adapters / "tiny-1B-examples")]


def test_a_cancelled_run_resumes_with_its_curves(bench: Bench, qtbot: QtBot) -> None:
    job = bench.start(qtbot)
    bench.queue.metric.emit(job.id, 1, {"loss": 3.0})
    view = bench.page.run
    view.cancel.click()
    qtbot.waitUntil(lambda: view.resume.isVisible(), timeout=5000)
    assert "checkpoints are kept" in view.note.text.text()
    view.resume.click()
    assert ("retry", job.id) in bench.queue.told and view.job is not None and view.job.id != job.id
    assert view.loss.accessibleDescription() == "train: 3"


def test_a_failure_says_what_to_do_and_settings_can_be_used_again(bench: Bench, qtbot: QtBot) -> None:
    bench.draft.set_values("method", {"r": 5})
    job = bench.start(qtbot)
    bench.queue.end(job.id, JobState.FAILED, None, WeftError(ErrorKind.OUT_OF_MEMORY, "Too large.", "A smaller batch."))
    view = bench.page.run
    qtbot.waitUntil(lambda: "A smaller batch." in view.note.text.text(), timeout=5000)
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
    qtbot.waitUntil(lambda: bench.page.run.loss.accessibleDescription().count("train") + 1 >= 2, timeout=5000)
    described = bench.page.run.loss.accessibleDescription()
    assert ": 3" in described and ": 2" in described
    bench.page._remove([bench.store.get(first.id)])
    assert bench.page.list.count() == 1


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
    assert [readable(v) for v in (0, 2.31234, 0.0002, 12400)] == ["0", "2.312", "2.0e-04", "12,400"]


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
