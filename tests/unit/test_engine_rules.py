"""The rules of engines that need no process: heartbeat, restarts, exits, failures, log, surroundings, machine."""

from __future__ import annotations

import errno
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.core.errors import ErrorKind, WeftError
from app.engine import host, machine, protocol
from app.engine.exits import EngineExit, describe_exit
from app.engine.failures import failed
from app.engine.heartbeat import PING_EVERY, SILENCE, Heartbeat
from app.engine.log_file import LogFile
from app.engine.restart import CRASHES, WITHIN, RestartPolicy
from app.engine.surroundings import child_environment, empty_folder
from tests.fakes.fake_engine import fake_model

# Heartbeat


def test_a_silent_engine_is_noticed_and_so_is_its_return() -> None:
    heartbeat = Heartbeat(0.0)
    changes: list[tuple[float, bool]] = []
    for second in range(1, 30):
        if second == 20:
            heartbeat.heard(second - 0.5)
        _, change = heartbeat.tick(float(second), stopped=False)
        if change is not None:
            changes.append((second, change))
    (first, down), (second, up), *more = changes
    assert (down, up) == (False, True)
    assert SILENCE <= first <= PING_EVERY + SILENCE + 1
    assert second == 20
    assert not more or more[0][0] >= 20 + SILENCE


def test_an_engine_that_answers_is_never_suspected() -> None:
    heartbeat = Heartbeat(0.0)
    for second in range(1, 100):
        ping, change = heartbeat.tick(float(second), stopped=False)
        assert change is None
        if ping:
            heartbeat.heard(second + 0.9)


def test_a_stopped_process_is_noticed_at_once() -> None:
    heartbeat = Heartbeat(0.0)
    assert heartbeat.tick(1.0, stopped=True)[1] is False
    assert heartbeat.tick(2.0, stopped=True)[1] is None
    heartbeat.tick(3.0, stopped=False)
    heartbeat.heard(3.1)
    heartbeat.tick(4.0, stopped=False)
    assert heartbeat.responsive


def test_our_own_sleep_is_not_the_engines_silence() -> None:
    heartbeat = Heartbeat(0.0)
    now = 0.0
    while not heartbeat.tick(now := now + 1, stopped=False)[0]:
        pass
    assert heartbeat.tick(now + 3600, stopped=False)[1] is None


# Restarts


def test_four_crashes_in_five_minutes_are_enough() -> None:
    now = [0.0]
    policy = RestartPolicy(lambda: now[0])
    for _ in range(CRASHES - 1):
        policy.crashed("It crashed (SIGSEGV).")
        policy.check()
        now[0] += 10
    policy.crashed("It crashed (SIGSEGV).")
    with pytest.raises(WeftError) as caught:
        policy.check()
    assert caught.value.kind is ErrorKind.CRASHED
    assert "4 times within 5 minutes" in caught.value.message and "SIGSEGV" in caught.value.message
    assert caught.value.hint
    now[0] += WITHIN
    policy.check()


def test_crashes_far_apart_are_forgiven_and_a_change_starts_anew() -> None:
    now = [0.0]
    policy = RestartPolicy(lambda: now[0])
    for _ in range(20):
        policy.crashed()
        policy.check()
        now[0] += WITHIN / (CRASHES - 1) + 1
    for _ in range(CRASHES):
        policy.crashed()
    assert not policy.allowed
    policy.reset()
    assert policy.allowed


# Exits


def _exit(status: int, *, oom_kills: int = 0, tail: str = "", asked: bool = False, killed: bool = False) -> EngineExit:
    return describe_exit(
        status,
        asked=asked,
        killed=killed,
        cause=None,
        pending=(7,),
        tail=tail,
        log_path=Path("engine.log"),
        oom_kills=oom_kills,
    )


def test_an_exit_says_how_it_came() -> None:
    crash = _exit(-11)
    assert crash.crashed and crash.signal == "SIGSEGV" and crash.code is None and crash.pending == (7,)
    assert "SIGSEGV" in crash.error.message and "engine.log" in crash.error.hint
    assert "exit status 3" in _exit(3).error.message
    asked = _exit(0, asked=True)
    assert not asked.crashed and asked.error.kind is ErrorKind.CANCELLED


def test_a_missing_library_is_an_environment_to_repair() -> None:
    tail = "Traceback (most recent call last):\nModuleNotFoundError: No module named 'msgspec'"
    exit = describe_exit(
        1, asked=False, killed=False, cause=None, pending=(), tail=tail, log_path=Path("x"), oom_kills=0, ready=False
    )
    assert exit.error.kind is ErrorKind.ENVIRONMENT and "msgspec" in exit.error.message


