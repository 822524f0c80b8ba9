"""What llama.cpp cannot add live is served through merged copies: logits, conversations, cache, bad input."""

from __future__ import annotations

import copy
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from app.adapters.merged_copies import MergedCopies
from app.backends.llama_cpp import Backend
from app.core.errors import ErrorKind, WeftError
from app.core.formats import read_gguf_header
from app.core.library import ModelEntry
from app.core.stack import AdapterStack, StackedAdapter
from tests.engine import tiny_gguf
from tests.engine.adapter_kit import logits, merged, random_adapter
from tests.engine.backend_kit import FakeReport, ask, assistant, loaded, user
from tests.engine.conversation_kit import chosen

pytest.importorskip("llama_cpp")
EXACT: dict[str, Any] = {
    "flash_attention": "off",
    "cache_type_k": "f32",
    "cache_type_v": "f32",
    "threads": 1,
    "n_ctx": 256,
}
KINDS: dict[str, dict[str, Any]] = {
    "dora": {"use_dora": True}, "saved": {"modules_to_save": ["lm_head"]}, "bias": {"lora_bias": True},
    "tokens": {"trainable_token_indices": [40, 90]}, "plain": {"r": 5},
}  # fmt: skip


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("WEFT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "merged"


def transformed(path: Path, tied: bool) -> Any:
    """The transformers model that a float GGUF of the tiny llama holds."""
    import gguf

    config = transformers.LlamaConfig(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, rms_norm_eps=1e-5, rope_theta=10000.0, tie_word_embeddings=tied,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).float().eval()
    held = {t.name: torch.from_numpy(np.array(t.data)) for t in gguf.GGUFReader(path).tensors}
    roles = {
        "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
        "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
    }  # fmt: skip
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(held["token_embd.weight"])
        if not tied:
            model.lm_head.weight.copy_(held["output.weight"])
        for layer in range(2):
            for role, name in roles.items():
                value = held[f"blk.{layer}.{role}.weight"]
                if role in ("attn_q", "attn_k"):
                    heads = 4 if role == "attn_q" else 2
                    value = value.reshape(heads, -1, 2, 64).swapaxes(1, 2).reshape(value.shape)
                model.model.layers[layer].get_submodule(name).weight.copy_(value)
    return model


class Made:
    """A model in both forms and an adapter of each kind."""

    def __init__(self, folder: Path, seed: int, tied: bool = False) -> None:
        self.entry: ModelEntry = tiny_gguf.write(folder / "base.gguf", seed=seed, tied=tied)
        self.model = transformed(Path(self.entry.path), tied)
        self.adapters = {
            kind: random_adapter(folder / kind, "llama", self.model, seed + n, **settings)
            for n, (kind, settings) in enumerate(KINDS.items())
        }

    def stack(self, **weights: float) -> AdapterStack:
        return AdapterStack(
            adapters=tuple(StackedAdapter(path=str(self.adapters[k]), weight=w, name=k) for k, w in weights.items())
        )

    def wanted(self, ids: list[int], **weights: float) -> np.ndarray:
        pairs = [(self.adapters[k], w) for k, w in weights.items() if w]
        return logits(merged(copy.deepcopy(self.model), pairs), torch.tensor([ids]))[0].numpy()


def logits_of(backend: Any, ids: list[int]) -> np.ndarray:
    context = backend._context
    context.clear()
    found = [context.logits([token], 0)[0].copy() for token in ids]
    context.clear()
    return np.stack(found)


@pytest.mark.parametrize("tied", [False, True], ids=["own head", "tied"])
def test_stacks_of_every_kind_have_the_merged_models_logits(tmp_path: Path, seed: int, tied: bool, cache: Path) -> None:
    made, rng = Made(tmp_path, seed, tied), random.Random(seed)
    ids = [rng.randrange(3, 512) for _ in range(12)]
    stacks: list[dict[str, float]] = [
        {}, {"dora": 0.8}, {"dora": 0.8, "plain": -0.6}, {"dora": 0.8, "plain": 1.1}, {"saved": 0.5, "bias": 0.7, "plain": 0.3},
        {"tokens": 0.9, "dora": -0.4, "saved": 1.0, "bias": 1.2}, {"plain": 1.0}, {"dora": 0.0, "saved": 0.0},
    ]  # fmt: skip
    with loaded(Backend(), made.entry, **EXACT) as (backend, _):
        base = logits_of(backend, ids)
        made_before = 0
        for weights in stacks:
            report = FakeReport()
            backend.set_adapters(made.stack(**weights), report)
            found, wanted = logits_of(backend, ids), made.wanted(ids, **weights)
            assert np.abs(found - wanted).max() < 1e-3, weights
            copied = any(w for k, w in weights.items() if k != "plain")
            assert any("merged copy" in line and "takes" in line for line in report.logs) == copied, report.logs
            made_now = len(list(cache.glob("*/model.gguf")))
            if weights == {"dora": 0.8, "plain": 1.1}:
                assert made_now == made_before, "what is live needs no new copy"
            made_before = made_now
        assert np.array_equal(logits_of(backend, ids), base), "weight 0 is the base"
        assert backend._model.path == Path(made.entry.path)


def test_any_sequence_of_changes_ends_at_the_merged_model(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    made = Made(tmp_path, seed, tied=rng.random() < 0.5)
    ids = [rng.randrange(3, 512) for _ in range(8)]
    weights: dict[str, float] = {}
    with loaded(Backend(), made.entry, **EXACT) as (backend, _):
        for _ in range(10):
            kind, chance = rng.choice(list(KINDS)), rng.random()
            if chance < 0.25:
                weights.pop(kind, None)
            else:
                weights[kind] = 0.0 if chance < 0.4 else round(rng.uniform(-1, 1.3), 2)
            items = list(weights.items())
            rng.shuffle(items)
            backend.set_adapters(made.stack(**dict(items)), FakeReport())
            assert np.abs(logits_of(backend, ids) - made.wanted(ids, **weights)).max() < 1e-3, items


def test_repeated_layers_are_served_by_a_longer_copy(tmp_path: Path, seed: int) -> None:
    from tests.engine.test_repeated_layers import RANGES, repeated

    made = Made(tmp_path, seed)
    made.adapters["longer"] = random_adapter(
        tmp_path / "longer", "llama", made.model, seed, layer_replication=RANGES, lora_bias=True
    )
    ids = [5, 60, 77, 400]
    with loaded(Backend(), made.entry, **EXACT) as (backend, _):
        base, report = logits_of(backend, ids), FakeReport()
        backend.set_adapters(made.stack(longer=0.7, plain=0.0), report)
        wanted = logits(merged(repeated(made.model), [(made.adapters["longer"], 0.7)]), torch.tensor([ids]))[0].numpy()
        assert np.abs(logits_of(backend, ids) - wanted).max() < 1e-3
        (copied,) = [line for line in report.logs if "merged copy" in line]
        assert "repeated layers" in copied
        assert len([line for line in report.logs if "new" in line]) == 1, "biases that the base lacks are told once"
        with pytest.raises(WeftError, match="repeat different layers"):
            backend.set_adapters(made.stack(longer=0.7, plain=0.5), FakeReport())
        assert np.abs(logits_of(backend, ids) - wanted).max() < 1e-3, "a refused stack leaves what was"
        backend.set_adapters(made.stack(longer=0.0, plain=0.0), FakeReport())
        assert np.array_equal(logits_of(backend, ids), base)


def test_a_load_with_a_stack_takes_the_copy_at_once_and_finds_it_again(tmp_path: Path, seed: int, cache: Path) -> None:
    from app.engine.protocol import Load

    made = Made(tmp_path, seed)
    ids = [5, 60, 77, 400]
    times: list[int] = []
    for _ in range(2):
        backend, report = Backend(), FakeReport()
        try:
            request = Load(model=made.entry, options=dict(EXACT), adapters=made.stack(dora=1.0))
            backend.load(request, report)
            assert any("merged copy" in note for note in report.events[0].notes)
            assert np.abs(logits_of(backend, ids) - made.wanted(ids, dora=1.0)).max() < 1e-3
            (file,) = cache.glob("*/model.gguf")
            times.append(file.stat().st_mtime_ns)
        finally:
            backend.unload()
    assert times[0] == times[1], "the second load found the first's copy"


def test_a_conversation_goes_on_over_a_change_of_copies(tmp_path: Path, seed: int) -> None:
    made = Made(tmp_path, seed)
    turns = [
        ("one", {"plain": 1.0}),
        ("two", {"dora": 0.7}),
        ("three", {"dora": 0.7}),
        ("four", {"bias": 1.0}),
        ("five", {}),
    ]
    said: list[tuple[list[int], int, int, dict[str, float]]] = []
    with loaded(Backend(), made.entry, **EXACT) as (backend, _):
        messages: tuple[Any, ...] = ()
        for text, weights in turns:
            backend.set_adapters(made.stack(**weights), FakeReport())
            messages = (*messages, user(text))
            answer, done = ask(backend, messages, max_tokens=8)
            said.append((list(backend._context.tokens), done.prompt_tokens, done.reused_tokens, weights))
            messages = (*messages, assistant(answer))
    assert [reused > 0 for _, _, reused, _ in said] == [False, False, True, False, False]
    for tokens, prompt, _, weights in said:
        assert len(tokens) >= prompt + 7
        with loaded(Backend(), made.entry, **EXACT) as (fresh, _):
            fresh.set_adapters(made.stack(**weights), FakeReport())
            expected = logits_of(fresh, tokens)
        assert all(chosen(expected[place - 1], tokens[place]) for place in range(prompt, len(tokens)))


def test_a_refused_stack_leaves_what_was(tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Made(tmp_path, seed)
    ids = [5, 60, 77]
    other = random_adapter(
        tmp_path / "other", "llama", transformers.LlamaForCausalLM(transformers.LlamaConfig(
            vocab_size=512, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)), seed, use_dora=True,
    )  # fmt: skip
    with loaded(Backend(), made.entry, **EXACT) as (backend, _):
        backend.set_adapters(made.stack(dora=0.5, plain=1.0), FakeReport())
        before = logits_of(backend, ids)
        with pytest.raises(WeftError, match="does not fit"):
            backend.set_adapters(AdapterStack(adapters=(StackedAdapter(path=str(other)),)), FakeReport())
        assert np.array_equal(logits_of(backend, ids), before)
        # The copy can be made, and then what should be live on it is bad.
        bad = tmp_path / "bad.gguf"
        bad.write_bytes(b"GGUF" + b"\0" * 64)
        wrong = (
            *made.stack(saved=1.0).adapters,
            StackedAdapter(path=str(other), weight=0.0),
            StackedAdapter(path=str(bad)),
        )
        with pytest.raises(WeftError):
            backend.set_adapters(AdapterStack(adapters=wrong), FakeReport())
        small = tmp_path / "small.gguf"
        from tests.engine.test_merge_gguf import plain_adapter

        plain_adapter(small, {"blk.0.attn_q": (64, 32)}, seed)
        wrong = (*made.stack(saved=1.0).adapters, StackedAdapter(path=str(small)))
        with pytest.raises(WeftError, match="does not fit"):
            backend.set_adapters(AdapterStack(adapters=wrong), FakeReport())
        assert np.array_equal(logits_of(backend, ids), before)
        # Cancelled while the copy is written.
        report = FakeReport(cancel_when=lambda r: any("Merging" in phase for phase, _, _ in r.phases))
        with pytest.raises(WeftError) as stopped:
            backend.set_adapters(made.stack(bias=0.3), report)
        assert stopped.value.kind is ErrorKind.CANCELLED
        assert np.array_equal(logits_of(backend, ids), before)
        # And cancelled while it is loaded.
        report = FakeReport(cancel_when=lambda r: any("Reading the model" in phase for phase, _, _ in r.phases))
        with pytest.raises(WeftError) as stopped:
            backend.set_adapters(made.stack(bias=0.3), report)
        assert stopped.value.kind is ErrorKind.CANCELLED
        assert np.array_equal(logits_of(backend, ids), before)
        assert not list((tmp_path / "cache" / "merged").glob(".making*"))


def test_copies_are_bounded_and_the_one_not_used_for_longest_goes(
    tmp_path: Path, seed: int, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Made(tmp_path, seed)
    size = Path(made.entry.path).stat().st_size
    monkeypatch.setenv("WEFT_MERGED_CACHE_BYTES", str(int(2.5 * size)))
    copies = MergedCopies(Path(made.entry.path))

    def serve(weight: float) -> Path:
        return copies.serve(made.stack(dora=weight), 0, lambda *_: None, lambda: False).file

    files: list[Path] = []
    for number in range(3):
        files.append(serve(0.1 + number))
        for place, file in enumerate(files):  # as if an hour lay between
            if file.parent.exists():
                os.utime(file.parent, (1e9 + place, 1e9 + place))
    assert [file.exists() for file in files] == [False, True, True]
    assert serve(1.1) == files[1], "found again, and used last"
    whole = files[1].read_bytes()
    files[1].write_bytes(whole[:-100])
    assert serve(1.1).read_bytes() == whole, "one that was cut short is made again"
    os.utime(files[2].parent, (1e9, 1e9))
    serve(7.0)
    assert [file.exists() for file in files] == [False, True, False]
    monkeypatch.setenv("WEFT_MERGED_CACHE_BYTES", str(size // 2))
    with pytest.raises(WeftError) as refused:
        MergedCopies(Path(made.entry.path)).serve(made.stack(dora=3.0), 0, lambda *_: None, lambda: False)
    assert refused.value.kind is ErrorKind.DISK_FULL and "WEFT_MERGED_CACHE_BYTES" in refused.value.hint


@pytest.mark.fault
def test_a_killed_merge_leaves_no_copy_and_its_remains_go_with_the_next(tmp_path: Path, seed: int, cache: Path) -> None:
    entry = tiny_gguf.write(tmp_path / "big.gguf", hidden=512, intermediate=2048, layers=8, seed=seed, tied=True)
    from tests.engine.test_merge_gguf import plain_adapter

    shapes = {"output": (512, 512), **{f"blk.{i}.ffn_up": (2048, 512) for i in range(8)}}
    adapter = plain_adapter(tmp_path / "a.gguf", shapes, seed)
    code = (
        "import os, sys\nfrom pathlib import Path\n"
        "from app.adapters.merged_copies import MergedCopies\nfrom app.core.stack import AdapterStack, StackedAdapter\n"
        "stack = AdapterStack(adapters=(StackedAdapter(path=sys.argv[2], weight=0.5),))\n"
        "stop = int(sys.argv[3])\n"
        "def advance(done, total):\n    if stop and done * 100 > stop * total:\n        os.kill(os.getpid(), 9)\n"
        "print(MergedCopies(Path(sys.argv[1])).serve(stack, 0, advance, lambda: False).file)\n"
    )
    chance = random.Random(seed)
    for stop in (chance.randint(1, 40), chance.randint(40, 90), 100, 0):
        ran = subprocess.run(
            [sys.executable, "-c", code, entry.path, str(adapter), str(stop)],
            capture_output=True,
            text=True,
            timeout=60,
        )
        left = sorted(path.name for path in cache.iterdir())
        if ran.returncode == 0:
            assert len(left) == 1 and Path(ran.stdout.strip()).is_file(), ran.stderr
        else:
            assert ran.returncode == -9 and len(left) == 1 and left[0].startswith(".making-"), (left, ran.stderr)


def test_short_memory_gives_eight_bits_and_another_base_another_copy(tmp_path: Path, seed: int, cache: Path) -> None:
    entry = tiny_gguf.write(tmp_path / "q.gguf", hidden=256, intermediate=512, kind="Q4_K_M", seed=seed)
    from tests.engine.test_merge_gguf import plain_adapter

    tied = tiny_gguf.write(tmp_path / "t.gguf", hidden=256, intermediate=512, kind="Q4_K_M", seed=seed, tied=True)
    adapter = plain_adapter(tmp_path / "a.gguf", {"output": (512, 256), "blk.0.ffn_up": (512, 256)}, seed)
    stack = AdapterStack(adapters=(StackedAdapter(path=str(adapter)),))
    assert MergedCopies(Path(entry.path)).serve(stack, 1, lambda *_: None, lambda: False).file == Path(entry.path)
    wide = MergedCopies(Path(tied.path)).serve(stack, 0, lambda *_: None, lambda: False)
    short = MergedCopies(Path(tied.path)).serve(stack, 1000, lambda *_: None, lambda: False)
    kinds = [{t.name: t.type for t in read_gguf_header(c.file).tensors} for c in (wide, short)]
    assert [kind["blk.0.ffn_up.weight"] for kind in kinds] == [1, 8] and "Q8_0 now" in " ".join(short.notes)
    assert "output head too" in wide.notes[0] and not wide.live.adapters
    os.utime(tied.path)
    MergedCopies(Path(tied.path)).serve(stack, 0, lambda *_: None, lambda: False)
    assert len(list(cache.iterdir())) == 3
