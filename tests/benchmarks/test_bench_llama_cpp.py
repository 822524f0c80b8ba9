"""llama.cpp as the window receives it, against a bare decode loop, by turns in one run. Prints ours, the reference, the ratio."""

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

from app.core.conversation import Message
from app.core.library import ModelEntry, ModelFormat
from app.core.sampling import Sampling
from app.engine import protocol
from app.engine.client import EngineClient

pytestmark = pytest.mark.bench

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {"PYTHONPATH": str(ROOT), "OMP_WAIT_POLICY": "passive", "GGML_NO_BACKTRACE": "1"}
TURN, TURNS = 100, 16  # 1,600 tokens in one growing context


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

    def close(self) -> None:
        self._child.communicate()


class Ours:
    """An engine, as the window holds one."""

    def __init__(self, model: ModelEntry, log: Path, threads: int, context: int) -> None:
        self.client = EngineClient(
            python=Path(interpreter()), backend="llama_cpp", log_path=log, environment={"OMP_WAIT_POLICY": "passive"}
        )
        self.client.start()
        list(self.client.call(protocol.Load(model=model, options={"threads": threads, "n_ctx": context})))

    def generate(self, **fields: Any) -> tuple[str, float, float, protocol.Generated]:
        """Text, seconds to the first token, seconds from there to the last, the result."""
        fields.setdefault("sampling", Sampling(temperature=0, max_tokens=TURN))
        text: list[str] = []
        started = first = last = time.perf_counter()
        result = None
        for event in self.client.call(protocol.Generate(**fields)):
            if isinstance(event, protocol.Tokens):
                last = time.perf_counter()
                first = last if not text else first
                text.append(event.text)
            elif isinstance(event, protocol.Done):
                result = event.result
        assert isinstance(result, protocol.Generated)
        return "".join(text), first - started, last - first, result

    def round_trip(self) -> float:
        times: list[float] = []
        for _ in range(50):
            started = time.perf_counter()
            list(self.client.call(protocol.Ping()))
            times.append(time.perf_counter() - started)
        return statistics.median(times)


@pytest.fixture(params=sorted({1, min(4, os.cpu_count() or 1)}), ids=lambda n: f"{n} threads")
def threads(request: pytest.FixtureRequest) -> int:
    return request.param


@pytest.fixture
def pair(threads: int, model: ModelEntry, tmp_path: Path) -> Iterator[tuple[Ours, Reference]]:
    ours, reference = Ours(model, tmp_path / "engine.log", threads, 4096), Reference(model.path, threads, 4096)
    yield ours, reference
    reference.close()
    ours.client.shutdown()


def test_tokens_a_second(pair: tuple[Ours, Reference], threads: int) -> None:
    """1,600 tokens in one growing context, a hundred at a time by turns.

    On a quiet machine the clock decides, by the middle turn. On a busy one the clock says who got the processor, so the
    processor time of the whole engine may speak for it instead, all its threads and the first token included.
    """
    ours, reference = pair
    busy = os.getloadavg()[0] > 0.5
    if busy and threads > 1:
        pytest.skip(
            f"load {os.getloadavg()[0]:.1f}: threads that wait for one another would measure the machine's other work"
        )
    text = "the sea is near the shore"
    reference.ask("prompt", text)
    engine = psutil.Process(ours.client.pid)
    clock: dict[str, list[float]] = {"ours": [], "bare": []}
    processor = {"ours": 0.0, "bare": 0.0}
    tokens = 0
    for turn in range(TURNS):
        for way in ("ours", "bare") if turn % 2 else ("bare", "ours"):
            if way == "bare":
                seconds, used = reference.ask("continue", TURN)
            else:
                before = sum(engine.cpu_times()[:2])
                more, _, seconds, result = ours.generate(prompt=text)
                used = sum(engine.cpu_times()[:2]) - before
                assert result.tokens == TURN
                tokens += result.tokens
                text += more
            clock[way].append(seconds)
            processor[way] += used
    on_clock = statistics.median(b / o for b, o in zip(clock["bare"], clock["ours"], strict=True))
    in_processor = processor["bare"] / processor["ours"]
    rate = {way: (TURN - 1) / statistics.median(times) for way, times in clock.items()}
    print(
        f"\ntokens/s over {tokens}: ours {rate['ours']:.1f}, bare loop {rate['bare']:.1f}, ratio {on_clock:.3f} on the clock, "
        f"{in_processor:.3f} in processor time; the machine is {'busy' if busy else 'quiet'}"
    )
    assert tokens == 1600
    assert max(on_clock, in_processor if busy else 0.0) >= 0.95


def test_time_to_the_first_token(pair: tuple[Ours, Reference]) -> None:
    ours, reference = pair
    mine: list[float] = []
    bare: list[float] = []
    for turn in range(24):
        prompt = f"{'etaoinshr'[turn % 9] * (1 + turn // 9)} " + "the rain is on the shore " * 6
        for way in ("ours", "bare") if turn % 2 else ("bare", "ours"):
            if way == "bare":
                bare.append(reference.ask("prompt", prompt)[0])
            else:
                _, first, _, result = ours.generate(prompt=prompt, sampling=Sampling(temperature=0, max_tokens=2))
                assert result.reused_tokens <= 3
                mine.append(first)
    added = statistics.median(m - b for m, b in zip(mine, bare, strict=True))
    trip = ours.round_trip()
    print(
        f"\nfirst token: ours {1e3 * statistics.median(mine):.1f} ms, bare {1e3 * statistics.median(bare):.1f} ms, "
        f"added {1e3 * added:.2f} ms; pipe round trip {1e3 * trip:.3f} ms"
    )
    assert added <= max(0.015, 3 * trip)


def test_second_turn_against_a_full_read(pair: tuple[Ours, Reference]) -> None:
    """A history of a thousand tokens: the next turn reads only what is new."""
    ours, _ = pair
    ratios: list[float] = []
    for turn in range(5):
        history = f"{'etaoi'[turn]} " + "the rain is on the shore " * 130
        messages = (Message(role="user", content=history),)
        answer, full, _, first = ours.generate(messages=messages, sampling=Sampling(temperature=0, max_tokens=16))
        assert first.prompt_tokens >= 1000 and first.reused_tokens < 10
        messages += (Message(role="assistant", content=answer), Message(role="user", content="and then"))
        _, again, _, second = ours.generate(messages=messages, sampling=Sampling(temperature=0, max_tokens=2))
        ratios.append(full / again)
        assert second.reused_tokens >= first.prompt_tokens
    ratio = statistics.median(ratios)
    print(
        f"\nfirst token with {first.prompt_tokens} tokens of history: full read {1e3 * full:.0f} ms, "
        f"second turn {1e3 * again:.1f} ms ({second.prompt_tokens - second.reused_tokens} new), {ratio:.0f} times faster"
    )
    assert ratio >= 20
