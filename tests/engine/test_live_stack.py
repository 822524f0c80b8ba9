"""Live stacks on transformers models: their logits are those of the merged model, whatever is added, removed and reweighted."""

from __future__ import annotations

import itertools
import random
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from app.adapters.live_torch import LiveStack
from app.adapters.tensors_torch import open_adapter
from tests import seeds
from tests.engine.adapter_kit import FAMILIES, close, logits, merged, random_adapter, random_model, tokens

TOLERANCE = 1e-4


def kinds(family: str, model: Any) -> list[dict[str, Any]]:
    """Settings of eight adapters of mixed ranks and kinds."""
    modules, embedding = FAMILIES[family][2], FAMILIES[family][3]
    first, last = modules[0], modules[-1]
    norm = {"gpt2": "ln_1", "bloom": "input_layernorm", "dbrx": "norm_1"}.get(family, "input_layernorm")
    found: list[dict[str, Any]] = [
        {"r": 4},
        {"r": 3, "use_dora": True},
        {"r": 9, "use_rslora": True, "lora_alpha": 3},
        {"r": 2, "modules_to_save": ["lm_head", norm]},
        {"r": 5, "target_modules": [first, embedding], "use_dora": True, "lora_alpha": 11},
        {"r": 2, "rank_pattern": {f"1.*{last}": 7}, "alpha_pattern": {last: 1}, "bias": "all"},
        {"r": 6, "lora_bias": True, "target_modules": [last]},
        {"r": 1, "trainable_token_indices": [2, 7, 40]},
    ]
    if family == "mixtral":
        found[5] = {"r": 2, "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}
    return found


def make(tmp_path: Path, family: str, seed: int, **changes: Any) -> tuple[Any, list[Path]]:
    model = random_model(family, seed, **changes)
    folders = [
        random_adapter(tmp_path / f"adapter{i}", family, model, seed + i, **kind)
        for i, kind in enumerate(kinds(family, model))
    ]
    return model, folders


def live(model: Any, stack: list[tuple[Path, float]]) -> LiveStack:
    made = LiveStack(model)
    for folder, _ in stack:
        assert made.add(str(folder), open_adapter(folder)) == []
    made.apply({str(folder): weight for folder, weight in stack})
    return made


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_stack_gives_the_logits_of_the_merged_model(tmp_path: Path, family: str, seed: int) -> None:
    model, folders = make(tmp_path, family, seed)
    ids = tokens(seed)
    base = logits(model, ids)
    rng = random.Random(seed)
    for size in (1, 2, 3, 8):
        chosen = rng.sample(folders, size) if size > 1 else folders[1:2]
        stack = [(folder, rng.uniform(-1, 1.5)) for folder in chosen]
        made = live(model, stack)
        same = close(logits(model, ids), merged(model_as_base(model, made), stack), ids)
        made.close()
        assert same, (family, size, stack)
        assert torch.equal(logits(model, ids), base)


def model_as_base(model: Any, made: LiveStack) -> Any:
    """A copy of the model as it is without the stack."""
    import copy

    weights = dict(made.weights)
    made.apply({})
    copied = copy.deepcopy(model)
    made.apply(weights)
    return copied


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_each_kind_alone_equals_its_merge_and_weight_zero_is_the_base(tmp_path: Path, family: str, seed: int) -> None:
    model, folders = make(tmp_path, family, seed)
    ids = tokens(seed)
    base = logits(model, ids)
    for folder, kind in zip(folders, kinds(family, model), strict=True):
        for weight in (1.0, 0.4, -0.7):
            exact = merged(model, [(folder, weight)])
            made = live(model, [(folder, weight)])
            assert close(logits(model, ids), exact, ids), (family, kind, weight)
            assert not torch.equal(logits(model, ids), base), (family, kind)
            made.apply({str(folder): 0.0})
            assert torch.equal(logits(model, ids), base), (family, kind)
            made.close()


@pytest.mark.parametrize("tie", ["llama", "gemma", "cohere", "gpt2", "bloom", "qwen2"])
def test_models_with_tied_embeddings(tmp_path: Path, tie: str, seed: int) -> None:
    model, folders = make(tmp_path, tie, seed, tie_word_embeddings=True)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    ids = tokens(seed)
    for chosen in ([4], [7], [3], [3, 4, 7]):
        stack = [(folders[i], 0.8) for i in chosen]
        exact = merged(model, stack)
        made = live(model, stack)
        assert close(logits(model, ids), exact, ids), chosen
        made.close()


@pytest.mark.parametrize("family", ["llama", "mixtral", "gemma", "gpt2", "bloom", "phi3"])
@pytest.mark.parametrize("kind", [{}, {"use_rslora": True}, {"use_dora": True}])
def test_one_adapter_at_weight_one_is_what_peft_computes(
    tmp_path: Path, family: str, kind: dict[str, Any], seed: int
) -> None:
    import peft

    model = random_model(family, seed)
    folder = random_adapter(tmp_path / "adapter", family, model, seed, **kind)
    ids = tokens(seed)
    made = live(model, [(folder, 1.0)])
    ours = logits(model, ids)
    made.close()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = logits(peft.PeftModel.from_pretrained(model, folder).eval(), ids)
    assert (ours - theirs).abs().max() < TOLERANCE


def test_order_changes_nothing_not_even_a_bit(tmp_path: Path, seed: int) -> None:
    model, folders = make(tmp_path, "llama", seed)
    ids = tokens(seed)
    results = []
    for order in itertools.permutations(folders[:3]):
        made = live(model, [(folder, 0.5 + 0.25 * folders.index(folder)) for folder in order])
        results.append(logits(model, ids))
        made.close()
    assert all(torch.equal(result, results[0]) for result in results)


_MADE: dict[str, Any] = {}


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(
    steps=st.lists(
        st.tuples(st.sampled_from(["add", "remove", "reweight"]), st.integers(0, 7), st.floats(-1, 1.5, width=16)),
        min_size=1,
        max_size=8,
    ),
    family=st.sampled_from(["llama", "mixtral", "gpt2"]),
)
def test_any_sequence_of_changes_ends_at_the_merged_model(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, int, float]], family: str
) -> None:
    if family not in _MADE:
        chance = seeds.fresh(1 << 24)  # hypothesis seeds `random`
        print(f"{family}: seed {chance}")
        _MADE[family] = make(tmp_path_factory.mktemp(family), family, chance)
    model, folders = _MADE[family]
    ids = tokens(len(steps))
    base = logits(model, ids)
    made, weights = LiveStack(model), {}
    try:
        for action, number, weight in steps:
            folder = folders[number]
            if action == "add":
                made.add(str(folder), open_adapter(folder))
                weights[folder] = weight
            elif action == "remove" and folder in weights:
                made.discard(str(folder))
                del weights[folder]
            elif folder in weights:
                weights[folder] = weight
            made.apply({str(k): w for k, w in weights.items()})
            assert close(logits(model, ids), merged(model_as_base(model, made), list(weights.items())), ids)
        made.apply({})
        assert torch.equal(logits(model, ids), base)
    finally:
        made.close()
    assert torch.equal(logits(model, ids), base)


