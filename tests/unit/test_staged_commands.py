"""Command lines that make something beside its target: found again after a kill, cleared away after a cancel."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from app import cli_task
from app.adapters import staging_places
from app.adapters.merge_staging import Staging, job_of
from app.core.errors import ErrorKind, WeftError
from app.core.merge_plan import MergePlan
from app.core.paths import Paths
from app.core.stack import AdapterStack
from app.engine.client import EngineClient


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    names = ("data", "config", "cache", "logs", "runtime")
    return Paths(**{name: tmp_path / "home" / name for name in names})


def run(paths: Paths, target: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> list[Path]:
    """A command that ends so in the middle of its work. Returns the places that were noted meanwhile."""
    plan, noted = MergePlan(model="m", stack=AdapterStack(), target=str(target)), list[Path]()

    def work(*_: Any) -> None:
        with Staging(target) as staging:
            staging.begin("mark", job_of("merge", "core", plan))
            noted.extend(staging_places.remembered(paths.unfinished))
        raise error

    monkeypatch.setattr(cli_task, "_client", lambda *_: None)
    monkeypatch.setattr(cli_task, "_followed", work)
    with pytest.raises(type(error)):
        cli_task.run_task("core", "merge", plan, paths=paths)
    return noted


def test_a_cancel_clears_away_and_says_so(
    tmp_path: Path, paths: Paths, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "elsewhere"
    noted = run(paths, place / "made", monkeypatch, WeftError(ErrorKind.CANCELLED, "Cancelled."))
    assert noted == [place] and not list(place.iterdir()) and not list(paths.unfinished.iterdir())
    assert "nothing of made was kept" in capsys.readouterr().err


def test_what_a_death_leaves_is_found_where_it_lies(
    tmp_path: Path, paths: Paths, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "elsewhere"
    run(paths, place / "made", monkeypatch, WeftError(ErrorKind.CRASHED, "It died."))
    assert staging_places.remembered(paths.unfinished) == [place]
    (root,) = place.iterdir()
    for path in sorted(root.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    root.rmdir()
    assert staging_places.remembered(paths.unfinished) == []
    (note,) = paths.unfinished.iterdir()  # a job may just be about to begin there
    os.utime(note, (0, 0))
    assert staging_places.remembered(paths.unfinished) == [] and not list(paths.unfinished.iterdir())


def test_a_job_that_was_ended_after_a_cancel_is_told_of_as_a_job(tmp_path: Path) -> None:
    job, engine = (
        EngineClient(python=Path("python"), backend=name, log_path=tmp_path / "log") for name in ("", "transformers")
    )
    assert "job" in job._deaf()[0] and "model" not in "".join(job._deaf())
    assert "engine" in engine._deaf()[0] and "loaded again" in engine._deaf()[1]
