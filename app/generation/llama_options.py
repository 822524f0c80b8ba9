"""The options of the llama.cpp loader. What they mean together is in `llama_rules.py`. Imports no library."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Literal

import msgspec

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

# The groups of the form; what is rare stands in its advanced part.
_context = partial(option, group="Context")
_rare_context = partial(option, group="Context", advanced=True)
_devices = partial(option, group="Devices")
_rare_devices = partial(option, group="Devices", advanced=True)
_speed = partial(option, group="Speed")
_rare_speed = partial(option, group="Speed", advanced=True)
_memory = partial(option, group="Memory")
_rare_memory = partial(option, group="Memory", advanced=True)
_stretch = partial(option, group="Longer context", advanced=True)
_from_file = partial(_stretch, automatic="from the model's metadata")
_other = partial(option, group="Other")
_rare_other = partial(option, group="Other", advanced=True)


class Options(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Options of a load through llama.cpp."""

    n_ctx: (
        Annotated[
            int,
            _context(
                "Context length",
                "Tokens that prompt and answer share. The cache for them is taken in full when the model loads.",
                ge=8,
                le=2**24,
                unit="tokens",
                automatic="what the model was trained for, as far as memory allows",
                aliases=("ctx_size", "max_seq_len", "c"),
            ),
        ]
        | None
    ) = None
    cache_type_k: Annotated[
        CacheType,
        _context(
            "Cache type of keys",
            "Precision of the keys in the KV cache. q8_0 halves the memory of f16 at almost no loss; q4_0 quarters it.",
            aliases=("type_k", "ctk"),
        ),
    ] = "f16"
    cache_type_v: Annotated[
        CacheType,
        _context(
            "Cache type of values",
            "Precision of the values in the KV cache. A quantized one needs flash attention.",
            aliases=("type_v", "ctv"),
        ),
    ] = "f16"
    flash_attention: Annotated[
        Literal["auto", "on", "off"],
        _context(
            "Flash attention",
            "Computes attention without storing all scores: less memory, and faster on most devices.",
            aliases=("flash_attn", "fa"),
        ),
    ] = "auto"
    swa_full: Annotated[
        bool,
        _rare_context(
            "Full-size sliding-window cache",
            "For models with sliding-window attention: keep the whole context in memory, so that the next turn never has "
            "to read the history again. Off saves memory.",
        ),
    ] = True

    n_gpu_layers: (
        Annotated[
            int,
            _devices(
                "GPU layers",
                "Layers to keep on the GPU. 0 uses the CPU alone, -1 puts all layers there.",
                ge=-1,
                le=10_000,
                unit="layers",
                automatic="all that fit, where there is a GPU",
                aliases=("gpu_layers", "ngl"),
            ),
        ]
        | None
    ) = None
    cpu: Annotated[bool, _devices("CPU only", "Use no GPU at all, not even for single operations.")] = False
    main_gpu: Annotated[
        int,
        _rare_devices(
            "Main GPU", "Which GPU holds the whole model when it is not split, counted from 0.", ge=0, le=127
        ),
    ] = 0
    split_mode: Annotated[
        Literal["layer", "row", "tensor", "none"],
        _rare_devices(
            "Split across GPUs",
            "layer gives each GPU whole layers, row and tensor share each layer, none uses the main GPU alone.",
        ),
    ] = "layer"
    tensor_split: Annotated[
        str,
        _rare_devices(
            "Tensor split",
            "How much of the model each GPU takes, as shares such as 60,40. Empty splits by free memory.",
        ),
    ] = ""
    offload_kqv: Annotated[
        bool,
        _rare_devices(
            "KV cache on the GPU", "Keep the cache beside the layers on the GPU. Off leaves more of it for layers."
        ),
    ] = True
    op_offload: Annotated[
        bool,
        _rare_devices("Offload operations", "Lets the GPU compute large operations of layers that lie in main memory."),
    ] = True
    no_mul_mat_q: Annotated[
        bool,
        _rare_devices(
            "No mul_mat_q",
            "Used to switch off one family of CUDA kernels.",
            replaced="llama.cpp now chooses its matrix kernels itself, per device and per type.",
        ),
    ] = False

    threads: (
        Annotated[
            int,
            _speed(
                "Threads",
                "CPU threads that generate.",
                ge=1,
                le=512,
                automatic="the physical cores, or fewer where that measures faster",
                aliases=("n_threads", "t"),
            ),
        ]
        | None
    ) = None
    threads_batch: (
        Annotated[
            int,
            _speed(
                "Threads for the prompt",
                "CPU threads that read the prompt.",
                ge=1,
                le=512,
                automatic="the physical cores",
                aliases=("n_threads_batch", "tb"),
            ),
        ]
        | None
    ) = None
    n_batch: Annotated[
        int,
        _speed(
            "Batch size",
            "Tokens of the prompt that are handed over at a time.",
            ge=1,
            le=65_536,
            unit="tokens",
            aliases=("batch_size", "b"),
        ),
    ] = 512
    n_ubatch: (
        Annotated[
            int,
            _rare_speed(
                "Physical batch size",
                "Tokens that are computed at a time. Smaller takes less memory.",
                ge=1,
                le=65_536,
                unit="tokens",
                automatic="512, or the batch size if that is smaller",
                aliases=("ubatch_size", "ub"),
            ),
        ]
        | None
    ) = None
    repack: Annotated[
        bool,
        _rare_speed(
            "Repack weights",
            "Reorders some quantized weights for the CPU's fast kernels while loading.",
            aliases=("use_extra_bufts",),
        ),
    ] = True

    no_mmap: Annotated[
        bool,
        _memory(
            "No memory map",
            "Read the whole file into memory instead of mapping it. Loads more slowly, then never waits for the disk.",
            aliases=("no-mmap",),
        ),
    ] = False
    mlock: Annotated[
        bool, _memory("Lock in memory", "Keep the model in RAM, so that the system can never swap it out.")
    ] = False
    direct_io: Annotated[
        bool,
        _rare_memory(
            "Direct I/O",
            "Read the file past the system's cache, where the file system can do that. Implies no memory map.",
        ),
    ] = False
    numa: Annotated[
        Literal["off", "distribute", "isolate", "numactl"],
        _rare_memory(
            "NUMA",
            "On machines with several processors: distribute spreads threads over all of them, isolate stays on one, "
            "numactl keeps what numactl set. Holds until the engine is started again.",
        ),
    ] = "off"
    check_tensors: Annotated[
        bool, _rare_memory("Check tensors", "Look through all weights for invalid values while loading.")
    ] = False

    rope_freq_base: (
        Annotated[float, _from_file("RoPE frequency base", "Base of the rotary position embedding.", ge=1)] | None
    ) = None
    rope_freq_scale: (
        Annotated[
            float,
            _from_file(
                "RoPE frequency scale",
                "Factor on positions: 0.5 doubles the context of a model that was tuned for that.",
                ge=1e-6,
                le=64,
            ),
        ]
        | None
    ) = None
    compress_pos_emb: Annotated[
        float,
        _stretch(
            "Compress positions",
            "The same as one over the RoPE frequency scale: 2 doubles the context, 4 quadruples it. 1 is off.",
            ge=1,
            le=64,
        ),
    ] = 1.0
    alpha_value: Annotated[
        float,
        _stretch(
            "Alpha",
            "Stretches the context of a model that was not tuned for it, by a larger RoPE base: 1.75 suits 1.5 times the "
            "context, 2.5 suits twice. 1 is off.",
            ge=1,
            le=64,
        ),
    ] = 1.0
    rope_scaling: Annotated[
        Literal["auto", "none", "linear", "yarn", "longrope"],
        _stretch(
            "RoPE scaling", "How positions beyond the trained context are mapped. auto follows the model's metadata."
        ),
    ] = "auto"
    yarn_orig_ctx: (
        Annotated[int, _from_file("YaRN original context", "Context length before the stretch.", ge=1, unit="tokens")]
        | None
    ) = None
    yarn_ext_factor: (
        Annotated[
            float, _from_file("YaRN extrapolation", "Mix of interpolation (0) and extrapolation (1).", ge=0, le=1)
        ]
        | None
    ) = None
    yarn_attn_factor: (
        Annotated[float, _from_file("YaRN attention factor", "Factor on the attention's magnitude.", ge=0)] | None
    ) = None
    yarn_beta_fast: Annotated[float, _from_file("YaRN beta fast", "Where pure extrapolation ends.", ge=0)] | None = None
    yarn_beta_slow: Annotated[float, _from_file("YaRN beta slow", "Where pure interpolation begins.", ge=0)] | None = (
        None
    )

    seed: (
        Annotated[
            int,
            _other(
                "Seed",
                "Used for answers whose own seed is left open, one further for each answer.",
                ge=0,
                le=2**32 - 2,
                automatic="a new one each time",
            ),
        ]
        | None
    ) = None
    chat_template: Annotated[
        str,
        _rare_other(
            "Chat template",
            "A Jinja template in place of the model's own; empty uses that. The word chatml stands for the plain ChatML template.",
            multiline=True,
        ),
    ] = ""
    override_kv: Annotated[
        str,
        _rare_other(
            "Metadata overrides",
            "Replaces entries of the file's metadata, one a line: key=type:value, where type is int, float, bool or str. "
            "Example: tokenizer.ggml.add_bos_token=bool:false",
            multiline=True,
        ),
    ] = ""
    logits_all: Annotated[
        bool,
        _rare_other(
            "logits_all",
            "Used to be needed to measure perplexity.",
            replaced="Weft asks for the logits of one small batch at a time, so perplexity works without it.",
        ),
    ] = False

    @property
    def ubatch(self) -> int:
        """Tokens computed at a time."""
        return min(self.n_batch, self.n_ubatch or 512)
