"""From a PEFT adapter to one for llama.cpp, made for the very GGUF model that it is to be used with.

llama.cpp keeps some matrices with their rows in another order than transformers does; B, whose rows are the same outputs,
is put into that order. Held to llama.cpp's own convert_lora_to_gguf.py by a test.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from app.adapters.conversion_cache import Cache
from app.adapters.gguf_writer import write_gguf
from app.core.adapter_file import AdapterFile, LoraTensors, read_adapter_file
from app.core.compatibility import adapter_extras
from app.core.errors import ErrorKind, WeftError
from app.core.formats import GgufHeader
from app.core.gguf_header import os_error
from app.core.module_names import BY_HEAD, INTERLEAVED, PLAIN, Place, is_expert, place_of, role_of
from app.core.tensor_info import TensorInfo, read_tensor

if TYPE_CHECKING:
    import numpy

VERSION = 1  # of the conversion: a higher one makes all cached files anew
_CHUNK = 1 << 22


class Base(NamedTuple):
    """What a conversion has to know of the model.

    Attributes:
        architecture: as GGUF names it. heads, kv_heads: of attention.
        shapes: of its matrices by name (`blk.0.attn_q`): (out, in).
    """

    architecture: str
    heads: int
    kv_heads: int
    shapes: dict[str, tuple[int, int]]

    @property
    def tied(self) -> bool:
        """Whether the output head is the embedding's matrix."""
        return "output" not in self.shapes


def base_of(headers: list[GgufHeader]) -> Base:
    """The base that these files, all parts of one model, hold."""
    head = headers[0]
    architecture = head.text("general.architecture")
    shapes = {
        tensor.name.removesuffix(".weight"): (tensor.shape[1], tensor.shape[0])
        for header in headers
        for tensor in header.tensors
        if len(tensor.shape) == 2
    }
    heads = head.number(f"{architecture}.attention.head_count")
    return Base(architecture, heads, head.number(f"{architecture}.attention.head_count_kv") or heads, shapes)


def converted(path: Path, base: Base, cache: Path, alpha: float | None = None) -> tuple[Path, list[str]]:
    """A GGUF adapter of the same meaning, from the cache where the same adapter was converted for the same model before.

    Args:
        alpha: for an adapter that does not say it.

    Returns:
        The file, and sentences about what of the adapter is left out.

    Raises:
        WeftError: UNSUPPORTED for what llama.cpp cannot take live; CORRUPT; BAD_INPUT when alpha is unknown.
    """
    file = read_adapter_file(path, alpha)
    if file.problems:
        raise WeftError(ErrorKind.CORRUPT, f"{path.name} cannot be used. {file.problems[0]}", "Get the adapter again.")
    if file.needs_alpha:
        raise WeftError(
            ErrorKind.BAD_INPUT,
            f"{path.name} does not say its alpha.",
            "Put an adapter_config.json with lora_alpha beside it (often alpha is the rank, or twice the rank).",
        )
    if extras := adapter_extras(file):
        raise WeftError(
            ErrorKind.UNSUPPORTED,
            f"{path.name} has {', '.join(extras)}, which llama.cpp cannot add to a model while it runs.",
            "Use it with Transformers on the safetensors model, or merge it into a copy of the model.",
        )
    places, notes = _places(file, base)
    store = Cache(cache)
    name = f"{_key(file, base)}.gguf"
    found = store.get(name)
    if found is None:
        found = store.path(name)
        write_gguf(found, *_content(file, base, places))
        store.trim(keep=name)
    return found, notes


