"""MergePlan: what to merge, into what, where to; and what a merge says when it is done. Plain data.

Window and command line build a plan, `app/tasks/merge.py` carries it out in a child.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from app.core.stack import AdapterStack

Packing = Literal["refuse", "16bit", "again"]
DTYPES = ("", "float32", "bfloat16", "float16")


class MergePlan(msgspec.Struct, frozen=True, kw_only=True):
    """What to merge.

    Attributes:
        model: folder of the base: safetensors shards or pytorch_model*.bin.
        stack: adapters with their weights; those of weight 0 are left out.
        target: folder that is made; it must not exist, or be empty.
        dtype: of the result's matrices; "" keeps each tensor's own.
        shard_size: bytes of a weight file at most; 0 keeps the base's own division.
        packed: what becomes of a base that bitsandbytes, GPTQ, AWQ or HQQ has packed: nothing (`refuse`, with the 16-bit model
            to fetch), a model in 16 bits (then the stack may be empty), or one that is packed `again` (bitsandbytes only).
        base_name: how the model card calls the base; "" for the folder's name.
        license: for the card, where the base's own card names none.
    """

    model: str
    stack: AdapterStack
    target: str
    dtype: str = ""
    shard_size: int = 0
    packed: Packing = "refuse"
    base_name: str = ""
    license: str = ""


class MergeAdjustment(msgspec.Struct, frozen=True, kw_only=True):
    """What can be changed while a merge runs."""

    paused: bool = False


class MergeResult(msgspec.Struct, frozen=True, kw_only=True):
    """What a merge made.

    Attributes:
        folder: where it lies.
        bytes: of its weight files. tensors: how many there are. changed: how many of them adapters changed.
        copied: bytes that were copied as they are.
        resumed: bytes that an earlier, interrupted run had already written.
        method: `streaming`, or `peft` where streaming could not do it.
        notes: sentences worth showing.
        seconds: that it took.
    """

    folder: str
    bytes: int
    tensors: int
    changed: int
    copied: int = 0
    resumed: int = 0
    method: str = "streaming"
    notes: list[str] = []
    seconds: float = 0.0
