"""The queue of long tasks: real children that run a real task, and everything that a person does to a job."""

from __future__ import annotations

import json
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pytestqt.qtbot import QtBot

from app.core.errors import ErrorKind, WeftError
from app.core.jobs import Job, JobState
from app.engine.client import EngineClient
from app.engine.environments import Environments
from app.store.database import Database
from app.store.jobs import JobStore
from app.viewmodels import tasks as tasks_module
from app.viewmodels.jobs import STATE, JobCenter, JobTable
from app.viewmodels.tasks import Step, TaskQueue, parameters_of
from app.workers.task_worker import TaskWorker

WAIT = 20_000

# A task in a folder of its own, found as app.tasks.<name> by a host that is told where.
TASK = """
import json, os, time
import msgspec
from app.core.errors import ErrorKind, WeftError

class Parameters(msgspec.Struct, kw_only=True):
    steps: int = 3
    seconds: float = 0.0
    how: str = "well"
    resume: bool = False
    path: str = ""

def run(parameters, report):
    paused = []
    report.on_adjust(lambda text: paused.append(json.loads(text)))
    for step in range(parameters.steps):
        if report.cancelled:
            raise WeftError(ErrorKind.CANCELLED, "Cancelled.")
        report.progress("Stepping", step + 1, parameters.steps, "steps")
        report.metric(step, {"loss": 1.0 / (step + 1)})
        report.news(json.dumps({"step": step, "adjusted": paused}))
        time.sleep(parameters.seconds)
    if parameters.how == "badly":
        report.log("warning", "This will not do.")
        raise WeftError(ErrorKind.BAD_INPUT, "It went badly.", "Ask it to go well.")
    if parameters.how == "die":
        os.kill(os.getpid(), 9)
    return {"steps": parameters.steps, "resumed": parameters.resume, "adjusted": paused}
"""
HOST = """
import sys
import app.tasks
app.tasks.__path__.append({folder!r})
from app.engine.host import main
sys.exit(main())
"""


class Bench:
    """A queue with its store, and what it said."""

    def __init__(self, tmp_path: Path) -> None:
        folder = tmp_path / "tasks"
        folder.mkdir()
        (folder / "pretend.py").write_text(TASK)
        self.host = tmp_path / "task_test_host.py"
        self.host.write_text(HOST.format(folder=str(folder)))
        self.database = Database(tmp_path / "weft.db")
        self.store = JobStore(self.database)
        self.queue = TaskQueue(
            self.store, make_client=self.client, make_worker=TaskWorker, logs=tmp_path / "logs", parent=None
        )
        self.ends: list[tuple[Job, Any, WeftError | None]] = []
        self.metrics: list[tuple[int, int, float]] = []
        self.news: list[str] = []
        self.warnings: list[str] = []
        self.still: list[bool] = []  # whether each end was told while the queue said that it goes on
        self.queue.ended.connect(self._ended)
        self.queue.metric.connect(self._metric)
        self.queue.news.connect(self._news)
        self.queue.warned.connect(self._warned)

    def client(self, environment: str, log: Path) -> EngineClient:
        if environment == "missing":
            raise WeftError(ErrorKind.ENVIRONMENT, "It is not installed.", "Install it.")
        log.parent.mkdir(exist_ok=True)
        path = f"{self.host.parent}:{Path(__file__).parents[2]}"
        return EngineClient(
            python=Path(sys.executable),
            backend="",
            log_path=log,
            environment={"PYTHONPATH": path},
            module="task_test_host",
        )

    def submit(self, resource: str = "cpu", environment: str = "core", **parameters: object) -> Job:
        return self.queue.submit("pretend", "Pretend", parameters, environment=environment, resource=resource)

    def state(self, job: Job) -> JobState:
        return self.store.get(job.id).state

    def _ended(self, job: Job, result: object, error: WeftError | None) -> None:
        self.ends.append((job, result, error))
        self.still.append(self.queue.is_active(job.id) or self.queue.is_running(job.id))

    def _metric(self, _job: int, step: int, values: dict[str, float]) -> None:
        self.metrics.append((_job, step, values["loss"]))

    def _news(self, _job: int, text: str) -> None:
        self.news.append(text)

    def _warned(self, _job: int, text: str) -> None:
        self.warnings.append(text)

    def close(self) -> None:
        self.queue.close()
        self.database.close()


