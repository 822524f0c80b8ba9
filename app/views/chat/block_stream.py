"""From a stream of Markdown to a document: finished blocks are written once, the unfinished end as cheaply as it allows."""

from __future__ import annotations

import re
import time
from collections import deque

import msgspec

from app.views.chat.blocks import Block, BlockSplitter, fold_at, safe_cut
from app.views.chat.code_strips import CodeStrips, Progress
from app.views.chat.pen import Mark
from app.views.chat.writer import DocumentWriter

FRAME = 33  # milliseconds between renderings of a streaming tail
CODE_SLICE = 6000  # characters of code inserted at a time
LONG = 700  # characters of a paragraph from where only its end is written again
_PROSE = re.compile(r"[^\s>|#\-+*=\d`~$\\<]")


class BlockStream:
    """Writes one text, whole or as it comes.

    Attributes:
        tail_due: when (time.perf_counter) the unfinished end may be written again.
        hidden: the rest of a very long text, not shown.
    """

    def __init__(self, writer: DocumentWriter, strips: CodeStrips, progress: Progress, *, markup: bool) -> None:
        self._writer = writer
        self._strips = strips
        self._progress = progress  # `code_grows`: the unfinished end is a code block, and lies there as it is
        self._markup = markup
        self._splitter = BlockSplitter(markup=markup)
        self._queue: deque[Block] = deque()
        self._code_rest: str | None = None  # of a long code block that is inserted in slices
        self._tail_mark: Mark | None = None
        self._tail_text = ""
        self._inline_mark: Mark | None = None  # in a long paragraph: behind what is written for now
        self._inline_at = 0
        self.tail_due = 0.0
        self.hidden = ""

    @property
    def waiting(self) -> bool:
        """Whether finished blocks are still to be written."""
        return bool(self._queue or self._code_rest is not None)

    def feed(self, text: str) -> None:
        """Take the next piece."""
        self._splitter.feed(text)
        self._queue.extend(self._splitter.take())

    def finish(self) -> None:
        """No piece comes any more."""
        self._splitter.finish()
        self._queue.extend(self._splitter.take())

    def take_whole(self, text: str, *, folded: bool = True) -> None:
        """Take a text that is there in full, or the beginning of a very long one: see `hidden`."""
        cut = fold_at(text) if folded else len(text)
        self.hidden = text[cut:]
        self._splitter = BlockSplitter(markup=self._markup)
        self.feed(text[:cut])
        self.finish()

    # Finished blocks ------------------------------------------------------------------------------

    def write(self, deadline: float) -> bool:
        """Write finished blocks until `deadline` (time.perf_counter). Returns whether some are left."""
        while self.waiting:
            if self._code_rest is not None:
                self._write_code_slice(self._code_rest)
            else:
                self._write_finished(self._queue.popleft())
            if time.perf_counter() > deadline:
                break
        return self.waiting

    def _write_finished(self, block: Block) -> None:
        if self._tail_mark is not None and self._progress.code_grows and block.kind == "code":
            # The open code block was streamed in as it is: add what is missing instead of writing it again.
            self._tail_mark, self._progress.code_grows = None, False
            self._write_code_slice(block.text[len(self._tail_text) :])
            return
        self._drop_tail()
        if block.kind == "code":
            self._writer.open_code(block.language)
            self._write_code_slice(block.text)
        else:
            self._writer.write(block)
            self._strips.watch()

    def _write_code_slice(self, rest: str) -> None:
        piece, rest = rest[:CODE_SLICE], rest[CODE_SLICE:]
        if rest and "\n" in piece:
            cut = piece.rindex("\n") + 1
            piece, rest = piece[:cut], piece[cut:] + rest
        self._writer.append_code(piece)
        self._code_rest = rest or None
        if not rest:
            self._writer.close_code()
            self._strips.watch()

    # The unfinished end ---------------------------------------------------------------------------

    def write_tail(self) -> None:
        """Bring the unfinished block to the screen."""
        tail = self._splitter.tail
        if tail is None:
            self._drop_tail()
            return
        if tail.kind == "code":
            self._write_tail_code(tail)
            return
        now = time.perf_counter()
        if self._tail_mark is not None and tail.text == self._tail_text:
            return
        if self._tail_mark is not None and tail.text.startswith(self._tail_text):
            if self._inline_mark is not None:
                self._write_tail_inline(tail.text)
                return
            # Rewriting may take a tenth of the time at most; in between, text is just appended.
            if now < self.tail_due:
                return
        self._drop_tail()
        mark = self._tail_mark = self._writer.mark()
        self._writer.write(tail, final=False)
        self._strips.watch()
        self._tail_text = tail.text
        self.tail_due = now + max(FRAME / 1000, 10 * (time.perf_counter() - now))
        if len(tail.text) > LONG and tail.kind == "markdown" and _PROSE.match(tail.text):
            self._begin_inline(tail, mark)

    def _begin_inline(self, tail: Block, mark: Mark) -> None:
        """A paragraph has grown long: from now on only its end is written again."""
        self._inline_at = safe_cut(tail.text, 0)
        if not self._inline_at:
            return
        self._roll_back(mark)
        beginning = tail.text[: self._inline_at].rstrip()
        self._writer.write(msgspec.structs.replace(tail, text=beginning), final=False)
        self._inline_mark = self._writer.mark()
        self._tail_text = ""
        self._write_tail_inline(tail.text)

    def _write_tail_inline(self, text: str) -> None:
        """A long paragraph: only its last sentences are written again."""
        assert self._inline_mark is not None
        self._roll_back(self._inline_mark)
        if cut := safe_cut(text, self._inline_at):
            self._writer.write_inline(" " + text[self._inline_at : cut].strip())
            self._inline_mark = self._writer.mark()
            self._inline_at = cut
        if rest := text[self._inline_at :].strip():
            self._writer.write_inline(" " + rest)
        self._tail_text = text

    def _write_tail_code(self, tail: Block) -> None:
        if self._tail_mark is None or not self._progress.code_grows:
            self._drop_tail()
            self._tail_mark = self._writer.mark()
            self._progress.code_grows = True
            self._tail_text = ""
            self._writer.open_code(tail.language)
        if len(tail.text) > len(self._tail_text):
            self._writer.append_code(tail.text[len(self._tail_text) :])
            self._tail_text = tail.text
        self._strips.watch()

    def _drop_tail(self) -> None:
        self._inline_mark = None
        if self._tail_mark is not None:
            self._roll_back(self._tail_mark)
            self._strips.forget(self._tail_mark.codes)
            self._tail_mark = None
            self._progress.code_grows = False

    def _roll_back(self, mark: Mark) -> None:
        self._progress.touch(mark.position)
        self._writer.rollback(mark)
