"""The text that a model is calibrated on, in pieces of token ids. Needs transformers."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import transformers

from app.core.errors import ErrorKind, WeftError
from app.core.plain_text import read_plain
from app.core.quantize_plan import SHORTEST, QuantizePlan

_LARGEST = 64 * 1024 * 1024  # bytes of the text that are read; far more than is ever used


class CalibrationText(NamedTuple):
    """Pieces of token ids, all of one length; whether they are the whole text; sentences worth showing."""

    pieces: list[list[int]]
    all_of_it: bool
    notes: list[str]


def pieces_of(plan: QuantizePlan, folder: Path) -> CalibrationText:
    """Pieces of `plan.length` tokens, `plan.samples` at most, spread evenly over the whole text.

    Args:
        folder: of the model, whose tokenizer reads the text; no piece is longer than the model's context.

    Raises:
        WeftError: NOT_FOUND, BAD_INPUT for what is no text or too short.
    """
    path = Path(plan.calibration)
    text = read_plain(path, _LARGEST)
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    ids: list[int] = tokenizer(text, verbose=False)["input_ids"]
    length, notes = plan.length, list[str]()
    context = longest(folder)
    if SHORTEST <= context < length:
        notes.append(f"Pieces of {context:,} tokens, not {length:,}: the model reads no longer ones.")
        length = context
    # Every piece begins as the tokenizer begins a text: some models are not themselves without that token.
    start = ids[:1] if ids and ids[0] == tokenizer.bos_token_id else []
    rest, step = ids[len(start) :], length - len(start)
    pieces = [start + rest[i : i + step] for i in range(0, len(rest), step)]
    if len(pieces) > 1 and len(pieces[-1]) < length:
        pieces.pop()  # pieces of one length go through the layers alike
    if not pieces or len(pieces[0]) < SHORTEST:
        raise WeftError(
            ErrorKind.BAD_INPUT,
            f"{path.name} has {len(ids)} tokens: too short to calibrate on.",
            "Give a text of some hundred kilobytes, like what the model will read.",
        )
    if len(pieces) <= plan.samples:
        return CalibrationText(pieces, True, notes)
    return CalibrationText([pieces[i * len(pieces) // plan.samples] for i in range(plan.samples)], False, notes)


def longest(folder: Path) -> int:
    """Tokens that a model reads at most, as its config says; 0 where it does not."""
    config = transformers.AutoConfig.from_pretrained(str(folder), local_files_only=True)
    found = getattr(config, "max_position_embeddings", None)  # also where the config has another name for it
    return found if isinstance(found, int) else 0
