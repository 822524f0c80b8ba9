"""llama.cpp as the window receives it, against a bare decode loop, by turns in one run. Prints ours, the reference, the ratio.

The window's way is taken whole: messages go through an EngineWorker to an engine, through its chat template and back as
signals into an event loop. Where other programs had the processor meanwhile, nothing is claimed: the test is skipped, and
says so with its figures.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import pytest

pytest.importorskip("PySide6.QtCore", reason="PySide6 is not installed in this interpreter: there is no window to receive")

from PySide6.QtCore import QCoreApplication, QEventLoop, QObject, QTimer, Slot

from app.core.conversation import Message
from app.core.library import ModelEntry, ModelFormat
from app.core.sampling import Sampling
from app.engine import protocol
from app.engine.client import EngineClient
from app.workers.engine_worker import EngineWorker

pytestmark = pytest.mark.bench

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {"PYTHONPATH": str(ROOT), "OMP_WAIT_POLICY": "passive", "GGML_NO_BACKTRACE": "1"}
TOKENS, RUNS = 1600, 5
OTHERS = 0.10  # of each processor, which others may use before a figure means nothing


def interpreter() -> str:
    """The engines' Python, where llama.cpp is."""
    python = os.environ.get("WEFT_PYTHON_LLAMACPP") or (sys.executable if find_spec("llama_cpp") else "")
    return python or pytest.skip("llama-cpp-python is not installed; `python3 run.py test --bench` installs it")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelEntry:
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    command = [interpreter(), "-m", "tests.benchmarks.bare_llama", "make", str(path)]
    subprocess.run(command, env=os.environ | ENVIRONMENT, cwd=ROOT, check=True)
    return ModelEntry(id=str(path), name="bench", path=str(path), format=ModelFormat.GGUF)


