"""Transformers: 16- and 32-bit models from safetensors or .bin files, on the processor or on GPUs, also bitsandbytes."""

from __future__ import annotations

import ctypes
import gc
import importlib.metadata
import os
import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app.backends import base
from app.backends.base import Capability, Spec
from app.core.errors import ErrorKind, WeftError
from app.core.library import ModelFormat
from app.core.options import build
from app.core.sampling import Sampling
from app.core.stack import AdapterStack
from app.engine.protocol import FinishReason, Generate, Generated, Load, Loaded, Score, Scored
from app.engine.reporting import Report
from app.generation import hf_files
from app.generation.hf_options import Options, estimate
from app.generation.hf_prompt import Prompts
from app.generation.stop import StopScanner

if TYPE_CHECKING:
    from app.adapters.hf_stack import ModelStack
    from app.generation.hf_decode import Decoder

SPEC = Spec(
    id="transformers",
    title="Transformers",
    summary="Runs models from safetensors or .bin folders as they are, or quantized while loading.",
    formats=frozenset({ModelFormat.SAFETENSORS, ModelFormat.TORCH_BIN, ModelFormat.BITSANDBYTES}),
    environment="core",
    capabilities=frozenset({Capability.LORA, Capability.MULTI_LORA, Capability.PERPLEXITY}),
    options=Options,
    sampling=frozenset(Sampling.__struct_fields__),
    estimate=estimate,
    rank=20,
)


