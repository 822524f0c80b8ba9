"""Tiny model and adapter files, written with struct alone, and whole libraries of any size.

python -m tests.fakes.library_files FOLDER [N]      makes a library of N entries (1,000) on disk
"""

from __future__ import annotations

import json
import random
import struct
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from app.core.ggml import TYPES
from app.core.library import AdapterEntry, AdapterFormat, ModelEntry, ModelFormat, ModelShape
from app.core.safetensors_header import DTYPES

Tensors = Sequence[tuple[str, Sequence[int], int]]  # name, shape (innermost first), GGML type


# GGUF -------------------------------------------------------------------------------------------


def gguf_string(text: str | bytes) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(data)) + data


def gguf_value(value: object) -> bytes:
    """A metadata value with its type: bool, int (u32, or u64 when large), float (f32), str, or a list of one of these."""
    kind, data = _typed(value)
    return struct.pack("<I", kind) + data


def _typed(value: object) -> tuple[int, bytes]:
    if isinstance(value, bool):
        return 7, struct.pack("<?", value)
    if isinstance(value, int):
        return (4, struct.pack("<I", value)) if 0 <= value < 2**32 else (10, struct.pack("<Q", value))
    if isinstance(value, float):
        return 6, struct.pack("<f", value)
    if isinstance(value, str):
        return 8, gguf_string(value)
    assert isinstance(value, (list, tuple))
    if value and isinstance(value[0], str):
        return 9, struct.pack("<IQ", 8, len(value)) + b"".join(map(gguf_string, value))
    if value and isinstance(value[0], float):
        return 9, struct.pack(f"<IQ{len(value)}f", 6, len(value), *value)
    return 9, struct.pack(f"<IQ{len(value)}i", 5, len(value), *value)


def gguf_bytes(
    metadata: Mapping[str, object], tensors: Tensors = (), *, version: int = 3, alignment: int = 32
) -> bytes:
    """A whole GGUF file; tensor data are zeros."""
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(metadata))
    head += b"".join(gguf_string(key) + gguf_value(value) for key, value in metadata.items())
    offset = 0
    for name, shape, kind in tensors:
        head += gguf_string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)
        elements = 1
        for size in shape:
            elements *= size
        offset += -(-(elements // TYPES[kind].block * TYPES[kind].bytes) // alignment) * alignment
    return head + b"\0" * (-len(head) % alignment) + b"\0" * offset


def llama_metadata(**more: object) -> dict[str, object]:
    return {
        "general.architecture": "llama",
        "general.file_type": 15,
        "llama.block_count": 2,
        "llama.embedding_length": 256,
        "llama.feed_forward_length": 512,
        "llama.attention.head_count": 8,
        "llama.attention.head_count_kv": 2,
        "llama.context_length": 4096,
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": ["<s>", "</s>", "a"],
        **more,
    }


def write_gguf_model(path: Path, *, template: bool = True, **more: object) -> Path:
    """A tiny llama of 196,864 parameters: one Q4_K and one F32 tensor."""
    metadata = llama_metadata(**({"tokenizer.chat_template": "{{ messages }}"} if template else {}), **more)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gguf_bytes(metadata, [("token_embd.weight", (256, 768), 12), ("output_norm.weight", (256,), 0)]))
    return path


def write_gguf_adapter(path: Path, *, rank: int = 4, **more: object) -> Path:
    metadata: dict[str, object] = {
        "general.architecture": "llama",
        "general.type": "adapter",
        "adapter.type": "lora",
        "adapter.lora.alpha": 8.0,
        "general.base_model.0.repo_url": "https://huggingface.co/user/base",
        **more,
    }
    tensors = [("blk.0.attn_q.weight.lora_a", (256, rank), 0), ("blk.0.attn_q.weight.lora_b", (rank, 256), 0)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gguf_bytes(metadata, tensors))
    return path


# safetensors ------------------------------------------------------------------------------------


def safetensors_bytes(
    tensors: Mapping[str, tuple[str, Sequence[int]]], metadata: Mapping[str, str] | None = None
) -> bytes:
    """A whole file of named (dtype, shape); data are zeros."""
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, (dtype, shape) in tensors.items():
        elements = 1
        for size in shape:
            elements *= size
        end = offset + elements * DTYPES[dtype] // 8
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + b"\0" * offset


LLAMA_TENSORS: dict[str, tuple[str, Sequence[int]]] = {
    "model.embed_tokens.weight": ("BF16", (32, 16)),
    "model.layers.0.self_attn.q_proj.weight": ("BF16", (16, 16)),
    "model.norm.weight": ("F32", (16,)),
}
LLAMA_CONFIG: dict[str, object] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 32,
    "max_position_embeddings": 2048,
    "torch_dtype": "bfloat16",
}


