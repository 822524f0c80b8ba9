"""Weight files as we write them: which tensor goes into which, and the header that stands before their data."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Protocol

DEFAULT_SIZE = 5_000_000_000  # bytes of a file, where the base's own division does not serve


class Writable(Protocol):
    """What has to be known of a tensor to give it a place."""

    @property
    def name(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def bytes(self) -> int: ...
    @property
    def row_bytes(self) -> int: ...


class Shard:
    """One weight file.

    Attributes:
        name: of the file. header: its first bytes. offsets: of each tensor's data in it, in the order of `members`.
        members: numbers of tensors in the list that was divided. size: bytes of the whole file.
    """

    def __init__(self, name: str, members: Sequence[int], tensors: Sequence[Writable]) -> None:
        # Wider elements first: data of every tensor is then aligned, which some readers rely on.
        self.members = sorted(members, key=lambda i: -_item(tensors[i]))
        self.name = name
        entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
        position, starts = 0, list[int]()
        for number in self.members:
            tensor = tensors[number]
            starts.append(position)
            entries[tensor.name] = {
                "dtype": tensor.dtype,
                "shape": list(tensor.shape),
                "data_offsets": [position, position + tensor.bytes],
            }
            position += tensor.bytes
        text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        self.header = len(text).to_bytes(8, "little") + text
        self.offsets = [len(self.header) + start for start in starts]
        self.size = len(self.header) + position


def _item(tensor: Writable) -> int:
    count = 1
    for extent in tensor.shape:
        count *= extent
    return tensor.bytes // count if count else 8


def divide(tensors: Sequence[Writable], origins: Sequence[str], limit: int) -> list[Shard]:
    """Give every tensor a file.

    Args:
        origins: the base's file that each comes from. limit: bytes of a file at most (a tensor is never cut);
            0 keeps to the base's own files.

    Returns:
        Files under the names that transformers looks for.
    """
    groups: list[list[int]] = []
    if limit <= 0 and max(_sums(tensors, origins).values(), default=0) <= 2 * DEFAULT_SIZE:
        by_origin: dict[str, list[int]] = {}
        for number, origin in enumerate(origins):
            by_origin.setdefault(origin, []).append(number)
        groups = [by_origin[origin] for origin in sorted(by_origin)]
    else:
        size = 0
        for number, tensor in enumerate(tensors):
            if not groups or size + tensor.bytes > (limit if limit > 0 else DEFAULT_SIZE):
                groups.append([])
                size = 0
            groups[-1].append(number)
            size += tensor.bytes
    if len(groups) == 1:
        return [Shard("model.safetensors", groups[0], tensors)]
    return [
        Shard(f"model-{i:05d}-of-{len(groups):05d}.safetensors", group, tensors) for i, group in enumerate(groups, 1)
    ]


def _sums(tensors: Sequence[Writable], origins: Sequence[str]) -> dict[str, int]:
    found: dict[str, int] = {}
    for tensor, origin in zip(tensors, origins, strict=True):
        found[origin] = found.get(origin, 0) + tensor.bytes
    return found


def index_of(shards: Sequence[Shard], tensors: Sequence[Writable]) -> bytes:
    """The JSON that says which file holds which tensor."""
    mapping = {tensors[i].name: shard.name for shard in shards for i in shard.members}
    total = sum(tensor.bytes for tensor in tensors)
    document = {"metadata": {"total_size": total}, "weight_map": dict(sorted(mapping.items()))}
    return json.dumps(document, indent=2, ensure_ascii=False).encode() + b"\n"