def _places(file: AdapterFile, base: Base) -> tuple[dict[str, list[tuple[LoraTensors, int]]], list[str]]:
    """Pairs by the tensor that they belong to, each with the first of its rows."""
    found: dict[str, list[tuple[LoraTensors, int]]] = {}
    missing: dict[str, int] = {}
    for module in file.modules.values():
        place = place_of(module.name)
        for lora in module.loras:
            name, first, reason = _place(place, lora, base)
            if reason:
                missing[reason] = missing.get(reason, 0) + 1
            else:
                found.setdefault(name, []).append((lora, first))
    if not found:
        reason = next(iter(missing), "it holds nothing")
        raise WeftError(
            ErrorKind.UNSUPPORTED,
            f"{file.path.name} does not fit this model: 0 of its {len(file.modules)} modules match ({reason}).",
            f"It records {file.config.base} as its base."
            if file.config.base
            else "Choose the model it was trained on.",
        )
    notes: list[str] = []
    if missing:
        told = "; ".join(f"{reason} ({count})" for reason, count in missing.items())
        notes.append(f"{file.path.name}: parts of it have no place in this model and are left out: {told}.")
    return found, notes


def _place(place: Place, lora: LoraTensors, base: Base) -> tuple[str, int, str]:
    """The tensor's name, the first row, and why there is none."""
    role = role_of(place)
    start = f"blk.{place.layer}." if place.layer >= 0 else ""
    name, first = start + role, 0
    if not role or is_expert(place):
        return "", 0, f"llama.cpp takes no adapters of {place.tail}"
    size = (lora.inputs, lora.outputs) if lora.embedding else (lora.outputs, lora.inputs)
    if name not in base.shapes and role in ("attn_q", "attn_k", "attn_v") and f"{start}attn_qkv" in base.shapes:
        name = f"{start}attn_qkv"
        out = base.shapes[name][0]
        first = {"attn_q": 0, "attn_k": out - 2 * size[0], "attn_v": out - size[0]}[role]
        if size[1] == base.shapes[name][1] and 0 <= first <= out - size[0]:
            return name, first, ""
    if role == "output" and base.tied:
        return "", 0, "the model's output head is its embedding, and cannot be adapted alone"
    if role == "token_embd" and base.tied:
        # llama.cpp would apply the pair to the output head too, the wrong way round, and abort.
        return "", 0, "the model's embedding is its output head too, and cannot be adapted alone"
    if name not in base.shapes:
        return "", 0, f"the model has no {name.rpartition('.')[2]}"
    if base.shapes[name] != size:
        there, here = f"{size[0]}×{size[1]}", "×".join(map(str, base.shapes[name]))
        return "", 0, f"{place.tail} is {there} there, {here} in the model"
    return name, first, ""


def _content(
    file: AdapterFile, base: Base, places: dict[str, list[tuple[LoraTensors, int]]]
) -> tuple[dict[str, str | float | int], dict[str, numpy.ndarray]]:
    import numpy

    pairs = [pair for found in places.values() for pair in found]
    alpha = file.config.alpha or 0.0
    # llama.cpp computes alpha/rank itself. Where that is not every module's scale, B takes the scale, and alpha 0 says so.
    own = any(lora.scale != alpha / lora.rank or first for lora, first in pairs) or any(
        len(v) > 1 for v in places.values()
    )
    tensors: dict[str, numpy.ndarray] = {}
    for name, found in places.items():
        all_a: list[Any] = []
        all_b: list[Any] = []
        for lora, first in found:
            a, b = read_array(lora.a), read_array(lora.b)
            a, b = (a.T, b.T) if lora.transposed else (a, b)
            b = reordered(b, name.rpartition(".")[2] if "." in name else name, base)
            if own:
                b = (b.astype(numpy.float64) * lora.scale).astype(numpy.float32)
            if b.shape[0] != (base.shapes[name][1] if lora.embedding else base.shapes[name][0]):
                padded = numpy.zeros((base.shapes[name][0], b.shape[1]), numpy.float32)
                padded[first : first + b.shape[0]] = b
                b = padded
            all_a.append(a)
            all_b.append(b)
        a, b = numpy.concatenate(all_a), numpy.concatenate(all_b, axis=1)
        tensors[f"{name}.weight.lora_a"] = numpy.ascontiguousarray(a.T if found[0][0].embedding else a)
        tensors[f"{name}.weight.lora_b"] = numpy.ascontiguousarray(b)
    metadata: dict[str, str | float | int] = {
        "general.architecture": base.architecture,
        "general.type": "adapter",
        "adapter.type": "lora",
        "general.name": file.path.name,
        "adapter.lora.alpha": 0.0 if own else float(alpha),
    }
    return metadata, tensors


