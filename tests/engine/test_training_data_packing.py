"""Packed sequences against unpacked ones, on tiny models of many architectures; leaks are found and packing is off then."""

from __future__ import annotations

import random
from array import array
from typing import Any

import pytest
import torch
import transformers

from app.training.batches import plan_epoch
from app.training.collate_torch import Collator
from app.training.data_config import DataConfig
from app.training.encode import MASKED, Example
from app.training.packing_torch import check_packing
from tests import seeds
from tests.engine import tiny_models

VOCABULARY = 300
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.25,
}


def build(name: str, attention: str = "sdpa") -> Any:
    """A tiny model of an architecture, with random wide weights."""
    if name in ("llama", "qwen2", "mistral", "gemma2", "phi", "gpt2", "mamba"):
        config = tiny_models.config(name, VOCABULARY, 512)
    elif name == "bloom":
        config = transformers.BloomConfig(
            vocab_size=VOCABULARY, hidden_size=64, n_layer=2, n_head=4, initializer_range=0.25
        )
    elif name == "falcon":
        config = transformers.FalconConfig(**SMALL, alibi=True, new_decoder_architecture=False)
    elif name == "opt":
        config = transformers.OPTConfig(**SMALL, ffn_dim=96, word_embed_proj_dim=64, init_std=0.25)
    elif name == "gpt_neox":
        config = transformers.GPTNeoXConfig(**SMALL, intermediate_size=96)
    elif name == "qwen3_moe":
        config = transformers.Qwen3MoeConfig(
            **SMALL, num_key_value_heads=2, head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32
        )
    elif name == "gemma3":
        config = transformers.Gemma3TextConfig(
            **SMALL,
            intermediate_size=96,
            num_key_value_heads=2,
            head_dim=16,
            sliding_window=16,
            query_pre_attn_scalar=16,
        )
    else:
        raise ValueError(name)
    torch.manual_seed(seeds.fresh(1 << 32))
    attention = "eager" if name in ("bloom", "mamba", "gemma2") else attention
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    with torch.no_grad():  # wide everywhere, so that a leak shows
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.2)
    return model.train()


@pytest.fixture
def rng() -> random.Random:
    seed = seeds.fresh(1 << 32)
    print(f"seed {seed}")
    return random.Random(seed)


def examples(rng: random.Random, count: int, longest: int) -> list[Example]:
    made = []
    for _ in range(count):
        ids = array("i", (rng.randrange(VOCABULARY) for _ in range(rng.randint(2, longest))))
        prompt = rng.randint(1, len(ids) - 1)
        made.append(Example(ids, array("i", [MASKED]) * prompt + ids[prompt:], 0, 0, b""))
    return made


def loss_of_each(
    model: Any, made: list[Example], packs: list[tuple[int, ...]], collator: Collator
) -> dict[int, torch.Tensor]:
    """Mean loss of each example of a batch, by transformers' own shift and mask convention."""
    tensors = collator(packs)
    labels = tensors.pop("labels")
    logits = model(**tensors, use_cache=False).logits.double()
    found: dict[int, torch.Tensor] = {}
    for row, pack in enumerate(packs):
        at = 0
        for number in pack:
            end = at + len(made[number].input_ids)
            shifted, targets = logits[row, at : end - 1], labels[row, at + 1 : end]
            found[number] = torch.nn.functional.cross_entropy(shifted, targets, ignore_index=MASKED)
            at = end
    return found


