"""What somebody typed or pasted, read as a place on the hub: `user/model:branch`, a URL, a `weft://` link."""

from __future__ import annotations

import re
from urllib.parse import parse_qs, unquote, urlsplit

import msgspec

from app.core.errors import ErrorKind, WeftError

_PART = r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,95})"
_REPO = re.compile(rf"({_PART})/({_PART})")
_REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/+-]{0,200}")
_HUB_HOSTS = frozenset({"huggingface.co", "www.huggingface.co", "hf.co"})
_DRIVE = re.compile(r"[A-Za-z]:")
_FORMS = "Write user/model, user/model:branch, or paste the address of a model's page."


class HubReference(msgspec.Struct, frozen=True, kw_only=True):
    """A place on the hub.

    Attributes:
        repo: `user/model`.
        revision: branch, tag or commit; "" for the default branch.
        file: path of one file inside, or "".
        from_link: it came from outside by a `weft://` link, so it wants a confirmation.
    """

    repo: str
    revision: str = ""
    file: str = ""
    from_link: bool = False

    def __str__(self) -> str:
        return self.repo + (f":{self.revision}" if self.revision else "") + (f" {self.file}" if self.file else "")


def parse_reference(text: str, endpoint: str = "") -> HubReference:
    """Read a name, URL or link.

    Args:
        text: what was typed or pasted; surrounding white space and quotes do not matter.
        endpoint: the hub endpoint in use, whose URLs are then read as well as the public hub's.

    Raises:
        WeftError: BAD_INPUT when it is none of these, saying what can be written.
    """
    text = text.strip().strip("\"'<>").strip()
    scheme, colon, _ = text.partition("://")
    try:
        if colon and scheme.lower() in ("weft", "lmstudio"):
            return _from_link(text)
        if colon or text.lower().startswith(tuple(f"{host}/" for host in _HUB_HOSTS)):
            return _from_url(text if colon else f"https://{text}", endpoint)
    except ValueError as error:  # urllib's, for brackets and the like
        raise WeftError(ErrorKind.BAD_INPUT, f"{text!r} is not an address.", _FORMS) from error
    name, mark, revision = text.partition("@" if "@" in text else ":")
    return _checked(name, unquote(revision) if mark else "", "", original=text)


def _from_url(text: str, endpoint: str) -> HubReference:
    url = urlsplit(text)
    hosts = _HUB_HOSTS | ({urlsplit(endpoint).netloc.lower()} if endpoint else frozenset())
    if url.scheme.lower() not in ("http", "https") or url.netloc.lower() not in hosts:
        raise WeftError(ErrorKind.BAD_INPUT, f"{text!r} is not an address on the hub.", _FORMS)
    parts = [part for part in url.path.split("/") if part]
    if parts[:1] == ["models"]:
        parts = parts[1:]
    if parts[:1] in (["datasets"], ["spaces"]):
        raise WeftError(ErrorKind.BAD_INPUT, f"{text!r} is a {parts[0][:-1]}, not a model.", _FORMS)
    repo = "/".join(unquote(part) for part in parts[:2])
    rest = parts[2:]
    if not rest or rest[0] not in ("tree", "blob", "resolve", "raw") or len(rest) < 2:
        return _checked(repo, "", "", original=text)
    # A branch with a slash is percent-encoded in the hub's own URLs, except refs/pr/N.
    if rest[1] == "refs" and len(rest) >= 4:
        revision, file = "/".join(rest[1:4]), rest[4:]
    else:
        revision, file = unquote(rest[1]), rest[2:]
    path = "/".join(unquote(part) for part in file) if rest[0] != "tree" else ""
    return _checked(repo, revision, path, original=text)


def _from_link(text: str) -> HubReference:
    url = urlsplit(text)
    query = parse_qs(url.query)
    if not query:  # weft://user/model:branch
        rest = unquote(text.partition("://")[2])
        if "://" in rest:
            raise WeftError(ErrorKind.BAD_INPUT, f"{text[:200]!r} does not name a model on the hub.", _FORMS)
        plain = parse_reference(rest)
        return msgspec.structs.replace(plain, from_link=True)
    repo = query.get("model", query.get("repo", [""]))[0]
    file, revision = query.get("file", [""])[0], query.get("revision", [""])[0]
    return msgspec.structs.replace(_checked(repo, revision, file, original=text), from_link=True)


def _checked(repo: str, revision: str, file: str, *, original: str) -> HubReference:
    if not _REPO.fullmatch(repo) or ".." in repo or "--" in repo or repo.endswith((".git", "-", ".")):
        raise WeftError(ErrorKind.BAD_INPUT, f"{original!r} does not name a model on the hub.", _FORMS)
    if revision and (not _REVISION.fullmatch(revision) or ".." in revision):
        raise WeftError(ErrorKind.BAD_INPUT, f"{revision!r} is not a branch, tag or commit.", _FORMS)
    if file:
        check_file_path(file)
    return HubReference(repo=repo, revision=revision, file=file)


def check_file_path(path: str) -> None:
    """Refuse a path from the hub that could leave the target folder or cannot exist on every system.

    Raises:
        WeftError: HOSTILE for absolute paths, `..`, drive letters, backslashes and control characters.
    """
    pieces = path.split("/")
    bad = (
        not path
        or path.startswith("/")
        or "\\" in path
        or _DRIVE.match(path) is not None
        or len(path) > 4000
        or any(0xD800 <= ord(character) < 0xE000 for character in path)  # half a character: no disk takes it
        or any(piece in ("", ".", "..") for piece in pieces)
        or any(ord(character) < 32 or character == "\x7f" for character in path)
    )
    if bad:
        raise WeftError(
            ErrorKind.HOSTILE,
            f"The hub names a file {path!r}, which is not a path inside a model's folder.",
            "Do not use this model.",
        )
