"""How a model's maker has it answer: the generation settings that lie beside or in its weights.

A folder has generation_config.json, a GGUF file the keys `general.sampling.*` (gguf 0.19 writes them, llama.cpp's own programs begin
with them), a model of Ollama's a layer of parameters. A new chat begins with these; what a person chose goes before them, Weft's
own defaults come after. The files are anybody's: a value that cannot be is left out, and said in `notes`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import msgspec

from app.core.errors import WeftError
from app.core.formats import GgufHeader, read_json
from app.core.options import OptionField, OptionValue, accepts, describe
from app.core.sampling import Sampling, stop_lines

MAX_NOTES = 6
MAX_STOPS, MAX_STOP = 16, 200
MAX_CONFIG = 1024 * 1024  # bytes


class OwnSampling(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Fields of `core.sampling.Sampling` that a model's maker sets; None where nothing is said. `notes` say what was left out."""

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    typical_p: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    penalty_range: int | None = None
    stop: str | None = None
    notes: tuple[str, ...] = ()

    def values(self) -> dict[str, OptionValue]:
        """What is set, by field."""
        found = {name: getattr(self, name) for name in self.__struct_fields__ if name != "notes"}
        return {name: value for name, value in found.items() if value is not None}


_FIELDS = {field.name: field for field in describe(Sampling) if field.name in OwnSampling.__struct_fields__}

# Names in the files, and the fields that they are. What has no field here is not taken: lengths (`max_new_tokens` holds an
# example's length more often than a wish), seeds, and ways to search that no loader has.
_FOLDER = {
    name: name for name in ("temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty")
}  # as Transformers calls them
_GGUF = {
    "temp": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "penalty_repeat": "repetition_penalty",
    "penalty_last_n": "penalty_range",
}
_OLLAMA = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "typical_p": "typical_p",
    "repeat_penalty": "repetition_penalty",
    "repeat_last_n": "penalty_range",
    "frequency_penalty": "frequency_penalty",
    "presence_penalty": "presence_penalty",
}


def of_folder(folder: Path) -> OwnSampling:
    """What generation_config.json says; never raises.

    `do_sample` false takes the likeliest token, whatever stands beside it. Transformers counts repetitions over everything that
    was read, so a repetition penalty comes with the range -1.
    """
    path = folder / "generation_config.json"
    if not path.is_file():
        return OwnSampling()
    try:
        config = read_json(path, MAX_CONFIG)
    except WeftError as error:
        return OwnSampling(notes=(f"{error.message} Weft's own settings are used.",))
    taken = _Taken(path.name)
    taken.take(config, _FOLDER)
    sample = config.get("do_sample")
    if sample is False:
        taken.values["temperature"] = 0.0
    elif sample is not None and not isinstance(sample, bool):
        taken.leave_out("do_sample", sample, "It takes true or false.")
    if taken.values.get("repetition_penalty", 1) != 1:
        taken.values["penalty_range"] = -1
    stops = config.get("stop_strings")
    taken.take_stops("stop_strings", [stops] if isinstance(stops, str) else stops)
    return taken.made()


def write_for_converter(folder: Path) -> None:
    """Put a generation_config.json in its place that llama.cpp's converter makes `general.sampling.*` of.

    It knows some of the names alone, nothing of `do_sample`, and ends with an error where a value is of another type.
    """
    path = folder / "generation_config.json"
    if path.is_file():
        values = of_folder(folder).values()
        names = {name: values[field] for name, field in _GGUF.items() if field in values}
        if "temp" in names:
            names["temperature"] = names.pop("temp")
        path.write_bytes(msgspec.json.encode(names))


def of_gguf(header: GgufHeader) -> OwnSampling:
    """What the keys `general.sampling.*` say; never raises."""
    taken = _Taken("its header")
    start = "general.sampling."
    given = {key.removeprefix(start): value for key, value in header.metadata.items() if key.startswith(start)}
    # Stored in 32 bits: 0.6 comes as 0.6000000238418579.
    shortened = {key: float(f"{v:.6g}") if isinstance(v, float) else v for key, v in given.items()}
    taken.take(shortened, _GGUF)
    return taken.made()


def of_ollama(path: Path) -> OwnSampling:
    """What a layer of parameters says; never raises."""
    try:
        parameters = read_json(path, MAX_CONFIG)
    except WeftError as error:
        return OwnSampling(notes=(f"Its parameters cannot be read. {error.message}",))
    taken = _Taken("its parameters")
    taken.take(parameters, _OLLAMA)
    taken.take_stops("stop", parameters.get("stop"))
    return taken.made()


class _Taken:
    """Values found in one place, and what was wrong there."""

    def __init__(self, place: str) -> None:
        self._place = place
        self.values: dict[str, OptionValue] = {}
        self._notes: list[str] = []

    def take(self, given: Mapping[str, object], names: Mapping[str, str]) -> None:
        for name, field in names.items():
            value = given.get(name)
            if value is None:
                continue
            number = _number(_FIELDS[field], value)
            if number is None:
                self.leave_out(name, value, accepts(_FIELDS[field]))
            else:
                self.values[field] = number

    def take_stops(self, name: str, given: object) -> None:
        if given is None:
            return
        listed = list(cast("list[object]", given)) if isinstance(given, list) else None
        texts = [
            text
            for text in listed or ()
            if isinstance(text, str) and stop_lines([text]).strip() and len(text) <= MAX_STOP
        ]
        if listed is None or len(texts) != len(listed) or len(texts) > MAX_STOPS:
            self.leave_out(
                name, cast("object", given), f"It takes up to {MAX_STOPS} texts of at most {MAX_STOP} characters."
            )
        elif texts:
            self.values["stop"] = stop_lines(texts)

    def leave_out(self, name: str, value: object, takes: str) -> None:
        shown = repr(value) if not isinstance(value, int) or abs(value) < 10**30 else "a number of many digits"
        shown = shown if len(shown) <= 40 else shown[:39] + "\N{HORIZONTAL ELLIPSIS}"
        self._notes.append(f"{name} in {self._place} cannot be {shown} and is left out. {takes}")

    def made(self) -> OwnSampling:
        return msgspec.convert({**self.values, "notes": tuple(self._notes[:MAX_NOTES])}, OwnSampling)


def _number(field: OptionField, value: object) -> int | float | None:
    """The value as this field takes it, None when it does not: no bool, no text, nothing infinite, in the field's range."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    if isinstance(value, float) and not math.isfinite(value):
        return None
    low, high = field.minimum, field.maximum
    if (low is not None and value < low) or (high is not None and value > high):
        return None
    if field.kind == "int":
        return int(value) if value == int(value) and abs(value) < 2**31 else None
    return float(value)
