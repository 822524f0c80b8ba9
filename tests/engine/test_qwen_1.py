"""Qwen-1, for which transformers has no class any more: its adapters in llama.cpp, live and through a merged copy.

The reference is llama.cpp on a file whose matrices were changed by hand, under gguf-py's own names.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from safetensors.numpy import save_file

from app.adapters.merged_copies import MergedCopies
from app.core.adapter_file import read_adapter_file
from app.core.compatibility import Verdict, check, model_modules
from app.core.recognise_gguf import gguf_model
from app.core.stack import AdapterStack, StackedAdapter
from tests import seeds
from tests.engine import gguf_kit
from tests.engine.test_llama_stack import TOLERANCE, opened

pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed in this interpreter")
HIDDEN, INNER, LAYERS, VOCABULARY, RANK = 32, 48, 2, 96, 4
# (out, in) by the names of the model's own code.
MODULES = {
    "attn.c_attn": (3 * HIDDEN, HIDDEN), "attn.c_proj": (HIDDEN, HIDDEN), "mlp.w1": (INNER, HIDDEN), "mlp.w2": (INNER, HIDDEN),
    "mlp.c_proj": (HIDDEN, INNER),
}  # fmt: skip
Weights = dict[str, np.ndarray]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEFT_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(seeds.given())


def random_weights(rng: np.random.Generator) -> Weights:
    def normal(*shape: int) -> np.ndarray:
        return (0.2 * rng.normal(size=shape)).astype(np.float32)

    made = {"transformer.wte.weight": normal(VOCABULARY, HIDDEN), "lm_head.weight": normal(VOCABULARY, HIDDEN), "transformer.ln_f.weight": 1 + normal(HIDDEN)}  # fmt: skip
    for layer in range(LAYERS):
        start = f"transformer.h.{layer}."
        made |= {f"{start}{name}.weight": normal(*shape) for name, shape in MODULES.items()}
        made |= {f"{start}attn.c_attn.bias": normal(3 * HIDDEN)}
        made |= {f"{start}{name}.weight": 1 + normal(HIDDEN) for name in ("ln_1", "ln_2")}
    return made


def write(path: Path, weights: Weights) -> Path:
    writer, table = gguf.GGUFWriter(path, "qwen"), gguf_kit.name_map(gguf.MODEL_ARCH.QWEN, LAYERS)
    writer.add_context_length(64)
    writer.add_block_count(LAYERS)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(2 * INNER)  # its own config counts gate and up together
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(HIDDEN // 4)
    writer.add_head_count(4)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(VOCABULARY)
    writer.add_tokenizer_model("none")
    for name, value in weights.items():
        target = table.get_name(name, try_suffixes=(".weight", ".bias"))
        assert target is not None, name
        writer.add_tensor(target, np.ascontiguousarray(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def adapter(folder: Path, weights: Weights, rng: np.random.Generator, *, dora: bool) -> dict[str, np.ndarray]:
    """An adapter as PEFT saves it; what it changes, D by the weights' names."""
    tensors, changes = {}, {}
    for layer in range(LAYERS):
        for name, (out, inputs) in MODULES.items():
            module = f"transformer.h.{layer}.{name}"
            a, b = 0.2 * rng.normal(size=(RANK, inputs)), 0.2 * rng.normal(size=(out, RANK))
            tensors[f"base_model.model.{module}.lora_A.weight"] = a.astype(np.float32)
            tensors[f"base_model.model.{module}.lora_B.weight"] = b.astype(np.float32)
            base = weights[f"{module}.weight"].astype(np.float64)
            after = base + 1.5 * b @ a
            if dora:
                magnitude = np.linalg.norm(base, axis=1) * (1 + 0.1 * rng.normal(size=out))
                tensors[f"base_model.model.{module}.lora_magnitude_vector"] = magnitude.astype(np.float32)
                after *= (magnitude / np.linalg.norm(after, axis=1))[:, None]
            changes[f"{module}.weight"] = after - base
    config: dict[str, Any] = {
        "peft_type": "LORA", "base_model_name_or_path": "Qwen/Qwen-1_8B", "r": RANK, "lora_alpha": 6, "use_dora": dora,
        "target_modules": ["c_attn", "c_proj", "w1", "w2"],
    }  # fmt: skip
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors")
    return changes


def test_its_adapters_fit_and_are_the_merged_model(tmp_path: Path, rng: np.random.Generator) -> None:
    weights = random_weights(rng)
    base = write(tmp_path / "qwen.gguf", weights)
    changes = {name: adapter(tmp_path / name, weights, rng, dora=name == "dora") for name in ("plain", "other", "dora")}
    entry = gguf_model(base)
    assert entry is not None and entry.architecture == "qwen"
    for name in changes:
        found = check(read_adapter_file(tmp_path / name), model_modules(entry))
        assert found.verdict is Verdict.FITS, found.unmatched
    ids = [int(token) for token in rng.integers(2, VOCABULARY, 12)]
    copies = MergedCopies(base)
    for stack in ({"plain": 1.0}, {"plain": -0.6, "other": 1.2}, {"dora": 0.8, "plain": 0.5}, {"other": 0.0}):
        given = AdapterStack(adapters=tuple(StackedAdapter(path=str(tmp_path / n), weight=w) for n, w in stack.items()))
        copy = copies.serve(given, 0, lambda *_: None, lambda: False)
        assert bool(copy.notes) == ("dora" in stack)
        total = dict(weights)
        for name, weight in stack.items():
            for key, change in changes[name].items():
                total[key] = (total[key] + weight * change).astype(np.float32)
        with opened(copy.file) as llama:
            llama.set(*((Path(each.path), each.weight) for each in copy.live.adapters))
            ours = llama.logits(ids)
        with opened(write(tmp_path / "wanted.gguf", total)) as llama:
            assert np.abs(ours - llama.logits(ids)).max() < TOLERANCE, stack
