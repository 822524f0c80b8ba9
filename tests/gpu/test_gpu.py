"""On an NVIDIA card: what it computes against the same model on the processor. `python3 run.py test --gpu`; see docs/gpu.md."""

# ruff: noqa: E402 (imports that need torch come after the check that it is there)
from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed in this interpreter")
if not torch.cuda.is_available():
    pytest.skip("PyTorch finds no NVIDIA card here (torch.cuda.is_available() is false)", allow_module_level=True)

from app.adapters.packed_linear import PackedLinear
from app.backends.transformers import Backend
from app.core.library import ModelEntry
from app.core.memory import Gpu, Machine
from app.core.options import OptionValue
from tests.engine import packed_kit, tiny_models
from tests.engine.backend_kit import ask, loaded

pytestmark = pytest.mark.gpu

TEXT = "The warp is held under tension while the weft is drawn through"
SHAPE: dict[str, Any] = {
    "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "num_attention_heads": 8,
    "num_key_value_heads": 4, "initializer_range": 0.05,
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelEntry:
    """In 32 bits, so that greedy tokens can be compared at all."""
    return tiny_models.make(tmp_path_factory.mktemp("gpu") / "model", "llama", seed=3, **SHAPE)


@pytest.fixture(scope="module")
def on_cpu(model: ModelEntry) -> Any:
    """[tokens, vocabulary] float32: what the processor makes of TEXT."""
    with loaded(Backend(), model, cpu=True) as (backend, _):
        assert isinstance(backend, Backend)
        return logits(backend)


@pytest.fixture(autouse=True)
def card_is_given_back() -> Iterator[None]:
    """What a test loaded must be off the card after it."""
    before = torch.cuda.memory_allocated()
    yield
    assert torch.cuda.memory_allocated() <= before + 64 * 2**20


def logits(backend: Backend) -> Any:
    prompts, model = backend._prompts, backend._model
    assert prompts is not None
    tokens = torch.tensor([prompts.encode(TEXT, True)], device=model.get_input_embeddings().weight.device)
    with torch.inference_mode():
        return model(input_ids=tokens).logits[0].float().cpu()


def distance(found: Any, reference: Any) -> float:
    """Root mean square difference in standard deviations of the reference."""
    return float((found - reference).pow(2).mean().sqrt() / reference.std())


def test_float32_says_the_same_as_the_processor(model: ModelEntry, on_cpu: Any) -> None:
    with loaded(Backend(), model, cpu=True) as (backend, _):
        expected = ask(backend, TEXT, max_tokens=24)[0]
    with loaded(Backend(), model, dtype="float32") as (backend, event):
        assert isinstance(backend, Backend)
        assert next(backend._model.parameters()).is_cuda and not event.device.startswith("CPU"), event.device
        assert event.memory >= model.weight_bytes
        found = distance(logits(backend), on_cpu)
        print(f"\nfloat32 on {event.device}: distance to the processor {found:.2e}")
        assert found < 5e-3  # matrices may go through TF32
        assert ask(backend, TEXT, max_tokens=24)[0][:12] == expected[:12]


@pytest.mark.parametrize("attention", ["auto", "sdpa", "eager", "flash_attention_2"])
def test_bfloat16_and_every_attention_stay_close(model: ModelEntry, on_cpu: Any, attention: str) -> None:
    with loaded(Backend(), model, bf16=True, attention=attention) as (backend, event):
        assert isinstance(backend, Backend)
        assert next(backend._model.parameters()).dtype is torch.bfloat16
        found = distance(logits(backend), on_cpu)
        print(f"\nbfloat16, {attention}: distance {found:.3f}; notes {event.notes}")
        if attention == "flash_attention_2":  # either it runs, or it is said why not
            used = backend._model.config._attn_implementation
            assert used == attention or any("flash-attn" in note for note in event.notes)
        assert found < 0.05
        first, again = (ask(backend, TEXT, max_tokens=24) for _ in range(2))
        assert first[0] == again[0] and first[1].tokens > 0


def test_a_limit_on_the_card_leaves_the_rest_in_main_memory(model: ModelEntry, on_cpu: Any) -> None:
    half = model.weight_bytes / 2 / 2**30
    with loaded(Backend(), model, dtype="float32", gpu_memory=f"{half:.4f}") as (backend, _):
        assert isinstance(backend, Backend)
        places = set(backend._model.hf_device_map.values())
        assert "cpu" in places and len(places) > 1, places
        assert torch.cuda.memory_allocated() <= half * 2**30 + 32 * 2**20
        assert distance(logits(backend), on_cpu) < 5e-3
        assert ask(backend, TEXT, max_tokens=8)[1].tokens == 8


@pytest.mark.parametrize("method", ["gptq", "awq", "hqq"])
def test_packed_weights_are_the_processors(tmp_path: Path, method: str) -> None:
    base = packed_kit.make(tmp_path / "base", 3, hidden_size=256, intermediate_size=512)
    made = packed_kit.pack(base, tmp_path / method, method, group=64)
    with torch.inference_mode():
        wanted = made.reference(input_ids=torch.arange(5, 29)[None]).logits[0].float()
    for kernel, dtype, most in (("exact", "float32", 5e-3), ("exact", "bfloat16", 0.1), ("auto", "bfloat16", 0.1)):
        with loaded(Backend(), made.entry, packed_kernel=kernel, dtype=dtype) as (backend, event):
            assert isinstance(backend, Backend)
            layouts = {m.layout for m in backend._model.modules() if isinstance(m, PackedLinear)}
            with torch.inference_mode():
                found = backend._model(input_ids=torch.arange(5, 29, device="cuda")[None]).logits[0].float().cpu()
            far = distance(found, wanted)
            print(f"\n{method}, {dtype}, {kernel} ({', '.join(layouts)}) on {event.device}: distance {far:.2e}")
            assert far < most
            assert ask(backend, TEXT, max_tokens=8)[1].finish_reason


@pytest.mark.parametrize(
    ("options", "most"),
    [
        # Measured on the processor, with these random weights: 0.09, 0.57, 0.58, 0.72.
        ({"load_in_8bit": True}, 0.15),
        ({"load_in_4bit": True}, 0.7),
        ({"load_in_4bit": True, "use_double_quant": True, "compute_dtype": "bfloat16"}, 0.7),
        ({"load_in_4bit": True, "quant_type": "fp4"}, 0.9),
    ],
    ids=str,
)
def test_quantized_stays_close_to_unquantized(
    model: ModelEntry, on_cpu: Any, options: dict[str, OptionValue], most: float
) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed in this interpreter")
    with loaded(Backend(), model, cpu=True, **options) as (backend, _):
        assert isinstance(backend, Backend)
        same_weights = logits(backend)
    with loaded(Backend(), model, **options) as (backend, event):
        assert isinstance(backend, Backend)
        layer = backend._model.model.layers[0].mlp.up_proj
        assert layer.weight.is_cuda and layer.weight.dtype in (torch.int8, torch.uint8)
        found = logits(backend)
        cost, arithmetic = distance(found, on_cpu), distance(found, same_weights)
        print(f"\n{options}: distance {cost:.3f} to unquantized, {arithmetic:.3f} to the processor's; {event.memory / 2**20:.0f} MiB")
        assert cost < most
        assert arithmetic < 0.12
        text, done = ask(backend, TEXT, max_tokens=16)
        assert done.tokens > 0 and text == ask(backend, TEXT, max_tokens=16)[0]


def test_the_estimate_for_the_card(tmp_path: Path) -> None:
    """Weights and cache of a full context within 20 % of what PyTorch takes, where they outweigh its own needs."""
    from app.core.options import build
    from app.generation.hf_memory import estimate
    from app.generation.hf_options import Options

    large = {**SHAPE, "hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 16, "num_key_value_heads": 8}
    entry = tiny_models.make(tmp_path / "model", "llama", dtype=torch.bfloat16, context=2048, **large)
    free, total = torch.cuda.mem_get_info(0)
    card = Gpu(name=torch.cuda.get_device_name(0), total=total, free=free)
    here = Machine(system="linux", cpu_count=2, ram_total=2**35, ram_free=2**34, gpus=(card,))
    expected = estimate(entry, build(Options, {}), here).gpu
    torch.cuda.reset_peak_memory_stats()
    with loaded(Backend(), entry) as (backend, _):
        ask(backend, "weft " * 1000, max_tokens=4)
        peak = torch.cuda.max_memory_reserved()
    print(f"\nestimate {expected / 2**20:.0f} MiB, peak {peak / 2**20:.0f} MiB, ratio {expected / peak:.2f}")
    assert abs(expected / peak - 1) <= 0.2
