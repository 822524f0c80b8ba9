"""What a run is told while it is at work, and what it tells. No ML, no Qt."""

from __future__ import annotations

from typing import Literal

import msgspec


class TrainAdjustment(msgspec.Struct, frozen=True, kw_only=True):
    """What can be changed while a run is at work (Adjust).

    Attributes:
        action: `pause` holds it after the step at hand; `resume` goes on; `stop` ends it and keeps the adapter as it is;
            `checkpoint` writes one now; `sample` answers the sample questions now.
    """

    action: Literal["pause", "resume", "stop", "checkpoint", "sample"]


class TrainNews(msgspec.Struct, frozen=True, kw_only=True):
    """What a run tells beside progress and metrics.

    Attributes:
        kind: `note` (text), `estimate` (text, values), `samples` (step, samples), `checkpoint` (step, text: folder), `state` (text:
            running, paused, stopping), `split` (text: the micro-batch was halved), `data` (values: examples, held_out, tokens, …).
    """

    kind: Literal["note", "estimate", "samples", "checkpoint", "state", "split", "data"]
    step: int = 0
    text: str = ""
    values: dict[str, float] = {}
    samples: tuple[tuple[str, str], ...] = ()


class TrainResult(msgspec.Struct, frozen=True, kw_only=True):
    """How a run ended.

    Attributes:
        adapter: the folder. losses: training loss by step, as metrics had it. held_out_loss: of the adapter as kept; None without held-out data.
        base_held_out_loss: before the first step. ended: complete, stopped (by the user), early (no more improvement), nan (the last good
            checkpoint was kept).
    """

    adapter: str
    ended: Literal["complete", "stopped", "early", "nan"]
    steps: int
    losses: tuple[float, ...]
    held_out_loss: float | None = None
    base_held_out_loss: float | None = None
    held_out_losses: tuple[tuple[int, float], ...] = ()
    tokens: int = 0
    seconds: float = 0.0
    notes: tuple[str, ...] = ()
