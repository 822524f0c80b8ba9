"""A scriptable engine without a model: a real child process, the real host and pipe, pretended work.

    client = fake_client(tmp_path, Script(tokens=50, rate=200))

gives an EngineClient whose child follows the script. View tests hand it to an EngineWorker or wherever an
engine is made (monkeypatch `app.engine.launch.engine_for`). Needs only the standard library and msgspec.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec

from app.core.errors import ErrorKind, WeftError
from app.core.library import ModelEntry, ModelFormat
from app.core.stack import AdapterStack
from app.engine import host, protocol
from app.engine.client import EngineClient
from app.generation.in_turn import answer_in_turn

_VARIABLE = "WEFT_FAKE_SCRIPT"

Crash = Literal["segv", "abort", "kill", "exit", "bad_alloc"]


class Problem(msgspec.Struct, frozen=True, kw_only=True):
    """A WeftError to raise."""

    kind: str = ErrorKind.BAD_INPUT.value
    message: str = "The fake engine was told to fail."
    hint: str = "Tell it otherwise."

    def error(self) -> WeftError:
        return WeftError(ErrorKind(self.kind), self.message, self.hint)


class Script(msgspec.Struct, frozen=True, kw_only=True):
    """What the fake engine does.

    Attributes:
        start: how it begins; anything but "ok" breaks the rules in its own way.
        load_seconds: how long a load takes, with progress. load_error: it fails instead, at its end.
        load_ignores_cancel: Cancel during the load is not heard.
        context, memory, device, has_template, notes: as Loaded says them.
        answers: texts of the answers, in turn, over and over; each is cut into words as its tokens. Without
            any, an answer is `tokens` times "word0 ", "word1 ", ….
        rate: tokens a second; 0 is as fast as it can.
        prompt_seconds: reading the prompt, with progress.
        prompt_tokens, reused_tokens, dropped_messages: as Generated says them.
        fail_at, fail_with: raise `fail_with` before token `fail_at`.
        crash_at, crash: die before token `crash_at`. exit_code: for the crash "exit".
        hang_at, hang: before token `hang_at`, hang for `hang_seconds`: "sleep" in Python, deaf to Cancel; "native" in C
            code that gives the interpreter's lock back; "gil" in C code that holds it; "stop" sends SIGSTOP to itself.
        grandchild: "group" starts a process that holds the pipes open; "session" one that left the group too.
        allocate: bytes to take before the first token under a limit of as much memory: a MemoryError.
        stderr_bytes: so much is written to stderr before the first token.
        raise_unexpected: raise a ValueError before the first token.
        batch_in_turn: rows of a batch are answered one after the other, for this reason; "" together.
    """

    start: Literal["ok", "exit", "silent", "garbage", "utf8", "huge_line", "version", "no_handshake", "fail"] = "ok"
    libraries: dict[str, str] = msgspec.field(default_factory=lambda: {"fake": "1.0"})
    load_seconds: float = 0.0
    load_error: Problem | None = None
    load_ignores_cancel: bool = False
    load_crash: Crash | None = None
    context: int = 2048
    memory: int = 123_456_789
    device: str = "CPU, 1 thread"
    has_template: bool = True
    notes: tuple[str, ...] = ()
    calibration: dict[str, int] = {}
    answers: tuple[str, ...] = ()
    tokens: int = 20
    rate: float = 0.0
    prompt_seconds: float = 0.0
    prompt_tokens: int = 10
    reused_tokens: int = 0
    dropped_messages: int = 0
    fail_at: int = -1
    fail_with: Problem = Problem()
    crash_at: int = -1
    crash: Crash = "segv"
    exit_code: int = 3
    hang_at: int = -1
    hang: Literal["sleep", "native", "gil", "stop"] = "sleep"
    hang_seconds: float = 60.0
    grandchild: Literal["", "group", "session"] = ""
    allocate: int = 0
    stderr_bytes: int = 0
    raise_unexpected: bool = False
    batch_in_turn: str = ""


def fake_client(
    folder: Path, script: Script | None = None, *, environment: dict[str, str] | None = None
) -> EngineClient:
    """A client, not started, whose engine follows `script`. Its log is `folder/fake.log`."""
    text = msgspec.json.encode(script or Script()).decode()
    return EngineClient(
        python=Path(sys.executable),
        backend="fake",
        log_path=folder / "fake.log",
        environment={_VARIABLE: text, **(environment or {})},
        module="tests.fakes.fake_engine",
    )


def fake_model(name: str = "maker/fake-1B") -> ModelEntry:
    """A model entry that the fake engine loads as gladly as any other."""
    return ModelEntry(
        id=f"/models/{name}", name=name, path=f"/models/{name}", format=ModelFormat.GGUF, has_chat_template=True
    )


class FakeBackend:
    """Follows a script. Shaped as backends.base.Backend."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self._loaded = False
        self._answers = 0
        self.stack = AdapterStack()
        self.baked = False

    def libraries(self) -> dict[str, str]:
        return dict(self.script.libraries)

    def load(self, request: protocol.Load, report: Any) -> None:
        script = self.script
        self._loaded = False
        started = time.monotonic()
        self._pass_time(script.load_seconds, "Reading weights", report, deaf=script.load_ignores_cancel)
        if script.load_crash is not None:
            crash(script.load_crash, script.exit_code)
        if report.cancelled and not script.load_ignores_cancel:
            raise WeftError(ErrorKind.CANCELLED, "Cancelled.")
        if script.load_error is not None:
            raise script.load_error.error()
        self._loaded = True
        report.loaded(
            protocol.Loaded(
                context=script.context,
                device=script.device,
                memory=script.memory,
                seconds=time.monotonic() - started,
                has_template=script.has_template,
                notes=script.notes,
                calibration=script.calibration,
            )
        )

    def unload(self) -> None:
        self._loaded = False

    def generate(self, request: protocol.Generate, report: Any) -> protocol.Generated:
        script = self.script
        if not self._loaded:
            raise WeftError(ErrorKind.NOT_FOUND, "No model is loaded.", "Load a model first.")
        self._before(report)
        started = time.monotonic()
        self._pass_time(script.prompt_seconds, "Reading the prompt", report)
        first = time.monotonic()
        words = self._words()
        if request.sampling.max_tokens is not None:
            words = words[: request.sampling.max_tokens]
        written = 0
        while written < len(words) and not report.cancelled:
            self._misbehave(written)
            if script.rate > 0:
                time.sleep(max(0.0, first + written / script.rate - time.monotonic()))
            report.tokens(words[written], 1)
            written += 1
        return protocol.Generated(
            finish_reason="cancelled" if report.cancelled else "stop",
            tokens=written,
            prompt_tokens=script.prompt_tokens,
            reused_tokens=script.reused_tokens,
            prompt_seconds=first - started,
            seconds=time.monotonic() - first,
            dropped_messages=script.dropped_messages,
            seed=request.sampling.seed or 1,
        )

    def set_adapters(self, adapters: AdapterStack, report: Any, *, baked: bool = False) -> None:
        report.log("info", f"adapters: {adapters.title}" + (" (baked)" if baked else ""))
        self.stack, self.baked = adapters, baked

    def check_adapters(self, stacks: Sequence[AdapterStack], report: Any) -> None:
        """Takes every stack."""

    def generate_batch(self, request: protocol.GenerateBatch, report: Any) -> protocol.GeneratedBatch:
        """Rows word by word in turns; with `batch_in_turn` one row after the other. Row n ends after n words fewer."""
        if self.script.batch_in_turn:
            return answer_in_turn(self, request, report, self.script.batch_in_turn)
        if not self._loaded:
            raise WeftError(ErrorKind.NOT_FOUND, "No model is loaded.", "Load a model first.")
        self._before(report)
        self._pass_time(self.script.prompt_seconds, "Reading the prompts", report)
        first = time.monotonic()
        words = [self._words()[: request.sampling.max_tokens] for _ in request.rows]
        words = [row[: max(1, len(row) - number)] for number, row in enumerate(words)]
        written = [0] * len(words)
        for at in range(max(len(row) for row in words)):
            if report.cancelled:
                break
            self._misbehave(at)
            if self.script.rate > 0:
                time.sleep(max(0.0, first + at / self.script.rate - time.monotonic()))
            for number, row in enumerate(words):
                if at < len(row):
                    report.tokens(row[at], 1, number)
                    written[number] += 1
        return protocol.GeneratedBatch(
            rows=tuple(
                protocol.Generated(
                    finish_reason="cancelled" if count < len(row) else "stop",
                    tokens=count,
                    prompt_tokens=self.script.prompt_tokens,
                    seconds=time.monotonic() - first,
                    seed=request.sampling.seed or 1,
                )
                for count, row in zip(written, words, strict=True)
            )
        )

    def score(self, request: protocol.Score, report: Any) -> protocol.Scored:
        return protocol.Scored(nll=1.0, perplexity=2.718281828, tokens=len(request.text.split()))

    def _words(self) -> list[str]:
        script = self.script
        if not script.answers:
            return [f"word{number} " for number in range(script.tokens)]
        text = script.answers[self._answers % len(script.answers)]
        self._answers += 1
        pieces = text.split(" ")
        return [piece + " " for piece in pieces[:-1]] + pieces[-1:]

    def _before(self, report: Any) -> None:
        script = self.script
        if script.stderr_bytes:
            sys.stderr.write(("x" * 79 + "\n") * (script.stderr_bytes // 80))
            sys.stderr.write("the last line\n")
        if script.grandchild:
            _start_grandchild(leave=script.grandchild == "session")
        if script.allocate:
            import resource

            resource.setrlimit(resource.RLIMIT_AS, (script.allocate, script.allocate))
            bytearray(script.allocate)
        if script.raise_unexpected:
            raise ValueError("nobody thought of this")
        print("a library prints this on stdout", flush=True)

    def _misbehave(self, token: int) -> None:
        script = self.script
        if token == script.fail_at:
            raise script.fail_with.error()
        if token == script.crash_at:
            crash(script.crash, script.exit_code)
        if token == script.hang_at:
            hang(script.hang, script.hang_seconds)

    def _pass_time(self, seconds: float, phase: str, report: Any, *, deaf: bool = False) -> None:
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0 and (deaf or not report.cancelled):
            report.progress(phase, round(1 - left / seconds, 3), 1)
            time.sleep(min(left, 0.01))
        if seconds and not report.cancelled:
            report.progress(phase, 1, 1)


def crash(how: Crash, exit_code: int = 3) -> None:
    """End this process the hard way."""
    sys.stderr.write(f"about to crash: {how}\n")
    sys.stderr.flush()
    if how == "exit":
        os._exit(exit_code)
    if how == "bad_alloc":
        sys.stderr.write("terminate called after throwing an instance of 'std::bad_alloc'\n")
        how = "abort"
    number = {"segv": signal.SIGSEGV, "abort": signal.SIGABRT, "kill": signal.SIGKILL}[how]
    os.kill(os.getpid(), number)
    time.sleep(10)


def hang(how: str, seconds: float) -> None:
    """Do nothing for a while, in one of several ways."""
    if how == "sleep":
        time.sleep(seconds)
    elif how == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    else:
        # PyDLL keeps the interpreter's lock during the call, CDLL gives it back.
        library: Any = ctypes.PyDLL(None) if how == "gil" else ctypes.CDLL(None)
        library.sleep(int(seconds))


def _start_grandchild(*, leave: bool) -> None:
    # Forked, not exec'ed, as libraries' worker processes are: it inherits even what closes on exec.
    if os.fork():
        return
    if leave:
        os.setsid()
    time.sleep(60)
    os._exit(0)


def _raw(data: bytes) -> None:
    while data:
        data = data[os.write(1, data) :]


def _huge_line() -> None:
    block = b"x" * 1_000_000
    for _ in range(1000):
        _raw(block)
    time.sleep(60)


def _handshake(version: int) -> bytes:
    return msgspec.json.encode(protocol.Ready(version=version, backend="fake", pid=os.getpid())) + b"\n"


def _start_badly(script: Script) -> int:
    beginnings: dict[str, Callable[[], Any]] = {
        "exit": lambda: os._exit(script.exit_code),
        "silent": lambda: None,
        "garbage": lambda: _raw(_handshake(protocol.VERSION) + b"Loading weights: 100%|####|\n"),
        "utf8": lambda: _raw(_handshake(protocol.VERSION) + b'{"type":"log","level":"info","text":"\xff\xfe\x80"}\n'),
        "huge_line": lambda: (_raw(_handshake(protocol.VERSION)), _huge_line()),
        "version": lambda: _raw(_handshake(protocol.VERSION + 1)),
        "no_handshake": lambda: _raw(b'{"type":"pong","id":1}\n'),
    }
    beginnings[script.start]()
    time.sleep(60)
    return 0


def main() -> int:
    """The child."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--backend", default="fake")
    name: str = parser.parse_args().backend
    script = msgspec.json.decode(os.environ.get(_VARIABLE, "{}"), type=Script)
    if script.start == "fail":
        return host.serve(name, _fail_to_start)
    if script.start != "ok":
        return _start_badly(script)
    return host.serve(name, lambda: FakeBackend(script))


def _fail_to_start() -> FakeBackend:
    raise WeftError(ErrorKind.ENVIRONMENT, "The fake library is not installed.", "Install it.")


if __name__ == "__main__":
    raise SystemExit(main())
