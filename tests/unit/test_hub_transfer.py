"""One file from a hub that misbehaves: cut, stalled, corrupt, changed, slow, redirecting in circles."""

from __future__ import annotations

import os
import random
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from app.core.errors import ErrorKind, WeftError
from app.hub import transfer
from app.hub.journal import PartHeader
from app.hub.part import arrived_bytes
from app.hub.source import HttpSource, HttpTrouble, Located
from app.hub.transfer import Transfer
from tests.fakes.hub import FakeHub, Fault
from tests.fakes.hub_kit import FILE, Told, behind_https, fetch, random_bytes, remote, sha256

MB = 1_000_000
pytestmark = pytest.mark.fault


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with FakeHub() as made:
        yield made


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Backoff in hundredths of a second; a Retry-After counts as it is."""
    from app.hub import patience
    from app.hub.limits import retry_delay

    monkeypatch.setattr(
        patience, "retry_delay", lambda tries, after, date: retry_delay(tries, after, date) if after else 0.02
    )


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("size", [0, 1, 1000, 3 * MB, 70 * 2**20 + 1])
def test_files_of_every_size_arrive_whole(hub: FakeHub, tmp_path: Path, size: int) -> None:
    data = os.urandom(size)
    hub.add("user/tiny", {FILE: data, "plain.txt": data[:100_000]})
    for path in (FILE, "plain.txt"):
        target = fetch(hub, tmp_path / path, remote(hub, path))
        assert target.read_bytes() == (data if path == FILE else data[:100_000])
    assert names(tmp_path) == [FILE, "plain.txt"]
    assert hub.fetched(FILE) == size


def test_a_connection_that_is_cut_goes_on_from_there(hub: FakeHub, tmp_path: Path) -> None:
    data = random_bytes(9 * MB)
    hub.add("user/tiny", {FILE: data})
    hub.misbehave(Fault("cut", path=FILE, after=MB, times=6))
    assert fetch(hub, tmp_path / FILE).read_bytes() == data
    assert hub.fetched() < 10 * MB
    first, *others = [request.headers for request in hub.transfers()]
    assert "Range" not in first and len(others) == 6
    assert all(sent["Range"].startswith("bytes=") and sent["If-Range"] == f'"{remote(hub).sha256}"' for sent in others)


def test_a_file_is_on_the_disk_before_it_has_its_name(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("user/tiny", {FILE: random_bytes(MB)})
    target, flushed, real = tmp_path / FILE, [], os.fsync

    def flush(handle: int) -> None:
        real(handle)
        flushed.append((os.fstat(handle).st_ino, target.exists()))

    monkeypatch.setattr(os, "fsync", flush)
    fetch(hub, target)
    assert (target.stat().st_ino, False) in flushed
    assert os.name == "nt" or flushed[-1] == (tmp_path.stat().st_ino, True)  # and so is the name


def test_a_stalled_connection_is_given_up_and_tried_again(hub: FakeHub, tmp_path: Path) -> None:
    data = random_bytes(4 * MB)
    hub.add("user/tiny", {FILE: data})
    hub.misbehave(Fault("stall", path=FILE, after=MB, seconds=60))
    told, started = Told(), time.monotonic()
    assert fetch(hub, tmp_path / FILE, told=told, timeout=0.5).read_bytes() == data
    assert time.monotonic() - started < 20
    assert any("stopped answering" in why for _, why in told.waits)


@pytest.mark.parametrize("size", [3 * MB, 40 * 2**20])
def test_a_server_that_ignores_ranges_is_served_from_the_start(hub: FakeHub, tmp_path: Path, size: int) -> None:
    data = os.urandom(size)
    hub.add("user/tiny", {FILE: data})
    hub.misbehave(Fault("cut", path=FILE, after=2 * MB), Fault("ignore_range", path=FILE, times=50))
    assert fetch(hub, tmp_path / FILE).read_bytes() == data


def test_a_server_without_ranges_that_always_cuts_is_given_up(hub: FakeHub, tmp_path: Path) -> None:
    hub.add("user/tiny", {FILE: os.urandom(40 * 2**20)})
    hub.ranges = False
    hub.misbehave(Fault("cut", path=FILE, after=MB, times=500))
    with pytest.raises(WeftError) as caught:
        fetch(hub, tmp_path / FILE)
    assert caught.value.kind is ErrorKind.NETWORK
    assert FILE not in names(tmp_path)


def test_damage_of_the_same_size_is_fetched_once_more_and_then_right(hub: FakeHub, tmp_path: Path) -> None:
    data = random_bytes(2 * MB)
    hub.add("user/tiny", {FILE: data})
    hub.misbehave(Fault("corrupt", path=FILE))
    assert fetch(hub, tmp_path / FILE).read_bytes() == data
    assert names(tmp_path) == [FILE]  # what was set aside is proven worthless, and gone
    assert hub.fetched() == 4 * MB


def test_damage_twice_is_set_aside_and_never_gets_the_name(hub: FakeHub, tmp_path: Path) -> None:
    hub.add("user/tiny", {FILE: random_bytes(2 * MB)})
    (tmp_path / "earlier.gguf").write_bytes(b"earlier")
    hub.misbehave(Fault("corrupt", path=FILE, times=9))
    with pytest.raises(WeftError) as caught:
        fetch(hub, tmp_path / FILE)
    assert caught.value.kind is ErrorKind.CORRUPT
    assert f"{FILE}.damaged" in caught.value.hint
    assert FILE not in names(tmp_path) and f"{FILE}.damaged" in names(tmp_path)
    assert (tmp_path / "earlier.gguf").read_bytes() == b"earlier"
    assert hub.fetched() == 4 * MB  # twice, and no more


def test_damage_of_plain_files_is_found_by_git_s_hash(hub: FakeHub, tmp_path: Path) -> None:
    hub.add("user/tiny", {"config.json": b'{"hidden_size": 64}'})
    hub.misbehave(Fault("corrupt", path="config.json", times=9))
    with pytest.raises(WeftError, match="damaged twice"):
        fetch(hub, tmp_path / "config.json", remote(hub, "config.json"))
    assert "config.json" not in names(tmp_path)


def test_a_file_that_changed_between_runs_is_never_spliced(hub: FakeHub, tmp_path: Path) -> None:
    before, after = random_bytes(6 * MB), random_bytes(6 * MB)
    hub.add("user/tiny", {FILE: before})
    hub.misbehave(Fault("cut", path=FILE, after=2 * MB, times=40))
    old = remote(hub, commit="main")
    with pytest.raises(WeftError):
        stop_after(hub, tmp_path / FILE, old, 2 * MB)
    assert arrived_bytes(tmp_path / FILE) >= MB
    hub.add("user/tiny", {FILE: after})
    hub._faults.clear()
    with pytest.raises(WeftError, match="another file on the hub"):  # its list promises the old content
        fetch(hub, tmp_path / FILE, old)
    assert FILE not in names(tmp_path)
    assert fetch(hub, tmp_path / FILE, remote(hub, commit="main")).read_bytes() == after


def stop_after(hub: FakeHub, target: Path, file: object, count: int) -> None:
    """Cancel a transfer once so many bytes have come."""
    cancelled = threading.Event()

    class Stopping(Told):
        def arrived(self, came: int) -> None:
            super().arrived(came)
            if self.came >= count:
                cancelled.set()

    Transfer(HttpSource(hub.endpoint), file, target, progress=Stopping(), cancelled=cancelled).run()  # type: ignore[arg-type]


@pytest.mark.parametrize("checksum", [True, False])
def test_a_store_whose_etag_changes_between_parts_starts_over(hub: FakeHub, tmp_path: Path, checksum: bool) -> None:
    data = random_bytes(9 * MB)
    hub.add("user/tiny", {FILE: data})
    file = remote(hub, commit="main", checksum=checksum)
    hub.misbehave(Fault("cut", path=FILE, after=3 * MB), Fault("change", path=FILE))
    if checksum:  # the list names what the file was: it may not become another one
        with pytest.raises(WeftError, match="another file on the hub"):
            fetch(hub, tmp_path / FILE, file)
        assert FILE not in names(tmp_path)
        return
    after = fetch(hub, tmp_path / FILE, file).read_bytes()
    assert after == data.translate(bytes(byte ^ 1 for byte in range(256))) != data  # the new one, whole
    assert hub.fetched() >= 12 * MB  # what had come of the old one was thrown away


@pytest.mark.parametrize("checksum", [True, False])
def test_connections_that_open_at_once_never_mix_two_versions(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checksum: bool
) -> None:
    """One of the first answers, when no ETag is known yet, is of another version."""
    monkeypatch.setattr(transfer, "STRETCH", 2**20)
    hub.rate = 8 * MB  # so that all are open before one is through
    data = random_bytes(6 * 2**20)
    hub.add("user/tiny", {FILE: data})
    hub.misbehave(Fault("other_etag", path=FILE, skip=1))
    assert fetch(hub, tmp_path / FILE, remote(hub, checksum=checksum)).read_bytes() == data
    assert not (tmp_path / f"{FILE}.damaged").exists()


def test_a_log_in_page_costs_nothing_of_what_has_arrived(hub: FakeHub, tmp_path: Path) -> None:
    data = random_bytes(9 * MB)
    hub.add("user/tiny", {FILE: data})
    hub.misbehave(
        Fault("portal", path=FILE), Fault("cut", path=FILE, after=6 * MB), Fault("portal", path=FILE, times=3)
    )
    assert fetch(hub, tmp_path / FILE).read_bytes() == data
    assert hub.fetched() < 10 * MB


def test_what_has_arrived_serves_at_another_commit_and_on_a_mirror(hub: FakeHub, tmp_path: Path) -> None:
    data = random_bytes(9 * MB)
    hub.add("user/tiny", {FILE: data, "README.md": b"one"})
    hub.rate = 9 * MB
    with pytest.raises(WeftError):
        stop_after(hub, tmp_path / FILE, remote(hub), 4 * MB)
    kept = arrived_bytes(tmp_path / FILE)
    assert kept >= 3 * MB
    first = remote(hub).commit
    with FakeHub() as mirror:
        mirror.add("user/tiny", {FILE: data, "README.md": b"two"})
        assert remote(mirror).commit != first
        assert fetch(mirror, tmp_path / FILE).read_bytes() == data
        assert mirror.fetched() == 9 * MB - kept


def test_what_arrived_without_checksum_and_etag_is_not_continued() -> None:
    named = PartHeader(url="u", size=9, etag="e")
    assert named.continues(named)
    for other in (
        PartHeader(url="u", size=9, etag="f"),
        PartHeader(url="v", size=9, etag="e"),
        PartHeader(url="u", size=8, etag="e"),
        PartHeader(url="u", size=9, etag=""),
        PartHeader(url="u", size=9, etag="e", sha256="a"),
    ):
        assert not other.continues(named) and not named.continues(other)
    nothing = PartHeader(url="u", size=9, etag="")
    assert not nothing.continues(nothing)
    summed = PartHeader(url="u", size=9, etag="e", sha256="a")
    assert PartHeader(url="v", size=9, etag="f", sha256="a").continues(summed)
    assert not PartHeader(url="u", size=9, etag="f", sha256="a").continues(summed)


def test_a_retry_after_that_is_a_date_is_obeyed(hub: FakeHub, tmp_path: Path) -> None:
    from email.utils import formatdate

    hub.add("user/tiny", {FILE: random_bytes(MB)})
    hub.misbehave(Fault("status", path=FILE, code=503, retry_after=formatdate(time.time() + 3, usegmt=True)))
    started = time.monotonic()
    fetch(hub, tmp_path / FILE)
    assert 1.9 <= time.monotonic() - started < 15


def test_somebody_s_own_file_is_moved_away_and_not_overwritten(hub: FakeHub, tmp_path: Path) -> None:
    hub.add("user/tiny", {FILE: random_bytes(MB)})
    for number in range(2):
        (tmp_path / FILE).write_bytes(b"mine %d" % number)
        source = HttpSource(hub.endpoint)
        transfer = Transfer(source, remote(hub), tmp_path / FILE, keep_old=True)
        transfer.run()
        source.close()
        assert transfer.old is not None and transfer.old.read_bytes() == b"mine %d" % number
        assert sha256(tmp_path / FILE) == remote(hub).sha256


@pytest.mark.attack
def test_headers_that_are_nonsense_end_in_words(hub: FakeHub) -> None:
    source = HttpSource("https://hub.example", "hf_two\nlines")
    with pytest.raises(WeftError) as caught:
        source._request("GET", f"{hub.endpoint}/x", {}, True)
    assert "hf_" not in str(caught.value) and caught.value.__cause__ is None
    for target in ("http://[::1", "https://hub.example:99999/x", "https://hub.example:no/"):
        with pytest.raises(WeftError, match="not a web address"):
            source._next("https://hub.example/a", target, True)


def test_503_is_tried_again_and_then_said(hub: FakeHub, tmp_path: Path) -> None:
    data = random_bytes(MB)
    hub.add("user/tiny", {FILE: data})
    hub.misbehave(Fault("status", path=FILE, code=503, times=5))
    assert fetch(hub, tmp_path / FILE).read_bytes() == data
    (tmp_path / FILE).unlink()
    hub.misbehave(Fault("status", path=FILE, code=502, times=1000))
    asked = len(hub.requests)
    with pytest.raises(WeftError) as caught:
        fetch(hub, tmp_path / FILE)
    assert caught.value.kind is ErrorKind.NETWORK and "502" in caught.value.message
    assert len(hub.requests) - asked < 60  # bounded


def test_429_waits_as_long_as_it_is_told_and_says_so(hub: FakeHub, tmp_path: Path) -> None:
    hub.add("user/tiny", {FILE: random_bytes(MB)})
    hub.misbehave(Fault("status", path=FILE, code=429, retry_after="2"))
    told, started = Told(), time.monotonic()
    fetch(hub, tmp_path / FILE, told=told)
    assert 2 <= time.monotonic() - started < 15
    assert any(seconds > 1.5 and "slow down" in why for seconds, why in told.waits)


def test_redirects_in_a_circle_end_in_words(hub: FakeHub, tmp_path: Path) -> None:
    hub.add("user/tiny", {"notes.txt": b"hello"})
    hub.misbehave(Fault("loop", times=1000))
    with pytest.raises(WeftError, match="in a circle") as caught:
        fetch(hub, tmp_path / "notes.txt", remote(hub, "notes.txt"))
    assert caught.value.hint
    assert len(hub.requests) < 20
    hub._faults.clear()
    hub.requests.clear()
    located = HttpSource(hub.endpoint)
    located.locate(remote(hub, "notes.txt"))
    hub.misbehave(Fault("loop", times=1000))
    with pytest.raises(HttpTrouble, match="in a circle"):  # also when it begins after the address was known
        located.open(remote(hub, "notes.txt"), 0, 5)
    assert len(hub.requests) < 20
    located.close()


@pytest.mark.attack
def test_from_https_to_http_is_refused() -> None:
    source = HttpSource("https://hub.example")
    with pytest.raises(WeftError) as caught:
        source._next("https://hub.example/a", "http://hub.example/a", True)
    assert caught.value.kind is ErrorKind.HOSTILE
    for target in ("ftp://x/y", "file:///etc/passwd", "", "javascript:1"):
        with pytest.raises(WeftError):
            source._next("https://hub.example/a", target, True)


@pytest.mark.attack
@pytest.mark.parametrize(
    ("target", "kept"),
    [
        ("https://hub.example/b", True), ("/b", True), ("https://cdn.example/b", False), ("https://hub.example:8443/b", False),
        ("https://hub.example.evil.org/b", False), ("https://hub.example@evil.org/b", False), ("//evil.org/b", False),
    ],
)  # fmt: skip
def test_the_token_stays_with_its_host(target: str, kept: bool) -> None:
    assert HttpSource("https://hub.example", "hf_x")._next("https://hub.example/a", target, True)[1] is kept


@pytest.mark.attack
def test_the_token_reaches_the_hub_and_no_store(hub: FakeHub, tmp_path: Path) -> None:
    hub.tokens["hf_good"] = "me"
    hub.add("user/tiny", {FILE: random_bytes(MB), "a.txt": b"a"}, gated=True, accepted_tokens={"hf_good"})
    for path in (FILE, "a.txt"):
        fetch(hub, tmp_path / path, remote(hub, path), token="hf_good")
    with_token = {request.host for request in hub.requests if "Authorization" in request.headers}
    without = {request.host for request in hub.requests if "Authorization" not in request.headers}
    assert with_token == {f"127.0.0.1:{hub.port}"}
    assert without == {hub.store_host}


def test_a_signed_address_that_expired_is_asked_for_again(hub: FakeHub, tmp_path: Path) -> None:
    data = random_bytes(MB)
    hub.add("user/tiny", {FILE: data})
    source, file = HttpSource(hub.endpoint), remote(hub)
    right = source.locate(file)
    expired = right.url.replace("/blob-store/", "/blob-store/expired")
    source._located[file.url(hub.endpoint)] = Located(url=expired, etag=right.etag, size=right.size, with_token=False)
    with pytest.raises(HttpTrouble) as caught:
        source.open(file, 0, file.size)
    assert caught.value.retry
    opened = source.open(file, 0, file.size)
    assert opened.response.read() == data
    source.close()


def test_a_file_that_lies_in_xet_comes_over_the_bridge_in_ranges(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one that is too large for the bridge to send in one answer."""
    monkeypatch.setattr(transfer, "STRETCH", 2**20)
    hub.xet, hub.whole = True, 2 * MB
    data = random_bytes(5 * MB)
    hub.add("user/tiny", {FILE: data})
    assert fetch(hub, tmp_path / FILE).read_bytes() == data
    assert all("Range" in request.headers and request.status == 206 for request in hub.transfers())
    assert hub.fetched() == len(data) and not any("xet-read-token" in request.path for request in hub.requests)


