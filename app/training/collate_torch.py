"""Collator: examples as the tensors that a model is given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from app.training.encode import MASKED, Example

Mode = Literal["positions", "mask", "off"]


class Collator:
    """Joins examples into a batch.

    Args:
        examples: of which batches name indices.
        pad_id: what fills rows up; any token, since it is masked everywhere.
        mode: how sequences that share a row are kept apart (see `packing_torch`). `positions`: position ids begin anew
            with each sequence, and there is no attention mask; `mask`: these, and a block-diagonal mask; `off`: one
            example a row, with the usual attention mask.
        multiple_of: row lengths are rounded up to this (8 suits tensor cores).
        mask_dtype: of the `mask` mode's mask; that of the model's activations.

    Give a model `use_cache=False` along with what this returns: position ids keep sequences apart only so.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        pad_id: int,
        *,
        mode: Mode = "off",
        multiple_of: int = 1,
        mask_dtype: torch.dtype = torch.float32,
    ) -> None:
        self._examples = examples
        self._pad_id = pad_id
        self.mode: Mode = mode
        self._multiple_of = multiple_of
        self._mask_dtype = mask_dtype

    def __call__(self, batch: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
        """Tensors of a batch: rows of example indices.

        Returns:
            input_ids, labels: int64 [rows, length], labels not shifted and -100 where nothing is learnt. In the modes
            `positions` and `mask` position_ids, int64 [rows, length]; in `mask` attention_mask [rows, 1, length, length],
            0 where a token (third axis) sees another (fourth), the dtype's lowest number elsewhere; in `off`
            attention_mask, int64 [rows, length].

        Raises:
            ValueError: several examples in a row in mode `off`.
        """
        if self.mode == "off" and any(len(pack) != 1 for pack in batch):
            raise ValueError("several examples share a row, and nothing would keep them apart")
        longest = max(sum(len(self._examples[n].input_ids) for n in pack) for pack in batch)
        longest += -longest % self._multiple_of
        shape = (len(batch), longest)
        ids = torch.full(shape, self._pad_id, dtype=torch.int64)
        labels = torch.full(shape, MASKED, dtype=torch.int64)
        positions = torch.arange(longest).repeat(len(batch), 1)
        sequence = torch.zeros(shape, dtype=torch.int64)  # number of the sequence in its row; padding is the last
        mask = torch.zeros(shape, dtype=torch.int64)
        for row, pack in enumerate(batch):
            at = 0
            for part, number in enumerate(pack):
                example = self._examples[number]
                end = at + len(example.input_ids)
                ids[row, at:end] = torch.tensor(example.input_ids)
                labels[row, at:end] = torch.tensor(example.labels)
                labels[row, at] = MASKED  # no sequence predicts the first token of the next
                positions[row, at:end] = torch.arange(end - at)
                sequence[row, at:end] = part
                at = end
            mask[row, :at] = 1
            positions[row, at:] = torch.arange(longest - at)
            sequence[row, at:] = len(pack)
        tensors = {"input_ids": ids, "labels": labels}
        if self.mode == "off":
            return {**tensors, "attention_mask": mask}
        tensors["position_ids"] = positions
        if self.mode == "mask":
            tensors["attention_mask"] = _block_diagonal(sequence, self._mask_dtype)
        return tensors


def _block_diagonal(sequence: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Additive causal mask [rows, 1, length, length] between tokens of the same number in `sequence` [rows, length]."""
    length = sequence.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    seen = (sequence[:, :, None] == sequence[:, None, :]) & causal
    return torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, torch.finfo(dtype).min)[:, None]
