"""What somebody asks of the data of a training run, and what Weft has to say about it. No machine-learning library."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from app.core.options import option

DataFormat = Literal["auto", "alpaca", "sharegpt", "messages", "prompt_completion", "text", "preference"]
RowKind = Literal["chat", "pair", "text", "preference"]

FIELDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "preference": (("prompt", "chosen", "rejected"), ("system",)),
    "messages": (("messages",), ()),
    "sharegpt": (("conversations",), ("system",)),
    "prompt_completion": (("prompt", "completion"), ("system",)),
    "alpaca": (("instruction", "output"), ("input", "system", "history")),
    "text": (("text",), ()),
}
"""Per format: the fields that a row must have, and those that it may have. In the order in which they are recognised."""


class DataConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The examples of a run: where they lie, what they are, and how they become tokens.

    Attributes:
        files: files and folders, read in this order.
        mapping: field of the format -> column of the file, where they differ (`{"output": "answer"}`).
        held_out_files: files and folders to measure on, instead of a share of `files`.
    """

    files: tuple[str, ...] = ()
    format: Annotated[
        DataFormat, option("Format", "What a row of the file holds. Recognised from its fields.", group="Data")
    ] = "auto"
    mapping: dict[str, str] = {}
    template: Annotated[
        str,
        option(
            "Chat template",
            "The name of a known template (chatml, llama-2, llama-3, mistral, gemma, phi-3, zephyr, vicuna, alpaca), or a "
            "Jinja template. Empty: the model's own; ChatML where it has none.",
            group="Data",
            multiline=True,
        ),
    ] = ""
    system: Annotated[
        str, option("System prompt", "Put before conversations that have none.", group="Data", multiline=True)
    ] = ""
    response_only: Annotated[
        bool,
        option("Train on answers only", "The model learns to write the answers, not the questions.", group="Data"),
    ] = True
    plain_prompts: (
        Annotated[
            bool,
            option(
                "Prompts as plain text",
                "Takes prompt and completion as they are, without a chat template.",
                group="Data",
                automatic="plain where the model has no chat template",
                advanced=True,
            ),
        ]
        | None
    ) = None
    held_out: Annotated[
        float,
        option("Held out", "Share of the examples kept for measuring, never trained on.", group="Data", ge=0, le=0.9),
    ] = 0.05
    held_out_files: tuple[str, ...] = ()
    max_length: Annotated[
        int, option("Longest example", "Longer ones are cut or left out.", group="Data", ge=8, unit="tokens")
    ] = 1024
    too_long: Annotated[
        Literal["cut", "drop"],
        option("Examples that are too long", "cut: the end is left out; drop: the example is left out.", group="Data"),
    ] = "cut"
    duplicates: Annotated[
        Literal["keep", "drop"],
        option("Duplicates", "Rows that are equal to an earlier one.", group="Data", advanced=True),
    ] = "keep"
    packing: Annotated[
        Literal["fit", "sequential", "off"],
        option(
            "Packing",
            "Several short examples share one row of a batch, without seeing each other. fit: packed as tightly as "
            "possible; sequential: in order; off: one example a row, padded.",
            group="Data",
        ),
    ] = "fit"
    overlap: Annotated[
        int,
        option(
            "Overlap of blocks",
            "Raw text is cut into blocks of the longest length. Each block begins with this many tokens of the one "
            "before it, as context that is not trained again.",
            group="Data",
            ge=0,
            unit="tokens",
        ),
    ] = 64
    separator: Annotated[
        str,
        option(
            "Separator of documents",
            "In raw text files: what stands between two documents, for instance a blank line. Empty: one file is one document.",
            group="Data",
            advanced=True,
        ),
    ] = ""
    seed: Annotated[int, option("Seed", "Of the split and the order of examples.", group="Data", ge=0)] = 0


class BadRow(msgspec.Struct, frozen=True):
    """A row that was kept out. line: from 1, the first of the row's lines; a Parquet file's row number."""

    file: str
    line: int
    reason: str


class FileReport(msgspec.Struct, kw_only=True):
    """One file: what it was taken for, and how many of its rows are used.

    Attributes:
        format: as recognised; "" when nothing could be read. columns: the fields of its first rows.
        mapping: field -> column, as used. problem: why the file as a whole, or its rest, was not read.
    """

    file: str
    format: str = ""
    columns: tuple[str, ...] = ()
    mapping: dict[str, str] = {}
    rows: int = 0
    kept: int = 0
    bad: int = 0
    problem: str = ""


class DataReport(msgspec.Struct, kw_only=True):
    """What became of the data.

    Attributes:
        rows, kept, bad: rows read, rows used, rows kept out. bad_rows: the first of these (MOST_BAD_ROWS at most).
        duplicates: rows equal to an earlier one (used or not, as configured).
        too_long: examples over the longest length; too_long_dropped: those left out.
        examples: training sequences made (raw text makes several of a row). held_out: those of them held out.
        tokens, trained_tokens: of all examples. longest: tokens of the longest example as it stands.
        histogram: (upper bound in tokens, examples) with bounds 16, 32, 64, …
        partial: reading ended early, as asked: there is more.
        template: whose template was used, in words. notes: what had to be done that one might not expect.
    """

    files: list[FileReport] = []
    rows: int = 0
    kept: int = 0
    bad: int = 0
    bad_rows: list[BadRow] = []
    duplicates: int = 0
    too_long: int = 0
    too_long_dropped: int = 0
    examples: int = 0
    held_out: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    longest: int = 0
    histogram: list[tuple[int, int]] = []
    partial: bool = False
    template: str = ""
    notes: list[str] = []


MOST_BAD_ROWS = 1000


class PreviewParameters(msgspec.Struct, frozen=True, kw_only=True):
    """What `tasks/preview_data.py` takes.

    Attributes:
        data: the data. model: folder or GGUF file that brings the tokenizer.
        first: this many examples from the beginning. wanted: the numbers of further examples, from 0.
        longest: characters of one example that are sent at most.
        most_rows: reading ends after so many, for an answer at once; 0 reads all.
    """

    data: DataConfig
    model: str
    first: int = 20
    most_rows: int = 0
    wanted: tuple[int, ...] = ()
    longest: int = 20_000


class PreviewSpan(msgspec.Struct, frozen=True):
    """A piece of an example as the model sees it; trained: the loss is taken on it."""

    text: str
    trained: bool


class PreviewExample(msgspec.Struct, frozen=True, kw_only=True):
    """One example as it leaves the collator.

    Attributes:
        number: from 0, in the order of the files. part: "" for SFT, "chosen" or "rejected" for preference rows.
        spans: adjoining; together the whole text (cut at `PreviewParameters.longest`, then `cut` is true).
    """

    number: int
    file: str
    line: int
    tokens: int
    trained_tokens: int
    spans: tuple[PreviewSpan, ...]
    held_out: bool = False
    part: str = ""
    cut: bool = False


class PreviewResult(msgspec.Struct, frozen=True, kw_only=True):
    """What `tasks/preview_data.py` answers."""

    examples: tuple[PreviewExample, ...]
    report: DataReport
