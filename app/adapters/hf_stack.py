"""From a stack as a person sets it to a live stack on a loaded transformers model: what to open, what to let go."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app.core.adapter_file import config_beside
from app.core.errors import ErrorKind, WeftError
from app.core.stack import AdapterStack

if TYPE_CHECKING:
    from app.adapters.live_torch import LiveStack

_SPARE = 0.9  # of free memory may go into baking


class ModelStack:
    """The adapters of one loaded transformers model."""

    def __init__(self, model: Any) -> None:
        from app.adapters.live_torch import LiveStack
        from app.adapters.repeat_torch import RepeatedLayers

        self._live = LiveStack(model)
        self._layers = RepeatedLayers(model)

    @property
    def baked(self) -> bool:
        """Whether the stack is in the weights."""
        return self._live.baked

    def set(
        self, stack: AdapterStack, progress: Callable[[str, float, float], None], *, baked: bool = False
    ) -> tuple[bool, list[str]]:
        """Replace the whole stack. Adapters that stay are not read again; one whose file changed is.

        Args:
            progress: told a phase, and how many modules of it are done, of how many.
            baked: write it into the weights. Where memory does not suffice it stays live, and a note says so.

        Returns:
            Whether the KV cache went stale, and sentences worth showing.

        Raises:
            WeftError: when an adapter cannot be used; then the stack is what it was.
        """
        weights, names = _wanted(stack)
        ranges = _repeated(weights, names)
        if ranges != self._layers.ranges:
            return self._rebuilt(ranges, stack, progress, baked)
        live = self._live
        if baked and live.baked and live.weights == weights:
            return False, []
        with self._baked_again_if_refused(progress):
            notes, _ = self._add(names, progress)
        stale = False
        for key in [key for key in live.weights if key not in weights]:
            stale = live.replaced(key) or stale
            live.discard(key)
        stale = live.apply(weights) or stale
        return stale, notes + (self._bake(progress) if baked else [])

    def _rebuilt(
        self,
        ranges: tuple[tuple[int, int], ...],
        stack: AdapterStack,
        progress: Callable[[str, float, float], None],
        baked: bool,
    ) -> tuple[bool, list[str]]:
        """Make the model of other ranges of its layers, with a live stack of its own; what it was if that fails."""
        from app.adapters.live_torch import LiveStack

        before, weights, was, was_baked = self._live, dict(self._live.weights), self._layers.ranges, self.baked
        before.apply({})  # its weights are the base's again
        try:
            self._layers.set(ranges)
            self._live = LiveStack(before.model)
            _, notes = self.set(stack, progress, baked=baked)
        except BaseException:
            if self._live is not before:
                self._live.close()
            self._layers.set(was)
            self._live = before
            before.apply(weights)
            if was_baked:
                self._bake(progress)
            raise
        before.close()
        return True, notes

    @contextmanager
    def _baked_again_if_refused(self, progress: Callable[[str, float, float], None]) -> Iterator[None]:
        baked = self._live.baked
        try:
            yield
        except BaseException:
            if baked and not self._live.baked:
                self._bake(progress)
            raise

    def _bake(self, progress: Callable[[str, float, float], None]) -> list[str]:
        """Returns sentences about what stayed live."""
        live = self._live
        if self._layers.ranges:
            return ["Repeated layers share their weights, so nothing is baked in: the adapters stay live."]
        wanted, free = live.bake_bytes("cpu"), _free_memory()
        if free and wanted > free * _SPARE:
            return [
                f"Baking in needs {wanted / 1e9:.1f} GB beside the model, and {free / 1e9:.1f} GB are free: the adapters stay live."
            ]
        try:
            took, of = live.bake(lambda done, of: progress("Baking in", done, of))
        except (MemoryError, RuntimeError) as error:  # torch's own out-of-memory errors are RuntimeErrors
            if isinstance(error, RuntimeError) and "memory" not in str(error).lower():
                raise
            return ["There is not enough memory to bake the adapters in: they stay live."]
        if took < of:
            return [
                f"{of - took} of {of} adapted modules are quantized or not in memory: there the adapters stay live."
            ]
        return []

    @contextmanager
    def rows(
        self, stacks: Sequence[AdapterStack], progress: Callable[[str, float, float], None]
    ) -> Iterator[RowStacks]:
        """Give each row of the passes within the block a stack of its own; afterwards the stack is what it was.

        Raises:
            WeftError: when an adapter cannot be used; nothing has changed then.
        """
        live = self._live
        rows: list[dict[str, float]] = []
        names: dict[str, tuple[Path, str]] = {}
        repeated: set[tuple[tuple[int, int], ...]] = set()
        for stack in stacks:
            weights, more = _wanted(stack)
            repeated.add(_repeated(weights, more))
            rows.append(weights)
            names |= more
        if repeated != {self._layers.ranges}:
            yield RowStacks(live, [], [], "An adapter repeats layers, so the rows were answered one after the other.")
            return
        present, baked = dict(live.weights), live.baked
        with self._baked_again_if_refused(progress):
            notes, added = self._add(names, progress)
        try:
            yield RowStacks(live, rows, notes)
        finally:
            for key in added:
                live.discard(key)
            live.apply(present)
            if baked:
                self._bake(progress)

    def check(self, stacks: Sequence[AdapterStack], progress: Callable[[str, float, float], None]) -> None:
        """Raise WeftError where `set` would for one of these; the stack stays what it is."""
        from app.adapters.tensors_torch import open_adapter

        live = self._live
        for stack in stacks:
            weights, names = _wanted(stack)
            if _repeated(weights, names) != self._layers.ranges:  # another model: what can be told without making it
                for path, _ in names.values():
                    opened = open_adapter(path)
                    for module in opened.file.modules.values():
                        for lora in module.loras:
                            opened.read(lora.a)
                            opened.read(lora.b)
            elif any(key not in live.weights for key in names):
                present, baked = dict(live.weights), live.baked
                with self._baked_again_if_refused(progress):
                    _, added = self._add(names, progress)
                for key in added:
                    live.discard(key)
                live.apply(present)
                if baked:
                    self._bake(progress)

    def _add(
        self, names: dict[str, tuple[Path, str]], progress: Callable[[str, float, float], None]
    ) -> tuple[list[str], list[str]]:
        """Read the adapters that are not there yet, off at first. Returns notes, and their keys. All or none."""
        from app.adapters.tensors_torch import open_adapter

        live, notes = self._live, list[str]()
        added: list[str] = []
        try:
            for key, (path, name) in names.items():
                if key not in live.weights:
                    phase = f"Reading {name}"
                    opened = open_adapter(path, model=live.model)
                    notes += opened.notes
                    notes += live.add(key, opened, lambda done, of, phase=phase: progress(phase, done, of))
                    added.append(key)
        except BaseException:
            for key in added:
                live.discard(key)
            live.apply(live.weights)
            raise
        return notes, added

    def close(self) -> None:
        """Give the model back as it was."""
        self._live.close()
        self._layers.set(())


class RowStacks:
    """Stacks of the rows that go on.

    Attributes:
        reason: why rows cannot be computed together, in a sentence; "" when they can. notes: sentences worth showing.
    """

    def __init__(self, live: LiveStack, rows: list[dict[str, float]], notes: list[str], reason: str = "") -> None:
        self._live, self._rows, self.notes = live, rows, notes
        self.reason = reason or live.apply_rows(rows)

    def select(self, rows: list[int]) -> None:
        """Go on with some of them, by their numbers among those that went on before."""
        self._rows = [self._rows[number] for number in rows]
        self._live.apply_rows(self._rows)


def _free_memory() -> int:
    """Bytes of main memory; 0 when that cannot be told."""
    try:
        import psutil
    except ImportError:
        return 0
    return psutil.virtual_memory().available


def _wanted(stack: AdapterStack) -> tuple[dict[str, float], dict[str, tuple[Path, str]]]:
    """Weights, and where the adapters are and how they are called, by keys that tell their content.

    Raises:
        WeftError: BAD_INPUT for a weight that is no number; NOT_FOUND.
    """
    weights: dict[str, float] = {}
    names: dict[str, tuple[Path, str]] = {}
    for adapter in stack.adapters:
        if not math.isfinite(adapter.weight):
            raise WeftError(
                ErrorKind.BAD_INPUT, f"The weight of {adapter.name or adapter.path} is no number.", "Set a number."
            )
        path = Path(adapter.path)
        key = f"{path}\0{signature(path)}"
        names[key] = (path, adapter.name or path.name)
        weights[key] = weights.get(key, 0.0) + adapter.weight
    return weights, names


def _repeated(weights: dict[str, float], names: dict[str, tuple[Path, str]]) -> tuple[tuple[int, int], ...]:
    """The ranges of layers that all adapters which are on agree on; those that are off and do not are left out of both.

    Raises:
        WeftError: UNSUPPORTED when they disagree: then they are adapters of different models.
    """
    ranges = {key: _ranges(key, path) for key, (path, _) in names.items()}
    on = {ranges[key]: name for key, (_, name) in names.items() if weights[key]}
    if len(on) > 1:
        first, second = sorted(on.items())[:2]
        raise WeftError(
            ErrorKind.UNSUPPORTED,
            f"{first[1]} and {second[1]} cannot be stacked: they repeat different layers of the base (layer replication).",
            "Switch one of them off.",
        )
    wanted = next(iter(on), ())
    for key in [key for key, found in ranges.items() if found != wanted]:
        del weights[key], names[key]
    return wanted


@lru_cache(maxsize=256)
def _ranges(key: str, path: Path) -> tuple[tuple[int, int], ...]:
    """What an adapter repeats; read once for each state of its files, which `key` tells: a change of weight reads nothing."""
    if path.suffix.lower() == ".gguf":
        return ()
    from app.core.adapter_file import locate

    return locate(path)[0].layer_replication


def signature(path: Path) -> str:
    """What tells whether an adapter's files are still those that were read.

    Raises:
        WeftError: NOT_FOUND.
    """
    try:
        named = [path, *config_beside(path)]
        files = sorted(p for p in path.iterdir() if p.name.startswith("adapter")) if path.is_dir() else named
        return ";".join(f"{p.name}:{s.st_size}:{s.st_mtime_ns}" for p in files for s in (p.stat(),))
    except OSError as error:
        raise WeftError(
            ErrorKind.NOT_FOUND, f"There is no adapter {path}.", "Refresh the library, or check the path."
        ) from error
