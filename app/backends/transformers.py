"""Transformers: 16- and 32-bit models from safetensors or .bin files, on the processor or on GPUs, also bitsandbytes."""

from __future__ import annotations

import ctypes
import gc
import importlib.metadata
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec

from app.backends import base
from app.backends.base import Report, Spec
from app.core.conversation import Message
from app.core.errors import ErrorKind, WeftError
from app.core.library import ModelEntry, ModelFormat
from app.core.memory import Estimate, Machine, kv_cache_bytes, prompt_chunk
from app.core.options import build, option
from app.core.sampling import Sampling
from app.engine.protocol import FinishReason, Generate, Generated, Load, Loaded
from app.generation import hf_files
from app.generation.fit import fit_messages, fit_text
from app.generation.stop import StopScanner
from app.generation.template import DEFAULT_TEMPLATE, ChatTemplate

if TYPE_CHECKING:
    from app.generation.hf_decode import Decoder

GIB = 1024**3
PROCESS = 350 * 1024 * 1024  # bytes: an engine with torch and transformers at work, measured without a graphics card
BITSANDBYTES = 45 * 1024 * 1024  # bytes: what its import adds, measured

MEMORY, PRECISION, CONTEXT, BEHAVIOUR = "Memory", "Precision", "Context", "Behaviour"


