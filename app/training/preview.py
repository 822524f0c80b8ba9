"""Preview: examples as they leave the collator, as text, trained and masked apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from app.training.batches import split
from app.training.data_config import DataConfig, PreviewExample, PreviewParameters, PreviewSpan
from app.training.encode import MASKED, Encoded, Example

_TORN = "\ufffd"  # what a tokenizer makes of half a character


def preview(data: Encoded, tokenizer: Any, config: DataConfig, parameters: PreviewParameters) -> list[PreviewExample]:
    """The first examples and the ones that are asked for, each taken out of a batch of the collator that training uses.

    Numbers that do not exist are left out. A preference gives two examples, `chosen` and `rejected`.
    """
    _, held = split(data, config)
    held_out = set(held)
    count = len(data.pairs or data.examples)
    numbers = dict.fromkeys([*range(min(parameters.first, count)), *(n for n in parameters.wanted if 0 <= n < count)])
    found: list[PreviewExample] = []
    for number in numbers:
        for part in ("chosen", "rejected") if data.pairs else ("",):
            example = data.pairs[number].example(part) if data.pairs else data.examples[number]
            found.append(_show(example, number, part, number in held_out, data, tokenizer, parameters.longest))
    return found


def _show(
    example: Example, number: int, part: str, held_out: bool, data: Encoded, tokenizer: Any, longest: int
) -> PreviewExample:
    ids, trained = collated(example)
    pieces, cut = spans(tokenizer, ids, trained, longest)
    return PreviewExample(
        number=number,
        file=data.report.files[example.file].file,
        line=example.line,
        tokens=len(ids),
        trained_tokens=sum(trained),
        spans=tuple(pieces),
        held_out=held_out,
        part=part,
        cut=cut,
    )


def collated(example: Example) -> tuple[list[int], list[bool]]:
    """What the collator makes of an example: its tokens, and which are learnt."""
    from app.training.collate_torch import Collator

    tensors = Collator([example], 0)([(0,)])
    return tensors["input_ids"][0].tolist(), [label != MASKED for label in tensors["labels"][0].tolist()]


def spans(
    tokenizer: Any, ids: Sequence[int], trained: Sequence[bool], longest: int = 1 << 40
) -> tuple[list[PreviewSpan], bool]:
    """Tokens as text, cut where learning begins and ends; joined, the spans are the tokenizer's own text of all tokens.

    A character that several tokens make up belongs to the span of its last token.

    Returns:
        The spans, at most `longest` characters together, and whether something was left out.
    """

    def text_of(tokens: Sequence[int]) -> str:
        return tokenizer.decode(list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False)

    limit = min(len(ids), longest)  # a token is a character at least, mostly; so no more of them are looked at
    ids, trained, cut = ids[:limit], trained[:limit], len(ids) > limit
    full = text_of(ids)
    edges = [n for n in range(1, len(ids)) if trained[n] != trained[n - 1]]
    found: list[PreviewSpan] = []
    at, start = 0, 0
    for edge in [*edges, len(ids)]:
        before = text_of(ids[:edge]).rstrip(_TORN) if edge < len(ids) else full
        if not full.startswith(before):  # a decoder that cleans up over the edge: as much as agrees
            before = full[: next((n for n, (a, b) in enumerate(zip(full, before, strict=False)) if a != b), len(full))]
        end = max(at, len(before))
        if end > at:
            found.append(PreviewSpan(full[at:end], trained[start]))
        at, start = end, edge
    return _shortened(found, longest, cut)


def _shortened(found: list[PreviewSpan], longest: int, cut: bool) -> tuple[list[PreviewSpan], bool]:
    kept: list[PreviewSpan] = []
    for span in found:
        if longest <= 0:
            return kept, True
        kept.append(PreviewSpan(span.text[:longest], span.trained))
        cut = cut or len(span.text) > longest
        longest -= len(span.text)
    return kept, cut