def test_a_change_of_weights_over_32_layers_takes_less_than_5_ms(tmp_path: Path, seed: int) -> None:
    model = random_model("llama", seed, num_hidden_layers=32, hidden_size=256, intermediate_size=512, head_dim=64)
    kinds_of_two = ({"r": 16}, {"r": 8, "use_dora": True})
    folders = [
        random_adapter(tmp_path / str(i), "llama", model, seed + i, **kind) for i, kind in enumerate(kinds_of_two)
    ]
    made = live(model, [(folder, 1.0) for folder in folders])
    times = []
    for i in range(30):
        started = time.process_time()
        made.apply({str(folders[0]): 0.1 * i, str(folders[1]): 1 - 0.05 * i})
        times.append(time.process_time() - started)
    made.close()
    print(f"reweight: {1000 * sorted(times)[15]:.2f} ms over 32 layers, 224 modules, one LoRA and one DoRA")
    assert sorted(times)[15] < 0.005


def test_the_cache_is_stale_exactly_when_it_must_be(tmp_path: Path, seed: int) -> None:
    model = random_model("llama", seed)
    deep = random_adapter(tmp_path / "deep", "llama", model, seed)
    head = random_adapter(tmp_path / "head", "llama", model, seed, target_modules=["lm_head"])
    made = LiveStack(model)
    for folder in (deep, head):
        made.add(str(folder), open_adapter(folder))
    assert not made.apply({str(deep): 0.0})
    assert made.apply({str(deep): 0.5})
    assert not made.apply({str(deep): 0.5})
    assert not made.apply({str(deep): 0.5, str(head): 1.0})  # the head comes after all that is cached
    assert made.apply({str(deep): 0.6, str(head): 1.0})
    assert made.apply({str(head): 1.0})
    made.close()
