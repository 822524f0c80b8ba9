"""Where tests draw random numbers from: new ones for each state of the code, the same ones for the same state.

`run.py test` sets WEFT_TEST_RUN from the tree that is tested, so that who tests that tree again, here or elsewhere, meets
the same models, adapters and prompts, and each commit meets others. Without it every run has its own. pytest's header says
which it was; WEFT_TEST_RUN=that repeats it. WEFT_TEST_SEED, where a test prints it, repeats that one test.
"""

from __future__ import annotations

import hashlib
import os
import random

RUN = os.environ.get("WEFT_TEST_RUN") or f"{int.from_bytes(os.urandom(5)):x}"
_stream = random.Random(RUN)


def begin(test: str) -> None:
    """A test starts: what it draws depends on the run and its name, not on the tests before it.

    A fixture of a whole module draws from `of(__name__)`: else its numbers would be those of whichever test came first.
    """
    _stream.seed(f"{RUN} {test}")
    random.seed(f"{RUN} {test}")


def fresh(bound: int = 1 << 30) -> int:
    """A seed in [0, bound), another one with each call. Unlike `random`, Hypothesis leaves it alone."""
    return _stream.randrange(bound)


def of(name: str, bound: int = 1 << 30) -> int:
    """The seed in [0, bound) that goes with a name in this run: for a module, before any test has begun."""
    return int.from_bytes(hashlib.sha256(f"{RUN} {name}".encode()).digest()[:8]) % bound


def given() -> int:
    """WEFT_TEST_SEED, else a fresh seed; printed, so that a failure can be repeated."""
    value = int(os.environ.get("WEFT_TEST_SEED") or fresh())
    print(f"seed {value} (WEFT_TEST_SEED={value} repeats it)")
    return value
