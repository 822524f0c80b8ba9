"""Small training runs in this process: a random model, a file of examples, a report that remembers."""

from __future__ import annotations

import json
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import peft
import torch
import transformers

from app.core.library import ModelEntry
from app.training import methods_save_torch, run_torch
from app.training.run_config import RunConfig, TrainParameters, TrainResult
from app.training.run_file import from_table


class Remembering:
    """A Report that keeps what it hears, and can be told to act at a step."""

    def __init__(self) -> None:
        self.metrics: list[tuple[int, dict[str, float]]] = []
        self.heard: list[dict[str, Any]] = []
        self.logs: list[str] = []
        self.cancelled = False
        self.at_step: Callable[[int], None] = lambda step: None
        self._adjusters: list[Callable[[str], None]] = []
        self._cancels: list[Callable[[], None]] = []

    def progress(self, phase: str, done: float = 0, total: float = 0, unit: str = "") -> None:
        return

    def metric(self, step: int, values: Any) -> None:
        self.metrics.append((step, dict(values)))
        if "loss" in values:
            self.at_step(step)

    def news(self, json: str) -> None:
        self.heard.append(msgspec.json.decode(json))

    def log(self, level: str, text: str) -> None:
        self.logs.append(f"{level}: {text}")

    def tokens(self, text: str, count: int, row: int = 0) -> None:
        return

    def loaded(self, event: Any) -> None:
        return

    def on_cancel(self, callback: Callable[[], None]) -> None:
        self._cancels.append(callback)

    def on_adjust(self, callback: Callable[[str], None]) -> None:
        self._adjusters.append(callback)

    def adjust(self, action: str) -> None:
        for each in self._adjusters:
            each(json.dumps({"action": action}))

    def cancel(self) -> None:
        self.cancelled = True
        for each in self._cancels:
            each()


WORDS = "warp weft loom shuttle thread cloth pick selvage heddle reed bobbin twill satin plain fringe".split()


def examples(path: Path, seed: int, rows: int = 48) -> Path:
    """Instructions with answers in one manner, of mixed lengths."""
    rng = random.Random(seed)
    found = []
    for number in range(rows):
        word = rng.choice(WORDS)
        more = " ".join(rng.choices(WORDS, k=rng.randint(0, 8)))
        found.append(
            {
                "instruction": f"What is a {word}, number {number}? {more}",
                "output": f"A {word} is One, two, three: {word}.",
            }
        )
    path.write_text("\n".join(json.dumps(row) for row in found), "utf-8")
    return path


def preferences(path: Path, seed: int, rows: int = 24) -> Path:
    """Pairs whose chosen answers are in one manner and rejected ones in another."""
    rng = random.Random(seed)
    found = []
    for number in range(rows):
        word = rng.choice(WORDS)
        found.append(
            {
                "prompt": f"What is a {word}, number {number}?",
                "chosen": f"A {word} is a fine thing.",
                "rejected": f"No idea about {word}!",
            }
        )
    path.write_text("\n".join(json.dumps(row) for row in found), "utf-8")
    return path


def config(folder: Path, entry: ModelEntry, file: Path, /, **sections: dict[str, Any]) -> RunConfig:
    """A short run: 30 steps or so. `sections` override: method={"dora": True}."""
    table: dict[str, dict[str, Any]] = {
        "model": {"path": entry.path},
        "data": {"files": [str(file)], "held_out": 0.2},
        "method": {"r": 4, "alpha": 8},
        "train": {
            "epochs": 4,
            "batch_size": 2,
            "gradient_accumulation": 2,
            "learning_rate": 1e-2,
            "max_length": 96,
            "evaluate_every": 1000,
            "seed": 3,
        },
        "output": {"dir": str(folder / "adapter")},
    }
    for name, values in sections.items():
        table[name].update(values)
    return from_table(table)


def train(made: RunConfig, model: ModelEntry, report: Remembering | None = None, resume: str = "no") -> TrainResult:
    """Run it here."""
    parameters = msgspec.convert({"config": made, "model": model, "resume": resume}, TrainParameters)
    return run_torch.run(parameters, report or Remembering())


class Captured:
    """The logits that the trained model gave when it was saved."""

    def __init__(self, monkeypatch: Any, ids: torch.Tensor) -> None:
        self.logits: torch.Tensor | None = None
        original = methods_save_torch.save_adapter

        def save(folder: Path, made: RunConfig, model: Any, *rest: Any) -> None:
            model.eval()
            self.logits = forward(model, ids)
            original(folder, made, model, *rest)

        monkeypatch.setattr(methods_save_torch, "save_adapter", save)


def forward(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits.float()


def in_plain_peft(base: Path, adapter: Path, grown: int = 0, **arguments: Any) -> Any:
    """The adapter on the original base, through transformers and PEFT alone."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, **arguments)
        if grown:
            model.resize_token_embeddings(grown, mean_resizing=False)
        return peft.PeftModel.from_pretrained(model, adapter).eval()
