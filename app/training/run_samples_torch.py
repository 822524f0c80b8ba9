"""Sample answers while training, so that one can read what the model learns. Imports torch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch

from app.core.conversation import Message
from app.generation.template import ChatTemplate
from app.training.run_config import RunConfig
from app.training.run_file import lines
from app.training.tokenizer import turn_ends


def sampler(
    config: RunConfig,
    model: Any,
    tokenizer: Any,
    template: str,
    device: torch.device,
    autocast: Callable[[], Any],
    agree: Callable[[torch.Tensor], torch.Tensor] = lambda token: token,
) -> Callable[[], list[tuple[str, str]]] | None:
    """A function that answers the sample questions greedily with the model as it is; None without questions.

    Args:
        agree: the token that is taken, of the one found here: processes that compute together have to take the same.
    """
    questions = lines(config.train.samples)[:20]
    if not questions:
        return None
    prompts = _prompts(questions, tokenizer, template, config.data.system)
    ends = sorted(turn_ends(tokenizer))

    def answer() -> list[tuple[str, str]]:
        model.eval()
        found: list[tuple[str, str]] = []
        with torch.no_grad(), autocast(), _cache(model):
            for question, ids in zip(questions, prompts, strict=True):
                tokens = torch.tensor([ids], device=device)
                out = _greedy(model, tokens, config.train.sample_tokens, ends, agree)
                found.append((question, tokenizer.decode(out, skip_special_tokens=True).strip()))
        return found

    return answer


def _prompts(questions: list[str], tokenizer: Any, template: str, system: str) -> list[list[int]]:
    if not template:
        return [tokenizer(question)["input_ids"] for question in questions]
    names = {name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    head = [Message(role="system", content=system)] if system.strip() else []
    with ChatTemplate(template, names.get("bos_token", ""), names.get("eos_token", "")) as chat:
        texts = [chat.render([*head, Message(role="user", content=q)], deadline=20.0) for q in questions]
    return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]


def _greedy(
    model: Any, tokens: torch.Tensor, most: int, ends: list[int], agree: Callable[[torch.Tensor], torch.Tensor]
) -> list[int]:
    """The likeliest next tokens, until an end. Own loop: transformers' generate warns of much and draws random numbers."""
    past, found = None, []
    for _ in range(most):
        out = model(input_ids=tokens, past_key_values=past, use_cache=True)
        past = out.past_key_values
        token = int(agree(out.logits[0, -1].argmax()))
        if token in ends:
            break
        found.append(token)
        tokens = tokens.new_tensor([[token]])
    return found


@contextlib.contextmanager
def _cache(model: Any) -> Any:
    settings = model.config
    before, settings.use_cache = settings.use_cache, True
    try:
        yield
    finally:
        settings.use_cache = before
