"""What a module of a model is called: in transformers, in PEFT adapters and in GGUF files.

A place is a layer's number and what stands behind it; names in front of it (`model.`, `transformer.`,
`model.language_model.`) differ between versions of one library and mean nothing. The names behind it lead to one role,
for which GGUF's own tensor names serve. The tables are held to gguf-py's TensorNameMap by a test.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from app.core.library import ModelShape

_TOWERS = re.compile(r"(^|[._])(vision|visual|audio|vit|image|speech|projector|merger|mm_|multi_modal)")

# Role by what follows the layer's number. One name never means two things.
ROLES: dict[str, str] = {
    # Llama, Mistral, Mixtral, Qwen2, Qwen3, Gemma, Command-R, StableLM, OLMo, Granite, …
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    # Phi-2, Phi-3
    "self_attn.dense": "attn_output",
    "self_attn.out_proj": "attn_output",
    "self_attn.qkv_proj": "attn_qkv",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.fc1": "ffn_up",
    "mlp.fc2": "ffn_down",
    "mixer.Wqkv": "attn_qkv",
    "mixer.out_proj": "attn_output",
    # GPT-2, StarCoder, Qwen (first), GPT-J, CodeGen
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "attn.q_proj": "attn_q",
    "attn.k_proj": "attn_k",
    "attn.v_proj": "attn_v",
    "attn.out_proj": "attn_output",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
    "mlp.fc_in": "ffn_up",
    "mlp.fc_out": "ffn_down",
    "mlp.w1": "ffn_up",
    "mlp.w2": "ffn_gate",
    # Bloom, Falcon, GPT-NeoX, ChatGLM
    "self_attention.query_key_value": "attn_qkv",
    "attention.query_key_value": "attn_qkv",
    "self_attention.dense": "attn_output",
    "attention.dense": "attn_output",
    "mlp.dense_h_to_4h": "ffn_up",
    "mlp.dense_4h_to_h": "ffn_down",
    # DBRX, MPT
    "norm_attn_norm.attn.Wqkv": "attn_qkv",
    "norm_attn_norm.attn.out_proj": "attn_output",
    "ffn.router.layer": "ffn_gate_inp",
    "attn.Wqkv": "attn_qkv",
    "ffn.up_proj": "ffn_up",
    "ffn.down_proj": "ffn_down",
    # InternLM2, EXAONE
    "attention.wo": "attn_output",
    "feed_forward.w1": "ffn_gate",
    "feed_forward.w2": "ffn_down",
    "feed_forward.w3": "ffn_up",
    "attn.attention.q_proj": "attn_q",
    "attn.attention.k_proj": "attn_k",
    "attn.attention.v_proj": "attn_v",
    "attn.attention.out_proj": "attn_output",
    "mlp.c_fc_0": "ffn_gate",
    "mlp.c_fc_1": "ffn_up",
    # Mixtures of experts
    "block_sparse_moe.gate": "ffn_gate_inp",
    "mlp.gate": "ffn_gate_inp",
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
    "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp",
    "mlp.shared_experts.gate_proj": "ffn_gate_shexp",
    "mlp.shared_experts.up_proj": "ffn_up_shexp",
    "mlp.shared_experts.down_proj": "ffn_down_shexp",
    # DeepSeek's latent attention
    "self_attn.q_a_proj": "attn_q_a",
    "self_attn.q_b_proj": "attn_q_b",
    "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
    "self_attn.kv_b_proj": "attn_kv_b",
}
OUTER_ROLES: dict[str, str] = {
    "embed_tokens": "token_embd",
    "wte": "token_embd",
    "word_embeddings": "token_embd",
    "embed_in": "token_embd",
    "tok_embeddings": "token_embd",
    "embedding": "token_embd",
    "lm_head": "output",
    "embed_out": "output",
    "output": "output",
}
_EXPERTS = re.compile(r"(?:mlp|block_sparse_moe|ffn)\.experts(\.|$)")

_Q_K_V = "self_attn.q_proj self_attn.k_proj self_attn.v_proj"
_LLAMA = f"{_Q_K_V} self_attn.o_proj mlp.gate_proj mlp.up_proj mlp.down_proj"
# What the layers of a family are made of, for models of which only the index is known. Families that stand here under
# the name that transformers gives them and under GGUF's; of all others any name is believed.
_FAMILIES: dict[str, frozenset[str]] = {
    name: frozenset(tails.split())
    for names, tails in {
        "llama mistral mistral3 qwen2 qwen3 gemma gemma2 gemma3 gemma3_text cohere cohere2 command-r granite olmo olmo2 "
        "stablelm smollm3 deci exaone4 ministral seed_oss": _LLAMA,
        "mixtral qwen3_moe qwen3moe": f"{_Q_K_V} self_attn.o_proj block_sparse_moe.gate mlp.gate",
        "qwen2_moe qwen2moe": f"{_Q_K_V} self_attn.o_proj mlp.gate mlp.shared_expert.gate_proj mlp.shared_expert.up_proj "
        "mlp.shared_expert.down_proj",
        "phi phi2": f"{_Q_K_V} self_attn.dense mlp.fc1 mlp.fc2",
        "phi3": "self_attn.qkv_proj self_attn.o_proj mlp.gate_up_proj mlp.down_proj",
        "qwen": "attn.c_attn attn.c_proj mlp.w1 mlp.w2 mlp.c_proj",
        "dbrx": "norm_attn_norm.attn.Wqkv norm_attn_norm.attn.out_proj ffn.router.layer",
        "gpt2": "attn.c_attn attn.c_proj mlp.c_fc mlp.c_proj",
        "bloom falcon": "self_attention.query_key_value self_attention.dense mlp.dense_h_to_4h mlp.dense_4h_to_h",
        "gpt_neox gptneox": "attention.query_key_value attention.dense mlp.dense_h_to_4h mlp.dense_4h_to_h",
        "mpt": "attn.Wqkv attn.out_proj ffn.up_proj ffn.down_proj",
        "starcoder2": f"{_Q_K_V} self_attn.o_proj mlp.c_fc mlp.c_proj",
        "gptj": "attn.q_proj attn.k_proj attn.v_proj attn.out_proj mlp.fc_in mlp.fc_out",
    }.items()
    for name in names.split()
}
_FAMILY_ROLES = {family: frozenset(ROLES[tail] for tail in tails) for family, tails in _FAMILIES.items()}


# Architectures whose query and key rows llama.cpp keeps in rotary pairs: the even and odd halves of a head interleaved.
INTERLEAVED = frozenset(
    "llama deci granite granitemoe arcee smollm3 minicpm internlm2 olmo xverse nanbeige llada bailingmoe deepseek arctic "
    "chameleon afmoe cogvlm".split()
)
# Those that keep the rows as transformers has them, known from llama.cpp's converter.
PLAIN = frozenset(
    "qwen qwen2 qwen2moe qwen3 qwen3moe gemma gemma2 gemma3 phi2 phi3 command-r cohere2 dbrx gpt2 stablelm starcoder starcoder2 "
    "mpt olmo2 olmoe opt exaone exaone4 glm4 gpt-oss seed_oss".split()
)
# Those with query, key and value of each head together, where llama.cpp puts all queries first.
BY_HEAD = frozenset({"bloom", "gptneox"})
# GGUF architectures whose layers are all alike to llama.cpp: one can stand in the place of another. (Others alternate kinds of
# attention by the layer's number.)
UNIFORM = frozenset(
    "llama qwen qwen2 qwen2moe qwen3 qwen3moe gemma phi2 phi3 command-r dbrx gpt2 bloom gptneox starcoder2 stablelm olmo olmoe "
    "granite".split()
)
# What GGUF calls the architectures that transformers calls otherwise.
_ARCHITECTURES: dict[str, tuple[str, ...]] = {
    "mistral": ("llama", "mistral3"),
    "mixtral": ("llama",),
    "phi": ("phi2",),
    "cohere": ("command-r",),
    "gemma3_text": ("gemma3",),
    "gpt_neox": ("gptneox",),
    "gpt_bigcode": ("starcoder",),
    "qwen2_moe": ("qwen2moe",),
    "qwen3_moe": ("qwen3moe",),
    "gpt_oss": ("gpt-oss",),
}


def gguf_architectures(model_type: str) -> tuple[str, ...]:
    """What GGUF may call the architecture of a model_type; never empty."""
    return _ARCHITECTURES.get(model_type, (model_type,))


class Place(NamedTuple):
    """Where a module stands: its layer (-1 outside of the layers), what follows the layer's number, and which tower."""

    layer: int
    tail: str
    tower: str = ""