def reordered(b: numpy.ndarray, role: str, base: Base) -> numpy.ndarray:
    """B with its rows as llama.cpp keeps this tensor's.

    Raises:
        WeftError: UNSUPPORTED where that order is not known.
    """
    architecture = base.architecture
    if role not in ("attn_q", "attn_k", "attn_qkv") or architecture in PLAIN:
        return b
    if architecture in INTERLEAVED and role != "attn_qkv":
        heads = base.heads if role == "attn_q" else base.kv_heads
        return b.reshape(heads, 2, b.shape[0] // heads // 2, b.shape[1]).swapaxes(1, 2).reshape(b.shape)
    if architecture in BY_HEAD and role == "attn_qkv":
        return b.reshape(base.heads, 3, -1, b.shape[1]).swapaxes(0, 1).reshape(b.shape)
    raise WeftError(
        ErrorKind.UNSUPPORTED,
        f"How llama.cpp orders the attention of the architecture {architecture!r} is not known here.",
        "Use the adapter with Transformers, or convert it with llama.cpp's own script.",
    )


def read_array(info: TensorInfo) -> numpy.ndarray:
    """A tensor as float32, never NaN or infinite.

    Raises:
        WeftError: CORRUPT, UNSUPPORTED.
    """
    import numpy

    data = read_tensor(info)
    readers: dict[str, Callable[[bytes], Any]] = {
        "F32": lambda raw: numpy.frombuffer(raw, "<f4"),
        "F16": lambda raw: numpy.frombuffer(raw, "<f2").astype(numpy.float32),
        "F64": lambda raw: numpy.frombuffer(raw, "<f8").astype(numpy.float32),
        "BF16": lambda raw: (numpy.frombuffer(raw, "<u2").astype(numpy.uint32) << 16).view(numpy.float32),
    }
    readers["Q8_0"] = read_q8_0
    if info.type.upper() not in readers:
        raise WeftError(
            ErrorKind.UNSUPPORTED,
            f"{info.file.name} holds {info.name[:80]} as {info.type}, which no adapter is computed in.",
            "Save the adapter in float32, float16 or bfloat16.",
        )
    array = readers[info.type.upper()](data).reshape(info.shape)
    if not numpy.isfinite(array).all():
        raise WeftError(
            ErrorKind.CORRUPT,
            f"{info.file.name} holds values that are no numbers (NaN or infinity) in {info.name[:80]}.",
            "Get the adapter again, or train it anew with a lower learning rate.",
        )
    return array


def read_q8_0(data: bytes) -> numpy.ndarray:
    """GGML's blocks of 32 bytes under one scale, as float32, flat."""
    import numpy

    blocks = numpy.frombuffer(data, numpy.dtype([("d", "<f2"), ("q", "i1", 32)]))
    return (blocks["q"].astype(numpy.float32) * blocks["d"].astype(numpy.float32)[:, None]).reshape(-1)


def _key(file: AdapterFile, base: Base) -> str:
    """A name that changes with anything that the result depends on."""
    digest = hashlib.sha256(f"{VERSION}\0{base.architecture}\0{base.heads}\0{base.kv_heads}\0".encode())
    digest.update(repr(sorted(base.shapes.items())).encode())
    digest.update(
        repr([(m.name, [(lora.scale, lora.transposed) for lora in m.loras]) for m in file.modules.values()]).encode()
    )
    weights = next(lora.a.file for m in file.modules.values() for lora in m.loras)
    try:
        with weights.open("rb") as stream:
            while piece := stream.read(_CHUNK):
                digest.update(piece)
    except OSError as error:
        raise os_error(weights, error) from error
    return digest.hexdigest()[:40]
