"""Adapters against models by headers alone: matched, unmatched, why; health; the time that 1,000 models take."""

from __future__ import annotations

import json
import random
import struct
import time
from pathlib import Path

import pytest

from app.core.adapter_config import parse_adapter_config, pattern_key
from app.core.adapter_file import AdapterFile, read_adapter_file
from app.core.adapter_health import look
from app.core.compatibility import Verdict, adapter_extras, check, check_paths, model_modules, rank_bases, summary
from app.core.errors import ErrorKind, WeftError
from app.core.library import ModelEntry, ModelFormat, ModelShape
from tests import seeds
from tests.fakes.library_files import gguf_bytes, safetensors_bytes

LAYERS, HIDDEN, INNER, HEADS, KV, HEAD, VOCABULARY = 3, 32, 48, 4, 2, 8, 100
Q, K = HEADS * HEAD, KV * HEAD
SHAPE = ModelShape(
    layers=LAYERS, hidden=HIDDEN, intermediate=INNER, heads=HEADS, kv_heads=KV, head_dim=HEAD, value_dim=HEAD, vocabulary=VOCABULARY
)  # fmt: skip
_LLAMA = {
    "self_attn.q_proj": (Q, HIDDEN), "self_attn.k_proj": (K, HIDDEN), "self_attn.v_proj": (K, HIDDEN), "self_attn.o_proj": (HIDDEN, Q),
    "mlp.gate_proj": (INNER, HIDDEN), "mlp.up_proj": (INNER, HIDDEN), "mlp.down_proj": (HIDDEN, INNER),
}  # fmt: skip
_QKV = Q + 2 * K
# Modules of the layers by family, as transformers names them: (prefix of layers, embeddings, head, modules).
FAMILIES: dict[str, tuple[str, str, str, dict[str, tuple[int, int]]]] = dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma", "cohere"), ("model.layers", "model.embed_tokens", "lm_head", _LLAMA)) | {
    "mixtral": ("model.layers", "model.embed_tokens", "lm_head", {k: v for k, v in _LLAMA.items() if k.startswith("self")}),
    "phi": ("model.layers", "model.embed_tokens", "lm_head", {
        "self_attn.q_proj": (Q, HIDDEN), "self_attn.k_proj": (K, HIDDEN), "self_attn.v_proj": (K, HIDDEN),
        "self_attn.dense": (HIDDEN, Q), "mlp.fc1": (INNER, HIDDEN), "mlp.fc2": (HIDDEN, INNER),
    }),
    "phi3": ("model.layers", "model.embed_tokens", "lm_head", {
        "self_attn.qkv_proj": (_QKV, HIDDEN), "self_attn.o_proj": (HIDDEN, Q),
        "mlp.gate_up_proj": (2 * INNER, HIDDEN), "mlp.down_proj": (HIDDEN, INNER),
    }),
    "qwen": ("transformer.h", "transformer.wte", "lm_head", {
        "attn.c_attn": (_QKV, HIDDEN), "attn.c_proj": (HIDDEN, Q), "mlp.w1": (INNER // 2, HIDDEN), "mlp.w2": (INNER // 2, HIDDEN),
        "mlp.c_proj": (HIDDEN, INNER // 2),
    }),
    "dbrx": ("transformer.blocks", "transformer.wte", "lm_head", {
        "norm_attn_norm.attn.Wqkv": (_QKV, HIDDEN), "norm_attn_norm.attn.out_proj": (HIDDEN, Q),
    }),
    "gpt2": ("transformer.h", "transformer.wte", "lm_head", {
        "attn.c_attn": (_QKV, HIDDEN), "attn.c_proj": (HIDDEN, Q), "mlp.c_fc": (INNER, HIDDEN), "mlp.c_proj": (HIDDEN, INNER),
    }),
    "bloom": ("transformer.h", "transformer.word_embeddings", "lm_head", {
        "self_attention.query_key_value": (_QKV, HIDDEN), "self_attention.dense": (HIDDEN, Q),
        "mlp.dense_h_to_4h": (INNER, HIDDEN), "mlp.dense_4h_to_h": (HIDDEN, INNER),
    }),
}  # fmt: skip
GGUF = {  # what llama.cpp calls the same modules
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "self_attn.dense": "attn_output",
    "mlp.fc1": "ffn_up", "mlp.fc2": "ffn_down", "self_attn.qkv_proj": "attn_qkv", "mlp.gate_up_proj": "ffn_up",
    "attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output", "mlp.w1": "ffn_up", "mlp.w2": "ffn_gate", "mlp.c_proj": "ffn_down",
    "norm_attn_norm.attn.Wqkv": "attn_qkv", "norm_attn_norm.attn.out_proj": "attn_output", "mlp.c_fc": "ffn_up",
    "self_attention.query_key_value": "attn_qkv", "self_attention.dense": "attn_output", "mlp.dense_h_to_4h": "ffn_up",
    "mlp.dense_4h_to_h": "ffn_down",
}  # fmt: skip


def model(folder: Path, family: str, layers: int = LAYERS, hidden: int = HIDDEN) -> ModelEntry:
    prefix, embed, head, modules = FAMILIES[family]
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {f"{embed}.weight": ("F16", (VOCABULARY, hidden))}
    tensors[f"{head}.weight"] = ("F16", (VOCABULARY, hidden))
    for layer in range(layers):
        for name, (out, inputs) in modules.items():
            size = tuple(hidden if n == HIDDEN else n for n in (out, inputs))
            tensors[f"{prefix}.{layer}.{name}.weight"] = ("F16", size[::-1] if family == "gpt2" else size)
        tensors[f"{prefix}.{layer}.input_layernorm.weight"] = ("F16", (hidden,))
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "model.safetensors"
    file.write_bytes(safetensors_bytes(tensors))
    return entry(folder, family, (str(file),), layers=layers, hidden=hidden)


def gguf_model(path: Path, family: str) -> ModelEntry:
    modules = FAMILIES[family][3]
    tensors = [("token_embd.weight", (HIDDEN, VOCABULARY), 0), ("output.weight", (HIDDEN, VOCABULARY), 0)]
    for layer in range(LAYERS):
        tensors += [(f"blk.{layer}.{GGUF[name]}.weight", (n, out), 0) for name, (out, n) in modules.items()]
    path.write_bytes(gguf_bytes({"general.architecture": family}, tensors))
    return entry(path, family, (str(path),), format=ModelFormat.GGUF)


def entry(
    path: Path, family: str, files: tuple[str, ...] = (), layers: int = LAYERS, hidden: int = HIDDEN, **more: object
) -> ModelEntry:
    import msgspec

    shape = msgspec.structs.replace(
        SHAPE, layers=layers, hidden=hidden, experts=4 if family in ("mixtral", "dbrx") else 0
    )
    fields = {"format": ModelFormat.SAFETENSORS, **more}
    return ModelEntry(
        id=str(path),
        name=path.stem,
        path=str(path),
        model_type=family,
        architecture=family,
        shape=shape,
        files=files,
        **fields,
    )


def adapter(
    folder: Path, family: str, layers: int = LAYERS, extra: dict | None = None, rank: int = 4, **config: object
) -> AdapterFile:
    prefix, embed, head, modules = FAMILIES[family]
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    for layer in range(layers):
        for name, (out, inputs) in modules.items():
            tensors[f"base_model.model.{prefix}.{layer}.{name}.lora_A.weight"] = ("F32", (rank, inputs))
            tensors[f"base_model.model.{prefix}.{layer}.{name}.lora_B.weight"] = ("F32", (out, rank))
    tensors[f"base_model.model.{head}.lora_A.weight"] = ("F32", (rank, HIDDEN))
    tensors[f"base_model.model.{head}.lora_B.weight"] = ("F32", (VOCABULARY, rank))
    tensors[f"base_model.model.{embed}.lora_embedding_A"] = ("F32", (rank, VOCABULARY))
    tensors[f"base_model.model.{embed}.lora_embedding_B"] = ("F32", (HIDDEN, rank))
    tensors |= extra or {}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_model.safetensors").write_bytes(safetensors_bytes(tensors))
    settings = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": 8,
        "base_model_name_or_path": f"somebody/{family}",
        **config,
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return read_adapter_file(folder)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_an_adapter_fits_the_model_that_it_was_made_for_in_both_formats(tmp_path: Path, family: str) -> None:
    made = adapter(tmp_path / "adapter", family)
    total = LAYERS * len(FAMILIES[family][3]) + 2
    for base in (model(tmp_path / family, family), gguf_model(tmp_path / "model.gguf", family)):
        found = check_paths(made, base)
        assert (found.matched, found.total, found.unmatched) == (total, total, ()), summary(found)
        assert found.verdict is Verdict.FITS and found.exact
    assert check_paths(made, model(tmp_path / family, family)).same_base is True


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_index_alone_says_the_same_as_the_headers(tmp_path: Path, family: str) -> None:
    made = adapter(tmp_path / "adapter", family)
    for other in sorted(FAMILIES):
        base = model(tmp_path / other, other)
        exact, (guess,) = check_paths(made, base), rank_bases(made, [base])
        assert guess.compatibility.matched == exact.matched, (
            family,
            other,
            summary(exact),
            summary(guess.compatibility),
        )
        assert not guess.compatibility.exact


def test_what_does_not_fit_is_named_with_its_reason(tmp_path: Path) -> None:
    made = adapter(tmp_path / "adapter", "llama")
    short = check_paths(made, model(tmp_path / "short", "llama", layers=LAYERS - 1))
    assert short.verdict is Verdict.PARTLY and len(short.unmatched) == 7
    assert "the model has only 2 layers" in short.unmatched[0].reason
    wide = check_paths(made, model(tmp_path / "wide", "llama", hidden=64))
    assert wide.verdict is Verdict.NOT_AT_ALL
    assert "it is 32×32 there, 64×64 in the model" in wide.unmatched[0].reason
    fused = check_paths(made, model(tmp_path / "phi3", "phi3"))
    assert any("one matrix" in line for line in summary(fused))
    assert fused.same_base is False


def test_extras_are_understood_and_llama_cpp_is_warned_of(tmp_path: Path) -> None:
    extra = {
        "base_model.model.model.layers.0.input_layernorm.weight": ("F32", (HIDDEN,)),
        "base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector": ("F32", (Q,)),
        "base_model.model.model.layers.1.self_attn.q_proj.lora_B.bias": ("F32", (Q,)),
        "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta": ("F32", (2, HIDDEN)),
        "base_model.model.model.layers.0.self_attn.q_proj.hada_w1_a": ("F32", (Q,)),
    }
    made = adapter(tmp_path / "adapter", "llama", extra=extra, use_dora=True, trainable_token_indices=[3, 99])
    assert adapter_extras(made) == ["DoRA magnitudes", "modules trained whole", "trained biases", "trained tokens"]
    assert made.unknown == ["base_model.model.model.layers.0.self_attn.q_proj.hada_w1_a"]
    assert check_paths(made, model(tmp_path / "llama", "llama")).verdict is Verdict.FITS
    (known,) = [m for m in made.modules.values() if m.tokens]
    assert known.indices == (3, 99) and known.name == "model.embed_tokens"
    warned = " ".join(check_paths(made, gguf_model(tmp_path / "m.gguf", "llama")).warnings)
    assert "llama.cpp takes low-rank matrices alone" in warned and "DoRA" in warned
    outside = adapter(tmp_path / "outside", "llama", extra=extra, trainable_token_indices=[3, 100])
    assert (
        "not in the model's vocabulary" in check_paths(outside, model(tmp_path / "llama", "llama")).unmatched[0].reason
    )


def test_scales_follow_peft_s_patterns() -> None:
    config = parse_adapter_config(
        {"r": 8, "lora_alpha": 16, "alpha_pattern": {"q_proj": 4, "layers.1.mlp.up_proj": 2, r".*\.0\..*v_proj": 3}}
    )
    assert config.scale("model.layers.0.self_attn.q_proj", 8) == 0.5
    assert config.scale("model.layers.1.mlp.up_proj", 4) == 0.5
    assert config.scale("model.layers.11.mlp.up_proj", 4) == 4.0
    assert config.scale("model.layers.0.self_attn.v_proj", 1) == 3.0
    assert parse_adapter_config({"lora_alpha": 6, "use_rslora": True}).scale("x", 9) == 2.0
    assert parse_adapter_config({"r": 8}).scale("x", 8) is None
    assert (
        parse_adapter_config({"lora_parameters": {"rank": 8, "scale": 20.0}, "fine_tune_type": "lora"}).scale("x", 8)
        == 20.0
    )
    assert pattern_key(["q"], "model.layers.0.seq") is None


@pytest.mark.attack
@pytest.mark.parametrize("pattern", ["(a+)+$", "(.*a){20}", ".*.*.*.*x", "[", "x" * 5000])
def test_patterns_that_never_end_are_refused(pattern: str) -> None:
    started = time.process_time()
    with pytest.raises(WeftError) as refused:
        parse_adapter_config({"r": 8, "lora_alpha": 16, "alpha_pattern": {pattern: 4}})
    assert refused.value.kind is ErrorKind.HOSTILE and time.process_time() - started < 1


@pytest.mark.parametrize(
    ("names", "shapes", "words"),
    [
        (("q_proj.lora_A.weight",), ((4, 32),), "only one of its two"),
        (("q_proj.lora_A.weight", "q_proj.lora_B.weight"), ((4, 32), (32, 8)), "disagree"),
        (("q_proj.lora_A.weight", "q_proj.lora_B.weight"), ((4, 32, 1), (32, 4)), "two dimensions"),
    ],
)
def test_damaged_adapters_match_nothing(tmp_path: Path, names: tuple[str, ...], shapes: tuple, words: str) -> None:
    path = tmp_path / "x.safetensors"
    tensors = {f"base_model.model.model.layers.0.self_attn.{n}": ("F32", s) for n, s in zip(names, shapes, strict=True)}
    path.write_bytes(safetensors_bytes(tensors))
    made = read_adapter_file(path, alpha=8)
    assert any(words in problem for problem in made.problems)
    assert check_paths(made, model(tmp_path / "m", "llama")).verdict is Verdict.NOT_AT_ALL


def test_names_of_other_programs(tmp_path: Path) -> None:
    path = tmp_path / "adapters.safetensors"
    names = {"model.layers.0.self_attn.q_proj.lora_a": (HIDDEN, 4), "model.layers.0.self_attn.q_proj.lora_b": (4, Q)}
    path.write_bytes(safetensors_bytes({k: ("F32", v) for k, v in names.items()}))
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({"fine_tune_type": "lora", "lora_parameters": {"rank": 4, "scale": 20.0}})
    )
    mlx = read_adapter_file(path)
    (lora,) = mlx.modules["model.layers.0.self_attn.q_proj"].loras
    assert (lora.rank, lora.inputs, lora.outputs, lora.scale) == (4, HIDDEN, Q, 20.0)
    lone = tmp_path / "lone.safetensors"
    raw = {
        "model.layers.0.mlp.up_proj.lora_A.default.weight": (4, HIDDEN),
        "model.layers.0.mlp.up_proj.lora_B.default.weight": (INNER, 4),
    }
    lone.write_bytes(safetensors_bytes({k: ("F32", v) for k, v in raw.items()}))
    found = read_adapter_file(lone)
    assert found.needs_alpha and not read_adapter_file(lone, alpha=4).needs_alpha
    assert any(
        "alpha is not recorded" in warning for warning in check_paths(found, model(tmp_path / "m", "llama")).warnings
    )
    assert check_paths(mlx, model(tmp_path / "m", "llama")).verdict is Verdict.FITS


