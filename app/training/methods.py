"""Which methods and options go together, said before anything is loaded. No ML, no Qt."""

from __future__ import annotations

import re

from app.core.errors import ErrorKind, WeftError
from app.core.library import ModelEntry, ModelFormat
from app.core.quantization import PACKED
from app.training.run_config import CONVERTED, RunConfig
from app.training.run_file import names, numbers, pattern, ranges

QUANTIZED = PACKED | {ModelFormat.BITSANDBYTES}  # saved so
TRAINABLE = QUANTIZED | {ModelFormat.SAFETENSORS, ModelFormat.TORCH_BIN, ModelFormat.GGUF}


def check_base(config: RunConfig, model: ModelEntry) -> None:
    """Refuse a base that cannot be trained on, or not this way.

    Raises:
        WeftError: UNSUPPORTED, naming what can.
    """
    if model.format not in TRAINABLE:
        raise _cannot(
            f"{model.name} cannot be trained on ({model.format.value.upper()}).",
            "Choose a 16-bit model, with quantization = nf4 where memory is short, a GPTQ, AWQ or HQQ folder, or a GGUF file.",
        )
    if model.format in QUANTIZED and config.method.init in CONVERTED | {"loftq", "loftq_replace"}:
        raise _cannot(
            f"{config.method.init} needs the weights as they were before {model.name} was quantized.",
            "Choose the 16-bit model, or another init (eva works on a quantized base).",
        )


def check(config: RunConfig) -> list[str]:
    """Refuse what cannot work, and return notes on what works with a caveat.

    Raises:
        WeftError: BAD_INPUT or UNSUPPORTED, naming the two options that exclude each other and the way out.
    """
    method, train, model = config.method, config.train, config.model
    quantized = model.quantization != "none"
    if not model.path.strip():
        raise _bad("There is no model to train.", "Set path under [model].")
    if not config.output.dir.strip():
        raise _bad("The adapter has no folder to go to.", "Set dir under [output].")
    if method.target_regex:
        try:
            re.compile(method.target_regex)
        except re.error as error:
            raise _bad(f"target_regex is not a regular expression: {error}.", "Correct it.") from error
    elif not names(method.targets) and not names(method.target_parameters):
        raise _bad("No modules are to be trained.", 'Set targets = "all-linear" under [method].')
    numbers(method.layers, "layers")
    ranges(method.layer_replication, "layer_replication")
    if method.layers and method.target_regex:
        raise _bad("layers and target_regex exclude each other.", "Name the layers in the regular expression.")
    for name in ("rank_pattern", "alpha_pattern"):
        values = pattern(getattr(method, name), name)
        if name == "rank_pattern" and any(value != int(value) for value in values.values()):
            raise _bad("rank_pattern: ranks are whole numbers.", "Write q_proj = 32.")
    if method.init in CONVERTED | {"loftq"} and quantized:
        raise WeftError(
            ErrorKind.UNSUPPORTED,
            f"{method.init} changes the base's weights, which a quantized base cannot take.",
            "Set quantization = none, or another init (loftq_replace and eva work on a quantized base).",
        )
    if method.init == "loftq_replace" and model.quantization not in ("nf4", "fp4"):
        raise _bad(
            "loftq_replace needs a base in 4 bits.", 'Set quantization = "nf4" under [model], or init = "loftq".'
        )
    ranks = [method.r, *(int(value) for value in pattern(method.rank_pattern, "rank_pattern").values())]
    if method.init == "orthogonal" and any(rank % 2 for rank in ranks):
        raise _bad("The orthogonal initialisation needs even ranks.", "Take an even r.")
    if method.target_parameters and (method.dora or method.dropout):
        raise _bad("target_parameters goes with neither DoRA nor dropout.", "Switch them off.")
    if method.init in CONVERTED | {"loftq", "loftq_replace"} and method.target_parameters:
        raise _bad(f"{method.init} does not know target_parameters.", "Take init = default.")
    if method.lora_bias and (method.dora or method.init not in ("default", "gaussian")):
        raise _bad("lora_bias goes with plain LoRA started from default or gaussian only.", "Switch lora_bias off.")
    if method.layer_replication and method.init in CONVERTED:
        raise _bad(f"{method.init} changes weights that replicated layers share.", "Take init = default.")
    if train.optimizer == "lora_fa" and (method.dora or method.target_parameters):
        raise _bad("LoRA-FA trains plain LoRA on linear layers only.", "Switch DoRA and target_parameters off.")
    if train.objective != "sft" and method.layer_replication:
        raise _bad(
            "Preference training compares with the base, which layer replication changes.", "Take objective = sft."
        )
    return _notes(config)


