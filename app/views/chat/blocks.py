"""Cut Markdown into top-level blocks as it streams in, so that finished blocks are rendered once.

A block is final as soon as a later line can no longer change it. The cuts depend on the text alone, never
on how it arrived in pieces: a streamed answer ends up exactly as the same text rendered at once.
Work is linear in the text; no Qt in here.
"""

from __future__ import annotations

import re
from typing import Literal

import msgspec

BlockKind = Literal["markdown", "code", "math", "plain"]

# A longer paragraph is broken: laying out and parsing one block must stay far below a frame's time.
MAX_BLOCK = 2000
PIECE = 1000
MAX_BARS = 100  # of table cells; each costs as much as a line of text
MAX_NESTING = 24
FOLD = 96_000  # characters, or what takes as long to lay out: that much of a message is shown at first
LINE_WEIGHT = 10
BAR_WEIGHT = 60

_FENCE = re.compile(r"^( {0,3})(`{3,}|~{3,})[ \t]*([^\n]*)$")
_ITEM = re.compile(r"^ {0,1}([-*+]|(\d{1,9})([.)]))(?:[ \t]+|$)")
_RULE = re.compile(r"^ {0,3}(?:(?:\*[ \t]*){3,}|(?:-[ \t]*){3,}|(?:_[ \t]*){3,})$")
_HEADING = re.compile(r"^ {0,3}#{1,6}(?:[ \t]|$)")
_MATH_OPEN = re.compile(r"^ {0,3}(\$\$|\\\[)")
_INNER_FENCE = re.compile(r"^\s*(?:[-*+]\s+|\d+[.)]\s+)?(`{3,}|~{3,})")
_DELIMITERS = re.compile(r"^ {0,3}\|?(?: *:?-+:? *\|)* *:?-+:? *\|? *$")


class Block(msgspec.Struct, frozen=True, kw_only=True):
    """One piece of a message.

    Attributes:
        kind: `markdown` is parsed; `code`, `math` and `plain` are shown as they are.
        text: the source; for code what stands between the fences.
        language: of a code block, as written after the fence.
        ordinal: for an item of an ordered list that goes on from the block before: its number.
        continues: this is the rest of a paragraph that was broken for its length.
    """

    kind: BlockKind
    text: str
    language: str = ""
    ordinal: int | None = None
    continues: bool = False


