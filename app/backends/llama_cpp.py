"""llama.cpp: GGUF models through llama-cpp-python's low-level interface.

The library is imported inside methods: the window's process reads SPEC without it. (`import llama_cpp` there is the
library, not this file.) No torch and no transformers: this loader runs in an environment of its own.
"""

from __future__ import annotations

import importlib.metadata
import secrets
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from app.backends.base import Backend as BaseBackend
from app.backends.base import Capability, Spec
from app.core import memory
from app.core.errors import ErrorKind, WeftError
from app.core.library import ModelEntry, ModelFormat
from app.core.memory import Estimate, Machine
from app.core.options import build
from app.core.stack import AdapterStack
from app.engine.protocol import Generate, Generated, Load, Loaded, Score, Scored
from app.engine.reporting import Report
from app.generation import llama_rules
from app.generation.llama_options import Options
from app.generation.llama_sampler import FIELDS

# Architectures that llama.cpp loads, but that do not continue a text.
_NOT_GENERATING = {
    "bert": "makes embeddings, it does not write",
    "clip": "is a vision projector; load the model that it belongs to",
    "wavtokenizer-dec": "makes sound, it does not write",
    "t5": "translates a whole text at once, which chat cannot use",
    "t5encoder": "makes embeddings, it does not write",
    "dream": "writes by diffusion, which this loader cannot drive",
    "llada": "writes by diffusion, which this loader cannot drive",
    "llada-moe": "writes by diffusion, which this loader cannot drive",
}


def estimate(model: ModelEntry, options: Options, machine: Machine) -> Estimate:
    """Bytes that a load through llama.cpp takes. See core.memory for the arithmetic."""
    return memory.llama_estimate(model, machine, llama_rules.demand(options))


def refuses(model: ModelEntry) -> str:
    """Why llama.cpp cannot take this very model."""
    name = model.architecture or model.model_type
    if reason := _NOT_GENERATING.get(name) or (_NOT_GENERATING["bert"] if name.endswith("-bert") else ""):
        return f"A model of the architecture {name} {reason}."
    return ""


SPEC = Spec(
    id="llama_cpp",
    title="llama.cpp",
    summary="Runs GGUF models on the CPU and on most graphics cards, quantized and quick to load.",
    formats=frozenset({ModelFormat.GGUF}),
    environment="llamacpp",
    capabilities=frozenset({Capability.LORA, Capability.MULTI_LORA, Capability.TRAIN, Capability.PERPLEXITY}),
    options=Options,
    sampling=FIELDS,
    estimate=estimate,
    refuses=refuses,
    rank=10,
)


_NOT_BAKED = "llama.cpp adds adapters while it computes: they stay live instead of being baked in."


