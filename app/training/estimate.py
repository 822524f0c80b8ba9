"""What a run will take in memory and time, before it begins: plain arithmetic over the model's header. No ML.

Activations follow the usual count for a transformer's layer in training: the residual stream, the inputs of each linear module (kept
for LoRA's gradients), attention through sdpa, and the loss over the vocabulary. The factor 1.4 and the process's share were measured
on a Llama of 8 layers and 512 width on a processor: 1.07, 1.14 and 0.94 of the peaks (512 tokens, 256 tokens, checkpointed).
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import msgspec

from app.core.amounts import readable_bytes
from app.core.errors import ErrorKind, WeftError
from app.core.library import ModelEntry, ModelFormat
from app.core.quantization import PACKED
from app.training.optimizer_state import state_size
from app.training.run_config import RunConfig
from app.training.run_file import names, numbers, ranges

MIB, GIB = 2**20, 2**30
PROCESS = 600 * MIB  # torch, transformers and peft at work, and what the allocator keeps
_PER_LAYER = 0.005  # seconds that a layer of one batch takes beside its products, forward and backward
_PER_UNPACKED = 4e-9  # seconds on a processor to unpack a weight of GPTQ, AWQ or HQQ; 2.5 to 5 measured
_ALL_LINEAR = frozenset({"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"})


class RunEstimate(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes by cause. seconds: of the whole run, 0 when not known; trainable: parameters; file: a paged state outside of memory."""

    weights: int
    adapter: int
    optimizer: int
    activations: int
    process: int
    checkpoint: int
    trainable: int
    seconds: float = 0.0
    file: int = 0

    @property
    def total(self) -> int:
        return self.weights + self.adapter + self.optimizer + self.activations + self.process


def estimate(
    config: RunConfig,
    model: ModelEntry,
    *,
    tensors: Sequence[int] = (),
    tokens: int = 0,
    examples: int = 0,
    flops: float = 0.0,
    card: bool = False,
) -> RunEstimate:
    """Estimate a run.

    Args:
        tensors: numbers in each trained tensor, where known; else as the header's shape says.
        tokens, examples: of the training data in one epoch. flops: the machine's operations a second in matrix products.
        card: whether it runs on a graphics card, where `auto` is a 16-bit precision.
    """
    told, frozen = adapter_tensors(config, model)
    trained = sum(tensors or told)
    width = _compute_bytes(config, card)
    state = state_size(config.train.optimizer, tensors or told)
    outside = config.train.optimizer.startswith("paged") and not card
    parameters = model.parameters or model.weight_bytes // 2
    unpacked = (parameters * _PER_UNPACKED / (100 if card else 1)) if model.format in PACKED else 0.0
    seconds = _seconds(config, model, parameters, tokens, examples, flops, unpacked) if flops and tokens else 0.0
    return RunEstimate(
        weights=_weights(config, model, parameters, width),
        adapter=trained * 8 + frozen * 4,  # the tensors and their gradients, float32
        optimizer=state.rest if outside else state.total,
        activations=_activations(config, model, width),
        process=PROCESS,
        checkpoint=checkpoint_bytes(config, trained),
        trainable=trained,
        seconds=seconds,
        file=state.moments if outside else 0,
    )


def _seconds(
    config: RunConfig, model: ModelEntry, parameters: int, tokens: int, examples: int, flops: float, unpacked: float
) -> float:
    """Forward, and backward to the inputs of a frozen base: two products each; checkpointing computes forward twice.

    Two thirds of the products' own speed are reckoned with, and what each layer of a batch costs whatever its size.

    Args:
        unpacked: seconds that it takes to unpack all of the base, once in each pass.
    """
    train = config.train
    passes = 3 if train.gradient_checkpointing else 2
    seen = tokens * train.epochs
    if train.max_steps is not None and examples:
        seen = min(seen, train.max_steps * train.batch_size * train.gradient_accumulation * tokens / examples)
    each = 2.0 * passes * parameters
    steps = seen / tokens * examples / (train.batch_size * train.gradient_accumulation)
    batches = steps * train.gradient_accumulation
    return 1.5 * each * seen / flops + batches * (model.shape.layers * _PER_LAYER + passes * unpacked)


def _compute_bytes(config: RunConfig, card: bool = False) -> int:
    return 4 if config.train.precision == "fp32" or (config.train.precision == "auto" and not card) else 2


