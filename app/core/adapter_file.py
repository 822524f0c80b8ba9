"""An adapter's tensors by module, from headers alone: nothing of their data is read.

Understands the names that PEFT writes (and Ludwig, Unsloth, Axolotl and LLaMA-Factory through it), those of MLX, the
`lora_up`/`lora_down` names, raw state dicts with an adapter's name inside, and GGUF adapters.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path

import msgspec

from app.core.adapter_config import AdapterConfig, parse_adapter_config
from app.core.errors import ErrorKind, WeftError
from app.core.formats import read_gguf_header, read_json, read_safetensors_header
from app.core.ggml import TYPES
from app.core.module_names import place_of, role_of
from app.core.recognise_gguf import adapter_problem
from app.core.tensor_info import TensorInfo, read_tensor

PREFIX = "base_model.model."
WEIGHT_FILES = ("adapter_model.safetensors", "adapter_model.bin", "adapters.safetensors")
MAX_RANK = 65_536
_EXPERTS = 1024

# What stands behind a module's name, and what it is of that module. Adapter names may stand inside (`lora_A.default.weight`).
_NAME = r"(?:\.(?!weight$|bias$)[\w-]+)?"
_LORA = re.compile(
    rf"(?P<module>.+)\.(?:"
    rf"(?P<A>lora_A{_NAME}\.weight|lora_down{_NAME}\.weight)"
    rf"|(?P<B>lora_B{_NAME}\.weight|lora_up{_NAME}\.weight)"
    rf"|(?P<B_bias>lora_B{_NAME}\.bias)"
    rf"|(?P<embedding_A>lora_embedding_A(?:\.[\w-]+)?)"
    rf"|(?P<embedding_B>lora_embedding_B(?:\.[\w-]+)?)"
    rf"|(?P<magnitude>lora_magnitude_vector(?:\.[\w-]+)*)"
    rf"|(?P<transposed_A>lora_a)|(?P<transposed_B>lora_b)|(?P<transposed_magnitude>m)"
    rf"|(?P<alpha>alpha)"
    rf"|(?P<tokens>token_adapter\.trainable_tokens_delta(?:\.[\w-]+)?|trainable_tokens_delta(?:\.[\w-]+)?)"
    rf")"
)
_SAVED = re.compile(
    r"(?P<module>.+?)\.(?P<wrapper>(?:base_layer|modules_to_save(?:\.(?!weight$|bias$)[\w-]+)?)\.)?(?P<parameter>\w+)"
)
# What parallel and compiled training leaves in the names of modules.
_WRAPPERS = re.compile(
    r"(?:(?<=\.)|^)(?:_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod|_forward_module)\.|^module\."
)
_OTHER_KINDS = re.compile(r"\.(hada_w\d|lokr_w\d|lora_mid|dora_scale|ia3_l|vera_|oft_|boft_|lora_E|ranknum)")


class LoraTensors(msgspec.Struct, kw_only=True):
    """One low-rank pair.

    Attributes:
        a, b: of shape (rank, in) and (out, rank); the other way round when `transposed` (MLX).
        scale: s of D = s·B·A; None when alpha is unknown.
        magnitude: m of DoRA, `out` elements; None for LoRA.
        bias: that lora_bias trained of B, `out` elements.
        embedding: it adapts an embedding: `in` is the vocabulary.
        depth: how many other parameters of the same module PEFT wrapped first (experts have two); counts from 0.
    """

    a: TensorInfo
    b: TensorInfo
    scale: float | None = None
    magnitude: TensorInfo | None = None
    bias: TensorInfo | None = None
    embedding: bool = False
    transposed: bool = False
    depth: int = 0

    @property
    def rank(self) -> int:
        return self.a.shape[1] if self.transposed else self.a.shape[0]

    @property
    def inputs(self) -> int:
        return self.a.shape[0] if self.transposed else self.a.shape[1]

    @property
    def outputs(self) -> int:
        return self.b.shape[1] if self.transposed else self.b.shape[0]


class AdaptedModule(msgspec.Struct, kw_only=True):
    """What an adapter holds for one module.

    Attributes:
        loras: usually one pair; several for modules with several adapted parameters.
        saved: parameters that were trained whole, by name (`weight`, `bias`).
        base: a copy of the base's own weight, that PEFT adds for embeddings: no change unless the vocabulary grew.
        tokens: rows of an embedding trained alone; `indices` says which.
    """

    name: str
    loras: list[LoraTensors] = []
    saved: dict[str, TensorInfo] = {}
    base: TensorInfo | None = None
    tokens: TensorInfo | None = None
    indices: tuple[int, ...] = ()


class AdapterFile(msgspec.Struct, kw_only=True):
    """An adapter as its headers tell it.

    Attributes:
        modules: by name as the adapter writes it, without `base_model.model.`.
        gguf: the names are GGUF's (`blk.0.attn_q`).
        architecture: that a GGUF adapter was made for.
        unknown: tensors that nobody here understands.
        problems: what is wrong with it, in sentences; with any of them it cannot be used.
    """

    path: Path
    config: AdapterConfig
    modules: dict[str, AdaptedModule]
    gguf: bool = False
    architecture: str = ""
    unknown: list[str] = []
    problems: list[str] = []

    @property
    def needs_alpha(self) -> bool:
        """Whether somebody must say alpha before it can be used."""
        return any(lora.scale is None for module in self.modules.values() for lora in module.loras)


def read_adapter_file(path: Path, alpha: float | None = None) -> AdapterFile:
    """Read an adapter's headers.

    Args:
        path: a folder with adapter_config.json, or a lone .safetensors, .bin, .pt or .gguf file.
        alpha: for adapters that do not say it.

    Raises:
        WeftError: NOT_FOUND, CORRUPT, HOSTILE; UNSUPPORTED for .bin files that `read_torch_header` does not read.
    """
    if path.suffix.lower() == ".gguf":
        return _gguf(path)
    config, weights = locate(path)
    if weights.suffix != ".safetensors":
        from app.core.torch_header import read_torch_header

        config = config if config.alpha is not None or config.factor is not None else _from_metadata(config, {}, alpha)
        pickled = [TensorInfo(t.name, t.dtype, t.shape, weights, t.offset, t.bytes) for t in read_torch_header(weights)]
        return adapter_from_tensors(path, config, pickled)
    header = read_safetensors_header(weights)
    if config.alpha is None and config.factor is None:
        config = _from_metadata(config, header.metadata, alpha)
    tensors = [TensorInfo(t.name, t.dtype, t.shape, weights, t.offset, t.bytes) for t in header.tensors]
    return adapter_from_tensors(path, config, tensors)


def locate(path: Path) -> tuple[AdapterConfig, Path]:
    """The config (an empty one for a lone file without) and the weights of an adapter.

    Raises:
        WeftError: NOT_FOUND, CORRUPT, HOSTILE.
    """
    folder = path if path.is_dir() else path.parent
    config = folder / "adapter_config.json"
    beside = path.name in WEIGHT_FILES or path.is_dir()
    parsed = parse_adapter_config(read_json(config)) if beside and config.is_file() else AdapterConfig()
    if not path.is_dir():
        if not path.is_file():
            raise WeftError(ErrorKind.NOT_FOUND, f"There is no adapter {path}.", "Check the path.")
        return parsed, path
    weights = next((folder / name for name in WEIGHT_FILES if (folder / name).is_file()), None)
    if weights is None:
        raise WeftError(
            ErrorKind.NOT_FOUND, f"{path} has no adapter_model.safetensors.", "Get the whole adapter, with its weights."
        )
    return parsed, weights


def config_beside(path: Path) -> list[Path]:
    """The config that `locate` reads for an adapter named by its file; none for any other file."""
    config = path.with_name("adapter_config.json")
    return [config] if path.name in WEIGHT_FILES and config.is_file() else []


def adapter_from_tensors(path: Path, config: AdapterConfig, tensors: Iterable[TensorInfo]) -> AdapterFile:
    """Sort an adapter's tensors by module."""
    found = AdapterFile(path=path, config=config, modules={}, unknown=[], problems=[])
    if not config.is_lora and config.kind != "TRAINABLE_TOKENS":
        found.problems.append(f"It is of the kind {config.kind}, which cannot be stacked yet; LoRA and its kin can.")
    if config.needs_changed_base:
        found.problems.append(
            f"It began as {config.init[:32]} and was saved without being converted, so it belongs to a base with other weights. "
            "Save it again with PEFT's path_initial_model_for_weight_conversion (or take the converted folder beside it)."
        )
    parts: dict[tuple[str, int], dict[str, TensorInfo]] = {}
    for tensor in tensors:
        _sort(found, parts, tensor)
    for (module, depth), pair in _each_expert(parts).items():
        lora = _pair(found, module, depth, pair)
        if lora is not None:
            _module(found, module).loras.append(lora)
    for module in found.modules.values():
        module.loras.sort(key=lambda lora: lora.depth)
    if not found.modules and not found.problems:
        found.problems.append("It holds no LoRA tensors.")
    return found


