"""Any sequence of changes during a conversation in llama.cpp: always the merged model's answers, what was read kept where it may be."""

# ruff: noqa: E402 (imports that need torch come after the check that it is there)

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed in this interpreter")
torch = pytest.importorskip("torch", reason="torch is not installed in this interpreter")

from tests import seeds
from tests.engine.adapter_kit import FAMILIES, VOCABULARY, logits, merged
from tests.engine.conversation_kit import Stacking, chosen, steps
from tests.engine.half_gelu import GELU, as_in_ggml
from tests.engine.test_llama_stack import ALWAYS_TIED, TOLERANCE, make, opened

ACTIONS = ("add", "remove", "reweight", "off", "order", "nothing")
GREEDY = 3  # tokens of an answer
_MADE: dict[str, tuple[Any, Path, list[Path]]] = {}


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEFT_CACHE", str(tmp_path_factory.getbasetemp() / "adapters"))


@pytest.mark.parametrize("family", sorted(FAMILIES))
@settings(
    max_examples=4,
    deadline=None,
    phases=(Phase.explicit, Phase.reuse, Phase.generate),  # to shrink a conversation takes minutes
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(said=steps(8, ACTIONS), first=st.sampled_from([0, 2, 3, 8]), chance=st.integers(0, 1 << 30))
def test_a_conversation_with_any_switches_is_the_merged_models(
    tmp_path_factory: pytest.TempPathFactory,
    family: str,
    said: list[tuple[str, int, float, int]],
    first: int,
    chance: int,
) -> None:
    if family not in _MADE:
        seed = seeds.fresh(1 << 24)  # hypothesis seeds `random`
        print(f"{family}: seed {seed}")
        folder = tmp_path_factory.mktemp(family)
        changes: dict[str, Any] = {"tie_word_embeddings": family in ALWAYS_TIED}
        if family == "mistral":
            changes["sliding_window"] = None  # GGUF files of this family know no window
        _MADE[family] = make(folder, family, seed, **changes)
    model, path, folders = _MADE[family]
    stacking, words = Stacking(folders, first), torch.Generator().manual_seed(chance)
    conversation: list[int] = []
    with opened(path) as llama:
        llama.set(*stacking.pairs)
        for action, number, weight, count in said:
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
