"""Options as structs: described, built, and read from the command line."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
import pytest

from app.backends import specs
from app.core.errors import ErrorKind, WeftError
from app.core.options import accepts, build, describe, option, parse_assignments
from app.core.sampling import Sampling


class Options(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    length: (
        Annotated[int, option("Length", "How long.", ge=8, le=2**32 - 2, automatic="from the model", aliases=("n_ctx",))] | None
    ) = None
    share: Annotated[float, option("Share", "How much.", ge=0, le=1)] = 0.5
    fast: Annotated[bool, option("Fast", "Or not.")] = False
    kind: Annotated[Literal["one", "two"], option("Kind", "Which.")] = "one"
    old: Annotated[bool, option("Old", "Once.", replaced="The library does it by itself.")] = False


FIELDS = {field.name: field for field in describe(Options)}


def test_a_field_is_described_as_a_form_needs_it() -> None:
    length = FIELDS["length"]
    assert (length.kind, length.optional, length.minimum, length.maximum) == ("int", True, 8, 2**32 - 2)
    assert FIELDS["kind"].choices == ("one", "two") and FIELDS["old"].replaced
    assert [field.default for field in FIELDS.values()] == [None, 0.5, False, "one", False]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("length=4096", {"length": 4096}),
        ("n-ctx=4_096", {"length": 4096}),
        ("length=auto", {"length": None}),
        ("share=0.25", {"share": 0.25}),
        ("fast=yes", {"fast": True}),
        ("KIND=two", {"kind": "two"}),
    ],
)
def test_assignments_are_read_as_people_type_them(text: str, value: dict[str, object]) -> None:
    assert parse_assignments(Options, [text]) == value


@pytest.mark.parametrize(
    ("text", "words", "next_step"),
    [
        ("length", "has no value", "length=VALUE"),
        ("lenght=3", "not an option", "length"),
        ("zzz=3", "not an option", "share"),
        ("length=many", "cannot be", "from 8 to 4294967294 or auto (from the model)"),
        ("fast=perhaps", "cannot be", "true or false"),
    ],
)
def test_what_cannot_be_read_says_what_can(text: str, words: str, next_step: str) -> None:
    with pytest.raises(WeftError) as caught:
        parse_assignments(Options, [text])
    assert caught.value.kind is ErrorKind.BAD_INPUT
    assert words in caught.value.message and next_step in caught.value.hint


@pytest.mark.parametrize("values", [{"length": 7}, {"share": 1.5}, {"kind": "three"}, {"fast": "x"}, {"nope": 1}])
def test_wrong_values_are_refused_in_words(values: dict[str, object]) -> None:
    with pytest.raises(WeftError) as caught:
        build(Options, values)  # type: ignore[arg-type]
    assert "`" not in str(caught.value), "a type of Python's is no word for a person"


def test_defaults_stay_where_nothing_is_said() -> None:
    assert build(Options, {}) == Options()
    assert build(Options, {"length": None, "share": 1}) == Options(share=1.0)


@pytest.mark.parametrize("struct", [Sampling, *(spec.options for spec in specs().values())])
def test_every_option_of_weft_has_words_and_a_default_that_it_accepts(struct: type[msgspec.Struct]) -> None:
    for field in describe(struct):
        assert field.title and len(field.help) > 8 and accepts(field).startswith("It takes")
        assert build(struct, {field.name: field.default}) == struct()
