"""QuantizePlan: which model to quantize by GPTQ, AWQ or HQQ, how, and on which text; and what that says when it is done. Plain data.

Command line and window build a plan, `app/tasks/quantize.py` carries it out in a child.
"""

from __future__ import annotations

import re

import msgspec

from app.core.errors import ErrorKind, WeftError
from app.core.stack import AdapterStack

ENVIRONMENT = "core"
BITS: dict[str, tuple[int, ...]] = {"gptq": (2, 3, 4, 8), "awq": (4,), "hqq": (1, 2, 3, 4, 8)}
GROUPS: dict[str, tuple[int, ...]] = {
    "gptq": (16, 32, 64, 128, 256, 512, 1024),
    "awq": (16, 32, 64, 128),
    "hqq": (16, 32, 64, 128, 256),
}
USUAL_GROUPS = {"gptq": 128, "awq": 128, "hqq": 64}
CALIBRATED = ("gptq", "awq")  # on a text; HQQ goes by the weights alone
CALIBRATION_TEXT = "calibration_text.txt"  # of the resources; another one than certificates are made on
SHORTEST = 16  # tokens of a piece of the text; and no piece at all is shorter


class QuantizePlan(msgspec.Struct, frozen=True, kw_only=True):
    """What to quantize.

    Attributes:
        model: folder of the 16-bit model. stack: adapters that are merged in first.
        target: folder that is made; it must not exist, or be empty.
        method: `gptq`, `awq` or `hqq`. bits: of a weight, see BITS. group_size: weights that share a scale, see GROUPS.
        desc_act: GPTQ takes columns in the order of their importance: less loss, slower to run.
        calibration: text file by which it finds out what matters; "" for methods that are not CALIBRATED.
        samples: pieces of it at most, spread over the whole text. length: tokens of a piece.
        base_name: how the card calls the model; "" for the folder's name.
        device: `cpu`, `cuda`; "" for a graphics card where there is one.
    """

    model: str
    stack: AdapterStack = AdapterStack()
    target: str
    method: str = "gptq"
    bits: int = 4
    group_size: int = 128
    desc_act: bool = False
    calibration: str = ""
    samples: int = 256
    length: int = 512
    base_name: str = ""
    device: str = ""


class QuantizeResult(msgspec.Struct, frozen=True, kw_only=True):
    """What was made.

    Attributes:
        folder: where it lies. bytes: of its weight files. matrices: how many were quantized. method, bits: see QuantizePlan.
        samples, tokens: of the text that it was calibrated on; 0 where none was.
        notes: sentences worth showing. seconds: that it took.
    """

    folder: str
    bytes: int
    matrices: int
    method: str = ""
    bits: int = 0
    samples: int = 0
    tokens: int = 0
    notes: list[str] = []
    seconds: float = 0.0


def packed_like(label: str) -> tuple[int, int]:
    """(bits, weights that share a scale) of a packed model by how the library calls it: `4-bit, group 128`; 0 for unknown."""
    bits, group = re.search(r"(\d+)-bit", label), re.search(r"group (\d+)", label)
    return int(bits[1]) if bits else 0, int(group[1]) if group else 0


def check_quantize(plan: QuantizePlan) -> None:
    """Refuse numbers and methods that there are not.

    Raises:
        WeftError: BAD_INPUT.
    """
    if plan.method not in BITS:
        raise WeftError(ErrorKind.BAD_INPUT, f"There is no method {plan.method!r}.", f"Methods are: {', '.join(BITS)}.")
    for value, allowed, what in (
        (plan.bits, BITS[plan.method], "bits"),
        (plan.group_size, GROUPS[plan.method], "weights a group"),
    ):
        if value not in allowed:
            listed = ", ".join(map(str, allowed))
            raise WeftError(
                ErrorKind.BAD_INPUT, f"{plan.method.upper()} has no {value} {what}.", f"Choose one of: {listed}."
            )
    if plan.desc_act and plan.method != "gptq":
        raise WeftError(ErrorKind.BAD_INPUT, "Only GPTQ has an order of columns (desc_act).", "Leave it out.")
    if plan.samples < 1 or plan.length < SHORTEST:
        raise WeftError(
            ErrorKind.BAD_INPUT,
            f"{plan.samples} pieces of {plan.length} tokens calibrate nothing.",
            f"Give at least 1 piece of {SHORTEST} tokens; 256 of 512 are usual.",
        )
