"""What a load is said to take is what it takes: estimates against the measured peak of an engine's process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from app.backends import specs
from app.core import memory
from app.core.library import ModelEntry, ModelFormat, ModelShape
from app.core.memory import Estimate, Fit, Gpu, LlamaDemand, Machine
from app.core.options import build

ROOT = Path(__file__).resolve().parents[2]
MACHINE = Machine(system="linux", cpu_count=4, ram_total=64 * 2**30, ram_free=48 * 2**30)
WITHIN = 0.20

# Loads a model as an engine does, fills its context where the cache grows with it, answers, says the peak of its memory.
CHILD = """
import json, sys
import msgspec
from app.backends import backend_class
from app.core.errors import WeftError
from app.core.library import ModelEntry
from app.core.sampling import Sampling
from app.engine.protocol import Generate, Load
from tests.engine.llama_helpers import Recorder

loader, entry, options = sys.argv[1], msgspec.json.decode(sys.argv[2], type=ModelEntry), json.loads(sys.argv[3])
backend, report = backend_class(loader)(), Recorder()
backend.load(Load(model=entry, options=options), report)
words = report.event.context
if loader == "llama_cpp":  # takes its cache in full at once; reading a whole context would only take time
    words = min(words, 800)
while True:
    try:
        request = Generate(prompt="the sea " * words, sampling=Sampling(temperature=0, max_tokens=8))
        result = backend.generate(request, report)
        break
    except WeftError:
        words = words * 3 // 4
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]
print(json.dumps([int(peak) * 1024, report.event.memory, result.prompt_tokens, report.event.context]))
backend.unload()
"""


def measured(loader: str, entry: ModelEntry, options: dict[str, Any]) -> tuple[int, int, int, int]:
    """Peak bytes of the process, bytes that the load said it took, tokens of the prompt, context."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    done = subprocess.run(
        [sys.executable, "-c", CHILD, loader, msgspec.json.encode(entry).decode(), json.dumps(options)],
        env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return tuple(json.loads(done.stdout.splitlines()[-1]))


def estimated(loader: str, entry: ModelEntry, options: dict[str, Any]) -> Estimate:
    spec = specs()[loader]
    return spec.estimate(entry, build(spec.options, options), MACHINE)


def hold(loader: str, entry: ModelEntry, options: dict[str, Any]) -> None:
    peak, told, prompt, context = measured(loader, entry, options)
    estimate = estimated(loader, entry, options)
    ratio = estimate.ram / peak
    print(
        f"{loader} {entry.quantization or 'f32'} {entry.parameters / 1e6:.0f}M: estimate {estimate.ram / 2**20:.0f} MiB "
        f"(weights {estimate.weights / 2**20:.0f}, cache {estimate.cache / 2**20:.0f}), "
        f"measured {peak / 2**20:.0f} MiB, ratio {ratio:.2f}; prompt {prompt} of {context}, load said {told / 2**20:.0f} MiB"
    )
    assert abs(ratio - 1) <= WITHIN
    assert 0 < told <= peak


LLAMA: list[dict[str, Any]] = [
    {"layers": 6, "hidden": 384, "intermediate": 1024, "heads": 6, "kv_heads": 6, "vocab": 2048, "kind": "F32"},
    {
        "layers": 8,
        "hidden": 512,
        "intermediate": 1536,
        "heads": 8,
        "kv_heads": 8,
        "vocab": 4096,
        "kind": "F16",
        "context": 8192,
    },
    {"layers": 10, "hidden": 768, "intermediate": 2048, "heads": 12, "kv_heads": 4, "vocab": 16_000, "kind": "Q8_0"},
    {"layers": 16, "hidden": 768, "intermediate": 2048, "heads": 12, "kv_heads": 12, "vocab": 4096, "kind": "Q4_0"},
    {"layers": 8, "hidden": 768, "intermediate": 2304, "heads": 12, "kv_heads": 4, "vocab": 32_000, "kind": "Q4_K_M"},
]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the peak of a process is read from Linux's /proc")
@pytest.mark.parametrize("shape", LLAMA, ids=lambda s: f"{s['kind']}-{s['hidden']}x{s['layers']}")
def test_llama_cpp_takes_what_is_estimated(tmp_path, shape):
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed in this interpreter")
    pytest.importorskip("gguf")
    from tests.engine import tiny_gguf

    entry = tiny_gguf.write(tmp_path / "model.gguf", **shape)
    hold("llama_cpp", entry, {"threads": 1})
    Path(entry.path).unlink()


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the peak of a process is read from Linux's /proc")
@pytest.mark.parametrize(
    "options",
    [
        {"no_mmap": True},
        {"cache_type_k": "q8_0", "cache_type_v": "q8_0"},
        {"n_ubatch": 128},
        {"n_ctx": 1024},
        {"repack": False},
    ],
    ids=str,
)
def test_llama_cpp_options_count(tmp_path, options):
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed in this interpreter")
    from tests.engine import tiny_gguf

    hold("llama_cpp", tiny_gguf.write(tmp_path / "model.gguf", **LLAMA[3]), {"threads": 1, **options})


