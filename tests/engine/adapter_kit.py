"""Random models of twelve architectures, random adapters of every kind that PEFT writes, and the merged reference in float64.

The reference shares no code with the program: it reads adapter files with the safetensors library and follows the
definition W' = W + sum of w_i D_i.
"""

from __future__ import annotations

import json
import math
import random
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file

transformers.utils.logging.disable_progress_bar()  # its monitor thread would outlive a slow test

VOCABULARY, CONTEXT = 96, 64
_COMMON = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": CONTEXT, "initializer_range": 0.2, "bos_token_id": 0, "eos_token_id": 1,
    "pad_token_id": None,
}  # fmt: skip
_SEPARATE = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# Architecture: config class, changes to the common config, linear modules, embedding, an expert parameter or "".
FAMILIES: dict[str, tuple[str, dict[str, Any], list[str], str]] = {
    "llama": ("LlamaConfig", {}, _SEPARATE, "embed_tokens"),
    "mistral": ("MistralConfig", {"sliding_window": 24}, _SEPARATE, "embed_tokens"),
    "mixtral": ("MixtralConfig", {"num_local_experts": 3, "num_experts_per_tok": 2}, _SEPARATE[:4], "embed_tokens"),
    "qwen2": ("Qwen2Config", {}, _SEPARATE, "embed_tokens"),
    "qwen3": ("Qwen3Config", {"head_dim": 12}, _SEPARATE, "embed_tokens"),
    "gemma": ("GemmaConfig", {"head_dim": 12}, _SEPARATE, "embed_tokens"),
    "phi": ("PhiConfig", {"num_key_value_heads": 4}, ["q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"], "embed_tokens"),
    "phi3": ("Phi3Config", {"pad_token_id": 0}, ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"], "embed_tokens"),
    "cohere": ("CohereConfig", {"logit_scale": 1.0}, _SEPARATE, "embed_tokens"),
    "dbrx": (
        "DbrxConfig",
        {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0}, "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 3, "moe_top_k": 2}},
        ["Wqkv", "out_proj"],
        "wte",
    ),
    "gpt2": ("GPT2Config", {}, ["c_attn", "c_proj", "c_fc"], "wte"),
    "bloom": ("BloomConfig", {}, ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"], "word_embeddings"),
}  # fmt: skip


def random_model(family: str, seed: int, **changes: Any) -> Any:
    """A small model in float32 with random weights, biases and norms too."""
    name, own, _, _ = FAMILIES[family]
    settings = {**_COMMON, **own, **changes}
    if family == "gpt2":
        settings = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": CONTEXT, "bos_token_id": 0,
                    "eos_token_id": 1, "initializer_range": 0.2, **changes}  # fmt: skip
    elif family == "bloom":
        settings = {
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "n_layer": 2,
            "n_head": 4,
            "initializer_range": 0.2,
            **changes,
        }
    elif family == "dbrx":
        settings = {
            "vocab_size": VOCABULARY,
            "d_model": 32,
            "n_layers": 2,
            "n_heads": 4,
            "max_seq_len": CONTEXT,
            **own,
            **changes,
        }
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, name)(**settings))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.float().eval()


def random_adapter(folder: Path, family: str, model: Any, seed: int, **settings: Any) -> Path:
    """An adapter as PEFT saves it, every trained tensor random. `settings` go into LoraConfig; the model stays as it was."""
    import copy

    import peft

    torch.manual_seed(seed)
    defaults = {
        "r": 4,
        "lora_alpha": 6,
        "target_modules": list(FAMILIES[family][2]),
        "fan_in_fan_out": family == "gpt2",
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**{**defaults, **settings}))
        with torch.no_grad():
            for name, parameter in wrapped.named_parameters():
                if parameter.requires_grad:
                    scale = (
                        0.1 if "lora_magnitude" in name or "modules_to_save" in name or "lora_" not in name else 0.15
                    )
                    noise = torch.randn_like(parameter) * scale
                    parameter.copy_(parameter * (1 + noise) if "magnitude" in name else parameter + noise)
        wrapped.save_pretrained(folder)
    return folder


def any_weight(rng: random.Random, most: float = 1.5) -> float:
    """A weight between -1 and `most` that is not so near to 0 that the adapter would hardly show."""
    return round(rng.choice([rng.uniform(-1, -0.1), rng.uniform(0.1, most), rng.uniform(0.1, most)]), 3)


def tokens(seed: int, rows: int = 2, length: int = 12) -> torch.Tensor:
    return torch.randint(2, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=ids, use_cache=False).logits


# The reference ------------------------------------------------------------------------------------


def _alpha(config: dict[str, Any], module: str) -> float:
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return config["lora_alpha"]


