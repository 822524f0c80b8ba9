"""Lines over a pipe: cut right whatever the chunks, bounded, and never broken by text."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.engine import protocol
from app.engine.wire import LineSplitter, LineTooLong, encode


@settings(deadline=None)
@given(st.lists(st.binary(max_size=20).filter(lambda line: b"\n" not in line and line.strip())), st.data())
def test_lines_come_out_as_they_went_in_whatever_the_chunks(lines: list[bytes], data: st.DataObject) -> None:
    stream = b"".join(line + b"\n" for line in lines) + b"rest"
    splitter = LineSplitter(limit=20)
    found: list[bytes] = []
    while stream:
        size = data.draw(st.integers(1, len(stream)))
        found += splitter.feed(stream[:size])
        stream = stream[size:]
    assert found == lines


@pytest.mark.attack
@pytest.mark.parametrize("chunk", [1, 64, 1000])
def test_a_line_that_never_ends_is_refused_before_it_is_kept(chunk: int) -> None:
    splitter = LineSplitter(limit=1000)
    fed = 0
    with pytest.raises(LineTooLong):
        while fed < 10_000:
            splitter.feed(b"x" * chunk)
            fed += chunk
    assert fed <= 1000


@pytest.mark.attack
def test_a_long_line_in_one_piece_is_refused_too() -> None:
    with pytest.raises(LineTooLong):
        LineSplitter(limit=10).feed(b"x" * 11 + b"\nshort\n")


@settings(deadline=None)
@given(st.text(alphabet=st.characters(codec=None)))
def test_any_text_travels_and_only_lone_surrogates_are_replaced(text: str) -> None:
    line = encode(protocol.Tokens(id=1, text=text, count=1))
    assert line.endswith(b"\n") and line.count(b"\n") == 1
    event = msgspec.json.decode(line, type=protocol.Event)
    assert isinstance(event, protocol.Tokens)
    if not any("\ud800" <= character <= "\udfff" for character in text):
        assert event.text == text


def test_a_lone_surrogate_becomes_the_replacement_character() -> None:
    event = msgspec.json.decode(encode(protocol.Tokens(id=1, text="a\ud800b", count=1)), type=protocol.Event)
    assert isinstance(event, protocol.Tokens) and event.text == "a\ufffdb"