class Backend(BaseBackend):
    """Holds one GGUF model and one context of it."""

    def __init__(self) -> None:
        self._library: Any = None
        self._log: Any = None
        self._model: Any = None
        self._context: Any = None
        self._template: Any = None
        self._stack: Any = None
        self._copies: Any = None
        self._request: Load | None = None
        self._options = Options()
        self._prompts: Any = None
        self._answers = 0

    def libraries(self) -> dict[str, str]:
        names = ("llama-cpp-python", "numpy")
        return {name: importlib.metadata.version(name) for name in names}

    # Loading -------------------------------------------------------------------------------

    def load(self, request: Load, report: Report) -> None:
        from app.adapters.merged_copies import MergedCopies
        from app.generation import llama_machine, llama_open
        from app.generation.llama_files import check_files
        from app.generation.llama_model import parts_of
        from app.generation.llama_prompt import Prompts

        started = time.monotonic()
        self.unload()
        options = build(Options, request.options)
        llama_rules.check(options)
        parts = parts_of(Path(request.model.path))
        check_files(parts)
        if self._library is None:
            report.progress("Starting llama.cpp")
            self._library, self._log = llama_open.open_library(options)
        before = llama_machine.resident_memory()
        self._options = options
        self._prompts = Prompts()
        try:
            self._copies = MergedCopies(parts[0])
            copy = self._copy(request.adapters, report)
            notes, calibration = self._open(request, copy.file, report)
            self._template.wait_until_ready()
            self._request = msgspec.structs.replace(request, calibration=calibration)
            if request.adapters.adapters:
                notes += self._use(copy, request.adapters, report)
                notes += [_NOT_BAKED] if request.baked else []
        except BaseException:
            self.unload()
            raise
        report.loaded(
            Loaded(
                context=self._context.size,
                device=llama_open.device(self._library, self._log, self._context),
                memory=llama_open.measured_bytes(self._log, before, llama_machine.resident_memory()),
                seconds=time.monotonic() - started,
                has_template=bool(options.chat_template.strip() or self._model.template),
                notes=tuple(notes),
                calibration=calibration,
            )
        )

    def _open(self, request: Load, file: Path, report: Report) -> tuple[list[str], dict[str, int]]:
        """Load a file and make a context of it. Returns sentences worth showing, and what was measured."""
        from app.generation import llama_machine, llama_open

        library, log, entry = self._library, self._log, request.model
        if file != Path(entry.path):  # a merged copy may be larger than its base
            entry = msgspec.structs.replace(entry, weight_bytes=max(entry.weight_bytes, file.stat().st_size))
        options, vram = llama_open.place(library, entry, self._options)
        free = llama_machine.free_memory()
        self._model = model = llama_open.open_model(library, log, file, options, report)
        on_gpu = log.offloaded[0] > 0 and log.offloaded[0] == log.offloaded[1]
        template_notes = [] if self._template else self._open_template()  # its child starts while the context is made
        size, notes = llama_open.size_of_context(library, model, options, vram if on_gpu else free)
        report.progress("Making room for the context")
        self._context = llama_open.open_context(
            library, log, model, options, size=size, parameters=request.model.parameters
        )
        measured = llama_open.warm_up(library, self._context, model, options, request.calibration, report)
        return notes + template_notes, measured.calibration

    def _open_template(self) -> list[str]:
        from app.generation.template import DEFAULT_TEMPLATE, ChatTemplate

        source = self._options.chat_template.strip() or self._model.template
        if source.lower() == "chatml":
            source = DEFAULT_TEMPLATE
        bos, eos = self._model.special_text("bos"), self._model.special_text("eos")
        self._template = ChatTemplate(source or DEFAULT_TEMPLATE, bos, eos)
        self._template.warm()
        return [] if source else ["The file has no chat template; a plain one (ChatML) is used."]

    def set_adapters(self, adapters: AdapterStack, report: Report, *, baked: bool = False) -> None:
        self._require_model()
        if baked and adapters.adapters:
            report.log("warning", _NOT_BAKED)
        for note in self._set_stack(adapters, report):
            report.log("warning", note)

    def check_adapters(self, stacks: Sequence[AdapterStack], report: Report) -> None:
        self._require_model()
        for stack in stacks:
            # A merged copy that a stack needs is made now, and found again when its turn comes.
            self._live().check(self._copy(stack, report).live)

    def _live(self) -> Any:
        """The live part of the stack; empty when nothing has been added yet."""
        from app.adapters.llama_stack import LlamaStack

        if self._stack is None:
            pointers = self._model.pointer, self._context.pointer
            self._stack = LlamaStack(self._library, *pointers, self._model.path, self._log.reason)
        return self._stack

    def _set_stack(self, adapters: AdapterStack, report: Report) -> list[str]:
        """Replace the stack; what was read under another one is forgotten. Returns sentences worth showing."""
        copy = self._copy(adapters, report)
        before = self._model.path
        if copy.file == before:
            return self._use(copy, adapters, report)
        try:
            self._reopen(copy.file, report)
            return self._use(copy, adapters, report)
        except BaseException:
            # The stack stays what it was: so does the file.
            was = self.stack
            steady: Any = _Steady(report)
            self._reopen(before, steady)
            self._use(self._copy(was, steady), was, steady)
            raise

    def _copy(self, adapters: AdapterStack, report: Report) -> Any:
        """The file that serves a stack: the model's own, or a copy with what llama.cpp cannot add live."""
        from app.generation import llama_machine

        free = 0 if self._library.llama_supports_gpu_offload() else llama_machine.free_memory()
        held = self._model.bytes if self._model is not None else 0
        return self._copies.serve(
            adapters,
            int(0.8 * free) + held if free else 0,
            lambda done, total: report.progress("Merging a copy of the model", done, total, "bytes"),
            lambda: report.cancelled,
        )

    def _reopen(self, file: Path, report: Report) -> None:
        """Load another file of the same model in the place of the one that is loaded. The conversation stays."""
        assert self._request is not None
        size = self._context.size if self._context is not None else self._options.n_ctx
        self._stack = None
        if self._context is not None:
            self._context.close()
        if self._model is not None:
            self._model.close()
        self._context = self._model = None
        self._options = msgspec.structs.replace(self._options, n_ctx=size)
        self._open(self._request, file, report)

    def _use(self, copy: Any, adapters: AdapterStack, report: Report) -> list[str]:
        """Add what is live of a stack to the file that is loaded for it."""
        self._log.lines.clear()  # for its reason, if it refuses; where the model lies stays known
        stale, notes = self._live().set(copy.live, lambda phase, done, of: report.progress(phase, done, of, "adapters"))
        if stale:
            self._context.clear()
        self.stack = adapters
        return [*copy.notes, *notes]

    def unload(self) -> None:
        self._stack = None  # its adapters go with the model
        self._copies = self._request = None
        self.stack = AdapterStack()
        if self._template is not None:
            self._template.close()
            self._template = None
        if self._context is not None:
            self._context.close()
            self._context = None
        if self._model is not None:
            self._model.close()
            self._model = None
        self._prompts = None

    # Generating ----------------------------------------------------------------------------

    def generate(self, request: Generate, report: Report) -> Generated:
        from app.generation.llama_answer import answer, grammar_of

        self._require_model()
        if request.images:
            raise WeftError(ErrorKind.UNSUPPORTED, "llama.cpp takes no images in this version.", "Send the text alone.")
        grammar = grammar_of(request.sampling)
        seed = self._seed(request.sampling.seed)
        context = self._context
        context.abort.clear()
        report.on_cancel(context.abort.set)
        if report.cancelled:
            context.abort.set()
        prompt = self._prompts.prompt(self._model, self._template, request, context.size)
        return answer(
            self._library,
            self._model,
            context,
            self._prompts,
            prompt,
            request,
            report,
            grammar=grammar,
            seed=seed,
        )

    def _seed(self, wanted: int | None) -> int:
        if wanted is not None:
            return wanted
        if self._options.seed is None:
            return secrets.randbelow(2**32 - 1)
        seed = (self._options.seed + self._answers) % (2**32 - 1)
        self._answers += 1
        return seed

    # Perplexity ----------------------------------------------------------------------------

    def score(self, request: Score, report: Report) -> Scored:
        from app.generation.llama_score import score

        self._require_model()
        context = self._context
        context.abort.clear()
        report.on_cancel(context.abort.set)
        context.clear()
        try:
            return score(self._model, context, request, report.progress)
        finally:
            context.clear()

    def _require_model(self) -> None:
        if self._context is None:
            raise WeftError(ErrorKind.BAD_INPUT, "No model is loaded.", "Load a model first.")


class _Steady:
    """A report that cannot be cancelled: for going back to what was."""

    cancelled = False

    def __init__(self, report: Report) -> None:
        self.progress, self.log = report.progress, report.log

    def on_cancel(self, callback: Any) -> None:
        """Nothing: see above."""