TRANSFORMERS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 6, "context": 512}),
    ("qwen2", {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "context": 1024}),
    ("llama", {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 8, "context": 512}),
    ("phi", {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 6, "context": 512}),
    (
        "mistral",
        {
            "hidden_size": 768,
            "intermediate_size": 2048,
            "num_hidden_layers": 12,
            "context": 512,
            "sliding_window": None,
        },
    ),
]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the peak of a process is read from Linux's /proc")
@pytest.mark.parametrize(
    ("family", "shape"), TRANSFORMERS, ids=lambda v: v if isinstance(v, str) else str(v["hidden_size"])
)
def test_transformers_takes_what_is_estimated(tmp_path, family, shape):
    pytest.importorskip("torch", reason="torch is not installed in this interpreter")
    from tests.engine import tiny_models

    hold("transformers", tiny_models.make(tmp_path / "model", family, **shape), {})


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the peak of a process is read from Linux's /proc")
@pytest.mark.parametrize("option", ["load_in_4bit", "load_in_8bit"])
def test_quantizing_while_loading_takes_what_is_estimated(tmp_path, option):
    torch = pytest.importorskip("torch", reason="torch is not installed in this interpreter")
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed in this interpreter")
    from tests.engine import tiny_models

    shape = {"hidden_size": 1024, "intermediate_size": 3584, "num_hidden_layers": 12, "num_attention_heads": 16}
    hold("transformers", tiny_models.make(tmp_path / "model", dtype=torch.bfloat16, **shape), {option: True})


# Arithmetic


def test_the_cache_is_counted_by_hand():
    shape = ModelShape(layers=32, heads=32, kv_heads=8, head_dim=128, value_dim=128)
    assert memory.kv_cache_bytes(shape, 8192) == 32 * 8192 * 8 * (128 + 128) * 2 == 2**30
    assert memory.kv_cache_bytes(shape, 8192, key_bytes=34 / 32, value_bytes=18 / 32) == 2**30 * (34 + 18) // 128
    window = msgspec.structs.replace(shape, sliding_window=1024)
    assert memory.kv_cache_bytes(window, 8192) == 2**30
    assert memory.kv_cache_bytes(window, 8192, full_window=False) == 2**30 * (8192 + 1536) // (2 * 8192)


def test_the_automatic_context_never_takes_more_than_half_of_what_is_left():
    shape = ModelShape(
        layers=32, heads=32, kv_heads=8, head_dim=128, value_dim=128, hidden=4096, intermediate=14_336, vocabulary=128_256, context=131_072
    )  # fmt: skip
    demand, weights = LlamaDemand(), 5 * 2**30
    previous = 0
    for free in (4, 6, 8, 12, 16, 24, 48, 96):
        tokens = memory.automatic_context(shape, demand, free * 2**30, weights)
        assert previous <= tokens <= 131_072 and tokens % memory.PAD == 0
        if tokens > 2048:
            assert memory.kv_cache_bytes(shape, tokens) <= (free * 2**30 - weights) / 2
        previous = tokens
    assert memory.automatic_context(shape, demand, 4 * 2**30, weights) == 2048
    assert previous == 131_072
    assert memory.automatic_context(msgspec.structs.replace(shape, context=512), demand, 2**40, weights) == 512


