"""The journal of a file that is being fetched: what it is, which stretches arrived, and which of these the disk confirmed.

Lines: `{…}` the header, the last one counts; `boot MARK` before the claims of a run; `START END` a claim, half open;
`synced N` all claims in the journal's first N bytes are confirmed. Anything else is a torn line and means nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from pathlib import Path

import msgspec

from app.hub.positional import same_boot

LONGEST_NAME = 255  # bytes; what every file system in use takes
ENDINGS = (".part", ".part.journal", ".damaged", ".copy.part")  # what may lie beside a file that is not complete
_CLAIM = re.compile(rb"(\d{1,19}) (\d{1,19})")
_SYNCED = re.compile(rb"synced (\d{1,19})")


class PartHeader(msgspec.Struct, frozen=True, kw_only=True):
    """What is being fetched; `continues` says when bytes of two are bytes of one file.

    Attributes:
        url: the hub's address of the file, without any signature. size: bytes.
        etag: of the whole file, without quotes. Never spliced across a change of it.
        sha256: hex, when the hub knows it (LFS), else "". git_oid: hex of the git blob, for plain files.
    """

    url: str
    size: int
    etag: str
    sha256: str = ""
    git_oid: str = ""

    def continues(self, before: PartHeader) -> bool:
        """Whether what arrived of `before` may be continued as this.

        The same checksum is the same file, also at another commit (its README changed) or on a mirror; only another
        ETag at the same address speaks against it. Without a checksum address and ETag must be the same, and be there.
        """
        if self.size != before.size:
            return False
        if self.url == before.url and self.etag and before.etag and self.etag != before.etag:
            return False
        if self.sha256 or self.git_oid:
            return (self.sha256, self.git_oid) == (before.sha256, before.git_oid)
        return bool(self.etag) and (self.url, self.etag, "", "") == (
            before.url,
            before.etag,
            before.sha256,
            before.git_oid,
        )


def beside(target: Path, ending: str) -> Path:
    """The path of something that belongs to `target`: its name with an ending, cut where that would be too long."""
    name = target.name + ending
    if len(os.fsencode(name)) > LONGEST_NAME:
        mark = "~" + hashlib.sha256(os.fsencode(target.name)).hexdigest()[:12] + ending
        room = LONGEST_NAME - len(mark)
        name = os.fsencode(target.name)[:room].decode(errors="ignore") + mark
    return target.with_name(name)


def read_journal(journal: bytes, length: int) -> tuple[PartHeader, list[tuple[int, int]]] | None:
    """A journal's header and what it proves to lie in a part file of `length` bytes; None when it proves nothing."""
    header: PartHeader | None = None
    claims: list[tuple[int, int, int, str]] = []  # start, end, where in the journal the claim ends, in which run
    confirmed, boot, position = 0, "", 0
    for line in journal.split(b"\n"):
        position += len(line) + 1
        if line.startswith(b"{"):
            with contextlib.suppress(msgspec.MsgspecError, ValueError):  # torn: it says nothing then
                header = msgspec.json.decode(line, type=PartHeader)
        elif line.startswith(b"boot "):
            boot = line[5:].decode("ascii", "replace")
        elif found := _SYNCED.fullmatch(line):
            confirmed = max(confirmed, int(found[1]))
        elif found := _CLAIM.fullmatch(line):
            claims.append((int(found[1]), int(found[2]), position, boot))
    if header is None:
        return None
    runs = {boot: same_boot(boot) for *_, boot in claims}
    return header, merged(
        [
            (start, end)
            for start, end, at, run in claims
            if start < end <= min(length, header.size) and (at <= confirmed or runs[run])
        ]
    )


def merged(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Sorted, and those that touch made one."""
    result: list[tuple[int, int]] = []
    for start, end in sorted(spans):
        if result and start <= result[-1][1]:
            result[-1] = (result[-1][0], max(end, result[-1][1]))
        else:
            result.append((start, end))
    return result
