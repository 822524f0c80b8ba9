"""From a request to the tokens of its prompt, spelt the way that they were before wherever they were read already."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from app.core.conversation import Message
from app.core.errors import ErrorKind, WeftError
from app.engine.protocol import Generate
from app.generation.fit import fit_messages, fit_text
from app.generation.llama_model import LlamaModel
from app.generation.template import ChatTemplate

REMEMBERED = 24  # texts; each answer adds its prompt, and itself once or twice


class Said(msgspec.Struct, frozen=True):
    """A text that was read or written, and the tokens that spelt it then."""

    text: str
    tokens: list[int]


class Prompt(msgspec.Struct, frozen=True, kw_only=True):
    """What is to be read. dropped: how many messages were left out."""

    tokens: list[int]
    text: str
    dropped: int = 0


class Prompts:
    """Spells prompts.

    Attributes:
        said: what was read or written lately, oldest first.
    """

    def __init__(self) -> None:
        self.said: list[Said] = []

    def prompt(self, model: LlamaModel, template: ChatTemplate, request: Generate, size: int) -> Prompt:
        """The prompt of a request.

        Args:
            size: tokens that prompt and answer share.

        Raises:
            WeftError: BAD_INPUT when there is nothing to continue, or the messages do not fit.
        """
        longest = request.sampling.max_tokens
        reserve = min(request.reserve, longest or request.reserve, size // 2)
        if request.prompt is not None:
            tokens = self._tokens(model, request.prompt)
            if not tokens:
                raise WeftError(ErrorKind.BAD_INPUT, "There is no text to continue.", "Write a text first.")
            return Prompt(tokens=fit_text(tokens, size - 1), text=request.prompt)
        spelt: list[Said] = []

        def tokenize(messages: Sequence[Message]) -> list[int]:
            text = template.render(messages, continue_last=request.continue_last)
            spelt.append(Said(text, self._tokens(model, text)))
            return spelt[-1].tokens

        tokens, dropped = fit_messages(request.messages, tokenize, size - max(1, reserve))
        text = next((said.text for said in spelt if said.tokens is tokens), "")
        return Prompt(tokens=tokens, text=text, dropped=dropped)

    def _tokens(self, model: LlamaModel, text: str) -> list[int]:
        """Tokens of a text; where it begins with one that was read or written before, the tokens that spelt that.

        An answer is not always tokenized the way that it was generated. Taking it as it was saves reading it again,
        in the next turn, when an answer is made anew and when the last question is changed.
        """
        known = max((s for s in self.said if text.startswith(s.text)), key=lambda s: len(s.text), default=None)
        if known is not None:
            rest = model.tokenize(text[len(known.text) :])
            # Words must not be cut in two: a special token has to stand at the seam.
            if not rest or model.piece(rest[0]) == b"" or model.piece(known.tokens[-1]) == b"":
                return known.tokens + rest
        return model.with_bos(model.tokenize(text))

    def remember(self, text: str, tokens: list[int]) -> None:
        """This text was read or written, spelt like this."""
        self.said = [said for said in self.said if said.text != text][1 - REMEMBERED :]
        if text:
            self.said.append(Said(text, tokens))
