"""Fitting a context, stop strings, UTF-8 and prefixes, each against the plainest possible reference."""

from __future__ import annotations

import codecs
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.core.conversation import Message
from app.core.errors import ErrorKind, WeftError
from app.generation.fit import fit_messages, fit_text
from app.generation.prefix import common_prefix
from app.generation.stop import StopScanner
from app.generation.utf8 import Utf8Stream

pieces = st.lists(st.text(alphabet="ab<|>é\n", max_size=4), max_size=12)
stops = st.lists(st.text(alphabet="ab<|>é\n", min_size=1, max_size=5), max_size=4)


@given(pieces, stops)
def test_stop_scanner_equals_a_search_in_the_whole_text(parts: list[str], strings: list[str]) -> None:
    # A stop string ends the text as soon as it is complete, so the reference grows the text piece by piece.
    scanner, out, whole, expected = StopScanner(strings), "", "", None
    for part in parts:
        shown, stopped = scanner.feed(part)
        out += shown
        whole += part
        at = min((i for s in strings if (i := whole.find(s)) >= 0), default=-1)
        assert stopped == (at >= 0)
        if stopped:
            expected = whole[:at]
            break
        assert whole.startswith(out)
        assert len(whole) - len(out) < max((len(s) for s in strings), default=1)
    if expected is None:
        out, expected = out + scanner.flush(), whole
    assert out == expected


def test_stop_scanner_says_what_it_found_and_stays_shut() -> None:
    scanner = StopScanner(["END", "ENDING", ""])
    assert scanner.feed("the ENDING") == ("the ", True)
    assert scanner.matched == "ENDING"
    assert scanner.feed("more") == ("", True)
    assert scanner.flush() == ""


@given(st.binary(max_size=60), st.lists(st.integers(0, 60), max_size=8))
def test_utf8_stream_equals_decoding_at_once(data: bytes, cuts: list[int]) -> None:
    stream, out = Utf8Stream(), ""
    edges = sorted({0, len(data), *(min(c, len(data)) for c in cuts)})
    for a, b in zip(edges, edges[1:], strict=False):
        out += stream.feed(data[a:b])
    out += stream.flush()
    assert out == codecs.decode(data, "utf-8", "replace")
    assert stream.flush() == ""


@given(st.text(max_size=30))
def test_utf8_stream_never_breaks_a_character(text: str) -> None:
    stream = Utf8Stream()
    shown = [stream.feed(bytes([b])) for b in text.encode()]
    assert "".join(shown) == text
    assert all("\ufffd" not in s or "\ufffd" in text for s in shown)


@given(st.lists(st.integers(0, 2)), st.lists(st.integers(0, 2)))
def test_common_prefix_equals_a_loop(a: list[int], b: list[int]) -> None:
    plain = 0
    while plain < min(len(a), len(b)) and a[plain] == b[plain]:
        plain += 1
    assert common_prefix(a, b) == plain
    assert common_prefix(a, a) == len(a)


def test_common_prefix_of_long_prompts_is_found() -> None:
    rng = random.Random(1)
    a = [rng.randrange(150_000) for _ in range(100_000)]
    for at in (0, 1, 77_777, 99_999):
        b = list(a)
        b[at] = -1
        assert common_prefix(a, b) == at


def _words(messages: list[Message]) -> list[int]:
    return [len(word) for m in messages for word in m.content.split()]


def _chat(*contents: tuple[str, str]) -> list[Message]:
    return [Message(role=role, content=content) for role, content in contents]  # type: ignore[arg-type]


def test_fit_leaves_a_conversation_that_fits() -> None:
    chat = _chat(("system", "be kind"), ("user", "one two three"))
    assert fit_messages(chat, _words, 5) == (_words(chat), 0)


def test_fit_drops_the_oldest_turns_and_keeps_the_system_prompt() -> None:
    chat = _chat(
        ("system", "s s"),
        ("user", "a a a"),
        ("assistant", "b b b"),
        ("user", "c c"),
        ("assistant", "d"),
        ("user", "e e"),
    )
    tokens, dropped = fit_messages(chat, _words, 8)
    assert (len(tokens), dropped) == (7, 2)
    tokens, dropped = fit_messages(chat, _words, 6)
    assert (len(tokens), dropped) == (4, 4)


@given(
    st.lists(st.tuples(st.sampled_from(["user", "assistant"]), st.integers(0, 6)), min_size=1, max_size=14),
    st.integers(0, 40),
)
def test_fit_drops_as_little_as_it_can(turns: list[tuple[str, int]], limit: int) -> None:
    chat = _chat(("system", "s"), *((role, "w " * n) for role, n in turns), ("user", "last"))
    starts = [i for i, m in enumerate(chat) if m.role == "user" and i > 1]
    options = [chat, *([chat[0], *chat[i:]] for i in starts)]
    expected = next((o for o in options if len(_words(o)) <= limit), None)
    if expected is None:
        with pytest.raises(WeftError) as error:
            fit_messages(chat, _words, limit)
        assert error.value.kind is ErrorKind.BAD_INPUT and error.value.hint
    else:
        tokens, dropped = fit_messages(chat, _words, limit)
        assert dropped == len(chat) - len(expected) and len(tokens) == len(_words(expected))


def test_fit_keeps_an_answer_that_is_to_be_continued() -> None:
    chat = _chat(("user", "a a a a"), ("assistant", "b"), ("user", "c"), ("assistant", "d d"))
    assert fit_messages(chat, _words, 4) == ([1, 1, 1], 2)


def test_a_raw_prompt_that_is_too_long_is_refused() -> None:
    assert fit_text([1, 2], 2) == [1, 2]
    with pytest.raises(WeftError, match="takes 3 tokens, and 2 fit"):
        fit_text([1, 2, 3], 2)
