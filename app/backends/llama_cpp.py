"""llama.cpp: GGUF models through llama-cpp-python's low-level interface.

The library is imported inside methods: the window's process reads SPEC without it. (`import llama_cpp` there is the
library, not this file.) No torch and no transformers: this loader runs in an environment of its own.
"""

from __future__ import annotations

import importlib.metadata
import os
import secrets
import time
from collections import Counter
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
from app.generation import llama_options
from app.generation.llama_options import CACHE_BYTES, Options
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
    return memory.llama_estimate(model, machine, _demand(options))


def refuses(model: ModelEntry) -> str:
    """Why llama.cpp cannot take this very model."""
    name = model.architecture or model.model_type
    if reason := _NOT_GENERATING.get(name) or (_NOT_GENERATING["bert"] if name.endswith("-bert") else ""):
        return f"A model of the architecture {name} {reason}."
    return ""


def _demand(options: Options) -> memory.LlamaDemand:
    return memory.LlamaDemand(
        context=options.n_ctx,
        ubatch=options.ubatch,
        key_bytes=CACHE_BYTES[options.cache_type_k],
        value_bytes=CACHE_BYTES[options.cache_type_v],
        gpu_layers=0 if options.cpu else options.n_gpu_layers,
        cache_on_gpu=options.offload_kqv,
        full_window=options.swa_full,
        flash_attention=options.flash_attention != "off",
        repack=options.repack and not (options.no_mmap or options.direct_io),
    )


SPEC = Spec(
    id="llama_cpp",
    title="llama.cpp",
    summary="Runs GGUF models on the CPU and on most graphics cards, quantized and quick to load.",
    formats=frozenset({ModelFormat.GGUF}),
    environment="llamacpp",
    capabilities=frozenset({Capability.LORA, Capability.MULTI_LORA, Capability.PERPLEXITY}),
    options=Options,
    sampling=FIELDS,
    estimate=estimate,
    refuses=refuses,
    rank=10,
)


class _Said(msgspec.Struct, frozen=True):
    """A text that was read or written, and the tokens that spelt it then."""

    text: str
    tokens: list[int]


