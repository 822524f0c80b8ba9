"""Conversations and their message trees, with full-text search.

Streaming: `append` is one small UPDATE that commits by itself (tens of microseconds), so what was
appended outlives a kill of the process. Text is put into the search index when somebody searches, not
while it streams: tokenizing a growing answer again for each batch would be quadratic.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import msgspec

from app.core.conversation import AnswerStatistics, Conversation, Role, StoredMessage
from app.core.errors import ErrorKind, WeftError
from app.core.transcripts import Transcript
from app.store.database import Database

BIN_SECONDS = 30 * 24 * 3600.0  # how long a deleted conversation or message can be restored
PURGED_AT_ONCE = 20  # conversations, or messages, per transaction: the window's own writes never wait long for it

_CONVERSATION = "id, title, created, modified, pinned, system, sampling, model, leaf"
_MESSAGE = "id, conversation, parent, role, content, created, statistics, complete"
_SUBTREE = (
    "WITH RECURSIVE below (id) AS (VALUES (?) UNION SELECT messages.id FROM messages JOIN below ON parent = below.id)"
)
_ORDER = "ORDER BY pinned DESC, modified DESC, id DESC"
# Scripts that are written without spaces between words: full-text search by words cannot serve them.
_UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
)
# What words leave out but somebody means (C++, p->next, 100%): searched for as it stands.
_SYMBOLS = re.compile(r"[+#@$%&=<>{}\[\]|\\/~^*]")
_WORD = re.compile(r"\w+")


class ChatStore:
    """All conversations. Every method may be called from any thread, and raises WeftError as `Database.execute` does."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def together(self) -> AbstractContextManager[object]:
        """A context in which all that is written is kept, or nothing when anything fails."""
        return self._database.transaction()

    def release(self) -> None:
        """Let go of what the calling thread holds. A thread that ends calls this."""
        self._database.release()

    # Conversations ----------------------------------------------------------------------------------

    def create(self, title: str = "", model: str = "", system: str = "", sampling: str = "{}") -> Conversation:
        """A new, empty conversation."""
        now = time.time()
        row = self._database.execute(
            "INSERT INTO conversations (title, created, modified, model, system, sampling) VALUES (?, ?, ?, ?, ?, ?)",
            (title, now, now, model, system, sampling),
        ).lastrowid
        assert row is not None
        return self.get(row)

    def conversations(self, text: str = "", limit: int | None = None) -> list[Conversation]:
        """Those not deleted, pinned ones first, then the latest. `text` searches titles and all messages.

        Every word of `text` must begin a word of one and the same message or title.
        """
        where, parameters = "", []
        if text.strip():
            clause, parameters = self._matching(text)
            where = f" AND id IN ({clause})"
        rows = self._database.rows(
            f"SELECT {_CONVERSATION} FROM conversations WHERE deleted IS NULL{where} {_ORDER} LIMIT ?",
            (*parameters, -1 if limit is None else limit),
        )
        return [_conversation(row) for row in rows]

    def get(self, conversation: int) -> Conversation:
        """One conversation, deleted or not. Raises WeftError NOT_FOUND."""
        row = self._database.row(f"SELECT {_CONVERSATION} FROM conversations WHERE id = ?", (conversation,))
        if row is None:
            raise WeftError(
                ErrorKind.NOT_FOUND, f"There is no conversation {conversation}.", "It may have been deleted for good."
            )
        return _conversation(row)

    def rename(self, conversation: int, title: str) -> Conversation:
        """Give a conversation another title."""
        return self._set(conversation, "title = ?, indexed = 0", title)

    def set_pinned(self, conversation: int, pinned: bool) -> Conversation:
        """Keep a conversation at the top of the list, or no longer."""
        return self._set(conversation, "pinned = ?", int(pinned))

    def set_system(self, conversation: int, system: str) -> Conversation:
        """Change the system prompt."""
        return self._set(conversation, "system = ?", system)

    def set_sampling(self, conversation: int, sampling: str) -> Conversation:
        """Change the sampling, given as JSON of the changed fields."""
        return self._set(conversation, "sampling = ?", sampling)

    def set_model(self, conversation: int, model: str) -> Conversation:
        """Remember which model was last used in it."""
        return self._set(conversation, "model = ?", model)

    def set_leaf(self, conversation: int, message: int) -> Conversation:
        """Choose the branch that is shown, by the message at its end; 0 for none."""
        return self._set(conversation, "leaf = ?", message)

    def delete(self, conversation: int) -> None:
        """Put a conversation into the bin, from where `restore` takes it back for 30 days."""
        self._set(conversation, "deleted = ?", time.time())

    def restore(self, conversation: int) -> Conversation:
        """Undo `delete`."""
        return self._set(conversation, "deleted = ?", None)

    def purge(self, older_than_seconds: float = BIN_SECONDS) -> int:
        """Delete for good what has lain in the bin for longer: whole conversations and single messages.

        Returns how many of both. The Chat page has it done once, in the background.
        """
        gone, before = 0, time.time() - older_than_seconds
        for table in ("conversations", "messages"):
            while True:
                count = self._database.execute(
                    f"DELETE FROM {table} WHERE id IN (SELECT id FROM {table} WHERE deleted < ? LIMIT ?)",
                    (before, PURGED_AT_ONCE),
                ).rowcount
                if not count:
                    break
                gone += count
        return gone

    def _set(self, conversation: int, assignment: str, value: object) -> Conversation:
        self._database.execute(f"UPDATE conversations SET {assignment} WHERE id = ?", (value, conversation))
        return self.get(conversation)

    # Messages ---------------------------------------------------------------------------------------

    def messages(self, conversation: int) -> list[StoredMessage]:
        """The whole tree of a conversation, in the order of writing, without what was deleted."""
        rows = self._database.rows(
            f"SELECT {_MESSAGE} FROM messages WHERE conversation = ? AND deleted IS NULL ORDER BY id", (conversation,)
        )
        return [_message(row) for row in rows]

    def message(self, message: int) -> StoredMessage:
        """One message. Raises WeftError NOT_FOUND."""
        row = self._database.row(f"SELECT {_MESSAGE} FROM messages WHERE id = ?", (message,))
        if row is None:
            raise WeftError(ErrorKind.NOT_FOUND, f"There is no message {message}.", "Open the conversation again.")
        return _message(row)

    def add(
        self,
        conversation: int,
        parent: int,
        role: Role,
        content: str,
        complete: bool = True,
        statistics: AnswerStatistics | None = None,
    ) -> StoredMessage:
        """Add a message below `parent` (0: at the root) and show the branch that it ends.

        Raises:
            WeftError: NOT_FOUND when the conversation or the parent does not exist in it.
        """
        now = time.time()
        with self._database.transaction() as connection:
            # A parent of another conversation would tie two trees together.
            known = connection.execute(
                "SELECT 1 FROM messages WHERE id = ? AND conversation = ?"
                if parent
                else "SELECT 1 FROM conversations WHERE id = ?",
                (parent, conversation) if parent else (conversation,),
            ).fetchone()
            if known is None:
                what = f"message {parent} in conversation {conversation}" if parent else f"conversation {conversation}"
                raise WeftError(ErrorKind.NOT_FOUND, f"There is no {what}.", "Open the conversation again.")
            message = connection.execute(
                "INSERT INTO messages (conversation, parent, role, content, created, statistics, complete)"
                " VALUES (?, ?, ?, ?, ?, ?, ?)",
                (conversation, parent, role, content, now, _encoded(statistics), int(complete)),
            ).lastrowid
            connection.execute(
                "UPDATE conversations SET modified = ?, leaf = ? WHERE id = ?", (now, message, conversation)
            )
        assert message is not None
        return StoredMessage(
            id=message,
            conversation=conversation,
            parent=parent,
            role=role,
            content=content,
            created=now,
            statistics=statistics,
            complete=complete,
        )

    def append(self, message: int, text: str) -> None:
        """Add text to the end of a message that is being streamed."""
        self._database.execute("UPDATE messages SET content = content || ?, indexed = 0 WHERE id = ?", (text, message))

    def update(
        self,
        message: int,
        *,
        content: str | None = None,
        complete: bool | None = None,
        statistics: AnswerStatistics | None = None,
    ) -> None:
        """Change what is given of a message, and leave the rest."""
        changes: dict[str, object] = {}
        if content is not None:
            changes["content"] = content
            changes["indexed"] = 0
        if complete is not None:
            changes["complete"] = int(complete)
        if statistics is not None:
            changes["statistics"] = _encoded(statistics)
        if changes:
            assignments = ", ".join(f"{name} = ?" for name in changes)
            self._database.execute(f"UPDATE messages SET {assignments} WHERE id = ?", (*changes.values(), message))

    def delete_message(self, message: int) -> None:
        """Put a message and all that follows it into the bin."""
        self._database.execute(
            f"{_SUBTREE} UPDATE messages SET deleted = ? WHERE deleted IS NULL AND id IN below", (message, time.time())
        )

    def restore_message(self, message: int) -> None:
        """Undo `delete_message`: takes back what was deleted together with it."""
        self._database.execute(
            f"{_SUBTREE} UPDATE messages SET deleted = NULL"
            " WHERE id IN below AND deleted = (SELECT deleted FROM messages WHERE id = ?)",
            (message, message),
        )

    def import_transcripts(self, transcripts: Sequence[Transcript]) -> list[Conversation]:
        """Add whole conversations: all of them, or none when anything fails."""
        created: list[int] = []
        with self._database.transaction() as connection:
            for transcript in transcripts:
                now = time.time()
                conversation = connection.execute(
                    "INSERT INTO conversations (title, created, modified, pinned, system, sampling, model)"
                    " VALUES (?, ?, ?, ?, ?, ?, ?)",
                    (
                        transcript.title,
                        transcript.created or now,
                        transcript.modified or transcript.created or now,
                        int(transcript.pinned),
                        transcript.system,
                        transcript.sampling,
                        transcript.model,
                    ),
                ).lastrowid
                assert conversation is not None
                created.append(conversation)
                keys: list[int] = []
                for message in transcript.messages:
                    key = connection.execute(
                        "INSERT INTO messages (conversation, parent, role, content, created, statistics, complete)"
                        " VALUES (?, ?, ?, ?, ?, ?, ?)",
                        (
                            conversation,
                            keys[message.parent] if message.parent >= 0 else 0,
                            message.role,
                            message.content,
                            message.created or transcript.created or now,
                            _encoded(message.statistics),
                            int(message.complete),
                        ),
                    ).lastrowid
                    assert key is not None
                    keys.append(key)
                leaf = keys[transcript.leaf] if keys and transcript.leaf < len(keys) else 0
                connection.execute("UPDATE conversations SET leaf = ? WHERE id = ?", (leaf, conversation))
        return [self.get(conversation) for conversation in created]

    # Drafts -----------------------------------------------------------------------------------------

    def draft(self, conversation: int) -> str:
        """What was typed and not yet sent; 0 is the chat that is not begun yet."""
        row = self._database.row("SELECT text FROM drafts WHERE conversation = ?", (conversation,))
        return "" if row is None else row[0]

    def set_draft(self, conversation: int, text: str) -> None:
        """Keep what is typed; "" forgets it."""
        if text:
            self._database.execute(
                "INSERT OR REPLACE INTO drafts (conversation, text) VALUES (?, ?)", (conversation, text)
            )
        else:
            self._database.execute("DELETE FROM drafts WHERE conversation = ?", (conversation,))

    # Search -----------------------------------------------------------------------------------------

    def _matching(self, text: str) -> tuple[str, list[object]]:
        """SQL that yields the ids of the conversations in which `text` is found, with its parameters."""
        words = _WORD.findall(text)
        if not words or _UNSPACED.search(text) or _SYMBOLS.search(text):
            pattern = "%" + re.sub(r"([\\%_])", r"\\\1", text.strip()) + "%"
            return (
                r"SELECT conversation FROM messages WHERE deleted IS NULL AND content LIKE ? ESCAPE '\' UNION"
                r" SELECT id FROM conversations WHERE title LIKE ? ESCAPE '\'",
                [pattern, pattern],
            )
        self._index_new_text()
        query = " ".join(f'"{word}"*' for word in words)
        return (
            "SELECT CASE WHEN search.rowid < 0 THEN -search.rowid ELSE (SELECT conversation FROM messages"
            " WHERE messages.id = search.rowid AND deleted IS NULL) END FROM search WHERE search MATCH ?",
            [query],
        )

    def _index_new_text(self) -> None:
        for table, column, sign in (("messages", "content", 1), ("conversations", "title", -1)):
            while True:
                # In portions, so that the window's own writes never wait long.
                rows = self._database.rows(f"SELECT id, {column} FROM {table} WHERE indexed = 0 LIMIT 500")
                if not rows:
                    break
                with self._database.transaction() as connection:
                    keys = [(sign * key,) for key, _ in rows]
                    connection.executemany("DELETE FROM search WHERE rowid = ?", keys)
                    connection.executemany(
                        "INSERT INTO search (rowid, text) VALUES (?, ?)", [(sign * key, text) for key, text in rows]
                    )
                    # Text that came in between stays marked: its content differs.
                    connection.executemany(
                        f"UPDATE {table} SET indexed = 1 WHERE id = ? AND {column} = ?",
                        [(key, text) for key, text in rows],
                    )


def _encoded(statistics: AnswerStatistics | None) -> str | None:
    return None if statistics is None else msgspec.json.encode(statistics).decode()


def _conversation(row: Any) -> Conversation:
    key, title, created, modified, pinned, system, sampling, model, leaf = row
    return Conversation(
        id=key,
        title=title,
        created=created,
        modified=modified,
        pinned=bool(pinned),
        system=system,
        sampling=sampling,
        model=model,
        leaf=leaf,
    )


def _message(row: Any) -> StoredMessage:
    key, conversation, parent, role, content, created, statistics, complete = row
    return StoredMessage(
        id=key,
        conversation=conversation,
        parent=parent,
        role=role,
        content=content,
        created=created,
        statistics=None if statistics is None else msgspec.json.decode(statistics, type=AnswerStatistics),
        complete=bool(complete),
    )
