"""What stands at the beginning of model files, and small JSON beside them; bounded, never trusts a length."""

from __future__ import annotations

import json
from pathlib import Path
from typing import cast

from app.core.errors import ErrorKind, WeftError
from app.core.gguf_header import GgufArray, GgufHeader, GgufTensor, os_error, read_gguf_header
from app.core.safetensors_header import SafetensorsHeader, SafetensorsTensor, read_safetensors_header

__all__ = [
    "GgufArray",
    "GgufHeader",
    "GgufTensor",
    "JsonObject",
    "SafetensorsHeader",
    "SafetensorsTensor",
    "read_gguf_header",
    "read_json",
    "read_safetensors_header",
]

MAX_JSON = 4 * 1024 * 1024  # bytes; the longest config.json known takes 300 KiB
MAX_DEPTH = 64

JsonObject = dict[str, object]


def read_json(path: Path, limit: int = MAX_JSON) -> JsonObject:
    """Read a file that holds one JSON object, such as config.json or adapter_config.json.

    Args:
        path: the file. limit: bytes beyond which it is not read.

    Raises:
        WeftError: CORRUPT when it is too long, too deeply nested, no JSON or no object; PERMISSION or
            NOT_FOUND from the operating system.
    """
    try:
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise os_error(path, error) from error
    if len(data) > limit:
        raise _bad(path, f"it is longer than {limit // 1024:,} KiB")
    try:
        # The standard library's reader, because configs hold NaN and Infinity, which msgspec refuses.
        value = json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise _bad(path, f"it is not JSON ({error})") from error
    if not isinstance(value, dict):
        raise _bad(path, "it does not hold an object")
    result = cast("JsonObject", value)
    if _deeper_than(result, MAX_DEPTH):
        raise _bad(path, f"it is nested deeper than {MAX_DEPTH} levels")
    return result


def _deeper_than(value: object, limit: int) -> bool:
    level: list[object] = [value]
    for _ in range(limit):
        below: list[object] = []
        for item in level:
            if isinstance(item, dict):
                below.extend(cast("JsonObject", item).values())
            elif isinstance(item, list):
                below.extend(cast("list[object]", item))
        level = [item for item in below if isinstance(item, (dict, list))]
        if not level:
            return False
    return True


def _bad(path: Path, what: str) -> WeftError:
    return WeftError(
        ErrorKind.CORRUPT, f"{path} cannot be read: {what}.", "Download or copy that file again, or correct it."
    )
