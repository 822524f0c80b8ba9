"""Adapter tensors as torch sees them, read from our own look at the headers; pickled files only after a scan."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from app.adapters.conversion_cache import cache_folder
from app.core import pickle_scan
from app.core.adapter_config import AdapterConfig
from app.core.adapter_file import AdapterFile, adapter_from_tensors, locate, read_adapter_file
from app.core.errors import ErrorKind, WeftError
from app.core.tensor_info import TensorInfo, read_tensor

if TYPE_CHECKING:
    from app.adapters.from_gguf import HfBase

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


class OpenAdapter(NamedTuple):
    """An adapter whose tensors can be read. `read` gives float32, on the CPU, never NaN or infinite.

    `notes`: sentences about what of it was left out before anybody looked at a model.
    """

    file: AdapterFile
    read: Callable[[TensorInfo], torch.Tensor]
    notes: tuple[str, ...] = ()


def open_adapter(path: Path, alpha: float | None = None, model: Any = None) -> OpenAdapter:
    """Open a PEFT folder or a lone .safetensors, .bin or .pt file; with a model, a GGUF adapter too.

    Args:
        alpha: for adapters that do not say it.
        model: the transformers model that it is for: a GGUF adapter is converted to its names and the order of its rows.

    Raises:
        WeftError: NOT_FOUND, CORRUPT, HOSTILE (a pickle that would run code), UNSUPPORTED, BAD_INPUT (alpha unknown).
    """
    if path.suffix.lower() == ".gguf" and model is not None:
        from app.adapters import from_gguf

        folder, notes = from_gguf.converted(path, _base_of(model), cache_folder())
        made = read_adapter_file(folder)
        made.path = path  # what is said of it names the file that the person chose
        check_usable(made)
        return OpenAdapter(made, _from_file, tuple(notes))
    if path.suffix.lower() == ".gguf":
        raise WeftError(
            ErrorKind.UNSUPPORTED,
            f"{path.name} is an adapter in llama.cpp's format, which Transformers cannot use.",
            "Use the PEFT folder that it was made from, or a GGUF model with the llama.cpp loader.",
        )
    config, weights = locate(path)
    try:
        opened = OpenAdapter(read_adapter_file(path, alpha), _from_file)
    except WeftError as error:
        if weights.suffix == ".safetensors" or error.kind is not ErrorKind.UNSUPPORTED:
            raise
        opened = _with_torch(path, config, weights, alpha)
    check_usable(opened.file)
    return opened


def _with_torch(path: Path, config: AdapterConfig, weights: Path, alpha: float | None) -> OpenAdapter:
    """A pickled file of a kind that only torch itself reads."""
    import msgspec

    tensors = _unpickle(weights)
    infos = [
        TensorInfo(name, str(t.dtype), tuple(t.shape), weights, 0, t.numel() * t.element_size())
        for name, t in tensors.items()
    ]
    if config.alpha is None:
        config = msgspec.structs.replace(config, alpha=alpha)
    return OpenAdapter(
        adapter_from_tensors(path, config, infos), lambda info: _finite(tensors[info.name].float(), info)
    )


def _base_of(model: Any) -> HfBase:
    """A loaded model as `from_gguf` has to know it."""
    from app.adapters.base_torch import sizes
    from app.adapters.from_gguf import hf_base

    config = model.config.get_text_config(decoder=True)
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    modules: list[tuple[str, int]] = []
    for name, module in model.named_modules():
        if name and (size := sizes(module)) is not None:
            modules.append((name, size[0]))
    return hf_base(config.model_type, heads, kv_heads, modules)


def check_usable(file: AdapterFile) -> None:
    """Raise what stands against using an adapter at all."""
    if file.problems:
        raise WeftError(
            ErrorKind.CORRUPT, f"{file.path.name} cannot be used. {file.problems[0]}", "Get the adapter again."
        )
    if file.needs_alpha:
        raise WeftError(
            ErrorKind.BAD_INPUT,
            f"{file.path.name} does not say its alpha.",
            "Put an adapter_config.json with lora_alpha beside it (often alpha is the rank, or twice the rank).",
        )


def _from_file(info: TensorInfo) -> torch.Tensor:
    dtype = _DTYPES.get(info.type)
    if dtype is None:
        raise WeftError(
            ErrorKind.UNSUPPORTED,
            f"{info.file.name} holds {info.name[:80]} as {info.type}, which no adapter is computed in.",
            "Save the adapter in float32, float16 or bfloat16.",
        )
    data = bytearray(read_tensor(info))  # PyTorch wants memory that could be written to
    return _finite(torch.frombuffer(data, dtype=dtype).reshape(info.shape).float(), info)


def _finite(tensor: torch.Tensor, info: TensorInfo) -> torch.Tensor:
    if not torch.isfinite(tensor).all():
        raise WeftError(
            ErrorKind.CORRUPT,
            f"{info.file.name} holds values that are no numbers (NaN or infinity) in {info.name[:80]}.",
            "Get the adapter again, or train it anew with a lower learning rate.",
        )
    return tensor


def _unpickle(weights: Path) -> dict[str, torch.Tensor]:
    pickle_scan.check(weights)
    try:
        loaded: Any = torch.load(weights, map_location="cpu", weights_only=True)
    except (RuntimeError, ValueError, EOFError, OSError) as error:
        raise WeftError(ErrorKind.CORRUPT, f"{weights.name} is damaged: {str(error)[:200]}", "Get it again.") from error
    if not isinstance(loaded, dict) or not all(
        isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in loaded.items()
    ):
        raise WeftError(ErrorKind.CORRUPT, f"{weights.name} is no file of named tensors.", "Get it again.")
    return loaded
