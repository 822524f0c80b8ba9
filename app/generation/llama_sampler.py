"""The sampler chain of llama.cpp for one generation, in the order of llama.cpp's own programs."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import msgspec

from app.core.errors import ErrorKind, WeftError
from app.core.sampling import Sampling

DRY_BREAKERS = (b"\n", b":", b'"', b"*")  # where llama.cpp's programs let a repetition end
FIELDS = frozenset(field.name for field in msgspec.structs.fields(Sampling))


class Sampler:
    """Chooses tokens. Close it after use; it holds memory of the library.

    Args:
        library: the llama_cpp module. vocab: the model's vocabulary pointer.
        context: tokens of the loaded context; what a range of -1 means.
        grammar: GBNF that has passed llama_grammar.check_grammar, or "".
        seed: of the random numbers.

    Raises:
        WeftError: BAD_INPUT when the library does not take the grammar.
    """

    def __init__(self, library: Any, vocab: Any, *, context: int, sampling: Sampling, grammar: str, seed: int) -> None:
        self._library = library
        self._size = library.llama_vocab_n_tokens(vocab)
        self._chain = library.llama_sampler_chain_init(library.llama_sampler_chain_default_params())
        self._grammar: Any = None
        self._memory = 0  # how many of the latest tokens the penalties look at
        self._add_penalties(vocab, context, sampling)
        self._add_choice(sampling, seed)
        if grammar:
            self._grammar = library.llama_sampler_init_grammar(vocab, grammar.encode(), b"root")
            if not self._grammar:
                self.close()
                raise WeftError(
                    ErrorKind.BAD_INPUT,
                    "llama.cpp does not take the grammar.",
                    "Simplify it; left recursion and rules without an end are not possible.",
                )
            self._candidates = (library.llama_token_data * self._size)()

    def _add_penalties(self, vocab: Any, context: int, sampling: Sampling) -> None:
        library = self._library
        suppressed = ctypes.c_int32(0)
        tokens = library.llama_vocab_get_suppress_tokens(vocab, ctypes.byref(suppressed))
        if suppressed.value:
            biases = (library.llama_logit_bias * suppressed.value)()
            for i in range(suppressed.value):
                biases[i].token, biases[i].bias = tokens[i], float("-inf")
            self._add(library.llama_sampler_init_logit_bias(self._size, suppressed.value, biases))
        reach = context if sampling.penalty_range < 0 else sampling.penalty_range
        penalties = (sampling.repetition_penalty, sampling.frequency_penalty, sampling.presence_penalty)
        if reach and penalties != (1.0, 0.0, 0.0):
            self._add(library.llama_sampler_init_penalties(self._size, min(reach, context), *penalties))
            self._memory = min(reach, context)
        reach = context if sampling.dry_range < 0 else min(sampling.dry_range, context)
        if reach and sampling.dry_multiplier:
            breakers = (ctypes.c_char_p * len(DRY_BREAKERS))(*DRY_BREAKERS)
            numbers = (sampling.dry_multiplier, sampling.dry_base, sampling.dry_allowed_length, reach)
            self._add(library.llama_sampler_init_dry(vocab, *numbers, breakers, len(DRY_BREAKERS)))
            self._memory = max(self._memory, reach)

    def _add_choice(self, sampling: Sampling, seed: int) -> None:
        library = self._library
        if sampling.temperature == 0:
            self._add(library.llama_sampler_init_greedy())
            return
        if sampling.top_k:
            self._add(library.llama_sampler_init_top_k(sampling.top_k))
        if sampling.typical_p < 1:
            self._add(library.llama_sampler_init_typical(sampling.typical_p, 1))
        if sampling.top_p < 1:
            self._add(library.llama_sampler_init_top_p(sampling.top_p, 1))
        if sampling.min_p > 0:
            self._add(library.llama_sampler_init_min_p(sampling.min_p, 1))
        if sampling.temperature != 1:
            self._add(library.llama_sampler_init_temp(sampling.temperature))
        self._add(library.llama_sampler_init_dist(seed))

    def _add(self, sampler: Any) -> None:
        self._library.llama_sampler_chain_add(self._chain, sampler)  # the chain owns it now

    def accept_prompt(self, tokens: Sequence[int]) -> None:
        """Let the penalties see the end of the prompt, as llama.cpp's programs do."""
        if self._memory:
            for token in tokens[-self._memory :]:
                self._library.llama_sampler_accept(self._chain, token)

    def sample(self, context: Any) -> int:
        """The next token, from the logits of the latest one decoded."""
        if self._grammar is None:
            return self._library.llama_sampler_sample(self._chain, context, -1)
        return self._sample_by_grammar(context)

    def _sample_by_grammar(self, context: Any) -> int:
        # Looking the whole vocabulary up in the grammar is slow: so first see whether the token that would be
        # chosen anyway fits it, and only then rule out all others (llama.cpp's common sampler does the same).
        library = self._library
        token = self._choose(context, ruled=False)
        one = (library.llama_token_data * 1)()
        one[0].id, one[0].logit = token, 1.0
        array = library.llama_token_data_array(data=one, size=1, selected=-1, sorted=False)
        library.llama_sampler_apply(self._grammar, ctypes.byref(array))
        if one[0].logit == float("-inf"):
            token = self._choose(context, ruled=True)
        if token >= 0:
            library.llama_sampler_accept(self._grammar, token)
            library.llama_sampler_accept(self._chain, token)
        return token

    def _choose(self, context: Any, *, ruled: bool) -> int:
        """Run the chain over all tokens; -1 when the grammar leaves none."""
        import numpy

        library = self._library
        rows = numpy.frombuffer(self._candidates, dtype=[("id", "i4"), ("logit", "f4"), ("p", "f4")])
        rows["id"] = numpy.arange(self._size, dtype=numpy.int32)
        rows["logit"] = numpy.ctypeslib.as_array(library.llama_get_logits_ith(context, -1), shape=(self._size,))
        rows["p"] = 0
        array = library.llama_token_data_array(data=self._candidates, size=self._size, selected=-1, sorted=False)
        if ruled:
            library.llama_sampler_apply(self._grammar, ctypes.byref(array))
            if not numpy.isfinite(rows["logit"]).any():
                return -1
        library.llama_sampler_apply(self._chain, ctypes.byref(array))
        return int(array.data[array.selected].id)

    def close(self) -> None:
        """Give the library's memory back."""
        if self._chain:
            self._library.llama_sampler_free(self._chain)
            self._chain = None
        if self._grammar:
            self._library.llama_sampler_free(self._grammar)
            self._grammar = None
