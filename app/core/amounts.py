"""Amounts in words."""

from __future__ import annotations


def readable_bytes(count: float) -> str:
    """`4.1 GB`, in powers of 1000 as disks and downloads are sold."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
