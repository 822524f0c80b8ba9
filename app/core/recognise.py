"""What a folder or file is: a model, an adapter, or neither. From headers alone; nothing is loaded or run."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec

from app.core.library import AdapterEntry, ModelEntry
from app.core.recognise_adapter import lone_adapter, peft_adapter
from app.core.recognise_folder import folder_model
from app.core.recognise_gguf import gguf_adapter, gguf_model, is_projector_name, parts_of

_CACHE_FOLDER = re.compile(r"models--(?P<user>.+?)--(?P<model>.+)|models--(?P<alone>[^-].*)")


def recognise_model(path: Path) -> ModelEntry | None:
    """The model at a path: a GGUF file (or any part of a split one), a folder of weights, a folder of the
    Hugging Face cache, a folder with one GGUF model in it, or a weight file in a model's folder.

    Returns:
        None when there is no model. A damaged one comes back with its `problem`.

    Raises:
        WeftError: PERMISSION or NOT_FOUND from the operating system.
    """
    if path.is_dir():
        snapshot = cache_snapshot(path)
        if snapshot is not None:
            return named_by_cache(recognise_model(snapshot), path)
        return folder_model(path) or _only_gguf(path)
    if path.suffix.lower() == ".gguf":
        return gguf_model(path) if path.exists() else None
    if path.suffix in (".safetensors", ".bin", ".pt") and path.exists():
        entry = folder_model(path.parent)
        return entry if entry is not None and str(path) in entry.files else None
    return None


def recognise_adapter(path: Path) -> AdapterEntry | None:
    """The adapter at a path: a PEFT folder (or its weight file), a lone file, or a GGUF adapter. Raises as `recognise_model`."""
    if path.is_dir():
        snapshot = cache_snapshot(path)
        if snapshot is not None:
            entry = peft_adapter(snapshot)
            name = cache_name(path.name)
            return msgspec.structs.replace(entry, id=str(path), name=name) if entry else None
        return peft_adapter(path)
    if not path.exists():
        return None
    if path.suffix.lower() == ".gguf":
        return gguf_adapter(path)
    if path.suffix in (".safetensors", ".bin", ".pt"):
        if path.stem == "adapter_model":
            return peft_adapter(path.parent) or lone_adapter(path)
        return lone_adapter(path)
    return None


def _only_gguf(folder: Path) -> ModelEntry | None:
    """The GGUF model of a folder that holds just one."""
    firsts = {
        parts_of(path)[0][0]
        for path in folder.iterdir()
        if path.suffix.lower() == ".gguf" and path.is_file() and not is_projector_name(path.name)
    }
    entries = [entry for path in sorted(firsts) if (entry := gguf_model(path)) is not None]
    return entries[0] if len(entries) == 1 else None


# The Hugging Face cache -------------------------------------------------------------------------


def cache_name(folder: str) -> str:
    """`user/model` of a cache folder's name `models--user--model`; "" for other names."""
    match = _CACHE_FOLDER.fullmatch(folder)
    if match is None:
        return ""
    return f"{match['user']}/{match['model']}" if match["user"] else match["alone"]


def cache_snapshot(folder: Path) -> Path | None:
    """The snapshot that a cache folder's `main` (else its latest reference) points to; None for other folders.
    A reference that leads elsewhere is passed over.
    """
    if not cache_name(folder.name) or not (folder / "snapshots").is_dir():
        return None
    try:
        references = [path for path in (folder / "refs").rglob("*") if path.is_file()]
    except OSError:
        references = []
    references.sort(key=lambda path: (path != folder / "refs" / "main", -path.stat().st_mtime))
    for reference in references:
        with reference.open("rb") as file:
            revision = file.read(64).decode("ascii", "replace").strip()
        snapshot = folder / "snapshots" / revision
        if re.fullmatch(r"[0-9a-f]{7,64}", revision) and snapshot.is_dir():
            return snapshot
    snapshots = [path for path in (folder / "snapshots").iterdir() if path.is_dir()]
    return max(snapshots, key=lambda path: path.stat().st_mtime, default=None)


def named_by_cache(entry: ModelEntry | None, folder: Path) -> ModelEntry | None:
    """A snapshot's entry under the name of its repository, with an id that outlives the next revision."""
    if entry is None:
        return None
    if entry.format == "gguf":
        user = cache_name(folder.name).rpartition("/")[0]
        inside = Path(entry.path).relative_to(folder / "snapshots")
        return msgspec.structs.replace(
            entry,
            id=str(folder / Path(*inside.parts[1:])),
            name=f"{user}/{entry.name}" if user else entry.name,
        )
    return msgspec.structs.replace(entry, id=str(folder), name=cache_name(folder.name))
