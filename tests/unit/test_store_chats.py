"""Conversations: trees, search, the bin, and what a kill leaves behind."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from app.core.conversation import AnswerStatistics
from app.core.errors import ErrorKind, WeftError
from app.store.chats import ChatStore
from app.store.database import Database

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def chats(database: Database) -> ChatStore:
    return ChatStore(database)


def test_a_tree_with_branches(chats: ChatStore) -> None:
    chat = chats.create("Title", model="m", system="Be brief.", sampling='{"seed":1}')
    question = chats.add(chat.id, 0, "user", "Why?")
    first = chats.add(chat.id, question.id, "assistant", "", complete=False)
    chats.append(first.id, "Be")
    chats.append(first.id, "cause")
    chats.update(first.id, complete=True, statistics=AnswerStatistics(tokens=2, finish_reason="stop"))
    second = chats.add(chat.id, question.id, "assistant", "Who knows?")
    messages = chats.messages(chat.id)
    assert [(m.id, m.parent, m.content, m.complete) for m in messages] == [
        (question.id, 0, "Why?", True),
        (first.id, question.id, "Because", True),
        (second.id, question.id, "Who knows?", True),
    ]
    assert messages[1].statistics == AnswerStatistics(tokens=2, finish_reason="stop")
    chat = chats.get(chat.id)
    assert (chat.leaf, chat.system, chat.sampling, chat.model) == (second.id, "Be brief.", '{"seed":1}', "m")
    assert chats.set_leaf(chat.id, first.id).leaf == first.id
    assert chats.message(first.id) == messages[1]


def test_parents_of_other_conversations_are_refused(chats: ChatStore) -> None:
    one, two = chats.create(), chats.create()
    message = chats.add(one.id, 0, "user", "x")
    for conversation, parent in ((two.id, message.id), (one.id, 999), (999, 0)):
        with pytest.raises(WeftError) as caught:
            chats.add(conversation, parent, "user", "y")
        assert caught.value.kind is ErrorKind.NOT_FOUND
    assert chats.messages(two.id) == []


def test_pinned_first_then_the_latest(chats: ChatStore) -> None:
    ids = [chats.create(f"{n}").id for n in range(4)]
    chats.set_pinned(ids[1], True)
    chats.add(ids[0], 0, "user", "again")
    assert [c.id for c in chats.conversations()] == [ids[1], ids[0], ids[3], ids[2]]
    assert [c.id for c in chats.conversations(limit=2)] == [ids[1], ids[0]]


def test_changes_are_kept(chats: ChatStore) -> None:
    chat = chats.create()
    chats.rename(chat.id, "New")
    chats.set_system(chat.id, "S")
    chats.set_sampling(chat.id, "{}")
    chat = chats.set_model(chat.id, "other")
    assert (chat.title, chat.system, chat.model) == ("New", "S", "other")
    with pytest.raises(WeftError, match="no conversation 99"):
        chats.rename(99, "x")
    with pytest.raises(WeftError, match="no message 99"):
        chats.message(99)


def test_delete_can_be_undone_until_it_is_purged(chats: ChatStore, database: Database) -> None:
    chat = chats.create("Old oak")
    chats.add(chat.id, 0, "user", "acorns")
    assert len(chats.conversations("acorn")) == 1
    chats.delete(chat.id)
    assert chats.conversations() == [] == chats.conversations("acorn")
    assert chats.purge() == 0
    chats.restore(chat.id)
    assert [c.id for c in chats.conversations("acorn")] == [chat.id]
    chats.delete(chat.id)
    assert chats.purge(older_than_seconds=-1) == 1
    assert database.row("SELECT count(*) FROM messages") == (0,)
    assert database.row("SELECT count(*) FROM search") == (0,)
    with pytest.raises(WeftError):
        chats.restore(chat.id)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("quick", "ab"),
        ("QUI", "ab"),
        ("quick fox", "a"),
        ("brûlée", "b"),
        ("brulee", "b"),
        ("title", "c"),
        ("c++", "c"),
        ("->", "c"),
        ("100%", "c"),
        ("学习", "d"),
        ("机器学习", "d"),
        ('"quick OR (', ""),
        ("NOT", ""),
        ("nowhere", ""),
        ("  ", "abcd"),
    ],
)
def test_search_finds_words_by_their_beginning(chats: ChatStore, text: str, found: str) -> None:
    contents = {
        "a": ("", "The quick brown fox"),
        "b": ("", "A quick crème brûlée"),
        "c": ("My title", "In C++ write p->next, 100% sure"),
        "d": ("", "我喜欢机器学习"),
    }
    ids = {}
    for letter, (title, content) in contents.items():
        chat = chats.create(title)
        chats.add(chat.id, 0, "user", content)
        ids[chat.id] = letter
    assert "".join(sorted(ids[c.id] for c in chats.conversations(text))) == found


def test_purge_takes_single_messages_too_and_leaves_the_rest(chats: ChatStore, database: Database) -> None:
    chat = chats.create("Kept")
    question = chats.add(chat.id, 0, "user", "one")
    for number in range(45):
        chats.delete_message(chats.add(chat.id, question.id, "assistant", f"gone {number}").id)
    answer = chats.add(chat.id, question.id, "assistant", "two")
    assert chats.purge() == 0, "all of it can still be restored"
    assert chats.purge(older_than_seconds=-1) == 45
    assert database.row("SELECT count(*) FROM messages") == (2,)
    assert [m.id for m in chats.messages(chat.id)] == [question.id, answer.id]


def test_search_follows_changes(chats: ChatStore) -> None:
    chat = chats.create("First")
    message = chats.add(chat.id, 0, "assistant", "", complete=False)
    chats.append(message.id, "unfinished sym")
    assert len(chats.conversations("sym")) == 1
    chats.append(message.id, "phony")
    assert len(chats.conversations("symphony")) == 1
    chats.update(message.id, content="Something else")
    chats.rename(chat.id, "Second")
    assert chats.conversations("symphony") == [] == chats.conversations("first")
    assert len(chats.conversations("second")) == 1


def test_ten_thousand_conversations_are_fluid(chats: ChatStore, database: Database) -> None:
    random_ = random.Random(0)
    words = ("tree", "river", "stone", "cloud", "ember", "quartz", "willow", "harbor", "lantern", "meadow")
    with database.transaction():
        for number in range(10_000):
            chat = chats.create(f"{random_.choice(words)} {number}")
            chats.add(chat.id, 0, "user", " ".join(random_.choices(words, k=30)))
    chats.conversations("warm")  # the first search after an import indexes it
    plain = _best(lambda: database.rows("SELECT * FROM conversations"))
    page, everything = _best(lambda: chats.conversations(limit=200)), _best(chats.conversations)
    search = _best(lambda: chats.conversations("quartz 99", limit=200))
    print(
        f"10,000 conversations: first 200 {page * 1e3:.2f} ms, all {everything * 1e3:.1f} ms, "
        f"search {search * 1e3:.2f} ms, reading the bare table {plain * 1e3:.1f} ms"
    )
    assert page < plain / 4
    assert everything < plain * 5
    assert search < plain


def test_appending_stays_cheap_while_an_answer_grows(chats: ChatStore) -> None:
    chat = chats.create()
    message = chats.add(chat.id, 0, "assistant", "", complete=False)
    start = time.process_time()
    for _ in range(2000):
        chats.append(message.id, "some words ")
    each = (time.process_time() - start) / 2000
    print(f"append: {each * 1e6:.0f} µs")
    assert each < 0.001
    assert len(chats.message(message.id).content) == 22_000


def _best(call: object) -> float:
    times = []
    for _ in range(5):
        start = time.process_time()
        call()  # type: ignore[operator]
        times.append(time.process_time() - start)
    return min(times)


_STREAMS = """
import sys
from pathlib import Path
from app.store.chats import ChatStore
from app.store.database import Database
chats = ChatStore(Database(Path(sys.argv[1])))
chat = chats.create("killed")
message = chats.add(chat.id, 0, "assistant", "", complete=False)
number = 0
while True:
    chats.append(message.id, f"{number} ")
    print(number, flush=True)
    number += 1
"""


@pytest.mark.fault
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_what_was_appended_survives_a_kill(tmp_path: Path) -> None:
    path = tmp_path / "weft.sqlite"
    process = subprocess.Popen([sys.executable, "-c", _STREAMS, str(path)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for _ in range(200 + random.randrange(200)):
        process.stdout.readline()
    os.kill(process.pid, signal.SIGKILL)
    said = process.stdout.read().split()
    process.wait()
    process.stdout.close()
    database = Database(path)
    assert not database.notice
    chats = ChatStore(database)
    (message,) = chats.messages(chats.conversations()[0].id)
    kept = [int(number) for number in message.content.split()]
    assert kept == list(range(len(kept)))
    assert not said or len(kept) > int(said[-1])  # everything that it said was saved
    assert not message.complete
    assert len(chats.conversations("199")) == 1
    database.close()