def _each_expert(
    parts: Mapping[tuple[str, int], dict[str, TensorInfo]],
) -> dict[tuple[str, int], dict[str, TensorInfo]]:
    """Pairs that MLX keeps for all experts in one (`switch_mlp`), taken apart; all others as they are.

    Its lora_a is (experts, rank, in) or (experts·rank, in), its lora_b (experts, out, rank): not transposed as elsewhere.
    """
    found: dict[tuple[str, int], dict[str, TensorInfo]] = {}
    for (module, depth), pair in parts.items():
        a, b = pair.get("transposed_A"), pair.get("transposed_B")
        experts = b.shape[0] if b is not None and len(b.shape) == 3 else 0
        fits = a is not None and a.shape and 0 < experts <= _EXPERTS and a.shape[0] % experts == 0
        if a is None or b is None or not fits or ".switch_mlp." not in module:
            found[module, depth] = pair
            continue
        rank = a.shape[1] if len(a.shape) == 3 else a.shape[0] // experts
        for expert in range(experts):
            name = module.replace(".switch_mlp.", f".experts.{expert}.")
            found[name, depth] = {
                "A": _slice(a, expert, experts, (rank, a.shape[-1])),
                "B": _slice(b, expert, experts, b.shape[1:]),
            }
    return found


def _slice(tensor: TensorInfo, number: int, count: int, shape: tuple[int, ...]) -> TensorInfo:
    size = tensor.bytes // count
    return tensor._replace(shape=shape, offset=tensor.offset + number * size, bytes=size)


