"""A live adapter stack in llama.cpp: what to convert, what to load, what to let go."""

from __future__ import annotations

import ctypes
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from app.adapters.conversion_cache import cache_folder
from app.adapters.hf_stack import signature
from app.adapters.to_gguf import Base, base_of, converted, read_array
from app.core.adapter_file import read_adapter_file
from app.core.errors import ErrorKind, WeftError
from app.core.formats import read_gguf_header
from app.core.recognise_gguf import parts_of
from app.core.stack import AdapterStack


class LlamaStack:
    """The adapters of one loaded GGUF model.

    Args:
        library: the llama_cpp module. model, context: its pointers, which stay their owner's.
        path: the model's (first) file. reason: what the library last logged.
    """

    def __init__(self, library: Any, model: Any, context: Any, path: Path, reason: Callable[[], str]) -> None:
        self._library, self._model, self._context, self._reason = library, model, context, reason
        self._base: Base = base_of([read_gguf_header(part) for part in parts_of(path)[0]])
        self._loaded: dict[str, Any] = {}
        self._weights: dict[str, float] = {}
        self._deep: dict[str, bool] = {}  # whether an adapter touches what comes before the output head

    def set(self, stack: AdapterStack, progress: Callable[[str, float, float], None]) -> tuple[bool, list[str]]:
        """Replace the whole stack. Adapters that stay are not read again; one whose file changed is.

        Returns:
            Whether the KV cache went stale, and sentences worth showing.

        Raises:
            WeftError: when an adapter cannot be used; then the stack is what it was.
        """
        notes: list[str] = []
        weights: dict[str, float] = {}
        added: list[str] = []
        try:
            for number, adapter in enumerate(stack.adapters):
                if not math.isfinite(adapter.weight):
                    raise WeftError(
                        ErrorKind.BAD_INPUT,
                        f"The weight of {adapter.name or adapter.path} is no number.",
                        "Set a number.",
                    )
                path = Path(adapter.path)
                key = f"{path}\0{signature(path)}"
                weights[key] = weights.get(key, 0.0) + adapter.weight
                if key not in self._loaded:
                    progress(f"Reading {adapter.name or path.name}", number, len(stack.adapters))
                    self._loaded[key], self._deep[key], said = self._open(path)
                    added.append(key)
                    notes += said
        except BaseException:
            for key in added:
                self._library.llama_adapter_lora_free(self._loaded.pop(key))
                del self._deep[key]
            raise
        before, self._weights = self._cached(), {key: weight for key, weight in weights.items() if weight}
        stale = before != self._cached()
        self._apply()
        for key in [key for key in self._loaded if key not in weights]:
            self._library.llama_adapter_lora_free(self._loaded.pop(key))
            del self._deep[key]
        return stale, notes

    def _cached(self) -> dict[str, float]:
        """The weights that what is in the KV cache was computed with: the output head comes after all of it."""
        return {key: weight for key, weight in self._weights.items() if self._deep[key]}

    def _apply(self) -> None:
        library = self._library
        keys = sorted(self._weights)
        count = max(1, len(keys))
        pointers = (library.llama_adapter_lora_p_ctypes * count)(*[self._loaded[key] for key in keys])
        scales = (ctypes.c_float * count)(*[self._weights[key] for key in keys])
        if library.llama_set_adapters_lora(self._context, pointers, len(keys), scales):
            raise WeftError(ErrorKind.INTERNAL, "llama.cpp did not take the adapters.", "Load the model again.")

    def check(self, stack: AdapterStack) -> None:
        """Raise WeftError where `set` would, without adding anything to the model."""
        for adapter in stack.adapters:
            path = Path(adapter.path)
            if f"{path}\0{signature(path)}" not in self._loaded:
                self._file(path)

    def _file(self, path: Path) -> tuple[Path, list[str]]:
        """The GGUF file that the library reads, made where the adapter is of another format; and notes."""
        if path.suffix.lower() == ".gguf":
            self._check(path)
            return path, []
        return converted(path, self._base, cache_folder())

    def _open(self, path: Path) -> tuple[Any, bool, list[str]]:
        """An adapter as the library has it, whether it is more than one of the output head, and notes."""
        file, notes = self._file(path)
        pointer = self._library.llama_adapter_lora_init(self._model, os.fsencode(file))
        if not pointer:
            raise WeftError(
                ErrorKind.UNSUPPORTED,
                f"llama.cpp cannot use {path.name} with this model: {self._reason() or 'it gave no reason'}.",
                "Choose the model that the adapter was made for.",
            )
        deep = any(not tensor.name.startswith("output.") for tensor in read_gguf_header(file).tensors)
        return pointer, deep, notes

    def _check(self, path: Path) -> None:
        """Our own look at a GGUF adapter before the library sees it: bad ones abort it."""
        found = read_adapter_file(path)  # raises for a damaged header
        name = path.name
        if found.problems:
            raise WeftError(ErrorKind.CORRUPT, f"{name} cannot be used. {found.problems[0]}", "Get the adapter again.")
        if found.architecture != self._base.architecture:
            raise WeftError(
                ErrorKind.UNSUPPORTED,
                f"{name} was made for the architecture {found.architecture or 'of no name'}, the model is {self._base.architecture}.",
                "Choose a model of that architecture.",
            )
        for module in found.modules.values():
            if module.name == "token_embd" and self._base.tied:
                raise WeftError(
                    ErrorKind.UNSUPPORTED,
                    f"{name} adapts the embedding, which is this model's output head too: llama.cpp would stop.",
                    "Use it with Transformers on the safetensors model.",
                )
            for lora in module.loras:
                size = (lora.inputs, lora.outputs) if lora.embedding else (lora.outputs, lora.inputs)
                if self._base.shapes.get(module.name) != size:
                    raise WeftError(
                        ErrorKind.UNSUPPORTED,
                        f"{name} does not fit this model: {module.name[:80]} is {size[0]}×{size[1]} in the adapter.",
                        "Choose the model that the adapter was made for.",
                    )
                for tensor in (lora.a, lora.b):
                    if tensor.type.upper() in ("F32", "F16", "BF16"):
                        read_array(tensor)  # raises for NaN, which llama.cpp would compute with in silence
