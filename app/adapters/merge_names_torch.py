"""Where the parameters of a model lie on disk: names and places in weight files against names and places in memory.

Most families have the same names in both. For these a skeleton made of headers serves: no library of models is
imported. For all others the model is made without memory (on torch's meta device), and transformers' own conversion
rules are followed: what they rename, stack, concatenate and split.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch

from app.adapters.merge_files import TORCH_NAMES, StoredTensor
from app.core.errors import ErrorKind, WeftError
from app.core.module_names import OUTER_ROLES, place_of, role_of

# Families whose names on disk are those in memory (a test holds this against transformers' conversion rules).
PLAIN = frozenset(
    "llama mistral qwen2 qwen3 gemma gemma2 gemma3_text phi phi3 cohere cohere2 gpt2 bloom gpt_neox olmo olmo2 granite "
    "stablelm starcoder2 smollm3 gptj opt".split()
)
_TRANSPOSED = frozenset({"gpt2"})  # families whose layers keep W transposed (Conv1D)
_HEADS = {"gpt_neox": "embed_out"}
_POSITIONS = frozenset({"wpe", "embed_positions", "position_embeddings", "word_embeddings", "wte"})


class Block(NamedTuple):
    """Rows of a tensor on disk, and where they lie in memory.

    Attributes:
        first, rows: of the tensor on disk, seen as a matrix whose width is its last dimension.
        parameter: of the model. expert: index of its first dimension; -1 for none.
        start: the row of that parameter (of that expert) at which the block begins.
    """

    first: int
    rows: int
    parameter: str
    expert: int = -1
    start: int = 0


class Layout(NamedTuple):
    """A model's modules, and for each tensor on disk what it is of them.

    Attributes:
        model: modules whose parameters have shapes and no data.
        blocks: by the tensor's name on disk; a tensor that is missing here belongs to nothing that is known.
        embedding, head: names of the parameters that may be tied; "" when there are none.
        tied: the head has no tensor of its own on disk.
        strange: parameters that lie on disk in a form that cannot be taken apart by rows, with the reason.
    """

    model: Any
    blocks: dict[str, list[Block]]
    embedding: str
    head: str
    tied: bool
    strange: dict[str, str]


class Conv1D(torch.nn.Module):
    """GPT-2's linear layer, which keeps its weight as (in, out). Never called."""

    def __init__(self, weight: torch.nn.Parameter) -> None:
        super().__init__()
        self.weight = weight


def skeleton(tensors: Mapping[str, StoredTensor], family: str, *, unknown: bool = False) -> Layout | None:
    """The layout of a plain family, from headers alone; None for all other families.

    Args:
        unknown: take another family for a plain one too. Code that comes with a model names its modules as it saves them.
    """
    if family not in PLAIN and not unknown:
        return None
    root = torch.nn.Module()
    by_module: dict[str, dict[str, StoredTensor]] = {}
    for name, tensor in tensors.items():
        module, _, parameter = name.rpartition(".")
        by_module.setdefault(module, {})[parameter] = tensor
    for name in sorted(by_module):
        _place(root, name, _module(name, by_module[name], family))
    embedding = next((n for n in by_module if _outer(n, "token_embd")), "")
    head = next((n for n in by_module if _outer(n, "output")), "")
    tied = bool(embedding) and f"{head}.weight" not in tensors
    if tied:
        biased = head  # Phi's head has a bias of its own, also where its matrix is the embedding's
        head = head or _HEADS.get(family, "lm_head")
        weight = root.get_submodule(embedding).weight
        rows, width = weight.shape  # type: ignore[misc]
        module = _bare(torch.nn.Linear, in_features=width, out_features=rows)
        module.register_parameter("weight", weight)  # type: ignore[arg-type]
        if biased:
            module.register_parameter("bias", root.get_submodule(head)._parameters["bias"])
        _place(root, head, module)
    blocks = {name: blocks_of(name, tensor.shape) for name, tensor in tensors.items()}
    return Layout(root, blocks, _weight(embedding), _weight(head), tied, {})