def _module(found: AdapterFile, name: str) -> AdaptedModule:
    return found.modules.setdefault(name, AdaptedModule(name=name, loras=[], saved={}))


def _sort(found: AdapterFile, parts: dict[tuple[str, int], dict[str, TensorInfo]], tensor: TensorInfo) -> None:
    name = _WRAPPERS.sub("", tensor.name)
    while name.startswith(PREFIX):
        name = name.removeprefix(PREFIX)
    if _OTHER_KINDS.search(name):
        found.unknown.append(tensor.name)
        return
    match = _LORA.fullmatch(name)
    part = next((k for k, v in match.groupdict().items() if v and k != "module"), "") if match else ""
    if part == "transposed_magnitude" and (not found.config.dora or len(tensor.shape) != 1):
        match = None
    if match is not None and part == "tokens":
        module = _module(found, match["module"].removesuffix(".token_adapter"))
        module.tokens = tensor
        module.indices = _indices(found.config, module.name)
        if len(tensor.shape) != 2 or tensor.shape[0] != len(module.indices):
            found.problems.append(f"Its config does not say which rows of {module.name[:80]} were trained.")
    elif match is not None:
        owner, depth = match["module"], 0
        while owner.endswith(".base_layer"):
            owner, depth = owner.removesuffix(".base_layer"), depth + 1
        parts.setdefault((owner, depth), {})[part] = tensor
    elif saved := _SAVED.fullmatch(name):
        module = _module(found, saved["module"].removesuffix(".base_layer"))
        copied = (saved["wrapper"] or "").startswith("base_layer")
        if copied and saved["parameter"] == "weight":
            module.base = tensor
        elif not copied or saved["parameter"] != "bias" or found.config.bias != "none":
            module.saved[saved["parameter"]] = tensor
    else:
        found.unknown.append(tensor.name)


def _indices(config: AdapterConfig, module: str) -> tuple[int, ...]:
    for name, indices in config.tokens.items():
        if name and (module == name or module.endswith("." + name)):
            return indices
    return config.tokens.get("", ())


