"""Downloads through a proxy, from the question to the last byte: plain and through tunnels, around it, and when it refuses."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from app.core.errors import ErrorKind, WeftError
from app.hub import patience, transfer
from app.hub.files import RemoteFile
from app.hub.listing import Hub
from app.hub.proxies import proxy_for
from app.hub.questions import configure
from app.hub.reference import parse_reference
from app.hub.source import HttpSource
from app.hub.transfer import Transfer
from tests.fakes.hub import FakeHub
from tests.fakes.hub_kit import FILE, behind_https, random_bytes
from tests.fakes.proxy import FakeProxy

STORE = "store.example"
LOGIN = "someone:a secret"
pytestmark = pytest.mark.fault


@pytest.fixture(params=["http", "https"])
def far(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A hub and its store under names that nothing but a proxy can find."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setattr(transfer, "STRETCH", 256 * 1024)  # so that a small file needs all its connections
    monkeypatch.setattr(patience, "retry_delay", lambda *_: 0.01)
    if request.param == "http":
        with FakeHub() as hub:
            yield _filled(hub, "http")
        return
    with behind_https(tmp_path) as (hub, certificate):
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate))
        yield _filled(hub, "https")


def _filled(hub: FakeHub, scheme: str) -> FakeHub:
    hub.add("user/tiny", {FILE: random_bytes(2 * 2**20), "notes.txt": b"plain files come from the hub itself"})
    # Without a port, as the real one: the proxy knows which it is.
    hub.endpoint, hub.store_host, hub.store_scheme = f"{scheme}://hub.example", STORE, scheme
    return hub


def ask(hub: FakeHub, proxy: str = "") -> tuple[RemoteFile, ...]:
    from huggingface_hub import close_session

    try:
        configure(hub.endpoint, proxy, timeout=5)
        return Hub(hub.endpoint).list_files(parse_reference("user/tiny")).files
    finally:
        close_session()


def fetch(hub: FakeHub, files: tuple[RemoteFile, ...], folder: Path, proxy: str = "") -> None:
    source = HttpSource(hub.endpoint, proxy=proxy, timeout=5)
    try:
        for file in files:
            target = Transfer(source, file, folder / file.path, connections=4).run()
            assert target.read_bytes() == hub.repos["user/tiny"].revisions["main"][file.path].source
    finally:
        source.close()


def failure(work: Any, *arguments: Any) -> WeftError:
    with pytest.raises(WeftError) as caught:
        work(*arguments)
    return caught.value


def places(hub: FakeHub) -> dict[str, int]:
    return {"hub.example": hub.port, STORE: hub.port}


@pytest.mark.parametrize("chosen", [True, False], ids=["settings", "environment"])
def test_questions_and_all_bytes_go_through_the_proxy(
    far: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chosen: bool
) -> None:
    with FakeProxy(places(far), LOGIN) as proxy:
        address = proxy.address.replace("//", "//someone:a%20secret@")
        if not chosen:
            monkeypatch.setenv("HTTPS_PROXY" if far.endpoint.startswith("https") else "HTTP_PROXY", address)
            address = ""
        files = ask(far, address)
        asked = len(far.requests)
        assert asked and len(files) == 2
        fetch(far, files, tmp_path / "tiny", address)
    assert all(passed.login == LOGIN for passed in proxy.seen)
    # Names that nothing else can find, so each byte came through it; and no connection was made for show alone.
    if far.endpoint.startswith("https"):
        assert proxy.hosts("CONNECT").count("hub.example") >= 2 and proxy.hosts("CONNECT").count(STORE) == 4
        return
    paths = [f"{passed.host}{passed.path}" for passed in proxy.seen if passed.method == "GET"]
    assert any(path.startswith("hub.example/api/models/user/tiny") for path in paths)
    assert any("/resolve/" in path and path.endswith("notes.txt") for path in paths)
    assert sum(path.startswith(f"{STORE}/blob-store/") for path in paths) == 8
    assert len(proxy.seen) == len(far.requests)
    assert not any("Proxy-Authorization" in request.headers for request in far.requests)


@pytest.mark.parametrize(
    ("straight", "through"),
    [("hub.example", {STORE}), (f".{STORE}", {"hub.example"}), ("example", set())],
)
def test_no_proxy_is_obeyed_for_each_host(
    far: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, straight: str, through: set[str]
) -> None:
    """Names that are to be reached without the proxy are found here, at the hub's port."""
    real = socket.getaddrinfo

    def find(host: Any, port: Any, *rest: Any, **named: Any) -> Any:
        name = host.decode() if isinstance(host, bytes) else host
        if name in places(far):
            return real("127.0.0.1", far.port, *rest, **named)
        return real(host, port, *rest, **named)

    monkeypatch.setattr(socket, "getaddrinfo", find)
    with FakeProxy(places(far)) as proxy:
        monkeypatch.setenv("HTTP_PROXY", proxy.address)
        monkeypatch.setenv("HTTPS_PROXY", proxy.address)
        monkeypatch.setenv("NO_PROXY", f"elsewhere.example,{straight}")
        files = ask(far)
        assert ("hub.example" in proxy.hosts()) == ("hub.example" in through)
        fetch(far, files, tmp_path / "tiny")
    assert set(proxy.hosts()) == through
    assert len(far.transfers(FILE)) == 8


