"""What the Transformers loader's options mean in memory: the estimate before a load, and the context when nobody chose one.

Reads without torch: the window asks too.
"""

from __future__ import annotations

from collections.abc import Sequence

from app.core.errors import ErrorKind, WeftError
from app.core.library import ModelEntry, ModelFormat
from app.core.memory import Estimate, Machine, capped_context, kv_cache_bytes, prompt_chunk
from app.core.quantization import PACKED
from app.generation.hf_options import Options

GIB = 1024**3
PROCESS = 350 * 1024 * 1024  # bytes: an engine with torch and transformers at work, measured without a graphics card
BITSANDBYTES = 45 * 1024 * 1024  # bytes: what its import adds, measured


def estimate(model: ModelEntry, options: Options, machine: Machine) -> Estimate:
    """Bytes that a load takes with a full context: weights, keys and values, the libraries, and a prompt's activations."""
    size = _dtype_size(model, options, machine)
    weights = weight_bytes(model, options, size)
    shape = model.shape
    context = options.context_length or automatic_context(
        model, options, size, trained=shape.context, ram=machine.ram_free, gpus=_usable(options, machine)
    )
    cache = kv_cache_bytes(shape, context, key_bytes=size, value_bytes=size)
    work = _activation_bytes(model, size, context)
    gpu = 0
    if _usable(options, machine):
        gpu = min(weights + cache + work, sum(_limits(options, _usable(options, machine))))
    ram = weights + cache + work - gpu
    if options.disk and options.cpu_memory is not None and weights > options.cpu_memory * GIB:
        ram -= max(0, weights - gpu - int(options.cpu_memory * GIB))
    # While loading, files whose numbers are converted lie in memory beside what is made of them.
    stored = model.weight_bytes or model.bytes
    passing = max(0, stored - cache - work) if abs(weights - stored) > stored // 8 else 0
    if options.load_in_4bit or options.load_in_8bit:
        passing += BITSANDBYTES + 12 * shape.hidden * shape.intermediate  # the library; one matrix at work
    elif options.load_in_hqq != "off" or model.format in PACKED:
        passing += 24 * shape.hidden * shape.intermediate  # one matrix at work
    return Estimate(
        weights=weights, cache=cache, overhead=PROCESS + work + passing, gpu=gpu, ram=ram + PROCESS + passing
    )


def automatic_context(
    model: ModelEntry, options: Options, size: float, *, trained: int, ram: int, gpus: Sequence[int] = ()
) -> int:
    """The context length when nobody chose one: what the model was trained for, as far as memory allows.

    The cache may take half of what the weights leave free: on the cards where these are used, for the layers that lie
    there have their part of it beside them.

    Args:
        size: bytes of one number of the cache. trained: tokens, before `compress_pos_emb`; 0 when unknown.
        ram: bytes free in main memory, 0 when unknown; gpus: bytes that each card has free.
    """
    stretched = int((trained or 2048) * options.compress_pos_emb)
    per_token = kv_cache_bytes(model.shape, 1024, key_bytes=size, value_bytes=size) / 1024
    weights = weight_bytes(model, options, size)
    if gpus:
        limits = _limits(options, gpus)
        # accelerate leaves a tenth of a card free where the limit does not.
        room = sum(gpus) - min(
            weights, sum(min(limit, int(free * 0.9)) for limit, free in zip(limits, gpus, strict=False))
        )
    elif ram:
        room = ram - weights - PROCESS - _activation_bytes(model, size, 0)
    else:
        room = None
    return capped_context(stretched, per_token, room)


def _usable(options: Options, machine: Machine) -> tuple[int, ...]:
    """Bytes that each card has free which PyTorch may use."""
    return () if options.cpu else tuple(gpu.free for gpu in machine.gpus)


def _activation_bytes(model: ModelEntry, size: float, context: int) -> int:
    """What lives at once while a chunk of a prompt passes one layer: the MLP's activations, or the attention mask."""
    shape = model.shape
    rows = min(prompt_chunk(model.parameters, 512), context)
    widest = 3 * shape.intermediate + 4 * shape.hidden
    # A cache grows by copying: the old and the new keys and values of one layer are there at once.
    grown = 2 * kv_cache_bytes(shape, context, key_bytes=size, value_bytes=size) // max(1, shape.layers)
    return int(rows * widest * max(size, 4)) + rows * context * 2 + 4 * 3 * shape.vocabulary + grown


def _dtype_size(model: ModelEntry, options: Options, machine: Machine) -> float:
    """Bytes of one unquantized weight, and of one number in the KV cache."""
    if options.bf16 or options.dtype in ("bfloat16", "float16"):
        return 2
    if options.dtype == "float32" or options.cpu:
        return 4
    if model.format is ModelFormat.BITSANDBYTES or model.format in PACKED or not model.parameters:
        return 2
    return 4 if model.weight_bytes / model.parameters > 3 else 2


def weight_bytes(model: ModelEntry, options: Options, size: float) -> int:
    stored = model.weight_bytes or model.bytes
    if not model.parameters or model.format is ModelFormat.BITSANDBYTES:
        return stored
    if model.format in PACKED:
        return max(stored, model.parameters // 2)  # what is under 4 bits lies in 4
    if options.load_in_hqq == "off" and not (options.load_in_4bit or options.load_in_8bit):
        return int(model.parameters * size)
    shape = model.shape
    # Embeddings and the output layer are not quantized; whether they are tied shows in the number of parameters only.
    kept = min(model.parameters, shape.vocabulary * shape.hidden * 2)
    bits = (4 + (0.127 if options.use_double_quant else 0.5)) if options.load_in_4bit else 8.0
    if options.load_in_hqq != "off":
        bits = (8 if options.load_in_hqq == "8-bit" else 4) + 32 / options.hqq_group_size
    return int((model.parameters - kept) * bits / 8 + kept * size)


def _limits(options: Options, gpus: Sequence[int]) -> list[int]:
    """Bytes that the model may take of each card, from what each has free."""
    if options.gpu_memory is None:
        return list(gpus)
    limits = [int(value * GIB) for value in parse_gpu_memory(options.gpu_memory)]
    return [min(limit, free) for limit, free in zip(limits, gpus, strict=False)]


def parse_gpu_memory(text: str) -> list[float]:
    """`10,8` or `10GiB 8` as GiB for each graphics card.

    Raises:
        WeftError: BAD_INPUT.
    """
    parts = text.lower().replace("gib", " ").replace("gb", " ").replace(",", " ").replace(";", " ").split()
    try:
        values = [float(part) for part in parts]
    except ValueError:
        values = []
    if not values or any(not 0 <= value < 10_000 for value in values):
        raise WeftError(
            ErrorKind.BAD_INPUT,
            f"gpu_memory cannot be {text!r}.",
            "Give GiB for each graphics card, separated by commas, such as 10 or 10,8.",
        )
    return values