def _pair(found: AdapterFile, module: str, depth: int, pair: Mapping[str, TensorInfo]) -> LoraTensors | None:
    transposed, embedding = "transposed_A" in pair, "embedding_A" in pair
    prefix = "transposed_" if transposed else "embedding_" if embedding else ""
    embedding = embedding or (transposed and role_of(place_of(module)) == "token_embd")  # MLX names it like all others
    a, b = pair.get(f"{prefix}A"), pair.get(f"{prefix}B")
    if a is None or b is None:
        found.problems.append(f"It is damaged: {module[:80]} has only one of its two matrices.")
        return None
    if len(a.shape) != 2 or len(b.shape) != 2 or not a.bytes or not b.bytes:
        found.problems.append(f"The matrices of {module[:80]} do not have two dimensions.")
        return None
    lora = LoraTensors(
        a=a,
        b=b,
        magnitude=pair.get("magnitude") or pair.get("transposed_magnitude"),
        bias=pair.get("B_bias"),
        embedding=embedding,
        transposed=transposed,
        depth=depth,
    )
    if lora.rank != (b.shape[0] if transposed else b.shape[1]) or lora.rank > MAX_RANK:
        found.problems.append(f"It is damaged: the ranks of {module[:80]} disagree ({a.shape} and {b.shape}).")
        return None
    for name, vector in (("magnitude", lora.magnitude), ("bias", lora.bias)):
        if vector is not None and _elements(vector) != lora.outputs:
            found.problems.append(f"It is damaged: the {name} of {module[:80]} has not one number for each output.")
            return None
    # Experts: PEFT keeps one pair of rank·E for all experts, and scales by the rank that one expert has.
    rank = found.config.rank if found.config.rank and _is_experts(found, module, lora) else lora.rank
    lora.scale = found.config.scale(module, rank)
    if lora.scale is None and "alpha" in pair:  # said beside lora_up and lora_down
        alpha = _number_in(pair["alpha"])
        lora.scale = alpha / lora.rank if math.isfinite(alpha) else None
    return lora


def _number_in(tensor: TensorInfo) -> float:
    """The one number of an `alpha` tensor, NaN when it is none."""
    formats = {"F32": "<f", "F16": "<e", "F64": "<d", "I64": "<q", "I32": "<i"}
    if tensor.type.upper() == "BF16" and tensor.bytes == 2:
        return struct.unpack("<f", b"\0\0" + read_tensor(tensor))[0]
    form = formats.get(tensor.type.upper(), "")
    if not form or tensor.bytes != struct.calcsize(form):
        return math.nan
    return float(struct.unpack(form, read_tensor(tensor))[0])


def _is_experts(found: AdapterFile, module: str, lora: LoraTensors) -> bool:
    config = found.config
    owners = [parameter.rpartition(".")[0] for parameter in config.target_parameters]
    named = any(owner and (module == owner or module.endswith("." + owner)) for owner in owners)
    return named and lora.rank % config.rank == 0


def _elements(tensor: TensorInfo) -> int:
    return math.prod(tensor.shape)


def _from_metadata(config: AdapterConfig, metadata: Mapping[str, str], alpha: float | None) -> AdapterConfig:
    for key in ("lora_alpha", "alpha", "ss_network_alpha"):
        text = metadata.get(key, "")
        if alpha is None and re.fullmatch(r"\d{1,6}(\.\d{1,9})?", text):
            alpha = float(text)
    return msgspec.structs.replace(config, alpha=alpha, base=config.base or metadata.get("base_model_name_or_path", ""))


def _gguf(path: Path) -> AdapterFile:
    header = read_gguf_header(path)
    problem = adapter_problem(header)
    alpha = header.metadata.get("adapter.lora.alpha")
    base = header.text("general.base_model.0.repo_url") or header.text("general.base_model.0.name")
    config = AdapterConfig(
        alpha=alpha if isinstance(alpha, float) else None, base=base.removeprefix("https://huggingface.co/")
    )
    found = AdapterFile(
        path=path,
        config=config,
        modules={},
        gguf=True,
        architecture=header.text("general.architecture"),
        unknown=[],
        problems=[problem] if problem else [],
    )
    sides: dict[str, dict[str, TensorInfo]] = {}
    for tensor in header.tensors:
        match = re.fullmatch(r"(?P<module>.+?)(?:\.weight)?\.lora_(?P<side>[ab])", tensor.name)
        kind = TYPES[tensor.type].name.lower() if tensor.type in TYPES else str(tensor.type)
        info = TensorInfo(tensor.name, kind, tuple(reversed(tensor.shape)), path, tensor.offset, tensor.bytes)
        if match is None:
            found.unknown.append(tensor.name)
        else:
            sides.setdefault(match["module"], {})[match["side"]] = info
    for name, pair in sides.items():
        if len(pair) != 2 or problem:
            continue  # the problem says so
        rank = pair["b"].shape[-1]
        # llama.cpp: alpha 0 means that the scale is in the matrices.
        scale = 1.0 if not config.alpha else config.alpha / rank
        embedding = name == "token_embd"
        a = pair["a"]._replace(shape=pair["a"].shape[::-1]) if embedding else pair["a"]  # stored transposed
        _module(found, name).loras.append(LoraTensors(a=a, b=pair["b"], scale=scale, embedding=embedding))
    return found
