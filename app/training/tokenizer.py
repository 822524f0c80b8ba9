"""The tokenizer of a model, read without its weights and without running code of the folder."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from app.core.errors import ErrorKind, WeftError
from app.generation import hf_files
from app.generation.hf_prompt import TURN_ENDS


def load_tokenizer(model: Path) -> Any:
    """transformers' tokenizer of a model folder or a GGUF file.

    Raises:
        WeftError: NOT_FOUND, CORRUPT when there is none that can be read, ENVIRONMENT without transformers.
    """
    try:
        import transformers
    except ImportError as error:
        raise WeftError(
            ErrorKind.ENVIRONMENT,
            "transformers is not installed here.",
            "Install the core environment on the Settings page.",
        ) from error
    if not model.exists():
        raise WeftError(ErrorKind.NOT_FOUND, f"There is no model at {model}.", "Choose another model.")
    with tempfile.TemporaryDirectory(prefix="weft-tokenizer-") as place:
        folder = Path(place)
        extra: dict[str, Any] = {}
        if model.is_file():
            folder, extra = model.parent, {"gguf_file": model.name}
        else:
            hf_files.stage_tokenizer(model, folder)
        try:
            return transformers.AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False, **extra
            )
        except Exception as error:  # every tokenizer class fails in its own way
            reason = next(iter(str(error).splitlines()), type(error).__name__)[:300]
            raise WeftError(
                ErrorKind.CORRUPT,
                f"The tokenizer of {model} cannot be read: {reason}",
                "Download the tokenizer files again (tokenizer.json, tokenizer_config.json, tokenizer.model).",
            ) from error


def own_template(tokenizer: Any) -> str:
    """The chat template that a tokenizer brings; "" for none."""
    found = getattr(tokenizer, "chat_template", None)
    if isinstance(found, dict):
        found = found.get("default") or next(iter(found.values()), None)
    return found or ""


def turn_ends(tokenizer: Any) -> frozenset[int]:
    """Tokens that end a turn: the end-of-text token, and those of common families that this tokenizer knows."""
    added = tokenizer.get_added_vocab()
    found = {added[name] for name in TURN_ENDS if name in added}
    if tokenizer.eos_token_id is not None:
        found.add(tokenizer.eos_token_id)
    return frozenset(found)


def start_tokens(tokenizer: Any) -> list[int]:
    """What this tokenizer puts before a text (a BOS, mostly, or nothing)."""
    bare: list[int] = tokenizer("a", add_special_tokens=False)["input_ids"]
    full: list[int] = tokenizer("a", add_special_tokens=True)["input_ids"]
    for length in range(len(full) - len(bare) + 1):
        if full[length : length + len(bare)] == bare:
            return full[:length]
    return []
