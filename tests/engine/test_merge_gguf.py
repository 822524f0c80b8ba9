"""Stacks merged into GGUF files: logits of the merged transformers model, untouched bytes, quantized bases, bad input."""

from __future__ import annotations

import random
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from app.adapters.ggml import ggml
from app.adapters.gguf_edits import open_base
from app.adapters.gguf_head import head_of
from app.adapters.gguf_quantize import quantize
from app.adapters.gguf_repeat import with_repeated_layers
from app.adapters.gguf_writer import write_gguf
from app.adapters.merge_gguf import MergeIntoGguf, Types, merge_into_gguf
from app.core.errors import ErrorKind, WeftError
from app.core.formats import read_gguf_header
from app.core.ggml import TYPES
from app.core.stack import AdapterStack, StackedAdapter
from tests import seeds
from tests.engine import gguf_kit, tiny_gguf
from tests.engine.adapter_kit import (
    FAMILIES,
    any_weight,
    differences,
    logits,
    merged,
    random_adapter,
    random_model,
    tokens,
)
from tests.engine.half_gelu import GELU, as_in_ggml
from tests.engine.llama_helpers import Bare
from tests.engine.test_repeated_layers import RANGES, repeated

llama_cpp: Any = pytest.importorskip("llama_cpp")
ALWAYS_TIED = ("gemma", "cohere")
TOLERANCE = 1e-3


def stack(*pairs: tuple[Path, float]) -> AdapterStack:
    return AdapterStack(adapters=tuple(StackedAdapter(path=str(path), weight=weight) for path, weight in pairs))


def merge(base: Path, target: Path, *pairs: tuple[Path, float], types: Types = "open") -> list[str]:
    return merge_into_gguf(base, stack(*pairs), target, lambda *_: None, lambda: False, types)


def llama_logits(path: Path, ids: list[int]) -> np.ndarray:
    """Logits of every place, flash attention off, float32 cache: [tokens, vocabulary]."""
    found = []
    with Bare(
        path, context=64, type_k=llama_cpp.GGML_TYPE_F32, type_v=llama_cpp.GGML_TYPE_F32,
        flash_attn_type=llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED,
    ) as bare:  # fmt: skip
        for token in ids:
            bare.decode([token])
            found.append(bare.logits())
    return np.stack(found)


def tensors(path: Path) -> dict[str, tuple[int, bytes]]:
    data = path.read_bytes()
    return {t.name: (t.type, data[t.offset : t.offset + t.bytes]) for t in read_gguf_header(path).tensors}


def values(path: Path) -> dict[str, np.ndarray]:
    """Tensors as float32 through gguf-py's own dequantizers."""
    return {
        t.name: gguf.quants.dequantize(t.data, t.tensor_type).astype(np.float32) for t in gguf.GGUFReader(path).tensors
    }