def test_a_long_trained_context_does_not_forbid_a_model_to_transformers():
    """Llama 3.1 8B in 16 bits was trained for 131,072 tokens, whose cache alone takes 16 GiB."""
    spec = specs()["transformers"]
    entry = msgspec.structs.replace(
        _seven_billion(), format=ModelFormat.SAFETENSORS, quantization="", parameters=8_030_261_248, weight_bytes=16_060_522_496,
        shape=ModelShape(
            layers=32, hidden=4096, intermediate=14_336, heads=32, kv_heads=8, head_dim=128, value_dim=128, vocabulary=128_256,
            context=131_072,
        ),
    )  # fmt: skip
    home = Machine(system="linux", cpu_count=8, ram_total=32 * 2**30, ram_free=28 * 2**30)
    card = msgspec.structs.replace(home, gpus=(Gpu(name="x", total=24 * 2**30, free=23 * 2**30),))

    def estimate(machine: Machine, **options: Any) -> Estimate:
        return spec.estimate(entry, build(spec.options, options), machine)

    assert memory.fit(estimate(home), home) is Fit.RAM
    assert 2**31 < estimate(home).cache <= (28 * 2**30 - entry.weight_bytes) / 2
    assert estimate(card).gpu <= 23 * 2**30 and 2**30 < estimate(card).cache <= 2**32
    assert estimate(home, context_length=131_072).cache == 2**34
    assert memory.fit(estimate(home, context_length=131_072), home) is Fit.NO
    large = msgspec.structs.replace(home, ram_free=96 * 2**30)
    assert estimate(large).cache == 2**34


def test_where_a_load_fits():
    gpu = Machine(
        system="linux", cpu_count=4, ram_total=2**35, ram_free=2**34, gpus=(Gpu(name="x", total=2**34, free=2**34),)
    )
    entry = _seven_billion()
    spec = specs()["llama_cpp"]

    def fit(machine: Machine, **options: Any) -> Fit:
        return memory.fit(spec.estimate(entry, build(spec.options, {"n_ctx": 4096, **options}), machine), machine)

    assert fit(gpu) is Fit.GPU
    assert fit(gpu, n_gpu_layers=10) is Fit.GPU_RAM
    assert fit(gpu, cpu=True) is Fit.RAM
    assert fit(msgspec.structs.replace(gpu, gpus=())) is Fit.RAM
    assert fit(msgspec.structs.replace(gpu, llama_gpu=False)) is Fit.RAM
    assert fit(msgspec.structs.replace(gpu, llama_gpu=False, ram_free=2**31)) is Fit.NO
    assert fit(msgspec.structs.replace(gpu, gpus=(), ram_free=2**31)) is Fit.NO
    assert fit(msgspec.structs.replace(gpu, ram_free=0)) is Fit.UNKNOWN
    small = msgspec.structs.replace(gpu, gpus=(Gpu(name="x", total=2**32, free=2**32),))
    assert fit(small) is Fit.GPU_RAM
    assert fit(small, n_gpu_layers=-1) is Fit.NO


def test_the_parts_of_an_estimate_add_up():
    spec, entry = specs()["llama_cpp"], _seven_billion()
    gpu = msgspec.structs.replace(MACHINE, gpus=(Gpu(name="x", total=2**33, free=2**33),))
    for machine in (MACHINE, gpu):
        for layers in (None, 0, 7, -1):
            estimate = spec.estimate(entry, build(spec.options, {"n_gpu_layers": layers}), machine)
            assert estimate.ram + estimate.gpu == estimate.total and min(estimate.ram, estimate.gpu) >= 0


def test_batches_of_a_prompt_depend_on_the_model_alone():
    assert [memory.prompt_chunk(n, 512) for n in (10**7, 4 * 10**8, 10**9, 7 * 10**10)] == [512, 64, 64, 64]
    assert memory.prompt_chunk(2 * 10**8, 512) == 128 and memory.prompt_chunk(10**7, 32) == 32


def _seven_billion() -> ModelEntry:
    return ModelEntry(
        id="x", name="x", path="x", format=ModelFormat.GGUF, architecture="llama", quantization="Q4_K_M", parameters=7 * 10**9,
        weight_bytes=4_200_000_000,
        shape=ModelShape(
            layers=32, hidden=4096, intermediate=11_008, heads=32, kv_heads=8, head_dim=128, value_dim=128, vocabulary=32_000,
            context=8192,
        ),
    )  # fmt: skip
