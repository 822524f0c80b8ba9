"""The database: migrated with a backup, safe when the disk is full, usable where it cannot be written."""

from __future__ import annotations

import os
import re
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from app.core.errors import ErrorKind, WeftError
from app.store.chats import ChatStore
from app.store.database import KEPT_BACKUPS, Database
from app.store.migrations import MIGRATIONS

ROOT = Path(__file__).resolve().parents[2]


def open_and_close(path: Path, migrations: tuple[str, ...] = MIGRATIONS) -> None:
    Database(path, migrations=migrations).close()


def test_a_new_database_is_at_the_newest_version_in_wal_mode(tmp_path: Path) -> None:
    database = Database(tmp_path / "new" / "folder" / "weft.sqlite")
    assert database.row("PRAGMA user_version") == (len(MIGRATIONS),)
    assert database.row("PRAGMA journal_mode") == ("wal",)
    assert database.row("PRAGMA foreign_keys") == (1,)
    assert not database.temporary and not database.notice
    database.close()
    assert not (tmp_path / "new" / "folder" / "backups").exists()


def test_each_migration_is_backed_up_first(tmp_path: Path) -> None:
    path = tmp_path / "weft.sqlite"
    steps = ("CREATE TABLE a (x);", "CREATE TABLE b (x); INSERT INTO a VALUES (2);", "INSERT INTO a VALUES (3);")
    database = Database(path, migrations=steps[:1])
    database.execute("INSERT INTO a VALUES (1)")
    database.close()
    database = Database(path, migrations=steps)
    assert database.rows("SELECT x FROM a ORDER BY x") == [(1,), (2,), (3,)]
    database.close()
    backups = sorted((tmp_path / "backups").glob("*.sqlite"))
    assert [re.search(r"-v(\d+)", backup.name)[1] for backup in backups] == ["1", "2"]  # type: ignore[index]
    copy = sqlite3.connect(backups[0])
    assert copy.execute("SELECT x FROM a").fetchall() == [(1,)]
    copy.close()
    many = (*steps, *["INSERT INTO a VALUES (4);"] * 10)
    open_and_close(path, many)
    assert len(list((tmp_path / "backups").iterdir())) == KEPT_BACKUPS


@pytest.mark.fault
def test_a_failing_migration_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "weft.sqlite"
    open_and_close(path, ("CREATE TABLE a (x);",))
    with pytest.raises(sqlite3.OperationalError):
        Database(
            path, migrations=("CREATE TABLE a (x);", "CREATE TABLE b (x); INSERT INTO nowhere VALUES (1);")
        ).close()
    database = Database(path, migrations=("CREATE TABLE a (x);",))
    assert database.row("SELECT count(*) FROM sqlite_master WHERE name = 'b'") == (0,)
    database.close()


def test_a_newer_database_is_refused_and_untouched(tmp_path: Path) -> None:
    path = tmp_path / "weft.sqlite"
    open_and_close(path, (*MIGRATIONS, "CREATE TABLE future (x);"))
    before = path.read_bytes()
    with pytest.raises(WeftError, match="newer Weft") as caught:
        Database(path)
    assert caught.value.kind is ErrorKind.UNSUPPORTED and "Update" in caught.value.hint
    assert path.read_bytes() == before


def test_two_processes_migrate_once(tmp_path: Path) -> None:
    code = "import sys; from pathlib import Path; from app.store.database import Database; Database(Path(sys.argv[1])).close()"
    processes = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "weft.sqlite")], cwd=ROOT, stderr=subprocess.PIPE)
        for _ in range(3)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors.decode()


@pytest.mark.fault
@pytest.mark.parametrize("damage", ["not a database" * 100, None])
def test_a_damaged_database_is_kept_and_replaced(tmp_path: Path, damage: str | None) -> None:
    path = tmp_path / "weft.sqlite"
    if damage is None:
        database = Database(path)
        chats = ChatStore(database)
        with database.transaction():
            for number in range(300):
                chats.create(f"Conversation {number} " + "x" * 200)
        database.close()
        data = bytearray(path.read_bytes())
        assert len(data) > 6 * 4096
        data[4096 * 2 : -4096] = b"\xa5" * (len(data) - 3 * 4096)
        path.write_bytes(data)
    else:
        path.write_text(damage)
    before = path.read_bytes()
    database = Database(path)
    assert "damaged" in database.notice
    assert ChatStore(database).conversations() == []
    database.close()
    kept = [p for p in tmp_path.iterdir() if ".damaged-" in p.name and not p.name.endswith(("-wal", "-shm"))]
    assert len(kept) == 1 and kept[0].read_bytes() == before


