"""A loopback hub that the real huggingface_hub client accepts, and that misbehaves on order.

    with FakeHub() as hub:
        hub.add("user/tiny", {"config.json": b"{}", "model.safetensors": data})
        hub.misbehave(Fault("cut", path="model.safetensors", after=1000))
        HfApi(endpoint=hub.endpoint).model_info("user/tiny")

Small files are served by the hub itself, LFS files by a redirect to another host name (`localhost` instead of
`127.0.0.1`), as the real hub redirects to its file store. Every request is kept in `hub.requests`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fnmatch
import json
import os
import re
import socket
import threading
import time
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

from tests.fakes.hub_content import HubFile, HubRepo, make_file
from tests.fakes.hub_upload import UploadHandler, Uploads


@dataclasses.dataclass
class Fault:
    """One misbehaviour, applied to file transfers whose path matches, `times` times (then all is well again).

    kinds: `cut` (close after `after` bytes of the body), `stall` (wait `seconds` after `after` bytes, then close),
    `ignore_range` (answer 200 with the whole file), `corrupt` (same size, one byte flipped), `change` (the file is another one
    from now on, with another ETag), `other_etag` (so for this one answer), `status` (answer `code`, with `retry_after`),
    `loop` (redirect to itself), `portal` (answer 200 with a log-in page, as networks of hotels do), `api_status` (as `status`,
    for questions: the path is the address's, such as `/api/models*`), `api_redirect` (to `url`), `next_page` (the list's next page lies at `url`).
    """

    kind: str
    path: str = "*"
    times: int = 1
    after: int = 0
    seconds: float = 30.0
    code: int = 503
    retry_after: str = ""
    url: str = ""
    skip: int = 0  # let this many matching requests pass first


_OF_QUESTIONS = ("api_status", "api_redirect", "next_page")
_OTHER = bytes(byte ^ 1 for byte in range(256))


@dataclasses.dataclass
class Request:
    """One request as the server saw it."""

    method: str
    path: str
    host: str
    headers: dict[str, str]
    query: dict[str, list[str]]
    status: int = 0
    sent: int = 0  # body bytes written


class FakeHub:
    """The server. `rate` caps each connection's body, `total_rate` all of them together, in bytes per second; 0 is uncapped."""

    def __init__(self, rate: float = 0.0, total_rate: float = 0.0) -> None:
        self.repos: dict[str, HubRepo] = {}
        self.requests: list[Request] = []
        self.tokens: dict[str, str] = {}  # token to user name
        self.roles: dict[str, str] = {}  # token to "write" where it may; any other may only read
        self.orgs: dict[str, tuple[str, ...]] = {}  # user to the organizations that they write for
        self.uploads = Uploads()
        self.rate = rate
        self.total_rate = total_rate
        self.page_size = 20
        self.ranges = True  # false: every file comes whole, whatever was asked for
        self.ended = threading.Event()
        self._faults: list[Fault] = []
        self._lock = threading.Lock()
        self._budget_at = 0.0
        self._server = _Server(("127.0.0.1", 0), self)
        self.port = self._server.server_address[1]
        self.endpoint = f"http://127.0.0.1:{self.port}"
        self.store_host = f"localhost:{self.port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), name="fake-hub", daemon=True)

    def __enter__(self) -> FakeHub:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self._server.shutdown()
        self._server.close_connections()
        self._server.server_close()
        self._thread.join(5)

    def add(self, repo: str, files: Mapping[str, bytes | Path], revision: str = "main", **fields: Any) -> HubRepo:
        """Add (or add to) a repository. Values are contents, or paths of files to serve."""
        entry = self.repos.setdefault(repo, HubRepo(repo))
        for name, value in fields.items():
            setattr(entry, name, value)
        entry.revisions[revision] = {path: make_file(path, source) for path, source in files.items()}
        return entry

    def misbehave(self, *faults: Fault) -> None:
        """Apply these faults to the next matching requests."""
        with self._lock:
            self._faults.extend(faults)

    def transfers(self, path: str = "*") -> list[Request]:
        """The requests that carried file contents (not HEADs, not redirects)."""
        with self._lock:
            return [
                r
                for r in self.requests
                if r.method == "GET" and "/blob-store/" in r.path and fnmatch.fnmatch(unquote(r.path), f"*{path}")
            ]

    def fetched(self, path: str = "*") -> int:
        """Body bytes sent for files that match."""
        return sum(request.sent for request in self.transfers(path))

    def take_fault(self, path: str, *kinds: str) -> Fault | None:
        """The fault to apply to this transfer, if any; `kinds` to those of these kinds alone."""
        with self._lock:
            for fault in self._faults:
                asked = fault.kind in kinds if kinds else fault.kind not in _OF_QUESTIONS
                if not asked or not fnmatch.fnmatch(path, fault.path):
                    continue
                if fault.skip:
                    fault.skip -= 1
                    return None
                fault.times -= 1
                if fault.times <= 0:
                    self._faults.remove(fault)
                return fault
        return None

    def pace(self, count: int, connection_started: float, connection_sent: int) -> None:
        """Sleep so that neither this connection nor all together exceed their rates."""
        waits = [0.0]
        if self.rate:
            waits.append(connection_started + connection_sent / self.rate - time.monotonic())
        if self.total_rate:
            with self._lock:
                now = time.monotonic()
                # At most 50 ms of unused rate may be caught up, so that a cap is a cap at once.
                self._budget_at = max(self._budget_at, now - 0.05) + count / self.total_rate
                waits.append(self._budget_at - now)
        if max(waits) > 0:
            time.sleep(max(waits))


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], hub: FakeHub) -> None:
        self.hub = hub
        self._open: set[socket.socket] = set()
        super().__init__(address, _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._open.discard(request)
        super().shutdown_request(request)

    def close_connections(self) -> None:
        """End keep-alive connections, so that no handler thread outlives the hub."""
        for connection in list(self._open):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that hang up are part of the tests."""


class _Handler(UploadHandler, BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server
    wbufsize = 0
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: object) -> None:
        """Quiet: what came is in hub.requests."""

    def do_GET(self) -> None:
        self._route()

    def do_HEAD(self) -> None:
        self._route()

    def do_POST(self) -> None:
        self._route()

    def do_PUT(self) -> None:
        self._route()

    # Routing -----------------------------------------------------------------------------------

    def _route(self) -> None:
        split = urlsplit(self.path)
        self.hub = self.server.hub
        self.record = Request(
            self.command,
            split.path,
            self.headers.get("Host", ""),
            {name.title(): value for name, value in self.headers.items()},  # clients write them as they like
            parse_qs(split.query, keep_blank_values=True),
        )
        with self.hub._lock:
            self.hub.requests.append(self.record)
        path = split.path
        if fault := self.hub.take_fault(path, "api_status"):
            return self._error(
                fault.code, "", "as ordered", {"Retry-After": fault.retry_after} if fault.retry_after else {}
            )
        if fault := self.hub.take_fault(path, "api_redirect"):
            return self._redirect(fault.url, {})
        if self.upload_route(path):
            return None
        if self.record.host == self.hub.store_host or path.startswith("/blob-store/"):
            return self._store(path)
        if path == "/api/whoami-v2":
            return self._whoami()
        if path == "/api/models":
            return self._search()
        patterns = (
            (r"/api/models/([^/]+/[^/]+)/tree/([^/]+)(?:/(.*))?", self._tree),
            (r"/api/models/([^/]+/[^/]+)/refs", self._refs),
            (r"/api/models/([^/]+/[^/]+)/auth-check", self._auth_check),
            (r"/api/models/([^/]+/[^/]+)/paths-info/([^/]+)", self._paths_info),
            (r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", self._info),
            (r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self._resolve),
        )
        for pattern, handler in patterns:
            if match := re.fullmatch(pattern, path):
                return handler(*(unquote(group) if group is not None else None for group in match.groups()))
        return self._error(404, "EntryNotFound", "No such page")

    # Metadata ----------------------------------------------------------------------------------

    def _token(self) -> str:
        return self.headers.get("Authorization", "").removeprefix("Bearer ").strip()

    def _repo(self, name: str, files: bool = False) -> HubRepo | None:
        repo, token = self.hub.repos.get(name), self._token()
        if token and token not in self.hub.tokens:
            self._error(401, "", "Invalid credentials in Authorization header")
            return None
        if repo is None or (repo.private and token not in repo.accepted_tokens):
            # As the real hub does: without a token one cannot tell missing from private.
            self._error(404 if token else 401, "RepoNotFound", "Repository not found")
            return None
        if files and repo.denied:
            self._error(403, "GatedRepo", "Your request to access this model has been rejected by the repo's authors.")
            return None
        if files and repo.gated and token not in repo.accepted_tokens:
            words = (
                "Access is restricted and you are not in the authorized list."
                if token
                else "You must be authenticated to access it."
            )
            self._error(403 if token else 401, "GatedRepo", f"Access to model {name} is restricted. {words}")
            return None
        return repo

    def _whoami(self) -> None:
        user = self.hub.tokens.get(self._token())
        if user is None:
            return self._error(401, "", "Invalid credentials in Authorization header")
        return self._json(
            {
                "type": "user",
                "id": "1",
                "name": user,
                "fullname": user,
                "orgs": [],
                "auth": {"accessToken": {"role": self.hub.roles.get(self._token(), "read")}},
            }
        )

    def _search(self) -> None:
        query = self.record.query
        words = query.get("search", [""])[0].lower()
        found = [r for r in self.hub.repos.values() if words in r.id.lower() and not r.private]
        if author := query.get("author", [""])[0]:
            found = [r for r in found if r.id.startswith(f"{author}/")]
        for wanted in query.get("filter", []):
            found = [r for r in found if wanted in r.tags]
        key = query.get("sort", ["downloads"])[0]
        found.sort(key=lambda r: r.modified if key == "lastModified" else getattr(r, key, 0), reverse=True)
        size = min(int(query.get("limit", ["1000"])[0]), self.hub.page_size)
        start = int(query.get("cursor", ["0"])[0])
        headers = {}
        if start + size < len(found):
            rest = "&".join(f"{k}={quote(v)}" for k, vs in query.items() if k != "cursor" for v in vs)
            headers["Link"] = f'<{self.hub.endpoint}/api/models?{rest}&cursor={start + size}>; rel="next"'
        if fault := self.hub.take_fault("/api/models", "next_page"):
            headers["Link"] = f'<{fault.url}>; rel="next"'
        return self._json([r.info(next(iter(r.revisions), "main")) for r in found[start : start + size]], headers)

    def _info(self, name: str, revision: str | None) -> None:
        if repo := self._repo(name):
            revision = revision or "main"
            if repo.files(revision) is None:
                return self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return self._json(repo.info(revision))
        return None

    def _tree(self, name: str, revision: str, folder: str | None) -> None:
        if not (repo := self._repo(name)):
            return None
        files = repo.files(revision)
        if files is None:
            return self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        recursive = self.record.query.get("recursive", ["false"])[0].lower() in ("true", "1")
        prefix = f"{folder.rstrip('/')}/" if folder else ""
        entries: list[dict[str, object]] = []
        folders: set[str] = set()
        for path in sorted(p for p in files if p.startswith(prefix)):
            head, slash, _ = path[len(prefix) :].partition("/")
            if slash and prefix + head not in folders:
                folders.add(prefix + head)
                entries.append({"type": "directory", "oid": "0" * 40, "size": 0, "path": prefix + head})
            if not slash or recursive:
                entries.append(files[path].tree_entry())
        return self._json(entries)

    def _refs(self, name: str) -> None:
        if repo := self._repo(name):
            branches = [{"name": b, "ref": f"refs/heads/{b}", "targetCommit": repo.commit(b)} for b in repo.revisions]
            self._json({"branches": branches, "converts": [], "tags": []})

    def _auth_check(self, name: str) -> None:
        if self._repo(name, files=True):
            self._json({})

    def _paths_info(self, name: str, revision: str) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if not (repo := self._repo(name)):
            return None
        files = repo.files(revision)
        if files is None:
            return self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        try:
            paths = json.loads(body)["paths"]
        except (ValueError, KeyError):
            paths = parse_qs(body.decode()).get("paths", [])
        return self._json([files[p].tree_entry() for p in paths if p in files])

    # Files -------------------------------------------------------------------------------------

    def _resolve(self, name: str, revision: str, path: str) -> None:
        if not (repo := self._repo(name, files=True)):
            return None
        files = repo.files(revision)
        if files is None:
            return self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        if path not in files:
            return self._error(404, "EntryNotFound", f"Entry not found: {path}")
        file, commit = files[path], repo.commit(revision) or ""
        headers = {"X-Repo-Commit": commit}
        fault = self.hub.take_fault(path, *(("loop",) if self.command == "HEAD" else ()))
        if fault and fault.kind == "status":
            return self._error(
                fault.code, "", "as ordered", {"Retry-After": fault.retry_after} if fault.retry_after else {}
            )
        if fault and fault.kind == "loop":
            return self._redirect(self.path, headers)
        if fault:
            self.hub.misbehave(dataclasses.replace(fault, times=1, skip=0))  # for the transfer itself
        store = f"/blob-store/{quote(name, safe='')}/{commit}/{quote(path)}"
        if not file.lfs:
            return self._transfer(file, path, headers, files) if self.command == "GET" else self._head(file, headers)
        headers |= {"X-Linked-Size": str(file.size), "X-Linked-ETag": f'"{file.etag}"'}
        return self._redirect(f"http://{self.hub.store_host}{store}", headers)

    def _store(self, path: str) -> None:
        _, _, name, commit, file_path = path.split("/", 4)
        repo = self.hub.repos.get(unquote(name))
        files = repo.files(commit) if repo else None
        if files is None and repo:
            files = next(iter(repo.revisions.values()))  # the file changed behind a signed URL
        file = files.get(unquote(file_path)) if files else None
        if file is None:
            return self._error(404, "", "No such blob")
        return self._transfer(file, unquote(file_path), {}, files) if self.command == "GET" else self._head(file, {})

    def _transfer(
        self, file: HubFile, path: str, headers: dict[str, str], files: dict[str, HubFile] | None = None
    ) -> None:
        fault = self.hub.take_fault(path)
        if fault and fault.kind == "status":
            return self._error(
                fault.code, "", "as ordered", {"Retry-After": fault.retry_after} if fault.retry_after else {}
            )
        if fault and fault.kind in ("change", "other_etag"):
            file = make_file(path, _read(file).translate(_OTHER), file.lfs)
            if fault.kind == "change" and files is not None:
                files[path] = file
        if fault and fault.kind == "portal":
            page = b"<html>Please log in</html>"
            self._start(200, {"Content-Type": "text/html", "Content-Length": str(len(page))})
            self.wfile.write(page)
            return None
        start, stop, status = 0, file.size, 200
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        unchanged = self.headers.get("If-Range", f'"{file.etag}"') == f'"{file.etag}"'
        if wanted and unchanged and self.hub.ranges and not (fault and fault.kind == "ignore_range"):
            start = int(wanted[1])
            stop = min(file.size, int(wanted[2]) + 1) if wanted[2] else file.size
            if start >= file.size:
                return self._error(416, "", "Range Not Satisfiable", {"Content-Range": f"bytes */{file.size}"})
            status = 206
            headers = headers | {"Content-Range": f"bytes {start}-{stop - 1}/{file.size}"}
        self._start(
            status,
            headers
            | {
                "ETag": f'"{file.etag}"',
                "Content-Length": str(stop - start),
                "Accept-Ranges": "bytes",
                "Content-Type": "application/octet-stream",
            },
        )
        self._send(file, start, stop, fault)
        return None

    def _send(self, file: HubFile, start: int, stop: int, fault: Fault | None) -> None:
        began, position = time.monotonic(), start
        limit = start + fault.after if fault and fault.kind in ("cut", "stall") else None
        chunk_size = 1 << 20 if not (self.hub.rate or self.hub.total_rate) else 1 << 16
        stream = file.source.open("rb") if isinstance(file.source, Path) else None
        try:
            while position < stop:
                end = min(stop, position + chunk_size)
                if limit is not None and end > limit:
                    end = max(position, limit)
                if end > position:
                    self._send_piece(
                        file, stream, position, end, bool(fault and fault.kind == "corrupt" and position == start)
                    )
                    self.record.sent += end - position
                    position = end
                    self.hub.pace(min(chunk_size, end - start), began, position - start)
                if limit is not None and position >= limit:
                    if fault and fault.kind == "stall":
                        self.hub.ended.wait(fault.seconds)
                    self.close_connection = True
                    with contextlib.suppress(OSError):
                        self.connection.shutdown(socket.SHUT_RDWR)
                    return
        except OSError:
            self.close_connection = True
        finally:
            if stream:
                stream.close()

    def _send_piece(self, file: HubFile, stream: Any, start: int, end: int, corrupt: bool) -> None:
        if stream is not None and not corrupt:
            offset = start
            while offset < end:
                offset += os.sendfile(self.connection.fileno(), stream.fileno(), offset, end - offset)
            return
        piece = _read(file, start, end)
        if corrupt:
            piece = bytes([piece[0] ^ 0xFF]) + piece[1:]
        self.wfile.write(piece)

    # Answers -----------------------------------------------------------------------------------

    def _head(self, file: HubFile, headers: dict[str, str]) -> None:
        self._start(
            200, headers | {"ETag": f'"{file.etag}"', "Content-Length": str(file.size), "Accept-Ranges": "bytes"}
        )

    def _redirect(self, location: str, headers: dict[str, str]) -> None:
        self._start(302, headers | {"Location": location, "Content-Length": "0"})

    def _json(self, value: object, headers: Mapping[str, str] | None = None) -> None:
        body = json.dumps(value).encode()
        self._start(200, {"Content-Type": "application/json", "Content-Length": str(len(body)), **(headers or {})})
        if self.command != "HEAD":
            self.wfile.write(body)

    def _error(self, status: int, code: str, words: str, headers: Mapping[str, str] | None = None) -> None:
        body = json.dumps({"error": words}).encode()
        extra = {"X-Error-Code": code, "X-Error-Message": words} if code else {"X-Error-Message": words}
        self._start(
            status, {"Content-Type": "application/json", "Content-Length": str(len(body)), **extra, **(headers or {})}
        )
        if self.command != "HEAD":
            self.wfile.write(body)

    def _start(self, status: int, headers: Mapping[str, str]) -> None:
        self.record.status = status
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()


def _read(file: HubFile, start: int = 0, end: int | None = None) -> bytes:
    if isinstance(file.source, bytes):
        return file.source[start:end]
    with file.source.open("rb") as stream:
        stream.seek(start)
        return stream.read(-1 if end is None else end - start)
