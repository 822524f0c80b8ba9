"""Conversations written to files come back as they were; what cannot be understood is refused whole."""

from __future__ import annotations

import json
import random
import string
from pathlib import Path

import pytest

from app.core.conversation import AnswerStatistics
from app.core.errors import ErrorKind, WeftError
from app.core.transcripts import (
    Transcript,
    TranscriptMessage,
    branch,
    export,
    read,
    title_of,
    transcript_of,
)
from app.store.chats import ChatStore
from app.store.database import Database
from app.workers.transcript_worker import export_file, import_files

NASTY = [
    "plain",
    "",
    "\n",
    "a\n\n",
    "\n\nb",
    "## You\n\ntext",
    "<!-- weft:user -->",
    "<!-- \\weft:user -->\n## You\n\nnot a turn",
    "# Title\n\n<!-- weft:user -->\n## You\n\nx",
    "```python\nprint('<!-- weft:assistant -->')\n```",
    "日本語 مرحبا \U0001f9f6",
    "tab\there",
    "- [ ] list\n  - nested",
    '{"from": "human"}',
]


def _tree(rng: random.Random, size: int) -> Transcript:
    messages: list[TranscriptMessage] = []
    for index in range(size):
        text = rng.choice(NASTY) + "".join(
            rng.choices(string.printable.replace("\r", "") + "äß漢", k=rng.randrange(40))
        )
        messages.append(
            TranscriptMessage(
                role=rng.choice(("user", "assistant")),
                content=text.replace("\x0b", "").replace("\x0c", ""),
                parent=rng.randrange(-1, index) if index else -1,
                created=rng.random() * 1e9,
                complete=rng.random() < 0.9,
                statistics=AnswerStatistics(model="m", tokens=3) if rng.random() < 0.5 else None,
            )
        )
    return Transcript(
        title=rng.choice(("A title", "日本", "# with marks *")),
        created=5.0,
        modified=6.0,
        system=rng.choice(("", "Be brief.\n\n<!-- weft:user -->")),
        sampling='{"temperature": 0.5}',
        messages=tuple(messages),
        leaf=rng.randrange(size),
    )


def _turns(transcript: Transcript) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in branch(transcript)]


def test_json_keeps_everything() -> None:
    seed = random.randrange(2**32)
    print("seed", seed)
    rng = random.Random(seed)
    for _ in range(40):
        transcripts = [_tree(rng, rng.randrange(1, 12)) for _ in range(rng.randrange(1, 4))]
        assert read(export(transcripts, "json").encode(), "chats.json") == transcripts


@pytest.mark.parametrize("form", ["markdown", "sharegpt"])
def test_markdown_and_sharegpt_keep_the_branch_that_is_shown(form: str) -> None:
    seed = random.randrange(2**32)
    print("seed", seed)
    rng = random.Random(seed)
    for _ in range(60):
        transcripts = [_tree(rng, rng.randrange(1, 8)) for _ in range(rng.randrange(1, 4))]
        name = "chats.md" if form == "markdown" else "chats.json"
        back = read(export(transcripts, form).encode(), name)  # type: ignore[arg-type]
        assert [(t.system, _turns(t)) for t in back] == [(t.system, _turns(t)) for t in transcripts]
        if form == "markdown":
            assert [t.title for t in back] == [t.title for t in transcripts]


@pytest.mark.parametrize("form", ["markdown", "sharegpt", "json"])
def test_whatever_can_be_imported_is_exported_and_imported_equally(form: str) -> None:
    seed = random.randrange(2**32)
    print("seed", seed)
    rng = random.Random(seed)
    for _ in range(200):
        turns = [
            {"role": rng.choice(("system", "system", "user", "assistant")), "content": rng.choice(["", "S", "a\nb"])}
            for _ in range(rng.randrange(5))
        ]
        foreign = [{"title": rng.choice(["Named", " two  words "]), "messages": turns}]
        if rng.random() < 0.3:
            foreign[0]["system"] = "Told apart."
        if rng.random() < 0.3:
            foreign.append({"title": "Other", "messages": [{"role": "user", "content": "q"}]})
        chats = read(json.dumps(foreign).encode(), "x.json")
        name = "x.md" if form == "markdown" else "x.json"
        back = read(export(chats, form).encode(), name)  # type: ignore[arg-type]
        assert [(t.title, t.system, _turns(t)) for t in back] == [(t.title, t.system, _turns(t)) for t in chats]


def test_empty_conversations_of_a_data_set_are_left_out() -> None:
    found = read(b'[{"conversations": []}, {"conversations": [{"from": "human", "value": "q"}]}]', "x.json")
    assert [_turns(t) for t in found] == [[("user", "q")]]
    with pytest.raises(WeftError, match="no message"):
        read(b'[{"conversations": []}]', "x.json")