@pytest.mark.parametrize(
    "name", ["llama", "qwen2", "mistral", "gemma2", "gemma3", "phi", "gpt2", "gpt_neox", "qwen3_moe", "opt"]
)
def test_packed_losses_equal_unpacked_ones(name: str, rng: random.Random) -> None:
    """Loss of each sequence, and the gradient of all of them, over random lengths and packs."""
    model = build(name)
    config = DataConfig(max_length=120)
    check = check_packing(model, config)
    print(check)
    assert check.mode in ("positions", "mask")
    assert check.difference < 1e-4
    assert model.training
    model.eval()  # dropout would be another one each time
    for _ in range(2):
        made = examples(rng, 9, 60)
        steps = plan_epoch([len(e.input_ids) for e in made], config, epoch=0, rows=2, accumulation=100, packing=True)
        packed: dict[int, torch.Tensor] = {}
        collator = Collator(made, 0, mode=check.mode, mask_dtype=check.mask_dtype)
        for batch in (batch for step in steps for batch in step):
            packed |= loss_of_each(model, made, list(batch), collator)
        alone: dict[int, torch.Tensor] = {}
        for number in range(len(made)):
            alone |= loss_of_each(model, made, [(number,)], Collator(made, 0))
        worst = max(abs(packed[n] - alone[n]).item() for n in alone)
        print(name, "difference", worst)
        assert worst < 1e-4
        parameters = [p for p in model.parameters() if p.requires_grad]
        gradients = [
            torch.autograd.grad(sum(losses.values(), torch.tensor(0.0)), parameters, allow_unused=True)
            for losses in (packed, alone)
        ]
        for ours, theirs in zip(*gradients, strict=True):
            assert (ours is None) == (theirs is None)
            if ours is not None:
                scale = theirs.abs().max().clamp(min=1.0)
                assert ((ours - theirs).abs().max() / scale).item() < 1e-3


@pytest.mark.parametrize("name", ["bloom", "falcon", "mamba"])
def test_leaks_are_found(name: str) -> None:
    check = check_packing(build(name), DataConfig(max_length=128))
    print(check)
    assert check.mode == "off"
    assert "Packing is off" in check.reason


def test_the_mask_serves_where_position_ids_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that makes nothing of position ids but takes a mask: the explicit one is found, for eager attention too."""
    for attention in ("sdpa", "eager"):
        model = build("llama", attention)
        plain = model.forward

        def forward(*args: Any, plain: Any = plain, **inputs: Any) -> Any:
            if inputs.get("attention_mask") is None:  # packed sequences are not told apart any more
                inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
            return plain(*args, **inputs)

        monkeypatch.setattr(model, "forward", forward)
        check = check_packing(model, DataConfig(max_length=128))
        print(check)
        assert check.mode == "mask"
        assert check.difference < 1e-4


def test_a_leak_in_half_precision_is_found_and_rounding_is_none() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        assert check_packing(build("llama").to(dtype), DataConfig(max_length=128)).mode == "positions"
        assert check_packing(build("bloom").to(dtype), DataConfig(max_length=128)).mode == "off"


def test_the_check_leaves_model_and_random_state_alone() -> None:
    model = build("gpt2")
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.3
    before, state = torch.get_rng_state(), {n: p.clone() for n, p in model.state_dict().items()}
    check = check_packing(model, DataConfig(max_length=128))
    assert check.mode == "positions"  # dropout would have shown as a difference
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)} == {0.3} and model.training


def test_packing_off_is_off() -> None:
    assert check_packing(None, DataConfig(packing="off")).mode == "off"
    made = [Example(array("i", [1, 2]), array("i", [MASKED, 2]), 0, 0, b"")] * 2
    with pytest.raises(ValueError, match="share a row"):
        Collator(made, 0)([(0, 1)])


def test_collated_tensors(rng: random.Random) -> None:
    made = examples(rng, 3, 9)
    lengths = [len(e.input_ids) for e in made]
    tensors = Collator(made, 7, mode="mask", multiple_of=8)([(0, 1), (2,)])
    width = tensors["input_ids"].shape[1]
    assert width % 8 == 0 and width >= max(lengths[0] + lengths[1], lengths[2])
    assert tensors["input_ids"][0, : lengths[0]].tolist() == list(made[0].input_ids)
    assert tensors["labels"][0, lengths[0]] == MASKED
    assert (tensors["labels"][1, lengths[2] :] == MASKED).all() and (tensors["input_ids"][1, lengths[2] :] == 7).all()
    assert tensors["position_ids"][0, lengths[0]] == 0
    seen = tensors["attention_mask"][0, 0] == 0
    assert not seen[lengths[0], : lengths[0]].any() and seen[lengths[0], lengths[0]]
    assert not seen.triu(1).any() and seen.any(dim=1).all()  # nothing ahead, and no row that sees nothing
