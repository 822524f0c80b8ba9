"""From the Transformers loader's options to a plan: precision, attention, and where the parts of a model go.

Imports torch at its top: only an engine's child may import this module, and only inside a method.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from app.core.errors import ErrorKind, WeftError
from app.core.library import ModelEntry
from app.generation.hf_load import DTYPES, Plan, checkpoint_dtype
from app.generation.hf_memory import GIB, automatic_context, parse_gpu_memory, weight_bytes
from app.generation.hf_options import Options


def plan_precision(config: Any, plan: Plan, options: Options) -> None:
    """Decide dtype, quantization and attention.

    Raises:
        WeftError: UNSUPPORTED for quantizations that other loaders read; BAD_INPUT for options that exclude each other.
    """
    cuda = torch.cuda.is_available() and not options.cpu
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None:
        method = (
            quantization.get("quant_method")
            if isinstance(quantization, dict)
            else getattr(quantization, "quant_method", "")
        )
        method = str(getattr(method, "value", method))
        if not method.startswith("bitsandbytes") and not plan.packed:
            raise WeftError(
                ErrorKind.UNSUPPORTED,
                f"This loader does not read {method or 'this'} quantization.",
                "Choose the loader made for it.",
            )
    saved = quantization is not None or plan.packed
    if saved and (options.load_in_8bit or options.load_in_4bit or options.load_in_hqq != "off"):
        plan.notes.append("The model is saved quantized; load_in_8bit, load_in_4bit and load_in_hqq have no effect.")
    name = "bfloat16" if options.bf16 else options.dtype
    if name == "auto":
        plan.dtype = checkpoint_dtype(config, plan.weights, plan.form)
        if options.cpu and not plan.packed:  # the processor's kernel for packed weights computes in 16 bits
            plan.dtype = torch.float32
        elif plan.dtype is torch.float16 and not (cuda or _has_mps()):
            plan.dtype = torch.bfloat16
            plan.notes.append("The weights are float16, which processors compute slowly; they are read as bfloat16.")
    else:
        plan.dtype = DTYPES[name]
    if options.bf16 and options.dtype not in ("auto", "bfloat16"):
        plan.notes.append(f"bf16 goes before dtype = {options.dtype}.")
    if options.load_in_8bit and options.load_in_4bit:
        raise WeftError(ErrorKind.BAD_INPUT, "load_in_8bit and load_in_4bit are both on.", "Switch one of them off.")
    if options.load_in_hqq != "off" and (options.load_in_8bit or options.load_in_4bit):
        raise WeftError(
            ErrorKind.BAD_INPUT, "load_in_hqq is on beside bitsandbytes' quantization.", "Switch one of them off."
        )
    if not saved and options.load_in_hqq != "off":
        plan.hqq = int(options.load_in_hqq.partition("-")[0])
    if not saved and (options.load_in_8bit or options.load_in_4bit):
        plan.bitsandbytes = _bitsandbytes(options, plan.dtype, cuda)
    elif not saved and (options.use_double_quant or options.compute_dtype):
        plan.notes.append("use_double_quant and compute_dtype concern 4-bit loading only.")
    plan_attention(plan, options, cuda)


def plan_attention(plan: Plan, options: Options, cuda: bool) -> None:
    """Decide the attention code; what this machine cannot run becomes a note."""
    wanted = "flash_attention_2" if options.use_flash_attention_2 else options.attention
    if wanted == "flash_attention_2":
        from transformers.utils import is_flash_attn_2_available

        if not cuda or not is_flash_attn_2_available():
            why = (
                "needs an NVIDIA graphics card" if not cuda else "needs the flash-attn package, which is not installed"
            )
            plan.notes.append(f"Flash attention 2 {why}; PyTorch's sdpa is used.")
            wanted = "sdpa"
        elif plan.dtype is torch.float32:
            plan.dtype = torch.bfloat16
            plan.notes.append("Flash attention 2 computes in 16 bits; the weights are read as bfloat16.")
    plan.attention = "" if wanted == "auto" else wanted


def plan_place(model: ModelEntry, plan: Plan, options: Options) -> None:
    """Decide where the parts of the model go.

    Raises:
        WeftError: OUT_OF_MEMORY or BAD_INPUT when they cannot fit within the limits given.
    """
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
    plan.max_memory = _limits(gpus, limits, options)
    _check_limits(model, plan, options)
    if options.disk:
        plan.offload_folder = _offload_folder(options)


def _limits(gpus: int, limits: list[float], options: Options) -> dict[int | str, int]:
    import psutil

    found: dict[int | str, int] = {}
    for index in range(gpus):
        free = torch.cuda.mem_get_info(index)[0]
        found[index] = min(free, int(limits[index] * GIB)) if index < len(limits) else 0 if limits else int(free * 0.9)
    free = psutil.virtual_memory().available
    found["cpu"] = min(free, int(options.cpu_memory * GIB)) if options.cpu_memory is not None else int(free * 0.9)
    return found


def _check_limits(model: ModelEntry, plan: Plan, options: Options) -> None:
    """Say what is wrong before minutes are spent on loading."""
    assert plan.max_memory is not None
    room = sum(plan.max_memory.values())
    size = plan.dtype.itemsize
    need = weight_bytes(model, options, size)
    if options.disk and need > room and (plan.bitsandbytes is not None or plan.packed or plan.hqq):
        raise WeftError(
            ErrorKind.BAD_INPUT,
            "Quantized weights cannot be kept on disk.",
            "Raise the memory limits, or switch off load_in_4bit, load_in_8bit and load_in_hqq.",
        )
    if need > room and not options.disk:
        raise WeftError(
            ErrorKind.OUT_OF_MEMORY,
            f"The weights take {need / GIB:.2f} GiB and the limits allow {room / GIB:.2f} GiB.",
            "Raise gpu_memory or cpu_memory, or switch on disk.",
        )


def _offload_folder(options: Options) -> str:
    """The chosen folder, or a new temporary one (which the backend removes when it unloads)."""
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
    return tempfile.mkdtemp(prefix="weft-offload-")


def check_quantized(model: Any, plan: Plan) -> None:
    """bitsandbytes leaves out what it cannot replace without a word; then say so."""
    names = [type(m).__name__ for m in model.modules() if isinstance(m, torch.nn.Linear)]
    if not any(name.startswith(("Linear4bit", "Linear8bit")) for name in names):
        plan.notes.append("bitsandbytes found no layer of this model that it can quantize; it is loaded unquantized.")


def free_memory(options: Options) -> tuple[int, list[int]]:
    """Bytes free in main memory, and on each card that PyTorch will use. To be asked before a load."""
    from app.generation.llama_machine import free_memory

    cuda = torch.cuda.is_available() and not options.cpu
    cards = [torch.cuda.mem_get_info(index)[0] for index in range(torch.cuda.device_count())] if cuda else []
    return free_memory(), cards


def choose_context(model: ModelEntry, config: Any, plan: Plan, options: Options, free: tuple[int, list[int]]) -> int:
    """How many tokens prompt and answer share; learned positions are a wall, rotary ones only an advice.

    Args:
        free: what `free_memory` said before the load.
    """
    notes = plan.notes
    text = config.get_text_config(decoder=True)
    names = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length")
    trained = next((int(v) for n in names if isinstance(v := getattr(text, n, None), int) and v > 0), 0)
    stretched = int(trained * options.compress_pos_emb)
    if options.context_length is None:
        ram, cards = free
        context = automatic_context(model, options, plan.dtype.itemsize, trained=trained, ram=ram, gpus=cards)
        if stretched and context < stretched:
            notes.append(
                f"The model was trained for {trained:,} tokens; {context:,} of them are used, since memory is short. "
                "Set the context length to have more."
            )
        return context
    rotary = isinstance(getattr(text, "rope_parameters", None), dict)
    if trained and options.context_length > trained and not rotary:
        notes.append(f"This model has {trained} positions and no more; the context length is {trained}.")
        return trained
    if stretched and options.context_length > stretched and options.alpha_value == 1 and options.rope_freq_base is None:
        notes.append(f"The model was trained for {trained} tokens; beyond that its answers may lose sense.")
    return options.context_length


def _bitsandbytes(options: Options, dtype: Any, cuda: bool) -> dict[str, Any]:
    """Arguments of BitsAndBytesConfig."""
    if options.load_in_8bit:
        # With that switch bitsandbytes leaves alone what lies in main memory: only for what overflows from a card.
        return {"load_in_8bit": True, "llm_int8_enable_fp32_cpu_offload": cuda}
    return {
        "load_in_4bit": True,
        "bnb_4bit_compute_dtype": DTYPES[options.compute_dtype] if options.compute_dtype else dtype,
        "bnb_4bit_quant_type": options.quant_type,
        "bnb_4bit_use_double_quant": options.use_double_quant,
    }


def _has_mps() -> bool:
    return torch.backends.mps.is_available()
