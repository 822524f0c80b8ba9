"""A live adapter stack on a transformers model: adapters come, go and change weight while the model stays loaded.

What a stack means, and why this is not PEFT's live switching: docs/adapter_arithmetic.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from app.adapters.live_bake import Baked, bytes_of, can_bake
from app.adapters.live_names import Names
from app.adapters.live_parameters import Written
from app.adapters.live_parts import Parts, read_parts
from app.adapters.live_rows import RowPatch, agree, cannot, patches
from app.adapters.live_site import Held, Shared, Site
from app.adapters.tensors_torch import OpenAdapter


class LiveStack:
    """The adapters of one model.

    Args:
        model: a transformers model, in eval mode.

    Attributes:
        weights: of the adapters that were added, by key; 0 for those that are off.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.names = Names(model)
        self.weights: dict[str, float] = {}
        self._sites: dict[str, Site] = {}
        self._written: dict[tuple[str, str], Written] = {}
        self._deep: dict[str, bool] = {}  # whether an adapter changes what the KV cache holds
        self._layouts: dict[Any, tuple[Held, Tensor]] = {}
        self._singles: dict[Any, tuple[Held, int]] = {}
        self._gains: dict[tuple[torch.device, torch.dtype], list[tuple[Held, Tensor]]] = {}
        self._tables: dict[tuple[torch.device, torch.dtype], Tensor] = {}
        self._rows: list[tuple[Held, Tensor]] = []
        self._order: list[str] = []
        self._patches: list[RowPatch] = []
        self._baked: list[Baked] = []
        self._changed = False  # adapters came or went since the sites were built

    # What comes and goes ------------------------------------------------------------------------

    def add(self, key: str, adapter: OpenAdapter, progress: Callable[[int, int], None] = lambda *_: None) -> list[str]:
        """Take an adapter in, off (weight 0) at first.

        Args:
            key: a name for it; the same one twice replaces it.
            progress: told how many of its modules are prepared, of how many.

        Returns:
            Sentences about what of it has no place in this model.

        Raises:
            WeftError: when none of it fits, or it cannot be stacked; the stack stays as it was.
        """
        self.unbake()  # what is read is held against the base
        parts = read_parts(self.model, self.names, adapter, self._base, progress)
        if key in self.weights:
            self.discard(key)
        self._take(key, parts)
        self._changed = True
        self.weights[key] = 0.0
        self._deep[key] = parts.deep
        return parts.notes

    def _base(self, name: str, parameter: str) -> Tensor | None:
        """A parameter as the base has it, whatever is on now."""
        if (name, parameter) in self._written:
            return self._written[name, parameter].base
        return getattr(self.names.modules[name], parameter, None)

    def discard(self, key: str) -> None:
        """Forget an adapter; the model changes with the next `apply`."""
        self.unbake()
        self._changed = True
        for site in self._sites.values():
            site.parts.pop(key, None)
        for written in self._written.values():
            written.changes.pop(key, None)
        del self.weights[key], self._deep[key]

    def _take(self, key: str, parts: Parts) -> None:
        for name, (kind, size, dtype, device, part) in parts.sites.items():
            if name not in self._sites:
                self._sites[name] = Site(self.names.modules[name], kind, size, dtype, device)
            self._sites[name].parts[key] = part
        for (name, parameter), (length, changes) in parts.written.items():
            if (name, parameter) not in self._written:
                self._written[name, parameter] = Written(self.names.modules[name], parameter, length)
            self._written[name, parameter].changes[key] = changes

    # Weights ------------------------------------------------------------------------------------

    def apply(self, weights: Mapping[str, float]) -> bool:
        """Set the weights of all adapters; those not named are off.

        Returns:
            Whether what the KV cache holds is no longer what this stack would have put there.
        """
        self.unbake()
        self._end_rows()
        before = {k: w for k, w in self.weights.items() if w and self._deep[k]}
        self.weights = {key: float(weights.get(key, 0.0)) for key in self.weights}
        after = {k: w for k, w in self.weights.items() if w and self._deep[k]}
        self._build_if_changed()
        self._set_weights(torch.tensor([self.weights[key] for key in self._order], dtype=torch.float32))
        for written in self._written.values():
            written.write(self.weights)
        on = any(self.weights.values())
        for site in self._sites.values():
            site.install() if on else site.remove()
        return before != after

    def apply_rows(self, rows: Sequence[Mapping[str, float]]) -> str:
        """Let each row of the passes that follow have weights of its own, until `apply`. `weights` stay what they are.

        Args:
            rows: one set of weights a row; adapters not named are off.

        Returns:
            Why these rows cannot be computed together, in a sentence; then nothing changed. "" when they can.
        """
        for (name, _), written in self._written.items():
            if written.changes and not agree(written, rows) and (reason := cannot(name, written)):
                return reason
        for name, site in self._sites.items():
            if ".experts." in name and any(row.get(key) for row in rows for key in site.parts):
                return "Experts take one stack at a time, so the rows were answered one after the other."
        self.unbake()
        self._end_rows()
        self._build_if_changed()
        values = [[float(row.get(key, 0.0)) for key in self._order] for row in rows]
        self._set_weights(torch.tensor(values, dtype=torch.float32).reshape(len(rows), len(self._order)))
        for site in self._sites.values():
            site.install(len(rows))
        self._patches = [RowPatch(module, wrap) for module, wrap in patches(list(self._written.values()), rows)]
        return ""

    # Baking in ----------------------------------------------------------------------------------

    @property
    def baked(self) -> bool:
        """Whether the stack is in the weights."""
        return bool(self._baked)

    def bake_bytes(self, device: str) -> int:
        """What `bake` takes on a kind of device ("cpu", "cuda"), beside the base's own weights."""
        return sum(bytes_of(site) for site in self._on() if can_bake(site) and site.module.weight.device.type == device)

    def bake(self, progress: Callable[[int, int], None] = lambda *_: None) -> tuple[int, int]:
        """Write the stack as `apply` has set it into the weights; the next change of any kind takes it out again.

        Returns:
            How many modules took it, and of how many: quantized weights, and such as lie elsewhere, stay live.
        """
        self.unbake()
        sites = self._on()
        try:
            for done, site in enumerate(sites):
                progress(done, len(sites))
                if can_bake(site):
                    self._baked.append(Baked(site, self.weights))
                    site.remove()
        except BaseException:
            self.unbake()
            raise
        if self._baked and len(self._baked) == len(sites):
            for site in self._sites.values():
                site.remove()  # all that is left is of weight 0
        return len(self._baked), len(sites)

    def unbake(self) -> None:
        """Bring the base's weights back, to the bit; the stack goes on live."""
        if not self._baked:
            return
        for baked in self._baked:
            baked.restore()
        self._baked = []
        if any(self.weights.values()):
            for site in self._sites.values():
                site.install()

    def _on(self) -> list[Site]:
        return [site for site in self._sites.values() if any(self.weights.get(key) for key in site.parts)]

    def _end_rows(self) -> None:
        for patch in reversed(self._patches):
            patch.remove()
        self._patches = []

    def replaced(self, key: str) -> bool:
        """Whether an adapter is on and changes what the KV cache holds: then discarding it invalidates that."""
        return bool(self.weights.get(key)) and self._deep[key]

    def close(self) -> None:
        """Give the model back as it was."""
        self.unbake()
        self._end_rows()
        for site in self._sites.values():
            site.remove()
        for written in self._written.values():
            written.restore()
        self._sites.clear()
        self._written.clear()
        self.weights.clear()

    def _build_if_changed(self) -> None:
        if self._changed:
            # Sums are made in the order of the keys: the order in which adapters were added changes not even a bit.
            self._build(sorted(self.weights))

    def _build(self, order: list[str]) -> None:
        self._layouts, self._singles, self._gains, self._rows = {}, {}, {}, []
        shared = Shared(self._scale, self._gain, self._single, self._row_sum)
        for name in [name for name, site in self._sites.items() if not site.parts]:
            self._sites.pop(name).remove()
        for place in [place for place, written in self._written.items() if not written.changes]:
            self._written.pop(place).restore()
        for site in self._sites.values():
            site.build(order, shared)
        self._tables = {key: torch.cat([t for _, t in found], dim=1).T for key, found in self._gains.items()}
        self._order, self._changed = order, False

    def _set_weights(self, values: Tensor) -> None:
        """Weights (adapters,), or (rows, adapters)."""
        rows = values.dim() == 2
        for held, index in self._layouts.values():
            found = values[..., index]
            held.value = (found[:, None] if rows else found).to(held.value)
        for held, number in self._singles.values():
            found = values[..., number]
            held.value = (found[:, None, None] if rows else found).to(held.value)
        for (device, dtype), sharing in self._gains.items():
            table, here = self._tables[device, dtype], values.to(device)
            one = torch.ones((), device=device)
            factors = (torch.addmm(one, here, table.T) if rows else torch.addmv(one, table, here)).to(dtype)
            for (held, _), factor in zip(sharing, factors.split([t.shape[1] for _, t in sharing], dim=-1), strict=True):
                held.value = factor[:, None] if rows else factor
        for held, table in self._rows:
            held.value = torch.tensordot(values.to(table.device), table, dims=1)

    # What sites share ---------------------------------------------------------------------------

    def _scale(self, layout: tuple[tuple[int, int], ...], device: torch.device, dtype: torch.dtype) -> Held:
        if (layout, device, dtype) not in self._layouts:
            index = torch.repeat_interleave(
                torch.tensor([i for i, _ in layout]), torch.tensor([rank for _, rank in layout])
            )
            self._layouts[layout, device, dtype] = (Held(torch.zeros(1, device=device, dtype=dtype)), index)
        return self._layouts[layout, device, dtype][0]

    def _single(self, number: int, device: torch.device, dtype: torch.dtype) -> Held:
        key = (number, device, dtype)
        if key not in self._singles:
            self._singles[key] = (Held(torch.zeros((), device=device, dtype=dtype)), number)
        return self._singles[key][0]

    def _gain(self, table: Tensor, dtype: torch.dtype) -> Held:
        held = Held(torch.zeros(1))
        self._gains.setdefault((table.device, dtype), []).append((held, table))
        return held

    def _row_sum(self, table: Tensor) -> Held:
        held = Held(torch.zeros(1))
        self._rows.append((held, table))
        return held
