"""Layer replication in a GGUF model: which of its tensors stands for which layer of the longer model, and the keys that say so.

The longer model holds its layers as often as they are repeated: GGUF knows no tensor of two names. Nothing of the data is
read here.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from app.adapters.gguf_edits import GgufBase
from app.adapters.gguf_head import whole_number
from app.core.adapter_file import locate
from app.core.errors import ErrorKind, WeftError
from app.core.gguf_header import GgufTensor, os_error
from app.core.module_names import UNIFORM
from app.core.stack import AdapterStack

_LAYER = re.compile(r"blk\.(\d{1,6})\.(.+)", re.DOTALL)
_ARRAY = 9  # type of a value
# Bytes of an array's elements, by their type; strings have none.
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
Ranges = tuple[tuple[int, int], ...]


class Repeated(NamedTuple):
    """A model whose layers are repeated.

    Attributes:
        base: with the tensors of the longer model, each where its data lie in the file.
        keys: what stands in the new file for a key of the old one: the whole entry.
        notes: sentences worth showing.
    """

    base: GgufBase
    keys: dict[str, bytes]
    notes: list[str]


def repeated_layers(stack: AdapterStack) -> Ranges:
    """The ranges of layers that all adapters of weight other than 0 agree on; empty for none.

    Raises:
        WeftError: UNSUPPORTED when they disagree: then they belong to different models. NOT_FOUND, CORRUPT.
    """
    found: dict[Ranges, str] = {}
    for adapter in stack.adapters:
        if adapter.weight:
            path = Path(adapter.path)
            gguf = path.suffix.lower() == ".gguf"
            ranges = () if gguf else locate(path)[0].layer_replication
            found.setdefault(ranges, adapter.name or path.name)
    if len(found) > 1:
        first, second = [name for _, name in sorted(found.items())[:2]]
        raise WeftError(
            ErrorKind.UNSUPPORTED,
            f"{first} and {second} cannot be stacked: they repeat different layers of the base (layer replication).",
            "Switch one of them off.",
        )
    return next(iter(found), ())


def with_repeated_layers(base: GgufBase, ranges: Ranges) -> Repeated:
    """The longer model; the base itself where nothing is repeated.

    Raises:
        WeftError: UNSUPPORTED for an architecture whose layers differ by their number, and for layers that the model lacks.
    """
    if not ranges:
        return Repeated(base, {}, [])
    outer, layers = _by_layer(base)
    count, order = len(layers), [layer for start, end in ranges for layer in range(start, end)]
    architecture = base.base.architecture
    header = base.headers[0]
    if architecture not in UNIFORM or header.number(f"{architecture}.block_count") != count:
        raise WeftError(
            ErrorKind.UNSUPPORTED,
            f"The adapter repeats layers, and llama.cpp tells layers of the architecture {architecture!r} apart by their numbers.",
            "Use it with Transformers, or merge it into the safetensors model.",
        )
    if not order or max(order) >= count:
        raise WeftError(
            ErrorKind.UNSUPPORTED,
            f"The adapter repeats layer {max(order, default=0)} of its base, and this model has {count} layers.",
            "Choose the model that it was trained on.",
        )
    tensors = dict(outer)
    for number, layer in enumerate(order):
        for tail, (path, tensor) in layers[layer].items():
            name = f"blk.{number}.{tail}"
            tensors[name] = (path, tensor._replace(name=name))
    note = f"Layers are repeated as the adapter says: {count} became {len(order)}."
    return Repeated(base._replace(tensors=tensors), _keys(base, count, order), [note])


def _by_layer(
    base: GgufBase,
) -> tuple[dict[str, tuple[Path, GgufTensor]], dict[int, dict[str, tuple[Path, GgufTensor]]]]:
    outer: dict[str, tuple[Path, GgufTensor]] = {}
    layers: dict[int, dict[str, tuple[Path, GgufTensor]]] = {}
    for name, found in base.tensors.items():
        match = _LAYER.fullmatch(name)
        if match is None:
            outer[name] = found
        else:
            layers.setdefault(int(match[1]), {})[match[2]] = found
    if sorted(layers) != list(range(len(layers))):
        raise WeftError(ErrorKind.CORRUPT, f"{base.headers[0].path.name} lacks some of its layers.", "Get it again.")
    return outer, layers


def _keys(base: GgufBase, count: int, order: Sequence[int]) -> dict[str, bytes]:
    """The number of layers, and lists that have a value for each layer."""
    header, start = base.headers[0], f"{base.base.architecture}."
    made: dict[str, bytes] = {}
    try:
        with header.path.open("rb") as file:
            for key, (first, end) in header.spans.items():
                value = header.metadata.get(key)
                if key == f"{start}block_count":
                    made[key] = whole_number(key, len(order))
                elif key.startswith(start) and not isinstance(value, str) and header.count(key) == count:
                    file.seek(first)
                    made[key] = _reordered(key, file.read(end - first), count, order)
    except OSError as error:
        raise os_error(header.path, error) from error
    return made


def _reordered(key: str, entry: bytes, count: int, order: Sequence[int]) -> bytes:
    start = 8 + len(key.encode())  # the key's length, and the key
    kind, element = struct.unpack_from("<II", entry, start)
    size = _SIZES.get(element, 0)
    head, data = entry[: start + 8], entry[start + 16 :]
    if kind != _ARRAY or len(data) != count * size:
        return entry  # no list of numbers
    return head + struct.pack("<Q", len(order)) + b"".join(data[n * size : (n + 1) * size] for n in order)
