"""A model run layer by layer over a text: each layer sees all of the text before the next one begins. Needs torch and transformers.

What a layer is handed beside its hidden states (masks, rotary embeddings) differs between architectures and between the layers of one.
So the model's own forward runs once over a piece of the text, and carries the walk: where it comes to a layer, that layer is
worked on with all pieces, and then the forward goes on. Beside it, it runs over a second piece: what a layer is handed for the two has to
be the same but for the hidden states, and those have to be what the layer before has made; else other pieces could not go the same way.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from app.core.errors import ErrorKind, WeftError

LINEAR_TYPES = ("Linear", "Conv1D")
CARRIED = 2  # pieces that the model's own forward runs over
_HINT = "Merge into safetensors, or export a GGUF with `weft export`."


class StopLayerError(Exception):
    """Raised by a hook: the rest of the layer need not be computed."""


class ForeignError(Exception):
    """A model's own code has failed; its cause says how."""


class LayerPass:
    """A layer, and what comes to it.

    Attributes:
        index: its number. name: of the module in the model. module: on the device; see `use`.
        states: its inputs, (1, length, hidden) each, in main memory; after `advance`, its outputs.
        compute: the dtype in which the text goes through.
    """

    def __init__(
        self,
        index: int,
        name: str,
        module: Any,
        states: list[Tensor],
        handed: Callable[[Tensor], Any],
        place: tuple[torch.device, torch.dtype],
    ) -> None:
        self.index, self.name, self.module, self.states = index, name, module, states
        self.device, self.compute = place
        self._handed = handed
        self.outputs: list[Any] = []  # of the pieces that carry the walk, as the layer returns them
        self.use(self.compute)

    def use(self, dtype: torch.dtype) -> None:
        """Have the layer compute in a dtype from now on."""
        self.module.to(self.device, dtype)
        self._dtype = dtype

    def forward(self, hidden: Tensor) -> Any:
        """What the layer makes of one piece, as it returns it."""
        with torch.no_grad():
            return foreign(self._handed, hidden.to(self.device, self._dtype))

    def hear(self, check: Callable[[], None]) -> None:
        """Run all pieces for the sake of hooks; they may raise StopLayerError. Nothing is kept."""
        for hidden in self.states:
            check()
            try:
                self.forward(hidden)
            except StopLayerError:
                continue

    def advance(self, check: Callable[[], None]) -> None:
        """Run all pieces, and put outputs in the place of inputs."""
        for number, hidden in enumerate(self.states):
            check()
            made = self.forward(hidden)
            if number < CARRIED:
                self.outputs.append(made)
            state = first(made).to("cpu", self.compute)
            if not bool(state.isfinite().all()):
                raise WeftError(
                    ErrorKind.CORRUPT,
                    f"Layer {self.index} of this model makes numbers that are not finite.",
                    "Check that the model itself answers sensibly; if not, get it again.",
                )
            self.states[number] = state


