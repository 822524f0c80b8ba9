"""From a GGUF adapter to a PEFT folder, for a model as transformers names it: the reverse of `to_gguf.py`.

Rows of B go back into transformers' order, alpha back into the config; the numbers keep their bits and their dtype.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from app.adapters.conversion_cache import Cache
from app.adapters.to_gguf import read_q8_0
from app.core.adapter_file import AdapterFile, read_adapter_file
from app.core.errors import ErrorKind, WeftError
from app.core.gguf_header import os_error
from app.core.library import ModelEntry
from app.core.module_names import BY_HEAD, INTERLEAVED, PLAIN, Place, gguf_architectures, place_of, role_of
from app.core.tensor_info import TensorInfo, read_tensor

if TYPE_CHECKING:
    import numpy

VERSION = 1  # of the conversion: a higher one makes all cached folders anew
_CHUNK = 1 << 22


class HfBase(NamedTuple):
    """What a conversion has to know of the model.

    Attributes:
        model_type: as its config says it. heads, kv_heads: of attention.
        names: a module's full name by its layer (-1 outside) and role (`attn_q`).
        rows: outputs of a module by its name, where they are known; to take fused matrices apart.
    """

    model_type: str
    heads: int
    kv_heads: int
    names: dict[tuple[int, str], str]
    rows: dict[str, int]


def hf_base(model_type: str, heads: int, kv_heads: int, modules: Iterable[tuple[str, int]]) -> HfBase:
    """The base that these modules (name, number of outputs or 0) make up."""
    names: dict[tuple[int, str], str] = {}
    rows: dict[str, int] = {}
    for name, out in modules:
        place = place_of(name)
        if role := role_of(place):
            names.setdefault((place.layer, role), name)
            rows[name] = out
    return HfBase(model_type, heads, kv_heads or heads, names, rows)


def base_of_entry(entry: ModelEntry) -> HfBase:
    """The base that a model of the library is, from its safetensors headers.

    Raises:
        WeftError: as reading a header does.
    """
    from app.core.formats import read_safetensors_header

    modules = [
        (tensor.name.removesuffix(".weight"), tensor.shape[0])
        for file in entry.files
        if file.endswith(".safetensors")
        for tensor in read_safetensors_header(Path(file)).tensors
        if tensor.name.endswith(".weight") and len(tensor.shape) == 2
    ]
    if not any(name == "lm_head" for name, _ in modules):
        modules.append(("lm_head", entry.shape.vocabulary))  # tied
    return hf_base(entry.model_type, entry.shape.heads, entry.shape.kv_heads, modules)


def converted(path: Path, base: HfBase, cache: Path) -> tuple[Path, list[str]]:
    """A PEFT folder of the same meaning, from the cache where the same adapter was converted for such a model before.

    Returns:
        The folder, and sentences about what of the adapter is left out.

    Raises:
        WeftError: UNSUPPORTED when it was made for another architecture or none of it fits; CORRUPT.
    """
    file = _usable(path, base)
    store = Cache(cache)
    key = f"peft-{_key(file, base)}"
    _, notes = _places(file, base)
    found = store.get(key)
    if found is None:
        with store.making(key) as stage:
            write_peft(stage, file, base)
        found = store.path(key)
    return found, notes


def write_peft(folder: Path, file: AdapterFile, base: HfBase) -> None:
    """Write adapter_model.safetensors and adapter_config.json into an existing folder. Raises as `converted`."""
    places, _ = _places(file, base)
    tensors: dict[str, tuple[str, Any]] = {}
    ranks: dict[str, int] = {}
    for name, (module, parts) in places.items():
        lora = file.modules[name].loras[0]
        (kind, a), (kind_b, b) = _raw(lora.a, lora.embedding), _raw(lora.b)
        b = b if len(parts) > 1 else _restored(b, module, file, base)
        first = 0
        for part, rows in parts:
            sides = ("lora_embedding_A", "lora_embedding_B") if lora.embedding else ("lora_A.weight", "lora_B.weight")
            piece = b if len(parts) == 1 else _restored(b[first : first + rows], part, file, base)
            first += rows
            tensors[f"base_model.model.{part}.{sides[0]}"] = (kind, a)
            tensors[f"base_model.model.{part}.{sides[1]}"] = (kind_b, piece)
            ranks[part] = lora.rank
    _write_safetensors(folder / "adapter_model.safetensors", tensors)
    text = json.dumps(_config(file, base, ranks), indent=2, ensure_ascii=False) + "\n"
    (folder / "adapter_config.json").write_text(text, "utf-8")


def _usable(path: Path, base: HfBase) -> AdapterFile:
    file = read_adapter_file(path)
    if file.problems:
        raise WeftError(ErrorKind.CORRUPT, f"{path.name} cannot be used. {file.problems[0]}", "Get the adapter again.")
    wanted = gguf_architectures(base.model_type)
    if file.architecture and file.architecture not in wanted:
        raise WeftError(
            ErrorKind.UNSUPPORTED,
            f"{path.name} was made for the architecture {file.architecture}, the model is {wanted[0]}.",
            "Choose a model of that architecture.",
        )
    return file


def _places(file: AdapterFile, base: HfBase) -> tuple[dict[str, tuple[str, list[tuple[str, int]]]], list[str]]:
    """By GGUF name: the module that it belongs to, or the several that it is fused of with the rows of each."""
    found: dict[str, tuple[str, list[tuple[str, int]]]] = {}
    missing: list[str] = []
    for name in file.modules:
        place = place_of(name)
        module = base.names.get((place.layer, place.tail))
        if module is not None:
            found[name] = (module, [(module, 0)])
        elif parts := _apart(place, base, file.modules[name].loras[0].outputs):
            found[name] = (parts[0][0], parts)
        else:
            missing.append(place.tail)
    if not found:
        raise WeftError(
            ErrorKind.UNSUPPORTED,
            f"{file.path.name} does not fit this model: 0 of its {len(file.modules)} modules match.",
            f"It records {file.config.base} as its base." if file.config.base else "Choose the model it was made for.",
        )
    notes: list[str] = []
    if missing:
        tails = ", ".join(sorted(set(missing)))
        notes.append(f"{file.path.name}: {len(missing)} of its modules have no place in this model: {tails}.")
    return found, notes


def _apart(place: Place, base: HfBase, out: int) -> list[tuple[str, int]]:
    """The separate matrices that make up llama.cpp's attn_qkv; empty when they do not."""
    if place.tail != "attn_qkv":
        return []
    names = [base.names.get((place.layer, role)) for role in ("attn_q", "attn_k", "attn_v")]
    parts = [(name, base.rows.get(name, 0)) for name in names if name]
    return parts if len(parts) == 3 and sum(rows for _, rows in parts) == out else []