class BlockSplitter:
    """Feed text, take finished blocks, look at the unfinished one.

    Args:
        markup: False takes only code fences as markup and leaves everything else as typed (what a user wrote).
    """

    def __init__(self, *, markup: bool = True) -> None:
        self._markup = markup
        self._finished: list[Block] = []
        self._lines: list[str] = []
        self._size = self._bars = 0
        self._partial = ""
        self._blank = False  # an empty line came since the last text line
        self._fence: tuple[str, int, str] | None = None  # open top-level fence: mark, indent, language
        self._inner_fence = ""  # fence open inside a list item
        self._math = ""  # what closes the open math block
        self._marker = ""  # of the list that the current block is an item of
        self._number = 0
        self._ordinal: int | None = None
        self._continues = False

    def feed(self, text: str) -> None:
        """Take the next piece of the source."""
        pieces = (self._partial + text.replace("\0", "\ufffd")).split("\n")
        self._partial = pieces.pop()
        for piece in pieces:
            self._long_line(piece.rstrip("\r"), whole=True)
        if len(self._partial) > MAX_BLOCK:
            self._partial = self._long_line(self._partial, whole=False)

    def finish(self) -> None:
        """No more text comes: the open block is final."""
        if self._partial:
            partial, self._partial = self._partial, ""
            self._long_line(partial.rstrip("\r"), whole=True)
        if self._fence is not None:
            self._close_fence()
        self._flush()

    def take(self) -> list[Block]:
        """The blocks that became final since the last call."""
        finished, self._finished = self._finished, []
        return finished

    @property
    def tail(self) -> Block | None:
        """The unfinished block as it stands, or None."""
        partial = self._partial.rstrip("\r")
        if self._fence is not None:
            mark, indent, language = self._fence
            closing = partial.strip()
            lines = list(self._lines)
            if partial and not (closing and mark.startswith(closing[: len(mark)]) and not closing.strip(mark[0])):
                lines.append(_unindent(partial, indent))
            return Block(kind="code", text="\n".join(lines), language=language)
        if not self._lines and not partial.strip():
            return None
        if self._math:
            return Block(kind="math", text="\n".join([*self._lines, partial] if partial else self._lines))
        return self._block([*self._lines, partial] if partial else list(self._lines))

    # -- lines ------------------------------------------------------------------------------------

    def _long_line(self, line: str, *, whole: bool) -> str:
        """Take a line, in pieces when it is very long. Returns what is left when it is not `whole` yet."""
        if len(line) > MAX_BLOCK and self._fence is None:
            start = 0
            while len(line) - start > MAX_BLOCK:
                space = line.rfind(" ", start + PIECE // 2, start + PIECE)
                cut = space + 1 if space > 0 else start + PIECE
                self._line(line[start:cut])
                self._flush()
                self._continues = True
                start = cut
            line = line[start:]
        if whole:
            self._line(line)
            return ""
        return line

    def _line(self, line: str) -> None:
        if self._fence is not None:
            mark, indent, _ = self._fence
            if _closes(line, mark):
                self._close_fence()
            else:
                self._lines.append(_unindent(line, indent))
        elif not self._markup:
            self._plain_line(line)
        elif self._inner_fence:
            self._append(line)
            if line.strip().startswith(self._inner_fence) and not line.strip().strip(self._inner_fence[0]):
                self._inner_fence = ""
        elif self._math:
            self._append(line)
            if self._math in line or self._size > MAX_BLOCK:
                self._flush_math()
        elif not line.strip():
            self._blank = True
            if self._lines:
                self._append("")
        else:
            self._text_line(line.expandtabs(4) if line[0] == "\t" else line)
            self._blank = False

    def _plain_line(self, line: str) -> None:
        if fence := _opening(line):
            self._flush()
            self._fence = fence
        else:
            self._append(line)
            if self._size > PIECE:
                self._flush()
                self._continues = True

    def _text_line(self, line: str) -> None:
        indent = len(line) - len(line.lstrip(" "))
        item = None if _RULE.match(line) else _ITEM.match(line)
        if (fence := _opening(line)) and (not self._marker or indent < 2):
            self._flush()
            self._fence = fence
        elif item and self._starts_item(item):
            self._start_item(item, line)
        elif _HEADING.match(line) and (not self._marker or indent < 2):
            self._flush()
            self._append(line)
            self._flush()
        elif (math := _MATH_OPEN.match(line)) and not self._marker:
            self._flush()
            self._append(line)
            self._math = "$$" if math[1] == "$$" else "\\]"
            if self._math in line[math.end() :]:
                self._flush_math()
        else:
            if self._blank and self._lines and not self._goes_on(indent):
                self._flush()
            self._append(line)
            self._watch_fence(line)
            self._bars += line.count("|")
            if self._size > MAX_BLOCK or self._bars > MAX_BARS:
                self._break()

    def _break(self) -> None:
        """The open block is long enough: go on in another; a table takes its header along."""
        head = self._lines[:2] if len(self._lines) > 2 and _DELIMITERS.match(self._lines[1]) else []
        self._flush()
        self._continues = True
        if sum(map(len, head)) < MAX_BLOCK // 4:
            for line in head:
                self._append(line)

    def _goes_on(self, indent: int) -> bool:
        """Whether an indented line after an empty one still belongs to the open block."""
        return indent >= 2 if self._marker else indent >= 4 and self._lines[0].startswith("    ")

    def _starts_item(self, item: re.Match[str]) -> bool:
        if self._marker or self._blank or not self._lines:
            return True
        if self._lines[-1].lstrip().startswith(">"):
            return False
        # Only these may interrupt a paragraph (CommonMark 5.2).
        return item.end() < len(item.string) and (item[2] is None or int(item[2]) == 1)

    def _start_item(self, item: re.Match[str], line: str) -> None:
        marker = item[3] or item[1]
        goes_on = self._marker == marker
        number = self._number + 1 if goes_on else int(item[2] or 0)
        self._flush()
        self._marker, self._number = marker, number
        self._ordinal = number if goes_on and item[2] is not None else None
        self._append(line)
        self._watch_fence(line)

    def _watch_fence(self, line: str) -> None:
        if self._marker and (inner := _INNER_FENCE.match(line)):
            self._inner_fence = inner[1]

    def _append(self, line: str) -> None:
        self._lines.append(line)
        self._size += len(line) + 1

    # -- blocks -----------------------------------------------------------------------------------

    def _flush(self) -> None:
        if any(line.strip() for line in self._lines):
            self._finished.append(self._block(self._lines))
            self._continues = False
        self._reset()

    def _flush_math(self) -> None:
        self._finished.append(Block(kind="math", text="\n".join(self._lines)))
        self._reset()

    def _close_fence(self) -> None:
        assert self._fence is not None
        self._finished.append(Block(kind="code", text="\n".join(self._lines), language=self._fence[2]))
        self._fence = None
        self._continues = False
        self._reset()

    def _reset(self) -> None:
        self._lines = []
        self._size = self._bars = 0
        self._marker = self._inner_fence = self._math = ""
        self._ordinal = None
        self._blank = False

    def _block(self, lines: list[str]) -> Block:
        text = "\n".join(lines).strip("\n")
        kind: BlockKind = "markdown" if self._markup and not pathological(text) else "plain"
        return Block(kind=kind, text=text, ordinal=self._ordinal, continues=self._continues)


def fold_at(text: str) -> int:
    """Where a very long message is folded: what comes before can be laid out in a moment. Its length when it need not be."""
    if len(text) < FOLD // BAR_WEIGHT:
        return len(text)
    at = weight = 0
    for line in text.split("\n"):
        cost = len(line) + LINE_WEIGHT + BAR_WEIGHT * line.count("|")
        if weight + cost > FOLD:
            return at or FOLD
        weight += cost
        at += len(line) + 1
    return len(text)


def safe_cut(text: str, start: int) -> int:
    """How far from `start` a paragraph's text can be parsed apart from the rest: 0 when it cannot."""
    cut = max(text.rfind(". ", start), text.rfind(", ", start), text.rfind(": ", start)) + 2
    if cut < start + 200:
        return 0
    piece = text[start:cut]
    even = all(piece.count(mark) % 2 == 0 for mark in "`*_$~")
    return cut if even and piece.count("[") == piece.count("]") and piece.count("(") == piece.count(")") else 0


def pathological(text: str) -> bool:
    """Whether a block is built to make a parser or a layout slow, rather than to be read."""
    if text.count("[") > 400 or text.count("|") > 2 * MAX_BARS:
        return True
    return any(_depth(line) > MAX_NESTING for line in text.split("\n", 400)[:400])


def _depth(line: str) -> int:
    """How many block containers a line opens or continues."""
    depth = 0
    for word in line[:400].replace(">", "> ").split():
        if word in (">", "-", "*", "+") or (len(word) < 10 and word[-1] in ".)" and word[:-1].isdigit()):
            depth += 1
        else:
            break
    return depth + (len(line) - len(line.lstrip(" "))) // 4


def _opening(line: str) -> tuple[str, int, str] | None:
    """A fence's mark, indent and language when the line opens one."""
    match = _FENCE.match(line)
    if match is None or (match[2][0] == "`" and "`" in match[3]):
        return None
    words = match[3].strip().split(None, 1)
    return match[2], len(match[1]), words[0].strip("{}.")[:40] if words else ""


def _closes(line: str, mark: str) -> bool:
    text = line.strip()
    return len(line) - len(line.lstrip(" ")) < 4 and text.startswith(mark) and not text.strip(mark[0])


def _unindent(line: str, indent: int) -> str:
    spaces = len(line) - len(line.lstrip(" "))
    return line[min(indent, spaces) :]