@pytest.mark.parametrize(
    ("dtype", "good", "bad"),
    [
        ("F32", (1.5, 3e38, -0.0), (float("nan"), float("inf"), float("-inf"))),
        ("F16", (1.5, 65504.0, -0.0), (float("nan"), float("inf"))),
        ("BF16", (1.5, 3e38, -0.0), (float("nan"), float("-inf"))),
    ],
)
def test_health_finds_what_is_no_number_and_what_is_nothing(
    tmp_path: Path, dtype: str, good: tuple, bad: tuple
) -> None:
    def encode(value: float) -> bytes:
        return (
            struct.pack("<e", value)
            if dtype == "F16"
            else struct.pack("<f", value)
            if dtype == "F32"
            else struct.pack("<f", value)[2:]
        )

    seed = random.randrange(1 << 30)
    print("seed", seed)
    path = tmp_path / "a.safetensors"
    layout = {
        f"layers.{i}.q_proj.lora_{s}.weight": (dtype, shape)
        for i in range(2)
        for s, shape in (("A", (2, 8)), ("B", (8, 2)))
    }
    empty = safetensors_bytes(layout)
    data = len(empty) - 64 * len(encode(0.0))
    path.write_bytes(empty)
    assert look(read_adapter_file(path, alpha=1)).zero == ("layers.0.q_proj", "layers.1.q_proj")
    for value in (*good, *bad):
        content = bytearray(empty)
        at = data + len(encode(0.0)) * (16 + random.Random(seed).randrange(16))  # in layer 0's B
        content[at : at + len(encode(value))] = encode(value)
        path.write_bytes(content)
        found = look(read_adapter_file(path, alpha=1))
        assert found.broken == (("layers.0.q_proj",) if value in bad or value != value else ())
        assert "layers.1.q_proj" in found.zero
    if -0.0 in good:
        content = bytearray(empty)
        content[data:] = encode(-0.0) * 64  # what a factor of 0 makes of negative numbers
        path.write_bytes(content)
        assert look(read_adapter_file(path, alpha=1)).zero == ("layers.0.q_proj", "layers.1.q_proj")