def place_of(module: str) -> Place:
    """The place of a module or tensor (without `.weight`)."""
    parts = module.split(".")
    index = next((i for i, part in enumerate(parts) if part.isdecimal() and len(part) < 6), -1)
    if index < 0:
        head = ".".join(parts[:-1])
        return Place(-1, parts[-1], "vision" if _TOWERS.search(head + ".") else "")
    head = ".".join(parts[:index])
    return Place(int(parts[index]), ".".join(parts[index + 1 :]), "vision" if _TOWERS.search(head) else "")


def role_of(place: Place) -> str:
    """What GGUF calls it (`attn_q`, `output`), "" when nobody knows."""
    if place.tower:
        return ""
    return (ROLES if place.layer >= 0 else OUTER_ROLES).get(place.tail, "")


def is_expert(place: Place) -> bool:
    """Whether it belongs to one expert, or all experts, of a mixture."""
    return place.layer >= 0 and _EXPERTS.match(place.tail) is not None


def expected(role: str, shape: ModelShape, family: str) -> tuple[int, int] | None:
    """(out, in) that a module of this role has in a model of these numbers; None when they do not tell."""
    q, k, v = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim, shape.kv_heads * shape.value_dim
    inner = shape.intermediate
    doubled = family in ("phi3", "phimoe", "chatglm", "glm4")
    inner_up = 2 * inner if doubled else inner // 2 if family == "qwen" else inner
    table: dict[str, tuple[int, int]] = {
        "attn_q": (q, shape.hidden),
        "attn_k": (k, shape.hidden),
        "attn_v": (v, shape.hidden),
        "attn_qkv": (q + k + v, shape.hidden),
        "attn_output": (shape.hidden, shape.heads * shape.value_dim),
        "ffn_gate": (inner_up, shape.hidden),
        "ffn_up": (inner_up, shape.hidden),
        "ffn_down": (shape.hidden, inner // 2 if family == "qwen" else inner),
        "ffn_gate_inp": (shape.experts, shape.hidden),
        "token_embd": (shape.vocabulary, shape.hidden),
        "output": (shape.vocabulary, shape.hidden),
    }
    found = table.get(role)
    return found if found and all(found) else None


def has(family: str, experts: int, tail: str, role: str, gguf: bool) -> bool:
    """Whether the layers of a family have a module of this name, or of this role in GGUF; unknown families have all.

    Args:
        experts: how many the model has: a mixture in GGUF goes by the plain family's name.
    """
    if role == "ffn_gate_inp" and not experts:
        return False
    if gguf:
        if experts and role in ("ffn_gate", "ffn_up", "ffn_down") and family in ("llama", "dbrx"):
            return False
        roles = _FAMILY_ROLES.get(family)
        return roles is None or role in roles or role == "ffn_gate_inp"
    tails = _FAMILIES.get(family)
    return tails is None or tail in tails
