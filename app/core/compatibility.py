"""Does this adapter fit this model? From headers alone; no tensor's data is read."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from enum import StrEnum
from pathlib import Path

import msgspec

from app.core.adapter_file import AdaptedModule, AdapterFile
from app.core.errors import WeftError
from app.core.formats import SafetensorsTensor, read_gguf_header, read_safetensors_header
from app.core.library import ModelEntry, ModelFormat
from app.core.module_names import (
    BY_HEAD,
    INTERLEAVED,
    PLAIN,
    UNIFORM,
    Place,
    expected,
    gguf_architectures,
    has,
    is_expert,
    place_of,
    role_of,
)

Shape = tuple[int, int]
_KNOWN_ORDER = PLAIN | INTERLEAVED | BY_HEAD
# Mixtures whose experts llama.cpp stacks by rows as they are: gate, up and down.
MERGED_MIXTURES = frozenset({"llama", "qwen2moe", "qwen3moe", "olmoe"})
_TRANSPOSED = frozenset({"gpt2", "openai-gpt", "imagegpt"})  # their Conv1D keeps (in, out)
_WEIGHT = re.compile(r"(?P<module>.+)\.(?P<kind>weight|qweight|q_weight|W_q|trellis)")


class Verdict(StrEnum):
    """How well an adapter fits."""

    FITS = "fits"
    PARTLY = "partly"
    NOT_AT_ALL = "not at all"


class Unmatched(msgspec.Struct, frozen=True):
    """A module of the adapter that has no place in the model, and why."""

    module: str
    reason: str


class Compatibility(msgspec.Struct, frozen=True, kw_only=True):
    """The answer.

    Attributes:
        matched, total: modules of the adapter.
        unmatched: the others, in the adapter's order.
        warnings: what else is worth knowing, in sentences.
        base: the base model that the adapter records. same_base: whether this one bears its name; None when none is recorded.
        exact: shapes come from the model's own headers, not from what the library's index knows.
    """

    matched: int
    total: int
    unmatched: tuple[Unmatched, ...] = ()
    warnings: tuple[str, ...] = ()
    base: str = ""
    same_base: bool | None = None
    exact: bool = True

    @property
    def verdict(self) -> Verdict:
        if self.total and self.matched == self.total:
            return Verdict.FITS
        return Verdict.PARTLY if self.matched else Verdict.NOT_AT_ALL


class ModelModules(msgspec.Struct, kw_only=True):
    """A model's modules as its headers tell them. Shapes are (out, in); None where quantization hides them."""

    entry: ModelEntry
    shapes: dict[Place, Shape | None]
    vectors: dict[tuple[Place, str], int]  # biases and norms: their lengths
    layers: int = 0
    gguf: bool = False


def model_modules(entry: ModelEntry) -> ModelModules:
    """Read a model's headers.

    Raises:
        WeftError: as reading a header does, when the files are damaged or gone.
    """
    found = ModelModules(entry=entry, shapes={}, vectors={}, gguf=entry.format is ModelFormat.GGUF)
    if found.gguf:
        for file in entry.files or (entry.path,):
            for tensor in read_gguf_header(Path(file)).tensors:
                name = tensor.name.removesuffix(".weight").removesuffix(".bias")
                if len(tensor.shape) == 2:
                    found.shapes[place_of(name)] = (tensor.shape[1], tensor.shape[0])
                elif len(tensor.shape) == 1:
                    found.vectors[place_of(name), tensor.name.rpartition(".")[2]] = tensor.shape[0]
    else:
        for file in entry.files:
            if not file.endswith(".safetensors"):
                return from_index(entry)
            _add_tensors(found, read_safetensors_header(Path(file)).tensors)
    found.layers = 1 + max((p.layer for p in found.shapes if not p.tower), default=-1)
    return found


def _add_tensors(found: ModelModules, tensors: Sequence[SafetensorsTensor]) -> None:
    extra = {t.name: t.shape for t in tensors if t.name.endswith((".scales", ".g_idx"))}
    transposed = found.entry.model_type in _TRANSPOSED
    for tensor in tensors:
        match = _WEIGHT.fullmatch(tensor.name)
        if match is None or (len(tensor.shape) == 1 and match["kind"] == "weight"):
            owner, _, parameter = tensor.name.rpartition(".")
            if len(tensor.shape) == 1:
                found.vectors[place_of(owner), parameter] = tensor.shape[0]
            if parameter in ("gate_up_proj", "down_proj") and len(tensor.shape) == 3:
                found.shapes[place_of(owner)] = None  # all experts in one
            continue
        place = place_of(match["module"])
        if match["kind"] == "weight" and len(tensor.shape) == 2 and tensor.dtype not in ("U8", "I8", "I32"):
            rows, columns = tensor.shape
            inside = transposed and place.layer >= 0
            found.shapes[place] = (columns, rows) if inside else (rows, columns)
        elif match["kind"] == "weight" and tensor.dtype == "I8" and len(tensor.shape) == 2:
            found.shapes[place] = (tensor.shape[0], tensor.shape[1])
        else:
            found.shapes[place] = _quantized_shape(match["module"], match["kind"], tensor, extra)
        if place.layer >= 0 and is_expert(place):
            found.shapes.setdefault(Place(place.layer, "mlp.experts", place.tower), None)


