"""A model folder, with adapters merged in on the way, through llama.cpp's own converter: no merged copy on disk."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from app.adapters.gguf_source import converter
from app.core.errors import ErrorKind, WeftError

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


def model_of(
    folder: Path, config: dict[str, Any], heads: Iterable[Any], kind: str, *, name: str, pre_tokenizer: str = ""
) -> Any:
    """A `conversion` model of this folder whose tensors are `heads`, ready to be written.

    Args:
        folder: config, tokenizer, template and card; no weights are looked for.
        heads: of `merged_tensors`: name, dtype, shape, and chunks of little-endian bytes.
        kind: f32, f16, bf16, q8_0, tq1_0, tq2_0, or `auto` for the 16-bit type next to the model's own.

    Raises:
        WeftError: UNSUPPORTED when llama.cpp does not know the architecture or the tokenizer; ENVIRONMENT.
    """
    conversion = converter()
    import gguf  # the converter's own, from here on

    base = conversion.ModelBase
    types = {
        "f32": gguf.LlamaFileType.ALL_F32,
        "f16": gguf.LlamaFileType.MOSTLY_F16,
        "bf16": gguf.LlamaFileType.MOSTLY_BF16,
        "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
        "tq1_0": gguf.LlamaFileType.MOSTLY_TQ1_0,
        "tq2_0": gguf.LlamaFileType.MOSTLY_TQ2_0,
        "auto": gguf.LlamaFileType.GUESSED,
    }
    hparams = base.load_hparams(folder, False)
    architecture = str(conversion.get_model_architecture(hparams, conversion.ModelType.TEXT))
    try:
        known = conversion.get_model_class(architecture)
    except NotImplementedError as error:
        raise WeftError(
            ErrorKind.UNSUPPORTED,
            f"llama.cpp's converter does not know the architecture {architecture}.",
            "Merge into safetensors instead; a newer llama.cpp may know it.",
        ) from error
    lazy = conversion.base.LazyTorchTensor
    sources = list(heads)

    def index_tensors(self: Any, remote_hf_model_id: str | None = None) -> dict[str, Callable[[], Any]]:
        found: dict[str, Callable[[], Any]] = {}
        for head in sources:
            kept = self.filter_tensors((head.name, _lazily(lazy, head)))
            if kept:
                found[kept[0]] = kept[1]
        return found

    members: dict[str, Any] = {"index_tensors": index_tensors, "model_arch": known.model_arch}
    if pre_tokenizer:
        members["get_vocab_base_pre"] = lambda self, tokenizer: pre_tokenizer
    made = type(known.__name__, (known,), members)
    return made(
        folder,
        types[kind],
        folder / "nowhere.gguf",
        model_name=name or None,
        hparams=_as_expected({**hparams, **config}),
    )


def _as_expected(hparams: dict[str, Any]) -> dict[str, Any]:
    """The converter reads keys of old configs that today's transformers no longer writes."""
    if "n_positions" in hparams:
        hparams.setdefault("n_ctx", hparams["n_positions"])
    return hparams


def _lazily(lazy: Any, head: Any) -> Callable[[], Any]:
    dtype = _DTYPES[head.dtype]

    def made() -> Any:
        meta = lazy.meta_with_dtype_and_shape(dtype, tuple(head.shape))
        # Not as an argument: the converter would take the tuple apart.
        return lazy(meta=meta, args=(), func=lambda: _read(head))

    return made


def _read(head: Any) -> torch.Tensor:
    data = bytearray()
    for piece in head.tensor.chunks():
        data += piece
    if not data:
        return torch.empty(tuple(head.shape), dtype=_DTYPES[head.dtype])
    return torch.frombuffer(data, dtype=_DTYPES[head.dtype]).reshape(tuple(head.shape))


def refusal(error: Exception) -> WeftError | None:
    """What the converter means by an exception, in words; None for what is not its refusal."""
    text = str(error)
    if isinstance(error, NotImplementedError) and "pre-tokenizer" in text:
        return WeftError(
            ErrorKind.UNSUPPORTED,
            "llama.cpp does not recognise how this model's tokenizer splits text.",
            "If you know which of llama.cpp's it is, name it with --pre-tokenizer (such as llama-bpe or qwen2).",
        )
    if isinstance(error, FileNotFoundError):
        return WeftError(
            ErrorKind.NOT_FOUND,
            f"The model lacks {Path(str(error.filename or text)).name}.",
            "Download the whole model again.",
        )
    last = traceback.extract_tb(error.__traceback__)[-1]
    if {"conversion", "gguf"} & set(Path(last.filename).parts):  # else it is a defect of ours
        said = text or f"it expects {last.line or last.name}"
        return WeftError(
            ErrorKind.UNSUPPORTED,
            f"llama.cpp's converter cannot take this model: {type(error).__name__}, {said[:300]}.",
            "Merge into safetensors instead.",
        )
    return None