def write_json(path: Path, value: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), "utf-8")
    return path


def write_folder(
    folder: Path,
    tensors: Mapping[str, tuple[str, Sequence[int]]] | None = None,
    *,
    config: Mapping[str, object] | None = None,
    file: str = "model.safetensors",
    template: bool = True,
) -> Path:
    """A folder as transformers saves it, with one safetensors file."""
    write_json(folder / "config.json", {**LLAMA_CONFIG, **(config or {})})
    (folder / file).write_bytes(safetensors_bytes(tensors or LLAMA_TENSORS, {"format": "pt"}))
    write_json(folder / "tokenizer_config.json", {"chat_template": "{{ messages }}"} if template else {})
    return folder


def write_sharded(folder: Path, shards: int = 2) -> Path:
    write_json(folder / "config.json", LLAMA_CONFIG)
    weight_map: dict[str, str] = {}
    for number in range(1, shards + 1):
        name = f"model-{number:05}-of-{shards:05}.safetensors"
        tensor = f"model.layers.{number}.mlp.weight"
        (folder / name).write_bytes(safetensors_bytes({tensor: ("BF16", (16, 16))}))
        weight_map[tensor] = name
    write_json(
        folder / "model.safetensors.index.json", {"metadata": {"total_size": 512 * shards}, "weight_map": weight_map}
    )
    return folder


def write_peft(folder: Path, *, rank: int = 8, **more: object) -> Path:
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": "user/base",
        "r": rank,
        "lora_alpha": 16,
        "target_modules": ["q_proj", "v_proj"],
        **more,
    }
    write_json(folder / "adapter_config.json", config)
    (folder / "adapter_model.safetensors").write_bytes(safetensors_bytes(lora_tensors(rank)))
    return folder


def lora_tensors(rank: int = 8) -> dict[str, tuple[str, Sequence[int]]]:
    stem = "base_model.model.model.layers.0.self_attn"
    return {
        f"{stem}.{module}.lora_{side}.weight": ("F32", (rank, 16) if side == "A" else (16, rank))
        for module in ("q_proj", "v_proj")
        for side in "AB"
    }


# Whole libraries ----------------------------------------------------------------------------------


def entries(count: int, root: str = "/library", seed: int = 0) -> Iterator[ModelEntry]:
    """Rows for the index, as varied as a real library; nothing lies on disk."""
    random_ = random.Random(seed)
    families = ("Llama-3.1", "Qwen2.5", "Mistral", "gemma-3", "Phi-4", "SmolLM2", "Ünïcode-模型")
    for number in range(count):
        family, billions = random_.choice(families), random_.choice((0.5, 1, 3, 7, 8, 13, 34, 70))
        gguf = random_.random() < 0.6
        quantization = random_.choice(("Q4_K_M", "Q5_K_M", "Q8_0", "IQ3_XS")) if gguf else "BF16"
        name = f"user{number % 97}/{family}-{billions:g}B-{number}"
        path = f"{root}/{name}" + (f"-{quantization}.gguf" if gguf else "")
        size = int(billions * 1e9 * (0.6 if gguf else 2))
        yield ModelEntry(
            id=path,
            name=name,
            path=path,
            root=root,
            format=ModelFormat.GGUF if gguf else ModelFormat.SAFETENSORS,
            quantization=quantization,
            architecture="llama" if gguf else "LlamaForCausalLM",
            model_type="llama",
            parameters=int(billions * 1e9),
            bytes=size,
            weight_bytes=size,
            shape=ModelShape(layers=32, hidden=4096, heads=32, kv_heads=8, head_dim=128, value_dim=128, context=8192),
            files=(path,),
            has_chat_template=True,
            modified=1.7e9 + random_.random() * 1e7,
        )


def adapter_entries(count: int, root: str = "/library") -> Iterator[AdapterEntry]:
    for number in range(count):
        path = f"{root}/loras/adapter-{number}"
        yield AdapterEntry(
            id=path, name=f"adapter-{number}", path=path, root=root, format=AdapterFormat.PEFT, rank=8, alpha=16.0
        )


def make_library(folder: Path, count: int) -> int:
    """A library on disk: GGUF files, safetensors folders and PEFT adapters in turn, `user/model`. Returns how many."""
    for number in range(count):
        place = folder / f"user{number % 97}" / f"model-{number}"
        if number % 3 == 0:
            write_gguf_model(place / f"model-{number}-Q4_K_M.gguf")
        elif number % 3 == 1:
            place.mkdir(parents=True)
            write_folder(place)
        else:
            place.mkdir(parents=True)
            write_peft(place)
    return count


if __name__ == "__main__":
    print(make_library(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 1000))
