"""SQLite and settings: what Weft remembers."""