def test_sharegpt_and_messages_from_elsewhere() -> None:
    share = [
        {
            "conversations": [
                {"from": "system", "value": "S"},
                {"from": "human", "value": "Q"},
                {"from": "gpt", "value": "A"},
            ]
        }
    ]
    found = read(json.dumps(share).encode(), "x.json")[0]
    assert (found.system, _turns(found), found.title) == ("S", [("user", "Q"), ("assistant", "A")], "Q")
    lines = "\n".join(json.dumps({"messages": [{"role": "user", "content": f"q{i}"}]}) for i in range(3))
    assert [_turns(t) for t in read(lines.encode(), "x.jsonl")] == [[("user", f"q{i}")] for i in range(3)]
    parts = {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]}
    assert _turns(read(json.dumps(parts).encode(), "x.json")[0]) == [("user", "ab")]
    bare = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    assert _turns(read(("\ufeff" + json.dumps(bare)).encode(), "x.json")[0]) == [("user", "hi"), ("assistant", "ho")]


def _weft(**change: object) -> bytes:
    value = json.loads(export([Transcript(messages=(TranscriptMessage(role="user", content="q"),))], "json"))
    value["conversations"][0].update(change)
    return json.dumps(value).encode()


@pytest.mark.attack
@pytest.mark.parametrize(
    ("data", "word"),
    [
        (b"", "JSON"),
        (b"{", "JSON"),
        (b"\xff\xfe\x00", "UTF-8"),
        (b"[]", "no message"),
        (b"[1]", "object"),
        (b'{"a": 1}', "conversations"),
        (b'{"messages": [{"role": "wizard", "content": "x"}]}', "wizard"),
        (b'{"messages": [{"role": "user"}]}', "no text"),
        (b'{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}', "other than text"),
        (b'{"messages": "x"}', "conversations"),
        (b"[" * 100_000, "JSON"),
        (_weft(leaf=7), "not there"),
        (_weft(leaf=-1), "not there"),
        (_weft(sampling="["), "sampling"),
        (_weft(messages=[{"role": "user", "content": "q", "parent": 0}]), "parent"),
        (_weft(messages=[{"role": "user", "content": "q", "parent": -2}]), "parent"),
        (_weft(messages=[{"role": "user", "content": 5}]), "str"),
        (b'{"kind": "weft conversations", "version": 99, "conversations": []}', "version"),
    ],
)
def test_bad_files_are_refused_with_the_reason(data: bytes, word: str) -> None:
    with pytest.raises(WeftError) as caught:
        read(data, "bad.json")
    assert caught.value.kind is ErrorKind.BAD_INPUT
    assert word in caught.value.message and "bad.json" in caught.value.message
    assert caught.value.hint


def test_markdown_without_marks_is_refused() -> None:
    with pytest.raises(WeftError, match="before the first"):
        read(b"Some notes\n", "notes.md")


def test_files_are_imported_whole_or_not_at_all(tmp_path: Path) -> None:
    database = Database(tmp_path / "weft.sqlite")
    try:
        store = ChatStore(database)
        conversation = store.create("Kept", system="S")
        question = store.add(conversation.id, 0, "user", "Q")
        first = store.add(conversation.id, question.id, "assistant", "A")
        store.add(conversation.id, question.id, "assistant", "B")
        store.set_leaf(conversation.id, first.id)
        good, bad = tmp_path / "good.json", tmp_path / "bad.json"
        export_file(store, [conversation.id], "json", good)
        bad.write_text('{"messages": [{"role": "nobody", "content": ""}]}')
        with pytest.raises(WeftError, match=r"bad\.json"):
            import_files(store, [good, bad])
        assert len(store.conversations()) == 1
        (made,) = import_files(store, [good])
        copy = transcript_of(store.get(made), store.messages(made))
        assert copy == transcript_of(store.get(conversation.id), store.messages(conversation.id))
        assert {path.name for path in tmp_path.iterdir() if path.suffix == ".part"} == set()
    finally:
        database.close()


@pytest.mark.fault
def test_export_into_a_folder_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    database = Database(tmp_path / "weft.sqlite")
    try:
        store = ChatStore(database)
        conversation = store.create("T")
        store.add(conversation.id, 0, "user", "Q")
        with pytest.raises(WeftError, match="could not be written"):
            export_file(store, [conversation.id], "json", tmp_path / "missing" / "x.json")
    finally:
        database.close()


def test_titles_come_from_the_first_line() -> None:
    assert title_of("  \n## Hello **there**\nmore") == "Hello there"
    long = title_of("word " * 40)
    assert long.endswith("…") and len(long) <= 57
    assert title_of("x" * 500) == "x" * 55 + "…"
    assert title_of("") == ""