@pytest.mark.fault
def test_an_out_of_memory_kill_suggests_a_smaller_setting() -> None:
    certain = _exit(-9, oom_kills=1)
    assert certain.out_of_memory and certain.error.kind is ErrorKind.OUT_OF_MEMORY
    assert "shorter context" in certain.error.hint
    perhaps = _exit(-9)
    assert perhaps.error.kind is ErrorKind.CRASHED and "shorter context" in perhaps.error.hint
    assert _exit(-6, tail="terminate called after throwing an instance of 'std::bad_alloc'").out_of_memory
    ours = _exit(-9, asked=True, killed=True, oom_kills=1)
    assert not ours.out_of_memory and ours.error.kind is ErrorKind.CANCELLED


# Failures


class OutOfMemoryError(RuntimeError):
    """Named as torch's."""


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (MemoryError(), ErrorKind.OUT_OF_MEMORY),
        (OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"), ErrorKind.OUT_OF_MEMORY),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't allocate memory"),
            ErrorKind.OUT_OF_MEMORY,
        ),
        (RuntimeError("cudaMalloc failed: out of memory"), ErrorKind.OUT_OF_MEMORY),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), ErrorKind.OUT_OF_MEMORY),
        (OSError(errno.ENOSPC, "No space left on device", "/a/b"), ErrorKind.DISK_FULL),
        (PermissionError(errno.EACCES, "Permission denied", "/a/b"), ErrorKind.PERMISSION),
        (OSError(errno.EIO, "Input/output error", "/a/b"), ErrorKind.CORRUPT),
        (FileNotFoundError(errno.ENOENT, "No such file", "/a/b"), ErrorKind.NOT_FOUND),
        (ModuleNotFoundError("No module named 'torch'"), ErrorKind.ENVIRONMENT),
        (WeftError(ErrorKind.HOSTILE, "It would run code.", "Delete it."), ErrorKind.HOSTILE),
        (ValueError("whatever"), ErrorKind.INTERNAL),
        (RuntimeError("size mismatch"), ErrorKind.INTERNAL),
    ],
)
def test_an_exception_becomes_words(error: Exception, kind: ErrorKind) -> None:
    event = failed(protocol.Load(id=5, model=fake_model("big")), error, cancelled=False)
    assert event.id == 5 and event.kind == kind and event.message and event.hint
    if isinstance(error, OSError) and error.filename:
        assert "/a/b" in event.message
    if kind is ErrorKind.OUT_OF_MEMORY:
        assert "shorter context" in event.hint
    if kind is ErrorKind.INTERNAL:
        assert type(error).__name__ in event.detail


def test_whatever_a_library_raises_when_cancelled_is_the_cancellation() -> None:
    event = failed(protocol.Generate(id=5), RuntimeError("decode aborted"), cancelled=True)
    assert event.kind == ErrorKind.CANCELLED and "decode aborted" in event.detail


# Tasks


def test_a_task_is_found_by_name_and_gets_its_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys
    import types

    import msgspec

    class Parameters(msgspec.Struct, forbid_unknown_fields=True):
        count: int

    module = types.ModuleType("app.tasks.counting")
    module.Parameters = Parameters  # type: ignore[attr-defined]
    module.run = lambda parameters, report: {"twice": 2 * parameters.count}  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "app.tasks.counting", module)
    report: host.HostReport = None  # type: ignore[assignment]  # this task does not report
    assert host.run_task(protocol.RunTask(task="counting", parameters='{"count":21}'), report).json == '{"twice":42}'
    for parameters, kind in (('{"count":"x"}', ErrorKind.BAD_INPUT), ("{", ErrorKind.BAD_INPUT)):
        with pytest.raises(WeftError) as caught:
            host.run_task(protocol.RunTask(task="counting", parameters=parameters), report)
        assert caught.value.kind is kind and "counting" in caught.value.message
    for name in ("nothing_of_this_name", "../x", "_private", "os.path"):
        with pytest.raises(WeftError):
            host.run_task(protocol.RunTask(task=name), report)


# The log


def test_a_log_is_bounded_and_its_last_lines_are_at_hand(tmp_path: Path) -> None:
    log = LogFile(tmp_path / "logs" / "engine.log", limit=10_000)
    for number in range(2000):
        log.write(f"line {number}\n".encode())
    log.close()
    files = sorted((tmp_path / "logs").iterdir())
    assert sum(file.stat().st_size for file in files) <= 10_000
    kept = "".join(file.read_text() for file in reversed(files))
    assert kept.endswith("line 1999\n") and "line 1500\n" in kept
    assert log.tail(2) == "line 1998\nline 1999"


