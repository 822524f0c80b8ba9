"""The Transformers loader in a real engine: the same answers through the pipe, and a crash that costs one engine only."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="torch is not installed in this interpreter")
pytest.importorskip("transformers", reason="transformers is not installed in this interpreter")

from app.backends.transformers import Backend
from app.core.errors import WeftError
from app.core.library import ModelEntry
from app.core.sampling import Sampling
from app.engine.client import EngineClient
from app.engine.protocol import Done, Generate, Generated, Load, Loaded, ProgressEvent, Tokens
from tests.engine import tiny_models
from tests.engine.backend_kit import ask_surely, loaded, user

GREEDY = Sampling(temperature=0, max_tokens=40)
CHAT = (user("What is a loom?"),)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelEntry:
    return tiny_models.make(tmp_path_factory.mktemp("models") / "m", seed=9, context=4096)


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[EngineClient]:
    client = EngineClient(python=Path(sys.executable), backend="transformers", log_path=tmp_path / "engine.log")
    client.start()
    yield client
    client.shutdown(timeout=10)


def generate(client: EngineClient, **fields: object) -> tuple[str, Generated, int]:
    """Text, result and number of Tokens events."""
    events = list(client.call(Generate(**{"messages": CHAT, "sampling": GREEDY, **fields})))  # type: ignore[arg-type]
    pieces = [e for e in events if isinstance(e, Tokens)]
    done = events[-1]
    assert isinstance(done, Done) and isinstance(done.result, Generated)
    assert sum(p.count for p in pieces) == done.result.tokens
    return "".join(p.text for p in pieces), done.result, len(pieces)


def test_an_engine_answers_as_the_backend_does(engine: EngineClient, model: ModelEntry) -> None:
    with loaded(Backend(), model) as (backend, _):
        expected = ask_surely(backend, CHAT, max_tokens=40)
    events = list(engine.call(Load(model=model)))
    assert any(isinstance(e, Loaded) and e.memory > 0 for e in events)
    assert any(isinstance(e, ProgressEvent) for e in events)
    text, result, _ = generate(engine)
    assert expected.same_as(text) and (result.finish_reason, result.tokens) == ("length", 40)
    assert generate(engine)[1].reused_tokens == result.prompt_tokens - 1


def test_cancel_reaches_a_long_prompt_and_the_model_stays(engine: EngineClient, model: ModelEntry) -> None:
    list(engine.call(Load(model=model)))
    request = engine.send(Generate(prompt="The warp and the weft. " * 400, sampling=Sampling(max_tokens=2000)))
    cancelled = 0.0
    result = None
    while result is None:
        event = engine.next_event(30)
        if isinstance(event, ProgressEvent) and event.phase == "Reading the prompt" and not cancelled:
            cancelled = time.monotonic()
            engine.cancel(request)
        if isinstance(event, Done) and event.id == request:
            result = event.result
    assert isinstance(result, Generated) and result.finish_reason == "cancelled"
    assert time.monotonic() - cancelled < 5
    assert generate(engine)[1].tokens


@pytest.mark.fault
@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_a_killed_engine_says_so_and_a_fresh_one_answers(model: ModelEntry, tmp_path: Path) -> None:
    client = EngineClient(python=Path(sys.executable), backend="transformers", log_path=tmp_path / "engine.log")
    client.start()
    list(client.call(Load(model=model)))
    expected, _, _ = generate(client)
    client.send(Generate(messages=CHAT, sampling=Sampling(max_tokens=3000)))
    os.kill(client.pid, signal.SIGKILL)
    with pytest.raises(WeftError):
        generate(client)
    client.shutdown()
    fresh = client.fresh()
    fresh.start()
    try:
        list(fresh.call(Load(model=model)))
        assert generate(fresh)[0] == expected
    finally:
        fresh.shutdown(timeout=10)
