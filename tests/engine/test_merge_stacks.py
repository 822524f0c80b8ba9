"""What PEFT cannot merge rightly follows the definition, rounded once; and a merged model answers as the live stack does."""

from __future__ import annotations

import json
import random
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from app.adapters.live_torch import LiveStack
from app.adapters.tensors_torch import open_adapter
from app.core.errors import ErrorKind, WeftError
from app.tasks import merge as task
from tests.engine import adapter_kit
from tests.engine.adapter_kit import (
    FAMILIES,
    any_weight,
    close,
    differences,
    logits,
    merged_logits,
    random_model,
    tokens,
)
from tests.engine.merge_kit import (
    DTYPES,
    Report,
    assert_same_bits,
    load,
    make_adapter,
    make_base,
    open_stream,
    peft_merge,
    plan,
    saved,
    streamed,
)

TOLERANCE = 1e-4
Stack = list[tuple[Path, float]]


def kinds(family: str) -> list[dict[str, Any]]:
    linear, embedding = FAMILIES[family][2], FAMILIES[family][3]
    found: list[dict[str, Any]] = [
        {"r": 4},
        {"r": 3, "use_dora": True},
        {"r": 5, "target_modules": [linear[0], embedding], "use_dora": True, "lora_alpha": 11},
        {"r": 2, "modules_to_save": ["lm_head"]},
        {"r": 9, "use_rslora": True, "lora_alpha": 3, "bias": "all"},
        {"r": 1, "trainable_token_indices": [2, 7, 40]},
    ]
    if family == "mixtral":
        found.append({"r": 2, "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]})
    return found


def make(tmp_path: Path, family: str, seed: int, dtype: str = "float32", **changes: Any) -> tuple[Any, list[Path]]:
    model = make_base(tmp_path / "base", family, seed, dtype, **changes)
    folders = [make_adapter(tmp_path / f"a{i}", family, model, seed + i, **k) for i, k in enumerate(kinds(family))]
    return model, folders


def half_steps(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """By how much a rounding to a dtype can move a float64 at most."""
    info = torch.finfo(dtype)
    exponent = torch.floor(torch.log2(value.abs().clamp_min(info.smallest_normal)))
    return 0.5 * info.eps * torch.exp2(exponent)


def on_disk(name: str, value: torch.Tensor) -> dict[str, torch.Tensor]:
    """A parameter under its names on disk: Mixtral's experts lie there one by one, gate and up apart."""
    owner, found, kind = name.partition(".mlp.experts.")
    if not found:
        return {name: value}
    parts = {"gate_up_proj": ("w1", "w3"), "down_proj": ("w2",)}[kind]
    return {
        f"{owner}.block_sparse_moe.experts.{expert}.{part}.weight": rows
        for expert, matrix in enumerate(value)
        for part, rows in zip(parts, matrix.chunk(len(parts)), strict=True)
    }


def pair_slack(folder: Path, weight: float) -> float:
    """By how much a float32 w·s·B·A of an adapter's experts can be off at most: 2^-24 for each of its roundings."""
    file = {k: v for k, v in load_file(folder / "adapter_model.safetensors").items() if ".experts." in k}
    config = json.loads((folder / "adapter_config.json").read_text())
    a, b = (max(float(v.abs().max()) for k, v in file.items() if f".lora_{side}." in k) for side in "AB")
    return (config["r"] + 4) * 2.0**-24 * abs(weight) * config["lora_alpha"] * a * b


def check_rounding(tmp_path: Path, family: str, dtype: str, seed: int, times: int) -> None:
    """Every tensor that a mixed stack changes, against float64.

    Half a step of the dtype is what one rounding may cost. A mixture's experts have the one pair that PEFT can merge
    into them, in PEFT's order: D is rounded, then the sum, so that theirs are two.
    """
    rng = random.Random(seed)
    model, folders = make(tmp_path, family, seed, dtype, tie_word_embeddings=False)
    state = model.state_dict()
    for _ in range(times):
        # The two DoRAs always: with anything else beside them nothing but the definition counts. And the experts' pair.
        chosen = [*folders[1:3], *rng.sample(folders[3:6], 2), *folders[6:]]
        stack = [(folder, rng.uniform(-1, 1.5)) for folder in chosen]
        slack = pair_slack(*stack[-1]) if folders[6:] else 0.0
        total: dict[str, torch.Tensor] = {}
        for folder, weight in stack:
            for name, d in differences(model, folder).items():
                total[name] = total.get(name, torch.zeros(())) + weight * d
        ours = streamed(plan(tmp_path / "base", stack, tmp_path / "out"))
        assert len(total) > 2 * len(FAMILIES[family][2]), "two layers' matrices, and the embedding"
        experts = 0
        for name, d in total.items():
            expected = state[name].double() + d
            first = torch.zeros(())
            if ".mlp.experts." in name:
                first = half_steps(d.abs() + slack, DTYPES[dtype]) + slack
            allowed = 1.01 * (first + half_steps(expected.abs() + first, DTYPES[dtype])) + 1e-12
            limits = on_disk(name, allowed)
            for key, wanted in on_disk(name, expected).items():
                assert ((ours[key].double() - wanted).abs() <= limits[key]).all(), (family, key, stack)
                experts += key != name
        assert experts == (2 * 3 * 3 if family == "mixtral" else 0)  # layers, experts, matrices


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_mixed_stacks_are_one_rounding_from_float64(tmp_path: Path, family: str, seed: int) -> None:
    check_rounding(tmp_path, family, random.Random(seed).choice(list(DTYPES)), seed, times=1)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_mixed_stacks_are_one_rounding_from_float64_in_every_dtype(
    tmp_path: Path, family: str, dtype: str, seed: int
) -> None:
    check_rounding(tmp_path, family, dtype, seed, times=2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_qwen_1_is_merged_by_its_own_names(tmp_path: Path, dtype: str, seed: int) -> None:
    """Transformers has no class for it: each merged matrix is one rounding from W + w·s·BA in float64, the rest is copied."""
    torch.manual_seed(seed)
    hidden, inner, rank, alpha, weight = 32, 48, 4, 6, any_weight(random.Random(seed))
    shapes = {
        "attn.c_attn": (3 * hidden, hidden), "attn.c_proj": (hidden, hidden), "mlp.w1": (inner, hidden),
        "mlp.w2": (inner, hidden), "mlp.c_proj": (hidden, inner),
    }  # fmt: skip
    base = {"transformer.wte.weight": torch.randn(96, hidden), "lm_head.weight": torch.randn(96, hidden)}
    base["transformer.ln_f.weight"] = torch.randn(hidden)
    pairs: dict[str, torch.Tensor] = {}
    for layer in range(2):
        start = f"transformer.h.{layer}"
        base |= {f"{start}.{norm}.weight": torch.randn(hidden) for norm in ("ln_1", "ln_2")}
        base[f"{start}.attn.c_attn.bias"] = torch.randn(3 * hidden)
        for name, (out, inputs) in shapes.items():
            base[f"{start}.{name}.weight"] = torch.randn(out, inputs) * 0.2
            pairs[f"base_model.model.{start}.{name}.lora_A.weight"] = torch.randn(rank, inputs) * 0.2
            pairs[f"base_model.model.{start}.{name}.lora_B.weight"] = torch.randn(out, rank) * 0.2
    base = {name: tensor.to(DTYPES[dtype]) for name, tensor in base.items()}
    config = {
        "model_type": "qwen", "architectures": ["QWenLMHeadModel"], "hidden_size": hidden, "intermediate_size": 2 * inner,
        "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 96, "tie_word_embeddings": False, "torch_dtype": dtype,
        "auto_map": {"AutoConfig": "configuration_qwen.QWenConfig", "AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel"},
    }  # fmt: skip
    told = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "target_modules": ["c_attn", "c_proj", "w1", "w2"]}
    for folder, tensors, file, settings in (
        ("base", base, "model.safetensors", ("config.json", config)),
        ("a", pairs, "adapter_model.safetensors", ("adapter_config.json", told)),
    ):
        (tmp_path / folder).mkdir()
        save_file(tensors, tmp_path / folder / file, metadata={"format": "pt"})
        (tmp_path / folder / settings[0]).write_text(json.dumps(settings[1]))
    done = task.run(plan(tmp_path / "base", [(tmp_path / "a", weight)], tmp_path / "out"), Report())
    assert done.method != "peft" and any("qwen" in note for note in done.notes), done.notes
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "qwen"
    ours = saved(tmp_path / "out")
    assert set(ours) == set(base)
    changed = {f"transformer.h.{layer}.{name}.weight" for layer in range(2) for name in shapes}
    for name, before in base.items():
        assert ours[name].dtype == before.dtype
        if name not in changed:
            assert torch.equal(ours[name], before), name
            continue
        key = f"base_model.model.{name.removesuffix('.weight')}"
        a, b = (pairs[f"{key}.lora_{side}.weight"].double() for side in "AB")
        factor = weight * alpha / rank
        expected = before.double() + factor * b @ a
        # D is a float32 product, as PEFT's: 2^-24 of its terms' sizes for each rounding, and for that of the sum.
        slack = 2.0**-24 * ((rank + 4) * abs(factor) * b.abs() @ a.abs() + expected.abs())
        allowed = 1.01 * half_steps(expected.abs() + slack, DTYPES[dtype]) + slack
        assert ((ours[name].double() - expected).abs() <= allowed).all(), name
        assert ((before.double() - expected).abs() > allowed).any(), name


@pytest.mark.parametrize(
    ("family", "tied"), [(f, tied) for f in sorted(FAMILIES) for tied in (False, True) if not (f == "dbrx" and tied)]
)
def test_a_merged_model_answers_as_the_live_stack(tmp_path: Path, family: str, tied: bool, seed: int) -> None:
    rng = random.Random(seed)
    model, folders = make(tmp_path, family, seed, tie_word_embeddings=tied)
    ids = tokens(seed)
    stack = [(folder, any_weight(rng)) for folder in rng.sample(folders, rng.choice([1, 2, 3]))]
    live = LiveStack(model)
    for folder, _ in stack:
        live.add(str(folder), open_adapter(folder))
    live.apply({str(folder): weight for folder, weight in stack})
    expected = logits(model, ids)
    live.close()
    base = logits(model, ids)
    done = task.run(plan(tmp_path / "base", stack, tmp_path / "out"), Report())
    merged = load(Path(done.folder))
    if (logits(merged, ids) - expected).abs().max() > TOLERANCE:
        exact = adapter_kit.merged(model, stack)
        assert close(logits(merged, ids), exact, ids) and close(expected, exact, ids), (family, stack, done.notes)
    assert not torch.equal(base, expected)
    same = merged.get_output_embeddings().weight is merged.get_input_embeddings().weight
    assert same == bool(merged.config.tie_word_embeddings)


def tie_pairs(folder: Path) -> None:
    """Training keeps what PEFT ties alike; random values of our own have to be made so."""
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    embedding, head = "base_model.model.model.embed_tokens", "base_model.model.lm_head"
    tensors[f"{head}.lora_A.weight"] = tensors[f"{embedding}.lora_embedding_B"].T.contiguous()
    tensors[f"{head}.lora_B.weight"] = tensors[f"{embedding}.lora_embedding_A"].T.contiguous()
    save_file(tensors, file, metadata={"format": "pt"})


def test_tied_models_stay_tied_unless_the_stack_parts_them(tmp_path: Path, seed: int) -> None:
    model = make_base(tmp_path / "base", "llama", seed, tie_word_embeddings=True)
    linear = FAMILIES["llama"][2]
    cases = [
        ({"r": 2}, True),
        ({"r": 2, "trainable_token_indices": [1, 5]}, True),
        ({"r": 2, "target_modules": [*linear, "embed_tokens"]}, False),
        ({"r": 2, "target_modules": ["embed_tokens"], "ensure_weight_tying": True}, True),
        ({"r": 2, "modules_to_save": ["lm_head"]}, False),
    ]
    ids = tokens(seed)
    for number, (settings, stays) in enumerate(cases):
        folder = make_adapter(tmp_path / f"a{number}", "llama", model, seed + number, **settings)
        if "ensure_weight_tying" in settings:
            tie_pairs(folder)
        stack = [(folder, 0.7)]
        done = task.run(plan(tmp_path / "base", stack, tmp_path / f"out{number}"), Report())
        merged = load(Path(done.folder))
        assert merged.config.tie_word_embeddings is stays, settings
        assert ("lm_head.weight" in saved(Path(done.folder))) is not stays
        live = LiveStack(model)
        live.add("a", open_adapter(stack[0][0]))
        live.apply({"a": 0.7})
        assert (logits(merged, ids) - logits(model, ids)).abs().max() < TOLERANCE, settings
        live.close()


def test_an_adapter_that_knows_fused_projections_apart(tmp_path: Path, seed: int) -> None:
    """Phi-3 keeps q, k, v in one matrix, and gate and up in another; an adapter may name its parts."""
    make_base(tmp_path / "base", "phi3", seed)
    torch.manual_seed(seed)
    outs = {"self_attn.q_proj": (32, 32), "self_attn.k_proj": (16, 32), "self_attn.v_proj": (16, 32), "mlp.gate_proj": (48, 32), "mlp.up_proj": (48, 32)}  # fmt: skip
    pairs: dict[str, torch.Tensor] = {}
    for layer in range(2):
        for name, (out, inputs) in outs.items():
            key = f"base_model.model.model.layers.{layer}.{name}"
            pairs[f"{key}.lora_A.weight"] = torch.randn(3, inputs) * 0.2
            pairs[f"{key}.lora_B.weight"] = torch.randn(out, 3) * 0.2
    folder = tmp_path / "a"
    folder.mkdir()
    save_file(pairs, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 3, "lora_alpha": 6}))
    ours = streamed(plan(tmp_path / "base", [(folder, 0.5)], tmp_path / "out"))
    base = load_file(tmp_path / "base" / "model.safetensors")
    for layer in range(2):
        start = f"model.layers.{layer}"
        for owner, parts in (("self_attn.qkv_proj", ["q_proj", "k_proj", "v_proj"]), ("mlp.gate_up_proj", ["gate_proj", "up_proj"])):  # fmt: skip
            keys = [f"base_model.model.{start}.{owner.split('.')[0]}.{part}" for part in parts]
            d = torch.cat([pairs[f"{k}.lora_B.weight"] @ pairs[f"{k}.lora_A.weight"] for k in keys])
            assert torch.equal(ours[f"{start}.{owner}.weight"], base[f"{start}.{owner}.weight"] + d)


def test_adapters_of_single_experts_have_the_bits_of_their_sum(tmp_path: Path, seed: int) -> None:
    make_base(tmp_path / "base", "mixtral", seed, "bfloat16")
    base = load_file(tmp_path / "base" / "model.safetensors")
    torch.manual_seed(seed)
    pairs: dict[str, torch.Tensor] = {}
    names = [n.removesuffix(".weight") for n in base if ".experts." in n]
    assert any("block_sparse_moe.experts.1.w1" in n for n in names)
    for name in names:
        out, inputs = base[f"{name}.weight"].shape
        pairs[f"base_model.model.{name}.lora_A.weight"] = torch.randn(3, inputs) * 0.2
        pairs[f"base_model.model.{name}.lora_B.weight"] = torch.randn(out, 3) * 0.2
    folder = tmp_path / "a"
    folder.mkdir()
    save_file(pairs, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 3, "lora_alpha": 6}))
    ours = streamed(plan(tmp_path / "base", [(folder, 1.0)], tmp_path / "out"))
    for name in names:
        key = f"base_model.model.{name}"
        d = pairs[f"{key}.lora_B.weight"] @ pairs[f"{key}.lora_A.weight"] * 2
        assert torch.equal(ours[f"{name}.weight"], base[f"{name}.weight"] + d.to(torch.bfloat16)), name


