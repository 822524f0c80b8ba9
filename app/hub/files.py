"""What the hub has, as plain data: files, repositories, search results, and how a download is getting on.

Light to import: the window's process holds these; what speaks to the hub lies in its other modules and runs in children.
"""

from __future__ import annotations

from urllib.parse import quote

import msgspec


class RemoteFile(msgspec.Struct, frozen=True, kw_only=True):
    """One file of a repository at a commit, as the hub's tree lists it.

    Attributes:
        repo, commit, path: what it is. size: bytes. sha256: hex for LFS files, else "". git_oid: hex of the git blob.
    """

    repo: str
    commit: str
    path: str
    size: int
    sha256: str = ""
    git_oid: str = ""

    def url(self, endpoint: str) -> str:
        """The hub's address of this file at this commit."""
        return f"{endpoint.rstrip('/')}/{self.repo}/resolve/{quote(self.commit, safe='')}/{quote(self.path)}"


class Listing(msgspec.Struct, frozen=True, kw_only=True):
    """A repository at one commit.

    Attributes:
        repo, revision, commit: which; `revision` is the branch that was asked for, "main" for the default one.
        endpoint: of the hub that said so. files: all of them. kind: `model` or `adapter`.
        gated: a licence must be accepted first. tags: the hub's.
        here: files that lie on this machine already: where, by path in the repository. Not verified yet.
    """

    repo: str
    revision: str
    commit: str
    files: tuple[RemoteFile, ...]
    endpoint: str = ""
    kind: str = "model"
    gated: bool = False
    tags: tuple[str, ...] = ()
    here: dict[str, str] = {}


class SearchHit(msgspec.Struct, frozen=True, kw_only=True):
    """One repository of a search. `modified` is an ISO time."""

    repo: str
    downloads: int = 0
    likes: int = 0
    modified: str = ""
    gated: bool = False
    tags: tuple[str, ...] = ()


class DownloadNews(msgspec.Struct, frozen=True, kw_only=True):
    """How a running download is getting on; sent a few times a second.

    Attributes:
        done, total: bytes that lie on the disk, of all files. fetched: bytes that came from the network in this run.
        file, file_done, file_total: the one at work. files_done, files_total: counts.
        phase: "Downloading", "Checking", … waiting: why nothing comes just now, in words, or "".
        waiting_seconds: until it goes on; 0 when unknown.
    """

    done: int = 0
    total: int = 0
    fetched: int = 0
    file: str = ""
    file_done: int = 0
    file_total: int = 0
    files_done: int = 0
    files_total: int = 0
    phase: str = "Downloading"
    waiting: str = ""
    waiting_seconds: float = 0.0


class DownloadResult(msgspec.Struct, frozen=True, kw_only=True):
    """What a download came to.

    Attributes:
        folder: where the files lie. paths: the files, in the order of the request.
        bytes: of all files. fetched: bytes that came from the network. reused: bytes taken from files that were here.
        kept: files that had one of these names and were not the hub's, nor a version that was fetched before: where they lie now.
    """

    folder: str
    paths: tuple[str, ...]
    bytes: int
    fetched: int
    reused: int
    seconds: float
    kept: tuple[str, ...] = ()
