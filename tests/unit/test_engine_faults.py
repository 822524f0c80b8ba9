"""Engines that die, hang, lie or lose their window: noticed in time, explained, and nothing left over."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from app.core.errors import ErrorKind, WeftError
from app.engine import protocol
from app.engine.client import EngineClient, EngineEvent, EngineExit, Responsiveness
from app.engine.restart import RestartPolicy
from app.engine.scratch import Scratch
from tests.fakes.fake_engine import Script, fake_client, fake_model

pytestmark = [
    pytest.mark.fault,
    pytest.mark.skipif(sys.platform == "win32", reason="signals and process groups are POSIX"),
]

# Seconds in which a death must be known: 2 are promised; a machine with more to do than processors gets twice as many.
DEATH = 4.0 if os.getloadavg()[0] > (os.cpu_count() or 1) else 2.0


@pytest.fixture
def clients(tmp_path: Path) -> Iterator[list[EngineClient]]:
    made: list[EngineClient] = []
    yield made
    for client in made:
        client.shutdown()


def start(clients: list[EngineClient], folder: Path, script: Script, *, load: bool = True) -> EngineClient:
    client = fake_client(folder, script)
    clients.append(client)
    client.start()
    if load:
        list(client.call(protocol.Load(model=fake_model())))
    return client


def until_exit(client: EngineClient, timeout: float = 20) -> tuple[list[EngineEvent], EngineExit]:
    events: list[EngineEvent] = []
    deadline = time.monotonic() + timeout
    while not isinstance(event := client.next_event(max(0, deadline - time.monotonic())), EngineExit):
        assert event is not None, f"no exit within {timeout} s, last {events[-3:]}"
        events.append(event)
    return events, event


def wait_for(client: EngineClient, kind: type, timeout: float = 20) -> EngineEvent:
    deadline = time.monotonic() + timeout
    while True:
        event = client.next_event(max(0, deadline - time.monotonic()))
        assert event is not None, f"no {kind.__name__} within {timeout} s"
        if isinstance(event, kind):
            return event


def tree(pid: int) -> list[psutil.Process]:
    process = psutil.Process(pid)
    return [process, *process.children(recursive=True)]


def gone(processes: list[psutil.Process], within: float) -> bool:
    deadline = time.monotonic() + within
    while True:
        left = [process for process in processes if _runs(process)]
        if not left or time.monotonic() > deadline:
            return not left
        time.sleep(0.01)


def _runs(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE  # whoever inherited it has yet to look
    except psutil.NoSuchProcess:
        return False


def test_killed_in_the_middle_of_an_answer(clients: list[EngineClient], tmp_path: Path) -> None:
    client = start(clients, tmp_path, Script(tokens=1000, rate=100))
    number = client.send(protocol.Generate(prompt="x"))
    wait_for(client, protocol.Tokens)
    processes = tree(client.pid)
    os.kill(client.pid, signal.SIGKILL)
    started = time.monotonic()
    _, exit = until_exit(client)
    assert time.monotonic() - started < DEATH
    assert exit.crashed and exit.signal == "SIGKILL" and exit.pending == (number,)
    assert "shorter context" in exit.error.hint
    assert gone(processes, DEATH)
    again = client.fresh()
    clients.append(again)
    again.start()
    list(again.call(protocol.Load(model=fake_model())))
    assert again.alive


def test_what_a_killed_engine_kept_in_temporary_files_goes_with_it(
    clients: list[EngineClient], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "temporary"
    place.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(place))
    # What a window that was killed has left, beside what belongs to one that runs.
    code = "import os; from app.engine.scratch import Scratch; print(Scratch().path, flush=True); os.kill(os.getpid(), 9)"
    variables = {**os.environ, "TMPDIR": str(place), "PYTHONPATH": os.pathsep.join(sys.path)}
    left = Path(subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True).stdout.strip())
    (left / "layer.dat").write_bytes(b"x" * 1000)
    running = Scratch()
    assert left.parent == place and not left.exists()
    other = running.path
    client = start(clients, tmp_path, Script())
    (scratch,) = set(place.iterdir()) - {other}
    assert psutil.Process(client.pid).environ()["TMPDIR"] == str(scratch)
    (scratch / "offload").mkdir()
    (scratch / "offload" / "layer.dat").write_bytes(b"x" * 1000)
    os.kill(client.pid, signal.SIGKILL)
    until_exit(client)
    assert list(place.iterdir()) == [other]
    running.remove()
    assert not list(place.iterdir())


@pytest.mark.parametrize(
    ("crash", "words"),
    [("segv", "SIGSEGV"), ("abort", "SIGABRT"), ("exit", "exit status 3"), ("bad_alloc", "memory ran out")],
)
def test_a_crash_is_explained_and_what_came_before_it_is_kept(
    clients: list[EngineClient], tmp_path: Path, crash: str, words: str
) -> None:
    client = start(clients, tmp_path, Script(tokens=100, crash_at=50, crash=crash))  # type: ignore[arg-type]
    number = client.send(protocol.Generate(prompt="x"))
    events, exit = until_exit(client)
    # What had left the engine has arrived; the last batch, up to 16 ms, may have died with it.
    assert any(isinstance(event, protocol.Tokens) and event.text.startswith("word0") for event in events)
    assert words in exit.error.message and exit.pending == (number,)
    assert f"about to crash: {crash}" in exit.log_tail
    assert exit.out_of_memory == (crash == "bad_alloc")
    if crash in ("segv", "abort"):
        assert "fake_engine.py" in exit.log_tail, "the Python stack of the crash is in the log"
    with pytest.raises(WeftError):
        client.send(protocol.Unload())


def test_call_raises_when_the_engine_dies(clients: list[EngineClient], tmp_path: Path) -> None:
    client = start(clients, tmp_path, Script(crash_at=1))
    with pytest.raises(WeftError) as caught:
        list(client.call(protocol.Generate(prompt="x")))
    assert caught.value.kind is ErrorKind.CRASHED


def test_four_crashes_end_in_an_explanation(clients: list[EngineClient], tmp_path: Path) -> None:
    policy = RestartPolicy()
    client = fake_client(tmp_path, Script(load_crash="segv"))
    with pytest.raises(WeftError) as caught:
        for _ in range(10):
            policy.check()
            clients.append(client)
            client.start()
            client.send(protocol.Load(model=fake_model()))
            exit = until_exit(client)[1]
            assert exit.crashed
            policy.crashed(exit.error.message)
            client = client.fresh()
    assert len(clients) == 4
    assert "4 times" in caught.value.message and "SIGSEGV" in caught.value.message


@pytest.mark.parametrize("grandchild", ["group", "session"])
def test_a_grandchild_that_holds_the_pipes_delays_nothing_and_dies_too(
    clients: list[EngineClient], tmp_path: Path, grandchild: str
) -> None:
    client = start(clients, tmp_path, Script(tokens=1000, rate=100, grandchild=grandchild))  # type: ignore[arg-type]
    client.send(protocol.Generate(prompt="x"))
    wait_for(client, protocol.Tokens)
    processes = tree(client.pid)
    assert len(processes) == 3  # the engine, its watchdog, the grandchild
    os.kill(client.pid, signal.SIGKILL)
    started = time.monotonic()
    until_exit(client)
    assert time.monotonic() - started < DEATH
    assert gone(processes, DEATH)


@pytest.mark.parametrize("grandchild", ["", "group", "session"])
def test_a_kill_takes_everything_along(clients: list[EngineClient], tmp_path: Path, grandchild: str) -> None:
    client = start(clients, tmp_path, Script(tokens=1000, rate=100, grandchild=grandchild))  # type: ignore[arg-type]
    number = client.send(protocol.Generate(prompt="x"))
    wait_for(client, protocol.Tokens)
    processes = tree(client.pid)
    started = time.monotonic()
    client.kill()
    _, exit = until_exit(client)
    assert time.monotonic() - started < DEATH
    assert exit.asked and not exit.crashed and exit.pending == (number,) and exit.error.kind is ErrorKind.CANCELLED
    assert gone(processes, DEATH)


def test_a_stopped_engine_is_noticed_and_comes_back(clients: list[EngineClient], tmp_path: Path) -> None:
    client = start(clients, tmp_path, Script(tokens=300, rate=100))
    number = client.send(protocol.Generate(prompt="x"))
    wait_for(client, protocol.Tokens)
    os.kill(client.pid, signal.SIGSTOP)
    notice = wait_for(client, Responsiveness, 10)
    assert isinstance(notice, Responsiveness) and not notice.responsive and notice.stopped
    os.kill(client.pid, signal.SIGCONT)
    notice = wait_for(client, Responsiveness, 10)
    assert isinstance(notice, Responsiveness) and notice.responsive
    done = wait_for(client, protocol.Done)
    assert isinstance(done, protocol.Done) and done.id == number


def test_cancel_of_a_stopped_engine_ends_in_a_kill(clients: list[EngineClient], tmp_path: Path) -> None:
    client = start(clients, tmp_path, Script(tokens=1000, rate=100, hang_at=3, hang="stop"))
    number = client.send(protocol.Generate(prompt="x"))
    wait_for(client, Responsiveness, 10)
    processes = tree(client.pid)
    client.cancel(number)
    started = time.monotonic()
    _, exit = until_exit(client)
    assert 2.5 < time.monotonic() - started < 8
    assert exit.asked and exit.error.kind is ErrorKind.CANCELLED and exit.pending == (number,)
    assert gone(processes, DEATH)


def test_native_code_that_holds_the_lock_causes_a_notice_and_no_kill(
    clients: list[EngineClient], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.engine.heartbeat.PING_EVERY", 0.5)
    monkeypatch.setattr("app.engine.heartbeat.SILENCE", 1.5)
    client = start(clients, tmp_path, Script(tokens=5, hang_at=2, hang="gil", hang_seconds=5))
    number = client.send(protocol.Generate(prompt="x"))
    notice = wait_for(client, Responsiveness, 10)
    assert isinstance(notice, Responsiveness) and not notice.responsive and not notice.stopped
    # Its answer and the notice that it answers again come at the same moment, in either order.
    awaited = {protocol.Done, Responsiveness}
    while awaited:
        event = client.next_event(10)
        assert event is not None and not isinstance(event, EngineExit | protocol.Failed)
        if isinstance(event, Responsiveness):
            assert event.responsive
        if isinstance(event, protocol.Done):
            assert event.id == number
        awaited.discard(type(event))


def test_cancel_of_a_waiting_command_never_kills_the_one_at_work(
    clients: list[EngineClient], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.engine.client.GRACE", 0.7)
    client = start(clients, tmp_path, Script(tokens=5, hang_at=2, hang="gil", hang_seconds=3))
    at_work = client.send(protocol.Generate(prompt="x"))
    wait_for(client, protocol.Tokens)
    waiting = client.send(protocol.Generate(prompt="y"))
    client.cancel(waiting)
    ended = [wait_for(client, protocol.Done), wait_for(client, protocol.Done)]
    assert {event.id for event in ended if isinstance(event, protocol.Done)} == {at_work, waiting}
    assert client.alive


def test_shutdown_of_a_hanging_engine_takes_two_seconds_at_most(clients: list[EngineClient], tmp_path: Path) -> None:
    client = start(clients, tmp_path, Script(hang_at=2, hang="gil"))
    client.send(protocol.Generate(prompt="x"))
    wait_for(client, protocol.Tokens)
    processes = tree(client.pid)
    started = time.monotonic()
    client.shutdown()
    assert time.monotonic() - started < DEATH
    assert not client.alive and gone(processes, 0.5)


@pytest.mark.parametrize(
    ("start_as", "kind", "words"),
    [
        ("garbage", ErrorKind.PROTOCOL, "not an event"),
        ("utf8", ErrorKind.PROTOCOL, "not an event"),
        ("version", ErrorKind.PROTOCOL, f"version {protocol.VERSION + 1}"),
        ("no_handshake", ErrorKind.PROTOCOL, "handshake"),
        ("exit", ErrorKind.CRASHED, "exit status 3"),
        ("fail", ErrorKind.ENVIRONMENT, "not installed"),
    ],
)
def test_an_engine_that_breaks_the_rules_is_refused_with_words(
    clients: list[EngineClient], tmp_path: Path, start_as: str, kind: ErrorKind, words: str
) -> None:
    client = start(clients, tmp_path, Script(start=start_as), load=False)  # type: ignore[arg-type]
    _, exit = until_exit(client)
    assert exit.error.kind is kind and words in exit.error.message and exit.error.hint
    assert exit.crashed


@pytest.mark.attack
def test_a_line_of_a_gigabyte_is_cut_off(clients: list[EngineClient], tmp_path: Path) -> None:
    before = psutil.Process().memory_info().rss
    client = start(clients, tmp_path, Script(start="huge_line"), load=False)
    _, exit = until_exit(client)
    assert exit.error.kind is ErrorKind.PROTOCOL
    assert psutil.Process().memory_info().rss - before < 100 * 1024**2


def test_an_engine_that_says_nothing_can_be_ended(
    clients: list[EngineClient], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.engine.client.GRACE", 1.0)
    client = start(clients, tmp_path, Script(start="silent"), load=False)
    number = client.send(protocol.Load(model=fake_model()))
    client.cancel(number)
    _, exit = until_exit(client, 6)
    assert exit.pending == (number,) and exit.error.kind is ErrorKind.CANCELLED


def test_a_load_that_is_deaf_to_cancel_is_killed(
    clients: list[EngineClient], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.engine.client.GRACE", 1.0)
    client = start(clients, tmp_path, Script(load_seconds=60, load_ignores_cancel=True), load=False)
    number = client.send(protocol.Load(model=fake_model()))
    wait_for(client, protocol.ProgressEvent)
    client.cancel(number)
    assert until_exit(client, 6)[1].pending == (number,)


def test_events_that_nobody_takes_do_not_fill_the_memory(
    clients: list[EngineClient], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.engine.event_queue.UNREAD_LIMIT", 100_000)
    client = start(clients, tmp_path, Script(tokens=200_000))
    number = client.send(protocol.Generate(prompt="x"))
    time.sleep(0.5)
    assert client._events._bytes < 300_000
    count = 0
    while not isinstance(event := client.next_event(10), protocol.Done):
        assert event is not None
        count += event.count if isinstance(event, protocol.Tokens) else 0
    assert count == 200_000 and event.id == number


WINDOW = """
import sys, time
from pathlib import Path
from app.engine import protocol
from tests.fakes.fake_engine import Script, fake_client, fake_model
client = fake_client(Path(sys.argv[1]), Script(tokens=1000, rate=100, hang_at=3, hang=sys.argv[2]) if sys.argv[2] else Script(tokens=10000, rate=100))
client.start()
list(client.call(protocol.Load(model=fake_model())))
client.send(protocol.Generate(prompt="x"))
while not isinstance(client.next_event(), protocol.Tokens):
    pass
print(client.pid, flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("hang", ["", "native", "gil", "stop", "sleep"])
def test_the_engine_goes_with_its_window_whatever_it_is_doing(tmp_path: Path, hang: str) -> None:
    root = Path(__file__).resolve().parents[2]
    window = subprocess.Popen(
        [sys.executable, "-c", WINDOW, str(tmp_path), hang],
        cwd=root,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    assert window.stdout is not None
    with window, window.stdout:
        pid = int(window.stdout.readline())
        time.sleep(0.2)  # let it come to token 3
        processes = tree(pid)
        assert len(processes) == 2  # the engine and its watchdog
        window.kill()
        window.wait()
        assert gone(processes, DEATH)
