"""From the data section to what the loop takes: tokens, the split, the packing check, calibration batches. Imports torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch

from app.core.errors import ErrorKind, WeftError
from app.engine.reporting import Report
from app.training.batches import split
from app.training.collate_torch import Collator
from app.training.data_config import DataConfig
from app.training.encode import Encoded, encode
from app.training.packing_torch import PackingCheck
from app.training.rows import load_rows
from app.training.run_config import RunConfig
from app.training.trainer_data_torch import PreferenceData, SftData


@dataclass
class RunData:
    """A run's examples. For preferences, 2i and 2i + 1 of `examples` are the two answers of pair i.

    Attributes:
        train, held: positions (of pairs, for preferences). lengths, held_lengths: tokens of each (of a pair's longer answer).
    """

    encoded: Encoded
    examples: list[Any]
    train: list[int]
    held: list[int]
    files: list[Path]

    def lengths(self, positions: list[int]) -> list[int]:
        """Tokens of each; of a pair, those of the longer sequence."""
        if not self.encoded.preference:
            return [len(self.examples[i].input_ids) for i in positions]
        return [max(len(self.examples[2 * i].input_ids), len(self.examples[2 * i + 1].input_ids)) for i in positions]


def read_data(config: RunConfig, tokenizer: Any, report: Report) -> RunData:
    """Read, encode and split the data.

    Raises:
        WeftError: what `load_rows` and `encode` raise; BAD_INPUT when the data is not of the kind that the objective wants.
    """
    settings = config.data_config()
    rows = load_rows(settings)
    encoded = encode(
        rows,
        tokenizer,
        settings,
        progress=lambda count: report.progress("Reading the data", count, 0, "rows"),
        cancelled=lambda: report.cancelled,
    )
    wants = config.train.objective != "sft"
    if wants and not encoded.preference:
        raise WeftError(
            ErrorKind.BAD_INPUT,
            f"{config.train.objective} learns from preferences, and the data has none.",
            "Give rows with prompt, chosen and rejected, or set objective = sft.",
        )
    if encoded.preference and not wants:
        raise WeftError(
            ErrorKind.BAD_INPUT,
            "The data holds preferences (chosen, rejected).",
            "Set objective = dpo or orpo under [train].",
        )
    train, held = split(encoded, settings)
    if not train:
        raise WeftError(
            ErrorKind.BAD_INPUT, "All of the data is held out; nothing is left to train on.", "Lower held_out."
        )
    examples = (
        [pair.example(part) for pair in encoded.pairs for part in ("chosen", "rejected")]
        if wants
        else list(encoded.examples)
    )
    return RunData(encoded, examples, list(train), list(held), [Path(each.file) for each in encoded.report.files])


def objectives(
    config: RunConfig, data: RunData, pad_id: int, check: PackingCheck | None, device: torch.device, *, chunked: bool
) -> tuple[Any, Any | None]:
    """The training objective, and the held-out one (unpacked) where something is held out."""
    if data.encoded.preference:
        collator = Collator(data.examples, pad_id, mode="off")
        train = PreferenceData(collator, data.train, config.train, device)
        held = PreferenceData(collator, data.held, config.train, device) if data.held else None
        return train, held
    plain = Collator(data.examples, pad_id, mode="off")
    packed = Collator(data.examples, pad_id, mode=check.mode, mask_dtype=check.mask_dtype) if check else plain
    train_sft = SftData(packed, data.train, data.examples, device, chunked=chunked)
    held_sft = SftData(plain, data.held, data.examples, device, chunked=chunked) if data.held else None
    return train_sft, held_sft


def calibration(
    config: RunConfig, data: RunData, tokenizer: Any, pad_id: int, device: torch.device
) -> Callable[[], Iterator[dict[str, torch.Tensor]]]:
    """Batches of the calibration text (else of the training data), one row each, the same every time.

    Raises:
        WeftError: what reading the calibration text raises.
    """
    examples, order = data.examples, data.train
    if config.method.calibration:
        settings = DataConfig(files=(config.method.calibration,), max_length=config.train.max_length)
        found = encode(load_rows(settings), tokenizer, settings)
        examples, order = list(found.examples), list(range(len(found.examples)))
    elif data.encoded.preference:
        order = [2 * i for i in data.train]
    collator = Collator(examples, pad_id, mode="off")
    generator = torch.Generator().manual_seed(config.train.seed)
    chosen = [
        order[i] for i in torch.randperm(len(order), generator=generator).tolist()[: config.method.calibration_samples]
    ]

    def batches() -> Iterator[dict[str, torch.Tensor]]:
        for position in chosen:
            tensors = collator(((position,),))
            yield {name: value.to(device) for name, value in tensors.items() if name != "labels"}

    return batches


def data_numbers(data: RunData) -> dict[str, Any]:
    """DataReport's numbers for the record."""
    found = msgspec.to_builtins(data.encoded.report)
    found.pop("bad_rows", None)
    return {**found, "examples": len(data.train) + len(data.held), "held_out": len(data.held)}
