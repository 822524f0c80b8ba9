"""What a load will take, and whether it fits: plain arithmetic over headers and the machine's free memory."""

from __future__ import annotations

from enum import StrEnum

import msgspec


class Gpu(msgspec.Struct, frozen=True, kw_only=True):
    """One accelerator; memory in bytes."""

    name: str
    total: int
    free: int


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """What there is to run on; memory in bytes."""

    system: str  # linux, windows, darwin
    cpu_count: int
    ram_total: int
    ram_free: int
    gpus: tuple[Gpu, ...] = ()

    @property
    def vram_free(self) -> int:
        return sum(gpu.free for gpu in self.gpus)


class Estimate(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes that a load will take, by cause and by place."""

    weights: int
    cache: int  # KV cache at the chosen context length
    overhead: int  # libraries, compute buffers
    gpu: int = 0  # of the total, on accelerators
    ram: int = 0  # of the total, in main memory

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.overhead


class Fit(StrEnum):
    """Where a model fits, best first."""

    GPU = "gpu"
    GPU_RAM = "gpu+ram"
    RAM = "ram"
    NO = "no"
    UNKNOWN = "unknown"