def differences(model: Any, folder: Path) -> dict[str, torch.Tensor]:
    """D in float64 by the names of the model's parameters; `<name>.bias` may be one that the model lacks."""
    config = json.loads((folder / "adapter_config.json").read_text())
    file = {
        k.removeprefix("base_model.model."): v.double()
        for k, v in load_file(folder / "adapter_model.safetensors").items()
    }
    base = {k: v.detach().double() for k, v in model.state_dict().items()}
    modules = dict(model.named_modules())
    found: dict[str, torch.Tensor] = {}

    def scale(module: str, rank: int) -> float:
        return _alpha(config, module) / (math.sqrt(rank) if config["use_rslora"] else rank)

    for key, value in file.items():
        if key.endswith(".lora_A.weight") and not _expert(key, modules):
            module = key.removesuffix(".lora_A.weight")
            b = file[f"{module}.lora_B.weight"]
            weight = base[f"{module}.weight"]
            conv = type(modules[module]).__name__ == "Conv1D"
            weight = weight.T if conv else weight
            s = scale(module, b.shape[1])
            d = s * b @ value
            if (m := file.get(f"{module}.lora_magnitude_vector")) is not None:
                d = (m / (weight + d).norm(dim=1))[:, None] * (weight + d) - weight
            found[f"{module}.weight"] = d.T if conv else d
            if f"{module}.lora_B.bias" in file:
                found[f"{module}.bias"] = s * file[f"{module}.lora_B.bias"]
        elif key.endswith(".lora_embedding_A"):
            module = key.removesuffix(".lora_embedding_A")
            b = file[f"{module}.lora_embedding_B"]
            weight = base[f"{module}.weight"].T
            d = scale(module, b.shape[1]) * b @ value
            if (m := file.get(f"{module}.lora_magnitude_vector")) is not None:
                d = (m / (weight + d).norm(dim=1))[:, None] * (weight + d) - weight
            found[f"{module}.weight"] = d.T
        elif key.endswith(".trainable_tokens_delta"):
            module = key.removesuffix(".token_adapter.trainable_tokens_delta")
            index = torch.tensor(config["trainable_token_indices"])
            d = torch.zeros_like(base[f"{module}.weight"])
            d[index] = value - base[f"{module}.weight"][index]
            found[f"{module}.weight"] = d
        elif ".lora_" not in key and ".base_layer." not in key:
            found[key] = value - base[key] if key in base else value
        elif key.endswith(".base_layer.bias"):
            name = key.replace(".base_layer.", ".")
            found[name] = found.get(name, 0) + value - base[name]
    for owner in {k.split(".experts.")[0] + ".experts" for k in file if _expert(k, modules)}:
        found |= _experts(owner, file, base, modules[owner], _alpha(config, owner) / config["r"])
    return found


def _expert(key: str, modules: dict[str, Any]) -> bool:
    return ".experts." in key and ".lora_" in key


def _experts(
    owner: str, file: dict[str, torch.Tensor], base: dict[str, torch.Tensor], module: Any, s: float
) -> dict[str, torch.Tensor]:
    found = {}
    for start, name in ((f"{owner}.base_layer", "gate_up_proj"), (owner, "down_proj")):
        if f"{start}.lora_A.weight" not in file:
            continue
        weight = base[f"{owner}.{name}"]
        a, b = file[f"{start}.lora_A.weight"], file[f"{start}.lora_B.weight"]
        experts, rank = weight.shape[0], a.shape[0] // weight.shape[0]
        a3, b3 = a.reshape(experts, rank, -1), b.reshape(-1, rank, experts)
        found[f"{owner}.{name}"] = torch.stack([s * b3[:, :, e] @ a3[e] for e in range(experts)])
    return found


def merged_logits(model: Any, stack: Sequence[tuple[Path, float]], ids: torch.Tensor) -> torch.Tensor:
    """Logits, float64, of the merged model."""
    return logits(merged(model, stack), ids)


def rms(difference: torch.Tensor) -> float:
    """Root mean square. Unlike the largest of a thousand differences, it hardly depends on chance."""
    return float(difference.double().pow(2).mean().sqrt())


def close(found: torch.Tensor, exact: Any, ids: torch.Tensor, at: Any = ...) -> bool:
    """Whether logits in float32 are those of an exact model, but for rounding.

    Large random adapters make attention so sharp that last bits grow, by how much depends on the model. So where the
    difference is above 1e-4, it is held to ten times what float32 makes of this very model; two to four times is usual.

    Args:
        found: logits, or those of them that `at` picks of logits [rows, tokens, vocabulary]. exact: a model in float64.
    """
    import copy

    wanted = logits(exact, ids)
    error = float((found - wanted[at]).abs().max())
    if error < 1e-4:
        return True
    rounding = float((logits(copy.deepcopy(exact).float(), ids) - wanted).abs().max())
    print(f"off by {error:.1e}, and float32 makes {rounding:.1e} of the merged model")
    return error < 10 * rounding < 1e-2


def merged(model: Any, stack: Sequence[tuple[Path, float]]) -> Any:
    """A copy of the model in float64 whose weights are W + sum of w_i D_i; tied weights are untied where D differ."""
    import copy

    total: dict[str, torch.Tensor] = {}
    tied = (
        model.get_output_embeddings() is not None
        and model.get_output_embeddings().weight is model.get_input_embeddings().weight
    )
    names = {id(m): n for n, m in model.named_modules()}
    rows: dict[str, torch.Tensor] = {}
    for folder, weight in stack:
        config = json.loads((folder / "adapter_config.json").read_text())
        for name, d in differences(model, folder).items():
            total[name] = total.get(name, 0) + weight * d
            if (
                tied
                and config.get("trainable_token_indices")
                and name == f"{names[id(model.get_input_embeddings())]}.weight"
            ):
                rows[name] = rows.get(name, 0) + weight * d
    copied = copy.deepcopy(model).double()
    copied.config._experts_implementation = "eager"  # the quick ways do not know float64
    head_name = f"{names[id(model.get_output_embeddings())]}.weight"
    embedding_name = f"{names[id(model.get_input_embeddings())]}.weight"
    if tied and (head_name in total or embedding_name in total):
        head = copied.get_output_embeddings()
        head.weight = torch.nn.Parameter(head.weight.detach().clone())
        for d in rows.values():
            total[head_name] = total.get(head_name, 0) + d
    with torch.no_grad():
        for name, d in total.items():
            owner, _, parameter = name.rpartition(".")
            module = copied.get_submodule(owner)
            if getattr(module, parameter) is None:
                setattr(module, parameter, torch.nn.Parameter(d))
            else:
                getattr(module, parameter).add_(d)
    return copied
