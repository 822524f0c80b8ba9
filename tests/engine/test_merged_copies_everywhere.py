"""Merged copies of llama.cpp on every architecture: stacks of 2, 3 and 8 with DoRA, whole modules, tokens and experts among them."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed in this interpreter")

from app.adapters.merged_copies import MergedCopies
from app.core.stack import AdapterStack, StackedAdapter
from tests.engine import gguf_kit
from tests.engine.adapter_kit import FAMILIES, any_weight, logits, merged, random_adapter, random_model, tokens
from tests.engine.half_gelu import GELU, as_in_ggml
from tests.engine.test_llama_stack import ALWAYS_TIED, TOLERANCE, opened

FEW = 2  # architectures that each run of the default tier takes, by chance


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEFT_CACHE", str(tmp_path / "cache"))


def kinds(family: str) -> list[dict[str, Any]]:
    modules, embedding = FAMILIES[family][2], FAMILIES[family][3]
    tied = family in ALWAYS_TIED  # llama.cpp knows no head of theirs: head and embedding change alike, or not at all
    return [
        {"r": 4},
        {"r": 3, "use_dora": True},
        {"r": 9, "use_rslora": True, "lora_alpha": 3},
        {"r": 2} if tied else {"r": 2, "modules_to_save": ["lm_head"]},
        {"r": 5, "target_modules": modules if tied else [modules[0], embedding], "use_dora": True, "lora_alpha": 11},
        {"r": 2, "rank_pattern": {f"1.*{modules[-1]}": 7}, "alpha_pattern": {modules[-1]: 1}},
        {"r": 2, "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]} if family == "mixtral" else {"r": 6},
        {"r": 1, "trainable_token_indices": [2, 7, 40]},
    ]  # fmt: skip


def switches(folder: Path, family: str, seed: int, sizes: tuple[int, ...]) -> None:
    """Random stacks of these sizes one after the other, in any order, each equal to the merged model."""
    model = random_model(family, seed, tie_word_embeddings=family in ALWAYS_TIED)
    base = gguf_kit.write(model, family, folder / f"{family}.gguf")
    adapters = [
        random_adapter(folder / f"{family}{n}", family, model, seed + n, **kind) for n, kind in enumerate(kinds(family))
    ]
    copies, rng = MergedCopies(base), random.Random(seed)
    ids = tokens(seed, rows=1)
    for size in sizes:
        pairs = [(path, any_weight(rng)) for path in rng.sample(adapters, size)]
        if size > 2:
            pairs[0] = (pairs[0][0], 0.0)
        stack = AdapterStack(adapters=tuple(StackedAdapter(path=str(path), weight=weight) for path, weight in pairs))
        copy = copies.serve(stack, 0, lambda *_: None, lambda: False)
        assert bool(copy.notes) == (copy.file != base)
        assert not [note for note in copy.notes if "Left out" in note], copy.notes
        with opened(copy.file) as llama:
            llama.set(*((Path(adapter.path), adapter.weight) for adapter in copy.live.adapters))
            found = llama.logits(ids[0].tolist())
        expected = logits(as_in_ggml(merged(model, pairs), family), ids)[0].numpy()
        tolerance = TOLERANCE * max(1.0, np.abs(expected).max()) if family in GELU else TOLERANCE
        assert np.abs(found - expected).max() < tolerance, (family, pairs)


def test_any_switches_end_at_the_merged_model_on_some_architectures(tmp_path: Path, seed: int) -> None:
    for family in random.Random(seed).sample(sorted(FAMILIES), FEW):
        switches(tmp_path, family, seed, (8, 2))


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_any_switches_end_at_the_merged_model(tmp_path: Path, family: str, seed: int) -> None:
    sizes = [2, 3, 8, 8, 0, *(random.Random(seed).randrange(9) for _ in range(8))]
    switches(tmp_path, family, seed, tuple(sizes))
