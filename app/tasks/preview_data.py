"""Show what training would see: examples with their trained tokens, and what is wrong with the data. No model is loaded."""

from __future__ import annotations

from pathlib import Path

from app.engine.reporting import Report
from app.training.batches import split
from app.training.data_config import PreviewParameters, PreviewResult

Parameters = PreviewParameters


def run(parameters: PreviewParameters, report: Report) -> PreviewResult:
    """Read the data. Raises WeftError as `training.encode.encode` does, and NOT_FOUND or CORRUPT for the tokenizer.

    Data of which nothing can be used is no error here: the report says what is wrong with it.
    """
    from app.training.encode import encode
    from app.training.preview import preview
    from app.training.rows import load_rows
    from app.training.tokenizer import load_tokenizer

    rows = load_rows(parameters.data, parameters.most_rows)
    report.progress("Loading the tokenizer")
    tokenizer = load_tokenizer(Path(parameters.model))

    def progress(count: int) -> None:
        report.progress("Reading the data", count, 0, "rows")

    data = encode(
        rows, tokenizer, parameters.data, progress=progress, cancelled=lambda: report.cancelled, allow_empty=True
    )
    data.report.held_out = len(split(data, parameters.data)[1])
    return PreviewResult(examples=tuple(preview(data, tokenizer, parameters.data, parameters)), report=data.report)