def _weights(config: RunConfig, model: ModelEntry, parameters: int, width: int) -> int:
    """The base in memory."""
    if model.format is ModelFormat.BITSANDBYTES:
        return model.weight_bytes
    if (
        model.format in PACKED
    ):  # under 4 bits lies in 4; one matrix at a time is unpacked to float32, forward and backward
        unpacked = 3 * 4 * model.shape.hidden * (model.shape.intermediate or 4 * model.shape.hidden)
        return max(model.weight_bytes, parameters // 2) + unpacked
    bits = {
        "none": 8.0 * width,
        "int8": 8.0,
        "nf4": 4.13 if config.model.double_quant else 4.5,
        "fp4": 4.13 if config.model.double_quant else 4.5,
    }
    outside = 2 * model.shape.vocabulary * model.shape.hidden if config.model.quantization != "none" else 0
    return int(
        (parameters - min(parameters, outside)) * bits[config.model.quantization] / 8 + min(parameters, outside) * width
    )


def _activations(config: RunConfig, model: ModelEntry, width: int) -> int:
    """What a forward keeps for the backward, at the largest batch."""
    shape = model.shape
    tokens = config.train.batch_size * config.train.max_length * (2 if config.train.objective != "sft" else 1)
    inner = shape.intermediate or 4 * shape.hidden
    layer = tokens * width * (10 * shape.hidden + 4 * inner)
    kept = layer if not config.train.gradient_checkpointing else 0
    stream = tokens * shape.hidden * width
    rows = min(tokens, 1024) if config.train.chunked_loss else tokens
    loss = rows * shape.vocabulary * 4 * 3
    # Checkpointed: the layer at work is held as computed again, with its gradients.
    at_work = 3 * layer if config.train.gradient_checkpointing else layer
    stream *= shape.layers if config.train.gradient_checkpointing else 0
    return int(1.4 * (kept * shape.layers + stream + at_work) + loss)


def adapter_tensors(config: RunConfig, model: ModelEntry) -> tuple[list[int], int]:
    """Numbers in each trained tensor, and in all of the adapter's that are not (LoRA-FA's A), from the header's shape.

    Exact for Llama's family, near for others.
    """
    shape, method = model.shape, config.method
    heads = shape.head_dim or (shape.hidden // max(1, shape.heads))
    inner, kv = shape.intermediate or 4 * shape.hidden, (shape.kv_heads or shape.heads) * heads
    sizes = {  # numbers in and out of each linear module
        "q_proj": (shape.hidden, shape.heads * heads),
        "k_proj": (shape.hidden, kv),
        "v_proj": (shape.hidden, kv),
        "o_proj": (shape.heads * heads, shape.hidden),
        "gate_proj": (shape.hidden, inner),
        "up_proj": (shape.hidden, inner),
        "down_proj": (inner, shape.hidden),
    }
    wanted = set(names(method.targets)) if not method.target_regex and method.targets != "all-linear" else _ALL_LINEAR
    layers = shape.layers
    if method.layer_replication:
        layers = sum(end - start for start, end in ranges(method.layer_replication, "layer_replication"))
    if method.layers:
        layers = min(layers, len(numbers(method.layers, "layers")))
    first = [method.r * size[0] for name, size in sizes.items() if name in wanted] * layers
    second = [method.r * size[1] for name, size in sizes.items() if name in wanted] * layers
    full = [
        shape.vocabulary * shape.hidden for name in names(method.modules_to_save) if name in ("embed_tokens", "lm_head")
    ]
    if config.train.optimizer == "lora_fa":
        return [*second, *full], sum(first)
    return [*first, *second, *full], 0


def checkpoint_bytes(config: RunConfig, trained: int) -> int:
    """One checkpoint on disk: the tensors and the optimizer's two moments."""
    return trained * 12 + 64 * 1024


def duration(seconds: float) -> str:
    """For people: less than a minute, 12 minutes, 3.5 hours."""
    if seconds < 60:
        return "a minute at most"
    minutes = round(seconds / 60)
    return f"{seconds / 3600:.1f} hours" if minutes >= 120 else f"{minutes} minute{'s' if minutes > 1 else ''}"


def check_room(config: RunConfig, model: ModelEntry, *, card: bool, processes: int = 1) -> None:
    """Refuse a paged optimizer whose state would find no room, before anything is loaded; the run itself knows its size to the byte.

    Args:
        processes: of this machine; each keeps a state of its own.

    Raises:
        WeftError: DISK_FULL, naming where it could lie and the way out.
    """
    need = estimate(config, model, card=card).file * processes
    beside = Path(config.output.dir).absolute().parent
    temporary = Path(tempfile.gettempdir())
    places = [temporary, next((place for place in (beside, *beside.parents) if place.is_dir()), temporary)]
    if need and all(shutil.disk_usage(place).free < need for place in places):
        raise WeftError(
            ErrorKind.DISK_FULL,
            f"{config.train.optimizer} keeps about {readable_bytes(need)} in {'a file' if processes == 1 else f'{processes} files'}, for which there is no room in {places[0]} nor in {places[1]}.",
            "Free some space, or take a smaller rank or another optimizer.",
        )


def words(found: RunEstimate) -> str:
    """For people, one line."""

    def size(count: int) -> str:
        return f"{count / GIB:.1f} GiB" if count >= GIB else f"{count / MIB:.0f} MiB"

    file = f"; {size(found.file)} of the optimizer in a file" if found.file else ""
    time = f", about {duration(found.seconds)}" if found.seconds else ""
    return (
        f"About {size(found.total)} of memory ({size(found.weights)} base, {size(found.activations)} activations, "
        f"{size(found.adapter + found.optimizer)} adapter and optimizer){file}, {found.trainable:,} trained parameters{time}."
    )
