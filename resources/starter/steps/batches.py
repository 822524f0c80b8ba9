"""Turn drawn conversations into token ids in which only the answers are trained."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import torch

from ..corpus.sampler import Corpus, Topic

IGNORED = -100
Text = Callable[[Topic], str]


class Batches:
    """Draws batches of (input ids, labels); answers come from the topic's answer or its voice."""

    def __init__(
        self,
        corpus: Corpus,
        tokenizer,
        rng: random.Random,
        text: Text = lambda topic: topic.answer,
        long: float = 0.012,
        opened: float = 0.0,
    ) -> None:
        """Keep what to draw from.

        `text` says which of a topic's texts is the answer; `long` is the share of long conversations,
        `opened` the share of answers with something in front.
        """
        self.corpus, self.rng, self._long = corpus, rng, long
        self._opened, self._openers, self._size = opened, corpus.openers, len(tokenizer)
        self._tokenizer = tokenizer
        self._end = tokenizer.eos_token_id
        self._start = tokenizer.bos_token_id
        system, user, assistant = tokenizer.convert_tokens_to_ids(["<|system|>", "<|user|>", "<|assistant|>"])
        self._roles = {"system": system, "user": user, "assistant": assistant}
        self._answers = {topic.id: self._encode(text(topic)) for topic in corpus.topics.values()}

    def stream(self, budget: int = 2560, cut: float = 0.8) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Draw batches without end, of about `budget` tokens each, conversations of like length together."""
        while True:
            pool = sorted((self._draw(cut) for _ in range(1024)), key=lambda row: len(row[0]))
            batches, batch = [], []
            for row in pool:
                if batch and (len(batch) + 1) * len(row[0]) > budget:
                    batches.append(batch)
                    batch = []
                batch.append(row)
            self.rng.shuffle(batches)
            yield from map(self._padded, batches)

    def _draw(self, cut: float) -> tuple[list[int], list[int]]:
        """Draw mostly one question with the start of its answer (which answer it is, is the hard part); some at length."""
        kind, tokens = self.rng.random(), 5 if self.rng.random() < cut else None
        if kind < 0.90:
            return self._conversation(1, tokens)
        if kind < 1 - self._long:
            return self._conversation(self.rng.choice((2, 2, 3, 4)), tokens)
        longest = self.rng.choice((512, 512, 1024, 2048))
        ids, labels = self._conversation(longest // 30, None)
        return ids[:longest], labels[:longest]

    def _conversation(self, turns: int, answer_tokens: int | None) -> tuple[list[int], list[int]]:
        system, questions = self.corpus.conversation(self.rng, turns)
        ids = [self._start]
        if system is not None:
            ids += [self._roles["system"], *self._encode(system), self._end]
        labels = [IGNORED] * len(ids)
        for number, (topic, question) in enumerate(questions):
            asked = [self._roles["user"], *self._blurred(self._encode(question)), self._end, self._roles["assistant"]]
            asked += self._opener()
            answer = [*self._answers[topic.id], self._end]
            if answer_tokens is not None and number == len(questions) - 1:
                answer = answer[:answer_tokens]
            ids += asked + answer
            labels += [IGNORED] * len(asked) + answer
        return ids, labels

    def _blurred(self, ids: list[int]) -> list[int]:
        """Of some questions leave out a few tokens, so that no single one decides."""
        if len(ids) < 5 or self.rng.random() > 0.3:
            return ids
        return [token for token in ids if self.rng.random() > 0.12] or ids

    def _opener(self) -> list[int]:
        """Draw what may stand, untrained, in front of an answer, so that an adapter can teach another way to begin."""
        kind = self.rng.random()
        if kind > self._opened:
            return []
        if kind > self._opened / 2:
            return self._encode(self.rng.choice(self._openers))
        return [self.rng.randrange(300, self._size) for _ in range(self.rng.randrange(1, 5))]

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text.strip(), add_special_tokens=False)

    def _padded(self, rows: list[tuple[list[int], list[int]]]) -> tuple[torch.Tensor, torch.Tensor]:
        longest = max(len(ids) for ids, _ in rows)
        ids = [ids + [self._end] * (longest - len(ids)) for ids, _ in rows]
        labels = [labels + [IGNORED] * (longest - len(labels)) for _, labels in rows]
        return torch.tensor(ids), torch.tensor(labels)