def foreign(call: Callable[..., Any], *args: Any, **named: Any) -> Any:
    """Run a model's own code. Raises ForeignError for what it raises, but for memory that does not suffice."""
    try:
        return call(*args, **named)
    except (StopLayerError, WeftError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if "allocate memory" in str(error):
            raise
        raise ForeignError(str(error).strip() or type(error).__name__) from error


def first(made: Any) -> Tensor:
    """The hidden states of what a layer returns."""
    return made[0] if isinstance(made, tuple | list) else made


def layers_of(model: Any) -> list[tuple[str, Any]]:
    """(name, module) of a model's layers, first to last: the outermost list of modules that most of its matrices lie in.

    Raises:
        WeftError: UNSUPPORTED where there is none.
    """
    found: list[tuple[str, Any]] = []
    most = 0
    for name, module in model.named_modules():
        if not isinstance(module, torch.nn.ModuleList) or any(name.startswith(f"{other}.") for other, _ in found):
            continue
        weights = sum(p.numel() for p in module.parameters() if p.dim() > 1)
        if weights > most:
            most, found = weights, [(f"{name}.{number}", layer) for number, layer in enumerate(module)]
    if not found:
        kind = getattr(model.config, "model_type", "this model")
        raise WeftError(ErrorKind.UNSUPPORTED, f"{kind} has no layers that could be quantized one by one.", _HINT)
    return found


def walk(
    model: Any,
    pieces: Sequence[Sequence[int]],
    each: Callable[[LayerPass], None],
    device: torch.device | str = "cpu",
    compute: torch.dtype = torch.float32,
) -> list[Tensor]:
    """Run a model over a text, layer by layer.

    Args:
        model: a causal language model of transformers, in main memory; its layers are given up one by one.
        pieces: token ids; all of one length. each: called with every layer; it calls `advance` once.
        device, compute: where layers compute, and in which dtype; all else computes in float32 where the model lies.

    Returns:
        What the last layer made of each piece, `compute` (1, length, hidden).

    Raises:
        WeftError: UNSUPPORTED for architectures whose layers get more of the text than their hidden states.
    """
    layers = layers_of(model)
    base = getattr(model, model.base_model_prefix, model)
    embed = model.get_input_embeddings()
    inside = {id(part) for _, layer in layers for part in layer.modules()} | {id(embed)}
    head = model.get_output_embeddings()
    for module in base.modules():  # what is small computes in float32
        if id(module) in inside or isinstance(module, torch.nn.Embedding) or module is head:
            continue
        for parameter in module.parameters(recurse=False):
            parameter.data = parameter.data.float()
    with torch.no_grad():
        embedded = _embedded(embed, pieces)
        states = _first_states(base, layers[0][1], embedded)
        del embedded[CARRIED:]
        carriers = _Carriers(base, embedded[1:], (torch.device(device), compute))
        for index, (name, layer) in enumerate(layers):
            layer.forward = _Carrier(index, name, layer, states, each, carriers)
        with carriers:
            base(inputs_embeds=embedded[0], use_cache=False)
    return states


def _embedded(embed: Any, pieces: Sequence[Sequence[int]]) -> list[Tensor]:
    """What the embedding makes of each piece, computed in float32: of the rows that are used alone."""
    tokens = torch.tensor([list(piece) for piece in pieces])
    used, places = tokens.unique(return_inverse=True)
    whole, padding = embed.weight, getattr(embed, "padding_idx", None)
    embed.weight = torch.nn.Parameter(whole.data[used].float(), requires_grad=False)
    embed.padding_idx = None  # it matters to gradients alone, and is none of these rows
    try:
        return [foreign(embed, row[None]).float() for row in places]
    finally:
        embed.weight, embed.padding_idx = whole, padding


class _Carriers:
    """The forwards that carry a walk: the caller's own, and one over a second piece in a thread that waits at each layer.

    Args:
        base: the model without its head. embedded: the second piece, if there is one. place: see `walk`.
    """

    def __init__(self, base: Any, embedded: Sequence[Tensor], place: tuple[torch.device, torch.dtype]) -> None:
        self.place = place
        self._base, self._embedded = base, embedded
        self._came: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._goes_on: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="second carrier", daemon=True) if embedded else None

    def _run(self) -> None:
        try:
            with torch.no_grad():
                self._base(inputs_embeds=self._embedded[0], use_cache=False)
        except StopLayerError:
            pass
        except Exception as error:  # noqa: BLE001 (raised again where the walk waits for it)
            self._came.put(error)

    def is_second(self) -> bool:
        """Whether it is the second forward that asks."""
        return threading.current_thread() is self._thread

    def wait(self, handed: tuple[Any, ...]) -> Any:
        """For the second forward: what a layer has made of its piece. handed: what it is called with."""
        self._came.put(handed)
        made = self._goes_on.get()
        if made is None:
            raise StopLayerError
        return made

    def second(self) -> tuple[Any, ...] | None:
        """What the layer is called with for the second piece; None where there is none."""
        came = self._came.get() if self._thread is not None else None
        if isinstance(came, Exception):
            raise ForeignError(str(came)) from came
        return came

    def let_go(self, made: Any) -> None:
        """Have the second forward go on with what a layer has made."""
        self._goes_on.put(made)

    def __enter__(self) -> None:
        if self._thread is not None:
            self._thread.start()

    def __exit__(self, *_: object) -> None:
        if self._thread is not None:
            self._goes_on.put(None)  # after an error it waits at a layer; after none it has ended
            self._thread.join()


