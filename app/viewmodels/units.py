"""Numbers as people read them: 4.1 GB, 7.2 B, 12 min left, yesterday."""

from __future__ import annotations

import time
from datetime import datetime

from app.core.amounts import readable_bytes as readable_bytes


def readable_count(count: float) -> str:
    """7.2 B, 135 M, 12 k; a dash for what is not known."""
    if count <= 0:
        return "–"
    for limit, unit in ((1e12, " T"), (1e9, " B"), (1e6, " M"), (1e3, " k")):
        if count >= limit * 0.9995:
            value = count / limit
            return f"{value:.1f}{unit}" if value < 99.5 else f"{value:.0f}{unit}"
    return f"{count:.0f}"


def readable_tokens(count: int) -> str:
    """131,072; a dash for what is not known."""
    return f"{count:,}" if count > 0 else "–"


def readable_seconds(seconds: float) -> str:
    """12 min, 1 h 5 min, 40 s."""
    seconds = max(0, round(seconds))
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{round(seconds / 60)} min"
    hours, rest = divmod(round(seconds / 60), 60)
    return f"{hours} h {rest} min" if rest else f"{hours} h"


def readable_when(moment: float, now: float | None = None) -> str:
    """Just now, 5 min ago, today 14:02, yesterday 9:15, 3 March 2026; a dash for never."""
    if moment <= 0:
        return "–"
    now = time.time() if now is None else now
    age = now - moment
    then, today = datetime.fromtimestamp(moment), datetime.fromtimestamp(now).date()
    if -60 < age < 60:
        return "Just now"
    if 0 < age < 3600:
        return f"{round(age / 60)} min ago"
    days = (today - then.date()).days
    clock = f"{then.hour}:{then.minute:02}"
    if days == 0:
        return f"Today {clock}"
    if days == 1:
        return f"Yesterday {clock}"
    return f"{then.day} {then:%b %Y}"


def short_path(path: str, home: str) -> str:
    """A path with the home folder as ~."""
    home = home.rstrip("/\\")
    inside = bool(home) and path.startswith(home) and path[len(home) : len(home) + 1] in ("/", "\\")
    return f"~{path[len(home) :]}" if inside else path