def test_a_thousand_indexed_models_take_less_than_a_second(tmp_path: Path) -> None:
    families = sorted(FAMILIES)
    entries = [entry(tmp_path / f"model {i}", families[i % len(families)], layers=LAYERS + i % 5) for i in range(1000)]
    made = adapter(tmp_path / "adapter", "llama", layers=LAYERS)
    started = time.process_time()
    ranked = rank_bases(made, entries)
    seconds = time.process_time() - started
    print(f"1,000 models in {seconds:.3f} s")
    assert seconds < 1
    assert len(ranked) == 1000 and ranked[0].compatibility.verdict is Verdict.FITS
    assert {r.model.model_type for r in ranked if r.compatibility.verdict is Verdict.FITS} >= {"llama", "mistral"}
    fractions = [r.compatibility.matched for r in ranked]
    assert fractions == sorted(fractions, reverse=True)


def test_a_gptq_and_an_awq_model_tell_their_shapes_in_other_ways(tmp_path: Path) -> None:
    made = adapter(tmp_path / "adapter", "mixtral")
    for kind in ("gptq", "awq"):
        tensors: dict[str, tuple[str, tuple[int, ...]]] = {
            "lm_head.weight": ("F16", (VOCABULARY, HIDDEN)),
            "model.embed_tokens.weight": ("F16", (VOCABULARY, HIDDEN)),
        }
        for layer in range(LAYERS):
            for name, (out, inputs) in FAMILIES["mixtral"][3].items():
                start = f"model.layers.{layer}.{name}"
                tensors[f"{start}.scales"] = ("F16", (1, out))
                if kind == "gptq":
                    tensors[f"{start}.qweight"], tensors[f"{start}.g_idx"] = (
                        ("I32", (inputs // 8, out)),
                        ("I32", (inputs,)),
                    )
                else:
                    tensors[f"{start}.qweight"] = ("I32", (inputs, out // 8))
        file = tmp_path / kind / "model.safetensors"
        file.parent.mkdir()
        file.write_bytes(safetensors_bytes(tensors))
        base = entry(file.parent, "mixtral", (str(file),), format=ModelFormat(kind))
        assert set(model_modules(base).shapes.values()) > {(Q, HIDDEN), (K, HIDDEN)}
        assert check(made, model_modules(base)).verdict is Verdict.FITS


def test_repeated_layers_are_held_against_the_layers_that_they_repeat(tmp_path: Path) -> None:
    base = model(tmp_path / "m", "llama")
    ranges = [[0, 3], [1, 3]]
    made = adapter(tmp_path / "fits", "llama", layers=5, layer_replication=ranges)
    for found in (check_paths(made, base), rank_bases(made, [base])[0].compatibility):
        assert found.verdict is Verdict.FITS, summary(found)
    beyond = check_paths(adapter(tmp_path / "beyond", "llama", layers=4, layer_replication=[[0, 2], [2, 4]]), base)
    assert beyond.verdict is Verdict.PARTLY and "repeats layer 3" in beyond.unmatched[0].reason
    assert any("repeat the same ones" in warning for warning in check_paths(made, base).warnings)
    assert "repeated layers" in adapter_extras(made)
    warnings = check_paths(made, gguf_model(tmp_path / "m.gguf", "llama")).warnings
    assert any("merged copy" in line and "repeated layers" in line for line in warnings)
    # llama.cpp gives some architectures another kind of attention by the layer's number.
    odd = tmp_path / "odd.gguf"
    tensors = [("token_embd.weight", (HIDDEN, VOCABULARY), 0)]
    tensors += [
        (f"blk.{layer}.{GGUF[name]}.weight", (n, out), 0)
        for layer in range(LAYERS)
        for name, (out, n) in FAMILIES["llama"][3].items()
    ]
    odd.write_bytes(gguf_bytes({"general.architecture": "gemma3"}, tensors))
    warnings = check_paths(made, entry(odd, "gemma3", (str(odd),), format=ModelFormat.GGUF)).warnings
    assert any("apart by their numbers" in line and "'gemma3'" in line for line in warnings), warnings
    assert not any("merged copy" in line for line in warnings)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_16", "olora", "corda", "lora_ga"])
def test_adapters_of_a_base_that_was_changed_are_refused_in_words(tmp_path: Path, init: str) -> None:
    base = model(tmp_path / "m", "llama")
    made = adapter(tmp_path / "unconverted", "llama", init_lora_weights=init)
    assert init in made.problems[0] and "path_initial_model_for_weight_conversion" in made.problems[0]
    assert check_paths(made, base).verdict is Verdict.NOT_AT_ALL
    for harmless in (True, False, "gaussian", "eva", "orthogonal"):
        fine = adapter(tmp_path / f"fine {harmless}", "llama", init_lora_weights=harmless)
        assert not fine.problems and check_paths(fine, base).verdict is Verdict.FITS


def test_a_gguf_adapter_fits_models_of_its_architecture_in_both_formats(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    metadata = {
        "general.type": "adapter",
        "general.architecture": "llama",
        "adapter.type": "lora",
        "adapter.lora.alpha": 8.0,
    }
    pairs = [
        (f"blk.{i}.attn_q.weight.lora_{s}", shape, 0)
        for i in range(2)
        for s, shape in (("a", (HIDDEN, 4)), ("b", (4, Q)))
    ]
    path.write_bytes(gguf_bytes(metadata, pairs))
    made = read_adapter_file(path)
    for family, fits in (("llama", True), ("mistral", True), ("qwen2", False), ("gemma", False)):
        base = model(tmp_path / family, family)
        for found in (check_paths(made, base), rank_bases(made, [base])[0].compatibility):
            assert (found.verdict is Verdict.FITS) == fits, (family, summary(found))
    assert (
        "it was made for llama, the model is qwen2"
        in check_paths(made, model(tmp_path / "q", "qwen2")).unmatched[0].reason
    )
    assert check_paths(made, gguf_model(tmp_path / "llama.gguf", "llama")).verdict is Verdict.FITS
    assert check_paths(made, gguf_model(tmp_path / "qwen2.gguf", "qwen2")).verdict is Verdict.NOT_AT_ALL


def test_revisions_and_unknown_orders_are_told(tmp_path: Path) -> None:
    made = adapter(tmp_path / "a", "llama", revision="0123abcd")
    assert any("revision 0123abcd" in w for w in check_paths(made, model(tmp_path / "m", "llama")).warnings)
    assert not check_paths(made, model(tmp_path / "snapshots" / "0123abcd", "llama")).warnings
    base = entry(
        tmp_path / "odd.gguf", "novel", (str(gguf_model(tmp_path / "odd.gguf", "llama").path),), format=ModelFormat.GGUF
    )
    assert any("orders the attention" in w for w in check_paths(made, base).warnings)


@pytest.mark.attack
def test_configs_that_would_keep_us_busy_end_soon(tmp_path: Path) -> None:
    with pytest.raises(WeftError) as layers:
        parse_adapter_config({"r": 8, "lora_alpha": 8, "layer_replication": [[0, 4095]] * 100_000})
    with pytest.raises(WeftError) as expressions:
        parse_adapter_config({"r": 8, "lora_alpha": 8, "alpha_pattern": {f"x{i}.*y": 1 for i in range(5000)}})
    assert {layers.value.kind, expressions.value.kind} == {ErrorKind.HOSTILE}
    pairs = {f"layers.{i}.q_proj.lora_{s}.weight": ("F32", (1, 1)) for i in range(6000) for s in "AB"}
    (tmp_path / "adapter_model.safetensors").write_bytes(safetensors_bytes(pairs))
    patterns = {f"no.{i}.such": 1 for i in range(100_000)} | {"layers.5999.q_proj": 3}
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 1, "lora_alpha": 2, "alpha_pattern": patterns}))
    started = time.process_time()
    found = read_adapter_file(tmp_path)
    seconds = time.process_time() - started
    print(f"100,000 patterns for 6,000 modules: {seconds:.2f} s")
    assert seconds < 2
    assert found.modules["layers.5999.q_proj"].loras[0].scale == 3.0
    assert found.modules["layers.0.q_proj"].loras[0].scale == 2.0


def test_patterns_are_tried_in_their_order() -> None:
    """As PEFT does: each is an expression for the end of the name, the first that matches counts."""
    import re

    numbers = random.Random(seeds.fresh())
    parts = ["model", "layers", "0", "1", "11", "self_attn", "q_proj", "seq_proj"]
    special = [r".*\.1\..*_proj", r"layers\.[01]\..*", "q_proj|x"]
    for _ in range(300):
        module = ".".join(numbers.choices(parts, k=4))
        patterns = [".".join(numbers.choices(parts, k=numbers.randrange(1, 4))) for _ in range(5)] + special
        numbers.shuffle(patterns)
        plain = [p if p in special else re.escape(p) for p in patterns]
        expected = next((p for p, e in zip(patterns, plain, strict=True) if re.match(rf"(.*\.)?({e})$", module)), None)
        assert pattern_key(patterns, module) == expected, (module, patterns)


def test_what_a_merged_copy_serves_fits_a_gguf(tmp_path: Path) -> None:
    """Whole modules fit with a warning that tells of the copy; so do pairs of an embedding that is the output head too."""
    extra = {"base_model.model.lm_head.weight": ("F32", (VOCABULARY, HIDDEN))}
    made = adapter(tmp_path / "adapter", "llama", extra=extra)
    found = check_paths(made, gguf_model(tmp_path / "m.gguf", "llama"))
    assert found.verdict is Verdict.FITS, found.unmatched
    assert any("merged copy of the model serves it" in warning for warning in found.warnings)
    tensors = [("token_embd.weight", (HIDDEN, VOCABULARY), 0)]
    tensors += [
        (f"blk.{layer}.{GGUF[name]}.weight", (n, out), 0)
        for layer in range(LAYERS)
        for name, (out, n) in FAMILIES["llama"][3].items()
    ]
    tied = tmp_path / "tied.gguf"
    tied.write_bytes(gguf_bytes({"general.architecture": "llama"}, tensors))
    plain = adapter(tmp_path / "plain", "llama")
    found = check_paths(plain, entry(tied, "llama", (str(tied),), format=ModelFormat.GGUF))
    assert found.verdict is Verdict.FITS, found.unmatched
