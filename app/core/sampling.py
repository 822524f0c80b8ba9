"""How the next token is chosen: one struct that every loader understands as far as its library can.

Defaults are llama.cpp's own. Each loader's SPEC names the fields that it serves; a form greys the rest.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Annotated

import msgspec

from app.core.options import OptionValue, describe, option


class Sampling(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Sampling parameters of one generation. Fields at their neutral value do nothing."""

    temperature: Annotated[
        float,
        option(
            "Temperature", "Higher is more varied. 0 always takes the likeliest token.", ge=0, le=5, group="Sampling"
        ),
    ] = 0.8
    top_k: Annotated[
        int, option("Top-k", "Keep only the k likeliest tokens. 0 keeps all.", ge=0, le=100_000, group="Sampling")
    ] = 40
    top_p: Annotated[
        float,
        option(
            "Top-p",
            "Keep the likeliest tokens that together reach this probability. 1 keeps all.",
            ge=0,
            le=1,
            group="Sampling",
        ),
    ] = 0.95
    min_p: Annotated[
        float,
        option(
            "Min-p",
            "Drop tokens less likely than this share of the likeliest token's probability. 0 keeps all.",
            ge=0,
            le=1,
            group="Sampling",
        ),
    ] = 0.05
    typical_p: Annotated[
        float,
        option(
            "Typical-p",
            "Locally typical sampling (Meister et al. 2022): keep tokens whose surprise is near the average. 1 is off.",
            ge=0,
            le=1,
            group="Sampling",
            advanced=True,
        ),
    ] = 1.0
    repetition_penalty: Annotated[
        float,
        option(
            "Repetition penalty",
            "Divides the logits of tokens already seen (Keskar et al. 2019). 1 is off.",
            ge=0.1,
            le=5,
            group="Repetition",
        ),
    ] = 1.0
    frequency_penalty: Annotated[
        float,
        option(
            "Frequency penalty",
            "Lowers a token's logit once for each time it was seen. 0 is off.",
            ge=-2,
            le=2,
            group="Repetition",
        ),
    ] = 0.0
    presence_penalty: Annotated[
        float,
        option(
            "Presence penalty",
            "Lowers the logit of every token seen at all. 0 is off.",
            ge=-2,
            le=2,
            group="Repetition",
        ),
    ] = 0.0
    penalty_range: Annotated[
        int,
        option(
            "Penalty range",
            "How many of the latest tokens the penalties look at. -1 is the whole context.",
            ge=-1,
            unit="tokens",
            group="Repetition",
            advanced=True,
        ),
    ] = 64
    dry_multiplier: Annotated[
        float,
        option(
            "DRY multiplier",
            "Don't Repeat Yourself: penalises tokens that would continue a sequence already written. 0 is off, 0.8 is usual.",
            ge=0,
            le=10,
            group="Repetition",
            advanced=True,
        ),
    ] = 0.0
    dry_base: Annotated[
        float,
        option(
            "DRY base",
            "How fast the DRY penalty grows with the length of the repetition.",
            ge=1,
            le=8,
            group="Repetition",
            advanced=True,
        ),
    ] = 1.75
    dry_allowed_length: Annotated[
        int,
        option(
            "DRY allowed length",
            "Repetitions up to this length are free.",
            ge=1,
            le=1024,
            unit="tokens",
            group="Repetition",
            advanced=True,
        ),
    ] = 2
    dry_range: Annotated[
        int,
        option(
            "DRY range",
            "How far back DRY looks. -1 is the whole context.",
            ge=-1,
            unit="tokens",
            group="Repetition",
            advanced=True,
        ),
    ] = -1
    seed: (
        Annotated[
            int,
            option(
                "Seed",
                "The same seed gives the same answer.",
                ge=0,
                le=2**32 - 2,
                automatic="a new one each time",
                group="Length and stopping",
            ),
        ]
        | None
    ) = None
    max_tokens: (
        Annotated[
            int,
            option(
                "Longest answer",
                "Stop after this many tokens.",
                ge=1,
                unit="tokens",
                automatic="until the context is full",
                group="Length and stopping",
            ),
        ]
        | None
    ) = None
    stop: Annotated[
        str,
        option(
            "Stop strings",
            "Stop before any of these texts appears, one a line. \\n stands for a line break.",
            multiline=True,
            group="Length and stopping",
        ),
    ] = ""
    grammar: Annotated[
        str,
        option(
            "Grammar",
            "A GBNF grammar that the answer must follow.",
            multiline=True,
            group="Shape of the answer",
            advanced=True,
        ),
    ] = ""
    json_schema: Annotated[
        str,
        option(
            "JSON schema",
            "A JSON schema that the answer must follow.",
            multiline=True,
            group="Shape of the answer",
            advanced=True,
        ),
    ] = ""

    def stop_strings(self) -> tuple[str, ...]:
        """The stop strings, with \\n, \\t and \\\\ read as escapes; blank lines are none."""
        lines = (line for line in self.stop.split("\n") if line.strip())
        return tuple(_unescape(line) for line in lines)


def worded(values: Mapping[str, OptionValue]) -> str:
    """Changed fields as a person reads them: "temperature 0, top-p 0.9"."""
    titles = {field.name: field.title for field in describe(Sampling)}
    return ", ".join(f"{titles[name][:1].lower()}{titles[name][1:]} {_short(value)}" for name, value in values.items())


def _short(value: OptionValue) -> str:
    if isinstance(value, str):
        shown = " ".join(f"“{line}”" for line in value.split("\n"))
        shown = "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in shown)
        return shown if len(shown) <= 60 else shown[:59] + "\N{HORIZONTAL ELLIPSIS}"
    return f"{value:g}" if isinstance(value, float) else str(value)


def stop_lines(texts: Iterable[str]) -> str:
    """These texts as `Sampling.stop` holds them: `stop_strings` gives them back, but for texts of blanks alone."""
    return "\n".join(text.replace("\\", "\\\\").replace("\n", "\\n").replace("\t", "\\t") for text in texts)


_ESCAPES = {"\\\\": "\\", "\\n": "\n", "\\t": "\t"}


def _unescape(line: str) -> str:
    # Not `unicode_escape`: that would turn every non-ASCII character into mojibake. In one pass, with no character that
    # stands in for a backslash meanwhile: a stop string may hold any.
    return re.sub(r"\\[\\nt]", lambda found: _ESCAPES[found[0]], line)
