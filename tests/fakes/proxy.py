"""A loopback forward proxy: passes plain requests on and makes tunnels for https, to the places that it knows alone.

    with FakeProxy({"hub.example": hub.port}) as proxy:
        os.environ["HTTP_PROXY"] = os.environ["HTTPS_PROXY"] = proxy.address

Names that it does not know answer 502, as those that do not exist. Every request is kept in `proxy.seen`.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import http.client
import socket
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler
from urllib.parse import urlsplit

from tests.fakes.loopback_server import LoopbackServer


@dataclasses.dataclass
class Passed:
    """One request as the proxy saw it: `path` is "" in a tunnel, which it cannot look into."""

    method: str
    host: str
    path: str
    login: str  # user:password, "" when none came


class FakeProxy:
    """The proxy.

    Args:
        places: ports on 127.0.0.1 by host name. login: `user:password` that it wants; "" takes everybody.
    """

    def __init__(self, places: Mapping[str, int], login: str = "") -> None:
        self.places = dict(places)
        self.login = login
        self.seen: list[Passed] = []
        self.refused = 0
        self._server = _Server(self)
        self.port: int = self._server.server_address[1]
        self.address = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), name="fake-proxy", daemon=True)

    def __enter__(self) -> FakeProxy:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.end()
        self._thread.join(5)

    def hosts(self, method: str = "") -> list[str]:
        """Whom it was asked for, in order."""
        return [passed.host for passed in list(self.seen) if method in ("", passed.method)]


class _Server(LoopbackServer):
    def __init__(self, proxy: FakeProxy) -> None:
        self.proxy = proxy
        super().__init__(_Handler)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, format: str, *args: object) -> None:
        """Quiet: what came is in proxy.seen."""

    def _place(self, host: str, path: str) -> int | None:
        """Where to; None when this has been answered already."""
        proxy, given = self.server.proxy, self.headers.get("Proxy-Authorization", "")
        login = base64.b64decode(given.removeprefix("Basic ")).decode() if given.startswith("Basic ") else ""
        if proxy.login and login != proxy.login:
            proxy.refused += 1
            self._say(407, "Proxy Authentication Required", {"Proxy-Authenticate": 'Basic realm="proxy"'})
            return None
        proxy.seen.append(Passed(self.command, host, path, login))
        if host not in proxy.places:
            self._say(502, "Bad Gateway", {})
            return None
        return proxy.places[host]

    def _say(self, status: int, words: str, headers: Mapping[str, str]) -> None:
        self.send_response(status, words)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_CONNECT(self) -> None:
        port = self._place(self.path.rpartition(":")[0], "")
        if port is None:
            return
        with socket.create_connection(("127.0.0.1", port), timeout=30) as there:
            self.send_response(200, "Connection established")
            self.end_headers()
            back = threading.Thread(target=_pump, args=(there, self.connection), daemon=True)
            back.start()
            _pump(self.connection, there)
            back.join(5)
        self.close_connection = True

    def _pass_on(self) -> None:
        target = urlsplit(self.path)
        port = self._place(target.hostname or "", target.path)
        if port is None:
            return
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        headers = {name: value for name, value in self.headers.items() if not name.lower().startswith("proxy-")}
        connection.request(
            self.command, f"{target.path}?{target.query}" if target.query else target.path, None, headers
        )
        answer = connection.getresponse()
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("server", "date", "connection"):
                self.send_header(name, value)
        self.end_headers()
        with contextlib.suppress(OSError):
            while piece := answer.read(1 << 16):
                self.wfile.write(piece)
        connection.close()

    do_GET = do_HEAD = _pass_on


def _pump(source: socket.socket, target: socket.socket) -> None:
    """Everything from one to the other, until it ends."""
    with contextlib.suppress(OSError):
        while piece := source.recv(1 << 16):
            target.sendall(piece)
    for end, how in ((target, socket.SHUT_WR), (source, socket.SHUT_RD)):
        with contextlib.suppress(OSError):
            end.shutdown(how)
