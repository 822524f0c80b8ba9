"""An engine whose decode step is native work of a fixed size: the same loop bare and reporting, by turns."""

from __future__ import annotations

import hashlib
import time
from typing import Any

from app.engine import host, protocol
from tests.fakes.fake_engine import FakeBackend, Script

ROUNDS = 60


class DecodeLoop(FakeBackend):
    """`prompt` of Generate is "TOKENS BYTES": tokens a round, and bytes hashed (without the interpreter's lock) for each."""

    def generate(self, request: protocol.Generate, report: Any) -> protocol.Generated:
        tokens, size = (int(word) for word in (request.prompt or "").split())
        block = b"x" * size
        for number in range(ROUNDS):
            # Each way goes first half of the time, so that a machine that slows down or speeds up favours neither.
            values: dict[str, float] = {}
            for way in (bare, reported) if number % 2 else (reported, bare):
                wall, cpu = time.perf_counter(), time.process_time()
                way(tokens, block, report)
                values[way.__name__] = time.perf_counter() - wall
                values[f"{way.__name__}_cpu"] = time.process_time() - cpu
            report.metric(number, values)
        return protocol.Generated(finish_reason="stop", tokens=tokens * ROUNDS, prompt_tokens=0)


def bare(tokens: int, block: bytes, report: Any) -> None:
    """The loop by itself."""
    for number in range(tokens):
        hashlib.sha256(block).digest()
        str(number)


def reported(tokens: int, block: bytes, report: Any) -> None:
    """The same, handing on every token."""
    for number in range(tokens):
        hashlib.sha256(block).digest()
        report.tokens(str(number) + " ", 1)


if __name__ == "__main__":
    raise SystemExit(host.serve("decode_loop", lambda: DecodeLoop(Script())))
