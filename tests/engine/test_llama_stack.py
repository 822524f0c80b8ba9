"""PEFT adapters live in llama.cpp: converted by ourselves, equal to the merged model, never a crash."""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from app.adapters.gguf_writer import write_gguf
from app.adapters.llama_stack import LlamaStack
from app.adapters.to_gguf import base_of, converted
from app.core.errors import ErrorKind, WeftError
from app.core.formats import read_gguf_header
from app.core.module_names import OUTER_ROLES, ROLES, role_of
from app.core.module_names import place_of as place
from app.core.stack import AdapterStack, StackedAdapter
from app.generation.llama_context import LlamaContext
from app.generation.llama_log import library_log
from tests.engine import gguf_kit
from tests.engine.adapter_kit import (
    FAMILIES,
    any_weight,
    logits,
    merged,
    merged_logits,
    random_adapter,
    random_model,
    tokens,
)
from tests.engine.half_gelu import GELU, as_in_ggml

llama_cpp: Any = pytest.importorskip("llama_cpp")
TOLERANCE = 1e-3
ALWAYS_TIED = ("gemma", "cohere")  # llama.cpp knows no output head of theirs


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("WEFT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "adapters"


class Opened:
    """A GGUF model, its context, and its stack."""

    def __init__(self, path: Path, context: LlamaContext, stack: LlamaStack) -> None:
        self.path, self.context, self.stack = path, context, stack

    def set(self, *pairs: tuple[Path, float]) -> bool:
        adapters = tuple(StackedAdapter(path=str(path), weight=weight) for path, weight in pairs)
        return self.stack.set(AdapterStack(adapters=adapters), lambda *_: None)[0]

    def logits(self, ids: list[int]) -> np.ndarray:
        self.context.clear()
        return self.context.logits(ids, 0).copy()


@contextmanager
def opened(path: Path) -> Iterator[Opened]:
    log = library_log(llama_cpp)
    llama_cpp.llama_backend_init()
    params = llama_cpp.llama_model_default_params()
    model = llama_cpp.llama_model_load_from_file(os.fsencode(path), params)
    assert model, log.reason()
    options = llama_cpp.llama_context_default_params()
    options.n_ctx, options.n_batch, options.n_ubatch = 64, 64, 64
    options.n_threads = options.n_threads_batch = 1
    options.type_k = options.type_v = llama_cpp.GGML_TYPE_F32
    options.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
    pointer = llama_cpp.llama_init_from_model(model, options)
    assert pointer, log.reason()
    # A file without a vocabulary does not tell its size through it.
    context = LlamaContext(llama_cpp, pointer, chunk=64, rows=64)
    try:
        yield Opened(path, context, LlamaStack(llama_cpp, model, pointer, path, log.reason))
    finally:
        context.close()
        llama_cpp.llama_model_free(model)


def make(tmp_path: Path, family: str, seed: int, **changes: Any) -> tuple[Any, Path, list[Path]]:
    model = random_model(family, seed, **changes)
    path = gguf_kit.write(model, family, tmp_path / "model.gguf")
    modules, embedding = FAMILIES[family][2], FAMILIES[family][3]
    kinds: list[dict[str, Any]] = [
        {"r": 4, "lora_alpha": 8},
        {"r": 9, "use_rslora": True},
        {"r": 2, "rank_pattern": {modules[-1]: 7}, "alpha_pattern": {modules[0]: 1}},
        {"r": 3, "target_modules": modules if family in ALWAYS_TIED else [*modules, "lm_head", embedding]},
        *({"r": r} for r in (1, 5, 8, 16)),
    ]
    return (
        model,
        path,
        [random_adapter(tmp_path / f"a{i}", family, model, seed + i, **kind) for i, kind in enumerate(kinds)],
    )


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_stack_gives_the_logits_of_the_merged_model(tmp_path: Path, family: str, seed: int) -> None:
    # llama.cpp looks GELU up in a table of half precision (see half_gelu.py): so does the reference.
    model, path, folders = make(tmp_path, family, seed, tie_word_embeddings=family in ALWAYS_TIED)
    ids = tokens(seed, rows=1)
    numbers = ids[0].tolist()
    rng = random.Random(seed)
    with opened(path) as llama:
        base = llama.logits(numbers)
        error = np.abs(base - logits(model, ids)[0].numpy()).max()
        assert error < (1e-2 if family in GELU else TOLERANCE), "the base itself"
        for size in (1, 2, 3, 8):
            chosen = rng.sample(folders, size) if size > 1 else folders[3:4]
            pairs = [(folder, any_weight(rng)) for folder in chosen]
            assert llama.set(*pairs)
            answer = llama.logits(numbers)
            expected = logits(as_in_ggml(merged(model, pairs), family), ids)[0].numpy()
            assert np.abs(answer - base).max() > 0.01
            # Where an argument is rounded to the other side, the table's step shows in logits as large as adapters make them.
            tolerance = TOLERANCE * max(1.0, np.abs(expected).max()) if family in GELU else TOLERANCE
            assert np.abs(answer - expected).max() < tolerance, (family, size, pairs)
            assert not llama.set(*reversed(pairs)), "another order is the same stack"
        assert llama.set(*((folder, 0.0) for folder in folders))
        assert np.array_equal(llama.logits(numbers), base)


def test_what_has_no_place_beside_a_tied_head_is_left_out_and_said(tmp_path: Path, seed: int) -> None:
    _, path, folders = make(tmp_path, "qwen2", seed, tie_word_embeddings=True)
    with opened(path) as llama:
        adapters = (StackedAdapter(path=str(folders[3])),)
        _, notes = llama.stack.set(AdapterStack(adapters=adapters), lambda *_: None)
        assert "output head" in notes[0] and "embedding" in notes[0]
        llama.logits(tokens(seed, rows=1)[0].tolist())  # and nothing stops


def test_conversions_are_kept_by_content(tmp_path: Path, seed: int, cache: Path) -> None:
    _, path, folders = make(tmp_path, "llama", seed)
    with opened(path) as llama:
        llama.set((folders[0], 1.0))
        (first,) = cache.iterdir()
        written = first.stat().st_ino
        llama.set()
        llama.set((folders[0], 0.5))
        assert [p.stat().st_ino for p in cache.iterdir()] == [written]
        config = folders[0] / "adapter_config.json"
        config.write_text(config.read_text().replace('"lora_alpha": 8', '"lora_alpha": 4'))
        llama.set((folders[0], 0.5))
        assert len(list(cache.iterdir())) == 2, "another alpha is another adapter"


def test_what_was_read_stays_where_only_the_output_head_changes(tmp_path: Path, seed: int) -> None:
    model = random_model("llama", seed)
    path = gguf_kit.write(model, "llama", tmp_path / "model.gguf")
    head = random_adapter(tmp_path / "head", "llama", model, seed, target_modules=["lm_head"])
    deep = random_adapter(tmp_path / "deep", "llama", model, seed + 1)
    ids = tokens(seed, rows=1)
    numbers = ids[0].tolist()
    with opened(path) as llama:
        assert llama.set((deep, 0.5))
        llama.logits(numbers)
        pairs = [(deep, 0.5), (head, -0.8)]
        assert not llama.set(*pairs)
        kept = llama.context.reuse(numbers)
        assert kept == len(numbers) - 1
        wanted = merged_logits(model, pairs, ids)[0, -1].numpy()
        assert np.abs(llama.context.logits(numbers[kept:], 0)[-1] - wanted).max() < TOLERANCE
        assert (
            not llama.set((deep, 0.5), (head, 0.0)) and llama.set((deep, 0.4), (head, 1.0)) and llama.set((head, 1.0))
        )


@pytest.mark.parametrize(
    "kind",
    [{"use_dora": True}, {"modules_to_save": ["lm_head"]}, {"lora_bias": True}, {"trainable_token_indices": [3]}],
)
def test_what_llama_cpp_cannot_add_is_refused_in_words(tmp_path: Path, kind: dict[str, Any], seed: int) -> None:
    model = random_model("llama", seed)
    path = gguf_kit.write(model, "llama", tmp_path / "model.gguf")
    good, bad = (
        random_adapter(tmp_path / "good", "llama", model, seed),
        random_adapter(tmp_path / "bad", "llama", model, seed, **kind),
    )
    ids = tokens(seed, rows=1)[0].tolist()
    with opened(path) as llama:
        llama.set((good, 1.0))
        before = llama.logits(ids)
        with pytest.raises(WeftError) as refused:
            llama.set((good, 0.5), (bad, 1.0))
        assert refused.value.kind is ErrorKind.UNSUPPORTED and "llama.cpp cannot add" in refused.value.message
        assert np.array_equal(llama.logits(ids), before)


@pytest.mark.attack
@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        ("rank", "ranks"), ("shape", "does not fit"), ("nan", "no numbers"), ("architecture", "architecture"), ("alpha", "alpha"),
        ("three", "3 dimensions"), ("truncated", "truncated"), ("one side", "one of its two"),
    ],
)  # fmt: skip
def test_bad_gguf_adapters_never_reach_the_library(tmp_path: Path, spoil: str, words: str, seed: int) -> None:
    model = random_model("llama", seed)
    path = gguf_kit.write(model, "llama", tmp_path / "model.gguf")
    a, b = np.ones((4, 32), np.float32), np.ones((32, 4), np.float32)
    metadata: dict[str, Any] = {
        "general.architecture": "llama",
        "general.type": "adapter",
        "adapter.type": "lora",
        "adapter.lora.alpha": 4.0,
    }
    tensors = {"blk.0.attn_q.weight.lora_a": a, "blk.0.attn_q.weight.lora_b": b}
    match spoil:
        case "rank":
            tensors["blk.0.attn_q.weight.lora_b"] = np.ones((32, 5), np.float32)
        case "shape":
            tensors["blk.0.attn_q.weight.lora_a"] = np.ones((4, 48), np.float32)
        case "nan":
            a[1, 1] = np.nan
        case "architecture":
            metadata["general.architecture"] = "qwen2"
        case "alpha":
            metadata["adapter.lora.alpha"] = 4
        case "three":
            tensors["blk.0.attn_q.weight.lora_a"] = np.ones((1, 4, 32), np.float32)
        case "one side":
            del tensors["blk.0.attn_q.weight.lora_b"]
    bad = tmp_path / "bad.gguf"
    write_gguf(bad, metadata, tensors)
    if spoil == "truncated":
        bad.write_bytes(bad.read_bytes()[:-100])
    with opened(path) as llama:
        with pytest.raises(WeftError) as refused:
            llama.set((bad, 1.0))
        assert words in str(refused.value)
        a[1, 1] = 1.0
        good = tmp_path / "good.gguf"
        write_gguf(
            good,
            {**metadata, "general.architecture": "llama", "adapter.lora.alpha": 4.0},
            {"blk.0.attn_q.weight.lora_a": a, "blk.0.attn_q.weight.lora_b": b},
        )
        assert llama.set((good, 1.0))


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_our_names_are_gguf_py_s(family: str) -> None:
    table = gguf_kit.names(family, 2)
    model = random_model(family, 0)
    for name, module in model.named_modules():
        if (
            not name
            or not any(True for _ in module.parameters(recurse=False))
            or "norm" in name
            or ".ln_" in name
            or "experts" in name
        ):
            continue
        ours = role_of(place(name))
        theirs = table.get_name(name)
        if theirs is None and ".mlp.gate" in name:
            theirs = f"blk.{place(name).layer}.ffn_gate_inp"  # on disk it is called block_sparse_moe.gate
        if ours == "output" and family in ALWAYS_TIED:
            assert theirs is None
        elif ours:
            assert theirs == (f"blk.{place(name).layer}.{ours}" if place(name).layer >= 0 else ours), name
        else:
            assert theirs is None or re.search(r"norm|position", theirs), (name, theirs)