class Options(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Options of the Transformers loader; names as text-generation-webui's users know them."""

    context_length: (
        Annotated[
            int,
            option(
                "Context length",
                "How many tokens prompt and answer may have together.",
                ge=8,
                unit="tokens",
                group=CONTEXT,
                automatic="from the model's config",
                aliases=("n_ctx", "max_seq_len"),
            ),
        ]
        | None
    ) = None
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        option(
            "Precision",
            "Number format of the weights that are not quantized. Auto keeps the one they were saved in, except that a processor reads float16 as bfloat16.",
            group=PRECISION,
            aliases=("torch_dtype",),
        ),
    ] = "auto"
    bf16: Annotated[
        bool,
        option("bfloat16", "Use bfloat16: the same as choosing it under Precision.", group=PRECISION, advanced=True),
    ] = False
    load_in_8bit: Annotated[
        bool,
        option("Load in 8-bit", "Quantize the weights to 8 bits with bitsandbytes while loading.", group=PRECISION),
    ] = False
    load_in_4bit: Annotated[
        bool,
        option(
            "Load in 4-bit",
            "Quantize the weights to 4 bits with bitsandbytes while loading. A quarter of the memory.",
            group=PRECISION,
        ),
    ] = False
    compute_dtype: (
        Annotated[
            Literal["float32", "bfloat16", "float16"],
            option(
                "4-bit computes in",
                "Number format that 4-bit weights are expanded to for each multiplication.",
                group=PRECISION,
                automatic="the Precision above",
                advanced=True,
                aliases=("bnb_4bit_compute_dtype",),
            ),
        ]
        | None
    ) = None
    quant_type: Annotated[
        Literal["nf4", "fp4"],
        option(
            "4-bit type",
            "nf4 suits weights better; fp4 is a plain 4-bit float.",
            group=PRECISION,
            aliases=("bnb_4bit_quant_type",),
        ),
    ] = "nf4"
    use_double_quant: Annotated[
        bool,
        option(
            "Double quantization",
            "Quantize the 4-bit scales too: saves another 0.4 bits a weight.",
            group=PRECISION,
            aliases=("bnb_4bit_use_double_quant",),
        ),
    ] = False
    cpu: Annotated[
        bool,
        option(
            "Processor only", "Use no graphics card. Weights load as 32-bit unless a precision is chosen.", group=MEMORY
        ),
    ] = False
    auto_devices: Annotated[
        bool,
        option(
            "Spread automatically",
            "Let accelerate spread the model over graphics cards, main memory and disk. Off: all of it on the first card.",
            group=MEMORY,
        ),
    ] = True
    gpu_memory: (
        Annotated[
            str,
            option(
                "GPU memory",
                "The most that the model may take of each graphics card, in GiB, separated by commas: 10,8. Leave room for the context.",
                group=MEMORY,
                unit="GiB",
                automatic="what is free",
            ),
        ]
        | None
    ) = None
    cpu_memory: (
        Annotated[
            float,
            option(
                "Main memory",
                "The most main memory that the weights may take. What does not fit goes to disk, if that is on.",
                group=MEMORY,
                ge=0.0,
                unit="GiB",
                automatic="what is free",
            ),
        ]
        | None
    ) = None
    disk: Annotated[
        bool,
        option(
            "Disk offload",
            "Keep on disk what fits neither the graphics cards nor main memory. Very slow.",
            group=MEMORY,
        ),
    ] = False
    offload_folder: (
        Annotated[
            str,
            option(
                "Offload folder",
                "Where weights go that must be rewritten for disk offload (safetensors are read in place).",
                group=MEMORY,
                automatic="a temporary folder",
                advanced=True,
                aliases=("disk_cache_dir",),
            ),
        ]
        | None
    ) = None
    attention: Annotated[
        Literal["auto", "sdpa", "eager", "flash_attention_2"],
        option(
            "Attention",
            "Which attention code runs. sdpa is PyTorch's own; eager the plain one; flash_attention_2 needs an NVIDIA card.",
            group=BEHAVIOUR,
            aliases=("attn_implementation",),
        ),
    ] = "auto"
    use_flash_attention_2: Annotated[
        bool,
        option(
            "Flash attention 2",
            "The same as choosing flash_attention_2 under Attention.",
            group=BEHAVIOUR,
            advanced=True,
        ),
    ] = False
    alpha_value: Annotated[
        float,
        option(
            "Alpha (NTK)",
            "Stretches the rotary embedding's base for more context: 1.75 for 1.5 times, 2.5 for twice the context. Set the context length too.",
            ge=1,
            le=64,
            group=CONTEXT,
        ),
    ] = 1.0
    rope_freq_base: (
        Annotated[
            float,
            option(
                "Rope base",
                "Base of the rotary embedding, as 1000000 for CodeLlama.",
                ge=1,
                group=CONTEXT,
                automatic="from the model's config",
                advanced=True,
            ),
        ]
        | None
    ) = None
    compress_pos_emb: Annotated[
        float,
        option(
            "Compress positions",
            "Divides positions by this factor (linear rope scaling); 2 doubles the context. For models trained so.",
            ge=1,
            le=64,
            group=CONTEXT,
        ),
    ] = 1.0
    threads: (
        Annotated[
            int,
            option(
                "Threads",
                "Processor threads for the arithmetic.",
                ge=1,
                le=512,
                group=BEHAVIOUR,
                automatic="PyTorch's choice",
            ),
        ]
        | None
    ) = None
    chat_template: Annotated[
        str,
        option(
            "Chat template",
            "A Jinja template in place of the model's own; empty uses that. The word chatml stands for the plain ChatML template.",
            group=BEHAVIOUR,
            multiline=True,
            advanced=True,
        ),
    ] = ""
    trust_remote_code: Annotated[
        bool,
        option(
            "Run the model's own code",
            "Lets Python files that lie in the model's folder run. They can do anything that you can: read them first.",
            group=BEHAVIOUR,
            advanced=True,
        ),
    ] = False
    no_use_fast: Annotated[
        bool,
        option(
            "No fast tokenizer",
            "Use the slow version of the tokenizer.",
            group=BEHAVIOUR,
            advanced=True,
            replaced="Since version 5 transformers has one tokenizer for each model and chooses it itself.",
        ),
    ] = False
    disable_exllama: Annotated[
        bool,
        option(
            "Disable ExLlama",
            "Do not use ExLlama's kernel for GPTQ models.",
            group=BEHAVIOUR,
            advanced=True,
            replaced="Concerned GPTQ models only; gptqmodel, which reads those today, picks its kernel itself.",
        ),
    ] = False


