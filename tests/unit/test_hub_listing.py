"""Questions to the hub, through the real huggingface_hub: what it answers, when it is busy, and what it may not do with the token."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from email.utils import formatdate
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from app.core.errors import ErrorKind, WeftError
from app.hub import listing
from app.hub.listing import Hub
from app.hub.questions import check_endpoint, configure
from app.hub.reference import parse_reference
from tests.fakes.hub import FakeHub, Fault
from tests.fakes.hub_kit import random_bytes

TOKEN = "hf_goodgoodgood"
TINY = parse_reference("user/tiny")
pytestmark = pytest.mark.fault


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with FakeHub() as made:
        made.tokens[TOKEN] = "ada"
        made.add("user/tiny", {"config.json": b"{}", "model.safetensors": random_bytes(1000)}, downloads=5)
        yield made


@pytest.fixture
def waits() -> list[str]:
    return []


@pytest.fixture(autouse=True)
def closed() -> Iterator[None]:
    yield
    from huggingface_hub import close_session

    close_session()


def ask(hub: FakeHub, waits: list[str], token: str = TOKEN, **more: Any) -> Hub:
    configure(hub.endpoint)
    return Hub(hub.endpoint, token, waiting=waits.append, **more)


def test_a_listing_has_sizes_and_checksums(hub: FakeHub, waits: list[str]) -> None:
    found = ask(hub, waits).list_files(TINY)
    by_path = {file.path: file for file in found.files}
    real = hub.repos["user/tiny"].revisions["main"]
    assert by_path["model.safetensors"].sha256 == real["model.safetensors"].sha256
    assert by_path["config.json"].git_oid == real["config.json"].git_oid and not by_path["config.json"].sha256
    assert found.commit == hub.repos["user/tiny"].commit("main")
    assert waits == []


def test_the_real_client_takes_every_answer_of_the_fake_hub(hub: FakeHub) -> None:
    """Also those that Weft does not ask for."""
    from huggingface_hub import HfApi, errors, hf_hub_url

    configure(hub.endpoint)
    api = HfApi(endpoint=hub.endpoint, token=TOKEN)
    file = hub.repos["user/tiny"].revisions["main"]["model.safetensors"]
    commit = hub.repos["user/tiny"].commit("main")
    assert api.whoami()["name"] == "ada" and api.auth_check("user/tiny") is None
    assert [(ref.name, ref.target_commit) for ref in api.list_repo_refs("user/tiny").branches] == [("main", commit)]
    assert api.model_info("user/tiny").sha == commit == api.model_info("user/tiny", revision="main").sha
    for found in (
        list(api.list_repo_tree("user/tiny", recursive=True, expand=True)),
        api.get_paths_info("user/tiny", ["config.json", "model.safetensors"]),
    ):
        lfs: Any = found[-1]
        assert (lfs.path, lfs.size, lfs.lfs.sha256) == (file.path, 1000, file.sha256)

    def metadata(repo: str, path: str, revision: str = "main", token: str = TOKEN) -> Any:
        return api.get_hf_file_metadata(
            url=hf_hub_url(repo, path, revision=revision, endpoint=hub.endpoint), token=token
        )

    known = metadata("user/tiny", "model.safetensors")
    assert (known.etag, known.size, known.commit_hash) == (file.sha256, 1000, commit)
    assert urlsplit(known.location).hostname != urlsplit(hub.endpoint).hostname
    hub.add("user/gated", {"a.bin": b"a"}, gated=True)
    for wrong, arguments in (
        (errors.GatedRepoError, ("user/gated", "a.bin")),
        (errors.RepositoryNotFoundError, ("user/none", "a.bin")),
        (errors.RevisionNotFoundError, ("user/tiny", "config.json", "none")),
        (errors.RemoteEntryNotFoundError, ("user/tiny", "none")),
    ):
        with pytest.raises(wrong) as caught:
            metadata(*arguments)
        assert type(caught.value) is wrong
    hub.page_size = 1
    hub.add("user/other", {"a": b"a"})
    assert {model.id for model in api.list_models(search="user/")} == {"user/tiny", "user/gated", "user/other"}


@pytest.mark.parametrize("path", ["/api/models/user/tiny", "/api/models/user/tiny/tree/*"])
def test_a_busy_hub_is_asked_again_when_it_says_and_that_is_told(hub: FakeHub, waits: list[str], path: str) -> None:
    hub.misbehave(Fault("api_status", path=path, code=429, retry_after="2"))
    started = time.monotonic()
    assert len(ask(hub, waits).list_files(TINY).files) == 2
    assert 2 <= time.monotonic() - started < 15
    assert any("slow down" in words and "2 s" in words for words in waits) and waits[-1] == ""


def test_a_hub_that_wants_an_hour_is_not_waited_for(hub: FakeHub, waits: list[str]) -> None:
    for after in ("3000", formatdate(time.time() + 3000, usegmt=True)):
        hub.misbehave(Fault("api_status", path="/api/models*", code=429, retry_after=after))
        started = time.monotonic()
        with pytest.raises(WeftError) as caught:
            ask(hub, waits).search("tiny")
        assert caught.value.kind is ErrorKind.NETWORK and "50 minutes" in caught.value.message
        assert time.monotonic() - started < 20


def test_a_hub_in_trouble_is_asked_a_few_times_and_no_more(
    hub: FakeHub, waits: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listing, "retry_delay", lambda *_: 0.05)
    hub.misbehave(Fault("api_status", path="/api/models*", code=503, times=2))
    assert ask(hub, waits).search("tiny")[0].repo == "user/tiny"
    hub.misbehave(Fault("api_status", path="/api/models*", code=502, times=1000))
    asked = len(hub.requests)
    with pytest.raises(WeftError, match="502"):
        ask(hub, waits).list_files(TINY)
    assert len(hub.requests) - asked == listing.TRIES


def test_a_wait_can_be_given_up(hub: FakeHub, waits: list[str]) -> None:
    hub.misbehave(Fault("api_status", path="/api/models*", code=429, retry_after="60", times=9))
    cancelled = threading.Event()
    timer = threading.Timer(0.5, cancelled.set)
    timer.start()
    started = time.monotonic()
    with pytest.raises(WeftError) as caught:
        ask(hub, waits, cancelled=cancelled).search("tiny")
    assert caught.value.kind is ErrorKind.CANCELLED and time.monotonic() - started < 20
    timer.join()


@pytest.mark.attack
def test_the_next_page_of_a_list_cannot_fetch_the_token(hub: FakeHub, waits: list[str]) -> None:
    with FakeHub() as other:
        other.add("evil/model", {"a": b"a"})
        hub.misbehave(Fault("next_page", url=f"{other.endpoint}/api/models?search="))
        assert {hit.repo for hit in ask(hub, waits).search("", limit=50)} == {"user/tiny", "evil/model"}
        assert other.requests and all("Authorization" not in request.headers for request in other.requests)
    assert any(TOKEN in request.headers.get("Authorization", "") for request in hub.requests)


@pytest.mark.attack
def test_a_question_that_is_sent_from_https_to_http_ends(
    hub: FakeHub, waits: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.fakes.hub_kit import behind_https

    with behind_https(tmp_path) as (secure, certificate):
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate))
        secure.add("user/tiny", {"config.json": b"{}"})
        secure.tokens[TOKEN] = "ada"
        assert ask(secure, waits).search("tiny")
        asked = len(hub.requests)
        secure.misbehave(Fault("api_redirect", path="/api/models*", url=f"{hub.endpoint}/api/models"))
        with pytest.raises(WeftError, match="plain http") as caught:
            ask(secure, waits).search("tiny")
        assert caught.value.kind is ErrorKind.HOSTILE
        assert len(hub.requests) == asked


def test_a_certificate_that_nobody_vouches_for_is_said(waits: list[str], tmp_path: Path) -> None:
    from tests.fakes.hub_kit import behind_https

    with behind_https(tmp_path) as (secure, _):
        with pytest.raises(
            WeftError, match=r"certificate of https://127\.0\.0\.1:\d+ is not valid: self.signed"
        ) as caught:
            ask(secure, waits).search("tiny")
        assert caught.value.kind is ErrorKind.NETWORK and "date of this computer" in caught.value.hint
        assert not secure.requests


def test_a_hub_that_is_not_there_is_said_soon(waits: list[str]) -> None:
    with FakeHub() as gone:
        pass
    for question in (lambda: ask(gone, waits).search("x"), lambda: ask(gone, waits).list_files(TINY)):
        started = time.monotonic()
        with pytest.raises(WeftError, match="cannot be reached"):
            question()
        assert time.monotonic() - started < 10  # huggingface_hub alone tries for half a minute and says nothing


def test_questions_that_are_redirected_in_a_circle_end_in_words(hub: FakeHub, waits: list[str]) -> None:
    hub.misbehave(Fault("api_redirect", path="/api/models*", url=f"{hub.endpoint}/api/models", times=1000))
    with pytest.raises(WeftError, match="in a circle"):
        ask(hub, waits).search("tiny")
    assert len(hub.requests) < 20


@pytest.mark.attack
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"path": "../../x"}, "not a path"), ({"path": "\ud800"}, "not a path"), ({"size": -1}, "size"), ({"size": 1 << 60}, "size"),
        ({"size": "9"}, "size"), ({"lfs": {"oid": "../../../etc/passwd", "size": 1, "pointerSize": 1}}, "checksum"),
    ],
)  # fmt: skip
def test_a_tree_that_lies_is_refused(
    hub: FakeHub, waits: list[str], monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], words: str
) -> None:
    file = hub.repos["user/tiny"].revisions["main"]["model.safetensors"]
    entry = {**file.tree_entry(), **change}
    json.dumps(entry)
    monkeypatch.setattr(type(file), "tree_entry", lambda _: entry)
    with pytest.raises(WeftError, match=words) as caught:
        ask(hub, waits).list_files(TINY)
    assert caught.value.kind is ErrorKind.HOSTILE


def test_a_hash_of_another_kind_is_no_checksum(hub: FakeHub, waits: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    file = hub.repos["user/tiny"].revisions["main"]["config.json"]
    entry = {**file.tree_entry(), "oid": "../../x"}
    monkeypatch.setattr(type(file), "tree_entry", lambda _: entry)
    assert all(found.git_oid == "" for found in ask(hub, waits).list_files(TINY).files)


def test_near_names_come_once(hub: FakeHub, waits: list[str]) -> None:
    with pytest.raises(WeftError) as caught:
        ask(hub, waits).list_files(parse_reference("user/tinny"))
    assert caught.value.kind is ErrorKind.NOT_FOUND and caught.value.hint.count("user/tiny") == 1


@pytest.mark.parametrize("endpoint", ["nonsense", "ftp://x", "https://", "http://[::1", "https://x:no"])
def test_an_endpoint_that_is_no_address_is_said(endpoint: str) -> None:
    with pytest.raises(WeftError, match="not an address") as caught:
        check_endpoint(endpoint)
    assert "HF_ENDPOINT" in caught.value.hint
    check_endpoint("")
    check_endpoint("http://127.0.0.1:8080/hub")
