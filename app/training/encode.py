"""Rows as token sequences with labels: the tokenizer's side of training data. Needs transformers' tokenizer, no torch."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import msgspec

from app.core.errors import ErrorKind, WeftError
from app.generation.template import DEFAULT_TEMPLATE
from app.training.data_config import DataConfig, DataReport, FileReport
from app.training.formats import BadRowError, Message, Row
from app.training.rows import Rows, load_rows
from app.training.spans import SpanFinder
from app.training.templates import NAMED
from app.training.tokenizer import own_template, start_tokens

MASKED = -100  # the label that every loss in transformers and torch leaves out
_AT_ONCE = 256  # rows that are handed to template and tokenizer together
_LARGEST_CHUNK = 2_000_000  # characters of them
_LONGEST_CONVERSATION = 2_000_000  # characters; the process that renders templates has little memory, on purpose
Cancelled = Callable[[], bool]


@dataclass(slots=True)
class Example:
    """A token sequence to learn from.

    Attributes:
        input_ids: tokens (int32 array). labels: the same token where it is learnt, else MASKED; never at position 0,
            which nothing predicts, so that sequences can be joined. Not shifted: the loss shifts.
        file, line: where it came from (number in `report.files`). group: equal for equal rows and for parts of one document.
        held: it came from a held-out file.
    """

    input_ids: array[int]
    labels: array[int]
    file: int
    line: int
    group: bytes
    held: bool = False

    @property
    def trained(self) -> int:
        """How many tokens are learnt."""
        return len(self.labels) - self.labels.count(MASKED)


@dataclass(slots=True)
class Pair:
    """A preference: a prompt and two answers, as tokens. The rest is as in `Example`."""

    prompt_ids: array[int]
    chosen_ids: array[int]
    rejected_ids: array[int]
    file: int
    line: int
    group: bytes
    held: bool = False

    def example(self, part: str) -> Example:
        """Prompt and `chosen` or `rejected` as one sequence, of which the answer is learnt."""
        answer = self.chosen_ids if part == "chosen" else self.rejected_ids
        labels = array("i", [MASKED]) * len(self.prompt_ids) + answer
        if labels and not self.prompt_ids:
            labels[0] = MASKED
        return Example(self.prompt_ids + answer, labels, self.file, self.line, self.group, self.held)


@dataclass(slots=True)
class Encoded:
    """All data of a run as tokens.

    Attributes:
        examples: what is learnt from; empty for preference data. pairs: the preferences.
        template: source of the chat template that was used; "" when none was needed.
    """

    examples: list[Example]
    pairs: list[Pair]
    report: DataReport
    template: str = ""

    @property
    def preference(self) -> bool:
        return bool(self.pairs)


def encode(
    rows: Rows,
    tokenizer: Any,
    config: DataConfig,
    *,
    progress: Callable[[int], None] = lambda rows: None,
    cancelled: Cancelled = lambda: False,
    allow_empty: bool = False,
) -> Encoded:
    """Read all rows and make tokens of them.

    Args:
        tokenizer: transformers'. progress: is told the number of rows read so far.
        allow_empty: no error when nothing usable is left.

    Raises:
        WeftError: BAD_INPUT when nothing usable is left (the first reasons are in the message), or when preference rows
            and others are mixed; CANCELLED; CORRUPT or HOSTILE for the chat template.
    """
    source = chosen_template(tokenizer, config)
    with SpanFinder(source, _special_tokens(tokenizer)) as finder:
        encoder = _Encoder(rows, tokenizer, config, finder, cancelled)
        encoder.run(progress)
        if config.held_out_files:
            training = rows.report
            rest = load_rows(msgspec.structs.replace(config, files=config.held_out_files))
            encoder.run_held_out(rest, progress)
            _join(training, rest.report)
            rows.report = training
    report = rows.report
    report.template = _template_words(tokenizer, config) if encoder.templated else ""
    report.notes = encoder.notes()
    _finish(report, encoder.examples, encoder.pairs)
    if not encoder.examples and not encoder.pairs and not allow_empty:
        raise nothing_left(report)
    if encoder.examples and encoder.pairs:
        raise WeftError(
            ErrorKind.BAD_INPUT,
            "Some rows are preferences (chosen, rejected) and others are not.",
            "Train on them in two runs.",
        )
    return Encoded(encoder.examples, encoder.pairs, report, source if encoder.templated else "")


def nothing_left(report: DataReport) -> WeftError:
    """The error for data of which nothing can be used, with its first reasons."""
    reasons = [f"{each.file}: {each.problem}" for each in report.files if each.problem]
    reasons += [f"{row.file}:{row.line}: {row.reason}" for row in report.bad_rows]
    if report.too_long_dropped:
        reasons.append(f"{report.too_long_dropped} examples are too long.")
    return WeftError(
        ErrorKind.BAD_INPUT,
        "No row of the data can be used. " + " ".join(reasons[:3]),
        "Correct the rows, or say which format the file has and which column is what.",
    )


def chosen_template(tokenizer: Any, config: DataConfig) -> str:
    """The source of the template that a config means for this tokenizer."""
    wanted = config.template.strip()
    if wanted:
        if "{" not in wanted and wanted.lower() not in NAMED:
            raise WeftError(
                ErrorKind.BAD_INPUT,
                f"There is no chat template named {wanted!r}.",
                f"Names are: {', '.join(NAMED)}. Or write a Jinja template.",
            )
        return NAMED.get(wanted.lower(), config.template)
    return own_template(tokenizer) or DEFAULT_TEMPLATE


def _template_words(tokenizer: Any, config: DataConfig) -> str:
    if config.template.strip():
        return config.template.strip() if "{" not in config.template else "your own"
    return "the model's own" if own_template(tokenizer) else "ChatML, since the model brings none"


def _special_tokens(tokenizer: Any) -> dict[str, str]:
    found = {name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    return {"bos_token": "", "eos_token": "", **found}


class _Said(NamedTuple):
    messages: list[Message]
    trained: tuple[int, ...]
    part: str = ""  # chosen, rejected


@dataclass(slots=True)
class _Text:
    """A text on its way to the tokenizer, with the characters in it that are learnt."""

    row: Row
    text: str
    spans: tuple[tuple[int, int], ...]
    closing: bool = False  # the end-of-text token is put behind it, and learnt
    opening: bool = True  # the tokenizer's start token is put before it, where the text does not bring it
    part: str = ""  # chosen, rejected


@dataclass
class _Encoder:
    rows: Rows
    tokenizer: Any
    config: DataConfig
    finder: SpanFinder
    cancelled: Cancelled
    examples: list[Example] = field(default_factory=list)
    pairs: list[Pair] = field(default_factory=list)
    templated: bool = False

    def __post_init__(self) -> None:
        self.held = False
        self.first_file = 0
        self.start = array("i", start_tokens(self.tokenizer))
        self.eos = self.tokenizer.eos_token_id
        own = own_template(self.tokenizer) and not self.config.template.strip()
        self.bring_start = not own  # a model's own template says itself what a conversation begins with
        plain = self.config.plain_prompts
        self.plain = plain if plain is not None else not (own_template(self.tokenizer) or self.config.template.strip())
        self.room = max(4, self.config.max_length - len(self.start))
        self.overlap = min(self.config.overlap, self.room // 2)
        self._notes: dict[str, int] = {}
        self._document: array[int] | None = None  # tokens of raw text that do not fill a block yet
        self._fresh = True  # no block of the document was made yet

    def notes(self) -> list[str]:
        return [f"{note} ({count:,} rows)" for note, count in self._notes.items()]

    def note(self, text: str) -> None:
        self._notes[text] = self._notes.get(text, 0) + 1

    def run(self, progress: Callable[[int], None]) -> None:
        """All rows, in their order, some at a time to keep the tokenizer busy."""
        chunk: list[Row] = []
        size = 0
        for count, row in enumerate(self.rows, 1):
            if count % 64 == 0:
                progress(self.rows.report.rows)
                if self.cancelled():
                    raise WeftError(ErrorKind.CANCELLED, "Reading the data was cancelled.")
            chunk.append(row)
            size += row.size()
            if len(chunk) == _AT_ONCE or size > _LARGEST_CHUNK or row.more:
                self._rows(chunk)
                chunk, size = [], 0
        self._rows(chunk)
        progress(self.rows.report.rows)

    def _rows(self, chunk: list[Row]) -> None:
        spoken = {id(row): self._spoken(row) for row in chunk if row.size() <= _LONGEST_CONVERSATION}
        self.finder.prepare([(said.messages, said.trained) for parts in spoken.values() for said in parts])
        waiting: list[_Text] = []
        for row in chunk:
            if row.kind == "text":
                self._tokenize(waiting)
                waiting = []
                self._raw(row)
                continue
            if id(row) not in spoken and not (self.plain and isinstance(row.prompt, str)):
                self._bad(
                    row, f"It is a conversation of {row.size():,} characters; {_LONGEST_CONVERSATION:,} are the most."
                )
                continue
            try:
                waiting += [self._render(row, said) for said in spoken.get(id(row), ())] or self._plain_texts(row)
            except BadRowError as error:
                self._bad(row, str(error))
        self._tokenize(waiting)

    def run_held_out(self, rows: Rows, progress: Callable[[int], None]) -> None:
        """The rows of held-out files, marked as such."""
        self.first_file = len(self.rows.report.files)
        self.rows, self.held = rows, True
        self.run(progress)

    def _bad(self, row: Row, reason: str) -> None:
        report = self.rows.report
        report.kept -= 1
        report.files[row.file].kept -= 1
        self.rows.bad(report.files[row.file], row.line, reason)

    # Conversations, pairs and preferences: text with spans ------------------------------------------

    def _spoken(self, row: Row) -> list[_Said]:
        """The conversations of a row that are rendered through the template; none for what is taken as plain text."""
        if row.kind == "chat":
            assert isinstance(row.prompt, list)
            return [_Said(row.prompt, row.trained)]
        if row.kind == "text" or (isinstance(row.prompt, str) and self.plain):
            return []
        found: list[_Said] = []
        for part, answer in zip(PARTS if row.kind == "preference" else ("",), row.answers, strict=True):
            before = row.prompt if isinstance(row.prompt, list) else _asked(row.system, row.prompt)
            after = answer if isinstance(answer, list) else [{"role": "assistant", "content": answer}]
            trained = [len(before) + n for n, message in enumerate(after) if message["role"] == "assistant"]
            found.append(_Said([*before, *after], tuple(trained), part))
        return found

    def _render(self, row: Row, said: _Said) -> _Text:
        found = self.finder.find(said.messages, said.trained)
        self.templated = True
        for note in found.notes:
            self.note(note)
        return _Text(row, found.text, found.spans, opening=self.bring_start, part=said.part)

    def _plain_texts(self, row: Row) -> list[_Text]:
        found: list[_Text] = []
        for part, answer in zip(PARTS if row.kind == "preference" else ("",), row.answers, strict=True):
            assert isinstance(row.prompt, str) and isinstance(answer, str)
            start, end = len(row.prompt), len(row.prompt) + len(answer)
            found.append(_Text(row, row.prompt + answer, ((start, end),), closing=True, part=part))
        return found

    # Tokens -----------------------------------------------------------------------------------------

    def _tokenize(self, texts: list[_Text]) -> None:
        if not texts:
            return
        chosen: Example | None = None
        for text, (ids, offsets) in zip(texts, self._ids(texts), strict=True):
            example = self._example(text, ids, offsets)
            if not text.part:
                self._add(example)
            elif text.part == "chosen":
                chosen = example
            else:
                assert chosen is not None
                self._add_pair(text.row, chosen, example)

    def _ids(self, texts: list[_Text]) -> Iterator[tuple[list[int], list[tuple[int, int]]]]:
        if getattr(self.tokenizer, "is_fast", False):
            found = self.tokenizer(
                [text.text for text in texts], add_special_tokens=False, return_offsets_mapping=True, verbose=False
            )
            yield from zip(found["input_ids"], found["offset_mapping"], strict=True)
            return
        for text in texts:  # a tokenizer without offsets: piece by piece, cut where learning begins and ends
            ids: list[int] = []
            offsets: list[tuple[int, int]] = []
            cuts = sorted({0, len(text.text), *(cut for span in text.spans for cut in span)})
            for start, end in zip(cuts, cuts[1:], strict=False):
                piece = self.tokenizer(text.text[start:end], add_special_tokens=False, verbose=False)["input_ids"]
                ids += piece
                offsets += [(start, end)] * len(piece)
            yield ids, offsets

    def _example(self, text: _Text, ids: list[int], offsets: list[tuple[int, int]]) -> Example:
        tokens = array("i", ids)
        labels = tokens[:]
        if self.config.response_only:
            labels = array("i", [MASKED]) * len(tokens)
            spans = iter(text.spans)
            span = next(spans, None)
            for number, (start, end) in enumerate(offsets):
                while span is not None and start >= span[1]:
                    span = next(spans, None)
                if span is None:
                    break
                # One token may reach over the edge (a blank before the first word): without it, the word were never learnt.
                inside = start >= span[0] or text.text[span[0] : end].strip()
                if end > span[0] and end > start and inside:
                    labels[number] = tokens[number]
        if text.closing and self.eos is not None and (not tokens or tokens[-1] != self.eos):
            tokens.append(self.eos)
            labels.append(self.eos)
        if text.opening and self.start and tokens[: len(self.start)] != self.start:
            tokens = self.start + tokens
            labels = array("i", [MASKED]) * len(self.start) + labels
        if labels:
            labels[0] = MASKED
        row = text.row
        return Example(tokens, labels, row.file + self.first_file, row.line, row.digest(), self.held)

    def _add(self, example: Example) -> None:
        report = self.rows.report
        report.longest = max(report.longest, len(example.input_ids))
        if len(example.input_ids) > self.config.max_length:
            report.too_long += 1
            example.input_ids = example.input_ids[: self.config.max_length]
            example.labels = example.labels[: self.config.max_length]
            if self.config.too_long == "drop" or not example.trained:
                report.too_long_dropped += 1
                return
        if not example.trained:
            row = Row(example.file - self.first_file, example.line, "chat", "")
            self._bad(row, "Nothing of it is left to learn.")
            return
        self.examples.append(example)

    def _add_pair(self, row: Row, chosen: Example, rejected: Example) -> None:
        length = _first_trained(chosen)
        if length != _first_trained(rejected) or chosen.input_ids[:length] != rejected.input_ids[:length]:
            # The first token of the answers reaches back into the prompt, differently: what both share is the prompt.
            both = zip(chosen.input_ids, rejected.input_ids, strict=False)
            length = next((n for n, (a, b) in enumerate(both) if a != b), 0)
        answers = [each.input_ids[length : _last_trained(each) + 1] for each in (chosen, rejected)]
        if not length or not all(answers) or answers[0] == answers[1]:
            self._bad(row, "chosen and rejected do not differ behind their prompt.")
            return
        longest = max(len(each) for each in answers) + length
        report = self.rows.report
        report.longest = max(report.longest, longest)
        if longest > self.config.max_length:
            report.too_long += 1
            answers = [each[: max(0, self.config.max_length - length)] for each in answers]
            if self.config.too_long == "drop" or not all(answers) or answers[0] == answers[1]:
                report.too_long_dropped += 1
                return
        prompt, (good, bad) = chosen.input_ids[:length], answers
        self.pairs.append(Pair(prompt, good, bad, chosen.file, chosen.line, chosen.group, self.held))

    # Raw text: blocks -------------------------------------------------------------------------------

    def _raw(self, row: Row) -> None:
        assert isinstance(row.prompt, str)
        if self._document is None:
            self._document, self._fresh = array("i"), True
        found = self.tokenizer(row.prompt, add_special_tokens=False, verbose=False)["input_ids"]
        self._document.extend(found)
        if not row.more and self.eos is not None:
            self._document.append(self.eos)
        while len(self._document) > self.room:
            self._block(row, self._document[: self.room])
            self._document = self._document[self.room - self.overlap :]
        if not row.more:
            known = 0 if self._fresh else self.overlap
            if len(self._document) - known >= 1 and len(self._document) + len(self.start) > 1:
                self._block(row, self._document)
            self._document = None

    def _block(self, row: Row, tokens: array[int]) -> None:
        labels = tokens[:]
        group = hashlib.blake2b(tokens.tobytes(), digest_size=16).digest()
        if not self._fresh:
            labels[: self.overlap] = array("i", [MASKED]) * self.overlap
        tokens, labels = self.start + tokens, array("i", [MASKED]) * len(self.start) + labels
        labels[0] = MASKED
        self._fresh = False
        example = Example(tokens, labels, row.file + self.first_file, row.line, group, self.held)
        if example.trained:
            self.rows.report.longest = max(self.rows.report.longest, len(tokens))
            self.examples.append(example)


PARTS = ("chosen", "rejected")


def _asked(system: str, prompt: str) -> list[Message]:
    before = [{"role": "system", "content": system}] if system.strip() else []
    return [*before, {"role": "user", "content": prompt}]


def _first_trained(example: Example) -> int:
    return next((n for n, label in enumerate(example.labels) if label != MASKED), len(example.labels))


def _last_trained(example: Example) -> int:
    return max((n for n, label in enumerate(example.labels) if label != MASKED), default=-1)


def _join(report: DataReport, other: DataReport) -> None:
    """Add the report on the held-out files to that on the others."""
    files: list[FileReport] = [*report.files, *other.files]
    for name in ("rows", "kept", "bad", "duplicates", "too_long", "too_long_dropped"):
        setattr(report, name, getattr(report, name) + getattr(other, name))
    report.files, report.bad_rows = files, [*report.bad_rows, *other.bad_rows]
    report.longest = max(report.longest, other.longest)


def _finish(report: DataReport, examples: Iterable[Example], pairs: list[Pair]) -> None:
    """Count tokens. A pair counts as two sequences with one prompt each."""
    bins: dict[int, int] = {}
    sequences = [(len(e.input_ids), e.trained) for e in examples]
    for pair in pairs:
        for answer in (pair.chosen_ids, pair.rejected_ids):
            sequences.append((len(pair.prompt_ids) + len(answer), len(answer)))
    for length, trained in sequences:
        bound = max(16, 1 << (length - 1).bit_length())
        bins[bound] = bins.get(bound, 0) + 1
        report.tokens += length
        report.trained_tokens += trained
    report.examples = len(pairs) or len(sequences)
    report.histogram = sorted(bins.items())
