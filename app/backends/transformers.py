"""Transformers: models from safetensors or .bin files, on the processor or on GPUs; also such as bitsandbytes, GPTQ, AWQ and HQQ have packed."""

from __future__ import annotations

import ctypes
import gc
import importlib.metadata
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app.backends import base
from app.backends.base import Capability, Spec
from app.core.errors import ErrorKind, WeftError
from app.core.library import ModelFormat, ModelShape
from app.core.options import build
from app.core.quantization import PACKED
from app.core.sampling import Sampling
from app.core.stack import AdapterStack
from app.engine.protocol import Generate, GenerateBatch, Generated, GeneratedBatch, Load, Loaded, Score, Scored
from app.engine.reporting import Report
from app.generation import hf_files
from app.generation.hf_memory import estimate
from app.generation.hf_options import Options
from app.generation.hf_prompt import Prompts
from app.generation.in_turn import answer_in_turn, request_of

if TYPE_CHECKING:
    from app.adapters.hf_stack import ModelStack
    from app.generation.hf_answer import Answer, Asked
    from app.generation.hf_decode import Decoder

SPEC = Spec(
    id="transformers",
    title="Transformers",
    summary="Runs models from safetensors or .bin folders as they are, quantized while loading, or saved by GPTQ, AWQ, HQQ or bitsandbytes.",
    formats=frozenset({ModelFormat.SAFETENSORS, ModelFormat.TORCH_BIN, ModelFormat.BITSANDBYTES, *PACKED}),
    environment="core",
    capabilities=frozenset({Capability.LORA, Capability.MULTI_LORA, Capability.TRAIN, Capability.PERPLEXITY}),
    options=Options,
    sampling=frozenset(Sampling.__struct_fields__),
    estimate=estimate,
    bakes=True,
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
        self._shape = ModelShape()
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
        self._shape = request.model.shape
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
        packed = request.model.format in PACKED
        lone = Path(request.model.files[0]) if packed and len(request.model.files) == 1 else None
        stage = self._stage = hf_files.Stage(folder, form, lone)
        trust = self._trust(stage, request, options)
        seen = folder if trust else stage.path
        prompts = self._prompts = Prompts(options.chat_template)
        prompts.start(seen)
        config = hf_load.read_config(seen, trust)
        plan = hf_load.Plan(folder=seen, weights=stage.weights, form=form, trust=trust, packed=packed)
        plan.notes += hf_load.set_rope(
            config, options.alpha_value, options.rope_freq_base or 0.0, options.compress_pos_emb
        )
        hf_plan.plan_precision(config, plan, options)
        hf_plan.plan_place(request.model, plan, options)
        self._plan_packing(stage, folder, plan, options, report)
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
        if plan.packing is not None:
            plan.notes += plan.packing.notes
            hf_load.unmap(self._model)
        _give_back()
        self._decoder = Decoder(self._model, device, slow)
        if request.adapters.adapters:
            plan.notes += self._set_stack(request.adapters, report, request.baked)
        prompts.template.wait_until_ready()
        if prompts.bare:
            plan.notes.append("The model brings no chat template; the plain ChatML template is used.")
        return plan.notes

    def _plan_packing(self, stage: hf_files.Stage, folder: Path, plan: Any, options: Options, report: Report) -> None:
        """What reads packed weights, or packs them."""
        if not plan.packed and not plan.hqq:
            return
        from app.adapters.packed_load import PackedConfig, Stored, table_of

        stored = None
        if plan.packed:
            if plan.form != "safetensors":
                raise WeftError(
                    ErrorKind.UNSUPPORTED,
                    f"{folder.name} holds packed weights as pickled files, which are not read here.",
                    "Get the model as safetensors.",
                )
            stored = Stored(plan.weights, table_of(stage.config, folder))
        plan.packing = PackedConfig(
            stored,
            bits=plan.hqq,
            group=options.hqq_group_size,
            kernel=options.packed_kernel,
            cancelled=lambda: report.cancelled,
        )

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
        for note in self._set_stack(adapters, report, baked):
            report.log("warning", note)

    def _model_stack(self) -> ModelStack:
        from app.adapters.hf_stack import ModelStack

        self._stack = self._stack or ModelStack(self._model)
        return self._stack

    def _set_stack(self, adapters: AdapterStack, report: Report, baked: bool = False) -> list[str]:
        """Replace the stack; what was read under another one is forgotten. Returns sentences worth showing."""
        _, decoder = self._ready()
        stack, was_baked = self._model_stack(), self.baked
        stale, notes = stack.set(
            adapters, lambda phase, done, of: report.progress(phase, done, of, "modules"), baked=baked
        )
        if stale:
            decoder.reset()
        self.stack, self.baked = adapters, stack.baked
        if was_baked != self.baked:
            _give_back()
        return notes

    def check_adapters(self, stacks: Sequence[AdapterStack], report: Report) -> None:
        self._model_stack().check(stacks, lambda phase, done, of: report.progress(phase, done, of, "modules"))

    @contextmanager
    def _rows(self, request: GenerateBatch, report: Report) -> Iterator[tuple[str, Callable[[list[int]], None]]]:
        """Give rows their stacks for the block. Yields why that cannot be ("" when it can), and what selects rows."""
        if all(row.adapters == self.stack for row in request.rows):
            yield "", lambda _: None
            return
        with self._model_stack().rows(
            [row.adapters for row in request.rows],
            lambda phase, done, of: report.progress(phase, done, of, "modules"),
        ) as rows:
            for note in rows.notes:
                report.log("warning", note)
            yield rows.reason, rows.select

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
        _, decoder = self._ready()
        asked = self._asked(request, report)
        answer = self._answer(asked, report)
        started = time.perf_counter()
        reused = decoder.begin(asked.tokens)
        logits = decoder.read(
            asked.tokens,
            lambda done, total: report.progress("Reading the prompt", done, total, "tokens"),
            lambda: report.cancelled,
        )
        read = time.perf_counter() - started
        self._finish(answer, logits, report)
        return answer.result(reused, read)

    def _asked(self, request: Generate, report: Report) -> Asked:
        """A request made ready."""
        from app.generation.hf_answer import Asked

        prompts, _ = self._ready()
        if request.images:
            raise WeftError(
                ErrorKind.UNSUPPORTED, "This loader does not look at images yet.", "Remove the images from the message."
            )
        seed = request.sampling.seed if request.sampling.seed is not None else _any_seed()
        prompt, tokens, dropped = prompts.tokens(request, self._context)
        if prompts.template.note and prompts.template.note != self._told:
            self._told = prompts.template.note
            report.log("info", self._told)
        return Asked(request, prompt, tokens, dropped, seed)

    def _answer(self, asked: Asked, report: Report, row: int = 0) -> Answer:
        from app.generation.hf_answer import Answer

        prompts, _ = self._ready()
        width: int = self._model.config.get_text_config(decoder=True).vocab_size
        constraint = prompts.constraint(asked.request.sampling, width)
        return Answer(asked, prompts, self._context, constraint, report.tokens, row)

    def _finish(self, answer: Answer, logits: Any, report: Report) -> None:
        """Decode until something ends the answer. `logits` None: the prompt was not read to its end."""
        prompts, decoder = self._ready()
        if logits is None:
            answer.end("cancelled")
            return
        while answer.open:
            if report.cancelled:
                answer.end("cancelled")
            elif (token := answer.choose(logits)) >= 0:
                logits = decoder.step(token)
        prompts.said = answer.said()

    def generate_batch(self, request: GenerateBatch, report: Report) -> GeneratedBatch:
        _, decoder = self._ready()
        if not decoder.croppable:
            return answer_in_turn(self, request, report, "This model keeps a state that rows cannot share.")
        seed = _any_seed()
        asked = [self._asked(request_of(request, row, seed), report) for row in request.rows]
        answers = [self._answer(one, report, number) for number, one in enumerate(asked)]
        from app.generation.hf_batch import answer_together, too_large

        if reason := too_large(self._shape, answers, self._model.dtype.itemsize, _free(self._model.device)):
            return answer_in_turn(self, request, report, reason)
        with self._rows(request, report) as (reason, select):
            if not reason:
                return GeneratedBatch(rows=tuple(answer_together(decoder, answers, report, select)))
        return answer_in_turn(self, request, report, reason)

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


def _any_seed() -> int:
    return int.from_bytes(os.urandom(4)) % (2**32 - 1)


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


def _free(device: Any) -> int:
    """Bytes free where a model lies; 0 when that cannot be told."""
    if device.type == "cuda":
        return sys.modules["torch"].cuda.mem_get_info(device)[0]
    try:
        import psutil
    except ImportError:
        return 0
    return psutil.virtual_memory().available


def _resident() -> int:
    """Bytes of main memory that this process holds; 0 when that cannot be told."""
    try:
        import psutil
    except ImportError:
        return 0
    return psutil.Process().memory_info().rss
