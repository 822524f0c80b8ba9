"""How many bytes an optimizer keeps of the tensors it trains. Plain arithmetic, no ML.

The numbers are those of torch's AdamW and SGD, bitsandbytes' AdamW8bit and PEFT's LoraFAOptimizer; a test holds each to the real state.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

SMALLEST = 4096  # elements; smaller tensors keep a 32-bit state (bitsandbytes' own default)
_BLOCK = 256  # numbers of an 8-bit state that share a scale
_CODES = 2 * 256 * 4  # bytes: what 8 bits stand for, for either moment; one table for all tensors


class StateSize(NamedTuple):
    """Bytes.

    Attributes:
        moments: the state proper, which a paged optimizer sends out of memory. rest: scales, codes and step counts, which stay.
    """

    moments: int
    rest: int

    @property
    def total(self) -> int:
        return self.moments + self.rest


def state_size(optimizer: str, elements: Sequence[int], width: int = 4) -> StateSize:
    """The state after the first step.

    Args:
        elements: of each trained tensor. LoRA-FA's A is none, and keeps no state. width: bytes of a number in them.
    """
    if optimizer.endswith("8bit"):
        large = [count for count in elements if count >= SMALLEST]
        scales = sum(2 * 4 * -(-count // _BLOCK) for count in large)
        moments = sum(2 * count if count >= SMALLEST else 2 * 4 * count for count in elements)
        return StateSize(moments, scales + (_CODES if large else 0))
    if optimizer == "sgd":
        return StateSize(sum(elements) * width, 0)
    steps = 0 if optimizer == "lora_fa" else 4 * len(elements)
    return StateSize(2 * sum(elements) * width, steps)