def test_all_names_in_our_tables_are_known_to_gguf_py() -> None:
    import gguf

    prefixes = ("model.layers.0.", "transformer.h.0.", "transformer.blocks.0.", "gpt_neox.layers.0.", "h.0.", "layers.0.", "model.decoder.layers.0.", "transformer.encoder.layers.0.")  # fmt: skip
    outer = ("model.", "transformer.", "gpt_neox.", "", "transformer.embedding.", "transformer.output_layer")
    maps = [gguf_kit.name_map(arch, 1) for arch in gguf.MODEL_ARCH_NAMES]

    def known(names: list[str]) -> set[str]:
        return {found.rpartition("blk.0.")[2] for table in maps for name in names if (found := table.get_name(name))}

    for tail, role in ROLES.items():
        assert role in known([prefix + tail for prefix in prefixes]), tail
    for tail, role in OUTER_ROLES.items():
        assert role in known([prefix + tail for prefix in outer]), tail


# The converter lies in the environment `export`, which the tests' own extends.
SOURCE = os.environ.get("WEFT_LLAMA_SOURCE") or next(
    (str(found) for found in [Path(sys.prefix) / "llama.cpp"] if (found / "convert_lora_to_gguf.py").is_file()), ""
)


# GPT-2 is not among them: that script takes its adapters the wrong way round, and llama.cpp refuses the result.
@pytest.mark.skipif(
    not SOURCE,
    reason="llama.cpp's converter is not in this environment, and WEFT_LLAMA_SOURCE does not name its source",
)
@pytest.mark.parametrize(
    "family",
    [
        "llama",
        "bloom",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("mistral", "qwen2", "qwen3", "gemma", "phi", "phi3", "dbrx", "cohere")
        ),
    ],
)
def test_our_conversion_equals_llama_cpp_s_own(tmp_path: Path, family: str, seed: int, cache: Path) -> None:
    from gguf import GGUFReader

    model = random_model(family, seed, tie_word_embeddings=family in ALWAYS_TIED)
    path = gguf_kit.write(model, family, tmp_path / "model.gguf")
    folder = random_adapter(tmp_path / "adapter", family, model, seed, lora_alpha=8)
    model.save_pretrained(tmp_path / "base")
    out = tmp_path / "theirs.gguf"
    ran = subprocess.run(
        [sys.executable, f"{SOURCE}/convert_lora_to_gguf.py", "--base", str(tmp_path / "base"), "--outtype", "f32", "--outfile", str(out), str(folder)],
        capture_output=True, text=True, timeout=300, env={**os.environ, "PYTHONPATH": f"{SOURCE}{os.pathsep}{SOURCE}/gguf-py", "NO_LOCAL_GGUF": ""},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-2000:]
    ours, notes = converted(folder, base_of([read_gguf_header(path)]), cache)
    assert not notes
    mine, theirs = ({t.name: t.data for t in GGUFReader(p).tensors} for p in (ours, out))
    assert set(mine) == set(theirs)
    for name, data in theirs.items():
        assert np.array_equal(mine[name], data), name
    fields = [float(GGUFReader(p).fields["adapter.lora.alpha"].contents()) for p in (ours, out)]
    assert fields[0] == fields[1] == 8.0