def _restored(b: numpy.ndarray, module: str, file: AdapterFile, base: HfBase) -> numpy.ndarray:
    """B with its rows as transformers keeps them.

    Raises:
        WeftError: UNSUPPORTED where llama.cpp's order is not known.
    """
    role = role_of(place_of(module))
    architecture = file.architecture or gguf_architectures(base.model_type)[0]
    if role not in ("attn_q", "attn_k", "attn_qkv") or architecture in PLAIN:
        return b
    if architecture in INTERLEAVED and role != "attn_qkv":
        heads = base.heads if role == "attn_q" else base.kv_heads
        return b.reshape(heads, b.shape[0] // heads // 2, 2, b.shape[1]).swapaxes(1, 2).reshape(b.shape)
    if architecture in BY_HEAD and role == "attn_qkv":
        return b.reshape(3, base.heads, -1, b.shape[1]).swapaxes(0, 1).reshape(b.shape)
    raise WeftError(
        ErrorKind.UNSUPPORTED,
        f"How llama.cpp orders the attention of the architecture {architecture!r} is not known here.",
        "Use the PEFT folder that the adapter was made from.",
    )


def _config(file: AdapterFile, base: HfBase, ranks: Mapping[str, int]) -> dict[str, object]:
    """PEFT computes lora_alpha/r; llama.cpp alpha/rank, or 1 where alpha is 0."""
    alpha, common = file.config.alpha, max(ranks.values(), key=list(ranks.values()).count)
    tails = sorted({name.rpartition(".")[2] for name in ranks})
    other = {name: rank for name, rank in ranks.items() if rank != common}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": file.config.base or None,
        "r": common,
        "lora_alpha": alpha or common,
        "rank_pattern": other,
        "alpha_pattern": {} if alpha else other,
        "target_modules": tails,
        "fan_in_fan_out": base.model_type == "gpt2",
        "bias": "none",
    }


# Bytes ------------------------------------------------------------------------------------------------


def _raw(info: TensorInfo, turned: bool = False) -> tuple[str, numpy.ndarray]:
    """A tensor's dtype as safetensors names it, and its elements, bits untouched (BF16 as uint16)."""
    import numpy

    data = read_tensor(info)
    kind = info.type.upper()
    if kind == "Q8_0":
        array: Any = read_q8_0(data)
        kind = "F32"
    elif kind in ("F32", "F16", "BF16"):
        array = numpy.frombuffer(data, {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}[kind])
    else:
        raise WeftError(
            ErrorKind.UNSUPPORTED,
            f"{info.file.name} holds {info.name[:80]} as {info.type}, which no adapter is computed in.",
            "Convert the adapter again, in f32, f16, bf16 or q8_0.",
        )
    # An embedding's A lies transposed, while its shape is told as everybody else's.
    return kind, array.reshape(info.shape[::-1]).T if turned else array.reshape(info.shape)


def _write_safetensors(path: Path, tensors: Mapping[str, tuple[str, Any]]) -> None:
    import numpy

    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (kind, array) in tensors.items():
        header[name] = {"dtype": kind, "shape": list(array.shape), "data_offsets": [offset, offset + array.nbytes]}
        offset += array.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _, array in tensors.values():
            file.write(numpy.ascontiguousarray(array).tobytes())
        file.flush()
        os.fsync(file.fileno())


def _key(file: AdapterFile, base: HfBase) -> str:
    digest = hashlib.sha256(f"{VERSION}\0{base.model_type}\0{base.heads}\0{base.kv_heads}\0".encode())
    digest.update(msgspec.json.encode([sorted((*k, v) for k, v in base.names.items()), sorted(base.rows.items())]))
    try:
        with file.path.open("rb") as stream:
            while piece := stream.read(_CHUNK):
                digest.update(piece)
    except OSError as error:
        raise os_error(file.path, error) from error
    return digest.hexdigest()[:40]
