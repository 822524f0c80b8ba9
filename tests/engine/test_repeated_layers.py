"""Adapters with layer replication, live: equal to PEFT, to the merged reference, and gone without a trace."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from app.adapters.hf_stack import ModelStack
from app.core.adapter_file import read_adapter_file
from app.core.errors import ErrorKind, WeftError
from app.core.stack import AdapterStack, StackedAdapter
from app.generation.hf_decode import Decoder
from tests.engine.adapter_kit import close, logits, merged, random_adapter, random_model, tokens
from tests.engine.conversation_kit import chosen

RANGES = [[0, 2], [1, 2], [0, 1]]
ORDER = [0, 1, 1, 0]


def stack(**weights: float) -> AdapterStack:
    return AdapterStack(adapters=tuple(StackedAdapter(path=p, weight=w, name=Path(p).name) for p, w in weights.items()))


def repeated(model: Any, order: list[int] = ORDER) -> Any:
    """The reference: a model whose layers are real copies."""
    made = copy.deepcopy(model)
    body = made.model if hasattr(made, "model") else made.transformer
    name = "layers" if hasattr(body, "layers") else "h"
    layers = getattr(body, name)
    setattr(body, name, torch.nn.ModuleList([copy.deepcopy(layers[n]) for n in order]))
    for index, layer in enumerate(getattr(body, name)):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = index
    made.config.num_hidden_layers = len(order)
    if getattr(made.config, "layer_types", None):
        made.config.layer_types = [made.config.layer_types[n] for n in order]
    return made


def nothing(*_: Any) -> None:
    pass


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma", "phi3", "cohere"])
def test_live_equals_peft_and_the_merged_reference(tmp_path: Path, family: str, seed: int) -> None:
    import peft

    model = random_model(family, seed)
    ids = tokens(seed)
    plain = logits(model, ids)
    bits = {name: value.clone() for name, value in model.state_dict().items()}
    adapter = _adapter(tmp_path / "one", family, model, seed)
    live = ModelStack(model)
    stale, notes = live.set(stack(**{str(adapter): 1.0}), nothing)
    assert stale and notes == []
    ours = logits(model, ids)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(random_model(family, seed), adapter).eval()
    if getattr(theirs.base_model.model.config, "layer_types", None):  # PEFT leaves them as many as they were
        theirs.base_model.model.config.layer_types = [model.config.layer_types[0]] * len(ORDER)
    assert (ours - logits(theirs, ids)).abs().max() < 1e-4
    assert close(ours, merged(repeated(random_model(family, seed)), [(adapter, 1.0)]), ids)
    live.set(stack(), nothing)
    assert torch.equal(logits(model, ids), plain)
    assert all(torch.equal(value, bits[name]) for name, value in model.state_dict().items())


def _adapter(folder: Path, family: str, model: Any, seed: int, **settings: Any) -> Path:
    return random_adapter(folder, family, model, seed, layer_replication=RANGES, **settings)


@pytest.mark.parametrize(
    "kind",
    [
        {"use_dora": True},
        {"use_rslora": True, "r": 3},
        {"bias": "all"},
        {"lora_bias": True},
        {"modules_to_save": ["lm_head"], "rank_pattern": {"layers.2.self_attn.q_proj": 2}},
    ],
)
def test_all_kinds_in_a_stack_of_two_with_weights(tmp_path: Path, kind: dict[str, Any], seed: int) -> None:
    changes = {"attention_bias": True} if kind.get("bias") or kind.get("lora_bias") else {}
    model = random_model("llama", seed, tie_word_embeddings=False, **changes)
    ids = tokens(seed)
    plain = logits(model, ids)
    one = _adapter(tmp_path / "one", "llama", model, seed, **kind)
    two = _adapter(tmp_path / "two", "llama", model, seed + 1, r=2)
    reference = repeated(model)
    live = ModelStack(model)
    for weights in ((0.6, -0.4), (0.0, 1.3), (2.0, 0.5)):
        live.set(stack(**{str(one): weights[0], str(two): weights[1]}), nothing)
        assert close(logits(model, ids), merged(reference, [(one, weights[0]), (two, weights[1])]), ids), weights
    live.set(stack(**{str(one): 0.0, str(two): 0.0}), nothing)
    assert torch.equal(logits(model, ids), plain)  # weight 0 is the base


def test_stacks_that_disagree_are_refused_and_the_old_one_stays(tmp_path: Path, seed: int) -> None:
    model = random_model("llama", seed)
    ids = tokens(seed)
    adapter = _adapter(tmp_path / "repeats", "llama", model, seed)
    plain = random_adapter(tmp_path / "plain", "llama", model, seed + 1)
    other = random_adapter(tmp_path / "other", "llama", model, seed + 2, layer_replication=[[0, 2], [0, 2]])
    beyond = random_adapter(tmp_path / "beyond", "llama", random_model("llama", seed, num_hidden_layers=5), seed, layer_replication=[[0, 5], [3, 5]])  # fmt: skip
    live = ModelStack(model)
    live.set(stack(**{str(plain): 0.5}), nothing)
    before = logits(model, ids)
    for bad in ({str(adapter): 1.0, str(plain): 1.0}, {str(adapter): 1.0, str(other): -1.0}):
        with pytest.raises(WeftError, match="repeat different layers") as refused:
            live.set(stack(**bad), nothing)
        assert refused.value.kind is ErrorKind.UNSUPPORTED and refused.value.hint
    with pytest.raises(WeftError, match="only 2 layers"):
        live.set(stack(**{str(beyond): 1.0}), nothing)
    assert torch.equal(logits(model, ids), before)
    # One that is off may repeat what it likes.
    assert live.set(stack(**{str(adapter): 1.0, str(plain): 0.0, str(other): 0.0}), nothing)[0]
    assert close(logits(model, ids), merged(repeated(random_model("llama", seed)), [(adapter, 1.0)]), ids)
    assert live.set(stack(**{str(plain): 0.5}), nothing)[0]
    assert torch.equal(logits(model, ids), before)
    stale, notes = live.set(stack(**{str(adapter): 1.0}), nothing, baked=True)
    assert stale and any("stay live" in note for note in notes) and not live.baked
    live.close()
    assert torch.equal(logits(model, ids), logits(random_model("llama", seed), ids))


def test_rows_of_one_batch_that_repeat_layers_go_one_after_another(tmp_path: Path, seed: int) -> None:
    model = random_model("llama", seed)
    adapter = _adapter(tmp_path / "repeats", "llama", model, seed)
    live = ModelStack(model)
    with live.rows([stack(**{str(adapter): 1.0}), stack()], nothing) as rows:
        assert "one after the other" in rows.reason


def test_the_cache_follows(tmp_path: Path, seed: int) -> None:
    """Greedy tokens with a KV cache equal those without, before, with and after the repeated layers."""
    model = random_model("llama", seed)
    adapter = _adapter(tmp_path / "repeats", "llama", model, seed)
    live = ModelStack(model)
    decoder = Decoder(model, torch.device("cpu"))
    prompt = tokens(seed, rows=1, length=9)[0].tolist()
    for weights in ({}, {str(adapter): 1.0}, {}):
        if live.set(stack(**weights), nothing)[0]:
            decoder.reset()
        said = list(prompt)
        decoder.begin(said)
        found = decoder.read(said, lambda *_: None, lambda: False)
        for _ in range(6):
            expected = logits(model, torch.tensor([said]))[0, -1]
            token = int(found.argmax())
            assert (found - expected).abs().max() < 1e-4 and chosen(expected, token)
            said.append(token)
            found = decoder.step(token)


def test_the_file_says_what_it_repeats(tmp_path: Path, seed: int) -> None:
    adapter = _adapter(tmp_path / "x", "llama", random_model("llama", seed), seed)
    file = read_adapter_file(adapter)
    assert file.config.layer_replication == ((0, 2), (1, 2), (0, 1))
    assert {int(name.split(".")[2]) for name in file.modules} == {0, 1, 2, 3}
