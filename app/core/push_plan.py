"""PushPlan: what goes to the hub, and as what; PushResult: what is there then. Plain data."""

from __future__ import annotations

import msgspec


class PushPlan(msgspec.Struct, frozen=True, kw_only=True):
    """What to upload.

    Attributes:
        path: a folder, whose files go up, or one file.
        repo: `user/name`, or `name` for one of the token's owner.
        private: whether a repository that is made for it is private; one that is there already stays as it is.
        update: put the files into a repository that has files already.
        message: of the commit; "" for one of ours.
        endpoint, proxy: "" for the system's.
        token: travels over the pipe and nowhere else: it is empty in what is stored of a job.
    """

    path: str
    repo: str
    private: bool = True
    update: bool = False
    message: str = ""
    endpoint: str = ""
    proxy: str = ""
    token: str = ""


class PushResult(msgspec.Struct, frozen=True, kw_only=True):
    """What was uploaded.

    Attributes:
        repo: `user/name`. url: its page. commit: its newest.
        files: how many. bytes: of them. known: bytes that the hub had already.
        private: whether the repository is.
        seconds: that it took.
    """

    repo: str
    url: str
    commit: str
    files: int
    bytes: int
    known: int = 0
    private: bool = True
    seconds: float = 0.0