def _quantized_shape(
    module: str, kind: str, tensor: SafetensorsTensor, extra: Mapping[str, tuple[int, ...]]
) -> Shape | None:
    scales, indices = extra.get(f"{module}.scales"), extra.get(f"{module}.g_idx")
    if kind != "qweight" or len(tensor.shape) != 2 or scales is None or len(scales) != 2:
        return None
    if scales[1] == tensor.shape[1]:  # GPTQ packs along the inputs
        return (scales[1], indices[0]) if indices else None
    return (scales[1], tensor.shape[0])  # AWQ along the outputs


def from_index(entry: ModelEntry) -> ModelModules:
    """What the library's index alone tells: no file is opened. `shapes` stays empty; `match` then goes by the architecture."""
    return ModelModules(
        entry=entry, shapes={}, vectors={}, layers=entry.shape.layers, gguf=entry.format is ModelFormat.GGUF
    )


def check(adapter: AdapterFile, model: ModelModules) -> Compatibility:
    """Hold every module of an adapter against a model."""
    unmatched: list[Unmatched] = []
    matched = 0
    replicated = sum(end - start for start, end in adapter.config.layer_replication)
    for module in adapter.modules.values():
        reason = _reason(adapter, module, model, replicated or model.layers)
        if reason:
            unmatched.append(Unmatched(module.name, reason))
        else:
            matched += 1
    return Compatibility(
        matched=0 if adapter.problems else matched,
        total=len(adapter.modules),
        unmatched=tuple(unmatched),
        warnings=tuple(_warnings(adapter, model)),
        base=adapter.config.base,
        same_base=same_base(adapter.config.base, model.entry),
        exact=bool(model.shapes),
    )


def _reason(adapter: AdapterFile, module: AdaptedModule, model: ModelModules, layers: int) -> str:
    """Why a module does not fit; "" when it does."""
    place = place_of(module.name)
    role = place.tail if adapter.gguf else role_of(place)
    if reason := _other_architecture(adapter, model):
        return reason
    if layers and place.layer >= layers and not place.tower:
        return f"the model has only {layers} layers"
    if adapter.config.layer_replication and place.layer >= 0 and not place.tower:
        # Which of the base's layers stands there.
        order = [layer for start, end in adapter.config.layer_replication for layer in range(start, end)]
        place = place._replace(layer=order[place.layer] if place.layer < len(order) else place.layer)
        if model.layers and place.layer >= model.layers:
            return f"it repeats layer {place.layer}, and the model has only {model.layers} layers"
    if model.gguf and not role:
        if not is_expert(place):
            return "GGUF files have no such module"
        mixed = model.entry.architecture in MERGED_MIXTURES and model.entry.shape.experts
        return "" if mixed else f"the experts of {model.entry.architecture or 'this model'} cannot be merged into GGUF"
    known, shape = _find(place, role, model, adapter.gguf)
    if not known and _is_vector(module, place, model):
        return _vectors_fit(module, place, model)
    if not known:
        return _absent(place, role, model)
    sizes = [(lora.outputs, lora.inputs) for lora in module.loras if not is_expert(place)]
    sizes = [(n, out) if lora.embedding else (out, n) for lora, (out, n) in zip(module.loras, sizes, strict=False)]
    sizes += [(t.shape[0], t.shape[1]) for n, t in module.saved.items() if n == "weight" and len(t.shape) == 2]
    if module.base is not None and len(module.base.shape) == 2:
        sizes.append((module.base.shape[0], module.base.shape[1]))
    for size in sizes:
        if shape is not None and size != shape:
            return f"it is {size[0]}×{size[1]} there, {shape[0]}×{shape[1]} in the model"
    if module.tokens is not None and shape is not None:
        if module.tokens.shape[-1] != shape[1] or max(module.indices, default=0) >= shape[0]:
            return "its trained tokens are not in the model's vocabulary"
    return ""


