"""The run's data as the loop takes it: a plan of steps, the objective, the held-out measure. Imports torch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from app.training.batches import longest_batch, plan_epoch, tokens_of
from app.training.data_config import DataConfig
from app.training.run_config import TrainConfig
from app.training.shares import Batch, Group, deal, share, split_rows
from app.training.trainer_loss_torch import dpo_losses, orpo_losses, sequence_logps, sft_loss

Autocast = Callable[[], contextlib.AbstractContextManager[Any]]


class EpochPlan:
    """Steps over epochs, each a fresh order of the same examples. A pure function of seed, lengths and settings.

    Args:
        lengths: tokens of each training example.
        packing: whether rows hold several examples.
    """

    def __init__(self, lengths: Sequence[int], data: DataConfig, train: TrainConfig, *, packing: bool) -> None:
        self._lengths, self._data, self._train, self._packing = lengths, data, train, packing
        self._steps = {0: self._count(0)}
        self.total = self._total()

    def epoch(self, number: int) -> Sequence[Sequence[Batch]]:
        """The steps of one epoch."""
        train = self._train
        return plan_epoch(
            self._lengths,
            self._data,
            epoch=number,
            rows=train.batch_size,
            accumulation=train.gradient_accumulation,
            packing=self._packing,
        )

    def longest(self) -> Batch:
        """The batch of the first epoch that takes the most memory."""
        return longest_batch(self.epoch(0), self._lengths)  # type: ignore[arg-type]

    def work(self, split: int, world: int, size: Callable[[Batch], float]) -> tuple[float, float]:
        """A step's tokens, padding included, as the first epoch has them on average: of all processes; and those that one waits for.

        Args:
            split: pieces that each batch is computed in. world: processes, which take turns together. size: see `deal`.
        """
        whole, waited, steps = 0, 0, self.epoch(0)
        for batches in steps:
            parts = deal([part for batch in batches for part in split_rows(batch, split)], world, size)
            tokens = [tokens_of(part, self._lengths) for part in parts]
            whole += sum(tokens)
            waited += sum(max(tokens[at : at + world]) for at in range(0, len(tokens), world))
        return whole / max(1, len(steps)), waited / max(1, len(steps))

    def _count(self, number: int) -> int:
        return len(self.epoch(number))

    def _total(self) -> int:
        """Steps of all epochs: whole ones are gone through to their end, of a part its share."""
        limit = self._train.max_steps or 10**12
        total, number = 0, 0
        while total < limit and number < self._train.epochs:
            steps = self._steps.setdefault(number, self._count(number))
            share = min(1.0, self._train.epochs - number)
            total += steps if share == 1 else max(1, round(steps * share))
            number += 1
        return min(total, limit)

    def groups(self, start: int) -> Iterator[tuple[float, Group]]:
        """(epochs gone through after it, batches) of each step from `start` on."""
        step, number = 0, 0
        while step < self.total:
            steps = self._steps.get(number) or self._steps.setdefault(number, self._count(number))
            if step + steps <= start:
                step, number = step + steps, number + 1
                continue
            for index, batches in enumerate(self.epoch(number)):
                if step >= self.total:
                    return
                if step >= start:
                    yield number + (index + 1) / steps, list(batches)
                step += 1
            number += 1


class SftData:
    """Token loss over examples, by positions in the training part.

    Args:
        collator: makes tensors of a batch of rows of positions in all of the data. indices: positions of this part.
    """

    def __init__(
        self, collator: Any, indices: Sequence[int], examples: Sequence[Any], device: torch.device, *, chunked: bool
    ) -> None:
        self._collator, self._indices, self._device, self._chunked = collator, indices, device, chunked
        self._counts = [sum(1 for label in examples[i].labels[1:] if label != -100) for i in indices]

    def weight(self, batch: Batch) -> float:
        """Trained tokens."""
        return float(sum(self._counts[position] for row in batch for position in row))

    def tensors(self, batch: Batch) -> dict[str, torch.Tensor]:
        """The batch on the device."""
        rows = tuple(tuple(self._indices[position] for position in row) for row in batch)
        return {name: value.to(self._device) for name, value in self._collator(rows).items()}

    def loss(self, model: Any, batch: Batch) -> tuple[torch.Tensor, int, dict[str, float]]:
        """Sum of token losses, tokens computed."""
        tensors = self.tensors(batch)
        return sft_loss(model, tensors, chunked=self._chunked), tensors["input_ids"].numel(), {}


class PreferenceData:
    """DPO or ORPO over pairs. Examples 2i and 2i + 1 of `examples` are the chosen and rejected answer of pair i.

    Attributes:
        reference: log-probabilities under the base alone, (pairs, 2), for DPO; filled by `look_up` before the base is changed.
    """

    def __init__(self, collator: Any, indices: Sequence[int], train: TrainConfig, device: torch.device) -> None:
        self._collator, self._indices, self._train, self._device = collator, indices, train, device
        self.reference: dict[int, tuple[float, float]] = {}

    def weight(self, batch: Batch) -> float:
        """Pairs."""
        return float(sum(len(row) for row in batch))

    def tensors(self, batch: Batch) -> tuple[dict[str, torch.Tensor], list[int]]:
        """Chosen rows, then rejected ones; and the pairs."""
        pairs = [self._indices[position] for row in batch for position in row]
        rows = (*((2 * pair,) for pair in pairs), *((2 * pair + 1,) for pair in pairs))
        return {name: value.to(self._device) for name, value in self._collator(rows).items()}, pairs

    def look_up(
        self, model: Any, autocast: Autocast, say: Callable[[int, int], None], *, as_it_is: bool = False
    ) -> None:
        """Fill `reference` with the base, the model without its adapter; as_it_is: with it, while it changes nothing."""
        model.eval()
        with torch.no_grad(), contextlib.nullcontext() if as_it_is else model.disable_adapter():
            for position in range(len(self._indices)):
                tensors, (pair,) = self.tensors(((position,),))
                with autocast():
                    logps, _ = sequence_logps(model, tensors)
                self.reference[pair] = (float(logps[0]), float(logps[1]))
                say(position + 1, len(self._indices))

    def loss(self, model: Any, batch: Batch) -> tuple[torch.Tensor, int, dict[str, float]]:
        """Sum over pairs; further: how often the chosen answer wins, and by how much."""
        tensors, pairs = self.tensors(batch)
        logps, counts = sequence_logps(model, tensors)
        half = len(pairs)
        if self._train.objective == "dpo":
            known = torch.tensor([self.reference[pair] for pair in pairs], dtype=torch.float32, device=logps.device)
            losses, margin = dpo_losses(
                logps[:half], logps[half:], known[:, 0], known[:, 1], self._train.beta, self._train.label_smoothing
            )
        else:
            losses, margin = orpo_losses(logps[:half], logps[half:], counts[:half], counts[half:], self._train.beta)
        further = {"accuracy": float((margin > 0).sum()), "margin": float(margin.detach().sum())}
        return losses.sum(), tensors["input_ids"].numel(), further


def held_out_measure(
    objective: Any, batches: Sequence[Batch], autocast: Autocast, accelerator: Any = None
) -> Callable[[Any], float]:
    """A function of the model: the objective's mean over batches, without dropout. Several processes share them out."""

    def measure(model: Any) -> float:
        model.eval()
        sums = torch.zeros(2, dtype=torch.float64)
        mine, _ = share(batches, accelerator)
        with torch.no_grad():
            for batch, counts in mine:
                with autocast():
                    loss, _, _ = objective.loss(model, batch)
                if counts:
                    sums += torch.tensor([float(loss), objective.weight(batch)], dtype=torch.float64)
        if accelerator is not None:
            sums = accelerator.reduce(sums.to(accelerator.device), "sum").cpu()
        total, weight = sums.tolist()
        return total / max(1.0, weight)

    return measure


def in_order(lengths: Sequence[int], rows: int) -> list[Batch]:
    """Held-out batches: unpacked, longest together, so that little is padding."""
    order = sorted(range(len(lengths)), key=lambda position: (-lengths[position], position))
    return [tuple((position,) for position in order[start : start + rows]) for start in range(0, len(order), rows)]
