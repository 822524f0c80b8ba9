"""Options as structs: one declaration gives validation, help, a form and `--option key=value`.

A loader's options are a frozen `msgspec.Struct` whose fields are annotated with `option(...)`:

    class Options(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
        n_ctx: Annotated[int, option("Context length", "Tokens the model can see.", ge=8)] | None = None

`None` means "automatic": `automatic=` says in words what then happens. Field types are bool, int,
float, str, a `Literal[...]` of strings, or any of these `| None`.
"""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Collection, Mapping
from typing import Any, Literal, TypeVar

import msgspec

from app.core.errors import ErrorKind, WeftError

OptionValue = bool | int | float | str | None
OptionKind = Literal["bool", "int", "float", "text", "choice"]
T = TypeVar("T", bound=msgspec.Struct)


def option(
    title: str,
    help: str,
    *,
    group: str = "General",
    ge: float | None = None,
    le: float | None = None,
    unit: str = "",
    automatic: str = "",
    replaced: str = "",
    advanced: bool = False,
    multiline: bool = False,
    aliases: tuple[str, ...] = (),
) -> msgspec.Meta:
    """Describe one option field.

    Args:
        title: the label, in sentence case.
        help: what it does, in a sentence or two, for somebody who has not read the library's manual.
        group: the heading under which a form shows it.
        ge, le: inclusive range for numbers.
        unit: shown after the number ("GiB", "tokens", "layers").
        automatic: what `None` means ("from the model's metadata").
        replaced: when today's library no longer has this switch: the sentence that says what replaced it.
            The field then stands greyed in forms, is accepted, and has no effect.
        advanced: shown only when the form's advanced part is open.
        multiline: a text that wants more than one line.
        aliases: other names by which people know it (`n-gpu-layers`, `gpu_layers`).
    """
    return msgspec.Meta(
        title=title,
        description=help,
        ge=ge,
        le=le,
        extra={
            "group": group,
            "unit": unit,
            "automatic": automatic,
            "replaced": replaced,
            "advanced": advanced,
            "multiline": multiline,
            "aliases": aliases,
        },
    )


class OptionField(msgspec.Struct, frozen=True, kw_only=True):
    """One option, as a form or a help page needs it."""

    name: str
    kind: OptionKind
    title: str
    help: str
    group: str
    default: OptionValue
    optional: bool  # None is allowed and means automatic
    automatic: str
    minimum: float | None
    maximum: float | None
    unit: str
    choices: tuple[str, ...]
    replaced: str
    advanced: bool
    multiline: bool
    aliases: tuple[str, ...]


def describe(options_type: type[msgspec.Struct], leave_out: Collection[str] = ()) -> tuple[OptionField, ...]:
    """The fields of an options struct, in order of declaration, but for those that are left out (these may be of any type)."""
    hints = typing.get_type_hints(options_type, include_extras=True)
    return tuple(
        _describe_field(info.name, hints[info.name], info.default)
        for info in msgspec.structs.fields(options_type)
        if info.name not in leave_out
    )


def _describe_field(name: str, hint: Any, default: OptionValue) -> OptionField:
    optional = False
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        arms = typing.get_args(hint)
        optional = type(None) in arms
        hint = next(arm for arm in arms if arm is not type(None))
    meta = msgspec.Meta()
    if typing.get_origin(hint) is typing.Annotated:
        hint, *metas = typing.get_args(hint)
        meta = next((m for m in metas if isinstance(m, msgspec.Meta)), meta)
    choices: tuple[str, ...] = tuple(typing.get_args(hint)) if typing.get_origin(hint) is Literal else ()
    kinds: dict[Any, OptionKind] = {bool: "bool", int: "int", float: "float", str: "text"}
    extra = meta.extra or {}
    return OptionField(
        name=name,
        kind="choice" if choices else kinds[hint],
        title=meta.title or name,
        help=meta.description or "",
        group=extra.get("group", "General"),
        default=default,
        optional=optional,
        automatic=extra.get("automatic", ""),
        minimum=meta.ge,
        maximum=meta.le,
        unit=extra.get("unit", ""),
        choices=choices,
        replaced=extra.get("replaced", ""),
        advanced=extra.get("advanced", False),
        multiline=extra.get("multiline", False),
        aliases=tuple(extra.get("aliases", ())),
    )


