"""Folders with config.json: which weights they hold, and what is wrong with them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import msgspec

from app.core.errors import WeftError
from app.core.formats import JsonObject, SafetensorsTensor, read_json, read_safetensors_header
from app.core.gguf_header import os_error
from app.core.library import ModelEntry, ModelFormat
from app.core.model_config import (
    architecture_of,
    custom_code,
    has_chat_template,
    sees,
    shape_of,
    text,
    text_config,
    unsuited,
)
from app.core.own_sampling import of_folder
from app.core.quantization import Quantization, from_config, from_tensors, parameters, plain_label

MAX_INDEX = 32 * 1024 * 1024
_SHARD = re.compile(r"(?P<stem>.+)-(?P<part>\d{5})-of-(?P<parts>\d{5})\.(safetensors|bin)")
_NO_WEIGHTS = re.compile(
    r"(adapter_model|training_args|optimizer|scheduler|random_states|rng_state|trainer_state|tokenizer|vocab|merges"
    r"|consolidated|ggml-|non_lora_trainables|mm_projector|scaler|imatrix|measurement).*",
    re.IGNORECASE,
)


class Weights(NamedTuple):
    """Weight files of a folder, in order, the kind, and what is wrong with the set."""

    files: tuple[Path, ...]
    safetensors: bool
    problem: str = ""
    total: int = 0  # bytes of the tensors by the index, 0 when it does not tell


class _Index(msgspec.Struct):
    weight_map: dict[str, str]
    metadata: dict[str, msgspec.Raw] = {}


def folder_model(folder: Path) -> ModelEntry | None:
    """The model in a folder that holds config.json; None when there is none.

    A damaged or incomplete one gives an entry that says so in `problem`.
    """
    names = _names(folder)
    if "config.json" not in names:
        return None
    weights = find_weights(folder, names)
    if weights is None:
        return None
    problem = weights.problem
    try:
        config = read_json(folder / "config.json")
        gptq = read_json(folder / "quantize_config.json") if "quantize_config.json" in names else {}
        awq = read_json(folder / "quant_config.json") if "quant_config.json" in names else {}
        code = custom_code(folder)
    except WeftError as error:
        config, gptq, awq, code, problem = {}, {}, {}, (), problem or error.message
    if "_class_name" in config or "_diffusers_version" in config:
        return None  # a part of an image generator
    tensors, damage = _tensors(weights)
    problem = problem or damage or unsuited(config)
    quantization = from_config(config, gptq, awq) or from_tensors(tensors) or _plain(weights, config, tensors)
    sizes = _stats(weights.files)
    weight_bytes = sum(tensor.bytes for tensor in tensors) or weights.total or sum(size for size, _ in sizes)
    return ModelEntry(
        id=str(folder),
        name=folder.name,
        path=str(folder),
        format=quantization.format,
        quantization=quantization.label,
        architecture=architecture_of(config),
        model_type=text(text_config(config), "model_type").lower(),
        parameters=parameters(tensors, quantization.bits) or int(weight_bytes * 8 / (quantization.bits or 16)),
        bytes=sum(size for size, _ in sizes),
        weight_bytes=weight_bytes,
        shape=shape_of(config),
        files=tuple(map(str, weights.files)),
        vision=sees(config),
        has_chat_template=has_chat_template(folder),
        own_sampling=of_folder(folder),
        custom_code=code,
        problem=problem,
        modified=max((modified for _, modified in sizes), default=0.0),
    )


def _plain(weights: Weights, config: JsonObject, tensors: list[SafetensorsTensor]) -> Quantization:
    if weights.safetensors:
        return Quantization(ModelFormat.SAFETENSORS, plain_label(tensors))
    if any(path.name == "qmodel.pt" for path in weights.files):
        return Quantization(ModelFormat.HQQ, "")
    dtype = text(config, "torch_dtype") or text(config, "dtype")
    known = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}
    label = known.get(dtype.removeprefix("torch."), "")
    return Quantization(ModelFormat.TORCH_BIN, label, 32 if label == "F32" else 16)


def _names(folder: Path) -> frozenset[str]:
    try:
        return frozenset(entry.name for entry in folder.iterdir())
    except OSError as error:
        raise os_error(folder, error) from error


def find_weights(folder: Path, names: frozenset[str]) -> Weights | None:
    """Which files of a folder are the model's weights: by index, by the usual name, or by ending."""
    for index, usual in (
        ("model.safetensors.index.json", "model.safetensors"),
        ("pytorch_model.bin.index.json", "pytorch_model.bin"),
    ):
        safetensors = usual.endswith("safetensors")
        if usual in names:
            return Weights((folder / usual,), safetensors)
        if index in names:
            found = _by_index(folder / index, names, safetensors)
            # An index may be left over from a conversion whose shards were deleted.
            if found.files or (found.problem and not _others(names, ".bin" if safetensors else ".safetensors")):
                return found
    for ending in (".safetensors", ".bin", ".pt"):
        others = _others(names, ending)
        if others:
            return _without_index(folder, others, ending == ".safetensors")
    return None


