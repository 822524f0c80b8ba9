"""What is worth saying of the length of the context that a loader's options ask for, before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from app.backends.base import Spec
from app.core.library import ModelEntry
from app.core.options import OptionField, OptionValue, describe

MOST_SUGGESTED = 8192  # tokens that most machines hold


def suggestions(entry: ModelEntry, spec: Spec) -> dict[str, OptionValue]:
    """Context lengths begin at what the model was trained for, up to a size that most machines hold."""
    trained = min(entry.shape.context or 4096, MOST_SUGGESTED)
    return dict.fromkeys(_context_fields(describe(spec.options)), trained)


def advice(
    entry: ModelEntry,
    fields: Iterable[OptionField],
    values: Mapping[str, OptionValue],
    *,
    lacking: str,
    last_changed: str,
) -> dict[str, str]:
    """What to say at which option.

    Args:
        values: that are set. lacking: why a load with them does not fit, "" when it does. last_changed: name of an option.
    """
    trained = entry.shape.context
    found: dict[str, str] = {}
    stretched = any("rope" in name or name in ("alpha_value", "compress_pos_emb") for name in values)
    for name in _context_fields(fields):
        value = values.get(name)
        if trained and not stretched and isinstance(value, int) and value > trained:
            found[name] = (
                f"The model was trained for {trained:,} tokens. Beyond that its answers lose their sense, "
                "and the memory is taken all the same."
            )
        if lacking and value is not None:
            found[name] = f"{lacking} {found.get(name, '')}".strip()
    if lacking and last_changed in values and last_changed not in found:
        found[last_changed] = lacking
    return found


def _context_fields(fields: Iterable[OptionField]) -> list[str]:
    """Names of the options that set how long the context is."""
    return [
        field.name for field in fields if field.optional and field.unit == "tokens" and "context" in field.title.lower()
    ]
