"""Mixtures of experts, whatever their form on disk and in memory; and PEFT, where streaming cannot take a form apart."""

from __future__ import annotations

import random
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

from app.adapters import merge_names_torch
from app.core.errors import ErrorKind, WeftError
from app.core.merge_needs import merge_needs
from app.tasks import merge as task
from tests.engine.adapter_kit import logits, tokens
from tests.engine.merge_kit import (
    DTYPES,
    Report,
    assert_same_bits,
    load,
    make_adapter,
    make_base,
    peft_merge,
    plan,
    saved,
    streamed,
)

_COMMON = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.2, "bos_token_id": 0, "eos_token_id": 1,
    "pad_token_id": None, "tie_word_embeddings": False,
}  # fmt: skip
_EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
# Config class, changes, parameters of experts. On disk: one matrix for each expert, or all in one; as (out, in) or (in, out).
MIXTURES: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 8},
        _EXPERTS,
    ),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        {
            "num_experts": 3,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 40,
        },
        _EXPERTS,
    ),
    "gpt_oss": ("GptOssConfig", {"num_local_experts": 3, "num_experts_per_tok": 2, "head_dim": 8}, _EXPERTS),
    "phimoe": ("PhimoeConfig", {"num_local_experts": 3, "num_experts_per_tok": 2}, _EXPERTS),
    "llama4": (
        "Llama4TextConfig",
        {"num_local_experts": 3, "head_dim": 8, "intermediate_size_mlp": 48, "use_qk_norm": False},
        ["feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj"],
    ),
    "granitemoe": ("GraniteMoeConfig", {"num_local_experts": 3, "num_experts_per_tok": 2}, []),
}


@pytest.mark.parametrize("family", MIXTURES)
def test_mixtures_of_experts_have_the_bits_of_pefts(tmp_path: Path, family: str, seed: int) -> None:
    rng = random.Random(seed)
    kind, changes, parameters = MIXTURES[family]
    dtype = rng.choice(list(DTYPES))
    base = tmp_path / "base"
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, kind)(**{**_COMMON, **changes}))
    model.config.dtype = DTYPES[dtype]
    model.to(DTYPES[dtype]).save_pretrained(tmp_path / "first")
    # Transformers keeps some norms in float32 whatever is asked for; as it loads them, so the base is to have them.
    load(tmp_path / "first", dtype).save_pretrained(base)
    linear = {n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    chosen = sorted(linear - {"lm_head", "gate", "router"})
    settings = {"r": rng.randrange(1, 9), "lora_alpha": rng.randrange(1, 20), "target_modules": chosen}
    if parameters:
        settings["target_parameters"] = parameters
    stack = []
    for number, weight in enumerate((1.0, -0.4)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            wrapped = peft.get_peft_model(load(base, dtype).float(), peft.LoraConfig(**settings))  # type: ignore[arg-type]
        with torch.no_grad():
            for parameter in wrapped.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.15)
        wrapped.save_pretrained(tmp_path / f"a{number}")
        stack.append((tmp_path / f"a{number}", weight))
    for one in (stack[:1], stack):
        peft_merge(base, dtype, one, tmp_path / f"peft{len(one)}")
        assert_same_bits(
            streamed(plan(base, one, tmp_path / "out")), saved(tmp_path / f"peft{len(one)}"), (family, dtype)
        )


def test_what_streaming_cannot_take_apart_is_merged_by_peft_and_said(
    tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tmp_path / "base"
    model = make_base(base, "mixtral", seed, "bfloat16", "30KB")
    experts = make_adapter(tmp_path / "a", "mixtral", model, seed, target_parameters=_EXPERTS)
    stack = [(experts, 0.7)]
    expected = streamed(plan(base, stack, tmp_path / "no"))

    def unknown(tensors: Any, state: Any, target: str, rule: Any, *rest: Any) -> None:
        rest[-1][target] = "it is made of tensors on disk by a rule of its own"

    monkeypatch.setattr(merge_names_torch, "_convert", unknown)
    report = Report()
    done = task.run(plan(base, stack, tmp_path / "out", shard_size=40_000), report)
    assert done.method == "peft"
    assert "whole model in memory" in done.notes[0]
    assert report.logged
    assert_same_bits(saved(tmp_path / "out"), expected)
    merged = load(tmp_path / "out", "bfloat16")
    assert not torch.equal(logits(merged, tokens(seed)), logits(model, tokens(seed)))
    assert (tmp_path / "out" / "README.md").is_file()
    # A stack that PEFT would merge into something else is refused instead.
    dora = make_adapter(tmp_path / "b", "mixtral", model, seed + 1, use_dora=True)
    with pytest.raises(WeftError) as caught:
        task.run(plan(base, [(experts, 0.7), (dora, 0.5)], tmp_path / "out2"), Report())
    assert caught.value.kind is ErrorKind.UNSUPPORTED
    assert not (tmp_path / "out2").exists()


@pytest.mark.parametrize("dtype", ["", "float32"])
def test_the_disk_that_a_merge_takes_is_known_beforehand(tmp_path: Path, dtype: str, seed: int) -> None:
    model = make_base(tmp_path / "base", "llama", seed, "bfloat16", "30KB")
    made = plan(
        tmp_path / "base", [(make_adapter(tmp_path / "a", "llama", model, seed), 1.0)], tmp_path / "out", dtype=dtype
    )
    needs = merge_needs(made)
    done = task.run(made, Report())
    taken = sum(p.stat().st_size for p in Path(done.folder).iterdir())
    assert needs.fits
    assert taken <= needs.disk <= taken + 17 * 1024 * 1024


def test_other_kinds_of_adapters_are_merged_by_peft(tmp_path: Path, seed: int) -> None:
    base = tmp_path / "base"
    model = make_base(base, "llama", seed)
    torch.manual_seed(seed)
    wrapped = peft.get_peft_model(load(base), peft.LoHaConfig(r=3, alpha=5, target_modules=["q_proj", "down_proj"]))
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    wrapped.save_pretrained(tmp_path / "a")
    ids = tokens(seed)
    expected = logits(wrapped.eval(), ids)
    done = task.run(plan(base, [(tmp_path / "a", 1.0)], tmp_path / "out"), Report())
    assert done.method == "peft"
    assert (logits(load(tmp_path / "out"), ids) - expected).abs().max() < 1e-4
    assert not torch.equal(expected, logits(model, ids))
    with pytest.raises(WeftError):
        task.run(plan(base, [(tmp_path / "a", 0.5)], tmp_path / "half"), Report())
    assert not (tmp_path / "half").exists()


def test_an_architecture_that_transformers_does_not_know_is_merged_by_its_own_names(tmp_path: Path, seed: int) -> None:
    import json

    base = tmp_path / "base"
    model = make_base(base, "llama", seed, "bfloat16")
    stack = [(make_adapter(tmp_path / "a", "llama", model, seed), 0.6)]
    expected = streamed(plan(base, stack, tmp_path / "no"))
    config = json.loads((base / "config.json").read_text())
    config |= {"model_type": "homemade", "architectures": ["HomemadeForCausalLM"], "auto_map": {"AutoConfig": "x.Y"}}
    (base / "config.json").write_text(json.dumps(config))
    done = task.run(plan(base, stack, tmp_path / "out"), Report())
    assert_same_bits(saved(tmp_path / "out"), expected)
    assert any("homemade" in note for note in done.notes)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["auto_map"] == {"AutoConfig": "x.Y"}
