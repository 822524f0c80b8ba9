"""llama.cpp with layers on an NVIDIA card, against itself on the processor. `python3 run.py test --gpu`; see docs/gpu.md."""

# ruff: noqa: E402 (imports that need llama.cpp come after the check that it is there)
from __future__ import annotations

from typing import Any

import pytest

library = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed in this interpreter")
pytest.importorskip("gguf", reason="gguf is not installed in this interpreter")
if not library.llama_supports_gpu_offload():
    pytest.skip("this llama.cpp was built without GPU support; see docs/gpu.md", allow_module_level=True)

from app.core.library import ModelEntry
from app.generation import llama_machine
from tests.engine import tiny_gguf
from tests.engine.llama_helpers import loaded, write_on

if not llama_machine.free_gpu_memory():
    pytest.skip("llama.cpp was built with GPU support, but finds no card", allow_module_level=True)

pytestmark = pytest.mark.gpu

TEXT = "the rain is on the shore and the tea is hot"
LAYERS = 6


@pytest.fixture(scope="module", params=["F16", "Q8_0", "Q4_K_M"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ModelEntry:
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    return tiny_gguf.write(
        path, layers=LAYERS, hidden=512, heads=8, kv_heads=8, intermediate=1536, vocab=4096, kind=request.param
    )


def logits(backend: Any) -> Any:
    """[vocabulary] float32 after TEXT."""
    import numpy

    write_on(backend, TEXT)
    backend._context.clear()
    assert backend._context.read(backend._tokens(TEXT), lambda done: None)
    pointer = library.llama_get_logits_ith(backend._context.pointer, -1)
    return numpy.ctypeslib.as_array(pointer, shape=(library.llama_vocab_n_tokens(backend._model.vocab),)).copy()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"n_gpu_layers": -1},
        {"n_gpu_layers": LAYERS // 2},
        {"n_gpu_layers": -1, "offload_kqv": False},
        {"n_gpu_layers": -1, "flash_attention": "on"},
        {"n_gpu_layers": -1, "split_mode": "none", "main_gpu": 0},
        {"n_gpu_layers": -1, "tensor_split": "1"},
    ],
    ids=str,
)
def test_layers_on_the_card_say_what_the_processor_says(model: ModelEntry, options: dict[str, Any]) -> None:
    with loaded(model, cpu=True, n_ctx=512) as (backend, event):
        assert event.device.startswith("CPU")
        expected = logits(backend)
    with loaded(model, n_ctx=512, **options) as (backend, event):
        found = logits(backend)
        error = float(((found - expected) ** 2).mean() ** 0.5 / expected.std())
        print(f"\n{model.quantization} {options}: {event.device}; distance {error:.4f}")
        on_gpu = LAYERS // 2 if options.get("n_gpu_layers") == LAYERS // 2 else LAYERS + 1
        assert backend._log.offloaded == (on_gpu, LAYERS + 1)
        # The two round activations and products differently, most with quantized weights.
        assert error < 0.05
        assert expected[found.argmax()] >= expected.max() - 0.1 * expected.std()
        assert write_on(backend, TEXT)[0] == write_on(backend, TEXT)[0]


def test_two_cards_share_the_layers(model: ModelEntry) -> None:
    import torch

    if not torch.cuda.is_available() or torch.cuda.device_count() < 2:
        pytest.skip("there is but one card, and a split needs two")
    with loaded(model, cpu=True, n_ctx=512) as (backend, _):
        expected = logits(backend)
    with loaded(model, n_ctx=512, n_gpu_layers=-1, tensor_split="50,50") as (backend, _):
        places = {place for place, _ in backend._log.buffers if "CUDA" in place and "Host" not in place}
        assert len(places) >= 2, places
        assert float(((logits(backend) - expected) ** 2).mean() ** 0.5 / expected.std()) < 0.05