_NOT_BAKED = "llama.cpp adds adapters while it computes: they stay live instead of being baked in."
_REMEMBERED = 24  # texts; each answer adds its prompt, and itself once or twice


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
        self._said: list[_Said] = []
        self._answers = 0

    def libraries(self) -> dict[str, str]:
        names = ("llama-cpp-python", "numpy")
        return {name: importlib.metadata.version(name) for name in names}

    # Loading -------------------------------------------------------------------------------

    def load(self, request: Load, report: Report) -> None:
        from app.adapters.merged_copies import MergedCopies
        from app.generation import llama_machine
        from app.generation.llama_model import parts_of

        started = time.monotonic()
        self.unload()
        options = build(Options, request.options)
        llama_options.check(options)
        parts = parts_of(Path(request.model.path))
        _check_files(parts)
        path = parts[0]
        self._prepare(options, report)
        before = llama_machine.resident_memory()
        self._options = options
        try:
            self._copies = MergedCopies(path)
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
                device=self._device(),
                memory=self._measured(before, llama_machine.resident_memory()),
                seconds=time.monotonic() - started,
                has_template=bool(options.chat_template.strip() or self._model.template),
                notes=tuple(notes),
                calibration=calibration,
            )
        )

    def _prepare(self, options: Options, report: Report) -> None:
        """Import and initialise the library, once in this process."""
        if self._library is not None:
            return
        from app.generation.llama_log import library_log

        report.progress("Starting llama.cpp")
        os.environ.setdefault("GGML_NO_BACKTRACE", "1")  # an abort would otherwise attach a debugger to itself
        try:
            import llama_cpp
        except (ImportError, OSError, RuntimeError, FileNotFoundError) as error:
            raise WeftError(
                ErrorKind.ENVIRONMENT,
                f"llama-cpp-python cannot be imported: {error}.",
                "Repair the llama.cpp environment.",
            ) from error
        self._library = llama_cpp
        self._log = library_log(self._library)
        self._library.llama_backend_init()
        if options.numa != "off":
            self._library.llama_numa_init(getattr(self._library, f"GGML_NUMA_STRATEGY_{options.numa.upper()}"))

    def _open(self, request: Load, file: Path, report: Report) -> tuple[list[str], dict[str, int]]:
        """Load a file and make a context of it. Returns sentences worth showing, and what was measured."""
        from app.generation import llama_machine
        from app.generation.llama_model import LlamaModel

        entry = request.model
        if file != Path(entry.path):  # a merged copy may be larger than its base
            entry = msgspec.structs.replace(entry, weight_bytes=max(entry.weight_bytes, file.stat().st_size))
        options, vram = self._place(entry, self._options)
        free = llama_machine.free_memory()
        self._model = LlamaModel(self._library, self._log, file, options, lambda done: _advance(report, done))
        on_gpu = self._log.offloaded[0] > 0 and self._log.offloaded[0] == self._log.offloaded[1]
        template_notes = [] if self._template else self._open_template()  # its child starts while the context is made
        notes, calibration = self._open_context(request, options, vram if on_gpu else free, report)
        return notes + template_notes, calibration

    def _place(self, entry: ModelEntry, options: Options) -> tuple[Options, int]:
        """The options with the number of GPU layers settled, and bytes free on GPUs."""
        from app.generation import llama_machine

        if options.cpu or not self._library.llama_supports_gpu_offload():
            return options, 0
        vram = llama_machine.free_gpu_memory()
        weights = entry.weight_bytes or entry.bytes
        if options.n_gpu_layers is None and entry.shape.layers and weights:
            layers = memory.gpu_layers_that_fit(entry.shape, weights, _demand(options), vram)
            options = msgspec.structs.replace(options, n_gpu_layers=layers)
        return options, vram

    def _open_context(
        self, request: Load, options: Options, free: int, report: Report
    ) -> tuple[list[str], dict[str, int]]:
        """Make room and warm up. Returns sentences worth showing, and what was measured."""
        from app.generation import llama_machine
        from app.generation.llama_context import LlamaContext
        from app.generation.llama_params import context_params
        from app.generation.llama_threads import fastest_threads

        library, model = self._library, self._model
        shape = model.shape
        notes: list[str] = []
        if not library.llama_supports_gpu_offload() and options.n_gpu_layers and not options.cpu:
            notes.append("This llama.cpp was built without GPU support: all layers run on the CPU.")
        wanted = options.n_ctx or memory.automatic_context(shape, _demand(options), free, model.bytes)
        if options.n_ctx is None and shape.context and wanted < shape.context:
            notes.append(
                f"The model was trained for {shape.context:,} tokens; {wanted:,} of them were taken, since memory is short. "
                "Set the context length to have more."
            )
        if options.n_ctx and shape.context and options.n_ctx > shape.context:
            notes.append(f"The model was trained for {shape.context:,} tokens; beyond them it may lose the thread.")
        report.progress("Making room for the context")
        cores = llama_machine.physical_cores()
        params = context_params(library, model, options, context=wanted, cores=cores)
        pointer = library.llama_init_from_model(model.pointer, params)
        if not pointer:
            raise _context_failure(self._log.reason(), wanted, params.n_ctx)
        chunk = memory.prompt_chunk(
            request.model.parameters or library.llama_model_n_params(model.pointer), options.n_batch
        )
        self._context = LlamaContext(
            library,
            pointer,
            chunk=options.n_batch if self._log.offloaded[0] else chunk,
            rows=params.n_outputs_max,
            sliding_window=0 if options.swa_full else shape.sliding_window,
        )
        report.on_cancel(self._context.abort.set)
        report.progress("Warming up")
        measured = fastest_threads(library, self._context, model, options, cores, request.calibration)
        self._context.abort.clear()
        self._context.clear()
        if report.cancelled:
            raise WeftError(ErrorKind.CANCELLED, "Loading was stopped.")
        report.log("info", measured.text)
        return notes, measured.calibration

    def _open_template(self) -> list[str]:
        from app.generation.template import DEFAULT_TEMPLATE, ChatTemplate

        source = self._options.chat_template.strip() or self._model.template
        if source.lower() == "chatml":
            source = DEFAULT_TEMPLATE
        bos, eos = self._model.special_text("bos"), self._model.special_text("eos")
        self._template = ChatTemplate(source or DEFAULT_TEMPLATE, bos, eos)
        self._template.warm()
        return [] if source else ["The file has no chat template; a plain one (ChatML) is used."]

    def _device(self) -> str:
        threads = self._library.llama_n_threads(self._context.pointer)
        cpu = f"CPU, {threads} thread{'s' if threads != 1 else ''}"
        layers, of = self._log.offloaded
        if not layers:
            return cpu
        names = ", ".join(dict.fromkeys(self._log.devices.values())) or "GPU"
        return f"{names}: {layers} of {of} layers" + ("" if layers == of else f"; {cpu}")

    def _measured(self, before: int, after: int) -> int:
        """What the load added: resident memory of this process (mapped pages of the file included), and GPU buffers."""
        buffers = self._log.buffers
        host = sum(size for (place, _), size in buffers.items() if _on_host(place))
        device = sum(size for (place, _), size in buffers.items() if not _on_host(place))
        return (max(0, after - before) if before and after else host) + device

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
        self._log.clear()
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
        self._said.clear()

    # Generating ----------------------------------------------------------------------------

    def generate(self, request: Generate, report: Report) -> Generated:
        from app.generation.llama_grammar import check_grammar, schema_grammar
        from app.generation.llama_sampler import Sampler

        self._require_model()
        if request.images:
            raise WeftError(ErrorKind.UNSUPPORTED, "llama.cpp takes no images in this version.", "Send the text alone.")
        sampling = request.sampling
        if sampling.grammar.strip() and sampling.json_schema.strip():
            raise WeftError(
                ErrorKind.BAD_INPUT,
                "The answer cannot follow a grammar and a JSON schema at once.",
                "Clear one of the two.",
            )
        grammar = schema_grammar(sampling.json_schema) if sampling.json_schema.strip() else sampling.grammar
        if not grammar.strip():
            grammar = ""
        elif not sampling.json_schema.strip():
            check_grammar(grammar)
        seed = self._seed(sampling.seed)
        context = self._context
        context.abort.clear()
        report.on_cancel(context.abort.set)
        if report.cancelled:
            context.abort.set()
        prompt, text, dropped = self._prompt(request)
        sampler = Sampler(
            self._library, self._model.vocab, context=context.size, sampling=sampling, grammar=grammar, seed=seed
        )
        try:
            return self._answer(request, report, sampler, prompt, text, dropped, seed)
        finally:
            sampler.close()

    def _answer(
        self, request: Generate, report: Report, sampler: Any, prompt: list[int], text: str, dropped: int, seed: int
    ) -> Generated:
        from app.generation.llama_loop import Loop

        context = self._context
        started = time.monotonic()
        reused = context.reuse(prompt)
        new = prompt[reused:]

        def progress(done: int) -> None:
            if len(new) > done:
                report.progress("Reading the prompt", reused + done, len(prompt), "tokens")

        whole = context.read(new, progress)
        read = time.monotonic()
        numbers = {
            "prompt_tokens": len(prompt),
            "reused_tokens": reused,
            "prompt_seconds": read - started,
            "dropped_messages": dropped,
            "seed": seed,
        }
        if not whole:
            return Generated(finish_reason="cancelled", tokens=0, **numbers)
        self._check_logits()
        sampler.accept_prompt(prompt)
        plain = request.prompt is not None or request.continue_last
        loop = Loop(
            self._model,
            context,
            sampler,
            stop=request.sampling.stop_strings(),
            most=min(request.sampling.max_tokens or context.size, context.size - len(prompt)),
            strip=not plain and self._model.adds_space,
        )
        reason = loop.run(report.tokens)
        self._remember(text, prompt)
        # Where a space was dropped before the answer, templates put it back or do not.
        for answer in {loop.text, loop.stripped + loop.text}:
            self._remember(text + answer, prompt + loop.tokens)
        return Generated(finish_reason=reason, tokens=loop.count, seconds=time.monotonic() - read, **numbers)

    def _check_logits(self) -> None:
        import numpy

        size = self._library.llama_vocab_n_tokens(self._model.vocab)
        logits = numpy.ctypeslib.as_array(self._library.llama_get_logits_ith(self._context.pointer, -1), shape=(size,))
        # One pass that is cheap beside the prompt: the sum is NaN as soon as one of them is.
        if numpy.isnan(logits.sum(dtype=numpy.float64)):
            self._context.clear()
            raise WeftError(
                ErrorKind.CORRUPT,
                f"{self._model.path.name} computes values that are no numbers (NaN).",
                "Download the model again, or choose another quantization; with stretched context, undo the RoPE options.",
            )

    def _prompt(self, request: Generate) -> tuple[list[int], str, int]:
        """Tokens of the prompt, the text that they spell, and how many messages were left out."""
        from app.generation.fit import fit_messages, fit_text

        context = self._context
        longest = request.sampling.max_tokens
        reserve = min(request.reserve, longest or request.reserve, context.size // 2)
        limit = context.size - max(1, reserve)
        if request.prompt is not None:
            tokens = self._tokens(request.prompt)
            if not tokens:
                raise WeftError(ErrorKind.BAD_INPUT, "There is no text to continue.", "Write a text first.")
            return fit_text(tokens, context.size - 1), request.prompt, 0
        texts: dict[int, str] = {}

        def tokenize(messages: Any) -> list[int]:
            text = self._template.render(messages, continue_last=request.continue_last)
            tokens = self._tokens(text)
            texts[id(tokens)] = text
            kept.append(tokens)
            return tokens

        kept: list[list[int]] = []  # keeps the lists alive, so that their ids stay theirs
        tokens, dropped = fit_messages(request.messages, tokenize, limit)
        return tokens, texts.get(id(tokens), ""), dropped

    def _tokens(self, text: str) -> list[int]:
        """Tokens of a text; where it begins with one that was read or written before, the tokens that spelt that.

        An answer is not always tokenized the way that it was generated. Taking it as it was saves reading it again,
        in the next turn, when an answer is made anew and when the last question is changed.
        """
        model = self._model
        known = max((s for s in self._said if text.startswith(s.text)), key=lambda s: len(s.text), default=None)
        if known is not None:
            rest = model.tokenize(text[len(known.text) :])
            # Words must not be cut in two: a special token has to stand at the seam.
            if not rest or model.piece(rest[0]) == b"" or model.piece(known.tokens[-1]) == b"":
                return known.tokens + rest
        return model.with_bos(model.tokenize(text))

    def _remember(self, text: str, tokens: list[int]) -> None:
        self._said = [said for said in self._said if said.text != text][1 - _REMEMBERED :]
        if text:
            self._said.append(_Said(text, tokens))

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


def _advance(report: Report, done: float) -> bool:
    report.progress("Reading the model", done, 1.0)
    return not report.cancelled


def _on_host(place: str) -> bool:
    return place.startswith("CPU") or place.endswith("_Host")


def _check_files(parts: Sequence[Path]) -> None:
    """Our own bounded look at the header of every part, before the library sees one.

    Raises:
        WeftError: CORRUPT or HOSTILE.
    """
    from app.core.formats import read_gguf_header

    for part in parts:
        header = read_gguf_header(part)
        if "tokenizer.ggml.tokens" in header.metadata:
            _check_vocabulary(part, header.strings("tokenizer.ggml.tokens"))


def _check_vocabulary(path: Path, tokens: list[str]) -> None:
    """llama.cpp aborts its process on a vocabulary that holds a token twice."""
    tokens = [token for token in tokens if "\ufffd" not in token]  # of raw bytes we cannot tell
    if len(set(tokens)) == len(tokens):
        return
    twice = next(token for token, count in Counter(tokens).items() if count > 1)
    raise WeftError(
        ErrorKind.CORRUPT,
        f"The vocabulary of {path.name} holds the token {twice[:40]!r} twice: the file is damaged, or was converted wrongly.",
        "Download it again, or take another conversion of the model.",
    )


def _context_failure(reason: str, wanted: int, tokens: int) -> WeftError:
    lower = reason.lower()
    if "flash attention" in lower:
        return WeftError(
            ErrorKind.BAD_INPUT,
            f"llama.cpp refused the options: {reason}.",
            "Set both cache types to f16, or flash_attention to on.",
        )
    if "alloc" in lower or "memory" in lower or not reason:
        return WeftError(
            ErrorKind.OUT_OF_MEMORY,
            f"There is not enough memory for a context of {wanted or tokens:,} tokens.",
            "Choose a smaller context length, or q8_0 as cache type.",
        )
    return WeftError(
        ErrorKind.UNSUPPORTED, f"llama.cpp refused the context: {reason}.", "Reset the options that you changed."
    )
