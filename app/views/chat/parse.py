"""Markdown source to tokens: CommonMark with GFM's tables, strikethrough and task lists; math kept as written.

HTML is never interpreted: it stays text. Only web and mail addresses become links.
"""

from __future__ import annotations

import functools
import re
from typing import Any
from urllib.parse import urlsplit

from markdown_it import MarkdownIt
from markdown_it.rules_inline import StateInline
from markdown_it.token import Token

from app.views.chat.blocks import MAX_NESTING

ALLOWED_SCHEMES = ("http", "https", "mailto")
_BARE_URL = re.compile(r"https?://[^\s<>\"'`]+[^\s<>\"'`.,;:!?)\]}*_]")
_MATH_INLINE = re.compile(r"\$(?![\s$])(?:\\.|[^$\\\n])+?(?<![\s\\])\$(?!\d)")

_LOOKS_LIKE_MATH = re.compile(r"[\\^_={}<>+]")


@functools.cache
def _parser() -> MarkdownIt:
    parser = MarkdownIt("commonmark", {"html": False, "maxNesting": MAX_NESTING})
    parser.enable(["table", "strikethrough"]).disable(["html_block", "html_inline"])
    parser.inline.ruler.before("escape", "math", _math_rule)
    return parser


def parse(text: str, environment: dict[str, Any]) -> list[Token]:
    """Tokens of one block. `environment` carries link definitions from block to block."""
    return _parser().parse(text, environment)


def parse_inline(text: str, environment: dict[str, Any]) -> list[Token]:
    """Tokens of a piece of a paragraph."""
    return [child for token in _parser().parseInline(text, environment) for child in token.children or []]


def _math_rule(state: StateInline, silent: bool) -> bool:
    """Take `$…$`, `$$…$$`, `\\(…\\)` and `\\[…\\]` as they are, so that neither `_` nor `\\` in them is markup."""
    start, source = state.pos, state.src
    for opening, closing in (("\\(", "\\)"), ("\\[", "\\]"), ("$$", "$$")):
        if source.startswith(opening, start):
            end = source.find(closing, start + 2, start + 2000)
            if end < 0:
                return False
            end += 2
            inner = source[start + 2 : end - 2]
            break
    else:
        match = _MATH_INLINE.match(source, start, min(len(source), start + 400)) if source[start] == "$" else None
        if match is None:
            return False
        end, inner = match.end(), match[0][1:-1]
        if not (_LOOKS_LIKE_MATH.search(inner) or len(inner) == 1):
            return False  # "from 5$ to 10$" speaks of money
    if not inner.strip():
        return False
    if not silent:
        token = state.push("math", "", 0)
        token.content = inner.strip()
    state.pos = end
    return True


def safe_link(target: str) -> str:
    """The address when a click may offer to open it, else ""."""
    try:
        parts = urlsplit(target)
    except ValueError:
        return ""
    if parts.scheme.lower() not in ALLOWED_SCHEMES or any(ord(c) < 32 for c in target):
        return ""
    return target if parts.scheme.lower() == "mailto" or parts.netloc else ""


def split_links(text: str) -> list[tuple[str, str]]:
    """Cut plain text into (text, link) pieces at bare web addresses; link is "" for ordinary text."""
    if "://" not in text:
        return [(text, "")]
    pieces: list[tuple[str, str]] = []
    last = 0
    for match in _BARE_URL.finditer(text):
        if match.start() > last:
            pieces.append((text[last : match.start()], ""))
        pieces.append((match[0], safe_link(match[0])))
        last = match.end()
    if last < len(text):
        pieces.append((text[last:], ""))
    return pieces
