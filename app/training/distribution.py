"""Which ways to share a run out over processes are served, and what goes with them. No ML, no Qt."""

from __future__ import annotations

import re

from app.core.errors import ErrorKind, WeftError
from app.training.run_config import RunConfig

SERVED = ("NO", "FSDP", "MULTI_CPU", "MULTI_GPU", "MULTI_XPU", "MULTI_NPU", "MULTI_MLU")


def check_distribution(kind: str, *, version: int = 2, wraps_checkpoints: bool = False, alone: bool = False) -> None:
    """Refuse ways to share a run out that are not served.

    Args:
        kind: accelerate's distributed_type. version: of FSDP. wraps_checkpoints: fsdp_activation_checkpointing.
        alone: several processes were asked for, and this is the only one.

    Raises:
        WeftError: UNSUPPORTED, before anything is loaded.
    """
    if kind not in SERVED:
        raise WeftError(
            ErrorKind.UNSUPPORTED,
            f"Runs are not shared out with {kind}.",
            "Set distributed_type: FSDP in accelerate's config, or MULTI_GPU where the model fits on each card.",
        )
    if kind == "FSDP" and version != 2:
        raise WeftError(
            ErrorKind.UNSUPPORTED,
            f"FSDP {version} flattens an adapter's tensors together with the base's; FSDP 2 is served.",
            "Set fsdp_version: 2 under fsdp_config in accelerate's config.",
        )
    if kind == "FSDP" and wraps_checkpoints:
        raise WeftError(
            ErrorKind.UNSUPPORTED,
            "fsdp_activation_checkpointing renames the adapter's modules.",
            "Switch it off, and set gradient_checkpointing = true under [train].",
        )
    if alone:
        raise WeftError(
            ErrorKind.UNSUPPORTED,
            "Several processes were asked for, and accelerate started one: with distributed_type MULTI_CPU it leaves that to MPI.",
            "Set distributed_type: MULTI_GPU and use_cpu: true in accelerate's config: it starts them itself then.",
        )


def check_configuration(text: str) -> None:
    """`check_distribution` of accelerate's configuration file (YAML or JSON), before it is launched.

    Raises:
        WeftError: UNSUPPORTED.
    """
    version = _value(text, "fsdp_version")
    check_distribution(
        _value(text, "distributed_type").upper() or "NO",
        version=int(version) if version.isdigit() else 1,
        wraps_checkpoints=_value(text, "fsdp_activation_checkpointing").lower() == "true",
    )


def processes_here(text: str) -> int:
    """How many processes accelerate's configuration file starts on each machine, as far as it says."""
    every, machines = (_value(text, name) for name in ("num_processes", "num_machines"))
    return max(1, -(-int(every or 1) // max(1, int(machines or 1)))) if f"{every}{machines}".isdigit() else 1


def uses_cards(text: str) -> bool:
    """Whether accelerate's configuration file leaves the graphics cards to the run."""
    return _value(text, "use_cpu").lower() != "true"


def _value(text: str, name: str) -> str:
    """What accelerate's configuration (YAML or JSON) gives for a name; "" where nothing."""
    found = re.search(rf"""\b{name}["']?\s*:\s*["']?(\w+)""", re.sub(r"#.*", "", text))
    return found[1] if found else ""


def check_sharded(config: RunConfig, *, half: bool, quantized: bool = False) -> None:
    """Refuse what cannot be shared out over processes by FSDP.

    Args:
        half: the run's arithmetic is in fp16. quantized: the base is saved quantized.

    Raises:
        WeftError: UNSUPPORTED, naming the option and the way out.
    """
    method, train = config.method, config.train
    whole = "or distributed_type: MULTI_GPU, where each process holds the whole model"
    tensors = f"Take all-linear or names of linear modules, {whole}."
    reasons = [
        (
            quantized or config.model.quantization != "none",
            "Packed weights cannot be shared out",
            f"Take the 16-bit model with quantization = none, {whole}.",
        ),
        (
            train.optimizer not in ("adamw", "lora_plus", "sgd"),
            f"{train.optimizer} needs whole tensors",
            f"Take optimizer = adamw, lora_plus or sgd, {whole}.",
        ),
        (
            half,
            "fp16 scales the loss by a factor that the processes do not share",
            f"Take precision = bf16 or fp32, {whole}.",
        ),
        (
            bool(method.trainable_tokens or method.new_tokens or method.modules_to_save),
            "Tokens and modules that are trained in full are needed in two places at once",
            tensors,
        ),
        (bool(method.layer_replication), "Replicated layers share their weights", tensors),
        (bool(method.target_parameters), "target_parameters changes weights while they are used", tensors),
        (
            train.objective == "dpo" and method.init in ("off", "loftq", "loftq_replace"),
            f"DPO's reference is asked after the model was shared out, when init = {method.init} has changed it",
            f"Take another init, {whole}.",
        ),
    ]
    for applies, reason, way_out in reasons:
        if applies:
            raise WeftError(ErrorKind.UNSUPPORTED, f"{reason}: not with FSDP.", way_out)
