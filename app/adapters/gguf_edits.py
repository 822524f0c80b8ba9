"""From a stack's adapters to what each does to each tensor of a GGUF model: names, shapes and orders of rows alone.

llama.cpp keeps some matrices with their rows in another order, or added to, than transformers does (see to_gguf.py);
what belongs to a row moves with it.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from app.adapters.to_gguf import BY_HEAD, INTERLEAVED, PLAIN, Base, base_of
from app.core.adapter_file import AdaptedModule, AdapterFile, LoraTensors, read_adapter_file
from app.core.compatibility import MERGED_MIXTURES
from app.core.errors import ErrorKind, WeftError
from app.core.formats import GgufHeader, read_gguf_header
from app.core.gguf_header import GgufTensor
from app.core.module_names import Place, is_expert, place_of, role_of
from app.core.recognise_gguf import parts_of
from app.core.stack import AdapterStack
from app.core.tensor_info import TensorInfo

# Architectures of which llama.cpp knows no head of its own: it always is the embedding.
ALWAYS_TIED = frozenset({"gemma", "gemma2", "command-r", "cohere2", "openelm", "bitnet"})
# What llama.cpp calls norms where transformers has these names; Gemma's are stored with 1 added.
_NORMED = frozenset({"qwen2", "qwen2moe", "qwen3", "qwen3moe", "phi3", "gemma"}) | (INTERLEAVED - {"olmo", "deepseek"})
_NORMS = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
}  # fmt: skip
_EXPERT = re.compile(r"(?:mlp|block_sparse_moe)\.experts\.(\d{1,4})\.(w1|w2|w3|gate_proj|up_proj|down_proj)")
_EXPERT_ROLES = {
    "w1": "ffn_gate_exps", "gate_proj": "ffn_gate_exps", "w2": "ffn_down_exps", "down_proj": "ffn_down_exps",
    "w3": "ffn_up_exps", "up_proj": "ffn_up_exps",
}  # fmt: skip


class GgufEdit(NamedTuple):
    """What one adapter does to one tensor.

    Attributes:
        weight: its factor in the stack.
        kind: `pair` (LoRA), `dora`, `whole` (other values in its place), `rows` (trained tokens), `bias` (lora_bias).
        scale: s of D = s·B·A.
        lora: A, B and magnitude of a pair. value: of the other kinds.
        role, dotted: by which rows are put into llama.cpp's order (`attn_q`). ordered: they are so already.
        first: the first of the tensor's rows that it changes.
        expert: the one whose pair it is, of a stacked tensor; -1 for no or all experts.
        part: of a pair for all experts, which half of B's rows: 0 gate, 1 up, -1 all of them.
        indices: rows of `rows`. turned: `value` lies transposed. plus: is added to `value` (Gemma's norms).
    """

    weight: float
    kind: str
    scale: float = 1.0
    lora: LoraTensors | None = None
    value: TensorInfo | None = None
    role: str = ""
    ordered: bool = False
    first: int = 0
    expert: int = -1
    part: int = -1
    indices: tuple[int, ...] = ()
    turned: bool = False
    plus: float = 0.0


class GgufBase(NamedTuple):
    """A GGUF model.

    Attributes:
        headers: of its files, in order. tensors: by name, with the file of each.
        base: what conversions of adapters have to know of it.
    """

    headers: list[GgufHeader]
    tensors: dict[str, tuple[Path, GgufTensor]]
    base: Base

    @property
    def tied(self) -> bool:
        return "output.weight" not in self.tensors


class GgufEdits(NamedTuple):
    """All changes of a stack: tensor name to edits in the order of the stack, and sentences worth showing."""

    by_tensor: dict[str, list[GgufEdit]]
    notes: list[str]


def open_base(path: Path) -> GgufBase:
    """Read the headers of a GGUF model, of all its parts.

    Raises:
        WeftError: CORRUPT, UNSUPPORTED, NOT_FOUND.
    """
    files, missing = parts_of(path)
    if missing:
        raise WeftError(
            ErrorKind.NOT_FOUND,
            f"{len(missing)} of the {len(files) + len(missing)} parts of {path.name} are missing.",
            f"Download them into {path.parent}.",
        )
    headers = [read_gguf_header(file) for file in files]
    tensors: dict[str, tuple[Path, GgufTensor]] = {}
    for header in headers:
        if header.version == 1:
            raise WeftError(
                ErrorKind.UNSUPPORTED,
                f"{header.path.name} is a GGUF file of the first version, which llama.cpp no longer reads.",
                "Get a newer file of this model.",
            )
        for tensor in header.tensors:
            if tensor.name in tensors or not tensor.bytes:
                raise WeftError(
                    ErrorKind.CORRUPT,
                    f"{header.path.name} is damaged: the tensor {tensor.name[:80]!r} stands in two of its parts, or is of "
                    "a type that is not known here.",
                    "Download it again, or update Weft.",
                )
            tensors[tensor.name] = (header.path, tensor)
    if headers[0].text("general.type") == "adapter" or "token_embd.weight" not in tensors:
        raise WeftError(
            ErrorKind.UNSUPPORTED, f"{path.name} is no model that adapters go into.", "Choose a language model."
        )
    return GgufBase(headers, tensors, base_of(headers))


def collect(base: GgufBase, stack: AdapterStack) -> GgufEdits:
    """Fit a stack to a GGUF model (whose layers are repeated already, where the stack repeats some). Adapters of weight 0
    are left out, unread.

    Raises:
        WeftError: BAD_INPUT, CORRUPT, NOT_FOUND; UNSUPPORTED when one does not fit at all, or brings what GGUF cannot hold.
    """
    found = GgufEdits({}, [])
    for adapter in stack.adapters:
        if not math.isfinite(adapter.weight):
            raise WeftError(
                ErrorKind.BAD_INPUT, f"The weight of {adapter.name or adapter.path} is no number.", "Set a number."
            )
        if adapter.weight:
            one = _Collector(base, usable(Path(adapter.path), base), adapter.weight, found)
            for module in one.file.modules.values():
                one.take(module)
            one.check()
    if base.tied and base.base.architecture in ALWAYS_TIED:
        embedding = found.by_tensor.get("token_embd.weight", [])
        if found.by_tensor.get("output.weight", []) != embedding:
            raise WeftError(
                ErrorKind.UNSUPPORTED,
                "The stack changes the embedding or the output head alone, and llama.cpp knows no head of its own for "
                f"{base.base.architecture}.",
                "Use the stack with Transformers on the safetensors model.",
            )
    return found


def usable(path: Path, base: GgufBase) -> AdapterFile:
    """An adapter's headers, checked. Raises WeftError."""
    file = read_adapter_file(path)
    name = path.name
    if file.problems:
        raise WeftError(ErrorKind.CORRUPT, f"{name} cannot be used. {file.problems[0]}", "Get the adapter again.")
    if file.needs_alpha:
        raise WeftError(
            ErrorKind.BAD_INPUT,
            f"{name} does not say its alpha.",
            "Put an adapter_config.json with lora_alpha beside it (often alpha is the rank, or twice the rank).",
        )
    if file.gguf and file.architecture != base.base.architecture:
        raise WeftError(
            ErrorKind.UNSUPPORTED,
            f"{name} was made for the architecture {file.architecture or 'of no name'}, the model is {base.base.architecture}.",
            "Choose a model of that architecture.",
        )
    return file


class _Collector:
    def __init__(self, base: GgufBase, file: AdapterFile, weight: float, found: GgufEdits) -> None:
        self.base, self.file, self.weight, self.found = base, file, weight, found
        self._missing: Counter[str] = Counter()
        self._matched = 0

    def check(self) -> None:
        file, config = self.file, self.file.config
        if not self._matched:
            reason = next(iter(self._missing), "it holds nothing")
            raise WeftError(
                ErrorKind.UNSUPPORTED,
                f"{file.path.name} does not fit this model: 0 of its {len(file.modules)} modules match ({reason}).",
                f"It records {config.base} as its base." if config.base else "Choose the model it was trained on.",
            )
        if self._missing:
            why = "; ".join(f"{reason} ({count})" for reason, count in self._missing.most_common(4))
            self.found.notes.append(
                f"{file.path.name}: {self._matched} of {len(file.modules)} modules match this model. Left out: {why}."
            )
        if file.unknown:
            self.found.notes.append(f"{file.path.name}: {len(file.unknown)} tensors of an unknown kind were left out.")

    def take(self, module: AdaptedModule) -> None:
        place = place_of(module.name)
        reasons = [self._lora(module, place, lora) for lora in module.loras]
        reasons += [self._saved(module, place, name, info) for name, info in module.saved.items()]
        if module.tokens is not None:
            reasons.append(self._tokens(module, place, module.tokens))
        if module.base is not None:
            self._same_vocabulary(module, module.base)
        told = [reason for reason in reasons if reason]
        if told:
            self._missing[told[0]] += 1
        elif reasons or module.base is not None:
            self._matched += 1

    def _add(self, tensor: str, edit: GgufEdit) -> None:
        self.found.by_tensor.setdefault(tensor, []).append(edit)

    def _shape(self, tensor: str) -> tuple[int, ...]:
        """Outermost first; () when the model has no such tensor. A tied head has the embedding's."""
        if tensor == "output.weight" and self.base.tied:
            tensor = "token_embd.weight"
        found = self.base.tensors.get(tensor)
        return tuple(reversed(found[1].shape)) if found else ()

    def _name(self, place: Place) -> str:
        """What GGUF calls a module; "" when nobody knows."""
        if self.file.gguf:
            start = f"blk.{place.layer}." if place.layer >= 0 else ""
            return start + place.tail
        role = role_of(place)
        if not role and not place.tower and self.base.base.architecture in _NORMED:
            role = _NORMS.get(place.tail, "") if place.layer >= 0 else {"norm": "output_norm"}.get(place.tail, "")
        return f"blk.{place.layer}.{role}" if role and place.layer >= 0 else role

    # Pairs ---------------------------------------------------------------------------------------

    def _lora(self, module: AdaptedModule, place: Place, lora: LoraTensors) -> str:
        """Take a pair in. Returns why it has no place, "" when it has."""
        if not self.file.gguf and is_expert(place):
            return self._experts(place, lora)
        name, first = self._name(place), 0
        if not name:
            return f"no {place.tail}"
        size = (lora.inputs, lora.outputs) if lora.embedding else (lora.outputs, lora.inputs)
        start, _, role = name.rpartition(".")
        fused = f"{start}.attn_qkv"
        if (
            role in ("attn_q", "attn_k", "attn_v")
            and not self._shape(f"{name}.weight")
            and self._shape(f"{fused}.weight")
        ):
            out = self._shape(f"{fused}.weight")[0]
            first = {"attn_q": 0, "attn_k": out - 2 * size[0], "attn_v": out - size[0]}[role]
            here = (size[0], self._shape(f"{fused}.weight")[1]) if 0 <= first <= out - size[0] else ()
            name, role = fused, ""
        else:
            here = self._shape(f"{name}.weight")
        if here != size:
            there = "×".join(map(str, here)) or "none"
            return f"{place.tail} is {size[0]}×{size[1]} there, {there} in the model"
        assert lora.scale is not None
        self._check_order(role, lora.outputs)
        edit = GgufEdit(
            self.weight, "pair" if lora.magnitude is None else "dora", lora.scale, lora,
            role=role, ordered=self.file.gguf, first=first,
        )  # fmt: skip
        self._add(f"{name}.weight", edit)
        if lora.bias is not None:
            bias = edit._replace(kind="bias", lora=None, value=lora.bias)
            self._add(f"{name}.bias", bias)
        own_head = any(role_of(place_of(n)) == "output" for n in self.file.modules)
        if lora.embedding and self.base.tied and self.file.config.tied and not own_head:
            self._add("output.weight", edit)
        return ""

    def _experts(self, place: Place, lora: LoraTensors) -> str:
        if self.base.base.architecture not in MERGED_MIXTURES:
            return f"how GGUF keeps {place.tail} of {self.base.base.architecture} is not known"
        if lora.magnitude is not None or lora.bias is not None:
            return "DoRA and biases of experts are not known"
        assert lora.scale is not None
        start = f"blk.{place.layer}."
        edit = GgufEdit(self.weight, "pair", lora.scale, lora, ordered=True)
        if one := _EXPERT.fullmatch(place.tail):
            name = f"{start}{_EXPERT_ROLES[one[2]]}.weight"
            shape = self._shape(name)
            if shape[1:] != (lora.outputs, lora.inputs) or int(one[1]) >= shape[0]:
                return f"{place.tail} does not fit"
            self._add(name, edit._replace(expert=int(one[1])))
            return ""
        names = [f"{start}ffn_{part}_exps.weight" for part in ("gate", "up", "down")]
        gate, up, down = (self._shape(name) for name in names)
        if len(down) != 3 or lora.rank % down[0]:
            return "the model has no such experts"
        if (lora.outputs, lora.inputs) == down[1:]:
            self._add(names[2], edit)
        elif len(gate) == 3 and gate == up and (lora.outputs, lora.inputs) == (2 * gate[1], gate[2]):
            self._add(names[0], edit._replace(part=0))
            self._add(names[1], edit._replace(part=1))
        else:
            return "its experts have other sizes than the model's"
        return ""

    def _check_order(self, role: str, rows: int) -> None:
        """Refuse rows of which llama.cpp's order is not known, or that do not divide into the model's heads."""
        base = self.base.base
        if self.file.gguf or role not in ("attn_q", "attn_k", "attn_qkv") or base.architecture in PLAIN:
            return
        heads = base.kv_heads if role == "attn_k" else base.heads
        parts = 3 if role == "attn_qkv" else 2
        if base.architecture not in (BY_HEAD if role == "attn_qkv" else INTERLEAVED):
            raise WeftError(
                ErrorKind.UNSUPPORTED,
                f"How llama.cpp orders the attention of the architecture {base.architecture!r} is not known here.",
                "Merge into the safetensors model, and export that.",
            )
        if heads < 1 or rows % (heads * parts):
            raise WeftError(
                ErrorKind.CORRUPT,
                f"The model says it has {heads} attention heads, which its {role} of {rows} rows cannot be divided into.",
                "Get the model again.",
            )

    # What was trained whole ----------------------------------------------------------------------

    def _saved(self, module: AdaptedModule, place: Place, parameter: str, info: TensorInfo) -> str:
        name = self._name(place)
        tensor = f"{name}.{parameter}"
        if not name or (parameter not in ("weight", "bias")):
            return f"no {place.tail}"
        shape, role = self._shape(tensor), name.rpartition(".")[2]
        turned = self.base.base.architecture == "gpt2" and place.layer >= 0 and len(info.shape) == 2
        there = info.shape[::-1] if turned else info.shape
        if not shape and parameter == "bias" and self._shape(f"{name}.weight")[:1] == there:
            shape = there  # the model has no bias there; llama.cpp says whether it may have one
        if role in ("token_embd", "output") and there != shape:
            self._same_vocabulary(module, info)
        if there != shape:
            raise self._misfit(module, parameter, there, shape)
        self._check_order(role, there[0])
        plus = 1.0 if self.base.base.architecture == "gemma" and role.endswith("norm") else 0.0
        edit = GgufEdit(self.weight, "whole", value=info, role=role, ordered=self.file.gguf, turned=turned, plus=plus)
        self._add(tensor, edit)
        return ""

    def _same_vocabulary(self, module: AdaptedModule, info: TensorInfo) -> None:
        shape = self._shape("token_embd.weight")
        if len(info.shape) == 2 and info.shape[1:] == shape[1:] and info.shape[0] != shape[0]:
            raise WeftError(
                ErrorKind.UNSUPPORTED,
                f"{self.file.path.name} was trained with a vocabulary of {info.shape[0]:,} tokens, the file has {shape[0]:,}.",
                "Merge it into the safetensors model, which takes new tokens in, and export that.",
            )

    def _tokens(self, module: AdaptedModule, place: Place, info: TensorInfo) -> str:
        shape = self._shape("token_embd.weight")
        if self._name(place) != "token_embd":
            return f"no {place.tail}"
        indices = module.indices
        if info.shape[1:] != shape[1:] or not indices or not 0 <= min(indices) <= max(indices) < shape[0]:
            raise self._misfit(module, "trained tokens", info.shape, shape)
        edit = GgufEdit(self.weight, "rows", value=info, indices=indices, ordered=True)
        self._add("token_embd.weight", edit)
        if self.base.tied:
            self._add("output.weight", edit)
        return ""

    def _misfit(self, module: AdaptedModule, what: str, there: Sequence[int], here: Sequence[int]) -> WeftError:
        return WeftError(
            ErrorKind.UNSUPPORTED,
            f"{self.file.path.name} does not fit: {module.name[-80:]} has a {what} of {tuple(there)} there, "
            f"{tuple(here) or 'none'} in this model.",
            "Choose the model that it was trained on.",
        )
