"""Adapters: PEFT folders and lone files, from their configs and headers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, cast

from app.core.adapter_config import AdapterConfig
from app.core.adapter_file import WEIGHT_FILES
from app.core.adapter_note import read_note
from app.core.errors import ErrorKind, WeftError
from app.core.formats import JsonObject, SafetensorsTensor, read_json, read_safetensors_header
from app.core.library import AdapterEntry, AdapterFormat
from app.core.model_config import number, read_start, table, text
from app.core.torch_header import TorchTensor, read_torch_header

_PARTS = re.compile(
    r"(?:base_model\.model\.)?(?P<module>.+?)\.(?:lora_(?P<side>A|B|a|b|up|down|embedding_A|embedding_B|magnitude_vector)"
    r"|hada_w\d_\w|lokr_w\d\w*|dora_scale|lora_mid|alpha)(?:\.[\w-]+)*$"
)
_IMAGE_KEYS = re.compile(
    r"^(lora_unet|lora_te\d?|lora_transformer|unet\.|text_encoder|transformer\.transformer_blocks)"
)
_KINDS = {
    "LORA": "LoRA",
    "ADALORA": "AdaLoRA",
    "LOHA": "LoHa",
    "LOKR": "LoKr",
    "IA3": "IA³",
    "VERA": "VeRA",
    "OFT": "OFT",
    "BOFT": "BOFT",
    "FOURIERFT": "FourierFT",
    "XLORA": "X-LoRA",
    "HRA": "HRA",
    "BONE": "Bone",
    "MISS": "MiSS",
    "RANDLORA": "RandLora",
    "SHIRA": "SHiRA",
    "C3A": "C3A",
    "PROMPT_TUNING": "Prompt tuning",
    "PREFIX_TUNING": "Prefix tuning",
    "P_TUNING": "P-tuning",
    "LN_TUNING": "LayerNorm tuning",
    "TRAINABLE_TOKENS": "Trainable tokens",
}


def peft_adapter(folder: Path) -> AdapterEntry | None:
    """The adapter in a folder with adapter_config.json; None when there is no such file."""
    config_path = folder / "adapter_config.json"
    if not config_path.is_file():
        return None
    problem = ""
    try:
        config = read_json(config_path)
    except WeftError as error:
        config, problem = {}, error.message
    weights = next((p for n in WEIGHT_FILES if (p := folder / n).is_file()), None)
    header: _Header | None = None
    if weights is None:
        problem = problem or "Its weights (adapter_model.safetensors) are missing."
    else:
        header, damage = _header(weights)
        problem = problem or damage
    if not problem and AdapterConfig(init=text(config, "init_lora_weights")).needs_changed_base:
        problem = f"It began as {text(config, 'init_lora_weights')[:32]} and was saved without being converted for the plain base."
    modules = _modules(tensor.name for tensor in header.tensors) if header else {}
    targets = _config_targets(config) or tuple(modules)
    status = weights.stat() if weights else config_path.stat()
    note = read_note(folder)
    mlx = table(config, "lora_parameters") if "peft_type" not in config else {}
    rank = max([_config_rank(config), number(mlx, "rank"), _header_rank(header) if header else 0])
    alpha = _alpha(mlx.get("scale")) * rank if mlx else _alpha(config.get("lora_alpha", config.get("alpha")))
    return AdapterEntry(
        id=str(folder),
        name=folder.name,
        path=str(folder),
        format=AdapterFormat.PEFT,
        kind=_config_kind(config),
        base=text(config, "model") if mlx else text(config, "base_model_name_or_path"),
        rank=rank,
        alpha=alpha,
        targets=targets,
        bytes=status.st_size if weights else 0,
        files=(str(weights),) if weights else (),
        problem=problem,
        modified=status.st_mtime,
        needs_alpha=not problem and bool(modules) and not _says_alpha(config, mlx, header),
        source=note.source,
        run=note.run,
    )


def _says_alpha(config: JsonObject, mlx: JsonObject, header: _Header | None) -> bool:
    said = mlx.get("scale") if mlx else config.get("lora_alpha", config.get("alpha"))
    if isinstance(said, (int, float)) and not isinstance(said, bool):
        return True
    if header is None:
        return False
    return any(name.endswith(".alpha") for name in (t.name for t in header.tensors)) or bool(
        _text_number(_first(header.metadata, "lora_alpha", "alpha", "ss_network_alpha"))
    )


def _config_kind(config: JsonObject) -> str:
    kind = text(config, "peft_type").upper()
    name = _KINDS.get(kind, text(config, "peft_type")[:32] or "LoRA")
    if kind in ("", "LORA"):
        if config.get("use_dora") is True:
            return "DoRA"
        if not kind and text(config, "fine_tune_type").lower() in ("dora", "full"):  # MLX
            return "DoRA" if text(config, "fine_tune_type").lower() == "dora" else "full weights"
        if config.get("use_rslora") is True:
            return "rsLoRA"
    return name


def _config_rank(config: JsonObject) -> int:
    pattern = table(config, "rank_pattern")
    return max([number(config, "r", "init_r", "rank"), *(number(pattern, key) for key in pattern)])


def _config_targets(config: JsonObject) -> tuple[str, ...]:
    value = config.get("target_modules")
    if not isinstance(value, list):
        return ()  # a regular expression; the tensors' names tell what it matched
    return tuple(
        sorted({str(item).rpartition(".")[2] for item in cast("list[object]", value) if isinstance(item, str)})
    )


def _alpha(value: object) -> float:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e9 else 0.0


def lone_adapter(path: Path) -> AdapterEntry | None:
    """The adapter in a lone `.safetensors`, `.bin` or `.pt` file; None when it holds anything else."""
    metadata: Mapping[str, str] = {}
    if path.suffix == ".safetensors":
        header, problem = _header(path)
        if header is None:
            return None
        modules = _modules(tensor.name for tensor in header.tensors)
        names = [tensor.name for tensor in header.tensors]
        rank, metadata, kind = _header_rank(header), header.metadata, AdapterFormat.SAFETENSORS
    else:
        names = pickled_names(path)
        header, problem = _header(path) if names else (None, "")
        names = [tensor.name for tensor in header.tensors] if header else names
        modules = _modules(names)
        rank, kind = _header_rank(header) if header else 0, AdapterFormat.TORCH_BIN
    # Full models hold other tensors too; adapters of image generators are of no use here.
    strange = sum(1 for name in names if not _PARTS.match(name))
    if not modules or strange > len(names) // 2 or any(_IMAGE_KEYS.match(name) for name in names[:50]):
        return None
    status = path.stat()
    magnitudes = any("lora_magnitude_vector" in name or name.endswith("dora_scale") for name in names)
    other = next((k for part, k in ((".hada_w", "LoHa"), (".lokr_w", "LoKr")) if any(part in n for n in names)), "LoRA")
    return AdapterEntry(
        id=str(path),
        name=path.stem,
        path=str(path),
        format=kind,
        kind="DoRA" if magnitudes and other == "LoRA" else other,
        base=_first(metadata, "base_model_name_or_path", "base_model", "ss_base_model_version", "ss_sd_model_name"),
        rank=rank,
        alpha=_text_number(_first(metadata, "lora_alpha", "alpha", "ss_network_alpha")),
        targets=tuple(modules),
        bytes=status.st_size,
        files=(str(path),),
        problem=problem,
        modified=status.st_mtime,
        needs_alpha=not _text_number(_first(metadata, "lora_alpha", "alpha", "ss_network_alpha"))
        and not any(name.endswith(".alpha") for name in names),
    )


class _Header(NamedTuple):
    """What a weight file's header tells, whatever its format."""

    tensors: Sequence[SafetensorsTensor | TorchTensor]
    metadata: Mapping[str, str]