@pytest.fixture
def bench(tmp_path: Path, qapp: object) -> Iterator[Bench]:
    made = Bench(tmp_path)
    yield made
    made.close()


def test_a_task_runs_and_says_all_that_it_said(qtbot: QtBot, bench: Bench) -> None:
    job = bench.submit(steps=5)
    assert job.state is JobState.QUEUED
    qtbot.waitUntil(lambda: bool(bench.ends), timeout=WAIT)
    ended, result, error = bench.ends[0]
    assert error is None and ended.state is JobState.DONE and ended.id == job.id
    assert result == {"steps": 5, "resumed": False, "adjusted": []}
    assert [(step, loss) for _, step, loss in bench.metrics] == [(n, 1 / (n + 1)) for n in range(5)]
    assert json.loads(bench.news[-1])["step"] == 4
    assert ended.progress is None or ended.progress.total == 5
    qtbot.waitUntil(lambda: not bench.queue.is_active(job.id), timeout=WAIT)


def test_one_at_a_time_on_each_resource_and_in_order(qtbot: QtBot, bench: Bench) -> None:
    first, second = bench.submit(steps=4, seconds=0.1), bench.submit()
    other = bench.submit(resource="network")
    qtbot.waitUntil(lambda: bench.queue.is_running(first.id) and bench.queue.is_running(other.id), timeout=WAIT)
    assert not bench.queue.is_running(second.id) and bench.queue.is_active(second.id)
    qtbot.waitUntil(lambda: len(bench.ends) == 3, timeout=WAIT)
    order = [job.id for job, _, _ in bench.ends]
    assert order.index(first.id) < order.index(second.id)
    assert bench.store.get(second.id).started >= bench.store.get(first.id).ended


def test_cancelling_ends_what_runs_and_takes_out_what_waits(qtbot: QtBot, bench: Bench) -> None:
    running, waiting = bench.submit(steps=1000, seconds=0.05), bench.submit()
    qtbot.waitUntil(lambda: bench.state(running) is JobState.RUNNING, timeout=WAIT)
    bench.queue.cancel(waiting.id)
    assert bench.state(waiting) is JobState.CANCELLED
    bench.queue.cancel(running.id)
    qtbot.waitUntil(lambda: bench.state(running) is JobState.CANCELLED, timeout=WAIT)
    qtbot.waitUntil(lambda: not bench.queue.is_active(running.id), timeout=WAIT)
    assert {error.kind for _, _, error in bench.ends if error} == {ErrorKind.CANCELLED}


def test_a_failure_a_death_and_a_missing_environment_are_told(qtbot: QtBot, bench: Bench) -> None:
    jobs = [bench.submit(how="badly"), bench.submit(how="die"), bench.submit(environment="missing")]
    qtbot.waitUntil(lambda: len(bench.ends) == 3, timeout=WAIT)
    assert bench.state(jobs[0]) is JobState.FAILED
    assert bench.store.get(jobs[0].id).hint == "Ask it to go well."
    assert bench.warnings == ["This will not do."]
    assert bench.state(jobs[1]) in (JobState.CRASHED, JobState.FAILED)
    assert bench.store.get(jobs[2].id).message == "It is not installed."
    assert bench.still == [False] * 3, "whoever hears of an end is not told that it goes on"


def test_an_adjustment_reaches_the_task(qtbot: QtBot, bench: Bench, tmp_path: Path) -> None:
    center = JobCenter(bench.store, Environments(tmp_path / "environments"), lambda *_: None, tasks=bench.queue)
    table, held = JobTable(center), list[tuple[int, bool]]()
    bench.queue.held.connect(lambda number, on: held.append((number, on)))
    job = bench.submit(steps=40, seconds=0.05)
    qtbot.waitUntil(lambda: bool(bench.news), timeout=WAIT)
    bench.queue.adjust(job.id, {"pause": True})
    assert not bench.queue.is_held(job.id), "that is not a word for it"
    told = [{"paused": True}, {"paused": True}, {"action": "resume"}, {"action": "pause"}]
    for words in told:
        bench.queue.adjust(job.id, words)
    assert held == [(job.id, True), (job.id, False), (job.id, True)] and bench.queue.is_held(job.id)
    table.refresh()
    assert table.data(table.index(0, STATE)) == "Paused" and center._paces[job.id]._held is not None
    qtbot.waitUntil(lambda: bool(bench.ends), timeout=WAIT)
    assert bench.ends[0][1]["adjusted"] == [{"pause": True}, *told]
    qtbot.waitUntil(lambda: not bench.queue.is_held(job.id), timeout=WAIT)


