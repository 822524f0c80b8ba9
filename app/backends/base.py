"""What a loader is: its SPEC, and the Backend that an engine holds one instance of."""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from enum import StrEnum
from typing import Any

import msgspec

from app.core.library import ModelEntry, ModelFormat
from app.core.memory import Estimate, Machine
from app.core.stack import AdapterStack
from app.engine.protocol import Generate, GenerateBatch, Generated, GeneratedBatch, Load, Score, Scored
from app.engine.reporting import Report
from app.generation.in_turn import answer_in_turn


class Capability(StrEnum):
    """The columns of the loader table. A claimed capability is executed by the conformance tests."""

    LORA = "1 LoRA"
    MULTI_LORA = "2+ LoRAs"
    TRAIN = "train"
    VISION = "vision"
    PERPLEXITY = "perplexity"


class Spec(msgspec.Struct, frozen=True, kw_only=True):
    """A loader, described without its library.

    Attributes:
        id: file name of the loader's module, and what `--loader` takes.
        title: what people call it.
        summary: one sentence: what it is for.
        formats: which models it loads.
        environment: name of the Python environment its engine runs in.
        capabilities: what it can do today; only what a test executes.
        options: msgspec struct of its options (see core.options).
        sampling: names of the core.sampling.Sampling fields that it serves.
        estimate: bytes that a load of this model with these options (the struct) will take on this machine.
        refuses: why this loader cannot take this very model, in a sentence; "" when it can.
        bakes: it can write adapters into the loaded weights (SetAdapters.baked).
        needs_cuda: it runs on NVIDIA GPUs only.
        rank: the lower, the sooner it is chosen for a model that several can load.
    """

    id: str
    title: str
    summary: str
    formats: frozenset[ModelFormat]
    environment: str
    capabilities: frozenset[Capability] = frozenset()
    options: type[msgspec.Struct]
    sampling: frozenset[str]
    estimate: Callable[[ModelEntry, Any, Machine], Estimate]
    refuses: Callable[[ModelEntry], str] = lambda _: ""
    bakes: bool = False
    needs_cuda: bool = False
    rank: int = 100


class Backend(abc.ABC):
    """A loader's code. One instance lives in one engine and holds at most one model.

    Methods run one at a time in the engine's main thread. They raise WeftError for what a user can act
    on; MemoryError and a library's own out-of-memory errors are turned into OUT_OF_MEMORY by the host where it knows them.

    Attributes:
        stack: the adapters that are on, as they were set last. baked: they are written into the weights.
    """

    stack: AdapterStack = AdapterStack()
    baked: bool = False

    @abc.abstractmethod
    def libraries(self) -> dict[str, str]:
        """Versions of the libraries it runs on. Imports nothing heavy (importlib.metadata)."""

    @abc.abstractmethod
    def load(self, request: Load, report: Report) -> None:
        """Load a model, in place of the one before; report Loaded. Raises WeftError and leaves nothing loaded on failure."""

    @abc.abstractmethod
    def unload(self) -> None:
        """Drop the model. Does nothing when none is loaded."""

    @abc.abstractmethod
    def generate(self, request: Generate, report: Report) -> Generated:
        """Answer or continue, reporting tokens. When cancelled: returns with finish_reason `cancelled`."""

    def generate_batch(self, request: GenerateBatch, report: Report) -> GeneratedBatch:
        """Answer rows under stacks of their own, reporting tokens by row; afterwards the stack is what it was.

        One row after the other, unless a loader can do better. When cancelled: returns what there is.
        """
        return answer_in_turn(self, request, report, "This loader answers rows one after the other.")

    def set_adapters(self, adapters: AdapterStack, report: Report, *, baked: bool = False) -> None:
        """Replace the adapter stack, and remember it in `stack`. Loaders without LORA in their SPEC are never asked.

        Args:
            baked: write it into the weights for speed, restoring the base's bits with the next stack. A loader that
                cannot says so in a warning, and serves the stack live.
        """
        raise NotImplementedError

    def check_adapters(self, stacks: Sequence[AdapterStack], report: Report) -> None:  # noqa: B027 (none need answer)
        """Raise what `set_adapters` would for one of these, and change nothing: asked before rows are answered in turn."""

    def score(self, request: Score, report: Report) -> Scored:
        """Perplexity of a text. Loaders without PERPLEXITY in their SPEC are never asked."""
        raise NotImplementedError
