"""What the engines' tests share."""

from __future__ import annotations

import gc

import pytest


@pytest.fixture(scope="module", autouse=True)
def libraries_are_not_walked_through() -> None:
    """Every load and unload collects cycles: of hundreds of thousands of objects that imports made, none is ever among them.

    Frozen between files, when no model of a test is there; what a file imports itself is frozen before the next one.
    """
    gc.collect()
    gc.freeze()
