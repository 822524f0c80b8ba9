"""What the options of the llama.cpp loader mean together: what cannot be, how much memory they ask for, the RoPE that they stretch.

Imports no library.
"""

from __future__ import annotations

import math

from app.core import memory
from app.core.errors import ErrorKind, WeftError
from app.core.library import ModelShape
from app.generation.llama_option_text import overrides
from app.generation.llama_options import CACHE_BYTES, Options


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
