"""`weft download` against a loopback hub: from a name to a verified file in the library."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from app.core.ggml import TYPES
from app.core.gguf_header import read_gguf_header
from app.core.paths import default_paths, resources
from app.hub.part import arrived_bytes
from tests.e2e.command_line import ROOT, weft, weft_json
from tests.fakes.hub import FakeHub
from tests.fakes.hub_kit import random_bytes, sha256

STARTER = resources() / "starter" / "weft-starter-f16.gguf"
_QUANTIZE = """
import sys
import llama_cpp
parameters = llama_cpp.llama_model_quantize_default_params()
parameters.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M
parameters.nthread = 1
sys.exit(llama_cpp.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), parameters))
"""


@pytest.fixture(scope="session")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The starter model as people download models: quantized to Q4_K_M by llama.cpp, in the engine's own interpreter."""
    python = os.environ.get("WEFT_PYTHON_LLAMACPP")
    if not python:
        pytest.skip("WEFT_PYTHON_LLAMACPP names no interpreter with llama-cpp-python")
    path = tmp_path_factory.mktemp("quantized") / "starter.gguf"
    subprocess.run([python, "-c", _QUANTIZE, str(STARTER), str(path)], check=True, capture_output=True, timeout=120)
    kinds = Counter(TYPES[tensor.type].name for tensor in read_gguf_header(path).tensors if len(tensor.shape) > 1)
    assert set(kinds) == {"Q4_K", "Q6_K"} and kinds["Q4_K"] > kinds["Q6_K"], kinds
    return path


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with FakeHub() as made:
        monkeypatch.setenv("HF_ENDPOINT", made.endpoint)
        yield made


def test_a_repository_lands_in_the_library_under_its_own_names(hub: FakeHub) -> None:
    folder = resources() / "starter" / "model"
    hub.add("user/tiny-llama", {path.name: path for path in folder.iterdir() if path.is_file()})
    ended = weft("download", "user/tiny-llama")
    assert ended.returncode == 0, ended.stderr
    target = default_paths().models / "user" / "tiny-llama"
    assert ended.stdout.strip() == str(target)
    assert "verified" in ended.stderr
    assert sha256(target / "model.safetensors") == sha256(folder / "model.safetensors")
    names = [entry["name"] for entry in weft_json("models")]
    assert "user/tiny-llama" in names


def test_an_adapter_lands_among_the_adapters(hub: FakeHub) -> None:
    folder = resources() / "starter" / "voice-adapter"
    hub.add("user/voice", {path.name: path for path in folder.iterdir() if path.is_file()})
    result = weft_json("download", "user/voice")
    assert result["kind"] == "adapter"
    assert Path(result["folder"]) == default_paths().adapters / "user" / "voice"
    assert "user/voice" in [entry["name"] for entry in weft_json("adapters")]


def test_a_second_time_nothing_is_fetched(hub: FakeHub) -> None:
    hub.add("user/tiny", {"tiny.q4_k_m.gguf": random_bytes(3_000_000)})
    first = weft_json("download", "user/tiny:main", "--file", "tiny.q4_k_m.gguf")
    second = weft_json("download", "user/tiny:main", "--file", "tiny.q4_k_m.gguf")
    assert (first["fetched"], second["fetched"]) == (3_000_000, 0)
    assert hub.fetched() == 3_000_000


def test_files_go_where_they_are_told_to(hub: FakeHub, tmp_path: Path) -> None:
    hub.add("user/tiny", {"a.gguf": b"GGUF", "deep/b.gguf": b"GGUF2"})
    weft_json("download", "user/tiny", "--file", "deep/b.gguf", "--to", str(tmp_path / "here"))
    assert (tmp_path / "here" / "deep" / "b.gguf").read_bytes() == b"GGUF2"


def test_a_list_shows_files_and_fetches_nothing(hub: FakeHub) -> None:
    hub.add("user/tiny", {"a.Q4_K_M.gguf": b"GGUF", "config.json": b"{}"})
    ended = weft("download", "user/tiny", "--list")
    assert "a.Q4_K_M.gguf" in ended.stdout and "Q4_K_M" in ended.stdout
    assert {file["path"] for file in weft_json("download", "user/tiny", "--list")["files"]} == {
        "a.Q4_K_M.gguf",
        "config.json",
    }
    assert not hub.transfers()


def test_a_list_shows_what_belongs_together_and_whether_it_fits(hub: FakeHub) -> None:
    parts = {f"big.Q6_K-0000{number}-of-00002.gguf": random_bytes(2000) for number in (1, 2)}
    hub.add("user/seeing", {**parts, "small.Q4_K_M.gguf": b"GGUF", "mmproj-F16.gguf": random_bytes(500), "a.md": b"#"})
    hub.repos["user/seeing"].revisions["main"]["small.Q4_K_M.gguf"].size = 10**15
    lines = {line["title"]: line for line in weft_json("download", "user/seeing", "--list")["choices"]}
    assert list(lines) == ["big.Q6_K.gguf", "small.Q4_K_M.gguf", "a.md"]
    assert lines["big.Q6_K.gguf"]["files"] == [*parts, "mmproj-F16.gguf"]
    assert (lines["big.Q6_K.gguf"]["bytes"], lines["big.Q6_K.gguf"]["quantization"]) == (4500, "Q6_K")
    assert [line["fits"] for line in lines.values()][1:] == ["No", ""] and lines["big.Q6_K.gguf"]["fits"] != "No"
    text = weft("download", "user/seeing", "--list").stdout
    assert "fits" in text.splitlines()[0] and "3 files" in text


