"""Models that are read for their logits alone: through Transformers or llama.cpp, on the processor, in float32 where memory allows."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from app.core.errors import ErrorKind, WeftError

_LOGITS = 32 * 1024 * 1024  # bytes of logits that are taken at a time
Progress = Callable[[str, float, float], None]


class Side(ABC):
    """One model.

    Attributes:
        vocabulary: how many logits a prediction has. context: tokens that the model was made for; 0 when it does not say.
        notes: sentences worth showing. stack: what keeps its adapters alive.
    """

    vocabulary = 0
    context = 0

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.stack: Any = None

    @property
    def rows(self) -> int:
        """Predictions that are taken at a time."""
        return max(1, min(128, _LOGITS // (4 * max(1, self.vocabulary))))

    @abstractmethod
    def tokenize(self, text: str) -> list[int]:
        """Tokens of a text, with what this tokenizer puts before texts."""

    @abstractmethod
    def read(self, tokens: list[int], rows: int) -> Iterator[Any]:
        """Read tokens from an empty cache. Yields float32 logits [up to `rows`, vocabulary], valid until the next."""

    @abstractmethod
    def close(self) -> None:
        """Give the memory back."""


class TransformersSide(Side):
    """A folder of safetensors or .bin files.

    Args:
        free: bytes of memory that it may take; with less than float32 needs it keeps its own precision.
        packing: of a folder that GPTQ, AWQ or HQQ has packed: makes what reads it, of its weight files and its config.

    Attributes:
        model: for a live stack.
    """

    def __init__(
        self,
        folder: Path,
        free: int,
        progress: Progress,
        cancelled: Callable[[], bool],
        packing: Callable[[list[Path], dict[str, Any]], Any] | None = None,
    ) -> None:
        super().__init__()
        os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1")
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        import torch

        from app.generation import hf_files, hf_load
        from app.generation.hf_decode import Decoder

        forms = [f for f in ("safetensors", "bin") if any((folder / t[f]).is_file() for t in (hf_files.SINGLES, hf_files.INDEXES))]  # fmt: skip
        lone = sorted(folder.glob("*.safetensors"))[:1] if packing is not None and not forms else []
        self._stage = hf_files.Stage(folder, forms[0] if forms else "safetensors", lone[0] if lone else None)
        try:
            config = hf_load.read_config(self._stage.path, False)
            plan = hf_load.Plan(
                folder=self._stage.path, weights=self._stage.weights, form=(forms or ["safetensors"])[0]
            )
            if packing is not None:
                plan.packed, plan.packing = True, packing(plan.weights, self._stage.config)
            own = hf_load.checkpoint_dtype(config, plan.weights, plan.form)
            size = sum(path.stat().st_size for path in plan.weights)
            if free and size * (4 // own.itemsize) > free:
                plan.dtype = torch.bfloat16 if own is torch.float16 else own
                self.notes.append(
                    f"{folder.name} was computed in {str(plan.dtype).removeprefix('torch.')}, since memory is short: part of "
                    "the difference is rounding."
                )
            self.model: Any = hf_load.load_model(
                config, plan, lambda p: progress(f"Loading {folder.name}", p.done, p.total), cancelled
            )
            import transformers

            try:
                self._tokenizer: Any = transformers.AutoTokenizer.from_pretrained(
                    self._stage.path, local_files_only=True
                )
            except Exception as error:  # every tokenizer class fails in its own way
                raise WeftError(
                    ErrorKind.CORRUPT,
                    f"The tokenizer of {folder.name} cannot be read: {str(error)[:200]}",
                    "Download the tokenizer files again.",
                ) from error
        except BaseException:
            self._stage.close()
            raise
        text = config.get_text_config(decoder=True)
        self.vocabulary = int(text.vocab_size)
        self.context = int(getattr(text, "max_position_embeddings", 0) or 0)
        self._decoder: Any = Decoder(self.model, torch.device("cpu"))

    def tokenize(self, text: str) -> list[int]:
        tokens: list[int] = self._tokenizer(text, add_special_tokens=True)["input_ids"]
        eos = self._tokenizer.eos_token_id
        return tokens[:-1] if tokens and tokens[-1] == eos else tokens  # some tokenizers close every text

    def read(self, tokens: list[int], rows: int) -> Iterator[Any]:
        decoder = self._decoder
        decoder.reset()
        if not decoder.croppable:  # recurrent: a whole text at once
            whole = decoder.rows(tokens).float().numpy()
            for at in range(0, len(tokens), rows):
                yield whole[at : at + rows]
        else:
            for at in range(0, len(tokens), rows):
                yield decoder.rows(tokens[at : at + rows]).float().numpy()
        decoder.reset()

    def close(self) -> None:
        self._decoder.close()
        self.model = self._decoder = self.stack = None
        self._stage.close()


class LlamaSide(Side):
    """A GGUF file.

    Args:
        window: tokens that are read together at most.

    Attributes:
        library, model, context_pointer: for a live stack.
    """

    def __init__(self, path: Path, window: int, progress: Progress, cancelled: Callable[[], bool]) -> None:
        super().__init__()
        import llama_cpp

        from app.core.formats import read_gguf_header
        from app.generation import llama_machine
        from app.generation.llama_context import LlamaContext
        from app.generation.llama_log import library_log
        from app.generation.llama_model import LlamaModel, parts_of
        from app.generation.llama_options import Options
        from app.generation.llama_params import context_params

        for part in parts_of(path):
            read_gguf_header(part)  # our own bounded look before the library's
        self.library: Any = llama_cpp
        self.log = library_log(self.library)
        llama_cpp.llama_backend_init()
        options = Options(n_ctx=max(8, window), flash_attention="off", cache_type_k="f32", cache_type_v="f32", cpu=True)

        def advance(done: float) -> bool:
            progress(f"Loading {path.name}", done, 1.0)
            return not cancelled()

        self.path = path
        self.model = LlamaModel(llama_cpp, self.log, path, options, advance)
        shape = self.model.shape
        self.vocabulary, self.context = shape.vocabulary, shape.context
        parameters = context_params(
            llama_cpp, self.model, options, context=max(8, window), cores=llama_machine.physical_cores()
        )
        pointer = llama_cpp.llama_init_from_model(self.model.pointer, parameters)
        if not pointer:
            reason = self.log.reason()
            self.model.close()
            raise WeftError(
                ErrorKind.OUT_OF_MEMORY,
                f"llama.cpp could not make room for {window} tokens: {reason or 'no reason given'}.",
                "Choose a smaller --window, or close other programs.",
            )
        self._context = LlamaContext(llama_cpp, pointer, chunk=options.n_batch, rows=parameters.n_outputs_max)

    @property
    def context_pointer(self) -> Any:
        return self._context.pointer

    @property
    def rows(self) -> int:
        return min(super().rows, self._context.rows)

    def tokenize(self, text: str) -> list[int]:
        return self.model.with_bos(self.model.tokenize(text, special=False))

    def read(self, tokens: list[int], rows: int) -> Iterator[Any]:
        context = self._context
        context.clear()
        for at in range(0, len(tokens), rows):
            found = context.logits(tokens[at : at + rows], 0)
            if found is None:
                raise WeftError(ErrorKind.CANCELLED, "Cancelled.")
            yield found
        context.clear()

    def close(self) -> None:
        self._context.close()
        self.model.close()
