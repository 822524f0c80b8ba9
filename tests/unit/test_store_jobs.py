"""Jobs and what is remembered per model."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from app.core.errors import ErrorKind, WeftError
from app.core.jobs import JobState, Progress
from app.store.database import Database
from app.store.jobs import JobStore
from app.store.model_settings import ModelSettings

ROOT = Path(__file__).resolve().parents[2]


def test_a_job_from_queue_to_end(database: Database) -> None:
    jobs = JobStore(database)
    job = jobs.create("train", "Train it", "gpu:0", '{"r": 16}', "/log")
    assert job.state is JobState.QUEUED and job.created > 0 and job.started == job.ended == 0
    job = jobs.update(job.id, state=JobState.RUNNING, progress=Progress(phase="Step", done=1, total=4, unit="steps"))
    assert job.started > 0 and job.progress is not None and job.progress.fraction == 0.25
    started = job.started
    job = jobs.update(job.id, state=JobState.FAILED, message="Why", hint="How")
    assert (job.started, job.message, job.hint) == (started, "Why", "How") and job.ended >= started
    assert jobs.get(job.id) == job
    with pytest.raises(TypeError):
        jobs.update(job.id, id=5)
    with pytest.raises(WeftError):
        jobs.get(99)


def test_the_latest_first_and_removal(database: Database) -> None:
    jobs = JobStore(database)
    ids = [jobs.create("x", str(n)).id for n in range(5)]
    assert [job.id for job in jobs.jobs(limit=3)] == ids[:1:-1]
    with pytest.raises(WeftError) as caught:
        jobs.remove(ids[0])
    assert caught.value.kind is ErrorKind.BUSY
    jobs.update(ids[0], state=JobState.DONE)
    assert [job.id for job in jobs.jobs(state=JobState.DONE)] == [ids[0]]
    jobs.remove(ids[0])
    assert len(jobs.jobs()) == 4


_DIES = """
import os, sys
from pathlib import Path
from app.core.jobs import JobState
from app.store.database import Database
from app.store.jobs import JobStore
jobs = JobStore(Database(Path(sys.argv[1])))
jobs.create("x", "queued")
jobs.update(jobs.create("x", "running").id, state=JobState.RUNNING)
jobs.update(jobs.create("x", "done").id, state=JobState.DONE)
os._exit(9)
"""


@pytest.mark.fault
def test_jobs_of_a_dead_process_say_what_to_do_next(database: Database, tmp_path: Path) -> None:
    jobs = JobStore(database)
    alive = jobs.update(jobs.create("x", "alive").id, state=JobState.RUNNING)
    subprocess.run([sys.executable, "-c", _DIES, str(tmp_path / "weft.sqlite")], cwd=ROOT, timeout=60, check=False)
    marked = jobs.mark_interrupted()
    assert sorted(job.title for job in marked) == ["queued", "running"]
    assert all(job.state is JobState.CRASHED and job.hint and job.ended for job in marked)
    assert jobs.get(alive.id).state is JobState.RUNNING
    assert {job.title: job.state for job in jobs.jobs()}["done"] is JobState.DONE
    assert jobs.mark_interrupted() == []


def test_options_are_kept_per_model_and_loader(database: Database) -> None:
    settings = ModelSettings(database)
    assert settings.get("m") == (None, {})
    settings.set("m", "llama_cpp", {"n_ctx": 4096, "flash": True, "kv": "q8_0", "rope": 1.5, "seed": None})
    settings.set("m", "transformers", {"dtype": "bfloat16"})
    assert settings.get("m") == ("transformers", {"dtype": "bfloat16"})
    assert settings.get("m", "llama_cpp")[1] == {"n_ctx": 4096, "flash": True, "kv": "q8_0", "rope": 1.5, "seed": None}
    settings.set("m", None)
    assert settings.get("m") == (None, {}) and settings.get("m", "transformers")[1]
    settings.set("m", "llama_cpp")
    assert settings.get("m")[1]["n_ctx"] == 4096  # picked again: its options come back
    settings.forget("m")
    assert settings.get("m", "llama_cpp") == ("llama_cpp", {})


def test_custom_code_is_trusted_as_it_was_shown(database: Database) -> None:
    settings = ModelSettings(database)
    assert not settings.trusts_code("m", "") and not settings.trusts_code("m", "abc")
    settings.trust_code("m", "abc")
    settings.set("m", "transformers", {})
    assert settings.trusts_code("m", "abc")
    assert not settings.trusts_code("m", "changed") and not settings.trusts_code("other", "abc")
    settings.trust_code("m", "")
    assert not settings.trusts_code("m", "abc") and not settings.trusts_code("m", "")


def test_updates_are_cheap(database: Database) -> None:
    jobs = JobStore(database)
    job = jobs.create("x", "x")
    start = time.process_time()
    for number in range(300):
        jobs.update(job.id, progress=Progress(phase="p", done=number, total=300))
    assert (time.process_time() - start) / 300 < 0.005
