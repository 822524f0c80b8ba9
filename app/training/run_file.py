"""RUN.toml: read into a RunConfig with errors that name the key, and written as people would write it. No ML, no Qt."""

from __future__ import annotations

import difflib
import re
import tomllib
import typing
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from app.core.errors import ErrorKind, WeftError
from app.core.options import accepts, describe
from app.training.data_config import DataConfig
from app.training.run_config import IN_TRAIN, RunConfig

LISTS = frozenset({"targets", "exclude", "modules_to_save", "target_parameters", "layers", "layer_replication"})
TABLES = frozenset({"rank_pattern", "alpha_pattern"})
LINES = frozenset({"samples"})
WORDS = frozenset({"trainable_tokens", "new_tokens"})
_LARGEST = 4 * 1024 * 1024  # bytes


def read(path: Path) -> RunConfig:
    """Read a RUN.toml. Relative paths in it count from its own folder.

    Raises:
        WeftError: NOT_FOUND without the file; BAD_INPUT naming what is wrong, and the nearest name for an unknown key.
    """
    try:
        if path.stat().st_size > _LARGEST:
            raise WeftError(ErrorKind.BAD_INPUT, f"{path} is too large to be a training run.", "Name a RUN.toml.")
        text = path.read_text("utf-8-sig")
    except FileNotFoundError:
        raise WeftError(ErrorKind.NOT_FOUND, f"There is no file {path}.", "Name an existing RUN.toml.") from None
    except IsADirectoryError:
        raise WeftError(ErrorKind.BAD_INPUT, f"{path} is a folder.", "Name the RUN.toml in it.") from None
    except UnicodeDecodeError as error:
        raise WeftError(ErrorKind.BAD_INPUT, f"{path} is not UTF-8 text.", "Save it as UTF-8.") from error
    return beside(parse(text, str(path)), path.absolute().parent)


def parse(text: str, name: str = "RUN.toml") -> RunConfig:
    """The config that a TOML text holds, paths as written. Raises WeftError BAD_INPUT."""
    try:
        table = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise WeftError(ErrorKind.BAD_INPUT, f"{name} is not TOML: {error}.", "Correct that line.") from error
    return from_table(table)


def from_table(table: Mapping[str, Any]) -> RunConfig:
    """The config of a table of tables. Raises WeftError BAD_INPUT."""
    hints = typing.get_type_hints(RunConfig)
    parts: dict[str, Any] = {}
    for section, values in table.items():
        if section not in hints:
            raise WeftError(
                ErrorKind.BAD_INPUT, f"There is no section [{section}] in a training run.", _near(section, hints)
            )
        if not isinstance(values, Mapping):
            raise WeftError(
                ErrorKind.BAD_INPUT, f"[{section}] has to be a table.", f"Write [{section}] above its keys."
            )
        parts[section] = _section(section, hints[section], values)
    return RunConfig(**parts)


def _section(section: str, kind: type[msgspec.Struct], values: Mapping[str, Any]) -> msgspec.Struct:
    names = {info.name: info for info in msgspec.structs.fields(kind) if section != "data" or info.name not in IN_TRAIN}
    described = {field.name: field for field in describe_section(kind)}
    aliases = {alias.replace("-", "_"): field.name for field in described.values() for alias in field.aliases}
    plain: dict[str, Any] = {}
    for key, value in values.items():
        name = key if key in names else aliases.get(key, key)
        if name not in names:
            hint = f"{key} stands under [train]." if key in IN_TRAIN else _near(key, [*names, *aliases])
            raise WeftError(ErrorKind.BAD_INPUT, f"There is no option {key!r} in [{section}].", hint)
        plain[name] = _plain(section, name, value, names[name].default)
        try:
            msgspec.convert({name: plain[name]}, kind)
        except (msgspec.ValidationError, ValueError) as error:
            hint = accepts(described[name]) if name in described else f"{error}."
            raise WeftError(ErrorKind.BAD_INPUT, f"[{section}] {key} cannot be {value!r}.", hint) from error
    return msgspec.convert(plain, kind)


def describe_section(kind: type[msgspec.Struct]) -> tuple[Any, ...]:
    """`core.options.describe` where the section's fields allow it, else nothing."""
    try:
        return describe(kind)
    except KeyError:
        return ()


def _near(word: str, names: Iterable[str]) -> str:
    names = list(names)
    close = difflib.get_close_matches(word, names, n=3)
    return f"Did you mean {' or '.join(close)}?" if close else f"There are: {', '.join(sorted(names))}."


