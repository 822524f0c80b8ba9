"""An adapter as PEFT's plain folder, for the original base. Imports torch and peft.

An initialisation that changed the base (W became W - s·B₀A₀) is undone by concatenation: s(BA - B₀A₀) = s·[B, -B₀][A; A₀], of twice
the rank, alpha grown so that the scale s stays. That is exact, for rsLoRA, patterns and DoRA too (its direction is the same sum).
"""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any

import torch
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file

from app.training.methods import converts
from app.training.methods_torch import ADAPTER, decomposable, experts, layers, plain_name, whole
from app.training.run_config import RunConfig


def adapter_tensors(
    config: RunConfig, model: Any, first: dict[str, torch.Tensor], trained: dict[str, torch.Tensor] | None = None
) -> dict[str, torch.Tensor]:
    """What goes into adapter_model.safetensors, converted where the base was changed; contiguous, on the processor.

    Args:
        trained: all that the adapter trains, whole, where the model holds but a part of it (FSDP).
    """
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT takes lora_bias for a damaged B
        state = get_peft_model_state_dict(model, trained, save_embedding_layers=False)
        found = {name: tensor.detach().cpu() for name, tensor in state.items()}
        if converts(config):
            for name, module in layers(model):
                a, b = f"{name}.lora_A.weight", f"{name}.lora_B.weight"
                count = experts(module)
                # B₀ is zero where the base was not changed.
                keep = 1.0 if decomposable(module) else 0.0
                found[a] = joined_a(found[a], first[f"{name}.lora_A"].to(found[a].dtype), count)
                found[b] = joined_b(found[b], -keep * first[f"{name}.lora_B"].to(found[b].dtype), count)
    return {key: value.clone().contiguous() for key, value in found.items()}


def joined_a(first: torch.Tensor, second: torch.Tensor, experts: int) -> torch.Tensor:
    """Two A, (experts · rank, in) each, as one of the ranks' sum."""
    parts = [each.reshape(experts, -1, each.shape[1]) for each in (first, second)]
    return torch.cat(parts, 1).reshape(-1, first.shape[1])


def joined_b(first: torch.Tensor, second: torch.Tensor, experts: int) -> torch.Tensor:
    """Two B, (out, rank · experts) each with the experts innermost, as one."""
    parts = [each.reshape(each.shape[0], -1, experts) for each in (first, second)]
    return torch.cat(parts, 1).reshape(first.shape[0], -1)


def adapter_settings(config: RunConfig, model: Any, base: str) -> dict[str, Any]:
    """adapter_config.json. `base`: what base_model_name_or_path says."""
    settings = settings_of(model)
    settings["base_model_name_or_path"] = base
    settings["inference_mode"] = True
    # How it began is told in weft_run.json: here it would make loaders start it that way again.
    settings["init_lora_weights"] = True
    for name in ("eva_config", "corda_config", "loftq_config", "runtime_config"):
        settings[name] = {} if name == "loftq_config" else None
    settings.pop("runtime_config")
    if converts(config):
        grow = math.sqrt(2) if settings["use_rslora"] else 2
        settings["r"] *= 2
        settings["lora_alpha"] = whole(settings["lora_alpha"] * grow)
        settings["rank_pattern"] = {key: value * 2 for key, value in settings["rank_pattern"].items()}
        settings["alpha_pattern"] = {key: whole(value * grow) for key, value in settings["alpha_pattern"].items()}
    return settings


def settings_of(model: Any) -> dict[str, Any]:
    """The adapter's LoraConfig as JSON holds it."""
    found = model.peft_config[ADAPTER].to_dict()
    found.pop("runtime_config", None)
    return json.loads(json.dumps(found, default=lambda value: sorted(value) if isinstance(value, set) else str(value)))


def save_adapter(
    folder: Path,
    config: RunConfig,
    model: Any,
    first: dict[str, torch.Tensor],
    base: str,
    trained: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write adapter_config.json and adapter_model.safetensors into an existing folder. trained: see `adapter_tensors`."""
    (folder / "adapter_config.json").write_text(
        json.dumps(adapter_settings(config, model, base), indent=2, sort_keys=True), "utf-8"
    )
    tensors = adapter_tensors(config, model, first, trained)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def adapted_modules(model: Any) -> list[str]:
    """Names, in the base model, of what the adapter changes."""
    return [plain_name(name) for name, _ in layers(model)]
