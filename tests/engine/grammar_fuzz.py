"""Damaged GBNF grammars, and a walk through what a grammar allows."""

from __future__ import annotations

import ctypes
import random
from typing import Any

BASES = (
    'root ::= "yes" | "no"',
    'root  ::= (expr "=" ws term "\\n")+\nexpr  ::= term ([-+*/] term)*\nterm  ::= ident | num | "(" ws expr ")" ws\n'
    "ident ::= [a-z] [a-z0-9_]* ws\nnum   ::= [0-9]+ ws\nws    ::= [ \\t\\n]*",
    'root ::= object\nvalue ::= object | array | string | ("true" | "false" | "null") ws\n'
    'object ::= "{" ws ( string ":" ws value ("," ws string ":" ws value)* )? "}" ws\n'
    'array ::= "[" ws ( value ("," ws value)* )? "]" ws\nstring ::= "\\"" ( [^"\\\\\\x7F\\x00-\\x1F] | "\\\\" '
    '(["\\\\bfnrt] | "u" [0-9a-fA-F]{4}) )* "\\"" ws\nws ::= | " " | "\\n" [ \\t]{0,20}',
    'root ::= a{2,5} b?\na ::= "x" | [^\\n]\nb ::= "é" .*',
)
PIECES = (
    *"abc|()[]*+?{}^-\n \\.<!\0é\"", "root", "::=", "{0,3}", "{2}", "{,4}", "#c\n", "\\x41", "\\u00e9", '""', "ws", '"x"',
    "[a-z]", "root ::= root", "{999}", "()", "x ::= y\n", '"\\""', "[^]", "[]",
)  # fmt: skip


def mutated(chance: random.Random) -> str:
    """A grammar with a few things put in, left out, doubled or copied elsewhere."""
    text = chance.choice(BASES)
    for _ in range(chance.randint(1, 6)):
        kind = chance.random()
        start = chance.randrange(len(text) + 1)
        end = min(len(text), start + chance.randint(1, 6))
        if kind < 0.35:
            text = text[:start] + chance.choice(PIECES) + text[start:]
        elif kind < 0.6:
            text = text[:start] + text[end:]
        elif kind < 0.8:
            text = text[:start] + text[start:end] * chance.randint(2, 4) + text[end:]
        else:
            other = chance.randrange(len(text) + 1)
            text = text[:start] + text[other : other + 9] + text[start:]
    return text


def walk(library: Any, vocab: Any, grammar: Any, chance: random.Random, steps: int = 12) -> None:
    """Accept random tokens that the grammar allows."""
    size = library.llama_vocab_n_tokens(vocab)
    rows = (library.llama_token_data * size)()
    for _ in range(steps):
        for i in range(size):
            rows[i].id, rows[i].logit = i, 1.0
        array = library.llama_token_data_array(data=rows, size=size, selected=-1, sorted=False)
        library.llama_sampler_apply(grammar, ctypes.byref(array))
        allowed = [i for i in range(size) if rows[i].logit > 0]
        token = chance.choice(allowed) if allowed else -1
        if token < 0 or library.llama_vocab_is_eog(vocab, token):
            return
        library.llama_sampler_accept(grammar, token)
