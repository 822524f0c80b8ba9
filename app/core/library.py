"""ModelEntry and AdapterEntry: what Weft knows about weights on disk, read from headers alone."""

from __future__ import annotations

from enum import StrEnum

import msgspec

from app.core.own_sampling import OwnSampling


class ModelFormat(StrEnum):
    """How a model's weights are stored. Decides which loaders can take it."""

    SAFETENSORS = "safetensors"  # a folder with config.json and 16/32-bit safetensors, sharded or not
    TORCH_BIN = "bin"  # the same with pytorch_model*.bin
    GGUF = "gguf"  # one file, or a split set
    GPTQ = "gptq"
    AWQ = "awq"
    EXL2 = "exl2"
    EXL3 = "exl3"
    HQQ = "hqq"
    BITSANDBYTES = "bitsandbytes"  # a folder saved already quantized by bitsandbytes
    OTHER = "other"  # another quantization_config; named in `quantization`


class AdapterFormat(StrEnum):
    """How an adapter is stored."""

    PEFT = "peft"  # folder with adapter_config.json
    SAFETENSORS = "safetensors"  # a lone file
    TORCH_BIN = "bin"  # a lone .bin/.pt
    GGUF = "gguf"


class ModelShape(msgspec.Struct, frozen=True, kw_only=True):
    """The numbers of an architecture that memory estimates and compatibility need. 0 means unknown."""

    layers: int = 0
    hidden: int = 0
    intermediate: int = 0
    heads: int = 0
    kv_heads: int = 0
    head_dim: int = 0
    value_dim: int = 0  # per head; differs from head_dim in a few architectures
    vocabulary: int = 0
    context: int = 0  # tokens the model was trained for
    experts: int = 0
    sliding_window: int = 0


class ModelEntry(msgspec.Struct, frozen=True, kw_only=True):
    """One model of the library.

    Attributes:
        id: stable across rescans: the absolute path of the folder, or of the (first) GGUF file.
        name: what the list shows: `user/model` where the layout tells, else the folder's or file's name.
        path: folder, or (first) GGUF file.
        root: the library root under which it was found.
        format, quantization: `gguf` and `Q4_K_M`; `safetensors` and `BF16`; `gptq` and `4-bit, group 128`.
        architecture: `LlamaForCausalLM` from config.json, or `llama` from a GGUF, as the file says.
        model_type: the family in lower case (`llama`, `qwen2`, …).
        parameters: number of weights, 0 when unknown.
        bytes: size of the weights on disk, all parts together.
        weight_bytes: bytes that the tensors themselves take, from the headers.
        files: the weight files, absolute, in order.
        mmproj: the vision projector that lies beside a GGUF, or "".
        vision: whether it can see (config or mmproj).
        has_chat_template: whether a chat can be rendered the model's own way.
        own_sampling: how its maker has it answer; a new chat begins so.
        custom_code: Python files in the folder that `auto_map` asks to run; loading them is off unless allowed.
        read_only: true for roots of other programs (Ollama's blobs).
        problem: why it cannot be used, in words; "" when nothing is wrong.
        modified: of the newest weight file, in seconds since the epoch.
        last_used: of the last load, in seconds since the epoch; 0 for never.
    """

    id: str
    name: str
    path: str
    root: str = ""
    format: ModelFormat
    quantization: str = ""
    architecture: str = ""
    model_type: str = ""
    parameters: int = 0
    bytes: int = 0
    weight_bytes: int = 0
    shape: ModelShape = ModelShape()
    files: tuple[str, ...] = ()
    mmproj: str = ""
    vision: bool = False
    has_chat_template: bool = False
    own_sampling: OwnSampling = OwnSampling()
    custom_code: tuple[str, ...] = ()
    read_only: bool = False
    problem: str = ""
    modified: float = 0.0
    last_used: float = 0.0


class AdapterEntry(msgspec.Struct, frozen=True, kw_only=True):
    """One adapter of the library.

    Attributes:
        id: stable across rescans: the absolute path of the folder or file.
        kind: `LoRA`, `rsLoRA`, `DoRA`, … as headers and config tell.
        base: the base model that it records, as recorded; "" when it records none.
        rank: the largest. alpha: 0 when unknown; MLX's whole scale times the rank.
        targets: module names, short (`q_proj`).
        needs_alpha: nobody recorded alpha: a person must say it before the adapter can be used.
        source: where Weft copied it from. run: id of the training run that made it. Both "" where not noted.
    """

    id: str
    name: str
    path: str
    root: str = ""
    format: AdapterFormat
    kind: str = "LoRA"
    base: str = ""
    rank: int = 0
    alpha: float = 0.0
    targets: tuple[str, ...] = ()
    bytes: int = 0
    files: tuple[str, ...] = ()
    problem: str = ""
    modified: float = 0.0
    needs_alpha: bool = False
    source: str = ""
    run: str = ""
