"""Options of the llama.cpp loader that are written as text: metadata overrides, and shares of GPUs. Imports no library."""

from __future__ import annotations

import math

import msgspec

from app.core.errors import ErrorKind, WeftError


class Override(msgspec.Struct, frozen=True, kw_only=True):
    """One entry of `override_kv`."""

    key: str
    value: int | float | bool | str


def overrides(text: str) -> tuple[Override, ...]:
    """Read the lines of `override_kv`.

    Raises:
        WeftError: BAD_INPUT, naming the line that cannot be read.
    """
    found: list[Override] = []
    for line in filter(None, (line.strip() for line in text.splitlines())):
        key, equals, typed = line.partition("=")
        kind, colon, value = typed.partition(":")
        try:
            if not (equals and colon and 0 < len(key.encode()) < 128 and len(value.encode()) < 128):
                raise ValueError
            found.append(Override(key=key.strip(), value=_override_value(kind.strip(), value.strip())))
        except (KeyError, ValueError, OverflowError):
            raise WeftError(
                ErrorKind.BAD_INPUT,
                f"Option override_kv cannot read {line!r}.",
                "Write key=type:value, where type is int, float, bool or str.",
            ) from None
    return tuple(found)


def _override_value(kind: str, value: str) -> int | float | bool | str:
    if kind == "int":
        number = int(value)
        if not -(2**63) <= number < 2**63:
            raise ValueError
        return number
    if kind == "float":
        return float(value)
    if kind == "bool":
        return {"true": True, "false": False}[value.lower()]
    if kind == "str":
        return value
    raise ValueError


def tensor_split(text: str, devices: int) -> tuple[float, ...]:
    """Read `60,40` as shares, one per GPU; () when the text is empty.

    Raises:
        WeftError: BAD_INPUT when it is no list of numbers, or longer than there can be devices.
    """
    if not text.strip():
        return ()
    try:
        shares = tuple(float(part) for part in text.replace("/", ",").split(","))
        if any(not math.isfinite(share) or share < 0 for share in shares) or not any(shares):
            raise ValueError
    except ValueError:
        raise WeftError(
            ErrorKind.BAD_INPUT,
            f"Option tensor_split cannot be {text!r}.",
            "Write one share for each GPU, such as 60,40.",
        ) from None
    if len(shares) > devices:
        raise WeftError(
            ErrorKind.BAD_INPUT,
            f"Option tensor_split names {len(shares)} GPUs; llama.cpp takes at most {devices} here.",
            "Write one share for each GPU that this machine has.",
        )
    return shares