@pytest.mark.fault
def test_a_log_that_cannot_be_written_disturbs_nobody(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    log = LogFile(tmp_path / "file" / "engine.log")
    log.write(b"hello\n")
    assert "cannot be written" in log.problem and log.tail() == "hello"


# Surroundings


def test_a_child_gets_no_secret_and_no_setting_of_the_users_python(monkeypatch: pytest.MonkeyPatch) -> None:
    secrets = (
        "HF_TOKEN",
        "HUGGING_FACE_HUB_TOKEN",
        "OPENAI_API_KEY",
        "AWS_SECRET_ACCESS_KEY",
        "DB_PASSWORD",
        "GH_TOKEN",
    )
    for name in secrets:
        monkeypatch.setenv(name, "hf_secret")
    monkeypatch.setenv("PYTHONHOME", "/nowhere")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    environment = child_environment({"OMP_NUM_THREADS": "3"})
    assert "hf_secret" not in environment.values()
    assert "PYTHONHOME" not in environment and environment["TOKENIZERS_PARALLELISM"] == "false"
    assert environment["PYTHONSAFEPATH"] == "1" and environment["OMP_NUM_THREADS"] == "3"
    assert (Path(environment["PYTHONPATH"]) / "app" / "engine" / "host.py").is_file()


def test_the_working_folder_is_empty_even_when_somebody_put_a_file_there(tmp_path: Path) -> None:
    first = empty_folder(tmp_path)
    assert first == tmp_path / "empty" and not list(first.iterdir())
    (first / "msgspec.py").write_text("raise SystemExit")
    second = empty_folder(tmp_path)
    assert second != first and not list(second.iterdir())
    second.rmdir()


# From a loader's name to an engine


def test_an_engine_for_a_loader_runs_in_its_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from app import backends
    from app.core.paths import default_paths
    from app.engine import launch

    paths = default_paths()
    loader, spec = next(iter(backends.specs().items()))
    for name in ("CORE", "LLAMACPP"):
        monkeypatch.delenv(f"WEFT_PYTHON_{name}", raising=False)
    with pytest.raises(WeftError) as caught:
        launch.engine_for(loader, paths)
    assert caught.value.kind is ErrorKind.ENVIRONMENT and caught.value.hint
    monkeypatch.setenv(f"WEFT_PYTHON_{spec.environment.upper()}", sys.executable)
    client = launch.engine_for(loader, paths)
    assert (client.backend, client.python, client.alive) == (loader, Path(sys.executable), False)
    assert client.log_path.parent == paths.logs
    with pytest.raises(WeftError) as caught:
        launch.engine_for("no_such", paths)
    assert caught.value.kind is ErrorKind.NOT_FOUND and loader in caught.value.hint


# The machine


def test_the_machine_is_probed_quickly_and_plausibly(monkeypatch: pytest.MonkeyPatch) -> None:
    machine.probe()
    seconds: list[float] = []
    for _ in range(20):
        machine._last = None
        started = time.perf_counter()
        machine.probe()
        seconds.append(time.perf_counter() - started)
    assert min(seconds) < 0.05
    found = machine.probe()
    assert found.cpu_count >= 1 and 0 < found.ram_free <= found.ram_total
    monkeypatch.setattr(machine, "_FRESH", 1000.0)
    assert machine.probe() is found


def test_the_limits_of_a_container_count(tmp_path: Path) -> None:
    inner = tmp_path / "cgroup" / "outer" / "inner"
    inner.mkdir(parents=True)
    (inner / "memory.max").write_text("max\n")
    (inner.parent / "memory.max").write_text("4000\n")
    (inner.parent / "memory.current").write_text("3000\n")
    (inner.parent / "memory.stat").write_text("anon 1000\ninactive_file 500\n")
    membership = tmp_path / "membership"
    membership.write_text("0::/outer/inner\n")
    assert machine._memory_limits(tmp_path / "cgroup", membership) == [(4000, 2500)]


@settings(deadline=None, max_examples=30)
@given(st.text())
def test_a_strange_membership_file_is_no_reason_to_fail(text: str) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        membership = Path(folder) / "membership"
        membership.write_text(text, encoding="utf-8", errors="replace")
        machine._memory_limits(Path(folder), membership)


class _FakeNvml:
    """Shaped as pynvml with two cards."""

    class NVMLError(Exception):
        pass

    def nvmlDeviceGetCount(self) -> int:
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetUUID(self, handle: int) -> bytes:
        return f"GPU-{handle}abc".encode()

    def nvmlDeviceGetName(self, handle: int) -> str:
        return f"Card {handle}"

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> object:
        if handle > 1:
            raise self.NVMLError

        class Info:
            total, free = 24 * 1024**3, (handle + 1) * 1024**3

        return Info()


@pytest.mark.parametrize(
    ("visible", "names"),
    [(None, ["Card 0", "Card 1"]), ("1", ["Card 1"]), ("GPU-0", ["Card 0"]), ("", []), ("0,1", ["Card 0", "Card 1"])],
)
def test_graphics_cards_that_engines_may_use(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, names: list[str]
) -> None:
    monkeypatch.setattr(machine, "_nvml", _FakeNvml)
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    gpus = machine._gpus()
    assert [gpu.name for gpu in gpus] == names
    assert all(gpu.free <= gpu.total == 24 * 1024**3 for gpu in gpus)
