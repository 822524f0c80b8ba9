"""Many roots, each in its program's own layout; what the file system refuses costs only itself."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import time
from pathlib import Path

import pytest

from app.core.errors import ErrorKind, WeftError
from app.core.library import AdapterEntry, ModelEntry
from app.core.paths import default_paths, resources
from app.core.recognise import recognise_adapter, recognise_model
from app.core.roots import Root, RootKind, found_roots, own_roots
from app.core.scan import Scan, scan
from app.store.refresh import library_roots
from app.store.settings import Settings
from tests.fakes.library_files import (
    gguf_bytes,
    make_library,
    write_folder,
    write_gguf_adapter,
    write_gguf_model,
    write_json,
    write_peft,
)


def names(*roots: Root | Path) -> list[str]:
    return sorted(entry.name for entry in scan(roots))


def one(*roots: Root | Path) -> ModelEntry | AdapterEntry:
    (entry,) = scan(roots)
    return entry


def test_folders_of_any_depth(tmp_path: Path) -> None:
    write_folder(tmp_path / "plain")
    write_folder(tmp_path / "user" / "model")
    write_gguf_model(tmp_path / "lone-Q4_K_M.gguf")
    write_gguf_model(tmp_path / "user" / "repo" / "file-Q8_0.gguf")
    write_gguf_model(tmp_path / "a" / "b" / "c" / "deep.gguf")
    write_gguf_adapter(tmp_path / "loras" / "ada.gguf")
    write_peft(tmp_path / "loras" / "peft")
    write_peft(tmp_path / "loras" / "peft" / "checkpoint-10")
    write_folder(tmp_path / ".hidden" / "model")
    write_folder(tmp_path / "__pycache__" / "model")
    (tmp_path / "notes.txt").write_text("no model")
    (tmp_path / "half.gguf.part").write_bytes(b"GGUF")
    found = names(tmp_path)
    assert found == [
        "ada",
        "checkpoint-10",
        "deep",
        "lone-Q4_K_M",
        "loras/peft",
        "plain",
        "user/file-Q8_0",
        "user/model",
    ]
    assert all(entry.root == str(tmp_path) for entry in scan([tmp_path]))


def test_split_sets_and_projectors_are_one_entry(tmp_path: Path) -> None:
    for part in (1, 2):
        write_gguf_model(tmp_path / f"Big-{part:05}-of-00002.gguf")
    metadata = {"general.architecture": "clip"}
    (tmp_path / "mmproj-f16.gguf").write_bytes(gguf_bytes(metadata, [("mm.0.weight", (8, 256), 1)]))
    entry = one(tmp_path)
    assert isinstance(entry, ModelEntry) and len(entry.files) == 2 and entry.vision


@pytest.mark.fault
def test_a_set_without_its_first_part_is_listed(tmp_path: Path) -> None:
    write_gguf_model(tmp_path / "Big-00002-of-00002.gguf")
    entry = one(tmp_path)
    assert "Part 1 of 2" in entry.problem


# The Hugging Face cache -------------------------------------------------------------------------


def cache_repository(hub: Path, name: str, revision: str = "a" * 40, reference: str = "main") -> Path:
    """A repository as huggingface_hub stores it: blobs, a snapshot of links, references. Returns the snapshot."""
    repository = hub / ("models--" + name.replace("/", "--"))
    plain = write_folder(hub.parent / "plain")
    snapshot = repository / "snapshots" / revision
    (repository / "blobs").mkdir(parents=True, exist_ok=True)
    snapshot.mkdir(parents=True)
    for file in plain.iterdir():
        blob = repository / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
        shutil.move(file, blob)
        (snapshot / file.name).symlink_to(os.path.relpath(blob, snapshot))
    path = repository / "refs" / reference
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(revision)
    return snapshot


def test_the_hugging_face_cache(tmp_path: Path) -> None:
    hub = tmp_path / "hub"
    snapshot = cache_repository(hub, "user/model")
    cache_repository(hub, "gpt2")
    (hub / ".locks").mkdir()
    root = Root(path=str(hub), kind=RootKind.HUGGING_FACE)
    by_name = {entry.name: entry for entry in scan([root])}
    assert sorted(by_name) == ["gpt2", "user/model"]
    entry = by_name["user/model"]
    assert entry.path == str(snapshot) and not entry.problem
    assert entry.id == str(hub / "models--user--model")
    # Asked for by its folder, it is the same entry.
    assert recognise_model(hub / "models--user--model") == entry.__class__(
        **{**{f: getattr(entry, f) for f in entry.__struct_fields__}, "root": ""}
    )


def test_an_update_in_the_cache_keeps_the_id(tmp_path: Path) -> None:
    hub = tmp_path / "hub"
    cache_repository(hub, "user/model", "a" * 40)
    before = one(hub)
    snapshot = cache_repository(hub, "user/model", "b" * 40)
    after = one(hub)
    assert (after.id, after.name) == (before.id, before.name) and after.path == str(snapshot) != before.path


def test_gguf_files_and_adapters_in_the_cache(tmp_path: Path) -> None:
    snapshot = cache_repository(tmp_path / "hub", "user/model-GGUF")
    for file in snapshot.iterdir():
        file.unlink()
    write_gguf_model(snapshot / "model-Q4_K_M.gguf")
    write_gguf_model(snapshot / "Q8_0" / "model-Q8_0.gguf")
    other = cache_repository(tmp_path / "hub", "user/lora")
    for file in other.iterdir():
        file.unlink()
    write_peft(other)
    assert names(tmp_path / "hub") == ["user/lora", "user/model-Q4_K_M", "user/model-Q8_0"]
    found = recognise_adapter(tmp_path / "hub" / "models--user--lora")
    assert found is not None and found.name == "user/lora"


@pytest.mark.attack
@pytest.mark.parametrize("revision", ["../../../outside", "/etc", "a" * 40, "", "\0", "é" * 70])
def test_references_that_lead_elsewhere_are_passed_over(tmp_path: Path, revision: str) -> None:
    cache_repository(tmp_path / "hub", "user/model", "b" * 40)
    write_folder(tmp_path / "outside")
    (tmp_path / "hub" / "models--user--model" / "refs" / "main").write_text(revision)
    entry = one(tmp_path / "hub")
    assert entry.path.endswith("b" * 40)


@pytest.mark.fault
def test_an_unfinished_download_in_the_cache_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "models--user--model" / "blobs").mkdir(parents=True)
    (tmp_path / "models--user--model" / "refs").mkdir()
    (tmp_path / "models--user--model" / "snapshots").mkdir()
    assert names(tmp_path) == []
    snapshot = tmp_path / "models--user--model" / "snapshots" / ("c" * 40)
    snapshot.mkdir()
    (snapshot / "config.json").symlink_to("../../blobs/gone")
    assert names(tmp_path) == []


# Ollama, LM Studio, text-generation-webui ---------------------------------------------------------


def ollama_model(root: Path, manifest: str, model: bytes, projector: bytes = b"") -> None:
    layers = []
    for kind, data in (("model", model), ("projector", projector), ("params", b'{"temperature": 0.25, "stop": ["x"]}')):
        if data:
            digest = hashlib.sha256(data).hexdigest()
            (root / "blobs").mkdir(parents=True, exist_ok=True)
            (root / "blobs" / f"sha256-{digest}").write_bytes(data)
            layers.append({"mediaType": f"application/vnd.ollama.image.{kind}", "digest": f"sha256:{digest}"})
    write_json(root / "manifests" / manifest, {"schemaVersion": 2, "layers": layers})


def test_ollama_manifests_name_blobs(tmp_path: Path) -> None:
    data = write_gguf_model(tmp_path / "x.gguf").read_bytes()
    root = tmp_path / "ollama"
    ollama_model(root, "registry.ollama.ai/library/llama3/8b", data)
    ollama_model(root, "registry.ollama.ai/library/llama3/latest", data)
    ollama_model(root, "registry.ollama.ai/user/other/latest", data, b"projector")
    ollama_model(root, "hf.co/user/model-GGUF/Q4_K_M", data)
    write_json(root / "manifests" / "registry.ollama.ai" / "library" / "cloud" / "latest", {"layers": []})
    (root / "manifests" / "registry.ollama.ai" / "library" / "cloud" / "broken").write_bytes(b"{")
    entries = {e.name: e for e in scan([Root(path=str(root), kind=RootKind.OLLAMA)]) if isinstance(e, ModelEntry)}
    assert sorted(entries) == ["hf.co/user/model-GGUF:Q4_K_M", "llama3:8b", "llama3:latest", "user/other:latest"]
    assert all(entry.read_only and entry.quantization == "Q4_K_M" and not entry.problem for entry in entries.values())
    assert all(entry.own_sampling.values() == {"temperature": 0.25, "stop": "x"} for entry in entries.values())
    assert len({entry.id for entry in entries.values()}) == 4 and entries["llama3:8b"].path.startswith(
        str(root / "blobs")
    )
    assert entries["user/other:latest"].vision and entries["user/other:latest"].mmproj.startswith(str(root / "blobs"))


@pytest.mark.attack
def test_ollama_digests_cannot_lead_elsewhere(tmp_path: Path) -> None:
    write_gguf_model(tmp_path / "secret")
    layer = {"mediaType": "application/vnd.ollama.image.model", "digest": "../../secret"}
    write_json(tmp_path / "manifests" / "registry.ollama.ai" / "library" / "x" / "y", {"layers": [layer]})
    assert list(scan([Root(path=str(tmp_path), kind=RootKind.OLLAMA)])) == []
    layer["digest"] = "sha256:" + "0" * 64
    write_json(tmp_path / "manifests" / "registry.ollama.ai" / "library" / "x" / "y", {"layers": [layer]})
    assert "missing" in one(Root(path=str(tmp_path), kind=RootKind.OLLAMA)).problem


def test_text_generation_webui_is_searched_where_it_keeps_weights(tmp_path: Path) -> None:
    (tmp_path / "server.py").write_text("")
    (tmp_path / "modules").mkdir()
    write_gguf_model(tmp_path / "models" / "old.gguf")
    write_folder(tmp_path / "user_data" / "models" / "user_model")
    write_peft(tmp_path / "loras" / "mine")
    write_folder(tmp_path / "repositories" / "not this")
    root = Root(path=str(tmp_path), kind=RootKind.TEXT_GENERATION_WEBUI)
    assert names(root) == ["mine", "old", "user_model"]
    assert names(tmp_path / "user_data") == ["user_model"]


def test_programs_are_found_where_they_keep_their_models(tmp_path: Path) -> None:
    for place in (
        ".cache/huggingface/hub",
        ".lmstudio/models",
        ".cache/lm-studio/models",
        ".ollama/models",
        "text-generation-webui",
    ):
        (tmp_path / place).mkdir(parents=True)
    (tmp_path / "text-generation-webui" / "server.py").write_text("")
    kinds = [root.kind for root in found_roots({}, tmp_path) if root.path.startswith(str(tmp_path))]
    assert kinds == [
        RootKind.HUGGING_FACE,
        RootKind.LM_STUDIO,
        RootKind.LM_STUDIO,
        RootKind.OLLAMA,
        RootKind.TEXT_GENERATION_WEBUI,
    ]
    (tmp_path / "elsewhere" / "hub").mkdir(parents=True)
    moved = found_roots({"HF_HOME": str(tmp_path / "elsewhere"), "OLLAMA_MODELS": str(tmp_path)}, tmp_path)
    assert {(root.kind, root.path) for root in moved} >= {
        (RootKind.HUGGING_FACE, str(tmp_path / "elsewhere" / "hub")),
        (RootKind.OLLAMA, str(tmp_path)),
    }


def test_settings_choose_the_roots(home: Path) -> None:
    (Path.home() / ".ollama" / "models").mkdir(parents=True)
    settings = Settings(roots=("/a", "/b", "/a"), downloads="/d")
    paths = [root.path for root in library_roots(settings, default_paths())]
    assert paths[:3] == [root.path for root in own_roots(default_paths())]
    assert paths[3:6] == ["/d", "/a", "/b"] and str(Path.home() / ".ollama" / "models") in paths
    without = library_roots(Settings(index_ollama=False), default_paths())
    assert RootKind.OLLAMA not in [root.kind for root in without]


def test_the_starter_is_always_there() -> None:
    if not (resources() / "starter" / "model" / "config.json").exists():
        pytest.skip("resources/starter/model has not been made yet")
    entries = list(scan(own_roots(default_paths())))
    models = {entry.name: entry for entry in entries if isinstance(entry, ModelEntry)}
    assert {"starter", "starter (GGUF)"} >= set(models) >= {"starter"}
    assert all(entry.read_only for entry in models.values())


# What goes wrong --------------------------------------------------------------------------------


@pytest.mark.fault
def test_links_in_circles_end(tmp_path: Path) -> None:
    write_folder(tmp_path / "a" / "model")
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    (tmp_path / "a" / "self").symlink_to(tmp_path / "a")
    (tmp_path / "broken").symlink_to(tmp_path / "nowhere")
    (tmp_path / "me").symlink_to(tmp_path / "me")
    (tmp_path / "broken.gguf").symlink_to(tmp_path / "nowhere.gguf")
    assert names(tmp_path) == ["a/model"]
    assert names(tmp_path, tmp_path / "a") == ["a/model"]  # roots that overlap give each entry once


@pytest.mark.fault
def test_a_folder_that_may_not_be_read_is_told_and_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path / "fine")
    write_folder(tmp_path / "locked" / "model")
    real = os.scandir

    def guarded(path: object) -> object:
        if "locked" in str(path):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)  # type: ignore[call-overload]

    monkeypatch.setattr("app.core.scan.os.scandir", guarded)
    problems: list[WeftError] = []
    assert [e.name for e in scan([tmp_path], problems.append)] == ["fine"]
    assert [p.kind for p in problems] == [ErrorKind.PERMISSION] and "locked" in problems[0].message and problems[0].hint


@pytest.mark.fault
def test_what_is_deleted_during_the_scan_is_left_out(tmp_path: Path) -> None:
    make_library(tmp_path, 60)
    problems: list[WeftError] = []
    found = []
    for entry in scan([tmp_path], problems.append):
        found.append(entry)
        if len(found) == 5:
            for folder in sorted(tmp_path.iterdir())[10:]:
                shutil.rmtree(folder)
    assert 5 <= len(found) < 60 and problems == []


@pytest.mark.fault
def test_a_root_that_is_not_there_is_empty(tmp_path: Path) -> None:
    problems: list[WeftError] = []
    assert list(scan([tmp_path / "nowhere", tmp_path / "file.txt"], problems.append)) == [] == problems


def test_very_long_and_strange_names(tmp_path: Path) -> None:
    strange = ["x" * 255, "Ünïcode 模型 🦙", "with\nbreak", "trailing ", "-rf", "%s{}'\""]
    if sys.platform == "linux":
        strange.append(os.fsdecode(b"not \xff utf-8"))
    for name in strange:
        write_folder(tmp_path / name)
    assert names(tmp_path) == sorted(strange)


def test_image_generators_are_not_models(tmp_path: Path) -> None:
    write_json(tmp_path / "sd" / "model_index.json", {"_class_name": "StableDiffusionPipeline"})
    write_folder(tmp_path / "sd" / "unet", config={"_class_name": "UNet2DConditionModel"})
    write_folder(tmp_path / "lone unet", config={"_diffusers_version": "0.1"})
    assert names(tmp_path) == []


# Unchanged entries are not read again --------------------------------------------------------------


def test_only_what_changed_is_read_again(tmp_path: Path) -> None:
    make_library(tmp_path, 30)
    root = Root(path=str(tmp_path))
    first = list(Scan().root(root))
    assert len(first) == 30 and all(found.entry for found in first)
    known = {found.id: found.signature for found in first}
    again = list(Scan().root(root, known))
    assert [found.id for found in again] == [found.id for found in first]
    assert not any(found.entry for found in again)
    changed = next(e for e in known if e.endswith("model-1"))
    config = Path(changed) / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "num_hidden_layers": 99}))
    gguf = next(e for e in known if e.endswith("model-3-Q4_K_M.gguf"))
    os.utime(gguf, (1, 1))
    fresh = [found.id for found in Scan().root(root, known) if found.entry]
    assert sorted(fresh) == sorted([changed, gguf])


def test_a_scan_of_known_files_is_much_faster(tmp_path: Path) -> None:
    make_library(tmp_path, 400)
    root = Root(path=str(tmp_path))
    start = time.process_time()  # of processors alone: what else the machine does is not measured
    first = list(Scan().root(root))
    middle = time.process_time()
    known = {found.id: found.signature for found in first}
    list(Scan().root(root, known))
    end = time.process_time()
    print(f"400 entries: first scan {(middle - start) * 1e3:.0f} ms, again {(end - middle) * 1e3:.0f} ms")
    assert end - middle < (middle - start) * 0.8


def test_a_scan_can_be_cancelled(tmp_path: Path) -> None:
    make_library(tmp_path, 50)
    found: list[object] = []
    for entry in scan([tmp_path], cancelled=lambda: len(found) >= 10):
        found.append(entry)
    assert len(found) == 10
