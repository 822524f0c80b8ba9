"""Uploads to the hub: what arrives, what is refused in which words, and that the token is never seen."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from app.core.errors import ErrorKind, WeftError
from app.core.push_plan import PushPlan, PushResult
from app.engine import protocol
from app.engine.client import EngineClient
from app.hub.push import check_repo, files_of
from tests.fakes.hub import FakeHub, Fault
from tests.fakes.hub_kit import random_bytes, task_child

TOKEN = "hf_secretOfAlice42"


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with FakeHub() as made:
        made.tokens = {TOKEN: "alice", "hf_reader": "alice"}
        made.roles = {TOKEN: "write"}
        yield made


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "merged"
    made.mkdir()
    (made / "config.json").write_text('{"model_type": "llama"}', "utf-8")
    (made / "README.md").write_text("---\nbase_model: maker/tiny\n---\n# merged\n", "utf-8")
    (made / "model-00001-of-00002.safetensors").write_bytes(random_bytes(3_000_000))
    (made / "model-00002-of-00002.safetensors").write_bytes(random_bytes(2_000_000))
    (made / ".hidden").write_text("not this", "utf-8")
    (made / "half.part").write_text("nor this", "utf-8")
    return made


def push(hub: FakeHub, folder: Path, repo: str = "alice/merged", log: Path | None = None, **more: object) -> PushResult:
    plan = PushPlan(**{"path": str(folder), "repo": repo, "endpoint": hub.endpoint, "token": TOKEN, **more})  # type: ignore[arg-type]
    child = task_child(log or folder.parent / "child.log")
    child.start()
    try:
        return run_child(child, plan)
    finally:
        child.shutdown()


def run_child(child: EngineClient, plan: PushPlan, told: list[protocol.ProgressEvent] | None = None) -> PushResult:
    for event in child.call(protocol.RunTask(task="push_hub", parameters=msgspec.json.encode(plan).decode())):
        if isinstance(event, protocol.ProgressEvent) and told is not None:
            told.append(event)
        if isinstance(event, protocol.Done):
            assert isinstance(event.result, protocol.TaskResult)
            return msgspec.json.decode(event.result.json, type=PushResult)
    raise AssertionError("no end")


def arrived(hub: FakeHub, repo: str = "alice/merged") -> dict[str, bytes]:
    found = hub.repos[repo].files("main") or {}
    return {name: bytes(f.source) for name, f in found.items() if isinstance(f.source, bytes) and name[0] != "."}


@pytest.mark.parametrize("parts", [0, 700_000])
def test_every_file_arrives_whole_in_a_private_repository(hub: FakeHub, folder: Path, parts: int) -> None:
    hub.uploads.parts = parts
    told: list[protocol.ProgressEvent] = []
    child = task_child(folder.parent / "child.log")
    child.start()
    made = run_child(child, PushPlan(path=str(folder), repo="merged", endpoint=hub.endpoint, token=TOKEN), told)
    child.shutdown()
    wanted = {name: path.read_bytes() for name, path in files_of(folder).items()}
    assert arrived(hub) == wanted and len(wanted) == 4
    assert hub.repos["alice/merged"].private and made.private and made.repo == "alice/merged"
    assert made.url == f"{hub.endpoint}/alice/merged" and made.commit == hub.repos["alice/merged"].commit("main")
    assert made.bytes == sum(map(len, wanted.values())) and made.known == 0
    uploading = [event for event in told if event.phase == "Uploading" and event.unit == "bytes"]
    assert uploading and uploading[-1].total == made.bytes and all(e.done <= e.total for e in uploading)


def test_a_paused_upload_sends_nothing_until_it_goes_on(hub: FakeHub, folder: Path) -> None:
    hub.uploads.rate = 8_000_000
    child = task_child(folder.parent / "child.log")
    child.start()
    plan = PushPlan(path=str(folder), repo="merged", endpoint=hub.endpoint, token=TOKEN)
    command = child.send(protocol.RunTask(task="push_hub", parameters=msgspec.json.encode(plan).decode()))
    events: list[Any] = []
    while not any(isinstance(e, protocol.ProgressEvent) and e.phase == "Uploading" and e.unit for e in events):
        events.append(child.next_event())
    child.send(protocol.Adjust(target=command, parameters='{"paused": true}'))
    while (event := child.next_event(timeout=0.3)) is not None:  # what was under way
        assert not isinstance(event, protocol.Done | protocol.Failed), "it is held"
    assert not arrived(hub)
    child.send(protocol.Adjust(target=command, parameters='{"paused": false}'))
    while not isinstance(event := child.next_event(), protocol.Done | protocol.Failed):
        pass
    child.shutdown()
    assert isinstance(event, protocol.Done) and len(arrived(hub)) == 4


def test_public_only_when_asked(hub: FakeHub, folder: Path) -> None:
    assert not push(hub, folder, private=False).private and not hub.repos["alice/merged"].private


def test_the_token_goes_to_the_hub_alone(hub: FakeHub, folder: Path) -> None:
    """Not to the file store, not into the log, not onto any command line."""
    log = folder.parent / "child.log"
    hub.uploads.rate = 4_000_000
    seen: list[bytes] = []
    done = threading.Event()

    def watch() -> None:
        while not done.is_set():
            for place in Path("/proc").glob("[0-9]*"):
                for name in ("cmdline", "environ"):
                    try:
                        seen.append((place / name).read_bytes())
                    except OSError:
                        continue
            time.sleep(0.2)

    watcher = threading.Thread(target=watch)
    watcher.start()
    push(hub, folder, log=log)
    done.set()
    watcher.join()
    assert not any(TOKEN.encode() in text for text in seen)
    assert TOKEN not in log.read_text("utf-8", errors="replace")
    stored = [r for r in hub.requests if r.host == hub.store_host]
    assert stored and not any("Authorization" in r.headers for r in stored)
    assert any(TOKEN in r.headers.get("Authorization", "") for r in hub.requests)
    assert not any(TOKEN in r.path or TOKEN in str(r.query) for r in hub.requests)


@pytest.mark.parametrize(
    ("fields", "kind", "words"),
    [
        ({"token": ""}, ErrorKind.PERMISSION, "No hub token is set"),
        ({"token": "hf_reader"}, ErrorKind.PERMISSION, "may only read"),
        ({"token": "hf_wrong"}, ErrorKind.PERMISSION, "does not know the token"),
        ({"repo": "bigcorp/merged"}, ErrorKind.PERMISSION, "refuses to write bigcorp/merged"),
        ({"repo": "alice/taken"}, ErrorKind.BAD_INPUT, "on the hub already, with 1 file"),
        ({"endpoint": "http://127.0.0.1:9"}, ErrorKind.NETWORK, "cannot be reached"),
    ],
)
def test_refusals_say_what_to_do(
    hub: FakeHub, folder: Path, fields: dict[str, Any], kind: ErrorKind, words: str
) -> None:
    hub.add("alice/taken", {"config.json": b"{}"}, private=True, accepted_tokens={TOKEN})
    before = dict(hub.repos)
    with pytest.raises(WeftError) as caught:
        push(hub, folder, **fields)
    assert caught.value.kind is kind and words in str(caught.value) and caught.value.hint
    assert hub.repos == before and not hub.uploads.received


def test_what_is_there_is_only_updated_on_purpose_and_never_made_public_by_accident(hub: FakeHub, folder: Path) -> None:
    hub.add("alice/merged", {"old.txt": b"stays"}, private=True, accepted_tokens={TOKEN})
    push(hub, folder, update=True)
    assert arrived(hub)["old.txt"] == b"stays" and len(arrived(hub)) == 5
    hub.add("alice/open", {"old.txt": b"x"})
    with pytest.raises(WeftError, match="and public"):
        push(hub, folder, "alice/open", update=True)


def test_a_cut_line_is_tried_again_and_what_arrived_is_not_sent_twice(hub: FakeHub, folder: Path) -> None:
    hub.misbehave(Fault("cut", path="upload/*", after=1_000_000), Fault("status", path="upload/*", code=503))
    push(hub, folder)
    assert set(arrived(hub)) == set(files_of(folder))
    del hub.repos["alice/merged"]
    before = hub.uploads.received
    again = push(hub, folder)
    assert hub.uploads.received == before and again.known == 5_000_000


def test_cancel_ends_it_and_the_next_try_goes_on(hub: FakeHub, folder: Path) -> None:
    # Longer than what the sockets between hold.
    (folder / "model-00002-of-00002.safetensors").write_bytes(random_bytes(24_000_000))
    hub.uploads.rate = 4_000_000
    child = task_child(folder.parent / "child.log")
    child.start()
    plan = PushPlan(path=str(folder), repo="alice/merged", endpoint=hub.endpoint, token=TOKEN)
    command = child.send(protocol.RunTask(task="push_hub", parameters=msgspec.json.encode(plan).decode()))
    began, cancelled = time.monotonic(), 0.0
    while True:
        event = child.next_event(30)
        assert event is not None and time.monotonic() - began < 30
        if (
            isinstance(event, protocol.ProgressEvent)
            and event.done > 3_200_000
            and event.phase == "Uploading"
            and not cancelled
        ):
            child.cancel(command)
            cancelled = time.monotonic()
        if isinstance(event, protocol.Failed):
            assert event.kind == ErrorKind.CANCELLED and time.monotonic() - cancelled < 5
            break
        assert not isinstance(event, protocol.Done)
    child.shutdown()
    assert arrived(hub) == {}, "nothing can be seen before the commit"
    hub.uploads.rate, before = 0, len(hub.requests)
    made = push(hub, folder)  # the empty repository that is there by now is no obstacle
    assert set(arrived(hub)) == set(files_of(folder)) and made.known == 3_000_000
    assert len([r for r in hub.requests[before:] if r.method == "PUT"]) == 1


def test_a_card_that_the_hub_refuses_is_said(hub: FakeHub, folder: Path) -> None:
    (folder / "README.md").write_text("---\nbroken: [\n---\n", "utf-8")
    with pytest.raises(WeftError, match="model card"):
        push(hub, folder)
    assert arrived(hub) == {}


def test_links_out_of_the_folder_and_empty_folders_are_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "diary.txt").write_text("private", "utf-8")
    (folder / "notes.txt").symlink_to(tmp_path / "diary.txt")
    with pytest.raises(WeftError, match="outside of the folder"):
        files_of(folder)
    (tmp_path / "none").mkdir()
    with pytest.raises(WeftError, match="nothing to upload"):
        files_of(tmp_path / "none")


@pytest.mark.parametrize("name", ["", "a/b/c", "a//b", "../x", "user/na me", "user/x.git", "user/a--b", "user/-x"])
def test_names_that_no_hub_takes_are_refused(name: str) -> None:
    with pytest.raises(WeftError, match="no name for the hub"):
        check_repo(name)


def test_the_command_line_pushes_with_the_token_of_the_environment(hub: FakeHub, folder: Path, tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k not in ("HF_TOKEN", "HF_ENDPOINT")}
    environment |= {"WEFT_HOME": str(tmp_path / "home"), "HF_ENDPOINT": hub.endpoint, "PYTHON_KEYRING_BACKEND": "keyring.backends.null.Keyring"}  # fmt: skip
    command = [sys.executable, "-m", "app", "push", str(folder), "alice/merged"]
    refused = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert refused.returncode != 0 and "No hub token is set" in refused.stderr and "HF_TOKEN" in refused.stderr
    done = subprocess.run(
        command, env=environment | {"HF_TOKEN": TOKEN}, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "alice/merged: 4 files" in done.stdout and "private" in done.stdout and hub.repos["alice/merged"].private
    assert TOKEN not in done.stdout + done.stderr
