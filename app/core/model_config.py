"""config.json: the numbers of an architecture, under the many names that these have."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import cast

from app.core.formats import JsonObject, read_json
from app.core.library import ModelShape

_NAMES: dict[str, tuple[str, ...]] = {
    "layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_decoder_layers"),
    "hidden": ("hidden_size", "n_embd", "d_model", "model_dim", "dim"),
    "intermediate": ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", "d_ff", "inner_hidden_size"),
    "heads": ("num_attention_heads", "n_head", "n_heads", "num_heads"),
    "kv_heads": ("num_key_value_heads", "num_kv_heads", "n_head_kv", "multi_query_group_num"),
    "head_dim": ("head_dim", "head_size", "kv_channels"),
    "value_dim": ("v_head_dim",),
    "vocabulary": ("vocab_size", "padded_vocab_size"),
    "context": (
        "max_position_embeddings",
        "n_positions",
        "n_ctx",
        "seq_length",
        "max_seq_len",
        "max_sequence_length",
        "model_max_length",
    ),
    "experts": ("num_local_experts", "num_experts", "n_routed_experts"),
    "sliding_window": ("sliding_window",),
}
_TEXT_PARTS = ("text_config", "llm_config", "language_config", "thinker_config")
_VISION_KEYS = ("vision_config", "visual", "vision_tower", "mm_vision_tower", "vit_config", "vision_encoder")
_WRITES_TEXT = re.compile(
    r"(ForCausalLM|LMHeadModel|ForConditionalGeneration|ForVision2Seq|ForImageTextToText|LMHeadCustom|ForCausalLMWithMTP)$",
    re.IGNORECASE,
)


def table(config: Mapping[str, object], key: str) -> JsonObject:
    """A nested table of a config, empty when there is none."""
    value = config.get(key)
    return cast("JsonObject", value) if isinstance(value, dict) else {}


def text(config: Mapping[str, object], key: str) -> str:
    """A string of a config, "" when there is none."""
    value = config.get(key)
    return value if isinstance(value, str) else ""


def number(config: Mapping[str, object], *keys: str) -> int:
    """The first of these keys that holds a sensible whole number (of a list of them, the largest), else 0."""
    for key in keys:
        value = config.get(key)
        if isinstance(value, list):
            value = max((v for v in cast("list[object]", value) if type(v) is int), default=None)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if type(value) is int and 0 < value < 2**40:
            return value
    return 0


def text_config(config: JsonObject) -> JsonObject:
    """The part that describes the language model: of a model that also sees or hears, a table inside."""
    for key in _TEXT_PARTS:
        part = table(config, key)
        if part:
            return {**config, **text_config(part)} if key == "thinker_config" else {**config, **part}
    return config


def shape_of(config: JsonObject) -> ModelShape:
    """The architecture's numbers, 0 where the config does not tell."""
    part = text_config(config)
    attention = table(part, "attn_config")
    found = {field: number(part, *names) for field, names in _NAMES.items()}
    heads, hidden = found["heads"], found["hidden"]
    found["kv_heads"] = found["kv_heads"] or number(attention, "kv_n_heads") or heads
    if (
        part.get("multi_query") is True
        and not part.get("new_decoder_architecture")
        and not number(part, "num_kv_heads")
    ):
        found["kv_heads"] = number(part, "multi_query_group_num") or 1
    latent = number(part, "qk_nope_head_dim") + number(part, "qk_rope_head_dim")
    found["head_dim"] = latent or found["head_dim"] or (hidden // heads if heads else 0)
    found["value_dim"] = found["value_dim"] or found["head_dim"]
    if not found["intermediate"]:
        ratio = part.get("expansion_ratio")
        found["intermediate"] = (
            int(ratio * hidden) if isinstance(ratio, (int, float)) and 0 < ratio < 100 else 4 * hidden
        )
    if part.get("use_sliding_window") is False:
        found["sliding_window"] = 0
    return ModelShape(**found)


def architecture_of(config: JsonObject) -> str:
    """The first of `architectures`, "" when there is none."""
    value = config.get("architectures")
    names = cast("list[object]", value) if isinstance(value, list) else []
    return next((name for name in names if isinstance(name, str)), "")


def sees(config: JsonObject) -> bool:
    """Whether the model takes images."""
    return any(config.get(key) for key in _VISION_KEYS) or bool(
        table(config, "thinker_config") and sees(table(config, "thinker_config"))
    )


def unsuited(config: JsonObject) -> str:
    """Why a model is none that continues a text, in a sentence; "" when it is one or nobody can tell."""
    architecture = architecture_of(config)
    if config.get("is_encoder_decoder") is True:
        return f"It is an encoder-decoder ({architecture or 'of unknown architecture'}), which no loader runs yet."
    if architecture and not _WRITES_TEXT.search(architecture) and not config.get("auto_map"):
        return f"It is a {architecture}, which does not write text."
    return ""


def custom_code(folder: Path) -> tuple[str, ...]:
    """The Python files that `auto_map` entries ask to run.

    Names in the folder, or `user/repo--file.py` elsewhere. Not to be opened before `model_code.check_references`.
    """
    files: dict[str, None] = {}
    for name in ("config.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json"):
        path = folder / name
        # tokenizer_config.json may take megabytes: parse only the few that have an auto_map at all.
        if not path.is_file() or b'"auto_map"' not in read_start(path):
            continue
        for value in table(read_json(path, 16 * 1024 * 1024), "auto_map").values():
            for reference in cast("list[object]", value) if isinstance(value, list) else [value]:
                if isinstance(reference, str) and "." in reference:
                    module = reference.rpartition(".")[0]
                    # What is no plain module stays as it stands there, so that `model_code.check_references` sees it.
                    plain = all(part.isidentifier() for part in module.split("."))
                    files[(module.replace(".", "/") if plain else module) + ".py"] = None
    return tuple(files)


def has_chat_template(folder: Path) -> bool:
    """Whether the folder holds a chat template in any of the places that transformers looks."""
    if (folder / "chat_template.jinja").is_file() or (folder / "chat_template.json").is_file():
        return True
    found = re.search(rb'"chat_template"\s*:\s*(.)', read_start(folder / "tokenizer_config.json"))
    return found is not None and found[1] in b'"['


def read_start(path: Path, limit: int = 16 * 1024 * 1024) -> bytes:
    """The first bytes of a file, none when it cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(limit)
    except OSError:
        return b""