def _others(names: frozenset[str], ending: str) -> list[str]:
    return sorted(n for n in names if n.endswith(ending) and not _NO_WEIGHTS.match(n) and not n.startswith("."))


def _by_index(path: Path, names: frozenset[str], safetensors: bool) -> Weights:
    """Shards that an index names. A name that leads out of the folder is refused."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_INDEX + 1)
        if len(data) > MAX_INDEX or data.count(b'":') > 1_000_000:
            return Weights((), safetensors, f"{path.name} is too long to be an index.")
        index = msgspec.json.decode(data, type=_Index)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        return Weights((), safetensors, f"{path.name} cannot be read: {error}.")
    shards = sorted(set(index.weight_map.values()))
    for shard in shards:
        if not shard or "/" in shard or "\\" in shard or ":" in shard or shard.startswith(".") or "\0" in shard:
            return Weights((), safetensors, f"{path.name} names {shard[:80]!r}, which is not a file of this folder.")
    missing = [shard for shard in shards if shard not in names]
    problem = ""
    if missing:
        problem = f"{len(missing)} of its {len(shards)} parts are missing, such as {missing[0][:80]}."
    try:
        total = msgspec.json.decode(index.metadata.get("total_size", b"0"), type=int)
    except msgspec.MsgspecError:
        total = 0  # some tools write 1.0e10; the files tell as well
    return Weights(
        tuple(path.with_name(s) for s in shards if s in names), safetensors, problem, total if 0 <= total < 2**62 else 0
    )


def _without_index(folder: Path, names: list[str], safetensors: bool) -> Weights:
    """Files that no index orders: one complete numbered set, else the single file, else the largest family."""
    families: dict[tuple[str, int], list[str]] = {}
    for name in names:
        match = _SHARD.fullmatch(name)
        key = (match["stem"], int(match["parts"])) if match else (name, 1)
        families.setdefault(key, []).append(name)

    def size(family: list[str]) -> int:
        return sum(s for s, _ in _stats(tuple(folder / name for name in family)))

    # Several single files are alternatives (another precision): the largest is the model.
    (_, parts), chosen = max(families.items(), key=lambda item: (size(item[1]), item[0]))
    problem = f"{parts - len(chosen)} of its {parts} parts are missing." if len(chosen) < parts else ""
    return Weights(tuple(folder / name for name in chosen), safetensors, problem)


def _tensors(weights: Weights) -> tuple[list[SafetensorsTensor], str]:
    """All tensors of the safetensors files, and the first thing that is wrong with them."""
    tensors: list[SafetensorsTensor] = []
    problem = ""
    if not weights.safetensors:
        return tensors, problem
    for path in weights.files:
        try:
            header = read_safetensors_header(path, complete=False)
        except WeftError as error:
            problem = problem or error.message
            continue
        if header.missing:
            problem = problem or f"{path.name} is truncated: {header.missing:,} bytes are missing at its end."
        tensors.extend(header.tensors)
    return tensors, problem


def _stats(files: tuple[Path, ...]) -> list[tuple[int, float]]:
    result: list[tuple[int, float]] = []
    for path in files:
        try:
            status = path.stat()
        except OSError:
            continue  # a link to nowhere; the header's reader says so
        result.append((status.st_size, status.st_mtime))
    return result
