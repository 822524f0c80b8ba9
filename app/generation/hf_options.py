"""The options of the Transformers loader. What they mean in memory is in `hf_memory.py`. Imports no library."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Literal

import msgspec

from app.core.options import option

# The groups of the form; what is rare stands in its advanced part.
_context = partial(option, group="Context")
_rare_context = partial(option, group="Context", advanced=True)
_precision = partial(option, group="Precision")
_rare_precision = partial(option, group="Precision", advanced=True)
_memory = partial(option, group="Memory")
_rare_memory = partial(option, group="Memory", advanced=True)
_behaviour = partial(option, group="Behaviour")
_rare_behaviour = partial(option, group="Behaviour", advanced=True)


class Options(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Options of the Transformers loader; names as text-generation-webui's users know them."""

    context_length: (
        Annotated[
            int,
            _context(
                "Context length",
                "How many tokens prompt and answer may have together.",
                ge=8,
                unit="tokens",
                automatic="what the model was trained for, as far as memory allows",
                aliases=("n_ctx", "max_seq_len"),
            ),
        ]
        | None
    ) = None
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        _precision(
            "Precision",
            "Number format of the weights that are not quantized. Auto keeps the one they were saved in, except that a processor reads float16 as bfloat16.",
            aliases=("torch_dtype",),
        ),
    ] = "auto"
    bf16: Annotated[bool, _rare_precision("bfloat16", "Use bfloat16: the same as choosing it under Precision.")] = False
    load_in_8bit: Annotated[
        bool, _precision("Load in 8-bit", "Quantize the weights to 8 bits with bitsandbytes while loading.")
    ] = False
    load_in_4bit: Annotated[
        bool,
        _precision(
            "Load in 4-bit", "Quantize the weights to 4 bits with bitsandbytes while loading. A quarter of the memory."
        ),
    ] = False
    compute_dtype: (
        Annotated[
            Literal["float32", "bfloat16", "float16"],
            _rare_precision(
                "4-bit computes in",
                "Number format that 4-bit weights are expanded to for each multiplication.",
                automatic="the Precision above",
                aliases=("bnb_4bit_compute_dtype",),
            ),
        ]
        | None
    ) = None
    quant_type: Annotated[
        Literal["nf4", "fp4"],
        _precision(
            "4-bit type", "nf4 suits weights better; fp4 is a plain 4-bit float.", aliases=("bnb_4bit_quant_type",)
        ),
    ] = "nf4"
    use_double_quant: Annotated[
        bool,
        _precision(
            "Double quantization",
            "Quantize the 4-bit scales too: saves another 0.4 bits a weight.",
            aliases=("bnb_4bit_use_double_quant",),
        ),
    ] = False
    load_in_hqq: Annotated[
        Literal["off", "8-bit", "4-bit", "3-bit", "2-bit", "1-bit"],
        _precision(
            "Load in HQQ",
            "Quantize the weights with HQQ while loading: 8, 4, 3, 2 or 1 bits. Takes no library beside PyTorch.",
            aliases=("quantize", "hqq_bits"),
        ),
    ] = "off"
    hqq_group_size: Annotated[
        int,
        _rare_precision(
            "HQQ group size", "How many weights share a scale: fewer lose less and take more memory.", ge=8, le=1024
        ),
    ] = 64
    packed_kernel: Annotated[
        Literal["auto", "exact", "int4"],
        _rare_behaviour(
            "Kernel for packed weights",
            "GPTQ, AWQ and HQQ: exact unpacks in 32 bits at each pass; int4 is PyTorch's fast kernel, with 16-bit scales. "
            "Auto takes int4 for 16-bit models where it works.",
            aliases=("kernel",),
        ),
    ] = "auto"
    wbits: (
        Annotated[
            int,
            _rare_precision(
                "Bits (GPTQ)",
                "The bits of a GPTQ model that does not say them.",
                automatic="read from the tensors",
                replaced="The shapes of the tensors tell the bits.",
            ),
        ]
        | None
    ) = None
    groupsize: (
        Annotated[
            int,
            _rare_precision(
                "Group size (GPTQ)",
                "The group size of a GPTQ model that does not say it.",
                automatic="read from the tensors",
                replaced="The shapes of the tensors tell the groups.",
            ),
        ]
        | None
    ) = None
    desc_act: Annotated[
        bool,
        _rare_precision(
            "Act-order (GPTQ)",
            "A GPTQ model whose columns are ordered by importance, and that does not say so.",
            replaced="The tensor g_idx tells the order of the columns.",
        ),
    ] = False
    cpu: Annotated[
        bool, _memory("Processor only", "Use no graphics card. Weights load as 32-bit unless a precision is chosen.")
    ] = False
    auto_devices: Annotated[
        bool,
        _memory(
            "Spread automatically",
            "Let accelerate spread the model over graphics cards, main memory and disk. Off: all of it on the first card.",
        ),
    ] = True
    gpu_memory: (
        Annotated[
            str,
            _memory(
                "GPU memory",
                "The most that the model may take of each graphics card, in GiB, separated by commas: 10,8. Leave room for the context.",
                unit="GiB",
                automatic="what is free",
            ),
        ]
        | None
    ) = None
    cpu_memory: (
        Annotated[
            float,
            _memory(
                "Main memory",
                "The most main memory that the weights may take. What does not fit goes to disk, if that is on.",
                ge=0.0,
                unit="GiB",
                automatic="what is free",
            ),
        ]
        | None
    ) = None
    disk: Annotated[
        bool, _memory("Disk offload", "Keep on disk what fits neither the graphics cards nor main memory. Very slow.")
    ] = False
    offload_folder: (
        Annotated[
            str,
            _rare_memory(
                "Offload folder",
                "Where weights go that must be rewritten for disk offload (safetensors are read in place).",
                automatic="a temporary folder",
                aliases=("disk_cache_dir",),
            ),
        ]
        | None
    ) = None
    attention: Annotated[
        Literal["auto", "sdpa", "eager", "flash_attention_2"],
        _behaviour(
            "Attention",
            "Which attention code runs. sdpa is PyTorch's own; eager the plain one; flash_attention_2 needs an NVIDIA card.",
            aliases=("attn_implementation",),
        ),
    ] = "auto"
    use_flash_attention_2: Annotated[
        bool, _rare_behaviour("Flash attention 2", "The same as choosing flash_attention_2 under Attention.")
    ] = False
    alpha_value: Annotated[
        float,
        _context(
            "Alpha (NTK)",
            "Stretches the rotary embedding's base for more context: 1.75 for 1.5 times, 2.5 for twice the context. Set the context length too.",
            ge=1,
            le=64,
        ),
    ] = 1.0
    rope_freq_base: (
        Annotated[
            float,
            _rare_context(
                "Rope base",
                "Base of the rotary embedding, as 1000000 for CodeLlama.",
                ge=1,
                automatic="from the model's config",
            ),
        ]
        | None
    ) = None
    compress_pos_emb: Annotated[
        float,
        _context(
            "Compress positions",
            "Divides positions by this factor (linear rope scaling); 2 doubles the context. For models trained so.",
            ge=1,
            le=64,
        ),
    ] = 1.0
    threads: (
        Annotated[
            int,
            _behaviour("Threads", "Processor threads for the arithmetic.", ge=1, le=512, automatic="PyTorch's choice"),
        ]
        | None
    ) = None
    chat_template: Annotated[
        str,
        _rare_behaviour(
            "Chat template",
            "A Jinja template in place of the model's own; empty uses that. The word chatml stands for the plain ChatML template.",
            multiline=True,
        ),
    ] = ""
    trust_remote_code: Annotated[
        bool,
        _rare_behaviour(
            "Run the model's own code",
            "Lets Python files that lie in the model's folder run. They can do anything that you can: read them first.",
        ),
    ] = False
    no_use_fast: Annotated[
        bool,
        _rare_behaviour(
            "No fast tokenizer",
            "Use the slow version of the tokenizer.",
            replaced="Since version 5 transformers has one tokenizer for each model and chooses it itself.",
        ),
    ] = False
    disable_exllama: Annotated[
        bool,
        _rare_behaviour(
            "Disable ExLlama",
            "Do not use ExLlama's kernel for GPTQ models.",
            replaced="ExLlama's first kernel is gone. What reads GPTQ models here lets LoRAs train.",
        ),
    ] = False
    triton: Annotated[
        bool,
        _rare_behaviour(
            "Triton (GPTQ)",
            "Use Triton's kernels for GPTQ models.",
            replaced="GPTQ models go through PyTorch's own kernels; see the kernel for packed weights.",
        ),
    ] = False
    no_inject_fused_attention: Annotated[
        bool,
        _rare_behaviour(
            "No fused attention (GPTQ)",
            "Do not put AutoGPTQ's fused attention into GPTQ models.",
            replaced="There is no fused attention any more: the attention is chosen under Attention.",
        ),
    ] = False
    no_inject_fused_mlp: Annotated[
        bool,
        _rare_behaviour(
            "No fused MLP (GPTQ)",
            "Do not put AutoGPTQ's fused MLP into GPTQ models.",
            replaced="There is no fused MLP any more: adapters need the matrices apart.",
        ),
    ] = False
    no_use_cuda_fp16: Annotated[
        bool,
        _rare_behaviour(
            "No 16-bit CUDA kernels (GPTQ)",
            "Do not let AutoGPTQ's old CUDA kernels compute in 16 bits.",
            replaced="Choose float32 under Precision, or the exact kernel for packed weights.",
        ),
    ] = False
    pre_layer: (
        Annotated[
            int,
            _rare_memory(
                "Layers on the card (GPTQ)",
                "How many layers of a GPTQ model go to the graphics card.",
                ge=0,
                automatic="as many as fit",
                replaced="GPU memory says how much of the model a card takes.",
            ),
        ]
        | None
    ) = None