def test_the_reasons_against_hf_xet_still_hold() -> None:
    """docs/downloads.md names them. When this fails, a newer hf_xet deserves another look."""
    settings = dict(pytest.importorskip("hf_xet", reason="hf_xet is not installed here").XetConfig().items())
    assert not [
        name for name in settings if any(word in name for word in ("proxy", "cert", "tls", "redirect", "rate_limit"))
    ]
    assert (
        settings["reconstruction.min_reconstruction_fetch_size"]
        > 8 * 2**20
        < settings["reconstruction.min_prefetch_buffer"]
    )
    assert settings["chunk_cache.size_bytes"] == 0


def test_a_hub_that_is_not_there_is_said(tmp_path: Path) -> None:
    with FakeHub() as gone:
        gone.add("user/tiny", {FILE: b"abc"})
        file = remote(gone)
    with pytest.raises(WeftError) as caught:
        fetch(gone, tmp_path / FILE, file)
    assert caught.value.kind is ErrorKind.NETWORK and "resume" in caught.value.hint


@pytest.fixture
def secure(tmp_path: Path) -> Iterator[tuple[FakeHub, Path]]:
    """A hub behind https on this machine's own address, and its certificate."""
    with behind_https(tmp_path) as made:
        yield made


def test_a_wrong_certificate_is_said_and_not_tried_again(tmp_path: Path, secure: tuple[FakeHub, Path]) -> None:
    hub, _ = secure
    hub.add("user/tiny", {FILE: b"abc"})
    started = time.monotonic()
    with pytest.raises(WeftError, match="certificate") as caught:
        fetch(hub, tmp_path / FILE, timeout=3)
    assert caught.value.kind is ErrorKind.NETWORK and "date" in caught.value.hint
    assert time.monotonic() - started < 10