def _other_architecture(adapter: AdapterFile, model: ModelModules) -> str:
    """Why a GGUF adapter cannot be used with a model whatever its shapes are: llama.cpp looks at this first."""
    if not adapter.gguf or not adapter.architecture or not model.entry.model_type:
        return ""
    known = (model.entry.architecture,) if model.gguf else gguf_architectures(model.entry.model_type)
    return "" if adapter.architecture in known else f"it was made for {adapter.architecture}, the model is {known[0]}"


def _find(place: Place, role: str, model: ModelModules, gguf: bool) -> tuple[bool, Shape | None]:
    """Whether the model has the module, and its shape where that is known."""
    entry = model.entry
    family = entry.model_type
    if model.shapes:
        key = Place(place.layer, role) if model.gguf else place
        if not model.gguf and role and (gguf or place.layer < 0) and not place.tower:
            # Embeddings go by what they are, whatever a family calls them; so do the names of a GGUF adapter.
            same = (p for p in model.shapes if p.layer == place.layer and role_of(p) == role)
            key = place if place in model.shapes else next(same, place)
        if role == "output" and key not in model.shapes:
            # A tied head has no matrix of its own in the file, and can be adapted all the same.
            tied = (
                s
                for p, s in model.shapes.items()
                if p.layer < 0 and (p.tail if model.gguf else role_of(p)) == "token_embd"
            )
            shape = next(tied, None)
            return shape is not None, shape
        if key not in model.shapes and is_expert(place):
            key = Place(place.layer, "mlp.experts", place.tower)
        if key not in model.shapes:
            return False, None
        return True, model.shapes[key] or expected(role, entry.shape, family)
    if not role and not is_expert(place):
        return False, None
    if is_expert(place):
        return entry.shape.experts > 0, None
    if place.layer >= 0 and not has(family, entry.shape.experts, place.tail, role, model.gguf or gguf):
        return False, None
    return True, expected(role, entry.shape, family)


def _is_vector(module: AdaptedModule, place: Place, model: ModelModules) -> bool:
    return not module.loras and any((place, name) in model.vectors for name in module.saved)


def _vectors_fit(module: AdaptedModule, place: Place, model: ModelModules) -> str:
    for name, tensor in module.saved.items():
        length = model.vectors.get((place, name))
        if length is not None and tensor.shape != (length,):
            return f"its {name} has {tensor.shape} numbers there, {length} in the model"
    return ""


def _absent(place: Place, role: str, model: ModelModules) -> str:
    if place.tower:
        return "the model has no such tower"
    fused = "attn_qkv" if role in ("attn_q", "attn_k", "attn_v") else ""
    names = {role_of(p) if not model.gguf else p.tail for p in model.shapes if p.layer == place.layer}
    if fused and fused in names:
        return "the model keeps query, key and value in one matrix"
    return f"the model has no {place.tail}"


def _warnings(adapter: AdapterFile, model: ModelModules) -> list[str]:
    warnings = list(adapter.problems)
    if adapter.needs_alpha:
        warnings.append(
            "Its alpha is not recorded: say it before you use it (often it is the rank, or twice the rank)."
        )
    if adapter.unknown:
        warnings.append(
            f"{len(adapter.unknown)} of its tensors are of no known kind and are left out, such as {adapter.unknown[0][:80]}."
        )
    revision = adapter.config.revision
    if revision not in ("", "main") and f"/{revision}" not in Path(model.entry.path).as_posix():
        warnings.append(f"It was trained on the revision {revision[:40]} of its base.")
    if model.gguf and not adapter.gguf and model.entry.architecture not in _KNOWN_ORDER and _has_attention(adapter):
        warnings.append(
            f"How llama.cpp orders the attention of the architecture {model.entry.architecture!r} is not known here: "
            "use it with Transformers, or convert it with llama.cpp's own script."
        )
    kinds = adapter_extras(adapter) if model.gguf and not adapter.gguf else []
    if adapter.config.layer_replication:
        apart = model.gguf and model.entry.architecture not in UNIFORM
        warnings.append(
            "It repeats layers of the base (layer replication): it goes with adapters that repeat the same ones."
            + (
                f" llama.cpp tells layers of the architecture {model.entry.architecture!r} apart by their numbers: use it with Transformers."
                if apart
                else ""
            )
        )
        kinds = [] if apart else kinds
    if kinds:
        warnings.append(
            f"llama.cpp takes low-rank matrices alone while it runs; this adapter also has {', '.join(kinds)}: "
            "a merged copy of the model serves it, which takes disk space and some seconds for each change of weight."
        )
    return warnings


def _has_attention(adapter: AdapterFile) -> bool:
    """Whether it adapts what llama.cpp may keep in another order."""
    roles = ("attn_q", "attn_k", "attn_qkv")
    return any(module.loras and role_of(place_of(name)) in roles for name, module in adapter.modules.items())