def estimate(model: ModelEntry, options: Options, machine: Machine) -> Estimate:
    """Bytes that a load takes with a full context: weights, keys and values, the libraries, and a prompt's activations."""
    size = _dtype_size(model, options, machine)
    weights = _weight_bytes(model, options, size)
    shape = model.shape
    context = options.context_length or int((shape.context or 2048) * options.compress_pos_emb)
    cache = kv_cache_bytes(shape, context, key_bytes=size, value_bytes=size)
    work = _activation_bytes(model, size, context)
    gpu = 0
    if machine.gpus and not options.cpu:
        gpu = min(weights + cache + work, sum(_gpu_limits(options, machine)))
    ram = weights + cache + work - gpu
    if options.disk and options.cpu_memory is not None and weights > options.cpu_memory * GIB:
        ram -= max(0, weights - gpu - int(options.cpu_memory * GIB))
    # While loading, files whose numbers are converted lie in memory beside what is made of them.
    stored = model.weight_bytes or model.bytes
    passing = max(0, stored - cache - work) if abs(weights - stored) > stored // 8 else 0
    if options.load_in_4bit or options.load_in_8bit:
        passing += BITSANDBYTES + 12 * shape.hidden * shape.intermediate  # the library; one matrix at work
    return Estimate(
        weights=weights, cache=cache, overhead=PROCESS + work + passing, gpu=gpu, ram=ram + PROCESS + passing
    )


def _activation_bytes(model: ModelEntry, size: float, context: int) -> int:
    """What lives at once while a chunk of a prompt passes one layer: the MLP's activations, or the attention mask."""
    shape = model.shape
    rows = min(prompt_chunk(model.parameters, 512), context)
    widest = 3 * shape.intermediate + 4 * shape.hidden
    # A cache grows by copying: the old and the new keys and values of one layer are there at once.
    grown = 2 * kv_cache_bytes(shape, context, key_bytes=size, value_bytes=size) // max(1, shape.layers)
    return int(rows * widest * max(size, 4)) + rows * context * 2 + 4 * 3 * shape.vocabulary + grown


def _dtype_size(model: ModelEntry, options: Options, machine: Machine) -> float:
    """Bytes of one unquantized weight, and of one number in the KV cache."""
    if options.bf16 or options.dtype in ("bfloat16", "float16"):
        return 2
    if options.dtype == "float32" or options.cpu:
        return 4
    if model.format is ModelFormat.BITSANDBYTES or not model.parameters:
        return 2
    return 4 if model.weight_bytes / model.parameters > 3 else 2


def _weight_bytes(model: ModelEntry, options: Options, size: float) -> int:
    stored = model.weight_bytes or model.bytes
    if not model.parameters or model.format is ModelFormat.BITSANDBYTES:
        return stored
    if not (options.load_in_4bit or options.load_in_8bit):
        return int(model.parameters * size)
    shape = model.shape
    # Embeddings and the output layer are not quantized; whether they are tied shows in the number of parameters only.
    kept = min(model.parameters, shape.vocabulary * shape.hidden * 2)
    bits = (4 + (0.127 if options.use_double_quant else 0.5)) if options.load_in_4bit else 8.0
    return int((model.parameters - kept) * bits / 8 + kept * size)


def _gpu_limits(options: Options, machine: Machine) -> list[int]:
    if options.gpu_memory is None:
        return [gpu.free for gpu in machine.gpus]
    limits = [int(value * GIB) for value in parse_gpu_memory(options.gpu_memory)]
    return [min(limit, gpu.free) for limit, gpu in zip(limits, machine.gpus, strict=False)]


def parse_gpu_memory(text: str) -> list[float]:
    """`10,8` or `10GiB 8` as GiB for each graphics card.

    Raises:
        WeftError: BAD_INPUT.
    """
    parts = text.lower().replace("gib", " ").replace("gb", " ").replace(",", " ").replace(";", " ").split()
    try:
        values = [float(part) for part in parts]
    except ValueError:
        values = []
    if not values or any(not 0 <= value < 10_000 for value in values):
        raise WeftError(
            ErrorKind.BAD_INPUT,
            f"gpu_memory cannot be {text!r}.",
            "Give GiB for each graphics card, separated by commas, such as 10 or 10,8.",
        )
    return values


