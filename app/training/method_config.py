"""[method] of a RUN.toml: what is trained. Names are PEFT's, as its LoRA guide has them. No ML, no Qt."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Literal

import msgspec

from app.core.options import option

Init = Literal["default", "gaussian", "pissa", "corda", "olora", "eva", "orthogonal", "loftq", "loftq_replace", "off"]

CONVERTED: frozenset[str] = frozenset({"pissa", "olora", "corda"})
"""Initialisations that change the base: their adapter is converted when saved, so that it applies to the original."""
NEEDS_CALIBRATION: frozenset[str] = frozenset({"corda", "eva"})

_adapter = partial(option, group="Adapter")
_variant = partial(option, group="Variant")
_start = partial(option, group="Initialisation")
_tokens = partial(option, group="Tokens")


class MethodConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """[method]: what is trained. The options of PEFT's LoraConfig."""

    kind: Annotated[Literal["lora"], option("Method", "LoRA and its variants.", advanced=True)] = "lora"
    r: Annotated[
        int,
        _adapter(
            "Rank",
            "Size of the adapter: 8 to 32 for a voice or a format, more for knowledge.",
            ge=1,
            le=4096,
            aliases=("rank",),
        ),
    ] = 16
    alpha: Annotated[
        float,
        _adapter(
            "Alpha",
            "Scale of the adapter's effect: alpha / rank (rsLoRA: alpha / √rank). Equal to the rank or twice it is usual.",
            ge=0.001,
            aliases=("lora_alpha",),
        ),
    ] = 16.0
    dropout: Annotated[
        float,
        _adapter(
            "Dropout",
            "Share of the adapter's input left out at random in each step, against learning by heart.",
            ge=0,
            le=0.95,
            aliases=("lora_dropout",),
        ),
    ] = 0.0
    targets: Annotated[
        str,
        _adapter(
            "Trained modules",
            "`all-linear`, or names separated by commas: q_proj, v_proj. The model's own names are offered when one is chosen.",
            aliases=("target_modules",),
        ),
    ] = "all-linear"
    target_regex: Annotated[
        str,
        _adapter(
            "Trained modules by pattern",
            "A regular expression that full module names must match; goes before the list.",
            advanced=True,
        ),
    ] = ""
    exclude: Annotated[
        str,
        _adapter(
            "Left out",
            "Names of modules not to train, separated by commas.",
            advanced=True,
            aliases=("exclude_modules",),
        ),
    ] = ""
    layers: Annotated[
        str,
        _adapter(
            "Only these layers",
            "Layer numbers from 0: 0-3, 10, 12. Empty: all of them.",
            advanced=True,
            aliases=("layers_to_transform",),
        ),
    ] = ""
    layers_pattern: Annotated[
        str,
        _adapter(
            "Name of the layer list",
            "What the model calls its list of layers (layers, h), where it is not found by itself.",
            advanced=True,
        ),
    ] = ""
    target_parameters: Annotated[
        str,
        _adapter(
            "Trained parameters",
            "For experts held in one tensor: parameter names such as mlp.experts.gate_up_proj, separated by commas. Not with dropout or DoRA.",
            advanced=True,
        ),
    ] = ""
    modules_to_save: Annotated[
        str,
        _adapter(
            "Trained in full",
            "Modules trained and saved whole, beside the adapter: embed_tokens, lm_head. Makes large files.",
            advanced=True,
        ),
    ] = ""
    rank_pattern: Annotated[
        str,
        _adapter(
            "Ranks by name", "One a line: name or regular expression = rank. q_proj = 32", advanced=True, multiline=True
        ),
    ] = ""
    alpha_pattern: Annotated[
        str,
        _adapter("Alphas by name", "One a line: name or regular expression = alpha.", advanced=True, multiline=True),
    ] = ""
    rslora: Annotated[
        bool,
        _variant("rsLoRA", "Rank-stabilized: scale by alpha / √rank. Lets high ranks learn.", aliases=("use_rslora",)),
    ] = False
    dora: Annotated[
        bool,
        _variant(
            "DoRA",
            "Train direction and magnitude apart. Better at low ranks; a step takes about twice as long, and merging is advised for use.",
            aliases=("use_dora",),
        ),
    ] = False
    dora_offload: Annotated[
        bool,
        _variant(
            "DoRA: offload on the fly",
            "Where the model lies in main memory beside a graphics card (device = cpu, or FSDP): the card computes DoRA's first magnitudes, matrix by matrix. A faster start, for some of the card's memory; steps take as long. No effect without a card.",
            advanced=True,
            aliases=("ephemeral_gpu_offload",),
        ),
    ] = False
    init: Annotated[
        Init,
        _start(
            "Start from",
            "default: A random, B zero. pissa, olora, corda begin with the base's main directions and are converted when saved, so that they apply to the original base. eva and corda look at a calibration text. loftq starts from what quantization loses. off: A and B random, for debugging only.",
            aliases=("init_lora_weights",),
        ),
    ] = "default"
    pissa_niter: (
        Annotated[
            int,
            _start(
                "PiSSA iterations",
                "Fast approximate PiSSA with so many subspace iterations (16 is nearly exact).",
                ge=0,
                le=256,
                advanced=True,
                automatic="the full decomposition",
            ),
        ]
        | None
    ) = None
    corda_mode: Annotated[
        Literal["ipm", "kpm"],
        _start(
            "CorDA mode",
            "ipm learns the task faster; kpm keeps what the model knows (calibrate with text of that knowledge).",
            advanced=True,
            aliases=("corda_method",),
        ),
    ] = "ipm"
    eva_rho: Annotated[
        float,
        _start(
            "EVA rho",
            "How far ranks may move between layers: 1 not at all, 2 up to twice the rank.",
            ge=1,
            le=16,
            advanced=True,
            aliases=("rho",),
        ),
    ] = 2.0
    calibration: Annotated[
        str, _start("Calibration text", "A text file for CorDA and EVA.", advanced=True, automatic="the training data")
    ] = ""
    calibration_samples: Annotated[
        int,
        _start(
            "Calibration samples",
            "How many pieces of the calibration text are looked at.",
            ge=1,
            le=65536,
            advanced=True,
        ),
    ] = 64
    low_memory_init: Annotated[
        bool,
        _start(
            "EVA: make weights late",
            "Create the adapter without memory and fill it from EVA.",
            advanced=True,
            aliases=("low_cpu_mem_usage",),
        ),
    ] = False
    loftq_bits: Annotated[
        Literal["4", "8"], _start("LoftQ bits", "Bits of the quantization that LoftQ prepares for.", advanced=True)
    ] = "4"
    loftq_iterations: Annotated[
        int,
        _start(
            "LoftQ iterations",
            "Alternating steps between base and adapter. 1: the adapter fits the plain nf4 base.",
            ge=1,
            le=64,
            advanced=True,
        ),
    ] = 1
    bias: Annotated[
        Literal["none", "all", "lora_only"],
        _variant(
            "Train biases",
            "Biases are part of the adapter then; switching it off no longer gives the base.",
            advanced=True,
        ),
    ] = "none"
    lora_bias: Annotated[bool, _variant("Bias of B", "Give the adapter's B a bias of its own.", advanced=True)] = False
    layer_replication: Annotated[
        str,
        _variant(
            "Layer replication",
            "Build a deeper model from the same weights: 0-4, 2-5 stacks layers 0 to 3, then 2 to 4 (the end is not included). Such adapters go alone.",
            advanced=True,
        ),
    ] = ""
    trainable_tokens: Annotated[
        str,
        _tokens(
            "Trained tokens",
            "Tokens whose embeddings are trained: numbers or the tokens themselves, separated by blanks.",
            advanced=True,
            aliases=("trainable_token_indices",),
        ),
    ] = ""
    new_tokens: Annotated[
        str,
        _tokens(
            "New special tokens",
            "Added to the tokenizer and trained, separated by blanks: <|think|> <|/think|>",
            advanced=True,
        ),
    ] = ""