def _plain(section: str, name: str, value: Any, default: Any) -> Any:
    """A list or table of TOML as the text that the struct holds; where it holds a list, one text is a list of one."""
    if isinstance(default, tuple):
        return [value] if isinstance(value, str) else value
    if name == "packing" and isinstance(value, bool):
        return "fit" if value else "off"
    if not isinstance(default, str):
        return value
    if isinstance(value, Mapping):
        if name not in TABLES:
            raise WeftError(ErrorKind.BAD_INPUT, f"[{section}] {name} cannot be a table.", "Write a text.")
        return "\n".join(f"{key} = {number}" for key, number in value.items())
    if isinstance(value, list):
        if name == "layer_replication":
            return ", ".join("-".join(str(n) for n in pair) if isinstance(pair, list) else str(pair) for pair in value)
        separator = ", " if name in LISTS else "\n" if name in LINES else " " if name in WORDS else ""
        if not separator or any(isinstance(item, (list, dict)) for item in value):
            raise WeftError(ErrorKind.BAD_INPUT, f"[{section}] {name} cannot be a list.", "Write a text.")
        return separator.join(str(item) for item in value)
    return value


def to_table(config: RunConfig) -> dict[str, dict[str, Any]]:
    """What differs from the defaults, as TOML would naturally hold it; `model.path`, files and the folder always."""
    found: dict[str, dict[str, Any]] = {}
    for section in msgspec.structs.fields(RunConfig):
        part, default = getattr(config, section.name), section.default
        table = {
            info.name: _natural(info.name, getattr(part, info.name))
            for info in msgspec.structs.fields(type(part))
            if getattr(part, info.name) != getattr(default, info.name)
            and (section.name != "data" or info.name not in IN_TRAIN)
        }
        if table:
            found[section.name] = msgspec.to_builtins(table)
    return found


def _natural(name: str, value: Any) -> Any:
    if not isinstance(value, str):
        return value
    if name in TABLES:
        return {key: int(n) if n == int(n) else n for key, n in pattern(value, name).items()}
    if name in LINES and "\n" in value:
        return lines(value)
    if name in ("targets", "exclude", "modules_to_save", "target_parameters") and value != "all-linear":
        return names(value)
    return value


def beside(config: RunConfig, folder: Path) -> RunConfig:
    """The config with relative paths made absolute, counted from `folder`. `starter` and library names stay."""

    def absolute(text: str) -> str:
        if not text:
            return text
        path = Path(text).expanduser()
        return str(path if path.is_absolute() else folder / path)

    def if_there(text: str) -> str:
        return absolute(text) if text and Path(absolute(text)).exists() else text

    replace = msgspec.structs.replace
    return replace(
        config,
        model=replace(config.model, path=if_there(config.model.path)),
        data=data_beside(config.data, absolute),
        method=replace(config.method, calibration=absolute(config.method.calibration)),
        output=replace(config.output, dir=absolute(config.output.dir)),
    )


def data_beside(data: DataConfig, absolute: Callable[[str], str]) -> DataConfig:
    """The data section with every path in it absolute."""
    return msgspec.structs.replace(
        data,
        files=tuple(absolute(each) for each in data.files),
        held_out_files=tuple(absolute(each) for each in data.held_out_files),
    )


# The texts that stand for lists and tables -----------------------------------------------------------


def lines(text: str) -> list[str]:
    """The lines that hold something."""
    return [line.strip() for line in text.splitlines() if line.strip()]


def names(text: str) -> list[str]:
    """Names separated by commas or blanks."""
    return [name for name in re.split(r"[,\s]+", text.strip()) if name]


def numbers(text: str, what: str) -> list[int]:
    """`0-3, 10` as 0, 1, 2, 3, 10 (the end included). Raises WeftError BAD_INPUT."""
    found: list[int] = []
    for part in names(text):
        match = re.fullmatch(r"(\d{1,4})(?:-(\d{1,4}))?", part)
        if match is None or (match[2] and int(match[2]) < int(match[1])):
            raise WeftError(ErrorKind.BAD_INPUT, f"{what}: {part!r} is not a number or a range.", "Write 0-3, 10.")
        found += range(int(match[1]), int(match[2] or match[1]) + 1)
    return list(dict.fromkeys(found))


def ranges(text: str, what: str) -> list[tuple[int, int]]:
    """`0-4, 2-5` as (0, 4), (2, 5). Raises WeftError BAD_INPUT."""
    found: list[tuple[int, int]] = []
    for part in names(text):
        match = re.fullmatch(r"(\d{1,4})-(\d{1,4})", part)
        if match is None or int(match[2]) <= int(match[1]):
            raise WeftError(ErrorKind.BAD_INPUT, f"{what}: {part!r} is not a range.", "Write 0-4, 2-5.")
        found.append((int(match[1]), int(match[2])))
    return found


def pattern(text: str, what: str) -> dict[str, float]:
    """Lines `name = number` as a table. Raises WeftError BAD_INPUT."""
    found: dict[str, float] = {}
    for line in lines(text):
        name, equals, number = line.rpartition("=")
        try:
            re.compile(name.strip())
            value = float(number)
        except (ValueError, re.error):
            value = 0.0
        if not equals or not name.strip() or not value > 0:
            raise WeftError(ErrorKind.BAD_INPUT, f"{what}: {line!r} is not a name and a number.", "Write q_proj = 32.")
        found[name.strip().strip('"')] = value
    return found