SPEC = Spec(
    id="transformers",
    title="Transformers",
    summary="Runs models from safetensors or .bin folders as they are, or quantized while loading.",
    formats=frozenset({ModelFormat.SAFETENSORS, ModelFormat.TORCH_BIN, ModelFormat.BITSANDBYTES}),
    environment="core",
    options=Options,
    sampling=frozenset(Sampling.__struct_fields__),
    estimate=estimate,
    rank=20,
)

# What ends a turn in the templates of common families, where a tokenizer knows the token.
TURN_ENDS = (
    "<|im_end|>",
    "<|eot_id|>",
    "<|end|>",
    "<end_of_turn>",
    "<turn|>",
    "<|end_of_text|>",
    "<|endoftext|>",
    "<|end_of_turn|>",
    "<|eom_id|>",
    "<|END_OF_TURN_TOKEN|>",
    "<|assistant_end|>",
    "<|return|>",
    "</s>",
)


class Backend(base.Backend):
    """Holds one transformers model, its KV cache and its chat template."""

    def __init__(self) -> None:
        self._model: Any = None
        self._tokenizer: Any = None
        self._decoder: Decoder | None = None
        self._template: ChatTemplate | None = None
        self._own_template = False
        self._stage: hf_files.Stage | None = None
        self._offload: Any = None  # TemporaryDirectory of rewritten weights
        self._ends: frozenset[int] = frozenset()
        self._context = 0
        self._constraint_tokenizer: Any = None
        self._breakers: frozenset[int] | None = None
        self._said: tuple[str, list[int]] = ("", [])  # the text of the last prompt with its answer, and their tokens

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
                has_template=self._own_template,
                notes=tuple(notes),
            )
        )

    def _load(self, request: Load, options: Options, report: Report) -> list[str]:
        _go_offline()
        import torch

        from app.generation import hf_load
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
        self._make_template(seen, options)  # its process starts while the weights load
        config = hf_load.read_config(seen, trust)
        plan = hf_load.Plan(folder=seen, weights=stage.weights, form=form, trust=trust)
        plan.notes += hf_load.set_rope(
            config, options.alpha_value, options.rope_freq_base or 0.0, options.compress_pos_emb
        )
        self._plan_precision(config, plan, options)
        self._plan_place(request.model, plan, options)
        self._model = hf_load.load_model(
            config, plan, lambda p: report.progress(p.phase, p.done, p.total, p.unit), lambda: report.cancelled
        )
        report.progress("Reading the tokenizer")
        self._read_tokenizer(seen, trust, options)
        self._ends = self._end_tokens(folder)
        self._context = self._choose_context(config, options, plan.notes)
        device, slow = hf_load.place_of(self._model)
        if slow:
            plan.notes.append("Part of the model is read from disk for each token: this is slow.")
        if plan.bitsandbytes is not None:
            self._check_quantized(plan)
            hf_load.unmap(self._model)
        _give_back()
        self._decoder = Decoder(self._model, device, slow)
        if not self._own_template and not options.chat_template:
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

    def _plan_precision(self, config: Any, plan: Any, options: Options) -> None:
        import torch

        from app.generation import hf_load

        cuda = torch.cuda.is_available() and not options.cpu
        quantization = getattr(config, "quantization_config", None)
        if quantization is not None:
            method = (
                quantization.get("quant_method")
                if isinstance(quantization, dict)
                else getattr(quantization, "quant_method", "")
            )
            method = str(getattr(method, "value", method))
            if not method.startswith("bitsandbytes"):
                raise WeftError(
                    ErrorKind.UNSUPPORTED,
                    f"This loader does not read {method or 'this'} quantization.",
                    "Choose the loader made for it.",
                )
            if options.load_in_8bit or options.load_in_4bit:
                plan.notes.append("The model is saved quantized; load_in_8bit and load_in_4bit have no effect.")
        name = "bfloat16" if options.bf16 else options.dtype
        if name == "auto":
            plan.dtype = hf_load.checkpoint_dtype(config, plan.weights, plan.form)
            if options.cpu:
                plan.dtype = torch.float32
            elif plan.dtype is torch.float16 and not (cuda or _has_mps()):
                plan.dtype = torch.bfloat16
                plan.notes.append(
                    "The weights are float16, which processors compute slowly; they are read as bfloat16."
                )
        else:
            plan.dtype = hf_load.DTYPES[name]
        if options.bf16 and options.dtype not in ("auto", "bfloat16"):
            plan.notes.append(f"bf16 goes before dtype = {options.dtype}.")
        if options.load_in_8bit and options.load_in_4bit:
            raise WeftError(
                ErrorKind.BAD_INPUT, "load_in_8bit and load_in_4bit are both on.", "Switch one of them off."
            )
        if quantization is None and (options.load_in_8bit or options.load_in_4bit):
            plan.bitsandbytes = _bitsandbytes(options, plan.dtype, cuda)
        elif quantization is None and (options.use_double_quant or options.compute_dtype):
            plan.notes.append("use_double_quant and compute_dtype concern 4-bit loading only.")
        self._plan_attention(plan, options, cuda)

    def _plan_attention(self, plan: Any, options: Options, cuda: bool) -> None:
        wanted = "flash_attention_2" if options.use_flash_attention_2 else options.attention
        if wanted == "flash_attention_2":
            from transformers.utils import is_flash_attn_2_available

            if not cuda or not is_flash_attn_2_available():
                why = (
                    "needs an NVIDIA graphics card"
                    if not cuda
                    else "needs the flash-attn package, which is not installed"
                )
                plan.notes.append(f"Flash attention 2 {why}; PyTorch's sdpa is used.")
                wanted = "sdpa"
            else:
                import torch

                if plan.dtype is torch.float32:
                    plan.dtype = torch.bfloat16
                    plan.notes.append("Flash attention 2 computes in 16 bits; the weights are read as bfloat16.")
        plan.attention = "" if wanted == "auto" else wanted

    def _plan_place(self, model: ModelEntry, plan: Any, options: Options) -> None:
        import torch

        gpus = 0 if options.cpu else torch.cuda.device_count() if torch.cuda.is_available() else 0
        limits = parse_gpu_memory(options.gpu_memory) if options.gpu_memory else []
        if limits and not gpus:
            plan.notes.append(
                "gpu_memory has no effect: "
                + ("cpu is on." if options.cpu else "there is no graphics card that PyTorch can use.")
            )
        if len(limits) > gpus > 0:
            plan.notes.append(f"gpu_memory names {len(limits)} graphics cards; there are {gpus}.")
        if options.disk and options.cpu_memory is None and not gpus:
            plan.notes.append("disk has no effect without a limit: set cpu_memory to what may stay in main memory.")
        if gpus and not options.auto_devices and not limits and options.cpu_memory is None:
            plan.device_map = {"": 0}
            return
        if not gpus and options.cpu_memory is None:
            plan.device_map = {"": "mps" if _has_mps() and not options.cpu else "cpu"}
            return
        plan.device_map = "auto"
        plan.max_memory = self._limits(gpus, limits, options)
        self._check_limits(model, plan, options)
        if options.disk:
            plan.offload_folder = self._offload_folder(options)

    def _limits(self, gpus: int, limits: list[float], options: Options) -> dict[int | str, int]:
        import psutil
        import torch

        found: dict[int | str, int] = {}
        for index in range(gpus):
            free = torch.cuda.mem_get_info(index)[0]
            found[index] = (
                min(free, int(limits[index] * GIB)) if index < len(limits) else 0 if limits else int(free * 0.9)
            )
        free = psutil.virtual_memory().available
        found["cpu"] = min(free, int(options.cpu_memory * GIB)) if options.cpu_memory is not None else int(free * 0.9)
        return found

    def _check_limits(self, model: ModelEntry, plan: Any, options: Options) -> None:
        """Say what is wrong before minutes are spent on loading."""
        assert plan.max_memory is not None
        room = sum(plan.max_memory.values())
        size = plan.dtype.itemsize
        need = _weight_bytes(model, options, size)
        if options.disk and plan.bitsandbytes is not None and need > room:
            raise WeftError(
                ErrorKind.BAD_INPUT,
                "bitsandbytes cannot keep quantized weights on disk.",
                "Raise the memory limits, or switch off load_in_4bit and load_in_8bit.",
            )
        if need > room and not options.disk:
            raise WeftError(
                ErrorKind.OUT_OF_MEMORY,
                f"The weights take {need / GIB:.2f} GiB and the limits allow {room / GIB:.2f} GiB.",
                "Raise gpu_memory or cpu_memory, or switch on disk.",
            )

    def _offload_folder(self, options: Options) -> str:
        if options.offload_folder:
            folder = Path(options.offload_folder).expanduser()
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise WeftError(
                    ErrorKind.PERMISSION,
                    f"The offload folder {folder} cannot be made: {error.strerror}.",
                    "Choose another offload_folder.",
                ) from error
            return str(folder)
        import tempfile

        self._offload = tempfile.TemporaryDirectory(prefix="weft-offload-")
        return self._offload.name

    def _read_tokenizer(self, folder: Path, trust: bool, options: Options) -> None:
        import transformers

        try:
            self._tokenizer = transformers.AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=trust
            )
        except Exception as error:  # every tokenizer class fails in its own way
            raise WeftError(
                ErrorKind.UNSUPPORTED if self._stage and self._stage.custom_code else ErrorKind.CORRUPT,
                f"The model's tokenizer cannot be read: {str(error).splitlines()[0][:300] if str(error) else type(error).__name__}",
                "Download the tokenizer files again (tokenizer.json, tokenizer_config.json, tokenizer.model).",
            ) from error
        template = options.chat_template.strip()
        if not template:
            found = getattr(self._tokenizer, "chat_template", None)
            if isinstance(found, dict):
                found = found.get("default") or next(iter(found.values()), None)
            template = found or ""
            self._own_template = bool(template)
        if template.lower() in ("", "chatml"):
            template = DEFAULT_TEMPLATE
        if self._template is None or self._template.source != template:
            self._set_template(template)
        assert self._template is not None
        names = {
            name: str(token) for name, token in self._tokenizer.special_tokens_map.items() if isinstance(token, str)
        }
        self._template.set_variables(**names)

    def _make_template(self, folder: Path, options: Options) -> None:
        """Guess the template from the files, so that its process is up before the weights are."""
        source = options.chat_template.strip() or hf_files.find_template(folder)
        self._set_template(source if source and source.lower() != "chatml" else DEFAULT_TEMPLATE)

    def _set_template(self, source: str) -> None:
        if self._template is not None:
            self._template.close()
        self._template = ChatTemplate(source)
        self._template.warm()

    def _end_tokens(self, folder: Path) -> frozenset[int]:
        """Tokens after which nothing follows: of generation_config.json, the model, the tokenizer, and the family's turn ends."""
        found: set[int] = set()
        sources: list[Any] = [
            self._tokenizer.eos_token_id,
            self._model.config.get_text_config(decoder=True).eos_token_id,
        ]
        if (folder / "generation_config.json").is_file():
            sources.append(hf_files.read_json(folder / "generation_config.json").get("eos_token_id"))
        for source in sources:
            found.update(t for t in (source if isinstance(source, list) else [source]) if isinstance(t, int))
        added = self._tokenizer.get_added_vocab()
        found.update(added[name] for name in TURN_ENDS if name in added)
        return frozenset(found)

    def _check_quantized(self, plan: Any) -> None:
        """bitsandbytes leaves out what it cannot replace without a word; then say so."""
        import torch

        names = [type(m).__name__ for m in self._model.modules() if isinstance(m, torch.nn.Linear)]
        if not any(name.startswith("Linear4bit") or name.startswith("Linear8bit") for name in names):
            plan.notes.append(
                "bitsandbytes found no layer of this model that it can quantize; it is loaded unquantized."
            )

    def _choose_context(self, config: Any, options: Options, notes: list[str]) -> int:
        text = config.get_text_config(decoder=True)
        names = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length")
        trained = next((int(v) for n in names if isinstance(v := getattr(text, n, None), int) and v > 0), 0)
        stretched = int(trained * options.compress_pos_emb)
        if options.context_length is None:
            return stretched or 2048
        rotary = isinstance(getattr(text, "rope_parameters", None), dict)
        if trained and options.context_length > trained and not rotary:
            notes.append(f"This model has {trained} positions and no more; the context length is {trained}.")
            return trained
        if (
            stretched
            and options.context_length > stretched
            and options.alpha_value == 1
            and options.rope_freq_base is None
        ):
            notes.append(f"The model was trained for {trained} tokens; beyond that its answers may lose sense.")
        return options.context_length

    def unload(self) -> None:
        if self._template is not None:
            self._template.close()
        if self._decoder is not None:
            self._decoder.close()
        had_model = self._model is not None
        self._model = self._tokenizer = self._decoder = self._template = None
        self._constraint_tokenizer = self._breakers = None
        self._own_template = False
        self._said = ("", [])
        for folder in (self._stage, self._offload):
            if folder is not None:
                folder.close() if isinstance(folder, hf_files.Stage) else folder.cleanup()
        self._stage = self._offload = None
        if had_model:
            _give_back()
            torch = sys.modules["torch"]
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    # Generating ---------------------------------------------------------------------------------

    def generate(self, request: Generate, report: Report) -> Generated:
        if self._model is None or self._decoder is None:
            raise WeftError(ErrorKind.BAD_INPUT, "No model is loaded.", "Load a model first.")
        if request.images:
            raise WeftError(
                ErrorKind.UNSUPPORTED, "This loader does not look at images yet.", "Remove the images from the message."
            )
        sampling = request.sampling
        seed = sampling.seed if sampling.seed is not None else int.from_bytes(os.urandom(4)) % (2**32 - 1)
        prompt, tokens, dropped = self._prompt_tokens(request)
        constraint = self._constraint(sampling)
        started = time.perf_counter()
        reused = self._decoder.begin(tokens)
        logits = self._decoder.read(
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

        assert self._decoder is not None
        sampling = request.sampling
        sampler = Sampler(sampling, seed, tokens, self._dry_breakers, constraint)
        text = TokenText(self._tokenizer, tokens)
        scanner = StopScanner((*sampling.stop_strings(), *self._plain_ends(request)))
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
            if token in self._ends:
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
                logits = self._decoder.step(token)
        seconds = time.perf_counter() - first
        rest = ""
        if not scanner.matched:
            rest, _ = scanner.feed(text.flush())
            rest += scanner.flush()
        if rest or unsaid:
            report.tokens(rest, unsaid)
        # What was said can be found again in the next prompt only if its text is all that its tokens are.
        hidden = scanner.matched or not set(answer).isdisjoint(self._tokenizer.all_special_ids)
        self._said = ("", []) if hidden else (prompt + "".join(said) + rest, tokens + answer)
        return reason, count, seconds

    def _prompt_tokens(self, request: Generate) -> tuple[str, list[int], int]:
        """The prompt as text and tokens, and how many messages had to be left out."""
        if request.prompt is not None:
            tokens = self._encode(request.prompt, True)
            return request.prompt, fit_text(tokens or self._start_token(), self._context - 1), 0
        reserve = request.reserve
        if request.sampling.max_tokens is not None:
            reserve = min(reserve, request.sampling.max_tokens)
        # A reserve of more than half a small context would leave no room for the question.
        limit = self._context - max(1, min(reserve, self._context // 2))
        template = self._template
        assert template is not None

        texts: dict[int, str] = {}

        def tokenize(messages: Sequence[Message]) -> list[int]:
            text = template.render(messages, continue_last=request.continue_last)
            texts[len(messages)] = text
            return self._encode_after_said(text)

        tokens, dropped = fit_messages(request.messages, tokenize, limit)
        return texts[len(request.messages) - dropped], tokens, dropped

    def _encode_after_said(self, text: str) -> list[int]:
        """Tokens of a rendered conversation, keeping those that the last answer was really made of.

        A model may write a word with other tokens than the tokenizer would. Tokenizing its answer anew would then
        change the history, and everything after the change would have to be read again. Sure to be the same only
        where the rest is nothing, or begins with a token of its own.
        """
        said, tokens = self._said
        if said and text.startswith(said):
            rest = text[len(said) :]
            if not rest:
                return list(tokens)
            if rest.startswith(tuple(self._tokenizer.get_added_vocab())):
                return tokens + self._encode(rest, False)
        return self._encode(text, not self._own_template)

    def _encode(self, text: str, special: bool) -> list[int]:
        tokens: list[int] = self._tokenizer(text, add_special_tokens=special)["input_ids"]
        eos = self._tokenizer.eos_token_id
        if special and tokens and tokens[-1] == eos and not text.endswith(self._tokenizer.eos_token or "\0"):
            tokens = tokens[:-1]  # some tokenizers close every text; this one is to be continued
        return tokens

    def _start_token(self) -> list[int]:
        """What an empty text begins with."""
        for token in (self._tokenizer.bos_token_id, self._tokenizer.eos_token_id, 0):
            if token is not None:
                return [token]
        return [0]

    def _plain_ends(self, request: Generate) -> tuple[str, ...]:
        """ChatML's marks, where the tokenizer does not know them as tokens."""
        if request.prompt is not None or self._template is None or self._template.source != DEFAULT_TEMPLATE:
            return ()
        return ("<|im_end|>", "<|im_start|>")

    def _dry_breakers(self) -> frozenset[int]:
        if self._breakers is None:
            from app.generation.hf_sampling import dry_breaker_tokens

            self._breakers = dry_breaker_tokens(self._tokenizer)
        return self._breakers

    def _constraint(self, sampling: Sampling) -> Any:
        if not (sampling.grammar.strip() or sampling.json_schema.strip()):
            return None
        try:
            from app.generation.hf_grammar import Constraint, make_tokenizer
        except ImportError as error:
            raise WeftError(
                ErrorKind.ENVIRONMENT,
                "Grammars and schemas need llguidance, which is not installed.",
                "Repair the core environment on the Settings page.",
            ) from error
        if self._constraint_tokenizer is None:
            width = self._model.config.get_text_config(decoder=True).vocab_size
            self._constraint_tokenizer = make_tokenizer(self._tokenizer, width, sorted(self._ends))
        return Constraint(self._constraint_tokenizer, sampling)

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


def _bitsandbytes(options: Options, dtype: Any, cuda: bool) -> dict[str, Any]:
    """Arguments of BitsAndBytesConfig."""
    from app.generation.hf_load import DTYPES

    if options.load_in_8bit:
        # With that switch bitsandbytes leaves alone what lies in main memory: only for what overflows from a card.
        return {"load_in_8bit": True, "llm_int8_enable_fp32_cpu_offload": cuda}
    return {
        "load_in_4bit": True,
        "bnb_4bit_compute_dtype": DTYPES[options.compute_dtype] if options.compute_dtype else dtype,
        "bnb_4bit_quant_type": options.quant_type,
        "bnb_4bit_use_double_quant": options.use_double_quant,
    }


def _go_offline() -> None:
    """Forbid every access to the network, before transformers is imported."""
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", DO_NOT_TRACK="1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def _has_mps() -> bool:
    import torch

    return torch.backends.mps.is_available()


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
