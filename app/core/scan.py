"""Find the models and adapters under many roots, each in its program's own layout, without moving anything.

What the file system refuses (a folder that may not be read, one that vanishes meanwhile) costs only itself.
Entries whose files did not change since the last scan are taken over without being read.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import msgspec

from app.core.errors import ErrorKind, WeftError
from app.core.library import AdapterEntry, ModelEntry, ModelShape
from app.core.recognise import cache_name, cache_snapshot
from app.core.recognise_adapter import lone_adapter, peft_adapter
from app.core.recognise_folder import folder_model
from app.core.recognise_gguf import gguf_adapter, gguf_model, is_projector_name, parts_of, split_position
from app.core.roots import Root, RootKind
from app.core.scan_ollama import ollama_candidates
from app.core.unfinished import pending_files

Entry = ModelEntry | AdapterEntry

_RECOGNITION = 1  # raise it when recognition improves: everything is then read once more
# Entries that were stored with other fields are read again too.
_FIELDS = (*ModelEntry.__struct_fields__, *ModelShape.__struct_fields__, *AdapterEntry.__struct_fields__)
VERSION = f"{_RECOGNITION}.{hashlib.blake2b(' '.join(_FIELDS).encode(), digest_size=4).hexdigest()}"
MAX_DEPTH = 10
MAX_FOLDERS = 100_000
_WEIGHTS = (".safetensors", ".bin", ".pt")
_SKIPPED = frozenset(
    {"__pycache__", "node_modules", "site-packages", "installer_files", "venv", "env", "onnx", "openvino"}
)
_TELLING = (*_WEIGHTS, ".json", ".jinja", ".gguf", ".py")
_NOT_ADAPTERS = re.compile(r"(pytorch_model|model|tf_model|flax_model|optimizer|training_args|scheduler|rng_state)\b.*")


class Found(NamedTuple):
    """A model or adapter: its id, the state of the files it was read from, and the entry; None when it is known already."""

    id: str
    signature: str
    entry: Entry | None


class Candidate(NamedTuple):
    """A place that may hold a model or adapter, not read yet.

    Attributes:
        id, name: of the entry that it becomes; name "" keeps the recognised one.
        prefix: put before the recognised name (`user/`).
        signature: changes when any of its files does.
    """

    id: str
    read: Callable[[], Entry | None]
    signature: str
    name: str = ""
    prefix: str = ""


class Scan:
    """One pass over all roots; folders that several roots share are visited once.

    Args:
        problem: told of every folder that could not be read, and of every bound that was hit.
        cancelled: asked often; a scan that is cancelled ends early.

    Attributes:
        folders: every folder that was looked into, outer ones first; what a watcher has to watch.
    """

    def __init__(
        self, problem: Callable[[WeftError], None] = lambda _: None, cancelled: Callable[[], bool] = lambda: False
    ) -> None:
        self._problem = problem
        self._cancelled = cancelled
        self.folders: list[str] = []
        self._visited: set[tuple[int, int]] = set()
        self._ids: set[str] = set()

    def root(self, root: Root, known: Mapping[str, str] | None = None) -> Iterator[Found]:
        """Everything under one root.

        Args:
            known: signatures by id, as the index holds them; what did not change is not read again.
        """
        for candidate in self._candidates(root):
            if self._cancelled():
                return
            if candidate.id in self._ids:
                continue
            if (known or {}).get(candidate.id) == candidate.signature:
                self._ids.add(candidate.id)
                yield Found(candidate.id, candidate.signature, None)
                continue
            try:
                entry = candidate.read()
            except WeftError as error:
                if error.kind is not ErrorKind.NOT_FOUND:  # gone meanwhile
                    self._problem(error)
                continue
            except FileNotFoundError:
                continue
            except OSError as error:
                self._problem(_refused(Path(candidate.id), error))
                continue
            if entry is not None:
                self._ids.add(candidate.id)
                yield Found(candidate.id, candidate.signature, _filed(entry, candidate, root))

    def _candidates(self, root: Root) -> Iterator[Candidate]:
        if root.kind is RootKind.OLLAMA:
            for name, manifest, signature, read in ollama_candidates(Path(root.path), self._problem):
                if str(manifest.parent) not in self.folders[-1:]:
                    self.folders.append(str(manifest.parent))
                yield Candidate(str(manifest), read, f"{VERSION}-{signature}", name)
            return
        place = Path(root.path)
        if place.suffix.lower() in (".gguf", ".safetensors") and place.is_file():
            yield from self._lone(place, root)
            return
        for start in _starts(place):
            yield from self._walk(start, root)

    def _lone(self, path: Path, root: Root) -> Iterator[Candidate]:
        """A file that was added by itself: with the other parts of its set, and nothing else of its folder."""
        parts = parts_of(path)[0] if path.suffix.lower() == ".gguf" else [path]
        files = {part.name: part.stat() for part in parts if part.is_file()}
        self.folders.append(str(path))
        yield from _in_folder(path.parent, files, path.parent, root)

    def _walk(self, start: Path, root: Root) -> Iterator[Candidate]:
        stack: list[tuple[Path, int]] = [(start, 0)]
        folders = 0
        while stack:
            folder, depth = stack.pop()
            if self._cancelled():
                return
            if cache_name(folder.name) and (folder / "snapshots").is_dir():
                yield from self._cache_folder(folder, depth)
                continue
            files, below = self._list(folder)
            yield from _in_folder(folder, files, start, root)
            folders += 1
            if folders > MAX_FOLDERS:
                self._problem(
                    WeftError(
                        ErrorKind.BAD_INPUT,
                        f"{start} holds more than {MAX_FOLDERS:,} folders; the rest was not searched.",
                        "Add the folders that hold your models instead.",
                    )
                )
                return
            if depth < MAX_DEPTH and "model_index.json" not in files:  # that is an image generator's
                stack.extend((folder / name, depth + 1) for name in reversed(below))

    def _cache_folder(self, folder: Path, depth: int) -> Iterator[Candidate]:
        try:
            snapshot = cache_snapshot(folder)
        except OSError as error:
            self._problem(_refused(folder, error))
            return
        if snapshot is None:
            return
        name = cache_name(folder.name)
        self.folders.extend((str(folder), str(folder / "refs"), str(snapshot.parent)))
        stack = [snapshot]
        while stack:
            place = stack.pop()
            files, below = self._list(place)
            for candidate in _in_folder(place, files, snapshot, Root(path=str(snapshot), kind=RootKind.HUGGING_FACE)):
                inside = Path(candidate.id).relative_to(snapshot)
                # The id leaves the revision out, so that settings survive an update.
                single = inside == Path()
                prefix = (
                    f"{name}/{inside.parent.as_posix()}/".replace("/./", "/")
                    if inside.suffix != ".gguf"
                    else (f"{name.rpartition('/')[0]}/" if "/" in name else "")
                )
                yield candidate._replace(id=str(folder / inside), name=name if single else "", prefix=prefix)
            if len(place.relative_to(snapshot).parts) + depth < MAX_DEPTH and "model_index.json" not in files:
                stack.extend(place / part for part in reversed(below))

    def _list(self, folder: Path) -> tuple[dict[str, os.stat_result], list[str]]:
        """The files that tell something, with their state, and the folders worth a look; each folder once."""
        files: dict[str, os.stat_result] = {}
        below: list[str] = []
        try:
            status = folder.stat()
            if (status.st_dev, status.st_ino) in self._visited:  # a link to a folder above, or a second way here
                return files, below
            self._visited.add((status.st_dev, status.st_ino))
            self.folders.append(str(folder))
            with os.scandir(folder) as entries:
                for entry in entries:
                    try:
                        if entry.is_dir():
                            if not entry.name.startswith(".") and entry.name.lower() not in _SKIPPED:
                                below.append(entry.name)
                        elif entry.name.lower().endswith(_TELLING) and not entry.name.startswith("."):
                            files[entry.name] = entry.stat()
                    except PermissionError as error:
                        self._problem(_refused(folder / entry.name, error))
                    except OSError:  # a link to nowhere or to itself, or gone meanwhile
                        continue
        except FileNotFoundError:
            pass  # deleted during the scan
        except OSError as error:
            self._problem(_refused(folder, error))
        below.sort()
        return files, below


def scan(
    roots: Iterable[Root | Path | str],
    problem: Callable[[WeftError], None] = lambda _: None,
    cancelled: Callable[[], bool] = lambda: False,
) -> Iterator[Entry]:
    """Every model and adapter under these roots, each read now."""
    one = Scan(problem, cancelled)
    for root in roots:
        for found in one.root(root if isinstance(root, Root) else Root(path=str(Path(root).absolute()))):
            if found.entry is not None:
                yield found.entry


def _starts(root: Path) -> list[Path]:
    """Where to begin: in a text-generation-webui folder only where it keeps weights, elsewhere at the root."""
    if (root / "server.py").is_file() and ((root / "modules").is_dir() or (root / "user_data").is_dir()):
        places = [base / part for base in (root, root / "user_data") for part in ("models", "loras")]
        return [place for place in places if place.is_dir()]
    if root.name == "user_data" and (root / "models").is_dir():
        return [place for part in ("models", "loras") if (place := root / part).is_dir()]
    return [root] if root.is_dir() else []


def _in_folder(folder: Path, files: Mapping[str, os.stat_result], start: Path, root: Root) -> Iterator[Candidate]:
    """What one folder may hold: itself as a model or adapter, GGUF files, lone adapters. Not what is still being downloaded."""
    if not files:
        return
    pending = pending_files(folder)
    if any(not name.lower().endswith(".gguf") for name in pending):
        files = {name: status for name, status in files.items() if name.lower().endswith(".gguf")}
    adapter = "adapter_config.json" in files
    model = "config.json" in files and any(
        n.endswith((*_WEIGHTS, ".index.json")) for n in files if n != "adapter_config.json"
    )
    names = [name for name in files if not name.endswith(".gguf")]
    if adapter:
        yield Candidate(
            str(folder), lambda: peft_adapter(folder), _signature(names, files), prefix=_user(folder, start, root, 2)
        )
    elif model:
        yield Candidate(
            str(folder), lambda: folder_model(folder), _signature(names, files), prefix=_user(folder, start, root, 2)
        )
    else:
        for name in names:
            if name.endswith(_WEIGHTS) and not _NOT_ADAPTERS.match(name):
                path = folder / name
                yield Candidate(str(path), _reader(lone_adapter, path), _signature([name], files))
    ggufs = [name for name in files if name.lower().endswith(".gguf")]
    projectors = [name for name in ggufs if is_projector_name(name)]
    sets: dict[str, list[str]] = {}
    for name in sorted(ggufs):
        if name not in projectors:
            sets.setdefault(_set_name(name), []).append(name)
    waiting = {_set_name(path.rpartition("/")[2]) for path in pending}
    for parts in sets.values():
        if _set_name(parts[0]) in waiting:
            continue
        path = folder / parts[0]
        yield Candidate(
            str(path),
            _reader(_gguf, path),
            _signature([*parts, *projectors], files),
            prefix=_user(path, start, root, 3),
        )


def _set_name(name: str) -> str:
    split = split_position(name)
    return f"{split[0]}-of-{split[2]}" if split else name


def _reader(read: Callable[[Path], Entry | None], path: Path) -> Callable[[], Entry | None]:
    return lambda: read(path)


def _gguf(path: Path) -> Entry | None:
    return gguf_model(path) or gguf_adapter(path)


def _user(path: Path, start: Path, root: Root, depth: int) -> str:
    """`user/` where the layout is root/user/model, or root/user/repository/file."""
    if root.kind in (RootKind.TEXT_GENERATION_WEBUI, RootKind.STARTER):
        return ""
    parts = path.relative_to(start).parts
    return f"{parts[0]}/" if len(parts) == depth else ""


def _signature(names: Iterable[str], files: Mapping[str, os.stat_result]) -> str:
    digest = hashlib.blake2b(digest_size=12)
    for name in sorted(names):
        status = files[name]
        digest.update(f"{name}\0{status.st_size}\0{status.st_mtime_ns}\n".encode("utf-8", "surrogateescape"))
    return f"{VERSION}-{digest.hexdigest()}"


def _filed(entry: Entry, candidate: Candidate, root: Root) -> Entry:
    name = candidate.name or candidate.prefix + entry.name
    if isinstance(entry, AdapterEntry):
        return msgspec.structs.replace(entry, id=candidate.id, name=name, root=root.path)
    if root.kind is RootKind.STARTER:
        name = "starter (GGUF)" if entry.format == "gguf" else "starter"
    read_only = root.kind in (RootKind.STARTER, RootKind.OLLAMA)
    return msgspec.structs.replace(entry, id=candidate.id, name=name, root=root.path, read_only=read_only)


def _refused(path: Path, error: OSError) -> WeftError:
    if isinstance(error, PermissionError):
        return WeftError(
            ErrorKind.PERMISSION,
            f"{path} may not be read and was left out.",
            "Give your user the right to read it, or remove that folder in Settings.",
        )
    return WeftError(
        ErrorKind.CORRUPT,
        f"{path} cannot be read and was left out: {error.strerror}.",
        "Check the disk that it lies on.",
    )
