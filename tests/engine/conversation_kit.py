"""Random conversations in which adapters come, go, change weight and order: what property-based tests share."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from app.core.stack import AdapterStack, StackedAdapter

STEPS = 6


def steps(
    adapters: int, actions: tuple[str, ...], most: int = STEPS
) -> st.SearchStrategy[list[tuple[str, int, float, int]]]:
    """Lists of (action, which adapter, weight, tokens that the user says then)."""
    one = st.tuples(
        st.sampled_from(actions), st.integers(0, adapters - 1), st.floats(-1, 1.5, width=16), st.integers(1, 4)
    )
    return st.lists(one, min_size=2, max_size=most)


class Stacking:
    """A stack that actions change."""

    def __init__(self, folders: list[Path], first: int) -> None:
        """`first`: so many adapters are in it from the start."""
        self.folders = folders
        self.pairs: list[tuple[Path, float]] = [(folder, 0.4 + 0.1 * n) for n, folder in enumerate(folders[:first])]

    def act(self, action: str, number: int, weight: float) -> None:
        folder = self.folders[number]
        there = [pair for pair in self.pairs if pair[0] == folder]
        others = [pair for pair in self.pairs if pair[0] != folder]
        if action == "add":
            self.pairs = [*others, (folder, weight)]
        elif action == "remove":
            self.pairs = others
        elif action == "off" and there:
            self.pairs = [(path, 0.0 if path == folder else w) for path, w in self.pairs]
        elif action == "reweight" and there:
            self.pairs = [(path, weight if path == folder else w) for path, w in self.pairs]
        elif action == "order":
            random.Random(number).shuffle(self.pairs)

    @property
    def stack(self) -> AdapterStack:
        return AdapterStack(
            adapters=tuple(StackedAdapter(path=str(path), weight=weight) for path, weight in self.pairs)
        )


def chosen(reference: Any, token: int) -> bool:
    """Whether a token is the likeliest of these logits, or as likely as that but for rounding."""
    return float(reference.max() - reference[token]) < 1e-3
