"""Short tasks without jobs: real children; the newest question is answered, a dead child is told, nothing stays behind."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from pytestqt.qtbot import QtBot

from app.core.errors import ErrorKind, WeftError
from app.engine.client import EngineClient
from app.viewmodels.task_lane import TaskLane

WAIT = 20_000
TASK = """
import os, time
import msgspec
from app.core.errors import ErrorKind, WeftError

class Parameters(msgspec.Struct, kw_only=True):
    word: str = ""
    seconds: float = 0.0
    how: str = "well"

def run(parameters, report):
    until = time.monotonic() + parameters.seconds
    while time.monotonic() < until:
        if report.cancelled:
            raise WeftError(ErrorKind.CANCELLED, "Cancelled.")
        time.sleep(0.01)
    if parameters.how == "badly":
        raise WeftError(ErrorKind.BAD_INPUT, "It went badly.", "Ask it to go well.")
    if parameters.how == "die":
        os.kill(os.getpid(), 9)
    return {"word": parameters.word, "process": os.getpid()}
"""
HOST = """
import sys
import app.tasks
app.tasks.__path__.append({folder!r})
from app.engine.host import main
sys.exit(main())
"""


class Ask(msgspec.Struct, kw_only=True):
    word: str = ""
    seconds: float = 0.0
    how: str = "well"


class Bench:
    def __init__(self, tmp_path: Path) -> None:
        folder = tmp_path / "tasks"
        folder.mkdir()
        (folder / "murmur.py").write_text(TASK)
        (tmp_path / "lane_test_host.py").write_text(HOST.format(folder=str(folder)))
        self.folder = tmp_path
        self.missing = False
        self.answers: list[tuple[object, dict[str, object]]] = []
        self.failures: list[tuple[object, WeftError]] = []
        self.lane = TaskLane(self.client)
        self.lane.answered.connect(lambda key, result: self.answers.append((key, result)))
        self.lane.failed.connect(lambda key, error: self.failures.append((key, error)))

    def client(self) -> EngineClient:
        if self.missing:
            raise WeftError(ErrorKind.ENVIRONMENT, "It is not installed.", "Install it.")
        path = f"{self.folder}:{Path(__file__).parents[2]}"
        return EngineClient(
            python=Path(sys.executable),
            backend="",
            log_path=self.folder / "lane.log",
            environment={"PYTHONPATH": path},
            module="lane_test_host",
        )

    def ask(self, key: object, **fields: object) -> None:
        self.lane.ask(key, "murmur", Ask(**fields))  # type: ignore[arg-type]


@pytest.fixture
def bench(tmp_path: Path, qtbot: QtBot) -> Iterator[Bench]:
    made = Bench(tmp_path)
    yield made
    made.lane.close()
    qtbot.wait(20)


def test_the_newest_question_is_answered_by_a_child_that_stays(bench: Bench, qtbot: QtBot) -> None:
    bench.ask("old", word="old", seconds=5.0)
    bench.ask("new", word="new")
    qtbot.waitUntil(lambda: bool(bench.answers), timeout=WAIT)
    bench.ask("again", word="again")
    qtbot.waitUntil(lambda: len(bench.answers) == 2, timeout=WAIT)
    assert [(key, result["word"]) for key, result in bench.answers] == [("new", "new"), ("again", "again")]
    assert bench.answers[0][1]["process"] == bench.answers[1][1]["process"]
    assert bench.failures == []


@pytest.mark.fault
def test_a_failure_a_dead_child_and_a_missing_environment_are_told_and_the_next_question_is_answered(
    bench: Bench, qtbot: QtBot
) -> None:
    bench.ask(1, how="badly")
    qtbot.waitUntil(lambda: len(bench.failures) == 1, timeout=WAIT)
    assert bench.failures[0][1].message == "It went badly."
    bench.ask(2, how="die")
    qtbot.waitUntil(lambda: len(bench.failures) == 2, timeout=WAIT)
    assert bench.failures[1][0] == 2 and bench.failures[1][1].kind is ErrorKind.CRASHED
    bench.missing = True
    bench.ask(3)
    assert bench.failures[2][1].kind is ErrorKind.ENVIRONMENT
    bench.missing = False
    bench.ask(4, word="well")
    qtbot.waitUntil(lambda: bool(bench.answers), timeout=WAIT)
    assert bench.answers[0][0] == 4


def test_closing_waits_for_nobody(bench: Bench, qtbot: QtBot) -> None:
    bench.ask("long", seconds=60.0)
    qtbot.wait(300)
    bench.lane.close()
    qtbot.wait(50)
    assert bench.answers == [] and bench.failures == []