def blocks_of(parameter: str, shape: tuple[int, ...]) -> list[Block]:
    """The blocks of a tensor that lies on disk as it lies in memory: one, or one for each expert."""
    if len(shape) != 3:
        rows = 1
        for extent in shape[:-1]:
            rows *= extent
        return [Block(0, rows, parameter)]
    return [Block(e * shape[1], shape[1], parameter, e) for e in range(shape[0])]


def _outer(name: str, role: str) -> bool:
    place = place_of(name)
    return not place.tower and place.layer < 0 and role_of(place) == role


def _weight(module: str) -> str:
    return f"{module}.weight" if module else ""


def _module(name: str, tensors: Mapping[str, StoredTensor], family: str) -> torch.nn.Module:
    parameters = {
        key: torch.nn.Parameter(
            torch.empty(t.shape, dtype=getattr(torch, TORCH_NAMES.get(t.dtype, "uint8")), device="meta"),
            requires_grad=False,
        )
        for key, t in tensors.items()
    }
    weight = parameters.get("weight")
    place = place_of(name)
    made: torch.nn.Module
    if weight is None or weight.dim() != 2:
        made = torch.nn.Module()
    elif place.layer < 0 and (OUTER_ROLES.get(place.tail) == "token_embd" or place.tail in _POSITIONS):
        made = _bare(torch.nn.Embedding, num_embeddings=weight.shape[0], embedding_dim=weight.shape[1])
    elif family in _TRANSPOSED and place.layer >= 0:
        made = Conv1D(weight)
    else:
        made = _bare(torch.nn.Linear, in_features=weight.shape[1], out_features=weight.shape[0])
    for key, parameter in parameters.items():
        made.register_parameter(key, parameter)
    return made


def _bare(kind: type[torch.nn.Module], **sizes: int) -> torch.nn.Module:
    """A module of a kind without its initialisation, which would load half of torch (70 MB) even on the meta device."""
    maker: Any = kind
    made = maker.__new__(maker)
    torch.nn.Module.__init__(made)
    for name, value in sizes.items():
        setattr(made, name, value)
    return made


def _place(root: torch.nn.Module, name: str, module: torch.nn.Module) -> None:
    *path, last = name.split(".")
    owner = root
    for part in path:
        if part not in owner._modules:
            owner.add_module(part, torch.nn.Module())
        owner = owner._modules[part]  # type: ignore[assignment]
    # A module may hold others: those that were placed before stay.
    for key, child in (owner._modules.get(last) or torch.nn.Module())._modules.items():
        module.add_module(key, child)
    owner.add_module(last, module)


# Through transformers ---------------------------------------------------------------------------


def meta_model(folder: str, config: Mapping[str, Any], changes: Mapping[str, Any]) -> Any:
    """The model of a config without memory for its weights.

    Args:
        folder: with a config that may be shown to transformers. changes: what of it is to be another.

    Raises:
        WeftError: UNSUPPORTED when this transformers does not know the architecture.
    """
    import transformers

    try:
        settings = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        for key, value in changes.items():
            setattr(settings, key, value)
        name = next((a for a in config.get("architectures") or () if isinstance(a, str)), "")
        kind = getattr(transformers, name, None) if name.isidentifier() else None
        with torch.device("meta"):
            if kind is not None and hasattr(kind, "_from_config"):
                return kind._from_config(settings)
            return transformers.AutoModelForCausalLM.from_config(settings)
    except (ValueError, KeyError, OSError, ImportError, AttributeError, TypeError) as error:
        raise WeftError(
            ErrorKind.UNSUPPORTED,
            f"The model's architecture is not known to the installed transformers: {str(error)[:200]}",
            "Repair the environment in the settings to get a newer one, or merge into another copy of this model.",
        ) from error


