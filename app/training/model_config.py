"""[model] of a RUN.toml: the base, and how it is held in memory while training. No ML, no Qt."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Literal

import msgspec

from app.core.options import option

Quantization = Literal["none", "nf4", "fp4", "int8"]

_model = partial(option, group="Model")


class ModelConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """[model]: the base, and how it is held in memory while training."""

    path: Annotated[
        str, option("Model", "What to train on: a name in the library, a folder, a GGUF file, or `starter`.")
    ] = ""
    quantization: Annotated[
        Quantization,
        _model(
            "Quantize the base",
            "QLoRA: hold the frozen base in 4 bits (nf4 suits weights best) or 8 bits with bitsandbytes. A quarter or half of the memory, somewhat slower.",
            aliases=("load_in",),
        ),
    ] = "none"
    double_quant: Annotated[
        bool, _model("Double quantization", "Quantize the 4-bit scales too: saves 0.4 bits a weight.", advanced=True)
    ] = True
    attention: Annotated[
        Literal["auto", "sdpa", "eager", "flash_attention_2"],
        _model("Attention", "The attention code. Automatic is PyTorch's sdpa where the model has it.", advanced=True),
    ] = "auto"
    device: Annotated[
        Literal["auto", "cpu", "cuda"],
        _model("Train on", "Automatic: the graphics card if there is one that PyTorch can use.", advanced=True),
    ] = "auto"
    trust_remote_code: Annotated[
        bool,
        _model(
            "Run the model's own code",
            "Only for models that bring Python code which you have read and trust.",
            advanced=True,
        ),
    ] = False
