"""Batches over the pipe: rows bear their numbers, one result for each, cancelled and refused in order."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from app.core.errors import ErrorKind, WeftError
from app.core.sampling import Sampling
from app.core.stack import AdapterStack, StackedAdapter
from app.engine import protocol
from app.engine.client import EngineClient
from app.generation.in_turn import answer_in_turn
from tests.fakes.fake_engine import Script, fake_client, fake_model

MakeEngine = Callable[..., EngineClient]


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[MakeEngine]:
    made: list[EngineClient] = []

    def make(**script: Any) -> EngineClient:
        client = fake_client(tmp_path, Script(**script))
        made.append(client)
        client.start()
        list(client.call(protocol.Load(model=fake_model())))
        return client

    yield make
    for client in made:
        client.shutdown()


def stack(name: str, weight: float = 1.0) -> AdapterStack:
    return AdapterStack(adapters=(StackedAdapter(path=f"/{name}", name=name, weight=weight),))


def batch(*stacks: AdapterStack, **fields: Any) -> protocol.GenerateBatch:
    rows = tuple(protocol.BatchRow(adapters=one, prompt="x") for one in stacks)
    return protocol.GenerateBatch(rows=rows, **fields)


def run(client: EngineClient, command: protocol.GenerateBatch) -> tuple[dict[int, str], protocol.GeneratedBatch]:
    texts: dict[int, str] = defaultdict(str)
    for event in client.call(command):
        if isinstance(event, protocol.Tokens):
            texts[event.row] += event.text
        elif isinstance(event, protocol.Done):
            assert isinstance(event.result, protocol.GeneratedBatch)
            return texts, event.result
    raise AssertionError("no result")


@pytest.mark.parametrize("in_turn", ["", "It cannot."])
def test_each_row_has_its_text_and_its_result(engine: MakeEngine, in_turn: str) -> None:
    client = engine(answers=("a b c", "d e f", "g h i"), batch_in_turn=in_turn)
    texts, result = run(client, batch(stack("x"), AdapterStack(), stack("y")))
    # In turn, the base comes first: it is what is on.
    assert texts == ({0: "d e f", 1: "a b c", 2: "g h i"} if in_turn else {0: "a b c", 1: "d e ", 2: "g "})
    assert [row.tokens for row in result.rows] == ([3, 3, 3] if in_turn else [3, 2, 1])
    assert result.note == in_turn
    client.shutdown()  # then the log is whole
    log = Path(client.log_path).read_text()
    assert ("adapters: base" in log.split("adapters: y")[-1]) == bool(in_turn), "the stack that was on is on again"


@pytest.mark.parametrize("in_turn", ["", "It cannot."])
def test_a_batch_is_cancelled_with_what_there_is(engine: MakeEngine, in_turn: str) -> None:
    client = engine(tokens=2000, rate=100, batch_in_turn=in_turn)
    command = client.send(batch(AdapterStack(), stack("y")))
    seen: list[Any] = []
    while not isinstance(event := client.next_event(20), protocol.Done):
        seen.append(event)
        if isinstance(event, protocol.Tokens) and len(seen) > 5:
            client.cancel(command)
    assert isinstance(event.result, protocol.GeneratedBatch)
    assert [row.finish_reason for row in event.result.rows] == ["cancelled", "cancelled"]
    assert event.result.rows[0].tokens > 0


def test_one_that_waits_is_cancelled_without_beginning(engine: MakeEngine) -> None:
    client = engine(tokens=2000, rate=100)
    first = client.send(protocol.Generate(prompt="x"))
    second = client.send(batch(AdapterStack(), stack("y")))
    client.cancel(second)
    while not isinstance(event := client.next_event(20), protocol.Done):
        pass
    assert event.id == second and isinstance(event.result, protocol.GeneratedBatch)
    assert [row.tokens for row in event.result.rows] == [0, 0]
    client.cancel(first)


@pytest.mark.parametrize("rows", [0, 65])
def test_no_rows_and_too_many_are_refused(engine: MakeEngine, rows: int) -> None:
    client = engine()
    with pytest.raises(WeftError, match="1 to 64 rows") as refused:
        list(client.call(batch(*[AdapterStack()] * rows)))
    assert refused.value.kind is ErrorKind.BAD_INPUT
    assert run(client, batch(AdapterStack()))[1].rows[0].tokens == 20, "it goes on"


class Sequential:
    """A backend that notes what it is told."""

    def __init__(self) -> None:
        self.stack, self.baked, self.calls = stack("on"), True, list[Any]()

    def set_adapters(self, adapters: AdapterStack, report: Any, *, baked: bool = False) -> None:
        self.stack, self.baked = adapters, baked
        self.calls.append((adapters.title, baked))
        report.log("warning", "same words")
        if adapters.title == "bad 1":
            raise WeftError(ErrorKind.UNSUPPORTED, "bad", "no")

    def check_adapters(self, stacks: list[AdapterStack], report: Any) -> None:
        if "refused 1" in [stack.title for stack in stacks]:
            raise WeftError(ErrorKind.UNSUPPORTED, "refused", "no")

    def generate(self, request: protocol.Generate, report: Any) -> protocol.Generated:
        self.calls.append((request.prompt, request.sampling.seed))
        report.tokens("text", 1)
        return protocol.Generated(
            finish_reason="stop", tokens=1, prompt_tokens=1, seconds=math.inf, seed=request.sampling.seed or 0
        )


class Report:
    cancelled = False

    def __init__(self) -> None:
        self.said: list[Any] = []

    def tokens(self, text: str, count: int, row: int = 0) -> None:
        self.said.append((text, row))

    def log(self, level: str, text: str) -> None:
        self.said.append(text)


def test_in_turn_rows_of_one_stack_follow_each_other_and_the_stack_comes_back() -> None:
    rows = [("a", stack("y"), 5), ("b", stack("on"), None), ("c", stack("z"), 7), ("d", stack("y"), None)]
    command = protocol.GenerateBatch(
        rows=tuple(protocol.BatchRow(adapters=s, prompt=p, seed=seed) for p, s, seed in rows),
        sampling=Sampling(seed=3),
    )
    backend, report = Sequential(), Report()
    answer_in_turn(backend, command, report, "")  # type: ignore[arg-type]
    assert backend.calls == [
        ("b", 3), ("y 1", False), ("a", 5), ("d", 3), ("z 1", False), ("c", 7), ("on 1", True),
    ]  # fmt: skip
    assert [said for said in report.said if said != "same words"] == [
        ("text", 1),
        ("text", 0),
        ("text", 3),
        ("text", 2),
    ]
    assert report.said.count("same words") == 1
    with pytest.raises(WeftError, match="bad"):
        answer_in_turn(backend, batch(stack("bad")), Report(), "")  # type: ignore[arg-type]
    assert (backend.stack.title, backend.baked) == ("on 1", True), "also after a refusal"


def test_in_turn_a_stack_that_is_refused_is_so_before_any_row_has_said_a_word() -> None:
    backend, report = Sequential(), Report()
    with pytest.raises(WeftError, match="refused"):
        answer_in_turn(backend, batch(stack("on"), stack("good"), stack("refused")), report, "")  # type: ignore[arg-type]
    assert not backend.calls and not report.said and backend.stack.title == "on 1"
