"""GGUF adapters on transformers models: converted back, bit by bit, and used live with the logits of the original."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from safetensors.torch import load_file, save_file

from app.adapters import from_gguf, to_gguf
from app.adapters.conversion_cache import Cache
from app.adapters.live_torch import LiveStack
from app.adapters.tensors_torch import _base_of, open_adapter
from app.adapters.to_gguf import Base
from app.core.adapter_file import read_adapter_file
from app.core.errors import ErrorKind, WeftError
from app.core.formats import read_gguf_header
from app.core.recognise_gguf import adapter_problem
from tests.engine.adapter_kit import FAMILIES, logits, merged_logits, random_adapter, random_model, tokens

GGUF_NAMES = {"phi": "phi2", "cohere": "command-r", "mistral": "llama", "mixtral": "llama"}


def gguf_base(model: Any, family: str) -> Base:
    """What the GGUF file of this model would say, by our names of modules (a test holds these to gguf-py's)."""
    base = _base_of(model)
    shapes: dict[str, tuple[int, int]] = {}
    from app.adapters.base_torch import sizes

    for (layer, role), name in base.names.items():
        out, inputs = sizes(model.get_submodule(name))  # type: ignore[misc]
        shapes[f"blk.{layer}.{role}" if layer >= 0 else role] = (inputs, out) if role == "token_embd" else (out, inputs)
    return Base(GGUF_NAMES.get(family, family), base.heads, base.kv_heads, shapes)


def to_file(folder: Path, model: Any, family: str, target: Path) -> Path:
    made, notes = to_gguf.converted(folder, gguf_base(model, family), target)
    assert notes == []
    assert adapter_problem(read_gguf_header(made)) == ""
    return made


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_there_and_back_is_the_same_to_the_bit(tmp_path: Path, family: str, seed: int) -> None:
    model = random_model(family, seed, **({} if family == "dbrx" else {"tie_word_embeddings": False}))
    targets = [*FAMILIES[family][2], FAMILIES[family][3]]
    folder = random_adapter(
        tmp_path / "peft",
        family,
        model,
        seed,
        target_modules=targets,
        rank_pattern={targets[0]: 2},
    )
    made = to_file(folder, model, family, tmp_path / "cache")
    back, notes = from_gguf.converted(made, _base_of(model), tmp_path / "cache")
    assert notes == []
    before, after = load_file(folder / "adapter_model.safetensors"), load_file(back / "adapter_model.safetensors")
    before = {name: tensor for name, tensor in before.items() if ".base_layer." not in name}
    assert set(before) == set(after)
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]), name
    scales = [
        {n: [lora.scale for lora in m.loras] for n, m in read_adapter_file(f).modules.items() if m.loras}
        for f in (folder, back)
    ]
    assert scales[0] == scales[1]
    ids = tokens(seed)
    stack = LiveStack(model)
    assert stack.add("gguf", open_adapter(made, model=model)) == []
    stack.apply({"gguf": -0.7})
    assert (logits(model, ids).double() - merged_logits_of(model, stack, folder, ids)).abs().max() < 1e-4


def merged_logits_of(model: Any, stack: LiveStack, folder: Path, ids: torch.Tensor) -> torch.Tensor:
    stack.close()
    return merged_logits(model, [(folder, -0.7)], ids)


