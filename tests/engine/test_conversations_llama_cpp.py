"""Any sequence of changes during a conversation in llama.cpp: always the merged model's answers, what was read kept where it may be."""

# ruff: noqa: E402 (imports that need torch come after the check that it is there)

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed in this interpreter")
torch = pytest.importorskip("torch", reason="torch is not installed in this interpreter")

from tests.engine.adapter_kit import VOCABULARY, logits, merged
from tests.engine.conversation_kit import Said, Stacking, chosen, conversations, made_once
from tests.engine.half_gelu import GELU, as_in_ggml
from tests.engine.test_llama_stack import ALWAYS_TIED, TOLERANCE, make, opened

ACTIONS = ("add", "remove", "reweight", "off", "order", "nothing")
GREEDY = 3  # tokens of an answer
_MADE: dict[str, tuple[Any, Path, list[Path]]] = {}


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEFT_CACHE", str(tmp_path_factory.getbasetemp() / "adapters"))


@conversations(ACTIONS, examples=4)
def test_a_conversation_with_any_switches_is_the_merged_models(
    tmp_path_factory: pytest.TempPathFactory, family: str, said: Said
) -> None:
    def made(seed: int) -> tuple[Any, Path, list[Path]]:
        changes: dict[str, Any] = {"tie_word_embeddings": family in ALWAYS_TIED}
        if family == "mistral":
            changes["sliding_window"] = None  # GGUF files of this family know no window
        return make(tmp_path_factory.mktemp(family), family, seed, **changes)

    model, path, folders = made_once(_MADE, family, made)
    stacking, words = Stacking(folders, said.first), torch.Generator().manual_seed(said.chance)
    conversation: list[int] = []
    with opened(path) as llama:
        llama.set(*stacking.pairs)
        for action, number, weight, count in said.steps:
            stacking.act(action, number, weight)
            if stale := llama.set(*stacking.pairs):
                llama.context.clear()
            conversation += torch.randint(2, VOCABULARY, (count,), generator=words).tolist()
            kept = llama.context.reuse(conversation)
            assert kept == 0 or not stale
            found = llama.context.logits(conversation[kept:], len(conversation) - kept - 1)[-1].copy()
            reference = as_in_ggml(merged(model, stacking.pairs), family)
            for _ in range(GREEDY):
                expected = logits(reference, torch.tensor([conversation]))[0, -1].numpy()
                # Where an argument is rounded to the other side, the table's step shows in logits as large as adapters make them.
                tolerance = TOLERANCE * max(1.0, np.abs(expected).max()) if family in GELU else TOLERANCE
                assert np.abs(found - expected).max() < tolerance, (family, action, stacking.pairs)
                token = int(found.argmax())
                assert chosen(expected, token) or family in GELU, "what a run without any cache would say"
                conversation.append(token)
                found = llama.context.logits([token], 0)[-1].copy()
