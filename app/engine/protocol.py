"""Commands and Events: what travels over an engine's stdin and stdout, one JSON line each.

The parent sends Commands, the child answers with Events. Every command has an `id`; all events that
concern it carry that id. Each command ends with exactly one terminal event: Done or Failed. The child
works off commands one at a time in order, except Cancel and Ping, which its reader thread takes at once.
A death without a terminal event means that the child crashed.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from app.core.conversation import Message
from app.core.jobs import Progress
from app.core.library import ModelEntry
from app.core.options import OptionValue
from app.core.sampling import Sampling
from app.core.stack import AdapterStack

VERSION = 1
MAX_LINE = 16 * 1024 * 1024  # bytes; a longer line ends the connection on either side

FinishReason = Literal["stop", "length", "cancelled"]


class _Message(msgspec.Struct, frozen=True, kw_only=True, tag_field="type"):
    id: int = 0


# Commands --------------------------------------------------------------------------------------


class Load(_Message, frozen=True, kw_only=True, tag="load"):
    """Load a model. `options` are fields of the loader's options struct, checked by the child too.

    `calibration` is what this loader measured on this machine before (`Loaded.calibration`), so that it need not again.
    """

    model: ModelEntry
    options: dict[str, OptionValue] = {}
    adapters: AdapterStack = AdapterStack()
    baked: bool = False  # as in SetAdapters
    trust_remote_code: bool = False
    calibration: dict[str, int] = {}


class Unload(_Message, frozen=True, kw_only=True, tag="unload"):
    """Forget the model and give its memory back as far as the library can."""


class SetAdapters(_Message, frozen=True, kw_only=True, tag="set_adapters"):
    """Replace the whole adapter stack.

    `baked` writes it into the weights, for the base's speed; the base's own bits are kept, and come back with the next
    stack that is not baked. Loaders that cannot, say so in a warning and serve the stack live.
    """

    adapters: AdapterStack
    baked: bool = False


class Generate(_Message, frozen=True, kw_only=True, tag="generate"):
    """Answer a conversation, or continue a raw text.

    Attributes:
        messages: the conversation, oldest first, rendered through the model's chat template.
        prompt: raw text instead; then `messages` is empty and no template is used.
        continue_last: the last message is the assistant's and is to be continued, not answered.
        reserve: tokens kept free for the answer when old turns must go to fit the context.
    """

    messages: tuple[Message, ...] = ()
    prompt: str | None = None
    continue_last: bool = False
    sampling: Sampling = Sampling()
    reserve: int = 256
    images: tuple[str, ...] = ()


class BatchRow(msgspec.Struct, frozen=True, kw_only=True):
    """One row of a batch: a stack, and what it is to answer.

    Attributes:
        adapters: the row's own stack; the empty one is the base.
        messages, prompt: as Generate has them.
        seed: of this row; None takes the sampling's, so that rows differ in nothing but their stack and prompt.
    """

    adapters: AdapterStack = AdapterStack()
    messages: tuple[Message, ...] = ()
    prompt: str | None = None
    seed: int | None = None


class GenerateBatch(_Message, frozen=True, kw_only=True, tag="generate_batch"):
    """Answer several rows, each under its own adapter stack; Tokens carry the row's number. Ends with GeneratedBatch.

    The stack that was on before is on again afterwards, whatever happens. Where the loader cannot compute rows together
    it answers one after the other, and says so in the result.
    """

    rows: tuple[BatchRow, ...]
    continue_last: bool = False
    sampling: Sampling = Sampling()
    reserve: int = 256


class Score(_Message, frozen=True, kw_only=True, tag="score"):
    """Perplexity of a text: each token scored once with at most window-1 tokens before it."""

    text: str
    window: int = 0  # 0: the loaded context
    stride: int = 0  # 0: the window


class RunTask(_Message, frozen=True, kw_only=True, tag="run_task"):
    """Run a long task by name, with JSON parameters, in this child."""

    task: str
    parameters: str = "{}"


class Cancel(_Message, frozen=True, kw_only=True, tag="cancel"):
    """Stop the command whose id is `target` as soon as possible; it ends as its kind says (Done, `cancelled`, or Failed, `cancelled`)."""

    target: int


class Adjust(_Message, frozen=True, kw_only=True, tag="adjust"):
    """Change the task whose RunTask has the id `target` while it runs: JSON that the task understands. Never answered.

    One that comes before its task begins is kept for it; of several, the task may see only the last.
    """

    target: int
    parameters: str


class Ping(_Message, frozen=True, kw_only=True, tag="ping"):
    """Are you alive? Answered by the reader thread with Pong of the same id."""


class Shutdown(_Message, frozen=True, kw_only=True, tag="shutdown"):
    """Finish the command at hand, then exit."""


Command = Load | Unload | SetAdapters | Generate | GenerateBatch | Score | RunTask | Cancel | Adjust | Ping | Shutdown

# Events ----------------------------------------------------------------------------------------


class Ready(_Message, frozen=True, kw_only=True, tag="ready"):
    """The handshake, the child's first line. A wrong `version` is refused by the parent."""

    version: int
    backend: str
    pid: int
    python: str = ""
    libraries: dict[str, str] = {}  # name to version, of what the backend runs on


