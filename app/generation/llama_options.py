"""The options of the llama.cpp loader, and what they become as llama.cpp's own parameters. Imports no library."""

from __future__ import annotations

import math
from typing import Annotated, Literal

import msgspec

from app.core import memory
from app.core.errors import ErrorKind, WeftError
from app.core.library import ModelShape
from app.core.options import option

CacheType = Literal["f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl"]

# Bytes per element of a cache type: a block of 32 elements takes 4 bits each plus its scales (ggml-common.h).
CACHE_BYTES: dict[str, float] = {
    "f32": 4.0,
    "f16": 2.0,
    "bf16": 2.0,
    "q8_0": 34 / 32,
    "q5_1": 24 / 32,
    "q5_0": 22 / 32,
    "q4_1": 20 / 32,
    "q4_0": 18 / 32,
    "iq4_nl": 18 / 32,
}


class Options(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Options of a load through llama.cpp."""

    n_ctx: (
        Annotated[
            int,
            option(
                "Context length",
                "Tokens that prompt and answer share. The cache for them is taken in full when the model loads.",
                ge=8,
                le=2**24,
                unit="tokens",
                automatic="what the model was trained for, as far as memory allows",
                group="Context",
                aliases=("ctx_size", "max_seq_len", "c"),
            ),
        ]
        | None
    ) = None
    cache_type_k: Annotated[
        CacheType,
        option(
            "Cache type of keys",
            "Precision of the keys in the KV cache. q8_0 halves the memory of f16 at almost no loss; q4_0 quarters it.",
            group="Context",
            aliases=("type_k", "ctk"),
        ),
    ] = "f16"
    cache_type_v: Annotated[
        CacheType,
        option(
            "Cache type of values",
            "Precision of the values in the KV cache. A quantized one needs flash attention.",
            group="Context",
            aliases=("type_v", "ctv"),
        ),
    ] = "f16"
    flash_attention: Annotated[
        Literal["auto", "on", "off"],
        option(
            "Flash attention",
            "Computes attention without storing all scores: less memory, and faster on most devices.",
            group="Context",
            aliases=("flash_attn", "fa"),
        ),
    ] = "auto"
    swa_full: Annotated[
        bool,
        option(
            "Full-size sliding-window cache",
            "For models with sliding-window attention: keep the whole context in memory, so that the next turn never has "
            "to read the history again. Off saves memory.",
            group="Context",
            advanced=True,
        ),
    ] = True

    n_gpu_layers: (
        Annotated[
            int,
            option(
                "GPU layers",
                "Layers to keep on the GPU. 0 uses the CPU alone, -1 puts all layers there.",
                ge=-1,
                le=10_000,
                unit="layers",
                automatic="all that fit, where there is a GPU",
                group="Devices",
                aliases=("gpu_layers", "ngl"),
            ),
        ]
        | None
    ) = None
    cpu: Annotated[
        bool,
        option("CPU only", "Use no GPU at all, not even for single operations.", group="Devices"),
    ] = False
    main_gpu: Annotated[
        int,
        option(
            "Main GPU",
            "Which GPU holds the whole model when it is not split, counted from 0.",
            ge=0,
            le=127,
            group="Devices",
            advanced=True,
        ),
    ] = 0
    split_mode: Annotated[
        Literal["layer", "row", "tensor", "none"],
        option(
            "Split across GPUs",
            "layer gives each GPU whole layers, row and tensor share each layer, none uses the main GPU alone.",
            group="Devices",
            advanced=True,
        ),
    ] = "layer"
    tensor_split: Annotated[
        str,
        option(
            "Tensor split",
            "How much of the model each GPU takes, as shares such as 60,40. Empty splits by free memory.",
            group="Devices",
            advanced=True,
        ),
    ] = ""
    offload_kqv: Annotated[
        bool,
        option(
            "KV cache on the GPU",
            "Keep the cache beside the layers on the GPU. Off leaves more of it for layers.",
            group="Devices",
            advanced=True,
        ),
    ] = True
    op_offload: Annotated[
        bool,
        option(
            "Offload operations",
            "Lets the GPU compute large operations of layers that lie in main memory.",
            group="Devices",
            advanced=True,
        ),
    ] = True
    no_mul_mat_q: Annotated[
        bool,
        option(
            "No mul_mat_q",
            "Used to switch off one family of CUDA kernels.",
            replaced="llama.cpp now chooses its matrix kernels itself, per device and per type.",
            group="Devices",
            advanced=True,
        ),
    ] = False

    threads: (
        Annotated[
            int,
            option(
                "Threads",
                "CPU threads that generate.",
                ge=1,
                le=512,
                automatic="the physical cores, or fewer where that measures faster",
                group="Speed",
                aliases=("n_threads", "t"),
            ),
        ]
        | None
    ) = None
    threads_batch: (
        Annotated[
            int,
            option(
                "Threads for the prompt",
                "CPU threads that read the prompt.",
                ge=1,
                le=512,
                automatic="the physical cores",
                group="Speed",
                aliases=("n_threads_batch", "tb"),
            ),
        ]
        | None
    ) = None
    n_batch: Annotated[
        int,
        option(
            "Batch size",
            "Tokens of the prompt that are handed over at a time.",
            ge=1,
            le=65_536,
            unit="tokens",
            group="Speed",
            aliases=("batch_size", "b"),
        ),
    ] = 512
    n_ubatch: (
        Annotated[
            int,
            option(
                "Physical batch size",
                "Tokens that are computed at a time. Smaller takes less memory.",
                ge=1,
                le=65_536,
                unit="tokens",
                automatic="512, or the batch size if that is smaller",
                group="Speed",
                advanced=True,
                aliases=("ubatch_size", "ub"),
            ),
        ]
        | None
    ) = None
    repack: Annotated[
        bool,
        option(
            "Repack weights",
            "Reorders some quantized weights for the CPU's fast kernels while loading.",
            group="Speed",
            advanced=True,
            aliases=("use_extra_bufts",),
        ),
    ] = True

    no_mmap: Annotated[
        bool,
        option(
            "No memory map",
            "Read the whole file into memory instead of mapping it. Loads more slowly, then never waits for the disk.",
            group="Memory",
            aliases=("no-mmap",),
        ),
    ] = False
    mlock: Annotated[
        bool,
        option("Lock in memory", "Keep the model in RAM, so that the system can never swap it out.", group="Memory"),
    ] = False
    direct_io: Annotated[
        bool,
        option(
            "Direct I/O",
            "Read the file past the system's cache, where the file system can do that. Implies no memory map.",
            group="Memory",
            advanced=True,
        ),
    ] = False
    numa: Annotated[
        Literal["off", "distribute", "isolate", "numactl"],
        option(
            "NUMA",
            "On machines with several processors: distribute spreads threads over all of them, isolate stays on one, "
            "numactl keeps what numactl set. Holds until the engine is started again.",
            group="Memory",
            advanced=True,
        ),
    ] = "off"
    check_tensors: Annotated[
        bool,
        option(
            "Check tensors",
            "Look through all weights for invalid values while loading.",
            group="Memory",
            advanced=True,
        ),
    ] = False

    rope_freq_base: (
        Annotated[
            float,
            option(
                "RoPE frequency base",
                "Base of the rotary position embedding.",
                ge=1,
                automatic="from the model's metadata",
                group="Longer context",
                advanced=True,
            ),
        ]
        | None
    ) = None
    rope_freq_scale: (
        Annotated[
            float,
            option(
                "RoPE frequency scale",
                "Factor on positions: 0.5 doubles the context of a model that was tuned for that.",
                ge=1e-6,
                le=64,
                automatic="from the model's metadata",
                group="Longer context",
                advanced=True,
            ),
        ]
        | None
    ) = None
    compress_pos_emb: Annotated[
        float,
        option(
            "Compress positions",
            "The same as one over the RoPE frequency scale: 2 doubles the context, 4 quadruples it. 1 is off.",
            ge=1,
            le=64,
            group="Longer context",
            advanced=True,
        ),
    ] = 1.0
    alpha_value: Annotated[
        float,
        option(
            "Alpha",
            "Stretches the context of a model that was not tuned for it, by a larger RoPE base: 1.75 suits 1.5 times the "
            "context, 2.5 suits twice. 1 is off.",
            ge=1,
            le=64,
            group="Longer context",
            advanced=True,
        ),
    ] = 1.0
    rope_scaling: Annotated[
        Literal["auto", "none", "linear", "yarn", "longrope"],
        option(
            "RoPE scaling",
            "How positions beyond the trained context are mapped. auto follows the model's metadata.",
            group="Longer context",
            advanced=True,
        ),
    ] = "auto"
    yarn_orig_ctx: (
        Annotated[
            int,
            option(
                "YaRN original context",
                "Context length before the stretch.",
                ge=1,
                unit="tokens",
                automatic="from the model's metadata",
                group="Longer context",
                advanced=True,
            ),
        ]
        | None
    ) = None
    yarn_ext_factor: (
        Annotated[
            float,
            option(
                "YaRN extrapolation",
                "Mix of interpolation (0) and extrapolation (1).",
                ge=0,
                le=1,
                automatic="from the model's metadata",
                group="Longer context",
                advanced=True,
            ),
        ]
        | None
    ) = None
    yarn_attn_factor: (
        Annotated[
            float,
            option(
                "YaRN attention factor",
                "Factor on the attention's magnitude.",
                ge=0,
                automatic="from the model's metadata",
                group="Longer context",
                advanced=True,
            ),
        ]
        | None
    ) = None
    yarn_beta_fast: (
        Annotated[
            float,
            option(
                "YaRN beta fast",
                "Where pure extrapolation ends.",
                ge=0,
                automatic="from the model's metadata",
                group="Longer context",
                advanced=True,
            ),
        ]
        | None
    ) = None
    yarn_beta_slow: (
        Annotated[
            float,
            option(
                "YaRN beta slow",
                "Where pure interpolation begins.",
                ge=0,
                automatic="from the model's metadata",
                group="Longer context",
                advanced=True,
            ),
        ]
        | None
    ) = None

    seed: (
        Annotated[
            int,
            option(
                "Seed",
                "Used for answers whose own seed is left open, one further for each answer.",
                ge=0,
                le=2**32 - 2,
                automatic="a new one each time",
                group="Other",
            ),
        ]
        | None
    ) = None
    chat_template: Annotated[
        str,
        option(
            "Chat template",
            "A Jinja template in place of the model's own; empty uses that. The word chatml stands for the plain ChatML template.",
            group="Other",
            multiline=True,
            advanced=True,
        ),
    ] = ""
    override_kv: Annotated[
        str,
        option(
            "Metadata overrides",
            "Replaces entries of the file's metadata, one a line: key=type:value, where type is int, float, bool or str. "
            "Example: tokenizer.ggml.add_bos_token=bool:false",
            multiline=True,
            group="Other",
            advanced=True,
        ),
    ] = ""
    logits_all: Annotated[
        bool,
        option(
            "logits_all",
            "Used to be needed to measure perplexity.",
            replaced="Weft asks for the logits of one small batch at a time, so perplexity works without it.",
            group="Other",
            advanced=True,
        ),
    ] = False

    @property
    def ubatch(self) -> int:
        """Tokens computed at a time."""
        return min(self.n_batch, self.n_ubatch or 512)


def demand(options: Options) -> memory.LlamaDemand:
    """What of the options decides how much memory a load takes."""
    return memory.LlamaDemand(
        context=options.n_ctx,
        ubatch=options.ubatch,
        key_bytes=CACHE_BYTES[options.cache_type_k],
        value_bytes=CACHE_BYTES[options.cache_type_v],
        gpu_layers=0 if options.cpu else options.n_gpu_layers,
        cache_on_gpu=options.offload_kqv,
        full_window=options.swa_full,
        flash_attention=options.flash_attention != "off",
        repack=options.repack and not (options.no_mmap or options.direct_io),
    )


class Override(msgspec.Struct, frozen=True, kw_only=True):
    """One entry of `override_kv`."""

    key: str
    value: int | float | bool | str


def overrides(text: str) -> tuple[Override, ...]:
    """Read the lines of `override_kv`.

    Raises:
        WeftError: BAD_INPUT, naming the line that cannot be read.
    """
    found: list[Override] = []
    for line in filter(None, (line.strip() for line in text.splitlines())):
        key, equals, typed = line.partition("=")
        kind, colon, value = typed.partition(":")
        try:
            if not (equals and colon and 0 < len(key.encode()) < 128 and len(value.encode()) < 128):
                raise ValueError
            found.append(Override(key=key.strip(), value=_override_value(kind.strip(), value.strip())))
        except (KeyError, ValueError, OverflowError):
            raise WeftError(
                ErrorKind.BAD_INPUT,
                f"Option override_kv cannot read {line!r}.",
                "Write key=type:value, where type is int, float, bool or str.",
            ) from None
    return tuple(found)


def _override_value(kind: str, value: str) -> int | float | bool | str:
    if kind == "int":
        number = int(value)
        if not -(2**63) <= number < 2**63:
            raise ValueError
        return number
    if kind == "float":
        return float(value)
    if kind == "bool":
        return {"true": True, "false": False}[value.lower()]
    if kind == "str":
        return value
    raise ValueError


def tensor_split(text: str, devices: int) -> tuple[float, ...]:
    """Read `60,40` as shares, one per GPU; () when the text is empty.

    Raises:
        WeftError: BAD_INPUT when it is no list of numbers, or longer than there can be devices.
    """
    if not text.strip():
        return ()
    try:
        shares = tuple(float(part) for part in text.replace("/", ",").split(","))
        if any(not math.isfinite(share) or share < 0 for share in shares) or not any(shares):
            raise ValueError
    except ValueError:
        raise WeftError(
            ErrorKind.BAD_INPUT,
            f"Option tensor_split cannot be {text!r}.",
            "Write one share for each GPU, such as 60,40.",
        ) from None
    if len(shares) > devices:
        raise WeftError(
            ErrorKind.BAD_INPUT,
            f"Option tensor_split names {len(shares)} GPUs; llama.cpp takes at most {devices} here.",
            "Write one share for each GPU that this machine has.",
        )
    return shares


def rope_base(options: Options, trained_base: float, shape: ModelShape) -> float:
    """RoPE base to ask for; 0 leaves the model's own.

    `alpha_value` is NTK-aware scaling: base * alpha ** (d / (d - 2)), d being the size of a head.
    """
    base = options.rope_freq_base or 0.0
    if options.alpha_value == 1:
        return base
    head = shape.head_dim or 128
    return (base or trained_base or 10_000.0) * options.alpha_value ** (head / max(head - 2, 1))


def rope_scale(options: Options) -> float:
    """RoPE frequency scale to ask for; 0 leaves the model's own.

    Raises:
        WeftError: BAD_INPUT when both ways to say it are used and disagree.
    """
    if options.compress_pos_emb == 1:
        return options.rope_freq_scale or 0.0
    scale = 1 / options.compress_pos_emb
    if options.rope_freq_scale is not None and not math.isclose(options.rope_freq_scale, scale, rel_tol=1e-3):
        raise WeftError(
            ErrorKind.BAD_INPUT,
            f"compress_pos_emb={options.compress_pos_emb:g} means rope_freq_scale={scale:g}, "
            f"but rope_freq_scale is {options.rope_freq_scale:g}.",
            "Set only one of the two.",
        )
    return scale


def check(options: Options) -> None:
    """Refuse combinations that the library would refuse later, or worse, abort on.

    Raises:
        WeftError: BAD_INPUT, naming the options.
    """
    quantized = options.cache_type_v not in ("f32", "f16", "bf16")
    if quantized and options.flash_attention == "off":
        raise WeftError(
            ErrorKind.BAD_INPUT,
            f"cache_type_v={options.cache_type_v} needs flash attention, which is off.",
            "Set flash_attention to auto or on, or cache_type_v to f16.",
        )
    overrides(options.override_kv)
    rope_scale(options)
