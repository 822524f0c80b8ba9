"""One adapted module of a live stack: y of W′ = W + Σ wᵢDᵢ, without W′ ever being made.

With A and B the concatenation of all adapters' matrices (s and DoRA's g inside B), and f = 1 + Σ wᵢ(gᵢ − 1) − Σ wᵢ over
those adapters that bring a whole matrix Mᵢ of their own:

    y = (base(x) − bias) ⊙ f + bias + ((x Aᵀ) ⊙ w) Bᵀ + Σ wᵢ x Mᵢᵀ

The weights w are held once for all modules that have the same ranks, so that changing them touches no module. Where rows of a
batch have weights of their own, w and f are (rows, 1, …), and nothing else changes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from app.adapters.live_rows import by_rows


class Part(NamedTuple):
    """What one adapter does to one module.

    Attributes:
        a, b: (rank, in) and (out, rank), with s and g in b.
        gain: g − 1 of DoRA, (out,).
        whole: a matrix in place of the base's, oriented as the module's own weight.
        rows: (indices, differences) of single rows of an embedding, or of the outputs of a tied head.
    """

    a: Tensor | None = None
    b: Tensor | None = None
    gain: Tensor | None = None
    whole: Tensor | None = None
    rows: tuple[Tensor, Tensor] | None = None


class Held:
    """A tensor that is exchanged when weights change, while those who use it keep hold of this."""

    __slots__ = ("value",)

    def __init__(self, value: Tensor) -> None:
        self.value = value


class Shared(NamedTuple):
    """What a site takes from its stack when it is built: places where current weights are found.

    Attributes:
        scale: for a tuple of (adapter's number, rank): w for each rank.
        gains: for a matrix of one row an adapter, (adapters, out): f, in a dtype.
        weight: of one adapter by its number.
        rows: for differences (adapters, rows, width): their weighted sum.
    """

    scale: Callable[[tuple[tuple[int, int], ...], torch.device, torch.dtype], Held]
    gains: Callable[[Tensor, torch.dtype], Held]
    weight: Callable[[int, torch.device, torch.dtype], Held]
    rows: Callable[[Tensor], Held]


class Site:
    """A module and the parts that adapters bring for it.

    Args:
        kind: `linear`, `conv1d` or `embedding`. dtype: that the matrices are computed in.
    """

    def __init__(self, module: Any, kind: str, size: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
        self.module, self.kind, self.size, self.dtype, self.device = module, kind, size, dtype, device
        self.parts: dict[str, Part] = {}
        self._installed = False
        self._previous: Any = None
        self._run: Callable[..., Tensor] | None = None

    def build(self, order: Sequence[str], shared: Shared) -> None:
        """Concatenate the parts of these adapters; takes effect with `install`."""
        present = [(i, self.parts[key]) for i, key in enumerate(order) if key in self.parts]
        if not present:
            self.remove()
            self._run = None
            return
        previous = self._previous if self._installed else self.module.forward
        self._run = self._embedding(previous, present, order, shared) if self.kind == "embedding" else self._linear(previous, present, order, shared)  # fmt: skip
        if self._installed:
            self.module.forward = self._run

    def install(self, batch: int = 0) -> None:
        """Let the module answer for the stack; for `batch` rows with weights of their own."""
        if self._run is None:
            return
        if not self._installed:
            self._own = "forward" in self.module.__dict__
            self._previous = self.module.forward
            self._installed = True
        self.module.forward = by_rows(self._run, batch) if batch and self.kind != "embedding" else self._run

    def remove(self) -> None:
        """Let the module be the base's again."""
        if self._installed:
            if self._own:
                self.module.forward = self._previous
            else:
                del self.module.forward
            self._previous, self._installed = None, False

    # Building -----------------------------------------------------------------------------------

    def _low_rank(self, present: list[tuple[int, Part]], shared: Shared) -> tuple[Tensor, Tensor, Held] | None:
        pairs = [(i, p.a, p.b) for i, p in present if p.a is not None and p.b is not None]
        if not pairs:
            return None
        layout = tuple((i, a.shape[0]) for i, a, _ in pairs)
        a = torch.cat([a for _, a, _ in pairs])
        b = torch.cat([b for _, _, b in pairs], dim=1)
        return a, b, shared.scale(layout, self.device, self.dtype)

    def _factor(self, present: list[tuple[int, Part]], order: Sequence[str], shared: Shared) -> Held | None:
        if all(p.gain is None and p.whole is None for _, p in present):
            return None
        table = torch.zeros(len(order), self.size[0], dtype=torch.float32)
        for i, part in present:
            if part.gain is not None:
                table[i] += part.gain
            if part.whole is not None:
                table[i] -= 1
        return shared.gains(table.to(self.device), self.dtype)

    def _whole(self, present: list[tuple[int, Part]], shared: Shared) -> list[tuple[Held, Tensor]]:
        return [
            (shared.weight(i, self.device, self.dtype), part.whole) for i, part in present if part.whole is not None
        ]

    def _rows(
        self, present: list[tuple[int, Part]], order: Sequence[str], shared: Shared
    ) -> tuple[Tensor, Held] | None:
        found = [(i, part.rows) for i, part in present if part.rows is not None]
        if not found:
            return None
        union = torch.unique(torch.cat([indices for _, (indices, _) in found]))
        width = found[0][1][1].shape[1]
        table = torch.zeros(len(order), len(union) + 1, width, dtype=torch.float32)  # the last row is for all others
        for i, (indices, rows) in found:
            table[i].index_add_(0, torch.searchsorted(union, indices), rows)
        return union.to(self.device), shared.rows(table.to(self.device))

    def _linear(
        self, base: Callable[..., Tensor], present: list[tuple[int, Part]], order: Sequence[str], shared: Shared
    ) -> Callable[..., Tensor]:
        module, dtype = self.module, self.dtype
        low, factor = self._low_rank(present, shared), self._factor(present, order, shared)
        whole, rows = self._whole(present, shared), self._rows(present, order, shared)
        transposed = self.kind == "conv1d"
        # Asked at each call, since adapters may write a bias, and bring one (lora_bias) where there was none.
        own = module._parameters if "bias" in module._parameters else module._buffers
        linear = functional.linear

        if low is not None and factor is None and not whole and rows is None:
            a, b, scale = low

            def plain(x: Tensor) -> Tensor:
                y = base(x)
                z = x if x.dtype == dtype else x.to(dtype)
                return y + linear(linear(z, a) * scale.value, b).to(y.dtype)

            return plain

        if low is not None and factor is not None and not whole and rows is None:
            a, b, scale = low

            def gained(x: Tensor) -> Tensor:
                y = base(x)
                z = x if x.dtype == dtype else x.to(dtype)
                more = linear(linear(z, a) * scale.value, b)
                bias = own.get("bias")
                if bias is None:
                    return torch.addcmul(more, y.to(dtype), factor.value).to(y.dtype)
                bias = bias.to(dtype)
                return torch.addcmul(more + bias, y.to(dtype) - bias, factor.value).to(y.dtype)

            return gained

        def full(x: Tensor) -> Tensor:
            y = base(x)
            if factor is not None:
                f = factor.value.to(y.dtype)
                bias = own.get("bias")
                y = y * f if bias is None else torch.addcmul(bias.to(y.dtype), y - bias.to(y.dtype), f)
            z = x if x.dtype == dtype else x.to(dtype)
            if low is not None:
                y = y + linear(linear(z, low[0]) * low[2].value, low[1]).to(y.dtype)
            for weight, matrix in whole:
                y = y + (linear(z, matrix.T if transposed else matrix) * weight.value).to(y.dtype)
            if rows is not None:
                found = rows[1].value[..., :-1, :].to(dtype)
                more = linear(z, found) if found.dim() == 2 else z @ found.transpose(1, 2)
                y = y.index_add(-1, rows[0], more.to(y.dtype))
            return y

        return full

    def _embedding(
        self, base: Callable[..., Tensor], present: list[tuple[int, Part]], order: Sequence[str], shared: Shared
    ) -> Callable[..., Tensor]:
        module, embedding = self.module, functional.embedding
        low, factor = self._low_rank(present, shared), self._factor(present, order, shared)
        columns = low[0].T.contiguous() if low is not None else None
        whole, rows = self._whole(present, shared), self._rows(present, order, shared)
        lookup: Tensor | None = None
        if rows is not None:
            where = torch.full((self.size[1],), len(rows[0]), dtype=torch.long, device=self.device)
            where[rows[0]] = torch.arange(len(rows[0]), device=self.device)
            lookup = where

        def run(tokens: Tensor) -> Tensor:
            y = base(tokens)
            if factor is not None:
                y = y * factor.value.to(y.dtype)
            more: list[Tensor] = []
            if low is not None and columns is not None:
                more.append(functional.linear(embedding(tokens, columns) * low[2].value, low[1]))
            more += [embedding(tokens, matrix) * weight.value for weight, matrix in whole]
            if rows is not None and lookup is not None:
                places, found = lookup[tokens], rows[1].value
                if found.dim() == 2:
                    more.append(embedding(places, found))
                else:
                    more.append(found[torch.arange(len(found), device=found.device)[:, None], places])
            if not more:
                return y
            total = sum(more[1:], more[0]).to(y.dtype)
            scale = getattr(module, "embed_scale", None)  # Gemma's embeddings are multiplied by it
            return y + (total if scale is None else total * torch.as_tensor(scale).to(total))

        return run
