"""What a transfer tells of itself."""

from __future__ import annotations


class Progressing:
    """What a transfer tells while it runs; called from its threads. The default says nothing."""

    def arrived(self, count: int) -> None:
        """`count` bytes came from the network."""

    def kept(self, count: int) -> None:
        """`count` bytes in all are there from before."""

    def lost(self, count: int) -> None:
        """All `count` bytes that were there must be fetched again; `kept` follows."""

    def waiting(self, seconds: float, why: str) -> None:
        """Nothing comes for a while, and why, in words; `why` is "" when it goes on."""

    def checking(self, done: int) -> None:
        """A file that lies there already is being read; `done` bytes so far."""

    def hashing(self, behind: int) -> None:
        """All bytes are there; so many must still be read to compare the checksum."""
