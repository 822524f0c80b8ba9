"""What a fake hub holds: repositories, revisions, files, and the hashes that the real hub gives for them."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

LFS_SUFFIXES = (".safetensors", ".bin", ".gguf", ".pt", ".model")


@dataclasses.dataclass
class HubFile:
    """One file of a revision: its bytes, in memory or on disk, and its hashes."""

    path: str
    source: bytes | Path
    size: int
    sha256: str
    git_oid: str  # sha1 of "blob <size>\\0<content>" for plain files; of the LFS pointer for LFS files
    lfs: bool

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.git_oid

    def tree_entry(self) -> dict[str, object]:
        """The file as `/tree` and `/paths-info` list it."""
        entry: dict[str, object] = {"type": "file", "oid": self.git_oid, "size": self.size, "path": self.path}
        if self.lfs:
            entry["lfs"] = {"oid": self.sha256, "size": self.size, "pointerSize": len(_pointer(self.sha256, self.size))}
        return entry


def make_file(path: str, source: bytes | Path, lfs: bool | None = None) -> HubFile:
    """Hash a file as the hub would. LFS when told so, or by its suffix."""
    lfs = path.endswith(LFS_SUFFIXES) if lfs is None else lfs
    sha256, size = hashlib.sha256(), 0
    for chunk in _chunks(source):
        sha256.update(chunk)
        size += len(chunk)
    digest = sha256.hexdigest()
    blob = hashlib.sha1()
    if lfs:
        pointer = _pointer(digest, size)
        blob.update(b"blob %d\0" % len(pointer) + pointer)
    else:
        blob.update(b"blob %d\0" % size)
        for chunk in _chunks(source):
            blob.update(chunk)
    return HubFile(path, source, size, digest, blob.hexdigest(), lfs)


def _chunks(source: bytes | Path):
    if isinstance(source, bytes):
        yield source
        return
    with source.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            yield chunk


def _pointer(sha256: str, size: int) -> bytes:
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


@dataclasses.dataclass
class HubRepo:
    """A model repository with named revisions.

    `gated` repositories answer files with 401 without a token, 403 when the token's owner has not accepted the
    licence; `denied` with 403; `private` ones are not found without a token that may see them.
    """

    id: str
    revisions: dict[str, dict[str, HubFile]] = dataclasses.field(default_factory=dict)
    gated: bool = False
    denied: bool = False
    private: bool = False
    accepted_tokens: set[str] = dataclasses.field(default_factory=set)
    downloads: int = 0
    likes: int = 0
    tags: tuple[str, ...] = ()
    modified: str = "2026-01-02T03:04:05.000Z"

    def commit(self, revision: str) -> str | None:
        """The commit hash that a branch, tag or commit hash stands for."""
        if revision in self.revisions:
            files = self.revisions[revision]
            summary = "\n".join(f"{name} {files[name].sha256}" for name in sorted(files))
            return hashlib.sha1(f"{self.id}\n{summary}".encode()).hexdigest()
        return revision if any(self.commit(name) == revision for name in self.revisions) else None

    def files(self, revision: str) -> dict[str, HubFile] | None:
        """The files of a branch or commit; None when there is no such revision."""
        if revision in self.revisions:
            return self.revisions[revision]
        return next((self.revisions[name] for name in self.revisions if self.commit(name) == revision), None)

    def info(self, revision: str) -> dict[str, object]:
        """The repository as `/api/models/{id}` gives it."""
        files = self.files(revision) or {}
        return {
            "_id": hashlib.md5(self.id.encode()).hexdigest()[:24],
            "id": self.id,
            "modelId": self.id,
            "sha": self.commit(revision),
            "siblings": [{"rfilename": name} for name in sorted(files)],
            "gated": "manual" if self.gated else False,
            "private": self.private,
            "disabled": False,
            "tags": list(self.tags),
            "downloads": self.downloads,
            "likes": self.likes,
            "lastModified": self.modified,
            "createdAt": self.modified,
        }
