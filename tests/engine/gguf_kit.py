"""Random transformers models as GGUF files, without a vocabulary, through gguf-py's own names: the base of adapter tests."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

ARCHITECTURES = {
    "llama": "llama", "mistral": "llama", "mixtral": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma": "gemma", "phi": "phi2",
    "phi3": "phi3", "cohere": "command-r", "dbrx": "dbrx", "gpt2": "gpt2", "bloom": "bloom",
}  # fmt: skip


def names(family: str, layers: int) -> gguf.TensorNameMap:
    return name_map(next(a for a, n in gguf.MODEL_ARCH_NAMES.items() if n == ARCHITECTURES[family]), layers)


def name_map(arch: gguf.MODEL_ARCH, layers: int) -> gguf.TensorNameMap:
    """gguf-py's table of an architecture. (Making one changes the table that all share: that is undone.)"""
    shared = dict(gguf.TensorNameMap.block_mappings_cfg)
    try:
        return gguf.get_tensor_name_map(arch, layers)
    finally:
        gguf.TensorNameMap.block_mappings_cfg.clear()
        gguf.TensorNameMap.block_mappings_cfg.update(shared)


def _interleave(weight: torch.Tensor, heads: int) -> torch.Tensor:
    return (
        weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)
    )


def _numbers(writer: gguf.GGUFWriter, family: str, config: Any) -> None:
    heads = config.num_attention_heads
    kv = getattr(config, "num_key_value_heads", None) or heads
    inner = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * config.hidden_size
    head = getattr(config, "head_dim", None) or config.hidden_size // heads
    if family == "dbrx":
        kv, inner = config.attn_config.kv_n_heads, config.ffn_config.ffn_hidden_size
        writer.add_clamp_kqv(config.attn_config.clip_qkv)
        writer.add_expert_count(config.ffn_config.moe_num_experts)
        writer.add_expert_used_count(config.ffn_config.moe_top_k)
    rope = getattr(config, "rope_parameters", None) or {}
    if "rope_theta" in rope:
        writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_context_length(getattr(config, "max_position_embeddings", None) or 64)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv)
    writer.add_vocab_size(config.vocab_size)
    writer.add_layer_norm_rms_eps(getattr(config, "rms_norm_eps", None) or 1e-5)
    writer.add_layer_norm_eps(
        getattr(config, "layer_norm_eps", None) or getattr(config, "layer_norm_epsilon", None) or 1e-5
    )
    if family not in ("gpt2", "bloom"):
        partial = 0.5 if family == "phi" else 1.0
        writer.add_rope_dimension_count(int(head * partial))
    if family in ("qwen3", "gemma"):
        writer.add_key_length(head)
        writer.add_value_length(head)
    if family == "mixtral":
        writer.add_expert_count(config.num_local_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
    if family == "cohere":
        writer.add_logit_scale(config.logit_scale)
    if family == "phi3":
        writer.add_sliding_window(0)


def _rows(family: str, config: Any, name: str, value: torch.Tensor) -> torch.Tensor:
    heads = config.num_attention_heads
    if family in ("llama", "mistral", "mixtral") and re.search(r"[qk]_proj\.", name):
        return _interleave(value, heads if "q_proj" in name else config.num_key_value_heads)
    if family == "gemma" and name.endswith("norm.weight"):
        return value + 1
    if family == "gpt2" and re.search(r"(c_attn|c_proj|c_fc)\.weight", name):
        return value.T
    if family == "bloom" and "query_key_value" in name:
        return value.reshape(heads, 3, -1, *value.shape[1:]).swapaxes(0, 1).reshape(value.shape)
    return value


def write(model: Any, family: str, path: Path) -> Path:
    """Write a model in float32; tied heads stay tied."""
    config = model.config
    writer = gguf.GGUFWriter(path, ARCHITECTURES[family])
    _numbers(writer, family, config)
    writer.add_tokenizer_model("none")
    table = names(family, config.num_hidden_layers)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    for name, value in model.state_dict().items():
        if (tied and value is not None and name.startswith("lm_head")) or name.endswith(
            (".attn.bias", "masked_bias", "inv_freq", "embed_scale")
        ):
            continue
        value = value.detach().float()
        for new, part in _experts(family, config, name, value):
            target = table.get_name(new, try_suffixes=(".weight", ".bias"))
            assert target is not None, new
            writer.add_tensor(target, np.ascontiguousarray(_rows(family, config, new, part).numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _experts(family: str, config: Any, name: str, value: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    if family == "mixtral":
        start = name.partition(".mlp.")[0] + ".block_sparse_moe."
        if name.endswith("experts.gate_up_proj"):
            gate, up = value.chunk(2, dim=1)
            return [(f"{start}experts.w1.weight", gate), (f"{start}experts.w3.weight", up)]
        if name.endswith("experts.down_proj"):
            return [(f"{start}experts.w2.weight", value)]
        if name.endswith("mlp.gate.weight"):
            return [(f"{start}gate.weight", value)]
    if family == "dbrx" and ".experts.mlp." in name:
        ffn = config.ffn_config
        value = value.view(ffn.moe_num_experts, ffn.ffn_hidden_size, config.hidden_size)
        value = value.permute(0, 2, 1) if name.endswith("w2") else value
        return [(f"{name}.weight", value)]
    return [(name.removeprefix("transformer.") if family == "bloom" else name, value)]
