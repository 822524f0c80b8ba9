"""Grammars for llama.cpp: a strict check of GBNF before the library sees it, and JSON schema to GBNF.

The library crashes on some malformed grammars, and takes for ever on some absurd ones; what passes this check it can
take. The syntax is that of llama.cpp's own parser (llama-grammar.cpp), with bounds.
"""

from __future__ import annotations

import json
import re
from typing import Any, NoReturn

from app.core.errors import ErrorKind, WeftError

LARGEST = 256 * 1024  # characters
DEEPEST = 64  # nested brackets
MOST_RULES = 4_000
MOST_ELEMENTS = 200_000  # after repetitions are written out, as the library does
LARGEST_REPETITION = 2_000  # the library's own limit
_NAME = re.compile(r"[a-zA-Z0-9-]+")
_INT = re.compile(r"[0-9]{1,9}")
_HEX = {"x": 2, "u": 4, "U": 8}


class GrammarCheck:
    """One pass over a grammar. `check()` raises WeftError at the first thing that the library would not take."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0
        self.rules: dict[str, list[list[str]]] = {}  # name to alternatives, each the names it could begin with
        self.named: dict[str, int] = {}  # rules referred to, and where first
        self.elements = 0
        self.parts: dict[str, set[str]] = {}  # of each rule, the rules it refers to; "" stands for characters
        self._now = ""  # the rule being read

    def check(self) -> None:
        """Raises WeftError: BAD_INPUT, naming line and column."""
        if len(self.text) > LARGEST:
            self._fail(f"it has {len(self.text):,} characters; at most {LARGEST:,} are allowed")
        if "\0" in self.text:
            self.at = self.text.index("\0")
            self._fail("there is a zero byte")
        self._space(newline=True)
        while self.at < len(self.text):
            self._rule()
        for name, place in self.named.items():
            if name not in self.rules:
                self.at = place
                self._fail(f"there is no rule {name!r}")
        if "root" not in self.rules:
            self.at = 0
            self._fail("there is no rule named root, with which an answer begins")
        self._left_recursion()
        if not self._takes_characters():
            self.at = 0
            self._fail("it allows no text at all, so every answer would be empty")

    def _takes_characters(self) -> bool:
        """Whether an answer can have any text: some rule that is reached from root names a character."""
        reached, pending = set[str](), ["root"]
        while pending:
            name = pending.pop()
            if not name:
                return True
            if name not in reached:
                reached.add(name)
                pending += self.parts[name]
        return False

    def _rule(self) -> None:
        name = self._name()
        self._space(newline=False)
        if not self.text.startswith("::=", self.at):
            self._fail("expected ::= after the rule's name")
        self.at += 3
        self._space(newline=True)
        if name in self.rules:
            self._fail(f"the rule {name!r} is there twice")
        self.rules[name] = []
        self.parts[name] = set()
        self._now = name
        if len(self.rules) > MOST_RULES:
            self._fail(f"there are more than {MOST_RULES:,} rules")
        _, starts = self._alternatives(depth=0)
        self.rules[name] = starts
        if self.text.startswith("\r\n", self.at):
            self.at += 2
        elif self._peek() in ("\r", "\n"):
            self.at += 1
        elif self.at < len(self.text):
            self._fail("expected the end of the line")
        self._space(newline=True)

    def _alternatives(self, depth: int) -> tuple[bool, list[list[str]]]:
        """Whether it can be empty, and what each alternative can begin with."""
        if depth > DEEPEST:
            self._fail(f"brackets are nested deeper than {DEEPEST}")
        empty, starts = self._sequence(depth)
        found = [starts]
        while self._peek() == "|":
            self.at += 1
            self._space(newline=True)
            other_empty, starts = self._sequence(depth)
            found.append(starts)
            empty = empty or other_empty
        return empty, found

    def _sequence(self, depth: int) -> tuple[bool, list[str]]:
        # `starts`: rules that this sequence could begin with. A rule may turn out to be possibly empty, so everything
        # up to and with the first symbol that surely takes a character counts; "" marks such a rule for the closure.
        starts: list[str] = []
        open_end = True  # nothing so far surely takes a character
        last, factor = 0, 1
        last_empty = False
        while (character := self._peek()) and character not in "|)\r\n":
            if character in "*+?{":
                if last == 0:
                    self._fail("there is nothing before the repetition")
                least, most = self._repetition(depth)
                factor *= max(least, most or 0, 1)
                if factor > LARGEST_REPETITION:
                    self._fail(f"the repetitions multiply to more than {LARGEST_REPETITION}")
                # As the library writes it out: the symbol `least` times, and a rule of its own for each further one.
                optional = 1 if most is None else most - least
                self._count(last * max(0, least - 1) + (last + 2) * optional)
                last = last * least + 1
                if least == 0:
                    last_empty = True
                    open_end = open_end or self._was_open
            else:
                self._was_open = open_end
                last, begins, last_empty = self._symbol(character, depth)
                factor = 1
                self._count(last)
                if open_end:
                    starts += begins
                    open_end = last_empty or any(begins)
                self._space(newline=depth > 0)
        return open_end, starts

    _was_open = True

    def _symbol(self, character: str, depth: int) -> tuple[int, list[str], bool]:
        """Read one symbol: its size, the rules it can begin with, whether it can be empty."""
        if character == '"':
            self.at += 1
            size = 0
            while self._peek() != '"':
                self._character()
                size += 1
            self.at += 1
            if size:
                self.parts[self._now].add("")
            return max(size, 1), [], size == 0
        if character in "[.":
            self.parts[self._now].add("")
        if character == "[":
            return self._set(), [], False
        if character == ".":
            self.at += 1
            return 1, [], False
        if character == "(":
            self.at += 1
            self._space(newline=True)
            empty, starts = self._alternatives(depth + 1)
            if self._peek() != ")":
                self._fail("a bracket is not closed")
            self.at += 1
            return 1, [name for group in starts for name in group], empty
        if _NAME.match(character):
            place = self.at
            name = self._name()
            self.named.setdefault(name, place)
            self.parts[self._now].add(name)
            return 1, [name], False
        raise self._error(
            "tokens such as <name> are not supported" if character in "<!" else f"{character!r} has no place here"
        )

    def _set(self) -> int:
        self.at += 1
        if self._peek() == "^":
            self.at += 1
        size = 0
        while self._peek() != "]":
            low = self._character()
            size += 1
            if self._peek() == "-" and self.text[self.at + 1 : self.at + 2] != "]":
                self.at += 1
                if self._character() < low:
                    self._fail("the range runs backwards")
        self.at += 1
        if not size:
            self._fail("the brackets [] hold no character")
        return size

    def _character(self) -> int:
        character = self._peek()
        if not character:
            self._fail("the grammar ends too early")
        self.at += 1
        if character != "\\":
            return ord(character)
        escape = self._peek()
        self.at += 1
        if escape in _HEX:
            digits = self.text[self.at : self.at + _HEX[escape]]
            if not re.fullmatch(rf"[0-9a-fA-F]{{{_HEX[escape]}}}", digits):
                self._fail(f"\\{escape} takes {_HEX[escape]} hexadecimal digits")
            self.at += len(digits)
            if int(digits, 16) > 0x10FFFF:
                self._fail("there is no such character")
            return int(digits, 16)
        plain = {"t": "\t", "r": "\r", "n": "\n", "\\": "\\", '"': '"', "[": "[", "]": "]", "-": "-"}
        if escape not in plain or not escape:
            self._fail(f"there is no escape \\{escape}")
        return ord(plain[escape])

    def _repetition(self, depth: int) -> tuple[int, int | None]:
        """Least and most times; None for no end."""
        character = self._peek()
        self.at += 1
        if character != "{":
            self._space(newline=depth > 0)
            return {"*": (0, None), "+": (1, None), "?": (0, 1)}[character]
        self._space(newline=depth > 0)
        least = self._int()
        most: int | None = least
        self._space(newline=depth > 0)
        if self._peek() == ",":
            self.at += 1
            self._space(newline=depth > 0)
            most = self._int() if self._peek() in tuple("0123456789") else None
            self._space(newline=depth > 0)
        if self._peek() != "}":
            self._fail("expected } after the number of repetitions")
        self.at += 1
        self._space(newline=depth > 0)
        if max(least, most or 0) > LARGEST_REPETITION:
            self._fail(f"at most {LARGEST_REPETITION} repetitions are allowed")
        if most is not None and (most < least or most == 0):
            self._fail("the greater number of repetitions must come second, and be at least 1")
        return least, most

    def _int(self) -> int:
        found = _INT.match(self.text, self.at)
        if not found:
            self._fail("expected a whole number of repetitions")
        self.at = found.end()
        return int(found[0])

    def _name(self) -> str:
        found = _NAME.match(self.text, self.at)
        if not found:
            self._fail("expected a rule's name, of letters, digits and dashes")
        self.at = found.end()
        return found[0]

    def _space(self, *, newline: bool) -> None:
        blanks = " \t\r\n" if newline else " \t"
        while (character := self._peek()) and (character in blanks or character == "#"):
            if character == "#":
                while self._peek() not in ("", "\r", "\n"):
                    self.at += 1
            else:
                self.at += 1

    def _peek(self) -> str:
        return self.text[self.at : self.at + 1]

    def _count(self, elements: int) -> None:
        self.elements += elements
        if self.elements > MOST_ELEMENTS:
            self._fail("written out, its repetitions are too many")

    def _left_recursion(self) -> None:
        begins = {name: {n for group in groups for n in group} for name, groups in self.rules.items()}
        done: set[str] = set()
        for first in begins:
            if first in done:
                continue
            path: list[tuple[str, list[str]]] = [(first, list(begins[first]))]
            on_path = {first}
            while path:
                name, rest = path[-1]
                if not rest:
                    path.pop()
                    on_path.discard(name)
                    done.add(name)
                    continue
                following = rest.pop()
                if following in on_path:
                    self.at = max(0, self.text.find(following))
                    self._fail(f"the rule {following!r} can begin with itself, which never ends")
                if following not in done:
                    path.append((following, list(begins[following])))
                    on_path.add(following)
                    if len(path) > 500:
                        self._fail("rules refer to one another in a chain of more than 500")

    def _fail(self, what: str) -> NoReturn:
        raise self._error(what)

    def _error(self, what: str) -> WeftError:
        line = self.text.count("\n", 0, self.at) + 1
        column = self.at - (self.text.rfind("\n", 0, self.at) + 1) + 1
        return WeftError(
            ErrorKind.BAD_INPUT,
            f"The grammar cannot be used: {what} (line {line}, column {column}).",
            'Write it in GBNF, such as: root ::= "yes" | "no"',
        )


def check_grammar(text: str) -> None:
    """Refuse a GBNF grammar that llama.cpp could not take.

    Raises:
        WeftError: BAD_INPUT, naming what is wrong, line and column.
    """
    GrammarCheck(text).check()


def schema_grammar(schema: str) -> str:
    """The GBNF grammar of a JSON schema, through llama-cpp-python's own converter.

    Raises:
        WeftError: BAD_INPUT when it is no schema, or uses what the converter does not know.
    """
    hint = 'Write a JSON schema, such as {"type": "object", "properties": {"name": {"type": "string"}}}.'
    try:
        value: Any = json.loads(schema)
    except (ValueError, RecursionError) as error:
        raise WeftError(ErrorKind.BAD_INPUT, f"The JSON schema is not valid JSON: {error}.", hint) from None
    if not isinstance(value, dict):
        raise WeftError(ErrorKind.BAD_INPUT, "The JSON schema must be an object.", hint)
    from llama_cpp.llama_grammar import json_schema_to_gbnf

    try:
        grammar = json_schema_to_gbnf(schema)
    except (
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        AssertionError,
        IndexError,
        RecursionError,
        re.error,
    ) as error:
        # The converter raises whatever it stumbles over; all of it means that it cannot follow the schema.
        what = str(error).strip().split("\n")[0][:200] or type(error).__name__
        raise WeftError(
            ErrorKind.BAD_INPUT, f"The JSON schema cannot be turned into a grammar: {what}.", hint
        ) from None
    check_grammar(grammar)
    return grammar