@pytest.mark.attack
def test_https_serves_and_its_redirect_to_plain_http_ends_the_download(
    tmp_path: Path, secure: tuple[FakeHub, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub, certificate = secure
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate))
    hub.add("user/tiny", {FILE: b"abc", "plain.txt": b"served by the hub itself"})
    fetch(hub, tmp_path / "plain.txt", remote(hub, "plain.txt"), timeout=3)
    with pytest.raises(WeftError, match="plain http") as caught:  # its store is at http://
        fetch(hub, tmp_path / FILE, timeout=3)
    assert caught.value.kind is ErrorKind.HOSTILE
    assert not hub.transfers() and not (tmp_path / FILE).exists()


def test_a_clock_that_moves_a_year_changes_nothing(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = random_bytes(9 * MB)
    hub.add("user/tiny", {FILE: data})
    hub.rate = 20 * MB
    hub.misbehave(Fault("cut", path=FILE, after=MB, times=3), Fault("status", path=FILE, code=429, retry_after="1"))
    real, year = time.time, 365 * 86400.0
    monkeypatch.setattr(time, "time", lambda: real() + random.choice([-year, 0, year]))
    started = time.monotonic()
    assert fetch(hub, tmp_path / FILE).read_bytes() == data
    assert time.monotonic() - started < 60


def test_two_transfers_of_one_file_at_once_are_one(hub: FakeHub, tmp_path: Path) -> None:
    data = random_bytes(6 * MB)
    hub.add("user/tiny", {FILE: data})
    hub.total_rate = 6 * MB
    told = Told()
    threads = [
        threading.Thread(target=fetch, args=(hub, tmp_path / FILE), kwargs={"told": told if number else None})
        for number in range(2)
    ]
    for thread in threads:
        thread.start()
        time.sleep(0.2)
    for thread in threads:
        thread.join(20)
    assert (tmp_path / FILE).read_bytes() == data
    assert hub.fetched() == 6 * MB
    assert any("already" in why for _, why in told.waits)
    assert names(tmp_path) == [FILE]


def test_a_folder_that_may_not_be_written_says_so(hub: FakeHub, tmp_path: Path) -> None:
    hub.add("user/tiny", {FILE: b"abc"})
    blocked = tmp_path / "blocked"
    blocked.write_text("a file where a folder should be")
    with pytest.raises(WeftError) as caught:
        fetch(hub, blocked / FILE)
    assert caught.value.kind is ErrorKind.PERMISSION and str(blocked) in caught.value.message


@pytest.mark.skipif(sys.platform == "win32", reason="RLIMIT_FSIZE is POSIX")
def test_a_disk_that_fills_up_keeps_what_came(hub: FakeHub, tmp_path: Path) -> None:
    import resource
    import signal

    data = random_bytes(6 * MB)
    hub.add("user/tiny", {FILE: data})
    (tmp_path / "earlier.gguf").write_bytes(b"earlier")
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3 * MB, before[1]))
    try:
        with pytest.raises(WeftError) as caught:
            fetch(hub, tmp_path / FILE)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert caught.value.kind is ErrorKind.DISK_FULL and "resume" in caught.value.hint
    assert FILE not in names(tmp_path) and (tmp_path / "earlier.gguf").read_bytes() == b"earlier"
    kept = arrived_bytes(tmp_path / FILE)
    assert kept >= MB
    fetched = hub.fetched()
    assert sha256(fetch(hub, tmp_path / FILE)) == hub.repos["user/tiny"].revisions["main"][FILE].sha256
    assert hub.fetched() - fetched == 6 * MB - kept