def _notes(config: RunConfig) -> list[str]:
    method, train, model = config.method, config.train, config.model
    notes: list[str] = []
    if method.init == "off":
        notes.append("init = off starts from a random adapter that disturbs the model: for debugging only.")
    if method.dora and method.dropout:
        notes.append("DoRA with dropout cannot reuse the base's result and takes longer; dropout = 0 is faster.")
    if method.dora_offload and not method.dora:
        notes.append("dora_offload has no effect without DoRA.")
    if method.dora and model.quantization != "none":
        notes.append("DoRA on a quantized base works with bitsandbytes; it dequantizes each weight in each step.")
    if method.bias != "none":
        notes.append(f"bias = {method.bias}: switching this adapter off does not give the base back in PEFT.")
    if method.init == "loftq":
        notes.append(
            "The LoftQ adapter fits the base in plain nf4 (4 bits, no double quantization)."
            if method.loftq_iterations == 1 and method.loftq_bits == "4"
            else "What LoftQ's adapter learnt is saved for the original base; the quantized weights that it was trained beside are not kept."
        )
    if method.init == "loftq_replace":
        notes.append(
            "loftq_replace makes one step only: the adapter takes up what 4 bits lose; the 4-bit weights stay."
        )
    nothing_held = not config.data.held_out and not config.data.held_out_files
    if nothing_held and (train.keep_best or train.early_stopping):
        notes.append("Nothing is held out, so there is no held-out loss: early_stopping and keep_best have no effect.")
    if train.keep_best and config.train.early_stopping is None:
        notes.append("keep_best takes the best of the whole run: set early_stopping to end it sooner.")
    return notes


def check_machine(config: RunConfig, cards: int, *, sharded: bool = False) -> list[str]:
    """Refuse what a machine with that many graphics cards cannot do; notes on what works otherwise there, has no effect or takes long.

    Args:
        sharded: processes share the model's tensors out (FSDP), and so read it into main memory first.

    Raises:
        WeftError: UNSUPPORTED, naming the option and the way out.
    """
    method, train, model = config.method, config.train, config.model
    offload = method.dora and method.dora_offload
    if cards and model.device != "cpu":
        if offload and not sharded:
            return ["dora_offload has nothing to bring to the card: the whole model lies there."]
        return []
    here = "There is no graphics card here" if not cards else "The run is to be on the processor"
    if model.device == "cuda":
        raise _cannot(f"{here}, and device = cuda asks for one.", "Take device = auto.")
    if model.attention == "flash_attention_2":
        raise _cannot(f"{here}, and flash_attention_2 runs on one only.", "Take attention = auto.")
    notes: list[str] = []
    if train.optimizer.startswith("paged"):
        notes.append(
            f"{here}: {train.optimizer} keeps its state in a file, which leaves memory when that gets short. Where memory "
            f"suffices, {train.optimizer.removeprefix('paged_')} learns the same and spares the disk."
        )
    if offload and cards:
        notes.append("dora_offload: a card computes DoRA's first magnitudes; the run itself stays on the processor.")
    elif offload:
        notes.append(f"{here}: dora_offload has no effect. DoRA's first magnitudes are computed on the processor.")
    if method.init == "eva":
        notes.append(f"{here}: EVA takes its time; fewer calibration samples are faster.")
    if train.precision == "fp16":
        notes.append(f"{here}: fp16 is slow on a processor; fp32 or bf16 are faster.")
    return notes


def converts(config: RunConfig) -> bool:
    """Whether the base is changed for this run, so that the adapter has to be converted for the original."""
    return config.method.init in CONVERTED or (config.method.init == "loftq" and not fits_nf4(config))


def changes_base(config: RunConfig) -> bool:
    """Whether the base's weights differ from the file's during this run."""
    return config.method.init in CONVERTED | {"loftq"}


def fits_nf4(config: RunConfig) -> bool:
    """Whether a LoftQ adapter fits the base that bitsandbytes quantizes to nf4 by itself."""
    return config.method.loftq_iterations == 1 and config.method.loftq_bits == "4"


def _cannot(message: str, hint: str) -> WeftError:
    return WeftError(ErrorKind.UNSUPPORTED, message, hint)


def _bad(message: str, hint: str) -> WeftError:
    return WeftError(ErrorKind.BAD_INPUT, message, hint)