def _header(path: Path) -> tuple[_Header | None, str]:
    if path.suffix != ".safetensors":
        return _pickled(path)
    try:
        header = read_safetensors_header(path, complete=False)
    except WeftError as error:
        return None, error.message
    if header.missing:
        return _Header(header.tensors, header.metadata), (
            f"{path.name} is truncated: {header.missing:,} bytes are missing at its end."
        )
    return _Header(header.tensors, header.metadata), ""


def _pickled(path: Path) -> tuple[_Header | None, str]:
    try:
        return _Header(read_torch_header(path), {}), ""
    except WeftError as error:
        # What only torch reads may be good all the same; it is looked at when it is used.
        return None, "" if error.kind is ErrorKind.UNSUPPORTED else error.message


def _modules(names: Iterable[str]) -> dict[str, None]:
    """Short names of the modules that LoRA tensors belong to, sorted."""
    found = {match["module"].rpartition(".")[2] for name in names if (match := _PARTS.match(name))}
    return dict.fromkeys(sorted(found))


def _header_rank(header: _Header) -> int:
    """The largest rank by the shapes of the A matrices: (rank, in); of embeddings (rank, vocabulary)."""
    rank = 0
    for tensor in header.tensors:
        match = _PARTS.match(tensor.name)
        if match and match["side"] in ("A", "down", "embedding_A") and len(tensor.shape) >= 2:
            rank = max(rank, tensor.shape[0])
        elif match and match["side"] == "a" and len(tensor.shape) == 2:  # MLX: (in, rank)
            rank = max(rank, tensor.shape[1])
    return rank


def _first(metadata: Mapping[str, str], *keys: str) -> str:
    return next((metadata[key] for key in keys if metadata.get(key)), "")


def _text_number(value: str) -> float:
    try:
        return _alpha(float(value)) if value else 0.0
    except ValueError:
        return 0.0


def pickled_names(path: Path, limit: int = 8 * 1024 * 1024) -> list[str]:
    """LoRA tensor names in a pickled file, without unpickling: its strings that look like them.

    torch writes the pickle first into its archive, uncompressed.
    """
    data = read_start(path, limit)
    if data[:2] != b"PK" and data[:1] != b"\x80":
        return []
    found: list[str] = []
    for match in re.finditer(rb"X(..\x00\x00)([\x21-\x7e]{4,512})", data):
        length = int.from_bytes(match[1], "little")
        name = match[2][:length]
        if len(name) == length and b"." in name:
            found.append(name.decode("ascii"))
    return found if any("lora_" in name for name in found) else []
