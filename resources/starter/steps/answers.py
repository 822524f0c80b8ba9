"""Ask a model the questions of a set that was kept out of training, and count the right answers."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..corpus.sampler import OTHER, Corpus, read_questions


@dataclass(frozen=True)
class Score:
    """How many questions about Weft were answered right, how many others declined, and what went wrong."""

    right: int
    asked: int
    declined: int
    others: int
    texts: tuple[str, ...]
    wrong: tuple[tuple[str, str, str], ...]

    @property
    def line(self) -> str:
        """Say it in one line."""
        return f"right {self.right} of {self.asked}, declined {self.declined} of {self.others}"


def answer_all(model, tokenizer, conversations: list[list[dict[str, str]]], longest: int = 72) -> list[str]:
    """Answer conversations greedily, all in one batch."""
    prompts = [tokenizer.apply_chat_template(c, add_generation_prompt=True, tokenize=False) for c in conversations]
    inputs = tokenizer(prompts, add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt")
    with torch.no_grad():
        output = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            do_sample=False,
            max_new_tokens=longest,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id,
        )
    return tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def score(model, tokenizer, corpus: Corpus, name: str) -> Score:
    """Ask every question of the set `name`, each in a conversation of its own."""
    rows = read_questions(name)
    texts = answer_all(model, tokenizer, [[{"role": "user", "content": question}] for _, question in rows])
    good = [corpus.topics[topic].is_answered_by(text) for (topic, _), text in zip(rows, texts, strict=True)]
    about = [ok for (topic, _), ok in zip(rows, good, strict=True) if topic != OTHER]
    others = [ok for (topic, _), ok in zip(rows, good, strict=True) if topic == OTHER]
    wrong = tuple(
        (topic, question, text) for (topic, question), text, ok in zip(rows, texts, good, strict=True) if not ok
    )
    return Score(sum(about), len(about), sum(others), len(others), tuple(texts), wrong)
