"""What a model's header says and what the library knows of it, as lines for the details panel.

`read_facts` reads files: not for the window's thread.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from app.core.errors import WeftError
from app.core.formats import read_json
from app.core.gguf_header import GgufArray, read_gguf_header
from app.core.library import ModelEntry, ModelFormat
from app.viewmodels.units import readable_bytes, readable_tokens, readable_when

MAX_VALUE = 400
MAX_FACTS = 400


class ModelFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What the panel shows.

    Attributes:
        facts: (key, value) in the order of the file. template: the chat template's source, or "".
        problem: what could not be read, or "".
    """

    facts: tuple[tuple[str, str], ...] = ()
    template: str = ""
    problem: str = ""


def read_facts(entry: ModelEntry) -> ModelFacts:
    """Read the header (GGUF) or the configuration (a folder). Never raises: what is wrong is in `problem`."""
    try:
        return _gguf(entry) if entry.format is ModelFormat.GGUF else _folder(entry)
    except WeftError as error:
        return ModelFacts(problem=str(error))
    except OSError as error:
        return ModelFacts(problem=f"{entry.path} cannot be read: {error.strerror}.")


def _gguf(entry: ModelEntry) -> ModelFacts:
    header = read_gguf_header(Path(entry.files[0] if entry.files else entry.path), complete=False)
    facts: list[tuple[str, str]] = []
    template = ""
    for key, value in header.metadata.items():
        if key == "tokenizer.chat_template" and isinstance(value, str):
            template = value
        elif isinstance(value, GgufArray):
            facts.append((key, f"{value.count:,} entries"))
        else:
            facts.append((key, short_value(value)))
    facts.append(("tensors", f"{len(header.tensors):,}"))
    return ModelFacts(facts=tuple(facts[:MAX_FACTS]), template=template)


def _folder(entry: ModelEntry) -> ModelFacts:
    folder = Path(entry.path)
    facts: list[tuple[str, str]] = []
    for name in ("config.json", "generation_config.json"):
        if (folder / name).is_file():
            flatten(read_json(folder / name), "", facts)
    return ModelFacts(facts=tuple(facts[:MAX_FACTS]), template=_template(folder))


def _template(folder: Path) -> str:
    lone = folder / "chat_template.jinja"
    if lone.is_file() and lone.stat().st_size < 1024 * 1024:
        return lone.read_text("utf-8", "replace")
    for name in ("chat_template.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            found = read_json(folder / name).get("chat_template")
            if isinstance(found, str):
                return found
            if isinstance(found, list):
                named = {item.get("name"): item.get("template") for item in found if isinstance(item, dict)}
                text = named.get("default") or next(iter(named.values()), "")
                return text if isinstance(text, str) else ""
    return ""


def flatten(value: Any, prefix: str, facts: list[tuple[str, str]], depth: int = 0) -> None:
    """Add what a JSON object says to `facts`, nested keys with dots."""
    for key, item in value.items():
        if isinstance(item, dict) and depth < 3:
            flatten(item, f"{prefix}{key}.", facts, depth + 1)
        else:
            facts.append((f"{prefix}{key}", short_value(item)))


def short_value(value: object) -> str:
    """A value in at most MAX_VALUE characters."""
    if isinstance(value, tuple | list):
        value = f"[{', '.join(str(item) for item in value[:64])}{', …' if len(value) > 64 else ''}]"
    text = str(value)
    return text if len(text) <= MAX_VALUE else text[:MAX_VALUE] + " …"


def about(entry: ModelEntry) -> list[tuple[str, str]]:
    """What the library knows of a model, as (name, value); "" for what does not apply. Reads no file."""
    shape = entry.shape
    experts = f", {shape.experts} experts" if shape.experts else ""
    files = f"{len(entry.files)} file{'s' if len(entry.files) != 1 else ''}"
    heads = f"{shape.heads} heads, {shape.kv_heads or shape.heads} for keys and values"
    return [
        ("Architecture", entry.architecture or entry.model_type),
        ("Parameters", f"{entry.parameters:,}" if entry.parameters else ""),
        ("Size", f"{readable_bytes(entry.bytes)} in {files}" if entry.files else ""),
        ("Context", f"{readable_tokens(shape.context)} tokens" if shape.context else ""),
        ("Layers", f"{shape.layers}, {shape.hidden:,} wide{experts}" if shape.layers else ""),
        ("Attention", heads if shape.heads else ""),
        ("Vocabulary", f"{shape.vocabulary:,} tokens" if shape.vocabulary else ""),
        ("Chat template", "yes" if entry.has_chat_template else "none: a plain one is used"),
        ("Vision", "yes" if entry.vision else ""),
        ("Projector", entry.mmproj),
        ("Root", entry.root),
        ("Changed", readable_when(entry.modified)),
        ("Last used", readable_when(entry.last_used)),
        ("Read-only", "yes, it belongs to another program" if entry.read_only else ""),
    ]
