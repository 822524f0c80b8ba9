"""A streamed merge is bit for bit what PEFT's merge_and_unload saves, wherever PEFT computes what a stack means."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from app.adapters.merge_math_torch import STEP, pieces
from app.adapters.merge_names_torch import PLAIN
from app.tasks import merge as task
from tests.engine.adapter_kit import FAMILIES, any_weight
from tests.engine.merge_kit import (
    DTYPES,
    Report,
    assert_same_bits,
    make_adapter,
    make_base,
    peft_merge,
    plan,
    saved,
    streamed,
)

_TIED = {"gemma", "cohere", "gpt2", "bloom"}  # PEFT's own merge of a tied embedding differs from PEFT's own logits
_INNER = ("lora", "rslora", "dora", "patterns", "experts")  # kinds that leave embedding and head alone: tied is as good


def kinds(family: str, rng: random.Random) -> dict[str, dict[str, Any]]:
    """Adapters of every kind that PEFT merges exactly, with random ranks, alphas and patterns."""
    linear, embedding = FAMILIES[family][2], FAMILIES[family][3]
    first, last = linear[0], linear[-1]
    rank = lambda: rng.randrange(1, 20)  # noqa: E731
    found: dict[str, dict[str, Any]] = {
        "lora": {"r": rank(), "lora_alpha": rng.randrange(1, 40)},
        "rslora": {"r": rank(), "use_rslora": True, "lora_alpha": rng.randrange(1, 40)},
        "dora": {"r": rank(), "use_dora": True},
        "embedding": {"r": rank(), "target_modules": [first, embedding]},
        "embedding dora": {"r": rank(), "target_modules": [first, embedding], "use_dora": True},
        "whole": {"r": rank(), "modules_to_save": ["lm_head"]},
        "tokens": {"r": rank(), "trainable_token_indices": sorted(rng.sample(range(96), 3))},
        "patterns": {
            "r": rank(), "rank_pattern": {f"1.*{last}": rank()}, "alpha_pattern": {last: rng.randrange(1, 9)}, "bias": "all",
        },
    }  # fmt: skip
    if family == "mixtral":
        found["experts"] = {"r": rank(), "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}
    return found


def stacks(made: list[str], rng: random.Random) -> list[list[tuple[str, float]]]:
    """Each kind alone, and stacks of LoRA and rsLoRA at any weights."""
    plain = [name for name in ("lora", "rslora", "embedding", "experts") if name in made]
    found = [[(name, 1.0)] for name in made]
    for size in (1, 2, 3):
        found.append([(name, any_weight(rng)) for name in rng.sample(plain, min(size, len(plain)))])
    return found


def check_tied(tmp_path: Path, family: str, dtype: str, seed: int, count: int = 99) -> None:
    """Adapters that leave a shared matrix alone: PEFT's bits, and one matrix in the files, as in the base's."""
    rng = random.Random(seed)
    base = tmp_path / "base"
    model = make_base(base, family, seed, dtype, rng.choice(["5GB", "20KB"]), tie_word_embeddings=True)
    names = set(saved(base))
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert not any(name.endswith("lm_head.weight") for name in names), names
    settings_of = {name: settings for name, settings in kinds(family, rng).items() if name in _INNER}
    plain = [name for name in settings_of if name in ("lora", "rslora", "experts")]
    pair = [(name, any_weight(rng)) for name in rng.sample(plain, 2)]
    singles = [[(name, 1.0)] for name in settings_of if name != "lora"]
    # A plain LoRA always, at any weight; the others as many as are asked for.
    chosen_stacks = [[("lora", any_weight(rng))], *rng.sample([*singles, pair], min(count - 1, len(singles) + 1))]
    made: dict[str, Path] = {}
    for number, name in enumerate(settings_of):
        if any(name == wanted for chosen in chosen_stacks for wanted, _ in chosen):
            kept = rng.choice(list(DTYPES))
            made[name] = make_adapter(tmp_path / name, family, model, seed + number, kept, **settings_of[name])
    for number, chosen in enumerate(chosen_stacks):
        stack = [(made[name], weight) for name, weight in chosen]
        peft_merge(base, dtype, stack, tmp_path / f"peft{number}")
        theirs = saved(tmp_path / f"peft{number}")
        what = (family, dtype, chosen)
        done = Path(task.run(plan(base, stack, tmp_path / f"out{number}"), Report()).folder)
        assert_same_bits(saved(done), theirs, what)
        assert set(theirs) == names, what
        assert json.loads((done / "config.json").read_text()).get("tie_word_embeddings") is not False, what
        assert_same_bits(streamed(plan(base, stack, tmp_path / "no"), quick=False), theirs, what)


@pytest.mark.parametrize("family", [family for family in sorted(FAMILIES) if family != "dbrx"])  # which cannot be tied
def test_a_merge_into_a_tied_base_has_the_bits_of_pefts(tmp_path: Path, family: str, seed: int) -> None:
    check_tied(tmp_path, family, random.Random(seed).choice(list(DTYPES)), seed, count=1)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", [family for family in sorted(FAMILIES) if family != "dbrx"])
def test_a_merge_into_a_tied_base_has_the_bits_of_pefts_in_every_dtype(
    tmp_path: Path, family: str, dtype: str, seed: int
) -> None:
    check_tied(tmp_path, family, dtype, seed)


def check(tmp_path: Path, family: str, dtype: str, seed: int, count: int = 99) -> None:
    rng = random.Random(seed)
    base = tmp_path / "base"
    changes: dict[str, Any] = {"tie_word_embeddings": False} if family in _TIED else {}
    model = make_base(base, family, seed, dtype, rng.choice(["5GB", "20KB"]), **changes)
    made: dict[str, Path] = {}
    settings_of = kinds(family, rng)
    chosen_stacks = stacks(list(settings_of), rng)
    chosen_stacks = rng.sample(chosen_stacks, min(count, len(chosen_stacks)))
    wanted = {name for chosen in chosen_stacks for name, _ in chosen}
    for number, (name, settings) in enumerate(settings_of.items()):
        if name not in wanted:
            continue
        # An embedding's own copy, saved in fewer bits than the base has, would be PEFT's loss and not ours.
        kept = "float32" if "embedding" in name else rng.choice(["float32", "bfloat16", "float16"])
        made[name] = make_adapter(tmp_path / name, family, model, seed + number, kept, **settings)
    for number, chosen in enumerate(chosen_stacks):
        stack = [(made[name], weight) for name, weight in chosen]
        peft_merge(base, dtype, stack, tmp_path / f"peft{number}")
        theirs = saved(tmp_path / f"peft{number}")
        for quick in (True, False):
            assert_same_bits(
                streamed(plan(base, stack, tmp_path / "out"), quick=quick), theirs, (family, dtype, chosen)
            )


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_merge_has_the_bits_of_pefts(tmp_path: Path, family: str, seed: int) -> None:
    check(tmp_path, family, random.Random(seed).choice(list(DTYPES)), seed, count=3)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_merge_has_the_bits_of_pefts_in_every_dtype(tmp_path: Path, family: str, dtype: str, seed: int) -> None:
    check(tmp_path, family, dtype, seed)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float16"])
def test_another_dtype_than_the_bases_is_what_peft_makes_of_a_base_loaded_in_it(
    tmp_path: Path, dtype: str, seed: int
) -> None:
    model = make_base(tmp_path / "base", "llama", seed, "float32" if dtype != "float32" else "bfloat16")
    stack = [(make_adapter(tmp_path / "a", "llama", model, seed), 0.8)]
    peft_merge(tmp_path / "base", dtype, stack, tmp_path / "peft")
    ours = streamed(plan(tmp_path / "base", stack, tmp_path / "out", dtype=dtype))
    assert_same_bits(ours, saved(tmp_path / "peft"))


def test_wide_matrices_in_pieces_have_the_bits_of_the_whole_product(seed: int) -> None:
    """The pieces are short in a merge; here each is held against one product of all rows, over many shapes."""
    generator = torch.Generator().manual_seed(seed)
    rng = random.Random(seed)
    for _ in range(60):
        rows, width, rank = rng.randrange(1, 700), rng.randrange(1, 900), rng.randrange(1, 130)
        a, b = torch.randn(rank, width, generator=generator), torch.randn(rows, rank, generator=generator)
        whole = b @ a
        for start, end in pieces(rows, width, rng.choice([width * STEP, width * 64, 1 << 19])):
            assert torch.equal(b[start:end] @ a, whole[start:end]), (rows, width, rank, start, end)


def test_large_layers_that_take_many_pieces_have_the_bits_of_pefts(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    sizes = {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 1, "vocab_size": 4099}
    model = make_base(tmp_path / "base", "llama", seed, "bfloat16", **sizes)
    linear = FAMILIES["llama"][2]
    settings: list[dict[str, Any]] = [
        {"r": rng.randrange(1, 70)},
        {"r": rng.randrange(1, 70), "use_dora": True, "target_modules": [*linear, "embed_tokens"]},
        {"r": rng.randrange(1, 70), "target_modules": [*linear, "embed_tokens", "lm_head"], "use_rslora": True},
        {"r": 4, "modules_to_save": ["embed_tokens", "lm_head"]},
    ]
    for number, more in enumerate(settings):
        stack = [(make_adapter(tmp_path / str(number), "llama", model, seed + number, **more), 1.0)]
        peft_merge(tmp_path / "base", "bfloat16", stack, tmp_path / f"peft{number}")
        ours = streamed(plan(tmp_path / "base", stack, tmp_path / "out"))
        assert_same_bits(ours, saved(tmp_path / f"peft{number}"), more)


def test_plain_families_have_the_same_names_on_disk_and_in_memory() -> None:
    """Headers alone serve these families because transformers renames and converts nothing of theirs."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    for family in sorted(PLAIN):
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](num_hidden_layers=2))
        rules = get_model_conversion_mapping(model)
        renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        state = model.state_dict()
        for name in state:
            found, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
            assert (found, pattern) == (name, None), family
