"""What the window and the command line hand to tasks about adapters, and what comes back. See `app/tasks/`."""

from __future__ import annotations

import msgspec


class HealthPlan(msgspec.Struct, frozen=True, kw_only=True):
    """`adapter_health`: measure an adapter. alpha: for one that does not say it (a scale of 1 is taken without)."""

    path: str
    alpha: float | None = None


class ModuleNorm(msgspec.Struct, frozen=True, kw_only=True):
    """One low-rank pair of an adapter.

    Attributes:
        layer: -1 outside of the layers. module: its full name. tail: what stands behind the layer's number.
        norm: Frobenius norm of s·B·A; 0 where it changes nothing; None where it holds NaN or infinity.
        rank: as stored. used: directions that B·A really has.
        trouble: a sentence, "" when there is none. kind: `zero`, `broken`, `rank`, `odd` or "".
    """

    layer: int
    module: str
    tail: str
    norm: float | None
    rank: int
    used: int
    trouble: str = ""
    kind: str = ""


class HealthReport(msgspec.Struct, frozen=True, kw_only=True):
    """What `adapter_health` found.

    Attributes:
        modules: in the adapter's order: the points of a chart (x: layer, a series for each tail, y: norm).
        whole: modules that are trained whole, of which there is no norm here.
        sentences: what is odd, for a person; empty when all is well.
        seconds: that measuring took.
    """

    modules: tuple[ModuleNorm, ...]
    whole: tuple[str, ...] = ()
    sentences: tuple[str, ...] = ()
    seconds: float = 0.0