def test_a_file_of_yours_is_kept_and_named(hub: FakeHub, tmp_path: Path) -> None:
    hub.add("user/tiny", {"config.json": b"{}", "model.safetensors": random_bytes(2000)})
    (tmp_path / "config.json").write_text("mine")
    ended = weft("download", "user/tiny", "--to", str(tmp_path))
    assert ended.returncode == 0
    assert str(tmp_path / "config.json.old") in ended.stderr
    assert (tmp_path / "config.json.old").read_text() == "mine" and (tmp_path / "config.json").read_text() == "{}"


def test_several_quantizations_are_not_fetched_by_accident(hub: FakeHub) -> None:
    hub.add("user/many", {"m.Q4_K_M.gguf": b"GGUF", "m.Q8_0.gguf": b"GGUF++"})
    ended = weft("download", "user/many")
    assert ended.returncode == 1
    assert "Q4_K_M" in ended.stderr and "--file" in ended.stderr
    assert weft_json("download", "user/many", "--file", "q8_0")["bytes"] == 6


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("user/tiny", "--file", "tiny.q4_k.gguf"), ("There is no file", "tiny.q4_k_m.gguf")),
        (("user/tiny:dev",), ("no branch", "main")),
        (("user/tinny",), ("There is no user/tinny", "user/tiny")),
        (("nonsense",), ("does not name a model", "user/model")),
        (("https://example.org/user/tiny",), ("not an address on the hub",)),
    ],
)  # fmt: skip
def test_what_cannot_be_found_is_said_with_what_comes_near(
    hub: FakeHub, arguments: tuple[str, ...], words: tuple[str, ...]
) -> None:
    hub.add("user/tiny", {"tiny.q4_k_m.gguf": b"GGUF"})
    ended = weft("download", *arguments)
    assert ended.returncode == 1
    assert ended.stderr.count("error: ") == 1 and "hint: " in ended.stderr
    for word in words:
        assert word in ended.stderr


def test_wrong_usage_is_told_apart(hub: FakeHub) -> None:
    assert weft("download").returncode == 2
    assert weft("download", "user/tiny", "--limit", "fast").returncode == 2


def test_the_token_of_the_environment_serves_and_never_leaves_the_hub(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = "hf_secretsecretsecretsecret"
    hub.tokens[token] = "me"
    hub.add(
        "user/gated",
        {"config.json": b"{}", "model.safetensors": random_bytes(2_000_000)},
        gated=True,
        accepted_tokens={token},
    )
    refused = weft("download", "user/gated")
    assert (
        refused.returncode == 1
        and "no token is set" in refused.stderr
        and f"{hub.endpoint}/user/gated" in refused.stderr
    )
    monkeypatch.setenv("HF_TOKEN", token)
    assert weft_json("download", "user/gated")["fetched"] > 2_000_000
    carried = [request for request in hub.requests if token in json.dumps(request.headers)]
    assert carried
    assert all(request.host != hub.store_host for request in carried)
    for path in default_paths().data.rglob("*"):
        if path.is_file():
            assert token.encode() not in path.read_bytes(), path


def test_a_downloaded_model_loads_and_chats(hub: FakeHub, quantized: Path) -> None:
    hub.add("user/tiny-llama", {"tiny.q4_k_m.gguf": quantized, "README.md": b"# Tiny"})
    result = weft_json("download", "user/tiny-llama:main", "--file", "tiny.q4_k_m.gguf")
    assert sha256(Path(result["files"][0]["path"])) == sha256(quantized)
    models = [entry for entry in weft_json("models") if entry["name"].startswith("user/")]
    assert [entry["quantization"] for entry in models] == ["Q4_K_M"]  # by its header, not by its name
    answer = weft_json("chat", models[0]["name"], "-p", "How do I add a LoRA?", "--temperature", "0")
    assert "lora" in answer["text"].lower()


def test_a_refused_download_leaves_no_empty_folder(hub: FakeHub) -> None:
    hub.add("user/gated", {"config.json": b"{}"}, gated=True)
    assert weft("download", "user/gated").returncode == 1
    assert not (default_paths().models / "user").exists()


def test_ctrl_c_stops_cleanly_and_the_next_time_goes_on(hub: FakeHub) -> None:
    hub.add("user/tiny", {"model.gguf": random_bytes(8_000_000)})
    hub.total_rate = 2_000_000
    part = default_paths().models / "user" / "tiny" / "model.gguf"
    process = subprocess.Popen(
        [sys.executable, "-m", "app", "download", "user/tiny"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 30
    while arrived_bytes(part) < 3_000_000 and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    before = hub.fetched()
    hub.total_rate = 0
    result = weft_json("download", "user/tiny")
    assert result["fetched"] <= 5_000_000 and hub.fetched() - before == result["fetched"]
