"""Random conversations in which adapters come, go, change weight and order: what property-based tests share."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from app.core.stack import AdapterStack, StackedAdapter
from tests import seeds
from tests.engine.adapter_kit import FAMILIES

ADAPTERS = 8  # that a family's tests have
STEPS = 6
T = TypeVar("T")


class Said(NamedTuple):
    """What happens in a conversation.

    Attributes:
        steps: (action, which adapter, weight, tokens that the user says then).
        first: so many adapters are in the stack from the start. chance: the seed of the user's words.
    """

    steps: list[tuple[str, int, float, int]]
    first: int
    chance: int


def conversations(
    actions: tuple[str, ...], *, examples: int, most: int = STEPS, shrink: bool = False
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Makes a test of a function with parameters `family` and `said`: so many conversations of every family.

    Args:
        most: steps of one. shrink: look for the shortest that fails, which takes minutes.
    """
    step = st.tuples(
        st.sampled_from(actions), st.integers(0, ADAPTERS - 1), st.floats(-1, 1.5, width=16), st.integers(1, 4)
    )
    said = st.builds(
        Said, st.lists(step, min_size=2, max_size=most), st.sampled_from([0, 2, 3, ADAPTERS]), st.integers(0, 1 << 30)
    )
    how = settings(
        max_examples=examples,
        deadline=None,
        phases=tuple(Phase) if shrink else (Phase.explicit, Phase.reuse, Phase.generate),
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )
    return lambda test: pytest.mark.parametrize("family", sorted(FAMILIES))(how(given(said=said)(test)))


def made_once(made: dict[str, T], family: str, make: Callable[[int], T]) -> T:
    """What `make` makes of a fresh seed, once for all conversations of a family."""
    if family not in made:
        seed = seeds.fresh(1 << 24)  # hypothesis seeds `random`
        print(f"{family}: seed {seed}")
        made[family] = make(seed)
    return made[family]


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