class _Carrier:
    """Stands for a layer's forward while the model carries the walk through its layers."""

    def __init__(
        self,
        index: int,
        name: str,
        layer: Any,
        states: list[Tensor],
        each: Callable[[LayerPass], None],
        carriers: _Carriers,
    ) -> None:
        self._index, self._name, self._layer, self._states, self._each = index, name, layer, states, each
        self._carriers = carriers
        self._own = layer.forward

    def __call__(self, *args: Any, **named: Any) -> Any:
        carriers, given = self._carriers, "hidden_states" in named
        hidden, *beside = _apart(args, named)
        if carriers.is_second():
            return carriers.wait((hidden, beside))
        came = [(hidden, beside), *filter(None, [carriers.second()])]
        for (its_hidden, its_beside), state in zip(came, self._states, strict=False):
            as_before = torch.equal(its_hidden.to(state), state)
            if not as_before or not _alike(its_beside, beside):
                raise more_of_the_text()
        device, own = carriers.place[0], self._own
        placed: dict[torch.dtype, Any] = {}

        def handed(hidden: Tensor) -> Any:
            if hidden.dtype not in placed:
                placed[hidden.dtype] = _placed(beside, device, hidden.dtype)
            rest, others = placed[hidden.dtype]
            return own(*rest, hidden_states=hidden, **others) if given else own(hidden, *rest, **others)

        taken = LayerPass(self._index, self._name, self._layer, self._states, handed, carriers.place)
        self._each(taken)
        self._layer.to("meta")  # its memory goes; the files still have it
        made = [_placed(output, hidden.device, hidden.dtype) for output in taken.outputs]
        if len(came) > 1:
            carriers.let_go(made[1])
        return made[0]


def more_of_the_text() -> WeftError:
    """The refusal of architectures whose layers cannot be run one by one."""
    return WeftError(
        ErrorKind.UNSUPPORTED,
        "The layers of this architecture get more of the text than their hidden states.",
        _HINT,
    )


def _alike(a: Any, b: Any) -> bool:
    """Whether two calls have the same tensors."""
    ours, theirs = list(_tensors(a)), list(_tensors(b))
    return len(ours) == len(theirs) and all(
        x.shape == y.shape and torch.equal(x, y) for x, y in zip(ours, theirs, strict=True)
    )


def _first_states(base: Any, layer: Any, embedded: Sequence[Tensor]) -> list[Tensor]:
    """What comes to the first layer, for each piece."""
    own, states, beside = layer.forward, list[Tensor](), list[Any]()

    def taken(*args: Any, **named: Any) -> Any:
        hidden, *others = _apart(args, named)
        states.append(hidden)
        beside.append(others)
        raise StopLayerError

    layer.forward = taken
    try:
        for piece in embedded:
            with contextlib.suppress(StopLayerError):
                foreign(base, inputs_embeds=piece, use_cache=False)
    finally:
        layer.forward = own
    if not all(_alike(other, beside[0]) for other in beside[1:]):
        raise more_of_the_text()
    return states


def _apart(args: tuple[Any, ...], named: dict[str, Any]) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
    """Hidden states apart from what else a layer is called with."""
    if "hidden_states" in named:
        return named["hidden_states"], args, {k: v for k, v in named.items() if k != "hidden_states"}
    return args[0], args[1:], named


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from _tensors(part)
    elif isinstance(value, tuple | list):
        for part in value:
            yield from _tensors(part)


def _placed(value: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """The same with its tensors on a device, and what is float in a dtype."""
    if isinstance(value, Tensor):
        return value.to(device, dtype) if value.is_floating_point() else value.to(device)
    if isinstance(value, dict):
        return {key: _placed(part, device, dtype) for key, part in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_placed(part, device, dtype) for part in value)
    return value
