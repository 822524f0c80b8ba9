"""The Transformers loader's options, and what they mean in memory. Reads without torch, for forms and estimates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import msgspec

from app.core.errors import ErrorKind, WeftError
from app.core.library import ModelEntry, ModelFormat
from app.core.memory import Estimate, Machine, capped_context, kv_cache_bytes, prompt_chunk
from app.core.options import option

GIB = 1024**3
PROCESS = 350 * 1024 * 1024  # bytes: an engine with torch and transformers at work, measured without a graphics card
BITSANDBYTES = 45 * 1024 * 1024  # bytes: what its import adds, measured

PACKED = frozenset({ModelFormat.GPTQ, ModelFormat.AWQ, ModelFormat.HQQ})

MEMORY, PRECISION, CONTEXT, BEHAVIOUR = "Memory", "Precision", "Context", "Behaviour"


class Options(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Options of the Transformers loader; names as text-generation-webui's users know them."""

    context_length: (
        Annotated[
            int,
            option(
                "Context length",
                "How many tokens prompt and answer may have together.",
                ge=8,
                unit="tokens",
                group=CONTEXT,
                automatic="what the model was trained for, as far as memory allows",
                aliases=("n_ctx", "max_seq_len"),
            ),
        ]
        | None
    ) = None
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        option(
            "Precision",
            "Number format of the weights that are not quantized. Auto keeps the one they were saved in, except that a processor reads float16 as bfloat16.",
            group=PRECISION,
            aliases=("torch_dtype",),
        ),
    ] = "auto"
    bf16: Annotated[
        bool,
        option("bfloat16", "Use bfloat16: the same as choosing it under Precision.", group=PRECISION, advanced=True),
    ] = False
    load_in_8bit: Annotated[
        bool,
        option("Load in 8-bit", "Quantize the weights to 8 bits with bitsandbytes while loading.", group=PRECISION),
    ] = False
    load_in_4bit: Annotated[
        bool,
        option(
            "Load in 4-bit",
            "Quantize the weights to 4 bits with bitsandbytes while loading. A quarter of the memory.",
            group=PRECISION,
        ),
    ] = False
    compute_dtype: (
        Annotated[
            Literal["float32", "bfloat16", "float16"],
            option(
                "4-bit computes in",
                "Number format that 4-bit weights are expanded to for each multiplication.",
                group=PRECISION,
                automatic="the Precision above",
                advanced=True,
                aliases=("bnb_4bit_compute_dtype",),
            ),
        ]
        | None
    ) = None
    quant_type: Annotated[
        Literal["nf4", "fp4"],
        option(
            "4-bit type",
            "nf4 suits weights better; fp4 is a plain 4-bit float.",
            group=PRECISION,
            aliases=("bnb_4bit_quant_type",),
        ),
    ] = "nf4"
    use_double_quant: Annotated[
        bool,
        option(
            "Double quantization",
            "Quantize the 4-bit scales too: saves another 0.4 bits a weight.",
            group=PRECISION,
            aliases=("bnb_4bit_use_double_quant",),
        ),
    ] = False
    load_in_hqq: Annotated[
        Literal["off", "8-bit", "4-bit", "3-bit", "2-bit", "1-bit"],
        option(
            "Load in HQQ",
            "Quantize the weights with HQQ while loading: 8, 4, 3, 2 or 1 bits. Takes no library beside PyTorch.",
            group=PRECISION,
            aliases=("quantize", "hqq_bits"),
        ),
    ] = "off"
    hqq_group_size: Annotated[
        int,
        option(
            "HQQ group size",
            "How many weights share a scale: fewer lose less and take more memory.",
            ge=8,
            le=1024,
            group=PRECISION,
            advanced=True,
        ),
    ] = 64
    packed_kernel: Annotated[
        Literal["auto", "exact", "int4"],
        option(
            "Kernel for packed weights",
            "GPTQ, AWQ and HQQ: exact unpacks in 32 bits at each pass; int4 is PyTorch's fast kernel, with 16-bit scales. "
            "Auto takes int4 for 16-bit models where it works.",
            group=BEHAVIOUR,
            advanced=True,
            aliases=("kernel",),
        ),
    ] = "auto"
    wbits: (
        Annotated[
            int,
            option(
                "Bits (GPTQ)",
                "The bits of a GPTQ model that does not say them.",
                group=PRECISION,
                automatic="read from the tensors",
                advanced=True,
                replaced="The shapes of the tensors tell the bits.",
            ),
        ]
        | None
    ) = None
    groupsize: (
        Annotated[
            int,
            option(
                "Group size (GPTQ)",
                "The group size of a GPTQ model that does not say it.",
                group=PRECISION,
                automatic="read from the tensors",
                advanced=True,
                replaced="The shapes of the tensors tell the groups.",
            ),
        ]
        | None
    ) = None
    desc_act: Annotated[
        bool,
        option(
            "Act-order (GPTQ)",
            "A GPTQ model whose columns are ordered by importance, and that does not say so.",
            group=PRECISION,
            advanced=True,
            replaced="The tensor g_idx tells the order of the columns.",
        ),
    ] = False
    cpu: Annotated[
        bool,
        option(
            "Processor only", "Use no graphics card. Weights load as 32-bit unless a precision is chosen.", group=MEMORY
        ),
    ] = False
    auto_devices: Annotated[
        bool,
        option(
            "Spread automatically",
            "Let accelerate spread the model over graphics cards, main memory and disk. Off: all of it on the first card.",
            group=MEMORY,
        ),
    ] = True
    gpu_memory: (
        Annotated[
            str,
            option(
                "GPU memory",
                "The most that the model may take of each graphics card, in GiB, separated by commas: 10,8. Leave room for the context.",
                group=MEMORY,
                unit="GiB",
                automatic="what is free",
            ),
        ]
        | None
    ) = None
    cpu_memory: (
        Annotated[
            float,
            option(
                "Main memory",
                "The most main memory that the weights may take. What does not fit goes to disk, if that is on.",
                group=MEMORY,
                ge=0.0,
                unit="GiB",
                automatic="what is free",
            ),
        ]
        | None
    ) = None
    disk: Annotated[
        bool,
        option(
            "Disk offload",
            "Keep on disk what fits neither the graphics cards nor main memory. Very slow.",
            group=MEMORY,
        ),
    ] = False
    offload_folder: (
        Annotated[
            str,
            option(
                "Offload folder",
                "Where weights go that must be rewritten for disk offload (safetensors are read in place).",
                group=MEMORY,
                automatic="a temporary folder",
                advanced=True,
                aliases=("disk_cache_dir",),
            ),
        ]
        | None
    ) = None
    attention: Annotated[
        Literal["auto", "sdpa", "eager", "flash_attention_2"],
        option(
            "Attention",
            "Which attention code runs. sdpa is PyTorch's own; eager the plain one; flash_attention_2 needs an NVIDIA card.",
            group=BEHAVIOUR,
            aliases=("attn_implementation",),
        ),
    ] = "auto"
    use_flash_attention_2: Annotated[
        bool,
        option(
            "Flash attention 2",
            "The same as choosing flash_attention_2 under Attention.",
            group=BEHAVIOUR,
            advanced=True,
        ),
    ] = False
    alpha_value: Annotated[
        float,
        option(
            "Alpha (NTK)",
            "Stretches the rotary embedding's base for more context: 1.75 for 1.5 times, 2.5 for twice the context. Set the context length too.",
            ge=1,
            le=64,
            group=CONTEXT,
        ),
    ] = 1.0
    rope_freq_base: (
        Annotated[
            float,
            option(
                "Rope base",
                "Base of the rotary embedding, as 1000000 for CodeLlama.",
                ge=1,
                group=CONTEXT,
                automatic="from the model's config",
                advanced=True,
            ),
        ]
        | None
    ) = None
    compress_pos_emb: Annotated[
        float,
        option(
            "Compress positions",
            "Divides positions by this factor (linear rope scaling); 2 doubles the context. For models trained so.",
            ge=1,
            le=64,
            group=CONTEXT,
        ),
    ] = 1.0
    threads: (
        Annotated[
            int,
            option(
                "Threads",
                "Processor threads for the arithmetic.",
                ge=1,
                le=512,
                group=BEHAVIOUR,
                automatic="PyTorch's choice",
            ),
        ]
        | None
    ) = None
    chat_template: Annotated[
        str,
        option(
            "Chat template",
            "A Jinja template in place of the model's own; empty uses that. The word chatml stands for the plain ChatML template.",
            group=BEHAVIOUR,
            multiline=True,
            advanced=True,
        ),
    ] = ""
    trust_remote_code: Annotated[
        bool,
        option(
            "Run the model's own code",
            "Lets Python files that lie in the model's folder run. They can do anything that you can: read them first.",
            group=BEHAVIOUR,
            advanced=True,
        ),
    ] = False
    no_use_fast: Annotated[
        bool,
        option(
            "No fast tokenizer",
            "Use the slow version of the tokenizer.",
            group=BEHAVIOUR,
            advanced=True,
            replaced="Since version 5 transformers has one tokenizer for each model and chooses it itself.",
        ),
    ] = False
    disable_exllama: Annotated[
        bool,
        option(
            "Disable ExLlama",
            "Do not use ExLlama's kernel for GPTQ models.",
            group=BEHAVIOUR,
            advanced=True,
            replaced="ExLlama's first kernel is gone. What reads GPTQ models here lets LoRAs train.",
        ),
    ] = False
    triton: Annotated[
        bool,
        option(
            "Triton (GPTQ)",
            "Use Triton's kernels for GPTQ models.",
            group=BEHAVIOUR,
            advanced=True,
            replaced="GPTQ models go through PyTorch's own kernels; see the kernel for packed weights.",
        ),
    ] = False
    no_inject_fused_attention: Annotated[
        bool,
        option(
            "No fused attention (GPTQ)",
            "Do not put AutoGPTQ's fused attention into GPTQ models.",
            group=BEHAVIOUR,
            advanced=True,
            replaced="There is no fused attention any more: the attention is chosen under Attention.",
        ),
    ] = False
    no_inject_fused_mlp: Annotated[
        bool,
        option(
            "No fused MLP (GPTQ)",
            "Do not put AutoGPTQ's fused MLP into GPTQ models.",
            group=BEHAVIOUR,
            advanced=True,
            replaced="There is no fused MLP any more: adapters need the matrices apart.",
        ),
    ] = False
    no_use_cuda_fp16: Annotated[
        bool,
        option(
            "No 16-bit CUDA kernels (GPTQ)",
            "Do not let AutoGPTQ's old CUDA kernels compute in 16 bits.",
            group=BEHAVIOUR,
            advanced=True,
            replaced="Choose float32 under Precision, or the exact kernel for packed weights.",
        ),
    ] = False
    pre_layer: (
        Annotated[
            int,
            option(
                "Layers on the card (GPTQ)",
                "How many layers of a GPTQ model go to the graphics card.",
                ge=0,
                group=MEMORY,
                automatic="as many as fit",
                advanced=True,
                replaced="GPU memory says how much of the model a card takes.",
            ),
        ]
        | None
    ) = None


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
