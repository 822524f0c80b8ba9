"""The schema of Weft's database, as numbered steps. Entry n brings version n to version n + 1.

A step that has shipped is never edited: add another one. `Database` runs each in its own transaction,
after a backup of the file.
"""

from __future__ import annotations

_FIRST = """
CREATE TABLE conversations (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    title TEXT NOT NULL DEFAULT '',
    created REAL NOT NULL,
    modified REAL NOT NULL,
    pinned INTEGER NOT NULL DEFAULT 0,
    system TEXT NOT NULL DEFAULT '',
    sampling TEXT NOT NULL DEFAULT '{}',
    model TEXT NOT NULL DEFAULT '',
    leaf INTEGER NOT NULL DEFAULT 0,
    deleted REAL,  -- when it was put into the bin; NULL while it is shown
    indexed INTEGER NOT NULL DEFAULT 0  -- 0: its title is not yet in `search`
);
CREATE INDEX conversations_shown ON conversations (pinned DESC, modified DESC, id DESC) WHERE deleted IS NULL;
CREATE INDEX conversations_unindexed ON conversations (id) WHERE indexed = 0;

CREATE TABLE messages (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    conversation INTEGER NOT NULL REFERENCES conversations (id) ON DELETE CASCADE,
    parent INTEGER NOT NULL DEFAULT 0,
    role TEXT NOT NULL CHECK (role IN ('system', 'user', 'assistant')),
    content TEXT NOT NULL DEFAULT '',
    created REAL NOT NULL,
    statistics TEXT,
    complete INTEGER NOT NULL DEFAULT 1,
    indexed INTEGER NOT NULL DEFAULT 0
);
CREATE INDEX messages_conversation ON messages (conversation, id);
CREATE INDEX messages_unindexed ON messages (id) WHERE indexed = 0;

-- Full text: rowid is a message's id, or minus a conversation's id for its title.
CREATE VIRTUAL TABLE search USING fts5 (text, tokenize = 'unicode61 remove_diacritics 2', prefix = '2 3');
CREATE TRIGGER messages_forget AFTER DELETE ON messages BEGIN
    DELETE FROM search WHERE rowid = old.id;
END;
CREATE TRIGGER conversations_forget AFTER DELETE ON conversations BEGIN
    DELETE FROM search WHERE rowid = -old.id;
END;

CREATE TABLE jobs (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    task TEXT NOT NULL,
    title TEXT NOT NULL,
    resource TEXT NOT NULL DEFAULT 'cpu',
    state TEXT NOT NULL DEFAULT 'queued',
    parameters TEXT NOT NULL DEFAULT '{}',
    progress TEXT,
    message TEXT NOT NULL DEFAULT '',
    hint TEXT NOT NULL DEFAULT '',
    log TEXT NOT NULL DEFAULT '',
    created REAL NOT NULL,
    started REAL NOT NULL DEFAULT 0,
    ended REAL NOT NULL DEFAULT 0,
    owner INTEGER NOT NULL DEFAULT 0,  -- process that runs it,
    owner_started REAL NOT NULL DEFAULT 0  -- and when that began, because process ids are used again
);
CREATE INDEX jobs_state ON jobs (state);

CREATE TABLE models (
    id TEXT PRIMARY KEY,
    root TEXT NOT NULL,
    name TEXT NOT NULL,
    sort_name TEXT NOT NULL,
    haystack TEXT NOT NULL,  -- what the filter looks through, case-folded
    path TEXT NOT NULL,
    format TEXT NOT NULL,
    quantization TEXT NOT NULL,
    architecture TEXT NOT NULL,
    parameters INTEGER NOT NULL,
    bytes INTEGER NOT NULL,
    context INTEGER NOT NULL,
    modified REAL NOT NULL,
    problem TEXT NOT NULL,
    signature TEXT NOT NULL,
    entry BLOB NOT NULL
) WITHOUT ROWID;
CREATE INDEX models_name ON models (sort_name, id);
CREATE INDEX models_root ON models (root);

CREATE TABLE adapters (
    id TEXT PRIMARY KEY,
    root TEXT NOT NULL,
    name TEXT NOT NULL,
    sort_name TEXT NOT NULL,
    haystack TEXT NOT NULL,
    path TEXT NOT NULL,
    format TEXT NOT NULL,
    kind TEXT NOT NULL,
    base TEXT NOT NULL,
    rank INTEGER NOT NULL,
    bytes INTEGER NOT NULL,
    modified REAL NOT NULL,
    problem TEXT NOT NULL,
    signature TEXT NOT NULL,
    entry BLOB NOT NULL
) WITHOUT ROWID;
CREATE INDEX adapters_name ON adapters (sort_name, id);
CREATE INDEX adapters_root ON adapters (root);

-- Kept apart from the index, so that a folder that goes and comes back keeps them.
CREATE TABLE usage (
    id TEXT PRIMARY KEY,
    last_used REAL NOT NULL
) WITHOUT ROWID;

CREATE TABLE model_options (
    model TEXT NOT NULL,
    loader TEXT NOT NULL,
    options TEXT NOT NULL,
    PRIMARY KEY (model, loader)
) WITHOUT ROWID;
CREATE TABLE model_choices (
    model TEXT PRIMARY KEY,
    loader TEXT,  -- NULL: chosen for it
    trusted_code TEXT NOT NULL DEFAULT ''  -- digest of the custom code that the user allowed
) WITHOUT ROWID;
"""