@pytest.mark.fault
def test_a_full_disk_is_said_and_earlier_content_stays(tmp_path: Path) -> None:
    database = Database(tmp_path / "weft.sqlite")
    chats = ChatStore(database)
    conversation = chats.create("kept")
    message = chats.add(conversation.id, 0, "user", "kept text")
    (pages,) = database.row("PRAGMA page_count")
    database.execute(f"PRAGMA max_page_count = {pages + 3}")
    with pytest.raises(WeftError) as caught:
        for _ in range(100):
            chats.append(message.id, "x" * 10_000)
    assert caught.value.kind is ErrorKind.DISK_FULL and "space" in caught.value.hint
    with pytest.raises(WeftError), database.transaction():
        chats.create("lost")
        chats.add(conversation.id, message.id, "assistant", "y" * 100_000)
    database.execute("PRAGMA max_page_count = 1000000")  # space was made: a retry succeeds
    assert chats.messages(conversation.id)[0].content.startswith("kept text")
    assert [c.title for c in chats.conversations()] == ["kept"]
    chats.add(conversation.id, message.id, "assistant", "y" * 100_000)
    assert database.row("PRAGMA integrity_check") == ("ok",)
    database.close()


_LIMITED = """
import resource, signal, sys
from pathlib import Path
from app.core.errors import WeftError
from app.store.database import Database
from app.store.chats import ChatStore
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
database = Database(Path(sys.argv[1]))
chats = ChatStore(database)
conversation = chats.conversations()[0]
limit = Path(str(database.path)).stat().st_size + 200_000
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
try:
    for number in range(10_000):
        chats.add(conversation.id, 0, "user", "z" * 5000)
except WeftError as error:
    print(error.kind, number)
"""


@pytest.mark.fault
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a POSIX file size limit")
def test_a_file_that_may_not_grow_is_a_full_disk(tmp_path: Path) -> None:
    path = tmp_path / "weft.sqlite"
    database = Database(path)
    ChatStore(database).create("kept")
    database.close()
    done = subprocess.run(
        [sys.executable, "-c", _LIMITED, str(path)], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    kind, written = done.stdout.split()
    assert kind == "disk_full"
    database = Database(path)
    assert not database.notice
    assert len(ChatStore(database).messages(1)) == int(written)
    assert database.row("PRAGMA integrity_check") == ("ok",)
    database.close()


_READ_ONLY = """
import os, sys
from pathlib import Path
from app.store.database import Database
from app.store.chats import ChatStore
if os.geteuid() == 0:  # for whom nothing is read-only
    os.setgroups([]); os.setgid(65534); os.setuid(65534)
database = Database(Path(sys.argv[1]))
chats = ChatStore(database)
print([c.title for c in chats.conversations("kept")], database.temporary, bool(database.notice))
chats.create("for this session")
place = database.path
database.close()
print(place.exists())
"""


@pytest.mark.fault
@pytest.mark.skipif(not hasattr(os, "setuid"), reason="needs POSIX permissions")
@pytest.mark.parametrize("there", [True, False])
def test_a_place_that_cannot_be_written_can_be_looked_at(tmp_path: Path, there: bool) -> None:
    home = tmp_path / "home"
    home.mkdir()
    if there:
        database = Database(home / "weft.sqlite")
        ChatStore(database).create("kept")
        database.close()
        (home / "weft.sqlite").chmod(0o444)
    home.chmod(0o555)
    for folder in (tmp_path, *tmp_path.parents):  # another user must be able to get there
        if folder.stat().st_uid == os.geteuid() and "pytest" in str(folder):
            folder.chmod(folder.stat().st_mode | 0o055)
    done = subprocess.run(
        [sys.executable, "-c", _READ_ONLY, str(home / "weft.sqlite")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    home.chmod(0o755)
    assert done.returncode == 0, done.stderr
    expected = "['kept']" if there else "[]"
    assert done.stdout.splitlines() == [f"{expected} True True", "False"]


def test_threads_write_side_by_side(tmp_path: Path) -> None:
    database = Database(tmp_path / "weft.sqlite")
    chats = ChatStore(database)
    failures: list[BaseException] = []

    def write(name: str) -> None:
        try:
            for number in range(50):
                chats.create(f"{name} {number}")
        except BaseException as error:
            failures.append(error)
        finally:
            database.release()

    threads = [threading.Thread(target=write, args=(f"thread {n}",)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert len(chats.conversations()) == 200
    database.close()


def test_a_transaction_is_all_or_nothing(tmp_path: Path) -> None:
    database = Database(tmp_path / "weft.sqlite")
    chats = ChatStore(database)
    with pytest.raises(ZeroDivisionError), database.transaction():
        chats.create("gone")
        raise ZeroDivisionError
    assert chats.conversations() == []
    database.close()
    database.close()  # twice is harmless
