"""Merges that were killed: retried from where they were, found again without their job, cleared away when unwanted."""

from __future__ import annotations

import json
import os
import random
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from pytestqt.qtbot import QtBot

from app.adapters.merge_leftovers import find_leftovers
from app.adapters.merge_staging import PREFIX, Staging, job_of
from app.core.jobs import Job, JobState, Progress
from app.core.merge_plan import MergePlan, MergeResult
from app.core.paths import default_paths, resources
from app.core.stack import AdapterStack, StackedAdapter
from app.engine import launch
from app.store.database import Database
from app.store.jobs import JobStore
from app.viewmodels.leftovers import Leftovers
from app.viewmodels.tasks import TaskQueue
from app.workers.task_worker import TaskWorker

VOICE = resources() / "starter" / "voice-adapter"
CORE = pytest.mark.skipif(
    not os.environ.get("WEFT_PYTHON_CORE"), reason="WEFT_PYTHON_CORE names no interpreter with PyTorch"
)


def plan_for(base: Path, target: Path) -> MergePlan:
    stack = AdapterStack(adapters=(StackedAdapter(path=str(VOICE), name="voice"),))
    return MergePlan(model=str(base), stack=stack, target=str(target))


def large_base(folder: Path, layers: int = 160) -> Path:
    """The starter with more layers: long enough to be killed in the middle of."""
    source = resources() / "starter" / "model"
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text("utf-8"))
    had = config["num_hidden_layers"]
    config["num_hidden_layers"] = layers
    config.pop("layer_types", None)
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    data = (source / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header: dict[str, Any] = json.loads(data[8 : 8 + length])
    made: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    body, parts, at = data[8 + length :], list[bytes](), 0

    def put(name: str, entry: dict[str, Any]) -> None:
        nonlocal at
        start, end = entry["data_offsets"]
        parts.append(body[start:end])
        made[name] = {**entry, "data_offsets": [at, at + end - start]}
        at += end - start

    for name, entry in header.items():
        if name != "__metadata__" and ".layers." not in name:
            put(name, entry)
    for layer in range(layers):
        for name, entry in header.items():
            if f".layers.{layer % had}." in name:
                put(name.replace(f".layers.{layer % had}.", f".layers.{layer}."), entry)
    text = json.dumps(made).encode()
    text += b" " * (-len(text) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for part in parts:
            file.write(part)
    return folder


class Bench:
    def __init__(self, tmp_path: Path) -> None:
        self.database = Database(tmp_path / "weft.db")
        self.store = JobStore(self.database)
        self.models = tmp_path / "models"
        self.models.mkdir()
        self.queue = self.new_queue(tmp_path)
        self.leftovers = Leftovers(self.store, self.queue, lambda: [self.models])
        self.found: list[list[Job]] = []
        self.leftovers.found.connect(self.found.append)

    def new_queue(self, tmp_path: Path) -> TaskQueue:
        return TaskQueue(
            self.store,
            make_client=lambda name, log: launch.task_engine(name, default_paths(), log.stem),
            make_worker=TaskWorker,
            logs=tmp_path / "logs",
        )

    def look(self, qtbot: QtBot) -> list[Job]:
        """What is newly offered."""
        before = len(self.found)
        self.leftovers.look()
        with qtbot.waitSignal(self.leftovers._work.done, timeout=10_000):
            pass
        return [job for jobs in self.found[before:] for job in jobs]

    def close(self) -> None:
        self.queue.close()
        self.leftovers.close()
        self.database.close()


@pytest.fixture
def bench(tmp_path: Path, qapp: object) -> Iterator[Bench]:
    made = Bench(tmp_path)
    yield made
    made.close()


def killed(plan: MergePlan) -> Path:
    """A staging folder as a killed merge leaves it."""
    with Staging(Path(plan.target)) as staging:
        staging.begin("mark", job_of("merge", "core", plan))
        (staging.folder / "model.safetensors").write_bytes(b"x" * 100_000)
        return staging.root


def test_what_no_job_knows_of_can_be_started_again_and_is_offered_once(bench: Bench, qtbot: QtBot) -> None:
    base = resources() / "starter" / "model"
    plan = plan_for(base, bench.models / "made")
    root = killed(plan)
    (job,) = bench.look(qtbot)
    assert job.state is JobState.CRASHED and job.title == "Merge made" and root.is_dir()
    stored = json.loads(job.parameters)
    assert stored["environment"] == "core" and msgspec.convert(stored["parameters"], MergePlan) == plan
    assert bench.look(qtbot) == [], "it stands in the list already"
    # Taken off the list, it gives its space back.
    bench.store.remove(job.id)
    bench.leftovers.forget(job)
    qtbot.waitUntil(lambda: not root.exists(), timeout=5_000)


def test_a_job_that_another_would_go_on_from_keeps_it(bench: Bench, qtbot: QtBot) -> None:
    plan = plan_for(resources() / "starter" / "model", bench.models / "made")
    root = killed(plan)
    (first,) = bench.look(qtbot)
    bench.queue.adopt("merge", "again", msgspec.to_builtins(plan), environment="core", message="")
    bench.store.remove(first.id)
    bench.leftovers.forget(first)
    bench.leftovers.close()
    assert root.is_dir()


def test_what_a_cancelled_job_was_ended_in_goes_but_not_what_another_goes_on_from(bench: Bench, qtbot: QtBot) -> None:
    plan = plan_for(resources() / "starter" / "model", bench.models / "made")
    root = killed(plan)
    (interrupted,) = bench.look(qtbot)
    envelope = msgspec.json.encode({"environment": "core", "parameters": plan}).decode()
    again = bench.store.create("merge", "again", "cpu", envelope)
    again = bench.store.update(again.id, state=JobState.CANCELLED)
    bench.queue.ended.emit(again, None, None)
    bench.leftovers.close()
    assert root.is_dir(), "the interrupted one goes on from it"
    bench.store.remove(interrupted.id)
    bench.queue.ended.emit(again, None, None)
    qtbot.waitUntil(lambda: not root.exists(), timeout=5_000)


def test_what_is_of_no_use_is_cleared_away_and_what_may_be_is_not(bench: Bench, qtbot: QtBot, tmp_path: Path) -> None:
    base = resources() / "starter" / "model"
    done = killed(plan_for(base, bench.models / "done"))
    (bench.models / "done").mkdir()  # it got its name, and was killed before it had tidied up
    unplugged = killed(plan_for(tmp_path / "stick" / "base", bench.models / "later"))
    gone = killed(plan_for(tmp_path / "stick" / "base", bench.models / "never"))
    long_ago = time.time() - 40 * 86400
    os.utime(gone, (long_ago, long_ago))
    unreadable = killed(plan_for(base, bench.models / "what"))
    (unreadable / "job").write_bytes(b"{")
    inner = killed(plan_for(base, bench.models / "below" / "file.gguf"))
    other = bench.models / f"{PREFIX}notes"  # a folder of the user's that is only called so
    other.mkdir()
    (other / "diary.txt").write_text("mine", "utf-8")
    with Staging(bench.models / "running") as held:
        held.begin("mark", job_of("merge", "core", plan_for(tmp_path / "gone", bench.models / "running")))
        os.utime(held.root, (long_ago, long_ago))
        jobs = bench.look(qtbot)
        assert held.root.is_dir()
        held.discard()
    assert [job.title for job in jobs] == ["Merge file.gguf"]
    assert not done.exists() and not gone.exists() and not unreadable.exists()
    assert unplugged.is_dir() and inner.is_dir() and (other / "diary.txt").is_file()


@CORE
def test_a_merge_killed_with_the_window_goes_on_from_there_when_it_is_retried(
    bench: Bench, qtbot: QtBot, tmp_path: Path
) -> None:
    base = large_base(tmp_path / "base")
    plan = plan_for(base, bench.models / "made")
    job = bench.queue.submit("merge", "Merge made", plan)
    share = random.uniform(0.1, 0.6)
    print(f"killed from {share:.2f} on")

    def far(_job: int, progress: Progress) -> None:
        if (
            progress.phase == "Merging"
            and progress.fraction
            and progress.fraction > share
            and bench.queue.is_running(job.id)
        ):
            bench.queue.adjust(job.id, {"paused": True})

    bench.queue.progressed.connect(far)
    qtbot.waitUntil(lambda: (p := bench.queue.progress(job.id)) is not None and p.phase == "Paused", timeout=60_000)
    bench.queue.close()
    assert bench.store.get(job.id).state is JobState.CRASHED
    (left,) = find_leftovers([bench.models])
    assert left.bytes > 1_000_000 and not Path(plan.target).exists()
    bench.queue = bench.new_queue(tmp_path)
    bench.leftovers._queue = bench.queue
    assert bench.look(qtbot) == [], "its job is in the list: that is retried"
    ends: list[Any] = []
    bench.queue.ended.connect(lambda *end: ends.append(end))
    bench.queue.retry(job.id)
    qtbot.waitUntil(lambda: bool(ends), timeout=60_000)
    _, result, error = ends[0]
    assert error is None
    made = msgspec.convert(result, MergeResult)
    assert made.resumed > 0 and not left.folder.exists()
    qtbot.waitUntil(lambda: not bench.queue.busy, timeout=20_000)
    # The same bytes as in one go.
    again = bench.queue.submit("merge", "whole", msgspec.structs.replace(plan, target=str(bench.models / "whole")))
    qtbot.waitUntil(lambda: len(ends) == 2 and ends[1][0].id == again.id, timeout=60_000)
    assert ends[1][2] is None and ends[1][1]["resumed"] == 0
    one, two = (bench.models / name / "model.safetensors" for name in ("made", "whole"))
    assert one.read_bytes() == two.read_bytes()
    qtbot.waitUntil(lambda: not bench.queue.busy, timeout=20_000)