def test_repeated_layers_make_the_model_that_peft_runs_live(tmp_path: Path, seed: int) -> None:
    import peft

    model = make_base(tmp_path / "base", "llama", seed)
    more = {"layer_replication": [[0, 2], [0, 1], [1, 2]]}
    folder = make_adapter(tmp_path / "a", "llama", model, seed, **more)
    done = task.run(plan(tmp_path / "base", [(folder, 1.0)], tmp_path / "out"), Report())
    merged = load(Path(done.folder))
    assert merged.config.num_hidden_layers == 4
    ids = tokens(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = logits(peft.PeftModel.from_pretrained(model, folder).eval(), ids)
    assert (logits(merged, ids) - theirs).abs().max() < TOLERANCE
    other = make_adapter(tmp_path / "b", "llama", load(tmp_path / "base"), seed + 1)
    with pytest.raises(WeftError) as caught:
        open_stream(plan(tmp_path / "base", [(folder, 1.0), (other, 1.0)], tmp_path / "no"))
    assert caught.value.kind is ErrorKind.UNSUPPORTED


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("how", ["whole", "pair"])
def test_an_adapter_with_new_tokens_brings_them(tmp_path: Path, tied: bool, how: str, seed: int) -> None:
    import peft

    model = make_base(tmp_path / "base", "llama", seed, tie_word_embeddings=tied)
    grown = load(tmp_path / "base")
    grown.resize_token_embeddings(100)
    if how == "whole":
        settings: dict[str, Any] = {"modules_to_save": ["embed_tokens"] if tied else ["embed_tokens", "lm_head"]}
        settings |= {"ensure_weight_tying": True} if tied else {}
    else:
        settings = {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}
    if tied and how == "pair":
        settings = {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True}
    folder = make_adapter(tmp_path / "a", "llama", grown, seed, **settings)
    names = load_file(folder / "adapter_model.safetensors")
    assert any(100 in t.shape for t in names.values())
    if tied and not any(n.endswith(("embed_tokens.weight", "embed_tokens.base_layer.weight")) for n in names):
        pytest.skip("this PEFT does not save the embedding of a tied model")
    done = task.run(plan(tmp_path / "base", [(folder, 1.0)], tmp_path / "out"), Report())
    merged = load(Path(done.folder))
    assert merged.config.vocab_size == 100
    ids = torch.cat([tokens(seed), torch.randint(96, 100, (2, 4))], dim=1)
    grown = load(tmp_path / "base")
    grown.resize_token_embeddings(100)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = logits(peft.PeftModel.from_pretrained(grown, folder).eval(), ids)
    assert (logits(merged, ids) - theirs).abs().max() < TOLERANCE, done.notes
    with pytest.raises(WeftError) as caught:
        open_stream(plan(tmp_path / "base", [(folder, 0.5)], tmp_path / "no"))
    assert "weight 1" in caught.value.message
    assert model.config.vocab_size == 96


def test_a_trained_bias_goes_into_the_bias(tmp_path: Path, seed: int) -> None:
    model = make_base(tmp_path / "base", "phi", seed, "bfloat16")
    folder = make_adapter(tmp_path / "a", "phi", model, seed, lora_bias=True, r=3)
    peft_merge(tmp_path / "base", "bfloat16", [(folder, 0.6)], tmp_path / "peft")
    assert_same_bits(streamed(plan(tmp_path / "base", [(folder, 0.6)], tmp_path / "out")), saved(tmp_path / "peft"))
    make_base(tmp_path / "llama", "llama", seed)
    other = make_adapter(tmp_path / "b", "llama", load(tmp_path / "llama"), seed, lora_bias=True)
    with pytest.raises(WeftError) as caught:
        open_stream(plan(tmp_path / "llama", [(other, 1.0)], tmp_path / "no"))
    assert caught.value.kind is ErrorKind.UNSUPPORTED
    assert "bias" in caught.value.message


def test_names_without_a_prefix_and_pickled_bases(tmp_path: Path, seed: int) -> None:
    """The first GPT-2 has `h.0.…` on disk; older models are pickled files, tied matrices twice in them."""
    model = make_base(tmp_path / "base", "gpt2", seed)
    stack: Stack = [(make_adapter(tmp_path / "a", "gpt2", model, seed), 0.9)]
    ids = tokens(seed)
    expected = merged_logits(random_model("gpt2", seed), stack, ids)
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    (tmp_path / "base" / "model.safetensors").unlink()
    bare = {name.removeprefix("transformer."): t for name, t in tensors.items()}
    save_file(bare, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    done = task.run(plan(tmp_path / "base", stack, tmp_path / "out"), Report())
    assert (logits(load(Path(done.folder)), ids) - expected).abs().max() < TOLERANCE
    (tmp_path / "base" / "model.safetensors").unlink()
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"]
    torch.save(tensors, tmp_path / "base" / "pytorch_model.bin")
    done = task.run(plan(tmp_path / "base", stack, tmp_path / "from bin"), Report())
    assert (logits(load(Path(done.folder)), ids) - expected).abs().max() < TOLERANCE
    assert all(p.suffix != ".bin" for p in Path(done.folder).iterdir())
