"""Loading a staged model folder through transformers: where its parts go, in which precision, and proof that all came.

Imports torch and transformers at its top: only an engine's child may import this module, and only inside a method.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import torch
import transformers
from safetensors import SafetensorError, safe_open

from app.core.errors import ErrorKind, WeftError
from app.core.jobs import Progress

GIB = 1024**3
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Plan(msgspec.Struct, kw_only=True):
    """How to load. `notes` collects what had to be decided otherwise than asked.

    Attributes:
        folder: what transformers reads: the staged folder, or the model's own when its code may run.
        weights: the files to check, in order; form: `safetensors` or `bin`.
        trust: run the Python files of the folder.
        dtype: of the weights that are not quantized.
        device_map: as transformers takes it. max_memory: bytes by device, for `auto`.
        offload_folder: where weights go that fit nowhere else; "" for nowhere.
        attention: transformers' name, or "" for its own choice.
        bitsandbytes: arguments of BitsAndBytesConfig; None for no quantization.
        packed: the files hold GPTQ's, AWQ's or HQQ's matrices. hqq: bits to pack the weights to while loading, 0 for not.
        packing: the quantization_config that does either.
    """

    folder: Path
    weights: list[Path]
    form: str = "safetensors"
    trust: bool = False
    dtype: torch.dtype = torch.float32
    device_map: Any = None
    max_memory: dict[int | str, int] | None = None
    offload_folder: str = ""
    attention: str = ""
    bitsandbytes: dict[str, Any] | None = None
    packed: bool = False
    hqq: int = 0
    packing: Any = None
    notes: list[str] = []


def read_config(folder: Path, trust: bool) -> Any:
    """The model's config object.

    Raises:
        WeftError: UNSUPPORTED for an architecture that this transformers does not know; CORRUPT for a bad config.
    """
    try:
        return transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=trust)
    except Exception as error:  # whatever a config class makes of a stranger's values
        text = str(error)
        if "does not recognize this architecture" in text or "model_type" in text or isinstance(error, KeyError):
            raise WeftError(
                ErrorKind.UNSUPPORTED,
                f"transformers {transformers.__version__} does not know this model's architecture: {_first(text)}",
                "Use another loader, or allow the model's own code if it brings any and you trust it.",
            ) from error
        raise WeftError(
            ErrorKind.CORRUPT, f"The model's config.json cannot be used: {_first(text)}", "Download the model again."
        ) from error


def checkpoint_dtype(config: Any, weights: list[Path], form: str) -> torch.dtype:
    """The precision that the weights were saved in."""
    text = config.get_text_config(decoder=True)
    for value in (getattr(config, "dtype", None), getattr(text, "dtype", None)):
        if isinstance(value, torch.dtype):
            return value
        if isinstance(value, str) and value in DTYPES:
            return DTYPES[value]
    if form == "safetensors":
        with _named(weights[0]), safe_open(weights[0], "pt") as file:
            for key in file.keys():  # noqa: SIM118 (no dict: it cannot be iterated)
                found = file.get_slice(key).get_dtype()
                if found in ("BF16", "F16", "F32"):
                    return {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}[found]
    return torch.float32


def set_rope(config: Any, alpha_value: float, rope_freq_base: float, compress_pos_emb: float) -> list[str]:
    """Extend the context by changing the rotary embedding, as text-generation-webui's options do.

    `rope_freq_base` replaces the base; else `alpha_value` makes it base * alpha ** (64 / 63), base being the model's
    own (10000 for Llama); `compress_pos_emb` divides the positions (linear scaling).

    Returns:
        Notes on what had no effect.
    """
    if alpha_value == 1 and not rope_freq_base and compress_pos_emb == 1:
        return []
    text = config.get_text_config(decoder=True)
    parameters = getattr(text, "rope_parameters", None)
    if not isinstance(parameters, dict) or not parameters:
        return ["This model has no rotary embedding: alpha_value, rope_freq_base and compress_pos_emb have no effect."]
    notes: list[str] = []
    nested = [p for p in parameters.values() if isinstance(p, dict)]
    for part in nested or [parameters]:
        if rope_freq_base:
            part["rope_theta"] = float(rope_freq_base)
        elif alpha_value != 1:
            part["rope_theta"] = float(part.get("rope_theta") or 10000.0) * alpha_value ** (64 / 63)
        if compress_pos_emb != 1:
            if part.get("rope_type", "default") not in ("default", "linear"):
                notes.append(f"compress_pos_emb replaces this model's own rope scaling ({part['rope_type']}).")
                for key in set(part) - {"rope_theta", "partial_rotary_factor", "mrope_section"}:
                    del part[key]
            part["rope_type"] = "linear"
            part["factor"] = float(compress_pos_emb)
    if rope_freq_base and alpha_value != 1:
        notes.append("alpha_value has no effect beside rope_freq_base, which replaces what it would change.")
    return list(dict.fromkeys(notes))


def load_model(config: Any, plan: Plan, progress: Callable[[Progress], None], cancelled: Callable[[], bool]) -> Any:
    """The model, in evaluation mode, complete or not at all.

    Raises:
        WeftError: CORRUPT for damaged files and for weights that are missing or of the wrong shape; HOSTILE for
            pickles that hold more than tensors; OUT_OF_MEMORY; CANCELLED.
    """
    check_weights(plan)
    model_class = _model_class(config, plan.trust)
    arguments: dict[str, Any] = {
        "config": config,
        "dtype": plan.dtype,
        "local_files_only": True,
        "trust_remote_code": plan.trust,
        "use_safetensors": plan.form == "safetensors",
        "weights_only": True,
        "output_loading_info": True,
        "device_map": plan.device_map,
    }
    if plan.max_memory:
        arguments["max_memory"] = dict(plan.max_memory)
    if plan.offload_folder:
        arguments["offload_folder"] = plan.offload_folder
    if plan.attention:
        arguments["attn_implementation"] = plan.attention
    if plan.bitsandbytes is not None:
        arguments["quantization_config"] = transformers.BitsAndBytesConfig(**plan.bitsandbytes)
    elif plan.packing is not None:
        arguments["quantization_config"] = plan.packing
        for owner in (config, config.get_text_config(decoder=True)):
            if getattr(owner, "quantization_config", None) is not None:
                del owner.quantization_config  # ours reads what is there, whatever this says
    packs = plan.bitsandbytes is not None or plan.packing is not None
    memory = _large_blocks_given_back() if packs else contextlib.nullcontext()
    with _progress(progress, cancelled), memory, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # advice to programmers; what matters to users is a note or an error of ours
        model, info = _from_pretrained(model_class, plan, arguments)
    _complete(model, info)
    _plain_where_the_kernel_fails(model)
    return model.eval().requires_grad_(False)


def _plain_where_the_kernel_fails(model: Any) -> None:
    """Keep 4-bit matrices of odd sizes from bitsandbytes' AVX512-BF16 kernel, which ends the first forward for them.

    It wants 32 rows at a time and whole blocks of columns: a mixture's router has 8 rows, a small key projection 16.
    """
    for module in model.modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None and hasattr(module, "support_avx512bf16_for_cpu"):
            rows, columns = state.shape
            if rows % 32 or columns % state.blocksize:
                module.support_avx512bf16_for_cpu = False


@contextlib.contextmanager
def _large_blocks_given_back() -> Iterator[None]:
    """While quantizing, have glibc return each whole matrix to the system as soon as it is freed.

    Left alone it learns from the first ones to keep such blocks in its heap, where small quantized results land between
    them: the peak then grows by up to the weights' size and more, differently at each load.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt if sys.platform == "linux" else None
    except (OSError, AttributeError):
        mallopt = None  # another C library
    if mallopt is None:
        yield
        return
    mallopt(_M_MMAP_THRESHOLD, 1024**2)
    try:
        yield
    finally:
        # What glibc would have learnt at most, for the activations that come and go from now on.
        mallopt(_M_MMAP_THRESHOLD, 32 * 1024**2)
        mallopt(_M_TRIM_THRESHOLD, 64 * 1024**2)


