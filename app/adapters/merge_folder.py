"""What a merged model needs beside its weights: config, generation config, tokenizer, template, processor and a card."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from app.core.merge_plan import MergePlan
from app.core.unfinished import NOTE, read_note

_WEIGHTS = frozenset(".safetensors .bin .pt .pth .gguf .h5 .msgpack .onnx .ot .ckpt .tflite .npz .part".split())
_OWN = frozenset({"config.json", "README.md", NOTE, "quantize_config.json", "quant_config.json"})
_TOKENIZER = frozenset(
    """tokenizer.json tokenizer.model tokenizer_config.json special_tokens_map.json added_tokens.json vocab.json vocab.txt
    merges.txt spiece.model sentencepiece.bpe.model tekken.json""".split()
)
_TEMPLATES = ("chat_template.jinja", "chat_template.json")
_LARGEST = 512 * 1024 * 1024  # bytes of a file that is still taken for a tokenizer's or a processor's
_LARGEST_JSON = 64 * 1024 * 1024


def side_files(folder: Path) -> list[Path]:
    """All that goes with a model but is not its weights, its config or its card."""
    return [
        path
        for path in sorted(folder.iterdir())
        if path.is_file()
        and not path.name.startswith(".")
        and path.suffix.lower() not in _WEIGHTS
        and path.name not in _OWN
        and not path.name.endswith(".index.json")
        and path.stat().st_size <= _LARGEST
    ]


def write_side_files(
    plan: MergePlan, config: Mapping[str, Any], changes: Mapping[str, Any], into: Path, notes: Sequence[str] = ()
) -> list[str]:
    """Write everything but weights into a folder.

    Args:
        config: the base's config.json as it stands there. changes: keys of it with their new values; None for what falls away.
        notes: sentences for the card.

    Returns:
        Sentences about what was taken from an adapter.
    """
    base = Path(plan.model)
    taken: list[str] = []
    for path in side_files(base):
        shutil.copyfile(path, into / path.name)
    for adapter in plan.stack.adapters:
        if adapter.weight:
            taken += _from_adapter(base, Path(adapter.path), into)
    made = changed_config(config, changes, plan.dtype)
    (into / "config.json").write_text(json.dumps(made, indent=2, ensure_ascii=False) + "\n", "utf-8")
    (into / "README.md").write_text(card(plan, [*notes, *taken]), "utf-8")
    return taken


def changed_config(config: Mapping[str, Any], changes: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """The config of the merged model."""
    made: dict[str, Any] = json.loads(json.dumps(config))
    text = next((made[k] for k in ("text_config", "llm_config") if isinstance(made.get(k), dict)), {})
    for key, value in changes.items():
        if value is None:  # what the merged model no longer has
            made.pop(key, None)
            text.pop(key, None)
            continue
        if key in text:
            text[key] = value
        if key in made or key not in text:
            made[key] = value
    if dtype:
        for part in [made, *(v for v in made.values() if isinstance(v, dict))]:
            for key in ("dtype", "torch_dtype"):
                if key in part:
                    part[key] = dtype
        if "torch_dtype" not in made:
            made["dtype"] = dtype
    return made


# What an adapter brings -------------------------------------------------------------------------


def _from_adapter(base: Path, adapter: Path, into: Path) -> list[str]:
    folder = adapter if adapter.is_dir() else adapter.parent
    if not adapter.is_dir() and not (folder / "adapter_config.json").is_file():
        return []
    new = added_tokens(folder) - added_tokens(base)
    if new and added_tokens(base) <= added_tokens(folder):
        for path in sorted(folder.iterdir()):
            if path.name in (*_TOKENIZER, *_TEMPLATES) and path.is_file() and path.stat().st_size <= _LARGEST:
                shutil.copyfile(path, into / path.name)
        return [f"The tokenizer is that of {adapter.name}, which adds {len(new)} tokens to the base's."]
    if new:
        return [f"The tokenizer of {adapter.name} lacks tokens of the base's: the base's is kept."]
    template = next((folder / name for name in _TEMPLATES if (folder / name).is_file()), None)
    if template is not None and not _has_template(base) and template.stat().st_size <= _LARGEST_JSON:
        shutil.copyfile(template, into / template.name)
        return [f"The base has no chat template: that of {adapter.name} was taken."]
    return []


def _has_template(folder: Path) -> bool:
    if any((folder / name).is_file() for name in _TEMPLATES):
        return True
    return bool(_json(folder / "tokenizer_config.json").get("chat_template"))


def added_tokens(folder: Path) -> frozenset[tuple[int, str]]:
    """Tokens (number, text) that a folder's tokenizer has beside its plain vocabulary."""
    found: set[tuple[int, str]] = set()
    listed = _json(folder / "tokenizer.json").get("added_tokens")
    for entry in listed if isinstance(listed, list) else []:
        if isinstance(entry, dict) and type(entry.get("id")) is int and isinstance(entry.get("content"), str):
            found.add((entry["id"], entry["content"]))
    decoder = _json(folder / "tokenizer_config.json").get("added_tokens_decoder")
    for key, entry in decoder.items() if isinstance(decoder, dict) else ():
        if key.isdecimal() and isinstance(entry, dict) and isinstance(entry.get("content"), str):
            found.add((int(key), entry["content"]))
    for text, number in _json(folder / "added_tokens.json").items():
        if type(number) is int:
            found.add((number, text))
    return frozenset(found)


