"""bitsandbytes' 4-bit matrices on the processor: read right at any time, also after a forward has put them in another order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from app.adapters.base_torch import weight_of
from app.backends.transformers import Backend
from app.core.library import ModelEntry
from app.core.stack import AdapterStack, StackedAdapter
from tests.engine import tiny_models
from tests.engine.adapter_kit import differences, random_adapter, rms
from tests.engine.backend_kit import FakeReport, loaded

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed in this interpreter")
from bitsandbytes.functional import has_avx512bf16

FORWARDS = 3
BFLOAT16 = 2.0**-8  # relative


def run(backend: Backend, ids: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return backend._model(input_ids=ids).logits.float()


def packed(backend: Backend) -> dict[str, Any]:
    """The 4-bit modules."""
    return {n: m for n, m in backend._model.named_modules() if type(m).__name__ == "Linear4bit"}


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_weights_read_the_same_before_and_after_forwards(tmp_path: Path, kind: str, double: bool, seed: int) -> None:
    model = tiny_models.make(tmp_path / "m", seed=seed, hidden_size=128, intermediate_size=192)
    ids = torch.arange(5, 25)[None]
    with loaded(Backend(), model, load_in_4bit=True, quant_type=kind, use_double_quant=double) as (backend, _):
        before = {name: weight_of(module).float().clone() for name, module in packed(backend).items()}
        first = run(backend, ids)
        moved = 0
        for _ in range(FORWARDS):
            for name, module in packed(backend).items():
                moved += bool(getattr(module.weight.quant_state, "packing_format_for_cpu", False))
                after, was = weight_of(module), before[name]
                assert after.shape == was.shape and after.dtype == backend._model.dtype
                assert ((after.float() - was).abs() <= was.abs() * BFLOAT16 + 1e-12).all(), name
            assert torch.equal(run(backend, ids), first)  # reading changed nothing
        # Where the processor has the kernel this test is about what it does; elsewhere nothing is moved.
        assert bool(moved) == bool(has_avx512bf16())


def merged_reference(
    entry: ModelEntry, plain: dict[str, torch.Tensor], pairs: list[tuple[Path, float]], ids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of the unpacked weights in a plain model, without and with the adapters merged in."""
    reference = transformers.AutoModelForCausalLM.from_pretrained(entry.path, dtype=torch.float32)
    with torch.no_grad():
        for name, weight in plain.items():
            reference.get_submodule(name).weight.copy_(weight)
        base = reference(input_ids=ids).logits
        total: dict[str, torch.Tensor] = {}
        for path, weight in pairs:
            for name, d in differences(reference, path).items():
                total[name] = total.get(name, 0) + weight * d
        for name, d in total.items():
            reference.get_parameter(name).add_(d.float())
        return base, reference(input_ids=ids).logits


@pytest.mark.parametrize("answers_before", [0, FORWARDS])
def test_adapters_that_need_the_base_s_weights_are_right_whenever_they_come(
    tmp_path: Path, answers_before: int, seed: int
) -> None:
    entry = tiny_models.make(tmp_path / "model", "llama", seed=seed, hidden_size=128, intermediate_size=192)
    model = transformers.AutoModelForCausalLM.from_pretrained(entry.path)
    lora = random_adapter(tmp_path / "lora", "llama", model, seed, r=8)
    dora = random_adapter(tmp_path / "dora", "llama", model, seed + 1, use_dora=True)
    pairs = [(lora, 0.5), (dora, 1.0)]
    ids = torch.arange(5, 25)[None]
    with loaded(Backend(), entry, load_in_4bit=True) as (backend, _):
        plain = {name: weight_of(module).float().clone() for name, module in packed(backend).items()}
        for _ in range(answers_before):
            run(backend, ids)
        stack = AdapterStack(adapters=tuple(StackedAdapter(path=str(path), weight=weight) for path, weight in pairs))
        backend.set_adapters(stack, FakeReport())
        base, expected = merged_reference(entry, plain, pairs, ids)
        for _ in range(FORWARDS):
            ours = run(backend, ids)
            backend.set_adapters(AdapterStack(), FakeReport())
            noise = rms(run(backend, ids) - base)  # of the 4-bit kernels themselves
            backend.set_adapters(stack, FakeReport())
            assert rms(ours - expected) < 3 * noise + 1e-4
            assert rms(expected - base) > 10 * rms(ours - expected)


def test_matrices_of_odd_sizes_answer_too(tmp_path: Path, seed: int) -> None:
    """16 rows in the key projection, which the kernel of AVX512-BF16 processors does not take."""
    model = tiny_models.make(
        tmp_path / "m", seed=seed, hidden_size=128, intermediate_size=192, num_attention_heads=8, num_key_value_heads=1
    )
    ids = torch.arange(5, 25)[None]
    with loaded(Backend(), model, load_in_4bit=True) as (backend, _):
        assert packed(backend)["model.layers.0.self_attn.k_proj"].out_features == 16
        plain = {name: weight_of(module).float().clone() for name, module in packed(backend).items()}
        base, _ = merged_reference(model, plain, [], ids)
        for _ in range(FORWARDS):
            found = run(backend, ids)
            assert (found - base).pow(2).mean().sqrt() < 0.06 * base.std()