def build(options_type: type[T], values: Mapping[str, OptionValue]) -> T:
    """Make an options struct from named values; what is not named keeps its default.

    Raises:
        WeftError: BAD_INPUT, naming the option, what is wrong with its value and what it takes.
    """
    fields = {field.name: field for field in describe(options_type)}
    for name in values:
        if name not in fields:
            close = difflib.get_close_matches(name, fields, n=3)
            hint = f"Did you mean {', '.join(close)}?" if close else f"Options are: {', '.join(fields)}."
            raise WeftError(ErrorKind.BAD_INPUT, f"There is no option {name!r}.", hint)
    for name, value in values.items():
        try:
            msgspec.convert({name: value}, options_type)
        except msgspec.ValidationError as error:
            raise WeftError(
                ErrorKind.BAD_INPUT, f"Option {name} cannot be {value!r}.", accepts(fields[name])
            ) from error
    return msgspec.convert(dict(values), options_type)


def accepts(field: OptionField) -> str:
    """One sentence: which values the option takes."""
    if field.choices:
        what = "one of " + ", ".join(field.choices)
    elif field.kind == "bool":
        what = "true or false"
    elif field.kind == "text":
        what = "a text"
    else:
        what = "a whole number" if field.kind == "int" else "a number"
        least, most = (_plain(bound) for bound in (field.minimum, field.maximum))
        if least and most:
            what += f" from {least} to {most}"
        elif least:
            what += f" of at least {least}"
        elif most:
            what += f" of at most {most}"
    if field.optional:
        what += " or auto"
        if field.automatic:
            what += f" ({field.automatic})"
    return f"It takes {what}."


def _plain(bound: float | None) -> str:
    """A bound as a person writes it: 4294967294, not 4.29497e+09; "" when there is none."""
    if bound is None:
        return ""
    return str(int(bound)) if bound == int(bound) else f"{bound:g}"


def parse_assignments(options_type: type[msgspec.Struct], assignments: list[str]) -> dict[str, OptionValue]:
    """Read `key=value` strings as the command line gives them; `auto` means None where that is allowed.

    Keys may be written with dashes, and by any alias.

    Raises:
        WeftError: BAD_INPUT, naming the assignment that cannot be read.
    """
    fields: dict[str, OptionField] = {}
    for field in describe(options_type):
        for name in (field.name, *field.aliases):
            fields[name.replace("-", "_").lower()] = field
    values: dict[str, OptionValue] = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        field = fields.get(key.strip().replace("-", "_").lower())
        if field is not None and not equals:
            raise WeftError(ErrorKind.BAD_INPUT, f"Option {key} has no value.", f"Write {key}=VALUE. {accepts(field)}")
        if field is None:
            close = difflib.get_close_matches(key, fields, n=3)
            names = [each.name for each in describe(options_type) if not each.replaced]
            hint = f"Did you mean {', '.join(close)}?" if close else f"Options are: {', '.join(names)}."
            raise WeftError(ErrorKind.BAD_INPUT, f"{key!r} is not an option.", hint)
        values[field.name] = parse_value(field, text)
    return values


def parse_value(field: OptionField, text: str) -> OptionValue:
    """Read one value as somebody typed it.

    Raises:
        WeftError: BAD_INPUT when the text is not a value of the field's kind.
    """
    word = text.strip().lower()
    if field.optional and word in ("auto", "none", ""):
        return None
    try:
        if field.kind == "bool":
            return {
                "true": True,
                "1": True,
                "yes": True,
                "on": True,
                "false": False,
                "0": False,
                "no": False,
                "off": False,
            }[word]
        if field.kind == "int":
            return int(word.replace("_", ""))
        if field.kind == "float":
            return float(word)
    except (KeyError, ValueError):
        raise WeftError(ErrorKind.BAD_INPUT, f"Option {field.name} cannot be {text!r}.", accepts(field)) from None
    return text