def _json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _LARGEST_JSON:
            return {}
        value = json.loads(path.read_text("utf-8-sig"))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


# The card ---------------------------------------------------------------------------------------


def card(plan: MergePlan, notes: Sequence[str]) -> str:
    """A model card: what was merged, with which weights, and the hashes that tell these files from others."""
    base = Path(plan.model)
    name = plan.base_name or _recorded(base) or base.name
    license_ = _license(base) or plan.license
    front = ["---", "library_name: transformers", "base_model:", f"- {_plain(name)}", "tags:", "- merge", "- lora"]
    front += [f"license: {_plain(license_)}"] if license_ else []
    lines = [*front, "---", "", f"# {_plain(Path(plan.target).name)}", ""]
    stack = " + ".join(f"{a.name or Path(a.path).name} {a.weight:g}" for a in plan.stack.adapters if a.weight)
    lines += [f"{_plain(name)} with {_plain(stack)} merged into its weights by Weft.", ""]
    lines += ["| adapter | weight | sha256 |", "| --- | --- | --- |"]
    for adapter in plan.stack.adapters:
        if adapter.weight:
            path = Path(adapter.path)
            lines.append(f"| {_plain(adapter.name or path.name)} | {adapter.weight:g} | `{adapter_hash(path)}` |")
    note = read_note(base)
    if note is not None and note.verified:
        lines += ["", "Files of the base, as they were compared with the hub's checksums:", ""]
        lines += [f"- `{file}` `{found.checksum}`" for file, found in sorted(note.verified.items())]
    lines += ["", *(f"- {_plain(text)}" for text in notes)] if notes else []
    return "\n".join(lines) + "\n"


def _recorded(base: Path) -> str:
    note = read_note(base)
    return note.repo if note is not None else ""


def _plain(text: str) -> str:
    return re.sub(r"[\r\n|`]", " ", text)


def _license(base: Path) -> str:
    try:
        with (base / "README.md").open(encoding="utf-8", errors="replace") as file:
            head = file.read(64 * 1024)
    except OSError:
        return ""
    front = re.match(r"---\n(.*?)\n---", head, re.DOTALL)
    found = re.search(r"^license:\s*([\w.-]+)\s*$", front[1], re.MULTILINE) if front else None
    return found[1] if found else ""


def adapter_hash(path: Path) -> str:
    """sha256 of an adapter's config and weights together."""
    files = sorted(p for p in path.iterdir() if p.name.startswith("adapter")) if path.is_dir() else [path]
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as opened:
            while data := opened.read(1 << 20):
                digest.update(data)
    return digest.hexdigest()
