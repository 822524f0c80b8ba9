"""Where a certificate lies: beside the model that it speaks of."""

from __future__ import annotations

from pathlib import Path

import msgspec

from app.core.certify_plan import Certificate

_LARGEST = 1024 * 1024


def certificate_path(model: Path) -> Path:
    """Of a folder or a GGUF file; it need not be there."""
    return model.with_name(f"{model.stem}.certificate.json") if model.suffix == ".gguf" else model / "certificate.json"


def read_certificate(model: Path) -> Certificate | None:
    """What is stored with a model; None where nothing is, or nothing that can be read."""
    try:
        with certificate_path(model).open("rb") as file:
            return msgspec.json.decode(file.read(_LARGEST), type=Certificate)
    except (OSError, msgspec.DecodeError):
        return None
