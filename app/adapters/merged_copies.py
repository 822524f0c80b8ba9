"""Merged copies of GGUF models, for stacks that llama.cpp cannot add while it runs.

What is merged are the adapters that need it alone: plain pairs of a stack are added live, on top, since all differences
are taken from the unadapted base. Copies lie in the cache folder under a key of their content, and the ones that were not used
for longest make room for new ones.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import msgspec

from app.adapters.conversion_cache import Cache
from app.adapters.gguf_edits import GgufBase, open_base
from app.adapters.gguf_repeat import repeated_layers
from app.adapters.merge_folder import adapter_hash
from app.adapters.merge_gguf import VERSION, MergeIntoGguf
from app.adapters.merge_staging import write_error
from app.core.adapter_file import AdapterFile, read_adapter_file
from app.core.compatibility import adapter_extras
from app.core.errors import ErrorKind, WeftError
from app.core.gguf_header import os_error
from app.core.module_names import place_of, role_of
from app.core.stack import AdapterStack, StackedAdapter

LIMIT = 32 << 30  # bytes of all copies together; WEFT_MERGED_CACHE_BYTES says otherwise
_RECENT = 20.0  # seconds: what another engine has found so lately it may not have opened yet
_SAMPLES, _SAMPLE = 64, 1 << 16
_FILE, _NOTE = "model.gguf", "note.json"
_SPARE = 512 * 1024 * 1024  # bytes that stay free on the drive


class Copy(NamedTuple):
    """A model file that serves a stack: the base itself where nothing is merged.

    Attributes:
        file: to load. live: what is added to it while it runs. notes: sentences worth showing.
    """

    file: Path
    live: AdapterStack
    notes: list[str]


class _Made(msgspec.Struct):
    """What stands beside a copy: how long it took, what was told of it, and its size."""

    seconds: float
    notes: list[str]
    bytes: int


class MergedCopies:
    """The copies of one base.

    Args:
        base: the GGUF model, by its first file.
    """

    def __init__(self, base: Path) -> None:
        self._path = base
        self._base: GgufBase | None = None
        self._identity = ""
        given = os.environ.get("WEFT_MERGED_CACHE_BYTES", "")
        self._limit = int(given) if given.isdecimal() else LIMIT

    def serve(
        self,
        stack: AdapterStack,
        memory: int,
        progress: Callable[[int, int], None],
        cancelled: Callable[[], bool],
    ) -> Copy:
        """The file to load for a stack, made where it is not there yet.

        Args:
            memory: bytes that the model may take; a copy that would take more keeps eight bits a weight instead of 16.
                0 when nobody knows.
            progress: told (bytes written, bytes in all).

        Raises:
            WeftError: when an adapter cannot be used or merged, DISK_FULL, PERMISSION, CANCELLED; nothing is left then.
        """
        repeated_layers(stack)  # adapters that disagree about the layers belong to different models
        merged, live, why = self._part(stack)
        if not merged.adapters:
            return Copy(self._path, live, [])
        folder, made = self._made(merged, memory, progress, cancelled)
        note = (
            f"llama.cpp cannot add {_listed(why)} while it runs. A merged copy of the model serves "
            f"({folder.stat().st_size / 1e9:.2f} GB in the cache folder): a weight change of "
            f"{_listed([a.name or Path(a.path).name for a in merged.adapters])} takes {max(made.seconds, 0.1):.1f} s and loads the model again."
        )
        return Copy(folder, live, [note, *made.notes])

    # Which adapters ------------------------------------------------------------------------------

    def _part(self, stack: AdapterStack) -> tuple[AdapterStack, AdapterStack, list[str]]:
        """What must be merged (none of weight 0), what is added live, and what it is that llama.cpp cannot add."""
        merged: dict[str, StackedAdapter] = {}
        live: list[StackedAdapter] = []
        why: list[str] = []
        for adapter in stack.adapters:
            reasons = self._reasons(read_adapter_file(Path(adapter.path)))
            if not reasons:
                live.append(adapter)
            elif adapter.weight:
                why += [reason for reason in reasons if reason not in why]
                before = merged.get(adapter.path)
                weight = adapter.weight + (before.weight if before else 0.0)
                merged[adapter.path] = msgspec.structs.replace(adapter, weight=weight)
        wanted = tuple(adapter for adapter in merged.values() if adapter.weight)
        return AdapterStack(adapters=wanted), AdapterStack(adapters=tuple(live)), why

    def _reasons(self, file: AdapterFile) -> list[str]:
        """What of an adapter llama.cpp cannot add live, in words."""
        if file.problems or file.needs_alpha:
            return []  # refused as ever
        found = adapter_extras(file)
        roles = {name if file.gguf else role_of(place_of(name)) for name, m in file.modules.items() if m.loras}
        if roles & {"token_embd", "output"} and self._opened().tied:
            found.append("pairs of an embedding that is the output head too")
        return found

    def _opened(self) -> GgufBase:
        if self._base is None:
            self._base = open_base(self._path)
        return self._base

    # The copy ------------------------------------------------------------------------------------

    def _made(
        self, stack: AdapterStack, memory: int, progress: Callable[[int, int], None], cancelled: Callable[[], bool]
    ) -> tuple[Path, _Made]:
        hashes = sorted((adapter_hash(Path(a.path)), a.weight) for a in stack.adapters)
        plan: MergeIntoGguf | None = None
        for types in ("open", "q8_0"):
            plan = MergeIntoGguf(self._path, stack, types)
            if not memory or plan.bytes <= memory:
                break
        assert plan is not None
        key = hashlib.sha256(repr((VERSION, types, self._of_base(), hashes)).encode()).hexdigest()[:40]
        cache = Cache(merged_folder(), self._limit, _RECENT)
        found = cache.get(key)
        if found is not None:
            with suppress(OSError, msgspec.MsgspecError):
                made = msgspec.json.decode((found / _NOTE).read_bytes(), type=_Made)
                if (found / _FILE).stat().st_size == made.bytes == plan.bytes:
                    return found / _FILE, made
            shutil.rmtree(found, ignore_errors=True)  # somebody cut it short
        if plan.bytes > self._limit:
            raise WeftError(
                ErrorKind.DISK_FULL,
                f"The merged copy takes {plan.bytes / 1e9:.2f} GB, and all copies may take {self._limit / 1e9:.2f} GB.",
                "Set WEFT_MERGED_CACHE_BYTES higher, or use the stack with Transformers.",
            )
        self._make_room(plan.bytes)
        started = time.monotonic()
        try:
            with cache.making(key) as stage:
                plan.write(stage / _FILE, progress, cancelled)
                made = _Made(time.monotonic() - started, plan.notes, plan.bytes)
                (stage / _NOTE).write_bytes(msgspec.json.encode(made))
        except OSError as error:
            raise write_error(merged_folder() / key, error) from error
        return cache.path(key) / _FILE, made

    def _make_room(self, needed: int) -> None:
        """Take away old copies, so that the new one stays within the limit and on the drive."""
        folder = merged_folder()
        _sweep(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            used = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
            free = shutil.disk_usage(folder).free
        except OSError as error:
            raise WeftError(
                ErrorKind.PERMISSION,
                f"{folder} cannot be used: {error.strerror or error}.",
                "Choose another cache folder.",
            ) from error
        most = min(self._limit, used + free - _SPARE) - needed
        if used > most:
            Cache(folder, max(0, most), _RECENT).trim()

    def _of_base(self) -> str:
        """What tells this base from any other: its headers, sizes, times, and samples of its weights."""
        if not self._identity:
            digest = hashlib.sha256()
            for header in self._opened().headers:
                try:
                    with header.path.open("rb") as file:
                        status = os.fstat(file.fileno())
                        digest.update(
                            f"{status.st_size}:{status.st_mtime_ns};".encode() + file.read(header.data_offset)
                        )
                        for number in range(_SAMPLES):
                            file.seek(status.st_size * number // _SAMPLES)
                            digest.update(file.read(_SAMPLE))
                except OSError as error:
                    raise os_error(header.path, error) from error
            self._identity = digest.hexdigest()
        return self._identity


def _sweep(folder: Path) -> None:
    """Take away what engines that died were making: whole models that nobody would miss for a day."""
    try:
        import psutil
    except ImportError:
        return  # the cache takes them away in time
    for stage in folder.glob(".making-*"):
        pid = stage.name.split("-")[1]
        if pid.isdecimal() and not psutil.pid_exists(int(pid)):
            shutil.rmtree(stage, ignore_errors=True)


def merged_folder() -> Path:
    """Where merged copies are kept: under WEFT_CACHE, which the parent sets, or for this process alone."""
    folder = os.environ.get("WEFT_CACHE")
    return Path(folder) / "merged" if folder else Path(tempfile.gettempdir()) / f"weft-merged-{os.getpid()}"


def _listed(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
