"""One step of training against the matrix products that it cannot do without, by turns in one process. Prints one JSON object.

The floor: for each linear module forward and the gradient to its input (its base is frozen: no gradient of the weight), the two
products of A and B with their gradients, attention's products, and the loss's product over the vocabulary with its gradient to the hidden
states. Nothing else: no norm, activation, softmax, optimizer, copying.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import msgspec
import torch

from app.core.library import ModelEntry
from app.training import run_torch
from app.training.run_config import RunConfig, TrainParameters
from app.training.run_file import from_table
from tests.engine import tiny_models, training_kit

WIDTH, INNER, LAYERS, HEADS, VOCABULARY, LENGTH, ROWS, RANK = 768, 2304, 4, 12, 8192, 256, 4, 8


def floor_seconds(tokens: int) -> float:
    """The products of one step over so many tokens, best of a few: this thread's own time, so that a busy machine tells the same."""
    shapes = [(WIDTH, WIDTH)] * 4 + [(WIDTH, INNER)] * 2 + [(INNER, WIDTH)]
    x = {n: torch.randn(tokens, n) for n in (WIDTH, INNER, RANK)}
    weights = {(i, o): torch.randn(o, i) for i, o in set(shapes)}
    low = {n: torch.randn(RANK, n) for n in (WIDTH, INNER)}
    head = torch.randn(VOCABULARY, WIDTH)
    logits = torch.randn(tokens, VOCABULARY)
    size = WIDTH // HEADS
    heads = torch.randn(ROWS * HEADS, LENGTH, size)
    scores = torch.randn(ROWS * HEADS, LENGTH, LENGTH)

    def step() -> None:
        for layer in range(LAYERS):
            for place, (i, o) in enumerate(shapes):
                asked = layer > 0 or place > 2  # nobody asks for the gradient to the embeddings
                x[i] @ weights[i, o].T  # forward
                x[i] @ low[i].T
                x[RANK] @ low[o]
                x[o] @ low[o].T  # gradient to A's output, then to A and B
                x[RANK].T @ x[i]
                x[o].T @ x[RANK]
                if asked:
                    x[o] @ weights[i, o]
                    x[RANK] @ low[i]
            heads @ heads.transpose(
                1, 2
            )  # two products forward and four backward, of which causal attention needs half
            scores @ heads
            scores @ heads
        x[WIDTH] @ head.T
        logits @ head

    best = 1e9
    for _ in range(3):
        began = time.thread_time()
        step()
        best = min(best, time.thread_time() - began)
    return best


class Timed(training_kit.Remembering):
    """Keeps when each step ended."""

    def __init__(self) -> None:
        super().__init__()
        self.times: list[float] = []

    def metric(self, step: int, values: Any) -> None:
        super().metric(step, values)
        if "loss" in values:
            self.times.append(time.thread_time())


def configure(entry: ModelEntry, data: Path, out: Path) -> RunConfig:
    return from_table(
        {
            "model": {"path": entry.path},
            "data": {"files": [str(data)], "held_out": 0.0},
            "method": {"r": RANK, "alpha": RANK},
            "train": {"epochs": 1, "max_steps": 7, "batch_size": ROWS, "gradient_accumulation": 1, "max_length": LENGTH, "precision": "fp32", "checkpoint_every": 100000},
            "output": {"dir": str(out), "overwrite": True},
        }
    )  # fmt: skip


def main(rounds: int) -> None:
    torch.set_num_threads(1)
    seed = random.SystemRandom().randrange(1 << 31)
    place = Path(tempfile.mkdtemp())
    entry = tiny_models.make(
        place / "model", "llama", seed=seed, context=512, hidden_size=WIDTH, intermediate_size=INNER, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=HEADS, vocab_size=VOCABULARY,
    )  # fmt: skip
    rng = random.Random(seed)
    text = " ".join(rng.choices(training_kit.WORDS, k=60_000))
    (place / "data.txt").write_text(text)
    config = configure(entry, place / "data.txt", place / "out")
    floors: list[float] = []
    steps: list[float] = []
    for _ in range(rounds):
        floors.append(floor_seconds(ROWS * LENGTH))
        report = Timed()
        run_torch.run(msgspec.convert({"config": config, "model": entry, "resume": "no"}, TrainParameters), report)
        steps.append(min(b - a for a, b in zip(report.times, report.times[1:], strict=False)))
        floors.append(floor_seconds(ROWS * LENGTH))
    print(json.dumps({"seed": seed, "threads": torch.get_num_threads(), "floor": floors, "step": steps}))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(int(sys.argv[1]))
