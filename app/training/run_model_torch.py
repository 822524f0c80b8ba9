"""The base of a run, loaded to be trained on: in which precision, quantized or not, from safetensors or GGUF. Imports torch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from app.core.errors import ErrorKind, WeftError
from app.core.library import ModelEntry, ModelFormat
from app.core.quantization import PACKED
from app.engine.reporting import Report
from app.generation import hf_files, hf_load
from app.training import methods
from app.training.run_config import RunConfig


@dataclass
class Base:
    """A loaded base.

    Attributes:
        dtype: of the weights that are not quantized, and of the arithmetic. files: its weight files. notes: sentences worth showing.
    """

    model: Any
    device: torch.device
    dtype: torch.dtype
    files: list[Path]
    notes: list[str] = field(default_factory=list)
    close: Callable[[], None] = lambda: None

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """A context for forward passes: 16-bit products where the precision asks for them."""
        if self.dtype is torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def device_words(self) -> str:
        """What it is trained on, for people."""
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        count = torch.get_num_threads()
        return f"the processor, {count} thread{'s' if count != 1 else ''}"


def cards() -> int:
    """How many graphics cards PyTorch can use here."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def choose_device(config: RunConfig, local_process: int | None = None) -> torch.device:
    """Where to train. Raises WeftError UNSUPPORTED when a card is asked for and there is none."""
    cuda = torch.cuda.is_available()
    if config.model.device == "cuda" and not cuda:
        raise WeftError(
            ErrorKind.UNSUPPORTED,
            "PyTorch finds no graphics card here.",
            'Set device = "auto" under [model], or install a driver.',
        )
    if not cuda or config.model.device == "cpu":
        return torch.device("cpu")
    return torch.device("cuda", local_process or 0)


def choose_dtype(config: RunConfig, device: torch.device) -> torch.dtype:
    """The precision that `auto` means here, else the one asked for."""
    wanted = config.train.precision
    if wanted == "auto":
        wanted = (
            "bf16"
            if device.type == "cuda" and torch.cuda.is_bf16_supported()
            else "fp16"
            if device.type == "cuda"
            else "fp32"
        )
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[wanted]


def load_base(
    config: RunConfig,
    entry: ModelEntry,
    report: Report,
    local_process: int | None = None,
    *,
    in_memory: bool = False,
) -> Base:
    """Load the model, frozen.

    Args:
        in_memory: into main memory, also where it is to be trained on a card: that need not hold all of it (FSDP).

    Raises:
        WeftError: UNSUPPORTED for what cannot be trained on, naming what can; what `hf_load.load_model` raises.
    """
    methods.check_base(config, entry)
    device = choose_device(config, local_process)
    dtype = choose_dtype(config, device)
    if in_memory:
        device = torch.device("cpu")
    if entry.format is ModelFormat.GGUF:
        return _load_gguf(config, entry, device, dtype)
    folder = Path(entry.path)
    form = "bin" if entry.format is ModelFormat.TORCH_BIN else "safetensors"
    packed = entry.format in PACKED
    lone = Path(entry.files[0]) if packed and len(entry.files) == 1 else None
    stage = hf_files.Stage(folder, form, lone)
    try:
        trust = config.model.trust_remote_code and bool(stage.custom_code)
        if trust and any("--" in name for name in stage.custom_code):
            raise WeftError(
                ErrorKind.HOSTILE,
                f"{entry.name} wants to run code of another repository: {', '.join(stage.custom_code)}.",
                "Weft runs only code that lies in the model's own folder. Switch off trust_remote_code.",
            )
        seen = folder if trust else stage.path
        settings = hf_load.read_config(seen, trust)
        plan = hf_load.Plan(folder=seen, weights=stage.weights, form=form, trust=trust, dtype=dtype, packed=packed)
        plan.device_map = {"": str(device)}
        plan.attention = "" if config.model.attention == "auto" else config.model.attention
        if packed:
            plan.packing = _packing(stage, folder)
        if config.model.quantization != "none":
            if packed or getattr(settings, "quantization_config", None) is not None:
                plan.notes.append("The model is saved quantized; `quantization` has no effect.")
            else:
                plan.bitsandbytes = bitsandbytes_arguments(config, dtype)
        model = hf_load.load_model(
            settings, plan, lambda p: report.progress(p.phase, p.done, p.total, p.unit), lambda: report.cancelled
        )
        if plan.packing is not None:
            plan.notes += plan.packing.notes
        if plan.bitsandbytes is not None or packed:
            hf_load.unmap(model)
        undo_bf16_packing(model)
    except BaseException:
        stage.close()
        raise
    return Base(model, device, dtype, list(stage.weights), plan.notes, stage.close)


def _packing(stage: hf_files.Stage, folder: Path) -> Any:
    """GPTQ's, AWQ's or HQQ's matrices, kept packed. Each pass unpacks them in float32, which lets gradients through."""
    from app.adapters.packed_load import PackedConfig, Stored, table_of

    return PackedConfig(Stored(stage.weights, table_of(stage.config, folder)), kernel="exact")


def bitsandbytes_arguments(config: RunConfig, dtype: torch.dtype) -> dict[str, Any]:
    """Arguments of BitsAndBytesConfig."""
    if config.model.quantization == "int8":
        return {"load_in_8bit": True}
    return {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": config.model.quantization,
        "bnb_4bit_compute_dtype": dtype,
        "bnb_4bit_use_double_quant": config.model.double_quant,
    }


def undo_bf16_packing(model: Any) -> None:
    """On AVX512-BF16 processors bitsandbytes repacks 4-bit weights in the first forward without gradients, after which
    gradients below are cut and saving is wrong. Forbid it, which costs speed and nothing else."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def _load_gguf(config: RunConfig, entry: ModelEntry, device: torch.device, dtype: torch.dtype) -> Base:
    """A GGUF's weights, dequantized; every architecture that transformers converts."""
    import tqdm
    import transformers

    from app.core.gguf_header import read_gguf_header

    path = Path(entry.path)
    read_gguf_header(path)  # bounds, before a library sees it
    tqdm.tqdm.monitor_interval = 0  # its bars start a thread that never ends
    if config.model.quantization != "none":
        raise WeftError(
            ErrorKind.UNSUPPORTED,
            "A GGUF model is dequantized for training and cannot be quantized again here.",
            "Set quantization = none, or train on the model's safetensors folder.",
        )
    try:
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            path.parent,
            gguf_file=path.name,
            dtype=dtype,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (ValueError, KeyError, NotImplementedError, RuntimeError, OSError) as error:
        raise WeftError(
            ErrorKind.UNSUPPORTED,
            f"transformers cannot read this GGUF for training: {' '.join(str(error).split())[:200]}",
            "Train on the model's safetensors folder.",
        ) from error
    missing = sorted(info.get("missing_keys") or ())
    if missing:
        raise WeftError(
            ErrorKind.CORRUPT, f"{path} lacks the weight {missing[0]}.", "Train on the model's safetensors folder."
        )
    notes = ["The GGUF was dequantized: the adapter is trained on what its quantized weights stand for."]
    return Base(model.eval().requires_grad_(False).to(device), device, dtype, [path], notes)
