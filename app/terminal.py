"""What the command line prints: results on stdout, progress and errors on stderr, tables that line up."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Sequence

import msgspec

from app.core.amounts import readable_bytes as readable_bytes
from app.core.errors import WeftError
from app.core.jobs import Progress


class ProgressLine:
    """Progress on stderr: one line rewritten in place on a terminal, else a line a phase and every ten seconds."""

    def __init__(self) -> None:
        self._live = sys.stderr.isatty()
        self._shown = ""
        self._phase = ""
        self._last = 0.0

    def show(self, progress: Progress, detail: str = "") -> None:
        """Show how far a piece of work is, and behind it a detail such as the speed; thins itself out."""
        now = time.monotonic()
        fresh = progress.phase != self._phase
        if not fresh and now - self._last < (0.1 if self._live else 10.0):
            return
        self._phase, self._last = progress.phase, now
        text = " · ".join(part for part in (describe_progress(progress), detail) if part)
        if self._live:
            width = shutil.get_terminal_size().columns - 1
            text = text if len(text) <= width else text[: width - 1] + "…"
            sys.stderr.write(f"\r\x1b[2K{text}")
            self._shown = text
        else:
            sys.stderr.write(text + "\n")
        sys.stderr.flush()

    def clear(self) -> None:
        """Take the line away, so that what is printed next starts on a clean one."""
        if self._live and self._shown:
            sys.stderr.write("\r\x1b[2K")
            sys.stderr.flush()
        self._shown = self._phase = ""


def describe_progress(progress: Progress) -> str:
    """`Downloading torch … 45 %`, or with counts where there are any."""
    parts = [progress.phase]
    if progress.fraction is not None:
        parts.append(f"{progress.fraction:.0%}")
    if progress.unit == "bytes":
        if progress.done:
            parts.append(readable_bytes(progress.done))
    elif progress.unit and progress.total:
        parts.append(f"({progress.done:g} of {progress.total:g} {progress.unit})")
    return " ".join(parts)


def print_error(error: WeftError) -> None:
    """`error: …` and `hint: …` on stderr."""
    print(f"error: {error.message}", file=sys.stderr)
    if error.hint:
        print(f"hint: {error.hint}", file=sys.stderr)


def print_json(value: object) -> None:
    """One JSON document on stdout, for `--json`."""
    sys.stdout.write(msgspec.json.format(msgspec.json.encode(value), indent=2).decode() + "\n")


def readable_count(count: float) -> str:
    """`7.2 B` parameters, `0` as a dash."""
    if count <= 0:
        return "–"
    for unit in ("", " k", " M", " B"):
        if count < 1000:
            return f"{count:.0f}{unit}" if not unit or count >= 100 else f"{count:.1f}{unit}"
        count /= 1000
    return f"{count:.1f} T"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns that line up; the last one may be long."""
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (header, *rows)
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)