def test_scales_that_gguf_cannot_say_are_in_the_matrices(tmp_path: Path, seed: int) -> None:
    model = random_model("llama", seed, tie_word_embeddings=False)
    folder = random_adapter(tmp_path / "rs", "llama", model, seed, use_rslora=True, r=5, alpha_pattern={"q_proj": 2})
    made = to_file(folder, model, "llama", tmp_path / "cache")
    ids = tokens(seed)
    stack = LiveStack(model)
    stack.add("gguf", open_adapter(made, model=model))
    stack.apply({"gguf": 0.5})
    live = logits(model, ids)
    stack.close()
    assert (live - merged_logits(model, [(folder, 0.5)], ids)).abs().max() < 1e-4


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_sixteen_bit_numbers_keep_their_bits(tmp_path: Path, dtype: str, seed: int) -> None:
    import gguf

    numbers = numpy.random.default_rng(seed)
    a, b = (numbers.standard_normal(shape).astype(numpy.float32) for shape in ((3, 32), (32, 3)))
    kind = {"float16": gguf.GGMLQuantizationType.F16, "bfloat16": gguf.GGMLQuantizationType.BF16}[dtype]
    path = tmp_path / "x.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 6.0)
    writer.add_string("general.base_model.0.repo_url", "https://huggingface.co/user/base")
    for side, array in (("a", a), ("b", b)):
        writer.add_tensor(f"blk.0.attn_output.weight.lora_{side}", gguf.quants.quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    model = random_model("llama", seed)
    back, _ = from_gguf.converted(path, _base_of(model), tmp_path / "cache")
    found = load_file(back / "adapter_model.safetensors")[
        "base_model.model.model.layers.0.self_attn.o_proj.lora_B.weight"
    ]
    assert found.dtype == getattr(torch, dtype) and torch.equal(found, torch.from_numpy(b).to(found.dtype))
    config = json.loads((back / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (3, 6.0, "user/base")


def test_quantized_matrices_are_unpacked_as_llama_cpp_would(tmp_path: Path, seed: int) -> None:
    import gguf

    numbers = numpy.random.default_rng(seed)
    a, b = (numbers.standard_normal(shape).astype(numpy.float32) for shape in ((3, 64), (32, 3)))
    packed = gguf.quants.quantize(a, gguf.GGMLQuantizationType.Q8_0)
    path = tmp_path / "x.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 6.0)
    writer.add_tensor("blk.0.ffn_down.weight.lora_a", packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("blk.0.ffn_down.weight.lora_b", b)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    model = random_model("llama", seed, intermediate_size=64)
    back, _ = from_gguf.converted(path, _base_of(model), tmp_path / "cache")
    found = load_file(back / "adapter_model.safetensors")["base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"]
    assert numpy.array_equal(found.numpy(), gguf.quants.dequantize(packed, gguf.GGMLQuantizationType.Q8_0))


def test_fused_matrices_go_to_the_modules_that_a_model_has_apart(tmp_path: Path, seed: int) -> None:
    """Phi-3's qkv of GGUF on a model whose query, key and value are apart: the same change."""
    model = random_model("phi3", seed, tie_word_embeddings=False)
    folder = random_adapter(tmp_path / "peft", "phi3", model, seed, target_modules=["qkv_proj"])
    made = to_file(folder, model, "phi3", tmp_path / "cache")
    base = _base_of(model)
    names = dict(base.names)
    rows = dict(base.rows)
    for layer in range(2):
        del names[layer, "attn_qkv"]
        for part, size in (("q", 32), ("k", 16), ("v", 16)):
            name = f"model.layers.{layer}.self_attn.{part}_proj"
            names[layer, f"attn_{part}"], rows[name] = name, size
    back, _ = from_gguf.converted(made, base._replace(names=names, rows=rows), tmp_path / "cache")
    before, after = load_file(folder / "adapter_model.safetensors"), load_file(back / "adapter_model.safetensors")
    start = "base_model.model.model.layers.1.self_attn"
    parts = [after[f"{start}.{part}_proj.lora_B.weight"] for part in "qkv"]
    assert torch.equal(torch.cat(parts), before[f"{start}.qkv_proj.lora_B.weight"])
    assert torch.equal(after[f"{start}.k_proj.lora_A.weight"], before[f"{start}.qkv_proj.lora_A.weight"])


def test_what_does_not_belong_together_is_refused_in_words(tmp_path: Path, seed: int) -> None:
    llama, qwen = random_model("llama", seed, tie_word_embeddings=False), random_model("qwen2", seed)
    folder = random_adapter(tmp_path / "peft", "llama", llama, seed)
    made = to_file(folder, llama, "llama", tmp_path / "cache")
    with pytest.raises(WeftError, match="made for the architecture llama, the model is qwen2") as refused:
        open_adapter(made, model=qwen)
    assert refused.value.kind is ErrorKind.UNSUPPORTED and refused.value.hint


@pytest.mark.fault
def test_the_cache_forgets_what_was_not_used_for_longest(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache", limit=3500)
    for number in range(4):
        with cache.making(f"k{number}") as stage:
            (stage / "x").write_bytes(b"0" * 1000)
        past = time.time() - 10_000 + number
        os.utime(cache.path(f"k{number}"), (past, past))
    assert sorted(p.name for p in (tmp_path / "cache").iterdir()) == ["k1", "k2", "k3"]
    assert cache.get("k1") == cache.path("k1") and cache.get("k0") is None
    with cache.making("k4") as stage:
        (stage / "x").write_bytes(b"0" * 1000)
    # k1 was used just now, and may be being read.
    assert sorted(p.name for p in (tmp_path / "cache").iterdir()) == ["k1", "k3", "k4"]
    with pytest.raises(RuntimeError), cache.making("k5"):
        raise RuntimeError
    assert not cache.path("k5").exists() and not list((tmp_path / "cache").glob(".*"))


def test_a_file_that_changed_is_converted_anew(tmp_path: Path, seed: int) -> None:
    model = random_model("llama", seed)
    base = _base_of(model)
    made: set[Path] = set()
    for value in (0.5, 0.25):
        tensors = {
            f"base_model.model.model.layers.0.mlp.up_proj.lora_{s}.weight": torch.full(shape, value)
            for s, shape in (("A", (2, 32)), ("B", (48, 2)))
        }
        folder = tmp_path / "peft"
        folder.mkdir(exist_ok=True)
        save_file(tensors, folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4}))
        file, _ = to_gguf.converted(folder, gguf_base(model, "llama"), tmp_path / "cache")
        back, _ = from_gguf.converted(file, base, tmp_path / "cache")
        assert from_gguf.converted(file, base, tmp_path / "cache")[0] == back
        made.add(back)
    assert len(made) == 2
