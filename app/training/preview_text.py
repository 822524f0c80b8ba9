"""A preview of training data for a terminal. No machine-learning library: the command line imports it."""

from __future__ import annotations

from app.training.data_config import DataReport, PreviewExample, PreviewResult


def render(result: PreviewResult, *, colour: bool = False, examples: bool = True) -> str:
    """The examples and the report as text. What is trained stands in colour, or between ⟦ and ⟧ without colour."""
    parts = [_example(example, colour) for example in result.examples] if examples else []
    return "\n\n".join([*parts, summary(result.report)])


def _example(example: PreviewExample, colour: bool) -> str:
    opening, closing = ("\x1b[1;32m", "\x1b[0m") if colour else ("⟦", "⟧")
    text = "".join(
        f"{opening}{_visible(span.text)}{closing}" if span.trained else _visible(span.text) for span in example.spans
    )
    words = [f"#{example.number}", f"{example.file}:{example.line}"]
    words += [example.part] if example.part else []
    words += [f"{example.trained_tokens:,} of {example.tokens:,} tokens trained"]
    words += ["held out"] if example.held_out else []
    return f"{' · '.join(words)}\n{text}{' …' if example.cut else ''}"


def _visible(text: str) -> str:
    """Without control characters, which a terminal would obey."""
    return "".join(c if c in "\n\t" or c.isprintable() else f"\\x{ord(c):02x}" for c in text)


def summary(report: DataReport) -> str:
    """The report in lines."""
    more = " There are more." if report.partial else ""
    lines = [f"{report.rows:,} rows read, {report.kept:,} used, {report.bad:,} kept out.{more}"]
    for file in report.files:
        what = file.format.replace("_", "/") or "not recognised"
        lines.append(f"  {file.file}: {what}, {file.kept:,} of {file.rows:,} rows used")
        if file.problem:
            lines.append(f"    {file.problem}")
    lines += [f"  {row.file}:{row.line}: {row.reason}" for row in report.bad_rows[:20]]
    if report.bad > 20:
        lines.append(f"  … and {report.bad - 20:,} more")
    lines.append(
        f"{report.duplicates:,} duplicates, {report.too_long:,} too long ({report.too_long_dropped:,} of them left out)."
    )
    lines.append(
        f"{report.examples:,} examples ({report.held_out:,} held out), {report.tokens:,} tokens, "
        f"{report.trained_tokens:,} of them trained; the longest has {report.longest:,}."
    )
    if report.histogram:
        most = max(count for _, count in report.histogram)
        for bound, count in report.histogram:
            lines.append(f"  up to {bound:>7,} tokens {'█' * max(1, round(30 * count / most))} {count:,}")
    if report.template:
        lines.append(f"Chat template: {report.template}.")
    return "\n".join([*lines, *report.notes])
