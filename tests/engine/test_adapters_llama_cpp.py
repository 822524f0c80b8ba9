"""Adapter stacks through the llama.cpp loader: a conversation with switches gives the tokens of one without any cache."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy
import pytest
from safetensors.numpy import load_file, save_file

from app.backends.llama_cpp import Backend
from app.core.errors import ErrorKind, WeftError
from app.core.library import ModelEntry
from app.core.recognise import recognise_model
from app.core.sampling import Sampling
from app.core.stack import AdapterStack, StackedAdapter
from app.engine.protocol import BatchRow, GenerateBatch, Load
from tests.engine.backend_kit import FakeReport, ask, loaded, user

pytest.importorskip("llama_cpp")
STARTER = Path(__file__).resolve().parents[2] / "resources" / "starter"
VOICE = STARTER / "voice-adapter"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEFT_CACHE", str(tmp_path))


@pytest.fixture
def starter() -> ModelEntry:
    entry = recognise_model(next(STARTER.glob("*.gguf")))
    assert entry is not None
    return entry


def stack(*weights: float) -> AdapterStack:
    return AdapterStack(adapters=tuple(StackedAdapter(path=str(VOICE), weight=weight) for weight in weights))


def test_a_conversation_with_switches_says_what_fresh_engines_say(starter: ModelEntry) -> None:
    turns: list[tuple[str, AdapterStack]] = [
        ("How do I add a LoRA?", stack(1.0)), ("Thanks", stack(1.0)), ("What is a GGUF file?", stack(0.5, 0.1)), ("Hello", stack()), ("Hello", stack(0.0)),
    ]  # fmt: skip
    said: list[tuple[Any, str, int]] = []
    with loaded(Backend(), starter, flash_attention="off") as (backend, _):
        messages: tuple[Any, ...] = ()
        for turn, wanted in turns:
            backend.set_adapters(wanted, FakeReport())
            messages = (*messages, user(turn))
            text, done = ask(backend, messages, max_tokens=24)
            said.append((messages, text, done.reused_tokens))
            from tests.engine.backend_kit import assistant

            messages = (*messages, assistant(text))
    assert said[1][2] > 0 and said[2][2] == said[3][2] == 0 and said[4][2] > 0, "kept for the same stack alone"
    for (asked, text, _), (_, wanted) in zip(said, turns, strict=True):
        with loaded(Backend(), starter, flash_attention="off") as (fresh, _):
            fresh.set_adapters(wanted, FakeReport())
            assert ask(fresh, asked, max_tokens=24)[0] == text
    assert said[0][1] != said[3][1]


def test_adapters_given_with_a_load_do_not_hide_where_the_model_lies(starter: ModelEntry) -> None:
    backend = Backend()
    try:
        backend.load(Load(model=starter, options={"n_ctx": 256}, adapters=stack(1.0)), FakeReport())
        # What `Loaded` tells of GPU layers and of memory is read off these.
        assert {purpose for _, purpose in backend._log.buffers} >= {"KV", "model"}
    finally:
        backend.unload()


def test_a_missing_adapter_leaves_the_stack_as_it_was(starter: ModelEntry, tmp_path: Path) -> None:
    with loaded(Backend(), starter) as (backend, _):
        backend.set_adapters(stack(1.0), FakeReport())
        before = ask(backend, (user("Hello"),))[0]
        with pytest.raises(WeftError) as refused:
            backend.set_adapters(AdapterStack(adapters=(StackedAdapter(path=str(tmp_path / "none")),)), FakeReport())
        assert refused.value.kind is ErrorKind.NOT_FOUND and refused.value.hint
        assert ask(backend, (user("Hello"),))[0] == before


def test_a_bad_row_fails_the_batch_before_any_row_has_said_a_word(starter: ModelEntry, tmp_path: Path) -> None:
    config = (VOICE / "adapter_config.json").read_text()
    tensors = load_file(VOICE / "adapter_model.safetensors")
    bad = {"nan": {**tensors}, "repeats": tensors}
    name = next(name for name in tensors if "q_proj.lora_A" in name)
    bad["nan"][name] = numpy.full_like(tensors[name], numpy.nan)
    for kind, content in bad.items():
        (tmp_path / kind).mkdir()
        save_file(content, tmp_path / kind / "adapter_model.safetensors")
        settings = json.loads(config) | ({"layer_replication": [[0, 2], [1, 9]]} if kind == "repeats" else {})
        (tmp_path / kind / "adapter_config.json").write_text(json.dumps(settings))
    with loaded(Backend(), starter) as (backend, _):
        backend.set_adapters(stack(1.0), FakeReport())
        before = ask(backend, (user("Hello"),))[0]
        for kind in ("nan", "repeats"):
            wrong = AdapterStack(adapters=(StackedAdapter(path=str(tmp_path / kind)),))
            rows = tuple(
                BatchRow(adapters=each, messages=(user("Hello"),)) for each in (AdapterStack(), stack(0.5), wrong)
            )
            report = FakeReport()
            with pytest.raises(WeftError):
                backend.generate_batch(GenerateBatch(rows=rows, sampling=Sampling(max_tokens=8)), report)
            assert not report.text, kind
            assert backend.stack == stack(1.0) and ask(backend, (user("Hello"),))[0] == before
