"""What a load will take, and whether it fits: plain arithmetic over headers and the machine's free memory."""

from __future__ import annotations

from enum import StrEnum

import msgspec

from app.core.library import ModelEntry, ModelShape

MIB = 2**20
PAD = 256  # llama.cpp rounds a context up to a multiple of this
PROCESS = 42 * MIB  # the interpreter, numpy and llama.cpp itself
VOCABULARY = 60  # bytes for each token of the vocabulary beside its text in the file
# Weights that llama.cpp reorders for the CPU while loading, as a share of the layers' matrices. With a memory map the
# file's own pages stay counted beside them.
REPACKED = {"Q4_0": 1.0, "IQ4_NL": 1.0, "Q4_K_S": 0.95, "Q4_K_M": 0.65}


class Gpu(msgspec.Struct, frozen=True, kw_only=True):
    """One accelerator; memory in bytes."""

    name: str
    total: int
    free: int


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """What there is to run on; memory in bytes."""

    system: str  # linux, windows, darwin
    cpu_count: int
    ram_total: int
    ram_free: int
    gpus: tuple[Gpu, ...] = ()
    llama_gpu: bool = True  # llama.cpp's build, present or to come, can use them

    @property
    def vram_free(self) -> int:
        return sum(gpu.free for gpu in self.gpus)