_CHAT_UNDO = """
ALTER TABLE messages ADD COLUMN deleted REAL;  -- when it and all below it were put into the bin
CREATE TABLE drafts (
    conversation INTEGER PRIMARY KEY,  -- 0: the chat that is not begun yet
    text TEXT NOT NULL
);
CREATE TRIGGER conversations_forget_draft AFTER DELETE ON conversations BEGIN
    DELETE FROM drafts WHERE conversation = old.id;
END;
"""

_NAMES = """
CREATE TABLE names (  -- the user's own names of models; apart from the index, which every scan writes anew
    id TEXT PRIMARY KEY,
    name TEXT NOT NULL,
    sort_name TEXT NOT NULL,
    haystack TEXT NOT NULL
) WITHOUT ROWID;
CREATE TRIGGER models_own_name AFTER INSERT ON models WHEN EXISTS (SELECT 1 FROM names WHERE id = new.id) BEGIN
    UPDATE models SET
        name = (SELECT name FROM names WHERE id = new.id),
        sort_name = (SELECT sort_name FROM names WHERE id = new.id),
        haystack = haystack || ' ' || (SELECT haystack FROM names WHERE id = new.id)
    WHERE id = new.id;
END;
"""

_DOWNLOADS = """
CREATE TABLE downloads (  -- the queue, and what it brought; never a token
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    position REAL NOT NULL,
    state TEXT NOT NULL DEFAULT 'queued',
    title TEXT NOT NULL,
    repo TEXT NOT NULL,
    revision TEXT NOT NULL,
    commit_hash TEXT NOT NULL,
    endpoint TEXT NOT NULL,
    kind TEXT NOT NULL,
    folder TEXT NOT NULL,
    files TEXT NOT NULL,  -- JSON: RemoteFile of each
    here TEXT NOT NULL DEFAULT '{}',  -- JSON: copies on this machine, by path
    total INTEGER NOT NULL,
    done INTEGER NOT NULL DEFAULT 0,
    failure TEXT NOT NULL DEFAULT '',  -- an ErrorKind
    message TEXT NOT NULL DEFAULT '',
    hint TEXT NOT NULL DEFAULT '',
    created REAL NOT NULL,
    ended REAL NOT NULL DEFAULT 0
);
CREATE INDEX downloads_position ON downloads (position, id);
"""

_LORAS = """
ALTER TABLE adapters ADD COLUMN alpha REAL NOT NULL DEFAULT 0;
ALTER TABLE adapters ADD COLUMN targets TEXT NOT NULL DEFAULT '';
ALTER TABLE adapters ADD COLUMN run TEXT NOT NULL DEFAULT '';

CREATE TABLE adapter_facts (  -- what is costly to find out about an adapter; void when its signature changes
    id TEXT PRIMARY KEY,
    signature TEXT NOT NULL,
    fit_key TEXT NOT NULL,  -- hash of all that decides which models it fits; '' where it cannot be read
    structure TEXT NOT NULL,  -- hash of its layout
    tensors TEXT NOT NULL DEFAULT '',  -- hash of its data; '' until somebody needs it
    scales TEXT NOT NULL DEFAULT ''
) WITHOUT ROWID;
CREATE INDEX adapter_facts_structure ON adapter_facts (structure);
CREATE TABLE fits (  -- by hashes of what decides it, so that equal adapters and equal models share a row
    adapter TEXT NOT NULL,
    model TEXT NOT NULL,
    matched INTEGER NOT NULL,
    total INTEGER NOT NULL,
    PRIMARY KEY (adapter, model)
) WITHOUT ROWID;

CREATE TABLE stacks (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    name TEXT NOT NULL,
    folded TEXT NOT NULL UNIQUE,
    stack TEXT NOT NULL,
    created REAL NOT NULL,
    modified REAL NOT NULL
);
"""

_ADAPTER_NAMES = """
CREATE TRIGGER adapters_own_name AFTER INSERT ON adapters WHEN EXISTS (SELECT 1 FROM names WHERE id = new.id) BEGIN
    UPDATE adapters SET
        name = (SELECT name FROM names WHERE id = new.id),
        sort_name = (SELECT sort_name FROM names WHERE id = new.id),
        haystack = haystack || ' ' || (SELECT haystack FROM names WHERE id = new.id)
    WHERE id = new.id;
END;
"""

_RUNS = """
CREATE TABLE runs (  -- what a training run said: its curves, sample answers and notes
    job INTEGER PRIMARY KEY REFERENCES jobs (id) ON DELETE CASCADE,
    history BLOB NOT NULL
);
"""

MIGRATIONS: tuple[str, ...] = (_FIRST, _CHAT_UNDO, _NAMES, _DOWNLOADS, _LORAS, _ADAPTER_NAMES, _RUNS)
