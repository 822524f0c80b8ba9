"""Ollama's folder: manifests name blobs by their digest. Only ever read."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import msgspec

from app.core.errors import ErrorKind, WeftError
from app.core.library import ModelEntry, ModelFormat
from app.core.own_sampling import of_ollama
from app.core.recognise_gguf import gguf_model

MAX_MANIFEST = 1024 * 1024
MAX_MANIFESTS = 20_000
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_MODEL, _PROJECTOR = "application/vnd.ollama.image.model", "application/vnd.ollama.image.projector"
_PARAMETERS = "application/vnd.ollama.image.params"


class _Layer(msgspec.Struct):
    mediaType: str = ""  # as the file spells it
    digest: str = ""


class _Manifest(msgspec.Struct):
    layers: list[_Layer] = []


class OllamaCandidate(NamedTuple):
    """A manifest: the model's name as Ollama shows it, the state of its files, and how to read it."""

    name: str
    manifest: Path
    signature: str
    read: Callable[[], ModelEntry | None]


def ollama_candidates(root: Path, problem: Callable[[WeftError], None]) -> Iterator[OllamaCandidate]:
    """Every manifest under `root/manifests`. `problem` is told what could not be read."""

    def refused(error: OSError) -> None:
        problem(
            WeftError(
                ErrorKind.PERMISSION,
                f"{error.filename} may not be read and was left out: {error.strerror}.",
                "Give your user the right to read Ollama's folder, or switch it off in Settings.",
            )
        )

    manifests = root / "manifests"
    count = 0
    for place, folders, names in os.walk(manifests, onerror=refused):
        folders.sort()
        if len(Path(place).relative_to(manifests).parts) >= 6:
            folders.clear()
        for name in sorted(names):
            path = Path(place) / name
            shown = manifest_name(path.relative_to(manifests).parts)
            count += 1
            if count > MAX_MANIFESTS:
                return
            if not shown or name.startswith("."):
                continue
            try:
                status = path.stat()
            except OSError:
                continue  # gone meanwhile
            signature = f"{status.st_size}-{status.st_mtime_ns}"
            yield OllamaCandidate(shown, path, signature, _reader(root, path))


def manifest_name(parts: tuple[str, ...]) -> str:
    """`llama3:8b` of (`registry.ollama.ai`, `library`, `llama3`, `8b`); "" for what is no manifest's path."""
    if len(parts) < 4:
        return ""
    registry, *middle, tag = parts
    names = middle if registry == "registry.ollama.ai" else [registry, *middle]
    if names[0] == "library" and len(names) > 1:
        names = names[1:]
    return f"{'/'.join(names)}:{tag}"


def _reader(root: Path, manifest: Path) -> Callable[[], ModelEntry | None]:
    return lambda: _read(root, manifest)


def _read(root: Path, manifest: Path) -> ModelEntry | None:
    with manifest.open("rb") as file:
        data = file.read(MAX_MANIFEST + 1)
    try:
        layers = msgspec.json.decode(data[:MAX_MANIFEST], type=_Manifest).layers
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
    blobs = {layer.mediaType: layer.digest for layer in layers if _DIGEST.fullmatch(layer.digest)}
    if _MODEL not in blobs:
        return None  # a hosted model, or one of another kind
    weights = _blob(root, blobs[_MODEL])
    if not weights.is_file():
        return ModelEntry(
            id=str(manifest),
            name=manifest.name,
            path=str(weights),
            format=ModelFormat.GGUF,
            problem="Its weights are missing from Ollama's blobs; pull it again with Ollama.",
        )
    entry = gguf_model(weights)
    if entry is None:
        return None
    projector = _blob(root, blobs[_PROJECTOR]) if _PROJECTOR in blobs else None
    if _PARAMETERS in blobs and (parameters := _blob(root, blobs[_PARAMETERS])).is_file():
        entry = msgspec.structs.replace(entry, own_sampling=of_ollama(parameters))
    sees = projector is not None and projector.is_file()
    return msgspec.structs.replace(entry, mmproj=str(projector) if sees else "", vision=sees)


def _blob(root: Path, digest: str) -> Path:
    return root / "blobs" / digest.replace(":", "-")
