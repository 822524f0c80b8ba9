"""How sound an adapter is, by numbers: the norm of each module's change, matrices of zeros, ranks that are not used.

Runs in an engine's environment (numpy). app/core/adapter_health.py finds zeros and broken numbers without any library.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from app.core.adapter_file import AdapterFile, LoraTensors
from app.core.errors import WeftError
from app.core.module_names import place_of

if TYPE_CHECKING:
    import numpy

_ODD = 30.0  # times the median of its kind: larger or smaller than that is odd
_RANK_TOLERANCE = 1e-6  # of the largest singular value: below, a direction counts as unused


class ModuleHealth(NamedTuple):
    """One module.

    Attributes:
        layer: -1 outside of the layers. name: of the module.
        norm: Frobenius norm of s·B·A; 0 for a module that changes nothing.
        rank: as stored. used: directions that B·A really has.
        trouble: a sentence, "" when there is none. kind: `zero`, `broken`, `rank` (some are not used), `odd`, or "".
    """

    layer: int
    name: str
    norm: float
    rank: int
    used: int
    trouble: str = ""
    kind: str = ""


def measure(file: AdapterFile, progress: Callable[[int, int], None] = lambda _done, _of: None) -> list[ModuleHealth]:
    """Measure every low-rank pair, in the adapter's order. Experts' pairs are measured as they are stored, all together.

    Args:
        progress: told how many pairs are measured, of how many.

    Raises:
        WeftError: when the file cannot be read.
    """
    pairs = [(name, lora) for name, module in file.modules.items() for lora in module.loras]
    found: list[ModuleHealth] = []
    for done, (name, lora) in enumerate(pairs):
        progress(done, len(pairs))
        found.append(_measured(name, lora))
    by_tail: dict[str, list[float]] = {}
    for module in found:
        if module.norm > 0 and math.isfinite(module.norm):
            by_tail.setdefault(place_of(module.name).tail, []).append(module.norm)
    medians = {tail: sorted(norms)[len(norms) // 2] for tail, norms in by_tail.items()}
    return [module if module.trouble else _with_odd(module, medians) for module in found]


def sentences(found: Sequence[ModuleHealth]) -> list[str]:
    """What to tell a person about all modules together; nothing when all is well."""
    words = {
        "broken": "hold values that are no numbers (NaN or infinity)",
        "zero": "change nothing (B or A is zero)",
        "rank": "do not use all of their ranks",
        "odd": "have a norm far from that of their kind in other layers",
    }
    told: list[str] = []
    for kind, what in words.items():
        names = [module.name for module in found if module.kind == kind]
        if kind == "zero" and names and len(names) == len(found):
            told.append("All of its modules change nothing, as if it had never been trained.")
        elif names:
            told.append(f"{len(names)} of {len(found)} modules {what}, such as {names[0][-80:]}.")
    return told


def _with_odd(module: ModuleHealth, medians: dict[str, float]) -> ModuleHealth:
    trouble = _odd(module, medians)
    return module._replace(trouble=trouble, kind="odd") if trouble else module


def _odd(module: ModuleHealth, medians: dict[str, float]) -> str:
    median = medians.get(place_of(module.name).tail, 0.0)
    if not median or not module.norm:
        return ""
    ratio = module.norm / median
    if ratio > _ODD:
        return f"Its norm is {ratio:.0f} times that of its kind in other layers."
    return f"Its norm is a {1 / ratio:.0f}th of that of its kind in other layers." if ratio < 1 / _ODD else ""


def _measured(name: str, lora: LoraTensors) -> ModuleHealth:
    import numpy

    from app.adapters.to_gguf import read_array

    layer = place_of(name).layer
    try:
        a, b = read_array(lora.a).astype(numpy.float64), read_array(lora.b).astype(numpy.float64)
    except WeftError as error:
        if "no numbers" not in error.message:
            raise
        return ModuleHealth(layer, name, math.nan, lora.rank, 0, "It holds values that are no numbers.", "broken")
    a, b = (a.T, b.T) if lora.transposed else (a, b)
    if (
        lora.embedding and ".lora_a" in lora.a.name
    ):  # in GGUF it lies transposed, though its shape is told as everybody's
        a = a.reshape(a.shape[::-1]).T
    singular = singular_values(a, b)
    largest = float(singular[0]) if len(singular) else 0.0
    used = int((singular > largest * _RANK_TOLERANCE).sum()) if largest else 0
    norm = abs(lora.scale or 1.0) * float(numpy.sqrt((singular**2).sum()))
    possible = min(lora.rank, *b.shape[:1], a.shape[1])
    if not largest:
        trouble = "Its B matrix is zero: it changes nothing." if not b.any() else "It changes nothing."
        return ModuleHealth(layer, name, norm, lora.rank, used, trouble, "zero")
    if used < possible:
        return ModuleHealth(
            layer, name, norm, lora.rank, used, f"Only {used} of its {possible} ranks are used.", "rank"
        )
    return ModuleHealth(layer, name, norm, lora.rank, used)


def singular_values(a: numpy.ndarray, b: numpy.ndarray) -> numpy.ndarray:
    """Singular values of B·A, largest first, without making the product: QR of both, then SVD of a (rank, rank) core.

    Args:
        a: (rank, in). b: (out, rank).
    """
    import numpy

    right, left = numpy.linalg.qr(a.T, mode="r"), numpy.linalg.qr(b, mode="r")
    return numpy.linalg.svd(left @ right.T, compute_uv=False)