def test_retry_resumes_what_can_be_resumed(qtbot: QtBot, bench: Bench) -> None:
    job = bench.submit(how="badly", resume=False)
    with pytest.raises(WeftError, match="has not ended"):
        bench.queue.retry(job.id)
    qtbot.waitUntil(lambda: len(bench.ends) == 1, timeout=WAIT)
    qtbot.waitUntil(lambda: not bench.queue.is_active(job.id), timeout=WAIT)
    again = bench.queue.retry(job.id)
    assert again.id != job.id and parameters_of(again)["resume"] is True
    qtbot.waitUntil(lambda: len(bench.ends) == 2, timeout=WAIT)


@pytest.mark.fault
def test_closing_stops_what_runs_and_leaves_a_job_to_start_again(qtbot: QtBot, bench: Bench) -> None:
    running, waiting = bench.submit(steps=1000, seconds=0.05), bench.submit()
    qtbot.waitUntil(lambda: bench.state(running) is JobState.RUNNING, timeout=WAIT)
    bench.queue.close()
    assert bench.state(running) is JobState.CRASHED and bench.state(waiting) is JobState.CRASHED
    assert "Start it again" in bench.store.get(running.id).hint


def test_what_follows_a_job_comes_one_after_the_other_also_after_a_retry(bench: Bench, qtbot: QtBot) -> None:
    def step(how: str, **more: object) -> Step:
        return Step(task="pretend", title=how, parameters={"how": how}, **more)  # type: ignore[arg-type]

    followed: list[tuple[int, str]] = []
    bench.queue.followed.connect(lambda before, job: followed.append((before, job.title)))
    first = bench.queue.submit(
        "pretend", "first", {"how": "badly"}, then=[step("badly"), step("well", always=True), step("well")]
    )
    qtbot.waitUntil(lambda: len(bench.ends) == 1, timeout=WAIT)
    assert followed == [], "nothing follows what failed"
    # What is tried again, and goes well now, is followed as the first would have been.
    stored = json.loads(bench.store.get(first.id).parameters)
    stored["parameters"]["how"] = "well"
    bench.store.update(first.id, parameters=json.dumps(stored))
    again = bench.queue.retry(first.id)
    qtbot.waitUntil(lambda: len(bench.ends) == 5, timeout=WAIT)
    titles = [job.title for job, _, _ in bench.ends]
    assert titles == ["first", "first", "badly", "well", "well"]
    assert [before for before, _ in followed] == [again.id, again.id + 1, again.id + 2]


def test_secrets_reach_the_task_and_never_the_store(bench: Bench, qtbot: QtBot, tmp_path: Path) -> None:
    secret = f"hf_{uuid.uuid4().hex}"

    def worker(*arguments: Any, **keywords: Any) -> TaskWorker:
        def complete(job: Job, text: str) -> str:
            return json.dumps({**json.loads(text), "path": secret, "steps": 5, "how": job.title})

        return TaskWorker(*arguments, complete=complete, **keywords)

    bench.queue._make_worker = worker
    bench.queue.submit("pretend", "well", {"steps": 1})
    qtbot.waitUntil(lambda: len(bench.ends) == 1, timeout=WAIT)
    assert bench.ends[0][1]["steps"] == 5, "the task was told"
    qtbot.waitUntil(lambda: not bench.queue.busy, timeout=WAIT)
    bench.database.close()
    for path in [p for p in tmp_path.rglob("*") if p.is_file()]:
        assert secret.encode() not in path.read_bytes(), path


def test_a_merge_is_killed_and_not_cancelled_when_the_window_goes(
    bench: Bench, qtbot: QtBot, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cancel clears away what was made; after a kill it goes on from there."""
    monkeypatch.setattr(tasks_module, "KILLED_AT_CLOSE", {"pretend"})
    stopped: list[str] = []
    monkeypatch.setattr(TaskWorker, "stop", lambda self: stopped.append("cancelled"))
    job = bench.submit(steps=500, seconds=0.02)
    qtbot.waitUntil(lambda: bench.state(job) is JobState.RUNNING, timeout=WAIT)
    bench.queue.close()
    assert not stopped and bench.state(job) is JobState.CRASHED
    assert "what was already complete is used" in bench.store.get(job.id).hint
