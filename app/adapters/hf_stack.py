"""From a stack as a person sets it to a live stack on a loaded transformers model: what to open, what to let go."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app.core.errors import ErrorKind, WeftError
from app.core.stack import AdapterStack

if TYPE_CHECKING:
    from app.adapters.live_torch import LiveStack


class ModelStack:
    """The adapters of one loaded transformers model."""

    def __init__(self, model: Any) -> None:
        from app.adapters.live_torch import LiveStack

        self._live = LiveStack(model)

    def set(self, stack: AdapterStack, progress: Callable[[str, float, float], None]) -> tuple[bool, list[str]]:
        """Replace the whole stack. Adapters that stay are not read again; one whose file changed is.

        Args:
            progress: told a phase, and how many modules of it are done, of how many.

        Returns:
            Whether the KV cache went stale, and sentences worth showing.

        Raises:
            WeftError: when an adapter cannot be used; then the stack is what it was.
        """
        live = self._live
        weights, names = _wanted(stack)
        notes, _ = self._add(names, progress)
        stale = False
        for key in [key for key in live.weights if key not in weights]:
            stale = live.replaced(key) or stale
            live.discard(key)
        return live.apply(weights) or stale, notes

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
        for stack in stacks:
            weights, more = _wanted(stack)
            rows.append(weights)
            names |= more
        present = dict(live.weights)
        notes, added = self._add(names, progress)
        try:
            yield RowStacks(live, rows, notes)
        finally:
            for key in added:
                live.discard(key)
            live.apply(present)

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
                    notes += live.add(key, open_adapter(path), lambda done, of, phase=phase: progress(phase, done, of))
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


class RowStacks:
    """Stacks of the rows that go on.

    Attributes:
        reason: why rows cannot be computed together, in a sentence; "" when they can. notes: sentences worth showing.
    """

    def __init__(self, live: LiveStack, rows: list[dict[str, float]], notes: list[str]) -> None:
        self._live, self._rows, self.notes = live, rows, notes
        self.reason = live.apply_rows(rows)

    def select(self, rows: list[int]) -> None:
        """Go on with some of them, by their numbers among those that went on before."""
        self._rows = [self._rows[number] for number in rows]
        self._live.apply_rows(self._rows)


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


def signature(path: Path) -> str:
    """What tells whether an adapter's files are still those that were read.

    Raises:
        WeftError: NOT_FOUND.
    """
    try:
        files = sorted(p for p in path.iterdir() if p.name.startswith("adapter")) if path.is_dir() else [path]
        return ";".join(f"{p.name}:{s.st_size}:{s.st_mtime_ns}" for p in files for s in (p.stat(),))
    except OSError as error:
        raise WeftError(
            ErrorKind.NOT_FOUND, f"There is no adapter {path}.", "Refresh the library, or check the path."
        ) from error
