"""The loss in pieces against torch's over all logits: value, gradients, heads of many kinds; and its memory."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

from app.training import loss_torch
from app.training.loss_torch import chunked_loss, sft_chunked
from tests import seeds
from tests.engine import tiny_models

ROOT = Path(__file__).resolve().parents[2]


def build(name: str) -> Any:
    torch.manual_seed(seeds.fresh(1 << 32))
    small: dict[str, Any] = {
        "vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2,
    }  # fmt: skip
    if name == "gemma2":
        config = tiny_models.config("gemma2", 300, 512, final_logit_softcapping=3.0)
    elif name == "cohere":
        config = transformers.CohereConfig(**small, logit_scale=0.25, pad_token_id=0)
    elif name == "granite":
        config = transformers.GraniteConfig(**small, logits_scaling=4.0)
    else:
        config = tiny_models.config(name, 300, 512)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    return model.eval()


def batch(model: Any) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    ids = torch.randint(0, 300, (3, 40))
    labels = torch.where(torch.rand(ids.shape) < 0.4, ids, torch.tensor(-100))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, labels


def reference(model: Any, inputs: dict[str, torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
    logits = model(**inputs, use_cache=False).logits[:, :-1]
    return torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum"
    )


def trained(model: Any) -> list[torch.Tensor]:
    return [p for p in model.parameters() if p.requires_grad]


def compare(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(loss_torch.PIECE_BYTES, "cpu", 4 * 300 * random.randint(1, 30))
    inputs, labels = batch(model)
    theirs = reference(model, inputs, labels)
    wanted = torch.autograd.grad(theirs / 7, trained(model), allow_unused=True)
    ours = sft_chunked(model, inputs, labels)
    assert ours is not None
    assert abs(ours - theirs).item() < 1e-4 * abs(theirs.item())
    got = torch.autograd.grad(ours / 7, trained(model), allow_unused=True)
    for a, b in zip(got, wanted, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            assert (a - b).abs().max() < 1e-4 * b.abs().max().clamp(min=1)
    with torch.no_grad():
        assert abs(sft_chunked(model, inputs, labels) - theirs).item() < 1e-4 * abs(theirs.item())  # type: ignore[operator]


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma2", "cohere", "granite", "gpt2", "phi", "mamba"])
def test_loss_and_gradients_equal_those_over_all_logits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All weights trained, the head's too, tied or not, with caps and scales behind it."""
    compare(build(name), monkeypatch)


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj"], "trainable_token_indices": [3, 5, 250]},
    ],
)
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_adapters_on_and_beside_the_head(name: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    tied = name == "qwen2" and "lm_head" in str(options)
    config = peft.LoraConfig(r=4, init_lora_weights=False, ensure_weight_tying=tied, **options)
    compare(peft.get_peft_model(build(name), config, autocast_adapter_dtype=False), monkeypatch)


def test_logits_treated_in_an_unknown_way_are_noticed() -> None:
    model = build("llama")
    plain = model.forward

    def forward(*args: Any, **inputs: Any) -> Any:
        output = plain(*args, **inputs)
        output.logits = output.logits * 1.5
        return output

    model.forward = forward
    assert sft_chunked(model, *batch(model)) is None


def test_nothing_trained_is_a_loss_of_zero() -> None:
    model = build("llama")
    inputs, labels = batch(model)
    loss = sft_chunked(model, inputs, torch.full_like(labels, -100))
    assert loss is not None and loss.item() == 0
    loss.backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    """As near to the float32 result as torch's own loss in this precision."""
    head = torch.nn.Linear(64, 1000, bias=False)
    hidden, targets = torch.randn(50, 64), torch.randint(0, 1000, (50,))

    def run(ours: bool, kind: torch.dtype) -> tuple[float, torch.Tensor]:
        part = hidden.detach().clone().to(kind).requires_grad_()
        cast = torch.nn.Linear(64, 1000, bias=False, dtype=kind)
        cast.weight.data = head.weight.data.to(kind)
        cast.requires_grad_(False)
        loss = (
            chunked_loss(part, targets, cast, rows=7)
            if ours
            else torch.nn.functional.cross_entropy(cast(part).float(), targets, reduction="sum")
        )
        loss.backward()
        assert part.grad is not None
        return loss.item(), part.grad.float()

    exact, exact_gradient = run(False, torch.float32)
    plain, plain_gradient = run(False, dtype)
    ours, gradient = run(True, dtype)
    assert abs(ours - exact) < 2 * abs(plain - exact) + 1e-3 * exact
    assert (gradient - exact_gradient).abs().max() < 2 * (plain_gradient - exact_gradient).abs().max() + 1e-4


MEASURE = """
import json, sys, time
import torch
def highest():
    # Not getrusage: its peak begins at that of the process that started this one.
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM"))
from app.training.loss_torch import chunked_loss
kind, tokens, vocabulary, width = sys.argv[1], 512, 128_000, 32
torch.manual_seed(0)
head = torch.nn.Linear(width, vocabulary, bias=False).requires_grad_(False)
hidden = torch.randn(tokens, width, requires_grad=True)
targets = torch.randint(0, vocabulary, (tokens,))
(head(hidden[:1]).sum() * 0).backward()
before = highest()
start = time.perf_counter()
if kind == "plain":
    loss = torch.nn.functional.cross_entropy(head(hidden).float(), targets, reduction="sum")
else:
    loss = chunked_loss(hidden, targets, head)
loss.backward()
seconds = time.perf_counter() - start
peak = highest()
print(json.dumps({"loss": loss.item(), "bytes": (peak - before) * 1024, "seconds": seconds, "gradient": hidden.grad.norm().item()}))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory is read from Linux's /proc")
def test_peak_memory_at_a_large_vocabulary() -> None:
    """512 trained tokens, 128,000 words: each in a process of its own."""
    results = {}
    for kind in ("plain", "chunked"):
        done = subprocess.run(
            [sys.executable, "-c", MEASURE, kind],
            capture_output=True, text=True, check=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        results[kind] = json.loads(done.stdout)
    print({kind: f"{r['bytes'] / 1e6:.0f} MB, {r['seconds']:.1f} s" for kind, r in results.items()})
    assert abs(results["plain"]["loss"] - results["chunked"]["loss"]) < 1e-4 * results["plain"]["loss"]
    assert abs(results["plain"]["gradient"] - results["chunked"]["gradient"]) < 1e-4 * results["plain"]["gradient"]
    assert results["chunked"]["bytes"] < results["plain"]["bytes"] / 2
