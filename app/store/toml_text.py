"""Write plain data as TOML (the standard library only reads it)."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import cast

_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")


def dump(table: Mapping[str, object]) -> str:
    """TOML text of a table of strings, numbers, booleans, lists and tables. None values are left out.

    Raises:
        TypeError: for a value that TOML has no form for.
    """
    lines: list[str] = []
    _table(table, (), lines)
    return "\n".join(lines).lstrip("\n") + "\n" if lines else ""


def _table(table: Mapping[str, object], path: tuple[str, ...], lines: list[str]) -> None:
    subtables: list[tuple[str, Mapping[str, object]]] = []
    plain: list[str] = []
    for key, value in table.items():
        if isinstance(value, Mapping):
            subtables.append((key, cast("Mapping[str, object]", value)))
        elif value is not None:
            plain.append(f"{_key(key)} = {_value(value)}")
    if path and (plain or not subtables):
        lines.extend(("", f"[{'.'.join(_key(part) for part in path)}]"))
    lines.extend(plain)
    for key, subtable in subtables:
        _table(subtable, (*path, key), lines)


def _key(key: str) -> str:
    return key if _BARE_KEY.fullmatch(key) else _string(key)


def _string(text: str) -> str:
    # JSON's escapes are TOML's, but for DEL, which TOML wants escaped, and lone surrogates, which it cannot hold.
    clean = text.encode("utf-8", "replace").decode()
    return json.dumps(clean, ensure_ascii=False).replace("\x7f", "\\u007F")


def _value(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        if math.isnan(value):
            return "nan"
        if math.isinf(value):
            return "inf" if value > 0 else "-inf"
        return repr(value)
    if isinstance(value, str):
        return _string(value)
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_value(item) for item in cast("list[object]", value)) + "]"
    if isinstance(value, Mapping):
        items = cast("Mapping[str, object]", value).items()
        return "{" + ", ".join(f"{_key(k)} = {_value(v)}" for k, v in items if v is not None) + "}"
    raise TypeError(f"TOML has no form for {type(value).__name__}")
