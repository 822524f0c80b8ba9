"""A merged model as a stream of tensors: read, changed and handed on row by row, so that memory is that of a piece.

Whoever writes the stream (safetensors shards, GGUF) takes `Merge.tensors` in order, and of each either its pieces or,
where nothing changes it, the place on disk to copy from.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch

from app.adapters.merge_edits_torch import Edit, Edits, collect
from app.adapters.merge_files import FLOATS, TORCH_NAMES, BaseFiles, StoredTensor
from app.adapters.merge_math_torch import Matrices, pieces
from app.adapters.merge_names_torch import Block, Layout, blocks_of, meta_model, skeleton, through_transformers
from app.adapters.merge_tensor_torch import ELEMENTS, MergedTensor
from app.adapters.tensors_torch import OpenAdapter, open_adapter
from app.core.adapter_file import locate
from app.core.errors import ErrorKind, WeftError
from app.core.merge_plan import DTYPES, MergePlan
from app.core.module_names import place_of
from app.core.tensor_info import TensorInfo

_SAFETENSORS = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
_LAYER_KEYS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")


class NeedsPeft(Exception):
    """A stack that cannot be merged by streaming, with the reason; PEFT can."""


class Merge:
    """A base and a stack, ready to be written. A context manager.

    Args:
        plan: what to merge.
        files: the base's weight files, checked to lie in its folder.
        config: the base's config.json, cleaned. stage: a folder that transformers may read the config from.
        opened: the files, where somebody has opened them in a way of their own; closed with this.
        quick: use names from headers where these serve; False asks transformers always.

    Attributes:
        tensors: of the merged model, in the order of the base's files.
        config: what changes in the base's config: keys to values.
        notes: sentences worth showing. untied: the head got a matrix of its own. peft: why only PEFT can do it.
        adapters: opened, with their weights.

    Raises:
        WeftError: before anything is written, for all that cannot be merged.
        NeedsPeft: when PEFT can.
    """

    def __init__(
        self,
        plan: MergePlan,
        files: Sequence[Path],
        config: Mapping[str, Any],
        stage: str,
        *,
        quick: bool = True,
        opened: BaseFiles | None = None,
    ) -> None:
        if plan.dtype not in DTYPES:
            raise WeftError(ErrorKind.BAD_INPUT, f"{plan.dtype!r} is no data type of weights.", f"Choose one of {', '.join(DTYPES[1:])}.")  # fmt: skip
        self.plan, self._base_config, self._stage = plan, config, stage
        self.config: dict[str, Any] = {}
        self.notes: list[str] = []
        self.untied = False
        active = [a for a in plan.stack.adapters if a.weight]
        self.files = opened if opened is not None else BaseFiles(())
        if len(active) == 1 and active[0].weight == 1:
            kind = locate(Path(active[0].path))[0]
            if not kind.is_lora and kind.kind != "TRAINABLE_TOKENS":
                raise NeedsPeft(f"an adapter of the kind {kind.kind} is not made of low-rank pairs")
        self.adapters: list[tuple[OpenAdapter, float]] = [(open_adapter(Path(a.path)), a.weight) for a in active]
        self.matrices = Matrices([adapter for adapter, _ in self.adapters])
        self.files = opened if opened is not None else BaseFiles(files)
        try:
            self.notes += self.files.notes
            self.tensors = self._plan(quick)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the base's files."""
        self.files.close()

    def __enter__(self) -> Merge:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # Planning -----------------------------------------------------------------------------------

    def _plan(self, quick: bool) -> list[MergedTensor]:
        stored = self._replicated(self.files.tensors)
        layout, edits, both = self._fit(stored, quick)
        self.notes += edits.notes
        self._compare_copies(layout, edits)
        edited = edits.by_parameter
        for parameter, reason in layout.strange.items():
            if edited.get(parameter):
                raise NeedsPeft(f"{parameter}: {reason}")
        made = [self._tensor(t.name, t, layout, edits) for t in stored.values()]
        if layout.tied:
            made += self._untie(layout, edits, stored)
        elif both and edited.get(layout.embedding, []) != edited.get(layout.head, []):
            self.untied = True
            self.config["tie_word_embeddings"] = False
        self._vocabulary(layout, edits)
        return made

    def _fit(self, stored: Mapping[str, StoredTensor], quick: bool) -> tuple[Layout, Edits, bool]:
        family = str(self._base_config.get("model_type", ""))
        layout = skeleton(stored, family) if quick else None
        if layout is not None:
            both = self._both_alike(layout, stored)
            edits = collect(layout, self.adapters, layout.tied or both)
            if not edits.unmatched and not edits.left_out:
                return layout, edits, both
        try:
            layout = self._through_transformers(stored)
        except WeftError as error:
            own = self._by_its_own_names(stored, family, error)
            if own is None:
                raise
            return own
        both = self._both_alike(layout, stored)
        return layout, collect(layout, self.adapters, layout.tied or both), both

    def _by_its_own_names(
        self, stored: Mapping[str, StoredTensor], family: str, error: WeftError
    ) -> tuple[Layout, Edits, bool] | None:
        """The layout of an architecture that transformers does not know, where all names and shapes of the adapters fit it."""
        layout = skeleton(stored, family, unknown=True) if error.kind is ErrorKind.UNSUPPORTED else None
        if layout is None or (layout.tied and self._base_config.get("tie_word_embeddings") is not True):
            return None
        both = self._both_alike(layout, stored)
        try:
            edits = collect(layout, self.adapters, layout.tied or both)
        except WeftError:
            return None
        if edits.unmatched or edits.left_out:
            return None
        self.notes.append(
            f"The installed transformers does not know the architecture {family or 'of this model'}: names were taken as the files have them."
        )
        return layout, edits, both

    def _through_transformers(self, stored: Mapping[str, StoredTensor]) -> Layout:
        config = {**self._base_config, **self.config}
        return through_transformers(stored, meta_model(self._stage, config, self.config))

    def _both_alike(self, layout: Layout, stored: Mapping[str, StoredTensor]) -> bool:
        """Whether head and embedding both lie on disk and are the same: transformers ties them then, where the config says so."""
        if layout.tied or not layout.head or self._base_config.get("tie_word_embeddings") is False:
            return False
        found = [
            next((stored[n] for n, blocks in layout.blocks.items() if [b.parameter for b in blocks] == [p]), None)
            for p in (layout.embedding, layout.head)
        ]
        first, second = found
        if first is None or second is None or first.shape != second.shape or first.dtype != second.dtype:
            return False
        for start in range(0, first.bytes, 1 << 22):
            length = min(1 << 22, first.bytes - start)
            a, b = bytearray(length), bytearray(length)
            self.files.read(first, start, memoryview(a))
            self.files.read(second, start, memoryview(b))
            if a != b:
                return False
        return True

    def _replicated(self, stored: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
        """Layers repeated as the adapters' layer_replication says."""
        wanted = {adapter.file.config.layer_replication for adapter, _ in self.adapters}
        if not wanted or wanted == {()}:
            return stored
        if len(wanted) > 1:
            raise WeftError(
                ErrorKind.UNSUPPORTED,
                "The adapters of this stack repeat the base's layers differently (layer replication): they belong to different models.",
                "Merge one of them alone.",
            )
        order = [layer for start, end in next(iter(wanted)) for layer in range(start, end)]
        layers = 1 + max((p.layer for n in stored if not (p := place_of(n)).tower), default=-1)
        if max(order) >= layers:
            raise WeftError(
                ErrorKind.UNSUPPORTED,
                f"The adapter repeats layer {max(order)} of its base, and this model has {layers} layers.",
                "Choose the model that it was trained on.",
            )
        made: dict[str, StoredTensor] = {}
        by_layer: dict[int, list[StoredTensor]] = {}
        for tensor in stored.values():
            place = place_of(tensor.name)
            if place.layer < 0 or place.tower:
                made[tensor.name] = tensor
            else:
                by_layer.setdefault(place.layer, []).append(tensor)
        for number, layer in enumerate(order):
            for tensor in by_layer.get(layer, ()):
                parts = tensor.name.split(".")
                index = next(i for i, part in enumerate(parts) if part.isdecimal() and len(part) < 6)
                name = ".".join([*parts[:index], str(number), *parts[index + 1 :]])
                made[name] = tensor._replace(name=name, key=tensor.key or tensor.name)
        for key in _LAYER_KEYS:
            if self._base_config.get(key) == layers:
                self.config[key] = len(order)
        types = self._base_config.get("layer_types")
        if isinstance(types, list) and len(types) == layers:
            self.config["layer_types"] = [types[layer] for layer in order]
        self.notes.append(f"Layers are repeated as the adapter says: {layers} became {len(order)}.")
        return made

    def _tensor(self, name: str, source: StoredTensor, layout: Layout, edits: Edits) -> MergedTensor:
        blocks = layout.blocks.get(source.name) or blocks_of("", source.shape)
        return self._made(name, source, blocks, edits)

    def _made(self, name: str, source: StoredTensor, blocks: list[Block], edits: Edits) -> MergedTensor:
        shape, grown = source.shape, None
        if len(shape) == 1:
            blocks = [Block(0, shape[0], blocks[0].parameter, blocks[0].expert)]
        found = [edits.by_parameter.get(block.parameter, []) if block.parameter else [] for block in blocks]
        found = [[e for e in one if e.expert in (-1, block.expert)] for one, block in zip(found, blocks, strict=True)]
        if len(blocks) == 1 and blocks[0].parameter in edits.grown:
            number, info = edits.grown[blocks[0].parameter]
            shape, grown = info.shape, (Edit(number, 1.0, "whole"), info)
            blocks = [blocks[0]._replace(rows=shape[0])]
        dtype = source.dtype
        if self.plan.dtype and dtype in FLOATS:
            dtype = _SAFETENSORS[self.plan.dtype]
        if (any(found) or grown) and dtype not in FLOATS:
            raise WeftError(
                ErrorKind.UNSUPPORTED,
                f"{source.name} is stored as {dtype}, which nothing can be merged into.",
                "Choose the model in 16 or 32 bits.",
            )
        return MergedTensor(self, name, dtype, shape, source, found, blocks, grown)

    def _untie(self, layout: Layout, edits: Edits, stored: Mapping[str, StoredTensor]) -> list[MergedTensor]:
        """A head of its own, where what adapters do to the embedding is not what they do to the head."""
        names = (layout.embedding, layout.head)
        ours, heads = (edits.by_parameter.get(p, []) for p in names)
        grown = [edits.grown.get(p) for p in names]
        same_grown = grown[0] == grown[1] or (None not in grown and self._same_values(*[info for _, info in grown]))  # type: ignore[union-attr]
        if same_grown and self._alike(ours, heads):
            return []
        source = next(
            stored[name] for name, blocks in layout.blocks.items() if blocks[0].parameter == layout.embedding
        )  # fmt: skip
        self.untied = True
        self.config["tie_word_embeddings"] = False
        self.notes.append(
            "The model's head and embedding were one matrix. The adapters change them differently, so that the merged model has both."
        )
        blocks = [Block(0, source.rows, layout.head)]
        return [self._made(layout.head, source, blocks, edits)]

    def _alike(self, ours: list[Edit], heads: list[Edit]) -> bool:
        """Whether an embedding and its head are changed alike. PEFT may save what it tied twice, once for each."""
        if len(ours) != len(heads):
            return False
        for one, other in zip(ours, heads, strict=True):
            if one == other:
                continue
            if (one.adapter, one.kind, one.weight, one.scale) != (other.adapter, other.kind, other.weight, other.scale):
                return False
            if one.kind == "pair" and one.a and one.b and other.a and other.b:
                read = self.matrices.read
                a, b = read(one, one.a), read(one, one.b)
                if not torch.equal(b.T, read(other, other.a)) or not torch.equal(a.T, read(other, other.b)):
                    return False
            elif (
                one.kind != "whole" or not one.value or not other.value or not self._same_values(one.value, other.value)
            ):
                return False
        return True

    def _same_values(self, one: TensorInfo, other: TensorInfo) -> bool:
        if one.shape != other.shape or one.type != other.type or one.file != other.file or len(one.shape) != 2:
            return False
        edit = next(
            Edit(i, 1.0, "whole")
            for i, (a, _) in enumerate(self.adapters)
            if a.file.path in (one.file, one.file.parent)
        )
        rows = self.matrices.rows
        return all(
            torch.equal(rows(edit, one, start, end), rows(edit, other, start, end))
            for start, end in pieces(one.shape[0], one.shape[1], ELEMENTS)
        )

    def _vocabulary(self, layout: Layout, edits: Edits) -> None:
        sizes = {info.shape[0] for _, info in edits.grown.values()}
        if not sizes:
            return
        both = {layout.embedding, layout.head} <= set(edits.grown)
        whole = both or not layout.head or (layout.tied and not self.untied)
        if len(sizes) > 1 or not whole:
            raise WeftError(
                ErrorKind.UNSUPPORTED,
                "The adapter brings new tokens for the model's embedding or its output head, and not for both.",
                "Train it with both embed_tokens and lm_head in modules_to_save.",
            )
        self.config["vocab_size"] = sizes.pop()
        self.notes.append(f"The vocabulary grew to {self.config['vocab_size']:,} tokens, with the adapter's.")

    def _compare_copies(self, layout: Layout, edits: Edits) -> None:
        """Keep those copies of an embedding that differ from the base's own."""
        for parameter, copies in edits.copies.items():
            place = layout.embedding if layout.tied and parameter == layout.head else parameter
            source = next(
                (self.files.tensors.get(n) for n, bs in layout.blocks.items() if bs[0].parameter == place), None
            )
            for copy in copies:
                if source is not None and self._same(source, copy):
                    continue
                edits.by_parameter.setdefault(parameter, []).insert(0, copy)

    def _same(self, source: StoredTensor, copy: Edit) -> bool:
        stored = getattr(torch, TORCH_NAMES[source.dtype])
        assert copy.value is not None
        largest = worst = 0.0
        for start, end in pieces(source.rows, source.width, ELEMENTS):
            data = bytearray((end - start) * source.width * source.item)
            self.files.read(source, start * source.width * source.item, memoryview(data))
            base = torch.frombuffer(data, dtype=stored).reshape(end - start, -1).float()
            value = self.matrices.rows(copy, copy.value, start, end)
            worst = max(worst, float((base - value).abs().max()))
            largest = max(largest, float(value.abs().max()))
        return worst <= 1e-2 * largest


class TensorHead(NamedTuple):
    """What is known of a merged tensor before its data: the interface for writers of other formats."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    tensor: MergedTensor


def merged_tensors(merge: Merge) -> Iterator[TensorHead]:
    """The tensors of a merged model in order; `head.tensor.chunks()` yields their bytes."""
    for tensor in merge.tensors:
        yield TensorHead(tensor.name, tensor.dtype, tensor.shape, tensor)