def through_transformers(tensors: Mapping[str, StoredTensor], model: Any) -> Layout:
    """The layout of any model that transformers knows, by its own conversion rules."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    state = model.state_dict()
    prefix = model.base_model_prefix
    blocks: dict[str, list[Block]] = {}
    collected: dict[str, tuple[Any, dict[str, list[str]]]] = {}
    for name in sorted(tensors, key=natural):
        renamed, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if renamed not in state and name in state:
            renamed, pattern = rename_source_key(name, [], [], prefix, state)
        if renamed not in state:
            continue
        if pattern is None:
            blocks[name] = blocks_of(renamed, tensors[name].shape)
        else:
            rule = by_pattern[pattern]
            collected.setdefault(renamed, (rule, {}))[1].setdefault(pattern, []).append(name)
    strange: dict[str, str] = {}
    for target, (rule, sources) in collected.items():
        _convert(tensors, state, target, rule, sources, blocks, strange)
    for name, found in list(blocks.items()):
        for parameter in {block.parameter for block in found}:
            if parameter not in strange and (reason := _disagrees(tensors[name], state[parameter], found)):
                strange[parameter] = reason
    names = {id(module): name for name, module in model.named_modules()}
    embedding = _weight(names.get(id(model.get_input_embeddings()), ""))
    head = _weight(names.get(id(model.get_output_embeddings()), "")) if model.get_output_embeddings() else ""
    known = {block.parameter for found in blocks.values() for block in found}
    if embedding and head and head in known and embedding not in known:
        embedding, head = head, embedding  # some files keep the shared matrix under the head's name
    tied = bool(head and embedding) and embedding in known and head not in known
    return Layout(model, blocks, embedding, head, tied, strange)


def natural(name: str) -> list[tuple[int, int, str]]:
    """A key that sorts names as transformers does: numbers as numbers."""
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in name.split(".")]


def _disagrees(tensor: StoredTensor, parameter: Any, found: Iterable[Block]) -> str:
    for block in found:
        if not block.parameter:
            continue
        shape = tuple(parameter.shape)
        inside = block.start + block.rows <= (shape[-2] if len(shape) > 1 else 1)
        if (shape[-1] if shape else 1) != tensor.width or not inside:
            return f"{tensor.name} is {tensor.shape} on disk, and {shape} in the model"
    return ""


def _convert(
    tensors: Mapping[str, StoredTensor],
    state: Mapping[str, Any],
    target: str,
    rule: Any,
    sources: Mapping[str, list[str]],
    blocks: dict[str, list[Block]],
    strange: dict[str, str],
) -> None:
    """Follow one conversion: which rows of which tensors make up its parameters."""
    kinds = [(type(op).__name__, getattr(op, "dim", 0)) for op in rule.operations]
    lists = [sources[p] for p in rule.source_patterns if p in sources]
    targets = _targets(target, rule, state)
    if kinds[:1] == [("MergeModulelist", 0)] and kinds[1:] in ([], [("Concatenate", 1)]) and len(targets) == 1:
        offset = 0
        for names in lists:
            for expert, name in enumerate(names):
                blocks[name] = [Block(0, tensors[name].rows, targets[0], expert, offset)]
            offset += tensors[names[0]].rows
    elif kinds == [("Concatenate", 0)] and len(targets) == 1 and all(len(names) == 1 for names in lists):
        offset = 0
        for (name,) in lists:
            blocks[name] = [Block(0, tensors[name].rows, targets[0], -1, offset)]
            offset += tensors[name].rows
    elif kinds == [("Chunk", 0)] and len(lists) == 1 and len(lists[0]) == 1:
        name = lists[0][0]
        rows = tensors[name].rows // max(1, len(targets))
        blocks[name] = [Block(i * rows, rows, parameter) for i, parameter in enumerate(targets)]
    else:
        how = ", ".join(kind for kind, _ in kinds) or "a rule of its own"
        for parameter in targets:
            strange[parameter] = f"it is made of tensors on disk by {how}"


def _targets(target: str, rule: Any, state: Mapping[str, Any]) -> list[str]:
    """All parameters that a conversion makes; `target` is the first of them."""
    patterns = list(rule.target_patterns)
    first = patterns[0].replace("\\", "")
    found = [target]
    for other in patterns[1:]:
        name = target.replace(first, other.replace("\\", ""))
        if name != target and name in state:
            found.append(name)
    return found
