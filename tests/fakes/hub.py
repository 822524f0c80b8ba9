"""A loopback hub that the real huggingface_hub client accepts, and that misbehaves on order.

    with FakeHub() as hub:
        hub.add("user/tiny", {"config.json": b"{}", "model.safetensors": data})
        hub.misbehave(Fault("cut", path="model.safetensors", after=1000))
        HfApi(endpoint=hub.endpoint).model_info("user/tiny")

Small files are served by the hub itself, LFS files by a redirect to another host name (`localhost` instead of
`127.0.0.1`), as the real hub redirects to its file store. Every request is kept in `hub.requests`.
"""

from __future__ import annotations

import fnmatch
import json
import re
import threading
import time
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from tests.fakes.hub_content import HubFile, HubRepo, make_file
from tests.fakes.hub_faults import OF_QUESTIONS, Fault, Request
from tests.fakes.hub_metadata import MetadataHandler
from tests.fakes.hub_transfers import TransferHandler
from tests.fakes.hub_upload import UploadHandler, Uploads
from tests.fakes.loopback_server import LoopbackServer

__all__ = ["FakeHub", "Fault", "Request"]


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
        self.xet = (
            False  # large files say that they lie in xet, whose bridge serves ranges, and wholes up to `whole` bytes
        )
        self.whole = 0
        self.ranges = True  # false: every file comes whole, whatever was asked for
        self.ended = threading.Event()
        self._faults: list[Fault] = []
        self._lock = threading.Lock()
        self._budget_at = 0.0
        self._server = _Server(self)
        self.port = self._server.server_address[1]
        self.endpoint = f"http://127.0.0.1:{self.port}"
        self.store_host = f"localhost:{self.port}"
        self.store_scheme = "http"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), name="fake-hub", daemon=True)

    def __enter__(self) -> FakeHub:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self._server.end()
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
                asked = fault.kind in kinds if kinds else fault.kind not in OF_QUESTIONS
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


class _Server(LoopbackServer):
    def __init__(self, hub: FakeHub) -> None:
        self.hub = hub
        super().__init__(_Handler)


class _Handler(MetadataHandler, TransferHandler, UploadHandler, BaseHTTPRequestHandler):
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
