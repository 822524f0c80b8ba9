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


class ConvertPlan(msgspec.Struct, frozen=True, kw_only=True):
    """`adapter_convert`: an adapter in the other world's format, for one model.

    A target that ends in .gguf is a GGUF adapter, for llama.cpp; any other is a PEFT folder.

    Attributes:
        adapter: a PEFT folder, lone file or GGUF adapter. alpha: for one that does not say it.
        model: the model that it is for, of the target's format: a GGUF file, or a folder of safetensors. Its shapes and
            heads decide the order of rows.
        target: must not exist.
    """

    adapter: str
    model: str
    target: str
    alpha: float | None = None


class ConvertResult(msgspec.Struct, frozen=True, kw_only=True):
    """Where the converted adapter lies, its size in bytes, and sentences about what of it was left out."""

    path: str
    bytes: int
    notes: tuple[str, ...] = ()
