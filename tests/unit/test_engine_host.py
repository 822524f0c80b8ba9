"""One engine, a real child process: what goes over the pipe, and in which order and rhythm."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from app.core.errors import ErrorKind, WeftError
from app.engine import protocol
from app.engine.client import EngineClient, EngineEvent, EngineExit
from tests.fakes.fake_engine import Problem, Script, fake_client, fake_model

MakeEngine = Callable[..., EngineClient]


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[MakeEngine]:
    """Makes started engines with a model loaded (`load=False`: without), and ends them."""
    made: list[EngineClient] = []

    def make(load: bool = True, **script: object) -> EngineClient:
        client = fake_client(tmp_path, Script(**script))  # type: ignore[arg-type]
        made.append(client)
        client.start()
        if load:
            list(client.call(protocol.Load(model=fake_model())))
        return client

    yield make
    for client in made:
        client.shutdown()
        assert not client.alive


def until_end(client: EngineClient, command: int) -> list[EngineEvent]:
    events: list[EngineEvent] = []
    while True:
        event = client.next_event(20)
        assert event is not None, f"nothing came after {events[-3:]}"
        events.append(event)
        if isinstance(event, EngineExit):
            return events
        if isinstance(event, protocol.Done | protocol.Failed) and event.id == command:
            return events


def generate(client: EngineClient, prompt: str = "x") -> list[EngineEvent]:
    return until_end(client, client.send(protocol.Generate(prompt=prompt)))


def text_of(events: list[EngineEvent]) -> str:
    return "".join(event.text for event in events if isinstance(event, protocol.Tokens))


def result_of(events: list[EngineEvent]) -> protocol.Generated:
    assert isinstance(events[-1], protocol.Done) and isinstance(events[-1].result, protocol.Generated)
    return events[-1].result


def test_handshake_load_and_answer(engine: MakeEngine) -> None:
    client = engine(load=False, answers=("Guten Tag, 世界! 🧵",))
    first = client.next_event(20)
    assert isinstance(first, protocol.Ready)
    assert (first.version, first.backend, first.pid, first.libraries) == (
        protocol.VERSION,
        "fake",
        client.pid,
        {"fake": "1.0"},
    )
    assert client.ready == first
    loaded = list(client.call(protocol.Load(model=fake_model())))
    assert [type(event) for event in loaded] == [protocol.Loaded, protocol.Done]
    events = generate(client)
    assert text_of(events) == "Guten Tag, 世界! 🧵"
    assert result_of(events).tokens == 4
    assert sum(event.count for event in events if isinstance(event, protocol.Tokens)) == 4


def test_what_a_library_prints_goes_into_the_log(engine: MakeEngine, tmp_path: Path) -> None:
    client = engine(stderr_bytes=10_000)
    assert result_of(generate(client)).tokens == 20
    client.shutdown()
    log = (tmp_path / "fake.log").read_text()
    assert "a library prints this on stdout" in log and "the last line" in log


def test_a_flood_of_tokens_is_batched_and_nothing_is_lost(engine: MakeEngine) -> None:
    client = engine(tokens=20_000, rate=20_000)
    started = time.monotonic()
    events = [event for event in generate(client) if isinstance(event, protocol.Tokens)]
    seconds = time.monotonic() - started
    assert "".join(event.text for event in events) == "".join(f"word{number} " for number in range(20_000))
    assert len(events) <= seconds / 0.016 + 10


def test_the_first_token_is_not_held_back_and_a_slow_stream_is_not_batched(engine: MakeEngine) -> None:
    client = engine(tokens=10, rate=25)
    events = [event for event in generate(client) if isinstance(event, protocol.Tokens)]
    assert [event.count for event in events] == [1] * 10


def test_a_pause_after_a_burst_does_not_hold_back_its_end(engine: MakeEngine) -> None:
    client = engine(tokens=10, hang_at=5, hang="native", hang_seconds=3)
    number = client.send(protocol.Generate(prompt="x"))
    text, started = "", time.monotonic()
    while text.count("word") < 5:
        event = client.next_event(5)
        assert event is not None
        if isinstance(event, protocol.Tokens):
            text += event.text
    assert time.monotonic() - started < 2.5, "the tokens before the pause came only after it"
    until_end(client, number)


def test_progress_is_thinned_out_but_the_end_of_a_phase_comes(engine: MakeEngine) -> None:
    client = engine(load=False, load_seconds=0.5, prompt_seconds=0.3)
    load = list(client.call(protocol.Load(model=fake_model())))
    steps = [event for event in load if isinstance(event, protocol.ProgressEvent)]
    assert 5 <= len(steps) <= 0.5 * 30 + 3
    assert steps[-1].done == steps[-1].total == 1
    assert isinstance(load[-2], protocol.Loaded)
    events = generate(client)
    kinds = [type(event) for event in events]
    assert kinds.index(protocol.Tokens) > max(i for i, kind in enumerate(kinds) if kind is protocol.ProgressEvent)


@pytest.mark.parametrize("script", [{"tokens": 1000, "rate": 100}, {"prompt_seconds": 30}])
def test_cancel_works_in_the_middle_of_an_answer_and_of_a_prompt(engine: MakeEngine, script: dict[str, float]) -> None:
    client = engine(**script)
    number = client.send(protocol.Generate(prompt="x"))
    time.sleep(0.3)
    started = time.monotonic()
    client.cancel(number)
    events = until_end(client, number)
    assert time.monotonic() - started < 2  # an answer of ten seconds, a prompt of thirty
    result = result_of(events)
    assert result.finish_reason == "cancelled"
    assert text_of(events).count("word") == result.tokens
    assert client.alive
    client.cancel(number)  # of what has ended: nothing
    assert list(client.call(protocol.Ping()))[-1].id


def test_cancel_of_a_waiting_command_does_not_wait_for_the_one_at_work(engine: MakeEngine) -> None:
    client = engine(tokens=100, rate=100)
    at_work = client.send(protocol.Generate(prompt="x"))
    waiting = client.send(protocol.Generate(prompt="y"))
    client.cancel(waiting)
    events = until_end(client, waiting)
    assert result_of(events).finish_reason == "cancelled"
    assert result_of(until_end(client, at_work)).tokens == 100


def test_a_cancelled_load_fails_as_cancelled(engine: MakeEngine) -> None:
    client = engine(load=False, load_seconds=30)
    number = client.send(protocol.Load(model=fake_model()))
    time.sleep(0.3)
    client.cancel(number)
    failure = until_end(client, number)[-1]
    assert isinstance(failure, protocol.Failed) and failure.kind == ErrorKind.CANCELLED


def test_ping_is_answered_while_a_command_is_at_work(engine: MakeEngine) -> None:
    client = engine(tokens=100, rate=100)
    number = client.send(protocol.Generate(prompt="x"))
    ping = client.send(protocol.Ping())
    while not isinstance(event := client.next_event(5), protocol.Pong):
        assert not isinstance(event, protocol.Done)
    assert (event.id, event.busy) == (ping, number)
    until_end(client, number)


def test_failures_keep_the_engine_alive(engine: MakeEngine, tmp_path: Path) -> None:
    client = engine(fail_at=3, fail_with=Problem(message="Token 3 is bad.", hint="Skip it."))
    events = generate(client)
    assert text_of(events) == "word0 word1 word2 "
    assert isinstance(events[-1], protocol.Failed) and events[-1].message == "Token 3 is bad."
    with pytest.raises(WeftError) as caught:
        list(client.call(protocol.Generate(prompt="x")))
    assert caught.value.hint == "Skip it."
    assert client.alive


def test_an_unexpected_exception_is_told_with_its_traceback(engine: MakeEngine, tmp_path: Path) -> None:
    client = engine(raise_unexpected=True)
    failure = generate(client)[-1]
    assert isinstance(failure, protocol.Failed) and failure.kind == ErrorKind.INTERNAL
    assert "nobody thought of this" in failure.message and failure.hint
    assert "Traceback" in failure.detail and "fake_engine.py" in failure.detail
    client.shutdown()
    assert "nobody thought of this" in (tmp_path / "fake.log").read_text()


@pytest.mark.fault
def test_out_of_memory_is_told_and_suggests_a_smaller_setting(engine: MakeEngine) -> None:
    client = engine(allocate=2 * 1024**3)
    failure = generate(client)[-1]
    assert isinstance(failure, protocol.Failed) and failure.kind == ErrorKind.OUT_OF_MEMORY
    assert "shorter context length" in failure.hint
    assert client.alive


def test_what_a_loader_cannot_do_is_said(tmp_path: Path) -> None:
    client = EngineClient(python=fake_client(tmp_path).python, backend="", log_path=tmp_path / "task.log")
    client.start()
    try:
        for command, kind in (
            (protocol.Generate(prompt="x"), ErrorKind.UNSUPPORTED),
            (protocol.RunTask(task="nothing_of_this_name"), ErrorKind.NOT_FOUND),
        ):
            with pytest.raises(WeftError) as caught:
                list(client.call(command))
            assert caught.value.kind is kind and caught.value.hint
    finally:
        client.shutdown()


def test_an_unknown_loader_is_refused_with_the_reason(tmp_path: Path) -> None:
    client = EngineClient(python=fake_client(tmp_path).python, backend="no_such", log_path=tmp_path / "x.log")
    client.start()
    with pytest.raises(WeftError) as caught:
        list(client.call(protocol.Unload()))
    assert caught.value.kind is ErrorKind.NOT_FOUND and "no_such" in caught.value.message
    client.shutdown()


def test_commands_that_nobody_can_read_are_answered_or_logged(engine: MakeEngine, tmp_path: Path) -> None:
    client = engine()
    for line in (b"not json\n", b"\xff\xfe\n", b'{"type":"dance"}\n', b"[" * 100_000 + b"\n"):
        client._write(line)
    client._write(b'{"type":"generate","id":77,"sampling":{"temperature":"hot"}}\n')
    while not isinstance(event := client.next_event(10), protocol.Failed):
        assert event is not None
    assert event.id == 77 and event.kind == ErrorKind.PROTOCOL and event.hint
    assert result_of(generate(client)).tokens == 20


def test_a_command_too_long_for_the_wire_is_refused_here(engine: MakeEngine) -> None:
    client = engine()
    with pytest.raises(WeftError) as caught:
        client.send(protocol.Generate(prompt="x" * (protocol.MAX_LINE + 1)))
    assert caught.value.kind is ErrorKind.BAD_INPUT
    assert result_of(generate(client, "x" * (protocol.MAX_LINE - 10_000))).tokens == 20


def test_sending_never_waits_for_a_full_pipe(engine: MakeEngine) -> None:
    client = engine(hang_at=0, hang="stop")
    client.send(protocol.Generate(prompt="x"))
    started = time.monotonic()
    for _ in range(50):
        client.send(protocol.Generate(prompt="x" * 1_000_000))
    assert time.monotonic() - started < 10  # for ever, if one waits
    client.kill()
    exit = until_end(client, -1)[-1]
    assert isinstance(exit, EngineExit) and len(exit.pending) == 51


def test_commands_may_be_sent_before_the_start(tmp_path: Path) -> None:
    client = fake_client(tmp_path)
    client.send(protocol.Load(model=fake_model()))
    number = client.send(protocol.Generate(prompt="x"))
    client.start()
    assert result_of(until_end(client, number)).tokens == 20
    client.shutdown()
    with pytest.raises(WeftError):
        client.send(protocol.Unload())
    again = client.next_event(0)
    assert isinstance(again, EngineExit) and again.asked and again.code == 0 and client.next_event(None) is again


def test_an_engine_ended_before_its_start_never_starts(tmp_path: Path) -> None:
    client = fake_client(tmp_path)
    number = client.send(protocol.Unload())
    client.kill()
    with pytest.raises(WeftError):
        client.start()
    exit = client.next_event(0)
    assert isinstance(exit, EngineExit) and exit.asked and exit.pending == (number,) and client.pid == 0


def test_a_missing_interpreter_is_an_environment_to_repair(tmp_path: Path) -> None:
    client = EngineClient(python=tmp_path / "none" / "python", backend="x", log_path=tmp_path / "x.log")
    with pytest.raises(WeftError) as caught:
        client.start()
    assert caught.value.kind is ErrorKind.ENVIRONMENT
    assert isinstance(client.next_event(0), EngineExit)


def test_the_child_starts_clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "msgspec.py").write_text("raise SystemExit('the wrong msgspec')")
    monkeypatch.chdir(bad)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    client = fake_client(tmp_path)
    client.start()
    try:
        assert isinstance(client.next_event(20), protocol.Ready)
        proc = Path(f"/proc/{client.pid}")
        if proc.exists():
            assert (proc / "cwd").resolve() == tmp_path / "empty"
            assert b"hf_secret" not in (proc / "environ").read_bytes()
            assert b"hf_secret" not in (proc / "cmdline").read_bytes()
            assert os.getpgid(client.pid) == client.pid != os.getpgid(0)
    finally:
        client.shutdown()
    assert "hf_secret" not in (tmp_path / "fake.log").read_text()


def test_nan_cannot_break_the_wire() -> None:
    from app.engine.host import _travelling

    done = _travelling(
        protocol.Done(
            id=1, result=protocol.Generated(finish_reason="stop", tokens=1, prompt_tokens=1, seconds=float("nan"))
        )
    )
    assert msgspec.json.decode(msgspec.json.encode(done), type=protocol.Event) == done
    with pytest.raises(WeftError):
        _travelling(protocol.Done(id=1, result=protocol.Scored(nll=float("nan"), perplexity=1.0, tokens=1)))