class Backend(base.Backend):
    """Holds one transformers model, its KV cache and its chat template."""

    def __init__(self) -> None:
        self._model: Any = None
        self._prompts: Prompts | None = None
        self._decoder: Decoder | None = None
        self._stage: hf_files.Stage | None = None
        self._offload = ""  # temporary folder of rewritten weights
        self._context = 0
        self._told = ""  # the last note about the template, told once
        self._stack: ModelStack | None = None

    def libraries(self) -> dict[str, str]:
        found: dict[str, str] = {}
        for name in ("torch", "transformers", "accelerate", "bitsandbytes", "llguidance"):
            try:
                found[name] = importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                continue
        return found

    # Loading ------------------------------------------------------------------------------------

    def load(self, request: Load, report: Report) -> None:
        options = build(Options, request.options)
        self.unload()
        started = time.monotonic()
        before = _resident()
        report.progress("Starting PyTorch")
        try:
            notes = self._load(request, options, report)
        except BaseException:
            self.unload()
            raise
        report.loaded(
            Loaded(
                context=self._context,
                device=self._device_words(),
                memory=max(0, _resident() - before) + self._device_bytes(),
                seconds=time.monotonic() - started,
                has_template=not self._prompts.bare if self._prompts else False,
                notes=tuple(notes),
            )
        )

    def _load(self, request: Load, options: Options, report: Report) -> list[str]:
        _go_offline()
        import torch

        from app.generation import hf_load, hf_plan
        from app.generation.hf_decode import Decoder

        if options.threads is not None:
            torch.set_num_threads(options.threads)
        folder = Path(request.model.path)
        form = "bin" if request.model.format is ModelFormat.TORCH_BIN else "safetensors"
        if request.model.format is ModelFormat.BITSANDBYTES and not (folder / hf_files.SINGLES[form]).exists():
            form = "safetensors" if (folder / hf_files.INDEXES[form]).exists() else "bin"
        stage = self._stage = hf_files.Stage(folder, form)
        trust = self._trust(stage, request, options)
        seen = folder if trust else stage.path
        prompts = self._prompts = Prompts(options.chat_template)
        prompts.start(seen)
        config = hf_load.read_config(seen, trust)
        plan = hf_load.Plan(folder=seen, weights=stage.weights, form=form, trust=trust)
        plan.notes += hf_load.set_rope(
            config, options.alpha_value, options.rope_freq_base or 0.0, options.compress_pos_emb
        )
        hf_plan.plan_precision(config, plan, options)
        hf_plan.plan_place(request.model, plan, options)
        free = hf_plan.free_memory(options)
        self._offload = plan.offload_folder if not options.offload_folder else ""
        self._model = hf_load.load_model(
            config, plan, lambda p: report.progress(p.phase, p.done, p.total, p.unit), lambda: report.cancelled
        )
        report.progress("Reading the tokenizer")
        prompts.read_tokenizer(seen, trust, config, folder)
        self._context = hf_plan.choose_context(request.model, config, plan, options, free)
        device, slow = hf_load.place_of(self._model)
        if slow:
            plan.notes.append("Part of the model is read from disk for each token: this is slow.")
        if plan.bitsandbytes is not None:
            hf_plan.check_quantized(self._model, plan)
            hf_load.unmap(self._model)
        _give_back()
        self._decoder = Decoder(self._model, device, slow)
        if request.adapters.adapters:
            plan.notes += self._set_stack(request.adapters, report)
        prompts.template.wait_until_ready()
        if prompts.bare:
            plan.notes.append("The model brings no chat template; the plain ChatML template is used.")
        return plan.notes

    def _trust(self, stage: hf_files.Stage, request: Load, options: Options) -> bool:
        """Whether the folder's Python files may run: only if the user asked for it, twice, and they are the folder's own."""
        trust = request.trust_remote_code and options.trust_remote_code
        if trust and any("--" in name for name in stage.custom_code):
            raise WeftError(
                ErrorKind.HOSTILE,
                f"{request.model.name} wants to run code of another repository: {', '.join(stage.custom_code)}.",
                "Weft runs only code that lies in the model's own folder. Switch off trust_remote_code.",
            )
        return trust and bool(stage.custom_code)

    def set_adapters(self, adapters: AdapterStack, report: Report, *, baked: bool = False) -> None:
        self._ready()
        for note in self._set_stack(adapters, report):
            report.log("warning", note)

    def _set_stack(self, adapters: AdapterStack, report: Report) -> list[str]:
        """Replace the stack; what was read under another one is forgotten. Returns sentences worth showing."""
        from app.adapters.hf_stack import ModelStack

        _, decoder = self._ready()
        self._stack = self._stack or ModelStack(self._model)
        stale, notes = self._stack.set(adapters, lambda phase, done, of: report.progress(phase, done, of, "modules"))
        if stale:
            decoder.reset()
        self.stack = adapters
        return notes

    def unload(self) -> None:
        if self._prompts is not None:
            self._prompts.close()
        if self._decoder is not None:
            self._decoder.close()
        had_model = self._model is not None
        self._model = self._prompts = self._decoder = self._stack = None
        self.stack, self.baked = AdapterStack(), False
        if self._stage is not None:
            self._stage.close()
        if self._offload:
            shutil.rmtree(self._offload, ignore_errors=True)
        self._stage, self._offload, self._told = None, "", ""
        if had_model:
            _give_back()
            torch = sys.modules["torch"]
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    # Generating ---------------------------------------------------------------------------------

    def generate(self, request: Generate, report: Report) -> Generated:
        prompts, decoder = self._ready()
        if request.images:
            raise WeftError(
                ErrorKind.UNSUPPORTED, "This loader does not look at images yet.", "Remove the images from the message."
            )
        sampling = request.sampling
        seed = sampling.seed if sampling.seed is not None else int.from_bytes(os.urandom(4)) % (2**32 - 1)
        prompt, tokens, dropped = prompts.tokens(request, self._context)
        if prompts.template.note and prompts.template.note != self._told:
            self._told = prompts.template.note
            report.log("info", self._told)
        constraint = prompts.constraint(sampling, self._model.config.get_text_config(decoder=True).vocab_size)
        started = time.perf_counter()
        reused = decoder.begin(tokens)
        logits = decoder.read(
            tokens,
            lambda done, total: report.progress("Reading the prompt", done, total, "tokens"),
            lambda: report.cancelled,
        )
        prompt_seconds = time.perf_counter() - started
        if logits is None:
            return Generated(
                finish_reason="cancelled",
                tokens=0,
                prompt_tokens=len(tokens),
                reused_tokens=reused,
                prompt_seconds=prompt_seconds,
                dropped_messages=dropped,
                seed=seed,
            )
        reason, count, seconds = self._answer(request, prompt, tokens, logits, seed, constraint, report)
        return Generated(
            finish_reason=reason,
            tokens=count,
            prompt_tokens=len(tokens),
            reused_tokens=reused,
            prompt_seconds=prompt_seconds,
            seconds=seconds,
            dropped_messages=dropped,
            seed=seed,
        )

    def _answer(
        self, request: Generate, prompt: str, tokens: list[int], logits: Any, seed: int, constraint: Any, report: Report
    ) -> tuple[FinishReason, int, float]:
        """Decode until something ends it. Returns why, how many tokens, and the seconds after the first."""
        from app.generation.hf_sampling import Sampler
        from app.generation.hf_text import TokenText

        prompts, decoder = self._ready()
        sampling = request.sampling
        sampler = Sampler(sampling, seed, tokens, prompts.dry_breakers, constraint)
        text = TokenText(prompts.tokenizer, tokens)
        scanner = StopScanner((*sampling.stop_strings(), *prompts.plain_ends(request)))
        room = self._context - len(tokens)
        budget = room if sampling.max_tokens is None else min(room, sampling.max_tokens)
        reason: FinishReason = "length"
        count = unsaid = 0
        answer: list[int] = []
        said: list[str] = []
        first = time.perf_counter()
        while count < budget:
            if report.cancelled:
                reason = "cancelled"
                break
            token = sampler.choose(logits)
            if count == 0:
                first = time.perf_counter()
            if token in prompts.ends:
                reason = "stop"
                break
            sampler.accept(token)
            answer.append(token)
            count += 1
            unsaid += 1
            shown, stopped = scanner.feed(text.feed(token))
            if shown:
                said.append(shown)
                report.tokens(shown, unsaid)
                unsaid = 0
            if stopped or (constraint is not None and constraint.finished):
                reason = "stop"
                break
            if count < budget:
                logits = decoder.step(token)
        seconds = time.perf_counter() - first
        rest = ""
        if not scanner.matched:
            rest, _ = scanner.feed(text.flush())
            rest += scanner.flush()
        if rest or unsaid:
            report.tokens(rest, unsaid)
        # What was said can be found again in the next prompt only if its text is all that its tokens are.
        hidden = scanner.matched or not set(answer).isdisjoint(prompts.tokenizer.all_special_ids)
        prompts.said = ("", []) if hidden else (prompt + "".join(said) + rest, tokens + answer)
        return reason, count, seconds

    # Scoring ------------------------------------------------------------------------------------

    def score(self, request: Score, report: Report) -> Scored:
        prompts, decoder = self._ready()
        from app.generation.hf_score import score

        tokens = prompts.encode(request.text, True)
        return score(
            decoder,
            tokens,
            request,
            self._context,
            lambda done, total: report.progress("Scoring the text", done, total, "tokens"),
            lambda: report.cancelled,
        )

    def _ready(self) -> tuple[Prompts, Decoder]:
        if self._prompts is None or self._decoder is None:
            raise WeftError(ErrorKind.BAD_INPUT, "No model is loaded.", "Load a model first.")
        return self._prompts, self._decoder

    # What it runs on ----------------------------------------------------------------------------

    def _device_words(self) -> str:
        import torch

        places = list((getattr(self._model, "hf_device_map", None) or {}).values()) or [self._model.device]
        kinds = {f"cuda:{p}" if isinstance(p, int) else str(p) for p in places}
        words: list[str] = []
        for kind in sorted(kinds):
            if kind.startswith("cuda"):
                words.append(torch.cuda.get_device_name(torch.device(kind)))
            elif kind == "cpu":
                count = torch.get_num_threads()
                words.append(f"CPU, {count} thread{'s' if count != 1 else ''}")
            else:
                words.append({"mps": "Apple GPU", "disk": "disk"}.get(kind, kind))
        return " + ".join(words)

    def _device_bytes(self) -> int:
        import torch

        if not torch.cuda.is_available():
            return 0
        return sum(torch.cuda.memory_allocated(i) for i in range(torch.cuda.device_count()))


def _go_offline() -> None:
    """Forbid every access to the network, before transformers is imported."""
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", DO_NOT_TRACK="1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def _give_back() -> None:
    """Return freed memory to the system: quantizing leaves as much behind in the allocator as the weights took before."""
    gc.collect()
    if sys.platform == "linux":
        try:
            ctypes.CDLL(None).malloc_trim(0)
        except (OSError, AttributeError):
            return  # another C library than glibc, which keeps less


def _resident() -> int:
    """Bytes of main memory that this process holds; 0 when that cannot be told."""
    try:
        import psutil
    except ImportError:
        return 0
    return psutil.Process().memory_info().rss
