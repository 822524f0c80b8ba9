"""One answer of llama.cpp: reads the prompt, writes until something stops it, and remembers both as they were spelt."""

from __future__ import annotations

import time
from typing import Any

from app.core.errors import ErrorKind, WeftError
from app.core.sampling import Sampling
from app.engine.protocol import Generate, Generated
from app.engine.reporting import Report
from app.generation.llama_context import LlamaContext
from app.generation.llama_grammar import check_grammar, schema_grammar
from app.generation.llama_loop import Loop
from app.generation.llama_model import LlamaModel
from app.generation.llama_prompt import Prompt, Prompts
from app.generation.llama_sampler import Sampler


def grammar_of(sampling: Sampling) -> str:
    """The grammar that the answer must follow, "" for none.

    Raises:
        WeftError: BAD_INPUT when there are two, or llama.cpp would not survive it.
    """
    grammar, schema = sampling.grammar.strip(), sampling.json_schema.strip()
    if grammar and schema:
        raise WeftError(
            ErrorKind.BAD_INPUT,
            "The answer cannot follow a grammar and a JSON schema at once.",
            "Clear one of the two.",
        )
    if schema:
        made = schema_grammar(sampling.json_schema)
        return made if made.strip() else ""
    if grammar:
        check_grammar(sampling.grammar)
    return sampling.grammar if grammar else ""


def answer(
    library: Any,
    model: LlamaModel,
    context: LlamaContext,
    prompts: Prompts,
    prompt: Prompt,
    request: Generate,
    report: Report,
    *,
    grammar: str,
    seed: int,
) -> Generated:
    """Answer one request, handing on its text as it comes. When cancelled: returns what there is."""
    sampler = Sampler(library, model.vocab, context=context.size, sampling=request.sampling, grammar=grammar, seed=seed)
    try:
        started = time.monotonic()
        reused = context.reuse(prompt.tokens)
        whole = _read(context, prompt.tokens, reused, report)
        read = time.monotonic()
        numbers = {
            "prompt_tokens": len(prompt.tokens),
            "reused_tokens": reused,
            "prompt_seconds": read - started,
            "dropped_messages": prompt.dropped,
            "seed": seed,
        }
        if not whole:
            return Generated(finish_reason="cancelled", tokens=0, **numbers)
        check_logits(library, model, context)
        sampler.accept_prompt(prompt.tokens)
        plain = request.prompt is not None or request.continue_last
        loop = Loop(
            model,
            context,
            sampler,
            stop=request.sampling.stop_strings(),
            most=min(request.sampling.max_tokens or context.size, context.size - len(prompt.tokens)),
            strip=not plain and model.adds_space,
        )
        reason = loop.run(report.tokens)
        prompts.remember(prompt.text, prompt.tokens)
        # Where a space was dropped before the answer, templates put it back or do not.
        for text in {loop.text, loop.stripped + loop.text}:
            prompts.remember(prompt.text + text, prompt.tokens + loop.tokens)
        return Generated(finish_reason=reason, tokens=loop.count, seconds=time.monotonic() - read, **numbers)
    finally:
        sampler.close()


def _read(context: LlamaContext, tokens: list[int], reused: int, report: Report) -> bool:
    """Read what the cache does not hold yet. False when it was stopped."""
    new = tokens[reused:]

    def progress(done: int) -> None:
        if len(new) > done:
            report.progress("Reading the prompt", reused + done, len(tokens), "tokens")

    return context.read(new, progress)


def check_logits(library: Any, model: LlamaModel, context: LlamaContext) -> None:
    """Refuse to sample from values that are no numbers. Raises WeftError CORRUPT."""
    import numpy

    size = library.llama_vocab_n_tokens(model.vocab)
    logits = numpy.ctypeslib.as_array(library.llama_get_logits_ith(context.pointer, -1), shape=(size,))
    # One pass that is cheap beside the prompt: the sum is NaN as soon as one of them is.
    if numpy.isnan(logits.sum(dtype=numpy.float64)):
        context.clear()
        raise WeftError(
            ErrorKind.CORRUPT,
            f"{model.path.name} computes values that are no numbers (NaN).",
            "Download the model again, or choose another quantization; with stretched context, undo the RoPE options.",
        )