class Estimate(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes that a load will take, by cause and by place."""

    weights: int
    cache: int  # KV cache at the chosen context length
    overhead: int  # libraries, compute buffers
    gpu: int = 0  # of the total, on accelerators
    ram: int = 0  # of the total, in main memory

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.overhead


class Fit(StrEnum):
    """Where a model fits, best first."""

    GPU = "gpu"
    GPU_RAM = "gpu+ram"
    RAM = "ram"
    NO = "no"
    UNKNOWN = "unknown"


class LlamaDemand(msgspec.Struct, frozen=True, kw_only=True):
    """What of the llama.cpp options decides about memory.

    Attributes:
        context: tokens; None for as many as `automatic_context` gives.
        ubatch: tokens computed at a time.
        key_bytes, value_bytes: per element of the KV cache; fractions for quantized types.
        gpu_layers: None for as many as fit, -1 for all.
        full_window: layers with sliding-window attention keep the whole context.
        score_rows: rows of logits that room is made for.
        repack: a memory-mapped file, of which some weights are reordered beside it.
    """

    context: int | None = None
    ubatch: int = 512
    key_bytes: float = 2.0
    value_bytes: float = 2.0
    gpu_layers: int | None = None
    cache_on_gpu: bool = True
    full_window: bool = True
    flash_attention: bool = True
    score_rows: int = 128
    repack: bool = True


def kv_cache_bytes(
    shape: ModelShape,
    context: int,
    *,
    key_bytes: float = 2.0,
    value_bytes: float = 2.0,
    full_window: bool = True,
    ubatch: int = 512,
) -> int:
    """Bytes of the keys and values of a whole context.

    Each layer keeps, for every token, kv_heads keys of head_dim elements and as many values of value_dim.

    Args:
        context: tokens. key_bytes, value_bytes: per element.
        full_window: false: layers with a sliding window keep that and one batch only. Which layers these are is not
            in `shape`; every second is the rule, and where more of them are, this is on the safe side.
        ubatch: tokens of one batch.
    """
    value_dim = shape.value_dim or shape.head_dim
    per_token = (shape.kv_heads or shape.heads) * (shape.head_dim * key_bytes + value_dim * value_bytes)
    tokens = float(context)
    if shape.sliding_window and not full_window:
        tokens = (context + min(context, shape.sliding_window + ubatch)) / 2
    return round(shape.layers * tokens * per_token)


def llama_context_size(shape: ModelShape, demand: LlamaDemand, free: int, weights: int) -> int:
    """Tokens that llama.cpp will make room for, rounded as it rounds."""
    wanted = demand.context or automatic_context(shape, demand, free, weights)
    return -(-wanted // PAD) * PAD


def automatic_context(shape: ModelShape, demand: LlamaDemand, free: int, weights: int) -> int:
    """The context length when nobody chose one: what the model was trained for, capped by memory.

    The cache may take half of what the weights leave free, so that a model trained for 128,000 tokens does not
    fill the machine before a word is said.

    Args:
        free: bytes free before the load, 0 when unknown. weights: bytes of the weights.
    """
    room = free - weights - llama_overhead(shape, demand, 0) if free else None
    per_token = kv_cache_bytes(shape, 1024, key_bytes=demand.key_bytes, value_bytes=demand.value_bytes) / 1024
    return capped_context(shape.context or 4096, per_token, room)


def capped_context(trained: int, per_token: float, room: int | None) -> int:
    """A context length of which the cache takes at most half of what is left, but no less than 2,048 tokens.

    Args:
        trained: tokens, the most that it can be. per_token: bytes of the cache for each.
        room: bytes that weights and libraries leave free; None when unknown, for 8,192 tokens.
    """
    if room is None:
        return min(trained, 8192)
    if per_token <= 0:
        return trained
    fits = int(max(0, room) // 2 / per_token) // PAD * PAD
    return max(min(trained, 2048), min(trained, fits))


def llama_overhead(shape: ModelShape, demand: LlamaDemand, context: int) -> int:
    """Bytes that llama.cpp takes beside weights and cache: its compute buffer, logits, vocabulary and the process.

    The compute buffer holds what lives at once for `ubatch` tokens: the widest activations, or the logits of as many
    tokens as may have them, and the attention mask. Fitted to what the library reports for models of several shapes;
    tests/engine/test_memory_estimates.py holds it to that.
    """
    tokens = min(demand.ubatch, context or demand.ubatch)
    rows = max(1, min(demand.score_rows, 32 * MIB // (4 * max(1, shape.vocabulary))))
    activations = 4 * tokens * (3 * shape.intermediate + 3.5 * shape.hidden)
    mask = 2 * tokens * context
    scores = 0 if demand.flash_attention else (4 * shape.heads + 2) * tokens * context
    compute = max(activations, 4 * shape.vocabulary * rows) + mask + scores
    return PROCESS + round(compute) + (4 + VOCABULARY) * shape.vocabulary


def repacked_bytes(model: ModelEntry) -> int:
    """Bytes of the weights that llama.cpp will hold a second, reordered copy of. See REPACKED."""
    share = REPACKED.get(model.quantization.upper(), 0.0)
    if not share or not model.parameters:
        return 0
    embeddings = 2 * model.shape.vocabulary * model.shape.hidden
    return round((model.weight_bytes or model.bytes) * share * max(0.0, 1 - embeddings / model.parameters))


def llama_estimate(model: ModelEntry, machine: Machine, demand: LlamaDemand) -> Estimate:
    """What a load through llama.cpp will take.

    Args:
        model: from the library; its shape comes from the file's header.
    """
    shape = model.shape
    weights = model.weight_bytes or model.bytes
    layers = _layers_on_gpu(model, machine, demand)
    share = layers / (shape.layers + 1) if shape.layers else 0.0
    free = machine.vram_free if share == 1 else machine.ram_free
    context = llama_context_size(shape, demand, free, weights)
    cache = kv_cache_bytes(
        shape,
        context,
        key_bytes=demand.key_bytes,
        value_bytes=demand.value_bytes,
        full_window=demand.full_window,
        ubatch=demand.ubatch,
    )
    overhead = llama_overhead(shape, demand, context)
    if demand.repack and not layers:
        weights += repacked_bytes(model)
    on_gpu = round(weights * share) + (round(cache * share) if demand.cache_on_gpu else 0)
    on_gpu += overhead - PROCESS if layers else 0
    total = weights + cache + overhead
    return Estimate(weights=weights, cache=cache, overhead=overhead, gpu=on_gpu, ram=total - on_gpu)


def _layers_on_gpu(model: ModelEntry, machine: Machine, demand: LlamaDemand) -> int:
    """Layers that will lie on GPUs, the output layer counted as one."""
    every = model.shape.layers + 1
    if not (machine.gpus and machine.llama_gpu):
        return 0
    if demand.gpu_layers is not None:
        return every if demand.gpu_layers < 0 else min(every, demand.gpu_layers)
    return gpu_layers_that_fit(model.shape, model.weight_bytes or model.bytes, demand, machine.vram_free)


def gpu_layers_that_fit(shape: ModelShape, weights: int, demand: LlamaDemand, vram: int) -> int:
    """How many layers, the output layer counted as one, fit into so much free memory of GPUs.

    A tenth is left for the driver, the desktop and what the compute buffers take beyond the estimate.
    """
    every = shape.layers + 1
    context = demand.context or automatic_context(shape, demand, vram, weights)
    cache = kv_cache_bytes(shape, context, key_bytes=demand.key_bytes, value_bytes=demand.value_bytes)
    each = (weights + (cache if demand.cache_on_gpu else 0)) / every
    room = vram * 0.9 - (llama_overhead(shape, demand, context) - PROCESS)
    return max(0, min(every, int(room / each))) if each else 0


def fit(estimate: Estimate, machine: Machine) -> Fit:
    """Where a load fits, by its estimate and what is free."""
    if not machine.ram_free:
        return Fit.UNKNOWN
    if estimate.ram > machine.ram_free or estimate.gpu > machine.vram_free:
        return Fit.NO
    if not estimate.gpu:
        return Fit.RAM
    # What remains in main memory of a model that lies on the GPU whole is the process itself.
    return Fit.GPU if estimate.ram <= 2 * PROCESS else Fit.GPU_RAM


def prompt_chunk(parameters: int, batch: int) -> int:
    """Tokens of a prompt to hand to a CPU at a time, so that progress shows and Cancel is heard between them.

    A power of two that takes about a second at 100 GFLOP/s, and at least 64, below which matrix kernels lose speed.
    It depends on the model alone, never on the clock: batches of another size round differently, and the same seed
    must give the same answer.
    """
    tokens = int(1e11 / (2 * max(1, parameters)))
    return min(batch, max(64, 1 << max(0, tokens.bit_length() - 1)))