class Loaded(_Message, frozen=True, kw_only=True, tag="loaded"):
    """A model is loaded (not terminal: Done follows).

    Attributes:
        context: tokens that prompt and answer share as loaded.
        device: where it runs, in words ("CPU, 2 threads", "NVIDIA … 24 of 33 layers").
        memory: bytes that the load added to this process and its devices, measured; 0 when unknown.
        seconds: how long the load took.
        has_template: a chat template was found; otherwise a plain one is used and that is said.
        notes: sentences worth showing (an option that had no effect, a fallback).
        calibration: measured on this machine and worth handing to the next Load, by names of the loader's own.
    """

    context: int
    device: str = ""
    memory: int = 0
    seconds: float = 0.0
    has_template: bool = True
    notes: tuple[str, ...] = ()
    calibration: dict[str, int] = {}


class Tokens(_Message, frozen=True, kw_only=True, tag="tokens"):
    """A batch of generated text: what came since the last one.

    `count` is the number of tokens in this batch; `row` the row of a batched generation.
    """

    text: str
    count: int
    row: int = 0


class ProgressEvent(_Message, frozen=True, kw_only=True, tag="progress"):
    """How far a command is. See core.jobs.Progress for the fields."""

    phase: str
    done: float = 0.0
    total: float = 0.0
    unit: str = ""

    @property
    def progress(self) -> Progress:
        """The same for those to whom the command says nothing."""
        return Progress(phase=self.phase, done=self.done, total=self.total, unit=self.unit)


class Metric(_Message, frozen=True, kw_only=True, tag="metric"):
    """Named numbers at a step of a task (loss, learning rate, tokens per second)."""

    step: int
    values: dict[str, float]


class News(_Message, frozen=True, kw_only=True, tag="news"):
    """What a task has to tell beside its progress, as JSON that its worker understands. The latest is what counts."""

    json: str


class Log(_Message, frozen=True, kw_only=True, tag="log"):
    """A sentence for the log, and for the window when level is warning or error."""

    level: Literal["debug", "info", "warning", "error"]
    text: str


class Pong(_Message, frozen=True, kw_only=True, tag="pong"):
    """Answer to Ping. `busy` is the id of the command at work, 0 for none."""

    busy: int = 0


class Generated(msgspec.Struct, frozen=True, kw_only=True, tag="generated"):
    """What a generation took.

    Attributes:
        tokens: generated. prompt_tokens: of the whole prompt. reused_tokens: of those, found in the cache.
        prompt_seconds: reading the prompt. seconds: generating, after the first token.
        dropped_messages: how many of the oldest messages did not fit and were left out of the prompt.
        seed: the seed that was used.
    """

    finish_reason: FinishReason
    tokens: int
    prompt_tokens: int
    reused_tokens: int = 0
    prompt_seconds: float = 0.0
    seconds: float = 0.0
    dropped_messages: int = 0
    seed: int = 0


class GeneratedBatch(msgspec.Struct, frozen=True, kw_only=True, tag="generated_batch"):
    """What each row of a batch took, in the order of the rows.

    `note` says why rows were answered one after the other; "" when they were computed together. Computed together, a row's
    `prompt_seconds` and `seconds` are those of the batch until the row's end.
    """

    rows: tuple[Generated, ...]
    note: str = ""


class Scored(msgspec.Struct, frozen=True, kw_only=True, tag="scored"):
    """Perplexity of a text. `nll` is the mean negative log-likelihood in nats over `tokens` scored tokens."""

    nll: float
    perplexity: float
    tokens: int


class TaskResult(msgspec.Struct, frozen=True, kw_only=True, tag="task_result"):
    """A task's result, as JSON."""

    json: str


class Done(_Message, frozen=True, kw_only=True, tag="done"):
    """The command with this id ended well."""

    result: Generated | GeneratedBatch | Scored | TaskResult | None = None


class Failed(_Message, frozen=True, kw_only=True, tag="failed"):
    """The command with this id failed. `kind` is an ErrorKind; `detail` a traceback for the log, or ""."""

    kind: str
    message: str
    hint: str = ""
    detail: str = ""


Event = Ready | Loaded | Tokens | ProgressEvent | Metric | News | Log | Pong | Done | Failed
