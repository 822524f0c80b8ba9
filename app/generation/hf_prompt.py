"""Prompts: a tokenizer, a chat template and what was said last, together turning conversations into tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from app.core.conversation import Message
from app.core.errors import ErrorKind, WeftError
from app.core.sampling import Sampling
from app.engine.protocol import Generate
from app.generation import hf_files
from app.generation.fit import fit_messages, fit_text
from app.generation.template import DEFAULT_TEMPLATE, ChatTemplate

# What ends a turn in the templates of common families, where a tokenizer knows the token.
TURN_ENDS = (
    "<|im_end|>",
    "<|eot_id|>",
    "<|end|>",
    "<end_of_turn>",
    "<turn|>",
    "<|end_of_text|>",
    "<|endoftext|>",
    "<|end_of_turn|>",
    "<|eom_id|>",
    "<|END_OF_TURN_TOKEN|>",
    "<|assistant_end|>",
    "<|return|>",
    "</s>",
)


class Prompts:
    """One model's tokenizer and template. `start` at the beginning of a load, `read_tokenizer` later on.

    Attributes:
        tokenizer: transformers' tokenizer.
        template: how conversations are rendered. own_template: it came with the model.
        ends: tokens after which nothing follows.
        said: the text of the last prompt with its answer, and their tokens.
    """

    def __init__(self, chat_template: str) -> None:
        self._chosen = chat_template.strip()
        self.tokenizer: Any = None
        self.template = ChatTemplate(DEFAULT_TEMPLATE)
        self.own_template = False
        self.ends: frozenset[int] = frozenset()
        self.said: tuple[str, list[int]] = ("", [])
        self._constraint_tokenizer: Any = None
        self._breakers: frozenset[int] | None = None

    def start(self, folder: Path) -> None:
        """Guess the template from the files, so that its process is up before the weights are."""
        self._use(self._chosen or hf_files.find_template(folder))

    def close(self) -> None:
        """End the template's process."""
        self.template.close()

    def read_tokenizer(self, folder: Path, trust: bool, config: Any, model_folder: Path) -> None:
        """Read the tokenizer; settle the template and the tokens that end an answer.

        Args:
            folder: what transformers may see. model_folder: the model's own.

        Raises:
            WeftError: CORRUPT when there is none that can be read.
        """
        import transformers

        try:
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=trust
            )
        except Exception as error:  # every tokenizer class fails in its own way
            reason = next(iter(str(error).splitlines()), type(error).__name__)[:300]
            raise WeftError(
                ErrorKind.CORRUPT,
                f"The model's tokenizer cannot be read: {reason}",
                "Download the tokenizer files again (tokenizer.json, tokenizer_config.json, tokenizer.model).",
            ) from error
        found = getattr(self.tokenizer, "chat_template", None)
        if isinstance(found, dict):
            found = found.get("default") or next(iter(found.values()), None)
        self.own_template = bool(found) and not self._chosen
        self._use(self._chosen or found or "")
        special = self.tokenizer.special_tokens_map
        self.template.set_variables(**{name: str(token) for name, token in special.items() if isinstance(token, str)})
        self.ends = self._end_tokens(config, model_folder)

    @property
    def bare(self) -> bool:
        """Whether neither the model nor the user brought a template."""
        return not self.own_template and not self._chosen

    def _use(self, source: str) -> None:
        source = DEFAULT_TEMPLATE if source.lower() in ("", "chatml") else source
        if source != self.template.source:
            self.template.close()
            self.template = ChatTemplate(source)
        self.template.warm()

    def _end_tokens(self, config: Any, folder: Path) -> frozenset[int]:
        """Of generation_config.json, the config, the tokenizer, and the turn ends of the model's family."""
        found: set[int] = set()
        sources: list[Any] = [self.tokenizer.eos_token_id, config.get_text_config(decoder=True).eos_token_id]
        if (folder / "generation_config.json").is_file():
            sources.append(hf_files.read_json(folder / "generation_config.json").get("eos_token_id"))
        for source in sources:
            found.update(t for t in (source if isinstance(source, list) else [source]) if isinstance(t, int))
        added = self.tokenizer.get_added_vocab()
        found.update(added[name] for name in TURN_ENDS if name in added)
        return frozenset(found)

    def tokens(self, request: Generate, context: int) -> tuple[str, list[int], int]:
        """The prompt as text and tokens, and how many messages had to be left out.

        Args:
            context: tokens that prompt and answer share.

        Raises:
            WeftError: BAD_INPUT when it does not fit or the template refuses it; HOSTILE for an attacking template.
        """
        if request.prompt is not None:
            tokens = self.encode(request.prompt, True)
            return request.prompt, fit_text(tokens or self._start_token(), context - 1), 0
        reserve = request.reserve
        if request.sampling.max_tokens is not None:
            reserve = min(reserve, request.sampling.max_tokens)
        # A reserve of more than half a small context would leave no room for the question.
        limit = context - max(1, min(reserve, context // 2))
        texts: dict[int, str] = {}

        def tokenize(messages: Sequence[Message]) -> list[int]:
            text = self.template.render(messages, continue_last=request.continue_last)
            texts[len(messages)] = text
            return self._encode_after_said(text)

        tokens, dropped = fit_messages(request.messages, tokenize, limit)
        return texts[len(request.messages) - dropped], tokens, dropped

    def _encode_after_said(self, text: str) -> list[int]:
        """Tokens of a rendered conversation, keeping those that the last answer was really made of.

        A model may write a word with other tokens than the tokenizer would. Tokenizing its answer anew would then
        change the history, and everything after the change would have to be read again. Sure to be the same only
        where the rest is nothing, or begins with a token of its own.
        """
        said, tokens = self.said
        if said and text.startswith(said):
            rest = text[len(said) :]
            if not rest:
                return list(tokens)
            if rest.startswith(tuple(self.tokenizer.get_added_vocab())):
                return tokens + self.encode(rest, False)
        return self.encode(text, not self.own_template)

    def encode(self, text: str, special: bool) -> list[int]:
        """Tokens of a text; `special` adds what the tokenizer puts before texts, never what it puts after them."""
        tokens: list[int] = self.tokenizer(text, add_special_tokens=special)["input_ids"]
        eos = self.tokenizer.eos_token_id
        if special and tokens and tokens[-1] == eos and not text.endswith(self.tokenizer.eos_token or "\0"):
            tokens = tokens[:-1]  # some tokenizers close every text; this one is to be continued
        return tokens

    def _start_token(self) -> list[int]:
        """What an empty text begins with."""
        for token in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id, 0):
            if token is not None:
                return [token]
        return [0]

    def plain_ends(self, request: Generate) -> tuple[str, ...]:
        """ChatML's marks, where the tokenizer does not know them as tokens."""
        if request.prompt is not None or self.template.source != DEFAULT_TEMPLATE:
            return ()
        return ("<|im_end|>", "<|im_start|>")

    def dry_breakers(self) -> frozenset[int]:
        """Tokens over which DRY sees no repetition."""
        if self._breakers is None:
            from app.generation.hf_sampling import dry_breaker_tokens

            self._breakers = dry_breaker_tokens(self.tokenizer)
        return self._breakers

    def constraint(self, sampling: Sampling, width: int) -> Any:
        """The grammar or schema that the answer must follow, or None.

        Args:
            width: of the model's logits.

        Raises:
            WeftError: BAD_INPUT for a bad grammar, ENVIRONMENT without llguidance, UNSUPPORTED for slow tokenizers.
        """
        if not (sampling.grammar.strip() or sampling.json_schema.strip()):
            return None
        try:
            from app.generation.hf_grammar import Constraint, make_tokenizer
        except ImportError as error:
            raise WeftError(
                ErrorKind.ENVIRONMENT,
                "Grammars and schemas need llguidance, which is not installed.",
                "Repair the core environment on the Settings page.",
            ) from error
        if self._constraint_tokenizer is None:
            self._constraint_tokenizer = make_tokenizer(self.tokenizer, width, sorted(self.ends))
        return Constraint(self._constraint_tokenizer, sampling)