def adapter_extras(adapter: AdapterFile) -> list[str]:
    """What an adapter has beyond low-rank matrices, in words."""
    modules = adapter.modules.values()
    found = {
        "DoRA magnitudes": any(lora.magnitude is not None for m in modules for lora in m.loras),
        "modules trained whole": any(m.saved for m in modules),
        "trained biases": any(lora.bias is not None for m in modules for lora in m.loras),
        "trained tokens": any(m.tokens is not None for m in modules),
        "experts": any(is_expert(place_of(m.name)) for m in modules),
        "repeated layers": bool(adapter.config.layer_replication),
    }
    return [name for name, there in found.items() if there]


def same_base(recorded: str, entry: ModelEntry) -> bool | None:
    """Whether a model bears the name of the recorded base; None when none is recorded."""
    if not recorded:
        return None

    def words(text: str) -> str:
        last = re.split(r"[/\\]", text.rstrip("/\\"))[-1].lower()
        last = re.sub(
            r"\.gguf$|-\d{5}-of-\d{5}|[-_.](bnb|unsloth|gguf|gptq|awq|hf|4bit|q\d\w*|iq\d\w*|f16|bf16|f32)(?=[-_.]|$)",
            "",
            last,
        )
        return re.sub(r"[^a-z0-9]", "", last)

    wanted = words(recorded)
    names = {words(entry.name), words(entry.path)}
    return bool(wanted) and wanted in names


class Ranked(msgspec.Struct, frozen=True):
    """A model of the library and how an adapter fits it, by what the index knows."""

    model: ModelEntry
    compatibility: Compatibility


def rank_bases(adapter: AdapterFile, entries: Iterable[ModelEntry]) -> list[Ranked]:
    """Every model of the library, the best bases first; opens no file, and takes microseconds a model."""
    groups = _groups(adapter)
    ranked = [Ranked(entry, _estimate(adapter, groups, entry)) for entry in entries]
    ranked.sort(key=lambda r: (-_fraction(r.compatibility), not r.compatibility.same_base, r.model.name.lower()))
    return ranked


def _fraction(found: Compatibility) -> float:
    return found.matched / found.total if found.total else 0.0


class _Group(msgspec.Struct):
    """Modules of one name and shape over all layers."""

    module: AdaptedModule
    layers: list[int]


def _groups(adapter: AdapterFile) -> list[_Group]:
    found: dict[tuple[str, str, object], _Group] = {}
    for module in adapter.modules.values():
        place = place_of(module.name)
        shapes = tuple((lora.outputs, lora.inputs) for lora in module.loras) + tuple(
            t.shape for t in module.saved.values()
        )
        group = found.setdefault((place.tail, place.tower, shapes), _Group(module, []))
        group.layers.append(place.layer)
    return list(found.values())


def _estimate(adapter: AdapterFile, groups: list[_Group], entry: ModelEntry) -> Compatibility:
    model = from_index(entry)
    replicated = sum(end - start for start, end in adapter.config.layer_replication)
    layers = replicated or model.layers or 1 << 30
    matched = 0
    unmatched: list[Unmatched] = []
    for group in groups:
        reason = _reason(adapter, group.module, model, 0)
        inside = sum(1 for layer in group.layers if layer < layers)
        if reason:
            unmatched.append(Unmatched(group.module.name, reason))
            continue
        matched += inside
        if inside < len(group.layers):
            unmatched.append(Unmatched(group.module.name, f"the model has only {layers} layers"))
    return Compatibility(
        matched=0 if adapter.problems else matched,
        total=len(adapter.modules),
        unmatched=tuple(unmatched),
        base=adapter.config.base,
        same_base=same_base(adapter.config.base, entry),
        exact=False,
    )


def summary(found: Compatibility) -> list[str]:
    """Unmatched modules as sentences: one for each reason, with how many there are of each name."""
    reasons: dict[str, Counter[str]] = defaultdict(Counter)
    for item in found.unmatched:
        reasons[item.reason][place_of(item.module).tail] += 1
    return [
        f"{', '.join(f'{count} {tail}' for tail, count in tails.most_common(6))}: {reason}"
        for reason, tails in reasons.items()
    ]


def check_paths(adapter: AdapterFile, entry: ModelEntry) -> Compatibility:
    """Check against the model's own headers, or against the index where they cannot be read."""
    try:
        return check(adapter, model_modules(entry))
    except WeftError as error:
        found = check(adapter, from_index(entry))
        return msgspec.structs.replace(found, warnings=(*found.warnings, error.message))