def test_a_proxy_that_wants_a_login_says_so_at_once(
    far: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with FakeProxy(places(far), LOGIN) as proxy:
        files = ask(far, proxy.address.replace("//", "//someone:a%20secret@"))
        passed = len(proxy.seen)
        for wrong in (proxy.address, proxy.address.replace("//", "//someone:guessed@")):
            before = proxy.refused
            for error in (failure(ask, far, wrong), failure(fetch, far, files, tmp_path / "tiny", wrong)):
                assert error.kind is ErrorKind.PERMISSION and "user name and password" in error.message
                assert "Settings" in error.hint and "guessed" not in str(error)
            assert proxy.refused - before <= 4  # a wrong password is not tried again and again
        assert len(proxy.seen) == passed
    assert not (tmp_path / "tiny" / FILE).exists()


def test_a_proxy_that_is_dead_or_knows_no_hub_is_said(
    far: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with FakeProxy(places(far)) as proxy:
        files = ask(far, proxy.address)
        proxy.places.clear()
        if far.endpoint.startswith("https"):  # in the open its 502 cannot be told from one of the hub's
            assert "proxy" in failure(ask, far, proxy.address).message.lower()
            assert "proxy" in failure(fetch, far, files, tmp_path / "tiny", proxy.address).message.lower()
    for variable in ("HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(variable, proxy.address)
    for error in (failure(ask, far), failure(fetch, far, files, tmp_path / "tiny")):
        assert error.kind is ErrorKind.NETWORK and error.message == "The proxy could not be reached or refused."
        assert "Settings" in error.hint and "HTTPS_PROXY" in error.hint


@pytest.mark.parametrize("proxy", ["socks5://127.0.0.1:9", "http://", "http://[::1", "nonsense:no"])
def test_what_is_no_http_proxy_is_refused_in_words(monkeypatch: pytest.MonkeyPatch, proxy: str) -> None:
    monkeypatch.setenv("ALL_PROXY", proxy)
    for work in (lambda: configure("https://hub.example"), lambda: HttpSource("https://hub.example").locate(_FILE)):
        error = failure(work)
        assert error.kind in (ErrorKind.UNSUPPORTED, ErrorKind.BAD_INPUT)
        assert "HTTPS_PROXY" in error.message + error.hint


_FILE = RemoteFile(repo="user/tiny", commit="0" * 40, path=FILE, size=1)


def test_proxies_come_from_the_settings_else_from_the_system(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", "http://system:1")
    monkeypatch.setenv("no_proxy", "inside.example, near.example:444,10.0.0.0/8,fd00::/8")
    assert proxy_for("https://hub.example/x") == "http://system:1"
    assert proxy_for("https://inside.example/x") == "" == proxy_for("https://deep.inside.example:99/x")
    assert proxy_for("https://near.example:444/x") == "" and proxy_for("https://near.example/x")
    assert proxy_for("https://10.9.8.7/x") == "" == proxy_for("https://[fd00::1]:8443/x") and proxy_for(
        "https://11.0.0.1/"
    )
    assert proxy_for("https://hub.example/x", "mine:2") == "http://mine:2"
    assert proxy_for("http://127.0.0.1:5/x", "mine:2") == ""
    monkeypatch.setenv("no_proxy", "*")
    assert proxy_for("https://hub.example/x") == ""