class Reference:
    """The bare loop in its process."""

    def __init__(self, path: str, threads: int, context: int) -> None:
        self._child = subprocess.Popen(
            [interpreter(), "-m", "tests.benchmarks.bare_llama", "serve", path, str(threads), str(context)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | ENVIRONMENT, cwd=ROOT,
        )  # fmt: skip
        assert self._answer() == "ready"

    def ask(self, what: str, argument: Any) -> Any:
        assert self._child.stdin is not None
        self._child.stdin.write(json.dumps([what, argument]) + "\n")
        self._child.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        assert self._child.stdout is not None
        return json.loads(self._child.stdout.readline())

    @property
    def pid(self) -> int:
        return self._child.pid

    def close(self) -> None:
        self._child.communicate()


class Quiet:
    """Measures what other programs take of the processors, while in this block.

    Attributes:
        others: the share of each processor that went to none of the given processes, nor to this one.
    """

    def __init__(self, *pids: int | None) -> None:
        self._processes = [psutil.Process(pid) for pid in (os.getpid(), *pids)]
        self.others = 0.0

    def _used(self) -> tuple[float, float]:
        times = psutil.cpu_times()._asdict()
        everybody = sum(seconds for name, seconds in times.items() if name not in ("idle", "iowait", "guest", "guest_nice"))
        return everybody, sum(sum(process.cpu_times()[:2]) for process in self._processes)

    def __enter__(self) -> Quiet:
        self._started, self._before = time.monotonic(), self._used()
        return self

    def __exit__(self, *_: object) -> None:
        everybody, we = (after - before for after, before in zip(self._used(), self._before, strict=True))
        self.others = max(0.0, everybody - we) / (time.monotonic() - self._started) / (os.cpu_count() or 1)

    def insist(self, figures: str) -> None:
        """Skip the test when the machine was too busy for its figures to say anything."""
        if self.others > OTHERS:
            pytest.skip(
                f"inconclusive: other programs took {self.others:.0%} of each processor (at most {OTHERS:.0%}); {figures}"
            )


# Texts come first, so that two conversations have nothing in common that need not be read again; and a role is told with
# one token, as real templates do, for this model would spell its name in a dozen.
TEMPLATE = "{% for message in messages %}{{ message.content }}{{ eos_token }}{% endfor %}"


def rendered(text: str) -> str:
    """What the template makes of one message."""
    return f"{text}</s>"


class Ours(QObject):
    """The window's end: an engine's worker, and slots that its signals reach through the event loop."""

    def __init__(self, model: ModelEntry, log: Path, threads: int, context: int) -> None:
        super().__init__()
        self.client = _client(log)
        self._worker = EngineWorker(self.client)
        self._loop = QEventLoop()
        self._waiting_for = 0
        self._pieces: list[tuple[float, str, int]] = []  # when, text, tokens
        self._result: object = None
        self._error: object = None
        for signal, slot in (
            (self._worker.tokens, self._on_tokens),
            (self._worker.done, self._on_done),
            (self._worker.failed, self._on_failed),
            (self._worker.loaded, self._on_loaded),
        ):
            signal.connect(slot)
        self._worker.start()
        options = {"threads": threads, "n_ctx": context, "chat_template": TEMPLATE}
        self._ask(protocol.Load(model=model, options=options))

    @property
    def pid(self) -> int | None:
        return self.client.pid

    @Slot(int, str, int)
    def _on_tokens(self, _: int, text: str, count: int) -> None:
        self._pieces.append((time.perf_counter(), text, count))

    @Slot(int, object)
    def _on_done(self, command: int, result: object) -> None:
        if command == self._waiting_for:
            self._result = result
            self._loop.quit()

    @Slot(int, object)
    def _on_failed(self, _: int, error: object) -> None:
        self._error = error
        self._loop.quit()

    @Slot(object)
    def _on_loaded(self, _: object) -> None:
        self._loop.quit()

    def _ask(self, command: protocol.Command) -> float:
        """Send a command and live in the event loop until it is done. Returns when it was sent."""
        self._pieces.clear()
        started = 0.0

        def send() -> None:
            nonlocal started
            started = time.perf_counter()
            self._waiting_for = self._worker.send(command)

        QTimer.singleShot(0, send)
        self._loop.exec()
        assert self._error is None, self._error
        return started

    def generate(self, *messages: Message, tokens: int) -> tuple[str, float, float, protocol.Generated]:
        """Text, seconds to the first token, tokens a second from there to the last, the result."""
        sampling = Sampling(temperature=0, max_tokens=tokens)
        started = self._ask(protocol.Generate(messages=messages, sampling=sampling))
        assert isinstance(self._result, protocol.Generated) and self._result.tokens == tokens
        first, last = self._pieces[0], self._pieces[-1]
        later = sum(count for _, _, count in self._pieces[1:])
        rate = later / (last[0] - first[0]) if later else 0.0
        return "".join(text for _, text, _ in self._pieces), first[0] - started, rate, self._result

    def close(self) -> None:
        self._worker.stop()


def _client(log: Path) -> EngineClient:
    return EngineClient(
        python=Path(interpreter()), backend="llama_cpp", log_path=log, environment={"OMP_WAIT_POLICY": "passive"}
    )


def round_trip(log: Path) -> float:
    """Seconds for a message through the bare pipes and back, the median of 200."""
    client = _client(log)
    client.start()
    try:
        times: list[float] = []
        for _ in range(200):
            started = time.perf_counter()
            list(client.call(protocol.Ping()))
            times.append(time.perf_counter() - started)
        return statistics.median(times)
    finally:
        client.shutdown()


def user(text: str) -> Message:
    return Message(role="user", content=text)


@pytest.fixture(scope="module")
def application(qapp: QCoreApplication) -> QCoreApplication:
    """The one application of all benchmarks: a bare core application would be in the way of those with windows."""
    return qapp


@pytest.fixture(params=sorted({1, min(4, os.cpu_count() or 1)}), ids=lambda n: f"{n} threads")
def threads(request: pytest.FixtureRequest) -> int:
    return request.param


@pytest.fixture
def pair(
    application: QCoreApplication, threads: int, model: ModelEntry, tmp_path: Path
) -> Iterator[tuple[Ours, Reference]]:
    ours, reference = Ours(model, tmp_path / "engine.log", threads, 4096), Reference(model.path, threads, 4096)
    yield ours, reference
    reference.close()
    ours.close()


def test_tokens_a_second(pair: tuple[Ours, Reference], threads: int) -> None:
    """Answers of 1,600 tokens, ours and the bare loop's by turns; the medians decide, on the clock."""
    ours, reference = pair
    rates: dict[str, list[float]] = {"ours": [], "bare": []}
    with Quiet(ours.pid, reference.pid) as machine:
        for run in range(RUNS):
            text = f"{'etaoi'[run]} the sea is near the shore"
            for way in ("ours", "bare") if run % 2 else ("bare", "ours"):
                if way == "bare":
                    reference.ask("prompt", rendered(text))
                    rates[way].append((TOKENS - 1) / reference.ask("continue", TOKENS)[0])
                else:
                    rates[way].append(ours.generate(user(text), tokens=TOKENS)[2])
    ratio = statistics.median(rates["ours"]) / statistics.median(rates["bare"])
    figures = (
        f"{threads} threads, answers of {TOKENS} tokens: ours {statistics.median(rates['ours']):.1f} tokens/s "
        f"({min(rates['ours']):.1f} to {max(rates['ours']):.1f}), bare loop {statistics.median(rates['bare']):.1f} "
        f"({min(rates['bare']):.1f} to {max(rates['bare']):.1f}), ratio {ratio:.3f} (at least 0.95)"
    )
    print(f"\n{figures}; others took {machine.others:.1%} of each processor")
    machine.insist(figures)
    assert ratio >= 0.95


def test_time_to_the_first_token(pair: tuple[Ours, Reference], tmp_path: Path) -> None:
    """From sending a conversation to its first token in the event loop, the chat template included."""
    ours, reference = pair
    mine: list[float] = []
    bare: list[float] = []
    taken, read = list[int](), list[int]()  # tokens of the prompts
    with Quiet(ours.pid, reference.pid) as machine:
        for turn in range(24):
            prompt = f"{'etaoinshr'[turn % 9] * (1 + turn // 9)} " + "the rain is on the shore " * 6
            for way in ("ours", "bare") if turn % 2 else ("bare", "ours"):
                if way == "bare":
                    seconds, tokens = reference.ask("prompt", rendered(prompt))
                    bare.append(seconds)
                    read.append(tokens)
                else:
                    _, first, _, result = ours.generate(user(prompt), tokens=2)
                    assert result.reused_tokens <= 3
                    mine.append(first)
                    taken.append(result.prompt_tokens)
    assert taken == read
    added = statistics.median(m - b for m, b in zip(mine, bare, strict=True))
    trip = round_trip(tmp_path / "ping.log")
    figures = (
        f"first token: ours {1e3 * statistics.median(mine):.1f} ms, bare {1e3 * statistics.median(bare):.1f} ms, "
        f"added {1e3 * added:.2f} ms (at most {1e3 * max(0.015, 3 * trip):.0f}); pipe round trip {1e3 * trip:.3f} ms"
    )
    print(f"\n{figures}; others took {machine.others:.1%} of each processor")
    machine.insist(figures)
    assert added <= max(0.015, 3 * trip)


def test_second_turn_against_a_full_read(pair: tuple[Ours, Reference]) -> None:
    """A history of a thousand tokens: the next turn reads only what is new."""
    ours, _ = pair
    rows: list[tuple[float, float, int, int]] = []
    with Quiet(ours.pid) as machine:
        for turn in range(5):
            question = user(f"{'etaoi'[turn]} " + "the rain is on the shore " * 130)
            answer, full, _, first = ours.generate(question, tokens=16)
            assert first.prompt_tokens >= 1000 and first.reused_tokens < 10
            assistant = Message(role="assistant", content=answer)
            _, again, _, second = ours.generate(question, assistant, user("and then"), tokens=2)
            assert second.reused_tokens >= first.prompt_tokens
            rows.append((full, again, first.prompt_tokens, second.prompt_tokens - second.reused_tokens))
    ratio = statistics.median(full / again for full, again, *_ in rows)
    full, again, history, new = rows[-1]
    figures = (
        f"first token with {history} tokens of history: full read {1e3 * full:.0f} ms, second turn {1e3 * again:.1f} ms "
        f"({new} new), {ratio:.0f} times faster (at least 20)"
    )
    print(f"\n{figures}; others took {machine.others:.1%} of each processor")
    machine.insist(figures)
    assert ratio >= 20
