"""Amounts in words."""

from __future__ import annotations


def readable_bytes(count: float) -> str:
    """Decimal units, as disks and downloads are sold: 4.1 GB, 512 MB, 0 B."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 999.5:
            return f"{count:.0f} {unit}" if unit in ("B", "kB") or count >= 99.5 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB" if count < 99.5 else f"{count:.0f} TB"