def kinds(family: str) -> list[dict[str, Any]]:
    modules, embedding = FAMILIES[family][2], FAMILIES[family][3]
    found: list[dict[str, Any]] = [
        {"r": 4, "lora_alpha": 8, "rank_pattern": {modules[-1]: 7}, "alpha_pattern": {modules[0]: 1}},
        {"r": 9, "use_rslora": True},
        {"r": 3, "use_dora": True},
    ]
    if family not in ALWAYS_TIED:
        found.append({"r": 2, "target_modules": [*modules, embedding], "modules_to_save": ["lm_head"]})
    if family == "mixtral":
        found.append({"r": 2, "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]})
    return found


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_merged_file_has_the_merged_models_logits(tmp_path: Path, family: str, seed: int) -> None:
    model = random_model(family, seed, tie_word_embeddings=family in ALWAYS_TIED)
    base = gguf_kit.write(model, family, tmp_path / "base.gguf")
    rng = random.Random(seed)
    pairs = [
        (random_adapter(tmp_path / f"a{i}", family, model, seed + i, **kind), any_weight(rng))
        for i, kind in enumerate(kinds(family))
    ]
    notes = merge(base, tmp_path / "merged.gguf", *pairs)
    assert not [note for note in notes if "Left out" in note], notes
    ids = tokens(seed, rows=1)
    found = llama_logits(tmp_path / "merged.gguf", ids[0].tolist())
    wanted = logits(as_in_ggml(merged(model, pairs), family), ids)[0].numpy()
    tolerance = TOLERANCE * max(1.0, float(np.abs(wanted).max())) if family in GELU else TOLERANCE
    assert np.abs(found - llama_logits(base, ids[0].tolist())).max() > 0.01
    assert np.abs(found - wanted).max() < tolerance


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3", "cohere"])
def test_repeated_layers_are_those_of_the_longer_model(tmp_path: Path, family: str, seed: int) -> None:
    model = random_model(family, seed, tie_word_embeddings=family in ALWAYS_TIED)
    base = gguf_kit.write(model, family, tmp_path / "base.gguf")
    kinds: list[dict[str, Any]] = [{"use_dora": True}, {"r": 2, "use_rslora": True}]
    pairs = [
        (random_adapter(tmp_path / f"a{i}", family, model, seed + i, layer_replication=RANGES, **kind), 0.8 - 1.3 * i)
        for i, kind in enumerate(kinds)
    ]
    notes = merge(base, tmp_path / "merged.gguf", *pairs)
    assert notes == ["Layers are repeated as the adapter says: 2 became 4."]
    ids = tokens(seed, rows=1)
    wanted = logits(merged(repeated(model), pairs), ids)[0].numpy()
    assert np.abs(llama_logits(tmp_path / "merged.gguf", ids[0].tolist()) - wanted).max() < TOLERANCE


def test_lists_with_a_value_for_each_layer_go_with_the_layers(tmp_path: Path, seed: int) -> None:
    """Heads that differ from layer to layer stand in GGUF's keys."""
    rng = np.random.default_rng(seed)
    tensors = {"token_embd.weight": rng.normal(size=(8, 4)).astype(np.float32)}
    tensors |= {f"blk.{n}.attn_q.weight": np.full((4, 4), n, np.float32) for n in range(3)}
    base, target = tmp_path / "base.gguf", tmp_path / "merged.gguf"
    writer = gguf.GGUFWriter(base, "llama")
    writer.add_block_count(3)
    writer.add_head_count(2)
    writer.add_head_count_kv([1, 2, 1])
    writer.add_array("llama.some_list", [0.5, 1.5, 2.5])
    writer.add_array("tokenizer.ggml.tokens", ["a", "b", "c"])
    for name, value in tensors.items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    longer = with_repeated_layers(open_base(base), ((0, 2), (1, 3), (0, 1)))
    data = head_of(open_base(base).headers[0], [], without=longer.keys, added=list(longer.keys.values()))
    target.write_bytes(data)
    found = read_gguf_header(target).metadata
    assert found["llama.block_count"] == 5
    assert found["llama.attention.head_count_kv"] == (1, 2, 2, 1, 1)
    assert found["llama.some_list"] == (0.5, 1.5, 1.5, 2.5, 0.5)
    assert read_gguf_header(target).strings("tokenizer.ggml.tokens") == ["a", "b", "c"]
    order = [longer.base.tensors[f"blk.{n}.attn_q.weight"][1].offset for n in range(5)]
    stored = {name: tensor.offset for name, (_, tensor) in open_base(base).tensors.items()}
    assert order == [stored[f"blk.{n}.attn_q.weight"] for n in (0, 1, 1, 2, 0)]
    for ranges, words in ((((0, 4),), "has 3 layers"), (((2, 2),), "has 3 layers")):
        with pytest.raises(WeftError, match=words):
            with_repeated_layers(open_base(base), ranges)


SPECIALS: dict[str, dict[str, Any]] = {
    "embedding": {"target_modules": ["embed_tokens"]},
    "embedding dora": {"target_modules": ["embed_tokens", "q_proj"], "use_dora": True},
    "head": {"target_modules": ["lm_head"]},
    "embedding saved": {"modules_to_save": ["embed_tokens"]},
    "tokens": {"trainable_token_indices": [3, 7, 50]},
    "bias of B": {"lora_bias": True},
    "norms": {"modules_to_save": ["norm", "input_layernorm"]},
    "attention saved": {"modules_to_save": ["k_proj"], "target_modules": ["up_proj"]},
}


@pytest.mark.parametrize("tied", [False, True], ids=["own head", "tied"])
@pytest.mark.parametrize("special", list(SPECIALS))
def test_every_kind_of_adapter_equals_the_merged_model(tmp_path: Path, special: str, tied: bool, seed: int) -> None:
    model = random_model("llama", seed, tie_word_embeddings=tied)
    base = gguf_kit.write(model, "llama", tmp_path / "base.gguf")
    pairs = [
        (random_adapter(tmp_path / "a", "llama", model, seed, **SPECIALS[special]), 0.7),
        (random_adapter(tmp_path / "b", "llama", model, seed + 1), -0.4),
        (random_adapter(tmp_path / "c", "llama", model, seed + 2, **SPECIALS[special]), 0.3),
    ]
    notes = merge(base, tmp_path / "merged.gguf", *pairs)
    ids = tokens(seed, rows=1)
    wanted = logits(merged(model, pairs), ids)[0].numpy()
    found = llama_logits(tmp_path / "merged.gguf", ids[0].tolist())
    assert np.abs(found - wanted).max() < TOLERANCE, notes
    own = "output.weight" in tensors(tmp_path / "merged.gguf")
    assert own == (not tied or special in ("embedding", "embedding dora", "head", "embedding saved")), notes


@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt2", "bloom"])
def test_small_pieces_make_no_difference(
    tmp_path: Path, family: str, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from app.adapters import gguf_arithmetic

    model = random_model(family, seed, tie_word_embeddings=False)
    base = gguf_kit.write(model, family, tmp_path / "base.gguf")
    embedding = FAMILIES[family][3]
    settings = [*kinds(family), {"r": 2, "modules_to_save": [embedding]}, {"trainable_token_indices": [1, 5, 95]}]
    settings += (
        [{"r": 2, "target_modules": [embedding], "use_dora": True}, {"lora_bias": True}] if family != "mixtral" else []
    )
    pairs = [
        (random_adapter(tmp_path / f"a{i}", family, model, seed + i, **kind), 0.5 - 0.3 * i)
        for i, kind in enumerate(settings)
    ]
    merge(base, tmp_path / "large.gguf", *pairs)
    monkeypatch.setattr(gguf_arithmetic, "_PIECE", random.Random(seed).randint(40, 300))
    monkeypatch.setattr(gguf_arithmetic, "_HELD", 64)
    merge(base, tmp_path / "small.gguf", *pairs)
    large, small, plain = (values(tmp_path / name) for name in ("large.gguf", "small.gguf", "base.gguf"))
    changed = 0
    for name, value in large.items():
        assert np.abs(value - small[name]).max() <= 1e-5 * max(1.0, np.abs(value).max()), name
        changed += name not in plain or not np.array_equal(value, plain[name])
    assert changed > 8


@pytest.mark.parametrize(
    ("family", "saved"),
    [
        ("gemma", ["norm", "input_layernorm"]), ("qwen3", ["q_norm", "k_norm", "post_attention_layernorm"]), ("bloom", ["query_key_value"]),
        ("gpt2", ["c_attn", "c_fc"]), ("phi3", ["qkv_proj"]), ("mistral", ["q_proj"]), ("qwen2", ["k_proj"]),
    ],
)  # fmt: skip
def test_modules_trained_whole_are_the_tensors_of_the_merged_model(
    tmp_path: Path, family: str, saved: list[str], seed: int
) -> None:
    """Rows in llama.cpp's order, GPT-2's turned, biases with them, Gemma's norms with 1 added."""
    model = random_model(family, seed, tie_word_embeddings=family in ALWAYS_TIED)
    base = gguf_kit.write(model, family, tmp_path / "base.gguf")
    other = [name for name in FAMILIES[family][2] if name not in saved][-1:]
    pairs = [
        (
            random_adapter(tmp_path / f"a{n}", family, model, seed + n, modules_to_save=saved, target_modules=other),
            weight,
        )
        for n, weight in enumerate((0.6, -0.3))
    ]
    notes = merge(base, tmp_path / "merged.gguf", *pairs)
    assert not notes
    wanted = values(gguf_kit.write(merged(model, pairs), family, tmp_path / "wanted.gguf"))
    found, plain = values(tmp_path / "merged.gguf"), values(base)
    assert set(found) == set(wanted)
    for name, value in wanted.items():
        assert np.abs(found[name] - value).max() <= 2e-6 * max(1.0, np.abs(value).max()), name
    assert sum(not np.array_equal(found[name], plain[name]) for name in plain) >= 2 * len(saved) - 1


def test_what_no_adapter_touches_keeps_its_bytes_and_keys(tmp_path: Path, seed: int) -> None:
    entry = tiny_gguf.write(tmp_path / "base.gguf", hidden=256, intermediate=512, kind="Q4_K_M", seed=seed)
    adapter = plain_adapter(tmp_path / "a.gguf", {"blk.0.attn_q": (256, 256), "blk.1.ffn_up": (512, 256)}, seed)
    target = tmp_path / "merged.gguf"
    merge(Path(entry.path), target, (adapter, 0.8))
    before, after = tensors(Path(entry.path)), tensors(target)
    assert list(before) == list(after)
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"blk.0.attn_q.weight", "blk.1.ffn_up.weight"}
    assert all(TYPES[after[name][0]].name == "F16" for name in changed)
    old, new = gguf.GGUFReader(entry.path), gguf.GGUFReader(target)
    assert [f.name for f in old.fields.values()] == [f.name for f in new.fields.values()]
    for name, field in old.fields.items():
        if not name.startswith("GGUF."):
            assert all(np.array_equal(a, b) for a, b in zip(field.parts, new.fields[name].parts, strict=True)), name
    plain, merged_ = values(Path(entry.path)), values(target)
    lora = {t.name: t.data for t in gguf.GGUFReader(adapter).tensors}
    for name in changed:
        d = lora[f"{name}.lora_b"].astype(np.float64) @ lora[f"{name}.lora_a"] * (8.0 / 4) * 0.8
        assert np.abs(merged_[name] - (plain[name] + d)).max() <= 2**-10 * np.abs(plain[name] + d).max(), name


def plain_adapter(path: Path, shapes: dict[str, tuple[int, int]], seed: int, alpha: float = 8.0) -> Path:
    rng = np.random.default_rng(seed)
    pairs: dict[str, np.ndarray] = {}
    for name, (out, inputs) in shapes.items():
        pairs[f"{name}.weight.lora_a"] = (rng.standard_normal((4, inputs)) * 0.05).astype(np.float32)
        pairs[f"{name}.weight.lora_b"] = (rng.standard_normal((out, 4)) * 0.05).astype(np.float32)
    metadata: dict[str, Any] = {
        "general.architecture": "llama", "general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": alpha,
    }  # fmt: skip
    write_gguf(path, metadata, pairs)
    return path


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_K_M", "Q6_K", "Q2_K"])
def test_a_quantized_base_is_merged_over_its_own_values(tmp_path: Path, kind: str, seed: int) -> None:
    """DoRA's norms are those of what the file holds; opened tensors are within one f16 rounding, own types within a step."""
    model = random_model("llama", seed, hidden_size=256, intermediate_size=512)
    plain = gguf_kit.write(model, "llama", tmp_path / "f32.gguf")
    base = tmp_path / "base.gguf"
    quantize(plain, base, kind.lower(), threads=1)
    adapter = random_adapter(tmp_path / "a", "llama", model, seed, use_dora=True, target_modules=["up_proj"])
    opened, own = tmp_path / "opened.gguf", tmp_path / "own.gguf"
    notes = merge(base, opened, (adapter, 0.9))
    assert "F16 now" in notes[-1] and "stays rounded" in notes[-1]
    held = values(base)
    for layer in range(2):
        module = model.model.layers[layer].mlp.up_proj
        with torch.no_grad():
            module.weight.copy_(torch.from_numpy(held[f"blk.{layer}.ffn_up.weight"]))
    found = values(opened)
    for name, d in differences(model, adapter).items():
        tensor = f"blk.{name.split('.')[2]}.ffn_up.weight"
        wanted = held[tensor].astype(np.float64) + 0.9 * d.numpy()
        # Half a step of f16, and float32 arithmetic before it.
        assert np.abs(found[tensor] - wanted).max() <= (2**-11 + 1e-6) * np.abs(wanted).max(), name
    told = merge(base, own, (adapter, 0.9), types="own")
    assert "quantized again to their own types" in told[-1]
    assert {n: t for n, (t, _) in tensors(own).items()} == {n: t for n, (t, _) in tensors(base).items()}
    for name, (number, data) in tensors(own).items():
        if name.endswith("ffn_up.weight"):
            again = ggml().write(number, found[name])  # from f16: within a step
            step = np.abs(values(own)[name] - found[name]).max()
            assert len(again) == len(data) and step < 0.6 * np.abs(found[name]).max()
        else:
            assert data == tensors(base)[name][1], name
    ids = tokens(seed, rows=1)[0].tolist()
    exact, less = (torch.log_softmax(torch.from_numpy(llama_logits(p, ids)).double(), -1) for p in (opened, own))
    print(
        f"{kind}: KL of opened against quantized again {float((exact.exp() * (exact - less)).sum(-1).mean()):.5f} nats"
    )


def test_a_split_base_becomes_one_file(tmp_path: Path, seed: int) -> None:
    whole = tiny_gguf.write(tmp_path / "whole.gguf", seed=seed)
    parts = tiny_gguf.write(tmp_path / "parts.gguf", seed=seed, split=100_000)
    assert len(parts.files) > 1
    adapter = plain_adapter(tmp_path / "a.gguf", {"blk.1.ffn_gate": (128, 64)}, seed)
    merge(Path(whole.path), tmp_path / "one.gguf", (adapter, 1.0))
    notes = merge(Path(parts.path), tmp_path / "two.gguf", (adapter, 1.0))
    assert tensors(tmp_path / "one.gguf") == tensors(tmp_path / "two.gguf")
    assert f"{len(parts.files)} parts became one" in notes[-1]
    ids = [5, 300, 301, 302]
    assert np.array_equal(llama_logits(tmp_path / "one.gguf", ids), llama_logits(tmp_path / "two.gguf", ids))
    Path(parts.files[1]).unlink()
    with pytest.raises(WeftError, match="missing") as refused:
        merge(Path(parts.path), tmp_path / "three.gguf", (adapter, 1.0))
    assert refused.value.kind is ErrorKind.NOT_FOUND and not (tmp_path / "three.gguf").exists()


def test_ggml_reads_what_gguf_py_reads() -> None:
    rng = np.random.default_rng(seeds.fresh())
    library, tried = ggml(), 0
    for number, kind in TYPES.items():
        if not library.can_write(number):
            continue
        rows = rng.standard_normal((3, 512)).astype(np.float32)
        data = bytes(library.write(number, rows))
        assert len(data) == rows.size // kind.block * kind.bytes
        theirs = gguf.quants.dequantize(
            np.frombuffer(data, np.uint8).reshape(3, -1) if number > 1 else np.frombuffer(data, "<f4" if not number else "<f2").reshape(3, -1),
            gguf.GGMLQuantizationType(number),
        )  # fmt: skip
        assert np.array_equal(library.read(number, data, 512), theirs), kind.name
        tried += 1
    assert tried >= 15


@pytest.mark.fault
def test_a_full_drive_is_told_before_and_a_cancel_leaves_nothing(
    tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = tiny_gguf.write(tmp_path / "base.gguf", seed=seed)
    adapter = plain_adapter(tmp_path / "a.gguf", {"blk.0.ffn_gate": (128, 64)}, seed)
    target = tmp_path / "merged.gguf"
    calls: list[int] = []

    def cancelled() -> bool:
        calls.append(1)
        return len(calls) > 4

    with pytest.raises(WeftError) as stopped:
        merge_into_gguf(Path(entry.path), stack((adapter, 1.0)), target, lambda *_: None, cancelled)
    assert stopped.value.kind is ErrorKind.CANCELLED and not target.exists()
    from app.adapters import merge_staging

    monkeypatch.setattr(merge_staging.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(WeftError, match="are free") as refused:
        merge(Path(entry.path), target, (adapter, 1.0))
    assert refused.value.kind is ErrorKind.DISK_FULL and not target.exists()


@pytest.mark.attack
@pytest.mark.parametrize(
    "attack", ["shape", "architecture", "nan", "layer", "vocabulary", "heads", "zero heads", "huge", "weight", "alpha"]
)
def test_bad_input_is_refused_and_leaves_no_file(tmp_path: Path, attack: str, seed: int) -> None:
    entry = tiny_gguf.write(tmp_path / "base.gguf", seed=seed)
    base, target = Path(entry.path), tmp_path / "merged.gguf"
    adapter, weight = plain_adapter(tmp_path / "a.gguf", {"blk.0.attn_q": (64, 64)}, seed), 1.0
    model = random_model("llama", seed, hidden_size=64, intermediate_size=128, vocab_size=512)
    match attack:
        case "shape":
            adapter = plain_adapter(tmp_path / "b.gguf", {"blk.0.attn_q": (64, 32)}, seed)
        case "architecture":
            adapter.write_bytes(adapter.read_bytes().replace(b"llama", b"qwen2"))
        case "nan":
            spoilt = bytearray(adapter.read_bytes())
            spoilt[-4:] = struct.pack("<f", float("nan"))
            adapter.write_bytes(spoilt)
        case "layer":
            adapter = plain_adapter(tmp_path / "b.gguf", {"blk.7.attn_q": (64, 64)}, seed)
        case "vocabulary":
            grown = random_model("llama", seed, hidden_size=64, intermediate_size=128, vocab_size=600)
            adapter = random_adapter(tmp_path / "b", "llama", grown, seed, modules_to_save=["embed_tokens"])
        case "heads" | "zero heads":
            adapter = random_adapter(tmp_path / "b", "llama", model, seed)
            data = base.read_bytes()
            key = b"llama.attention.head_count"
            at = data.index(key + struct.pack("<I", 4)) + len(key) + 4
            base.write_bytes(data[:at] + struct.pack("<I", 5 if attack == "heads" else 0) + data[at + 4 :])
        case "huge":
            half = tiny_gguf.write(tmp_path / "half.gguf", seed=seed, kind="Q8_0")
            base, weight = Path(half.path), 1e9
        case "weight":
            weight = float("inf")
        case _:
            adapter = random_adapter(tmp_path / "b", "llama", model, seed)
            (adapter / "adapter_config.json").unlink()
            adapter = (adapter / "adapter_model.safetensors").rename(tmp_path / "lone.safetensors")
    with pytest.raises(WeftError) as refused:
        merge(base, target, (adapter, weight))
    assert refused.value.message and refused.value.hint
    assert not target.exists()


@pytest.mark.parametrize("family", ALWAYS_TIED)
def test_a_head_that_llama_cpp_has_no_place_for_is_refused_before(tmp_path: Path, family: str, seed: int) -> None:
    model = random_model(family, seed, tie_word_embeddings=True)
    base = gguf_kit.write(model, family, tmp_path / "base.gguf")
    adapter = random_adapter(tmp_path / "a", family, model, seed, target_modules=["embed_tokens"])
    with pytest.raises(WeftError, match="no head of its own"):
        MergeIntoGguf(base, stack((adapter, 1.0)))
    (tmp_path / "merged.gguf").unlink(missing_ok=True)
    alike = random_adapter(tmp_path / "b", family, model, seed, trainable_token_indices=[3, 4])
    notes = merge(base, tmp_path / "merged.gguf", (alike, 1.0))
    assert "output.weight" not in tensors(tmp_path / "merged.gguf"), notes