def check_weights(plan: Plan) -> None:
    """Read the header of every weight file.

    Raises:
        WeftError: CORRUPT, naming the file; HOSTILE for a pickle that is more than tensors.
    """
    for path in plan.weights:
        if plan.form == "safetensors":
            with _named(path), safe_open(path, "pt") as file:
                file.keys()
        else:
            from app.core.pickle_scan import check

            check(path)


def unmap(model: Any) -> None:
    """Copy what still lies in the mapped weight files, so that the files' pages leave memory after quantization."""
    for parameter in model.parameters():
        if parameter.device.type == "cpu" and parameter.is_floating_point():
            parameter.data = parameter.data.clone()


def place_of(model: Any) -> tuple[torch.device, bool]:
    """Where input tokens go, and whether weights are read from disk at every step."""
    places = set((getattr(model, "hf_device_map", None) or {}).values())
    if not places:
        return model.device, False
    for place in places:
        if place not in ("cpu", "disk"):
            device = torch.device(f"cuda:{place}" if isinstance(place, int) else place)
            return device, "disk" in places
    return torch.device("cpu"), "disk" in places


def _from_pretrained(model_class: Any, plan: Plan, arguments: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    try:
        return model_class.from_pretrained(plan.folder, **arguments)
    except WeftError:
        raise
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise WeftError(
            ErrorKind.OUT_OF_MEMORY,
            "There is not enough memory for this model.",
            "Load it in 4-bit (load_in_4bit), with disk offload (disk), or choose a smaller model.",
        ) from error
    except SafetensorError as error:
        raise WeftError(
            ErrorKind.CORRUPT, f"A weight file of {plan.weights[0].parent} is damaged: {error}", "Download it again."
        ) from error
    except Exception as error:  # transformers raises everything there is; sorted by what a user can do
        text = str(error)
        if "out of memory" in text.lower() or "can't allocate" in text.lower():
            raise WeftError(
                ErrorKind.OUT_OF_MEMORY,
                f"There is not enough memory for this model: {_first(text)}",
                "Load it in 4-bit (load_in_4bit), with disk offload (disk), or choose a smaller model.",
            ) from error
        if "offload" in text.lower() and "disk" in text.lower():
            raise WeftError(
                ErrorKind.BAD_INPUT,
                f"The model cannot be placed within these limits: {_first(text)}",
                "Raise gpu_memory or cpu_memory, or choose another quantization.",
            ) from error
        if "size mismatch" in text or "mismatched" in text.lower():
            raise WeftError(
                ErrorKind.CORRUPT,
                f"The weights do not have the shapes that config.json says: {_first(text)}",
                "Download the model again.",
            ) from error
        if plan.form == "bin" and (
            "weights_only" in text or "Unpickl" in text or "zip archive" in text or "PytorchStreamReader" in text
        ):
            raise WeftError(
                ErrorKind.CORRUPT,
                f"The weights of {plan.weights[0].parent} are damaged: {_first(text)}",
                "Download the model again.",
            ) from error
        raise WeftError(
            ErrorKind.UNSUPPORTED,
            f"transformers cannot load this model: {_first(text)}",
            "Try another loader, or download the model again.",
        ) from error


def _complete(model: Any, info: dict[str, Any]) -> None:
    """transformers fills weights that it does not find with random numbers: never answer from those."""
    missing = sorted(info.get("missing_keys") or ())
    mismatched = sorted(str(m[0]) for m in info.get("mismatched_keys") or ())
    errors = [str(e) for e in info.get("error_msgs") or ()]
    if missing or mismatched or errors:
        what = missing or mismatched or errors
        more = f" and {len(what) - 1} more" if len(what) > 1 else ""
        raise WeftError(
            ErrorKind.CORRUPT,
            f"The model's files lack weights that its architecture needs: {what[0]}{more}."
            if missing
            else f"Weights of this model do not fit its config: {what[0]}{more}.",
            "Download the model again, or use the loader that its quantization is made for.",
        )
    empty = [n for n, p in model.named_parameters() if p.is_meta and not getattr(model, "hf_device_map", None)]
    if empty:
        raise WeftError(ErrorKind.CORRUPT, f"The weight {empty[0]} was not loaded.", "Download the model again.")


def _model_class(config: Any, trust: bool) -> Any:
    auto = getattr(config, "auto_map", None) or {}
    if trust and any(name.startswith("AutoModelFor") for name in auto):
        return (
            transformers.AutoModelForCausalLM
            if "AutoModelForCausalLM" in auto
            else transformers.AutoModelForImageTextToText
        )
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return transformers.AutoModelForImageTextToText
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise WeftError(
            ErrorKind.UNSUPPORTED,
            f"A {config.model_type} model does not write text.",
            "Choose a text generation (causal language) model.",
        )
    return transformers.AutoModelForCausalLM


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Turn what reading a safetensors file raises into an error that names the file."""
    try:
        yield
    except (SafetensorError, OSError, ValueError) as error:
        raise WeftError(
            ErrorKind.CORRUPT, f"{path} is damaged or not complete: {_first(str(error))}", "Download this file again."
        ) from error


class _Bar:
    """What transformers takes for its progress bar."""

    def __init__(self, items: Any, total: Any, say: Callable[[Progress], None], cancelled: Callable[[], bool]) -> None:
        self._items, self._say, self._cancelled = items, say, cancelled
        self._total = float(total if total is not None else len(items) if hasattr(items, "__len__") else 0)
        self._done = 0.0

    def __iter__(self) -> Iterator[Any]:
        for item in self._items:
            self.update(0)
            yield item
            self.update(1)

    def update(self, count: float = 1) -> None:
        if self._cancelled():
            raise WeftError(ErrorKind.CANCELLED, "Loading was stopped.")
        self._done += count
        self._say(Progress(phase="Loading the weights", done=self._done, total=self._total, unit="tensors"))

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *_: object) -> None:
        return

    def __getattr__(self, _: str) -> Callable[..., None]:
        return lambda *_args, **_kwargs: None


@contextlib.contextmanager
def _progress(say: Callable[[Progress], None], cancelled: Callable[[], bool]) -> Iterator[None]:
    from transformers.utils import logging

    def hook(_factory: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Bar:
        return _Bar(args[0] if args else kwargs.get("iterable") or (), kwargs.get("total"), say, cancelled)

    previous = logging.set_tqdm_hook(hook)
    try:
        yield
    finally:
        logging.set_tqdm_hook(previous)


def _first(text: str) -> str:
    """The first line of a library's message, cut to a sentence's length."""
    line = next((line.strip() for line in text.splitlines() if line.strip()), "no reason given")
    return line if len(line) <= 300 else line[:299] + "…"
