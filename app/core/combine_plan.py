"""How adapters are combined into a new one: the methods of PEFT's `add_weighted_adapter`, and what each needs."""

from __future__ import annotations

from typing import Literal

import msgspec

from app.core.errors import ErrorKind, WeftError
from app.core.stack import AdapterStack

Method = Literal[
    "cat",
    "svd",
    "linear",
    "ties",
    "ties_svd",
    "dare_linear",
    "dare_linear_svd",
    "dare_ties",
    "dare_ties_svd",
    "magnitude_prune",
    "magnitude_prune_svd",
]
Sign = Literal["total", "frequency"]
Dtype = Literal["float32", "float16", "bfloat16"]

# What each does, in a sentence.
METHODS: dict[str, str] = {
    "cat": "Exact: all ranks side by side. The new rank is the sum of the ranks.",
    "svd": "The exact sum, cut to a rank of your choice by its largest singular values.",
    "linear": "Weighted means of the A and of the B matrices: small and quick, but a rough approximation.",
    "ties": "Keeps the largest values, elects a sign for each, and adds only what agrees with it (TIES), on A and B.",
    "ties_svd": "TIES on the whole difference of each module, cut to a rank.",
    "dare_linear": "Drops values at random and scales up the rest (DARE), then adds, on A and B.",
    "dare_linear_svd": "DARE on the whole difference of each module, cut to a rank.",
    "dare_ties": "DARE's dropping with the sign election of TIES, on A and B.",
    "dare_ties_svd": "DARE and TIES on the whole difference of each module, cut to a rank.",
    "magnitude_prune": "Keeps only the largest values of each, then adds, on A and B.",
    "magnitude_prune_svd": "Keeps only the largest values of each module's whole difference, then adds, cut to a rank.",
}


def uses_density(method: str) -> bool:
    """Whether a method drops values."""
    return method.startswith(("ties", "dare", "magnitude"))


def uses_sign(method: str) -> bool:
    """Whether a method elects signs."""
    return "ties" in method


def uses_rank(method: str) -> bool:
    """Whether a method cuts to a rank."""
    return method.endswith("svd")


class CombinePlan(msgspec.Struct, frozen=True, kw_only=True):
    """Adapters to make one of.

    Attributes:
        adapters: which, each with its weight. One alone with `svd` is resized.
        to: the folder of the new adapter; it must not exist.
        method: see METHODS.
        density: share of the values that is kept, over 0 to 1; for methods that drop.
        sign: how TIES elects a sign: by the sum of values, or by the count of signs.
        rank: of the result, for svd methods; 0 takes the largest of the adapters'.
        clamp: quantile beyond which values of the svd are cut, 0 to 1; 1 cuts none.
        seed: of what DARE drops.
        dtype: of the saved matrices.
        base: folder of the model that DoRAs among them were trained on; "" where none is one. Only methods that cut to a
            rank take DoRAs: their differences are of full rank, and depend on the base.
    """

    adapters: AdapterStack
    to: str
    method: Method = "cat"
    density: float = 0.5
    sign: Sign = "total"
    rank: int = 0
    clamp: float = 1.0
    seed: int = 0
    dtype: Dtype = "float32"
    base: str = ""

    def check(self) -> None:
        """Raises WeftError BAD_INPUT for values out of range."""
        wrong = ""
        if not self.adapters.adapters:
            wrong, hint = "There is no adapter to combine.", "Name at least one."
        elif self.method not in METHODS:
            wrong, hint = f"There is no method {self.method!r}.", f"Methods are: {', '.join(METHODS)}."
        elif uses_density(self.method) and not 0 < self.density <= 1:
            wrong, hint = f"The density {self.density:g} is not over 0 and at most 1.", "Try 0.5."
        elif self.rank < 0:
            wrong, hint = f"The rank {self.rank} is negative.", "Leave it at 0, or say how many ranks to keep."
        elif self.rank and not uses_rank(self.method):
            wrong, hint = f"The method {self.method} does not cut to a rank.", "Use svd, or one of the svd forms."
        elif not 0 < self.clamp <= 1:
            wrong, hint = f"The clamp {self.clamp:g} is not over 0 and at most 1.", "1 cuts nothing."
        else:
            return
        raise WeftError(ErrorKind.BAD_INPUT, wrong, hint)


class Combined(msgspec.Struct, frozen=True, kw_only=True):
    """A new adapter.

    Attributes:
        adapter: its folder. rank: its largest. modules: how many it has.
        energy: share of the squared values of the whole sum that it keeps, 0 to 1; 1 for what is exact, None where
            there is nothing to compare with (the methods on A and B alone).
        lowest: of a single module, and its name; "" where all are exact.
        notes: sentences worth showing.
    """

    adapter: str
    rank: int
    modules: int
    energy: float | None = None
    lowest: float | None = None
    lowest_module: str = ""
    notes: list[str] = []
