"""What tests of downloads share: a transfer of one file from a fake hub, and a task child as the window starts it."""

from __future__ import annotations

import contextlib
import hashlib
import random
import shutil
import ssl
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from app.engine import protocol
from app.engine.client import EngineClient
from app.hub.files import DownloadNews, DownloadResult, RemoteFile
from app.hub.progressing import Progressing
from app.hub.source import HttpSource
from app.hub.transfer import Transfer
from tests import seeds
from tests.fakes.hub import FakeHub

FILE = "model.gguf"


def random_bytes(count: int) -> bytes:
    """Bytes that differ from run to run; the seed is printed by a failing test's captured output."""
    seed = seeds.fresh(1 << 32)
    print(f"seed {seed}")
    return random.Random(seed).randbytes(count)


def remote(
    hub: FakeHub, path: str = FILE, repo: str = "user/tiny", *, commit: str = "", checksum: bool = True
) -> RemoteFile:
    """A file as a listing gives it."""
    file = hub.repos[repo].revisions["main"][path]
    return RemoteFile(
        repo=repo,
        commit=commit or hub.repos[repo].commit("main") or "",
        path=path,
        size=file.size,
        sha256=file.sha256 if file.lfs and checksum else "",
        git_oid=file.git_oid if not file.lfs and checksum else "",
    )


class Told(Progressing):
    """What a transfer told."""

    def __init__(self) -> None:
        self.waits: list[tuple[float, str]] = []
        self.came = 0

    def arrived(self, count: int) -> None:
        self.came += count

    def waiting(self, seconds: float, why: str) -> None:
        if why:
            self.waits.append((seconds, why))


def fetch(
    hub: FakeHub,
    target: Path,
    file: RemoteFile | None = None,
    *,
    token: str = "",
    told: Told | None = None,
    timeout: float = 1.0,
) -> Path:
    """One transfer in this process."""
    source = HttpSource(hub.endpoint, token, timeout=timeout)
    try:
        return Transfer(source, file or remote(hub), target, progress=told).run()
    finally:
        source.close()


def sha256(path: Path) -> str:
    """Of a file on disk."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def task_child(log: Path) -> EngineClient:
    """A child as the window starts one for downloads."""
    return EngineClient(python=Path(sys.executable), backend="", log_path=log)


def parameters(hub: FakeHub, folder: Path, *paths: str, repo: str = "user/tiny", **more: object) -> str:
    """Of the task `download`, as JSON."""
    files = [remote(hub, path, repo) for path in paths or (FILE,)]
    return msgspec.json.encode(
        {
            "endpoint": hub.endpoint,
            "repo": repo,
            "revision": "main",
            "commit": files[0].commit,
            "files": files,
            "folder": str(folder),
            "timeout": 2.0,
            **more,
        }
    ).decode()


def run_task(child: EngineClient, text: str) -> tuple[DownloadResult, list[DownloadNews]]:
    """Run a download to its end. Raises WeftError."""
    news: list[DownloadNews] = []
    result: DownloadResult | None = None
    for event in child.call(protocol.RunTask(task="download", parameters=text)):
        if isinstance(event, protocol.News):
            news.append(msgspec.json.decode(event.json, type=DownloadNews))
        elif isinstance(event, protocol.Done):
            assert isinstance(event.result, protocol.TaskResult)
            result = msgspec.json.decode(event.result.json, type=DownloadResult)
    assert result is not None
    return result, news


@contextlib.contextmanager
def behind_https(folder: Path) -> Iterator[tuple[FakeHub, Path]]:
    """A hub behind https on this machine's own address, and its certificate. Skips where no certificate can be made."""
    if shutil.which("openssl") is None:
        pytest.skip("no openssl program here to make a certificate")
    key, certificate = folder / "key.pem", folder / "cert.pem"
    words = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=nobody -addext subjectAltName=IP:127.0.0.1,DNS:hub.example,DNS:store.example"
    subprocess.run(["openssl", *words.split(), "-keyout", key, "-out", certificate], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with FakeHub() as made:
        made._server.socket = context.wrap_socket(made._server.socket, server_side=True, do_handshake_on_connect=False)
        made.endpoint = f"https://127.0.0.1:{made.port}"
        yield made, certificate