def test_a_cancel_ends_a_silent_connection_at_once(hub: FakeHub, tmp_path: Path) -> None:
    hub.add("user/tiny", {FILE: random_bytes(4 * MB)})
    hub.misbehave(Fault("stall", path=FILE, after=MB, seconds=60))
    cancelled = threading.Event()
    transfer = Transfer(HttpSource(hub.endpoint, timeout=20), remote(hub), tmp_path / FILE, cancelled=cancelled)

    def stop() -> None:
        cancelled.set()
        transfer.interrupt()

    timer = threading.Timer(1.0, stop)
    timer.start()
    started = time.monotonic()
    with pytest.raises(WeftError) as caught:
        transfer.run()
    assert caught.value.kind is ErrorKind.CANCELLED
    assert time.monotonic() - started < 10
    assert arrived_bytes(tmp_path / FILE) >= MB
    timer.join()


def test_what_another_download_completed_meanwhile_is_not_fetched_again(hub: FakeHub, tmp_path: Path) -> None:
    data = random_bytes(3 * MB)
    hub.add("user/tiny", {FILE: data})
    (tmp_path / FILE).write_bytes(data)
    assert fetch(hub, tmp_path / FILE).read_bytes() == data
    assert hub.fetched() == 0 and names(tmp_path) == [FILE]
    (tmp_path / FILE).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert fetch(hub, tmp_path / FILE).read_bytes() == data
