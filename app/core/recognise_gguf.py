"""GGUF files: models, split sets, projectors and adapters, from their headers."""

from __future__ import annotations

import os
import re
from collections import Counter
from pathlib import Path

from app.core.errors import WeftError
from app.core.formats import GgufHeader, GgufTensor, read_gguf_header
from app.core.ggml import FILE_TYPES, TYPES
from app.core.library import AdapterEntry, AdapterFormat, ModelEntry, ModelFormat, ModelShape
from app.core.own_sampling import OwnSampling, of_gguf

_SPLIT = re.compile(r"(?P<stem>.+)-(?P<part>\d{5})-of-(?P<parts>\d{5})\.gguf", re.IGNORECASE)
_ADAPTER_TENSOR = re.compile(r"(?P<module>.+)\.lora_(?P<side>[ab])")
_FLOATS = (0, 1, 30)  # F32, F16, BF16: what llama.cpp can compute an adapter in
MAX_PARTS = 1000


def split_position(name: str) -> tuple[str, int, int] | None:
    """`model-00002-of-00003.gguf` as (`model`, 2, 3); None for a file that is no part."""
    match = _SPLIT.fullmatch(name)
    return (match["stem"], int(match["part"]), int(match["parts"])) if match else None


def parts_of(path: Path) -> tuple[list[Path], list[int]]:
    """All files of the set that a GGUF file belongs to, in order, and the numbers of those missing."""
    split = split_position(path.name)
    if split is None or not 1 <= split[1] <= split[2] <= MAX_PARTS:
        return [path], []
    stem, _, parts = split
    found: list[Path] = []
    missing: list[int] = []
    for number in range(1, parts + 1):
        part = path.with_name(f"{stem}-{number:05}-of-{parts:05}{path.suffix}")
        if part.exists():
            found.append(part)
        else:
            missing.append(number)
    return found, missing


def is_projector_name(name: str) -> bool:
    """Whether a file's name says that it is a vision projector."""
    return name.lower().endswith(".gguf") and "mmproj" in name.lower()


def gguf_model(path: Path) -> ModelEntry | None:
    """The model in a GGUF file or split set (given by any of its parts); None for adapters, projectors and the like.

    A damaged or incomplete file gives an entry that says so in `problem`.
    """
    files, missing = parts_of(path)
    if not files:
        return None
    first = files[0]
    split = split_position(first.name)
    stem = split[0] if split else first.stem
    problem = ""
    if missing:
        numbers = ", ".join(map(str, missing[:5])) + (", …" if len(missing) > 5 else "")
        problem = f"Part {numbers} of {len(files) + len(missing)} is missing beside it."
    headers: list[GgufHeader] = []
    for file in files:
        try:
            header = read_gguf_header(file, complete=False)
        except WeftError as error:
            problem = problem or error.message
            continue
        if header.missing:
            problem = problem or f"{file.name} is truncated: {header.missing:,} bytes are missing at its end."
        headers.append(header)
    if headers and not _is_model(headers[0]):
        return None
    if not headers and is_projector_name(first.name):
        return None
    tensors = [tensor for header in headers for tensor in header.tensors]
    unknown = next((t for t in tensors if t.type not in TYPES), None)
    if unknown is not None:
        problem = problem or f"It uses tensor type {unknown.type}, which is newer than this program."
    if headers and not tensors and not problem:
        return None  # a vocabulary without weights
    head = headers[0] if headers else None
    shape = _shape(head) if head else ModelShape()
    projector = "" if problem or head is None else _projector(first, shape)
    status = [file.stat() for file in files]
    architecture = head.text("general.architecture") if head else ""
    return ModelEntry(
        id=str(first),
        name=stem,
        path=str(first),
        format=ModelFormat.GGUF,
        quantization=_quantization(head, tensors) if head else "",
        architecture=architecture,
        model_type=architecture.lower(),
        parameters=sum(tensor.elements for tensor in tensors),
        bytes=sum(s.st_size for s in status),
        weight_bytes=sum(tensor.bytes for tensor in tensors),
        shape=shape,
        files=tuple(map(str, files)),
        mmproj=projector,
        vision=bool(projector),
        has_chat_template=bool(head and any(k.startswith("tokenizer.chat_template") for k in head.metadata)),
        own_sampling=of_gguf(head) if head else OwnSampling(),
        problem=problem,
        modified=max(s.st_mtime for s in status),
    )


def _is_model(header: GgufHeader) -> bool:
    kind = header.text("general.type").lower()
    architecture = header.text("general.architecture").lower()
    return kind in ("", "model") and architecture not in ("clip", "mmproj", "imatrix", "controlvector")


def _quantization(header: GgufHeader, tensors: list[GgufTensor]) -> str:
    named = (
        FILE_TYPES.get(header.number("general.file_type") & ~1024) if "general.file_type" in header.metadata else None
    )
    if named is not None and not header.number("general.file_type") & 1024:
        return named
    sizes: Counter[str] = Counter()
    for tensor in tensors:
        if tensor.type in TYPES:
            sizes[TYPES[tensor.type].name] += tensor.bytes
    return sizes.most_common(1)[0][0] if sizes else named or ""


def _shape(header: GgufHeader) -> ModelShape:
    architecture = header.text("general.architecture")

    def number(key: str) -> int:
        return max(0, min(header.number(f"{architecture}.{key}"), 2**40))

    hidden, heads = number("embedding_length"), number("attention.head_count")
    head_dim = number("attention.key_length") or (hidden // heads if heads else 0)
    return ModelShape(
        layers=number("block_count"),
        hidden=hidden,
        intermediate=number("feed_forward_length") or number("expert_feed_forward_length"),
        heads=heads,
        kv_heads=number("attention.head_count_kv") or heads,
        head_dim=head_dim,
        value_dim=number("attention.value_length") or head_dim,
        vocabulary=header.count("tokenizer.ggml.tokens") or number("vocab_size"),
        context=number("context_length"),
        experts=number("expert_count"),
        sliding_window=number("attention.sliding_window"),
    )


def _projector(model: Path, shape: ModelShape) -> str:
    """The vision projector beside a model: its output must be as wide as the model, and its name may not name another."""
    try:
        names = sorted(entry.name for entry in os.scandir(model.parent) if is_projector_name(entry.name))
    except OSError:
        return ""
    if is_projector_name(model.name):
        return ""
    fitting: list[str] = []
    for name in names[:20]:
        try:
            projector = read_gguf_header(model.with_name(name))
        except WeftError:
            continue  # it cannot be used; the model itself can
        # The last of its `mm.` tensors make vectors as wide as the model's. (clip.vision.projection_dim is not
        # that width in all files: LLaVA's hold CLIP's own.)
        widths = {size for tensor in projector.tensors if tensor.name.startswith("mm.") for size in tensor.shape}
        if widths and shape.hidden and shape.hidden not in widths:
            continue
        if _names_match(name, model.name):
            fitting.append(name)
    # 16-bit projectors are what most people run; the name orders the rest.
    fitting.sort(key=lambda name: (not re.search(r"[-_.]f16\b", name.lower()), name))
    return str(model.with_name(fitting[0])) if fitting else ""


def _names_match(projector: str, model: str) -> bool:
    """`mmproj-f16.gguf` fits any; `llava-7b-mmproj-f16.gguf` only a model that has these words too."""
    noise = {
        "mmproj",
        "model",
        "gguf",
        "f16",
        "bf16",
        "f32",
        "fp16",
        "fp32",
        "q8",
        "0",
        "projector",
        "vision",
        "clip",
        "",
    }
    words = {word for word in re.split(r"[-_. ]+", projector.lower()) if word not in noise}
    return words <= set(re.split(r"[-_. ]+", model.lower()))


def gguf_adapter(path: Path) -> AdapterEntry | None:
    """The adapter in a GGUF file, or None. What would crash llama.cpp is said in `problem`."""
    try:
        header = read_gguf_header(path, complete=False)
    except WeftError:
        return None  # a damaged .gguf is listed among the models
    if header.text("general.type").lower() != "adapter":
        return None
    ranks: list[int] = []
    targets: dict[str, None] = {}
    for tensor in header.tensors:
        match = _ADAPTER_TENSOR.fullmatch(tensor.name)
        if match is None:
            continue
        targets[re.sub(r"\.weight$", "", match["module"]).rpartition(".")[2]] = None
        if match["side"] == "a" and len(tensor.shape) == 2:
            ranks.append(_rank(match["module"], tensor))
    status = path.stat()
    alpha = header.metadata.get("adapter.lora.alpha")
    return AdapterEntry(
        id=str(path),
        name=path.stem,
        path=str(path),
        format=AdapterFormat.GGUF,
        base=_base(header),
        rank=max(ranks, default=0),
        alpha=float(alpha) if isinstance(alpha, (int, float)) else 0.0,
        targets=tuple(targets),
        bytes=status.st_size,
        files=(str(path),),
        problem=adapter_problem(header),
        modified=status.st_mtime,
    )


def _base(header: GgufHeader) -> str:
    for key in ("general.base_model.0.repo_url", "general.base_model.0.name", "general.basename"):
        text = header.text(key)
        if text:
            return text.removeprefix("https://huggingface.co/")
    return ""


def _rank(module: str, a: GgufTensor) -> int:
    """The rank by a matrix A; the embedding's is stored transposed."""
    return a.shape[0] if module.startswith("token_embd") else a.shape[1]


def adapter_problem(header: GgufHeader) -> str:
    """Why llama.cpp must not be given this adapter, in a sentence; "" when it may.

    Measured on llama.cpp: a wrongly typed alpha, tensors of more than two dimensions and unequal ranks abort
    the process, integer tensors crash it.
    """
    if header.missing:
        return f"{header.path.name} is truncated: {header.missing:,} bytes are missing at its end."
    if header.text("adapter.type").lower() not in ("lora", ""):
        return f"It is an adapter of the kind {header.text('adapter.type')[:40]!r}, which llama.cpp cannot use."
    if not isinstance(header.metadata.get("adapter.lora.alpha"), float):
        return "It is damaged: its alpha (adapter.lora.alpha) is missing or no floating-point number."
    sides: dict[str, dict[str, GgufTensor]] = {}
    for tensor in header.tensors:
        match = _ADAPTER_TENSOR.fullmatch(tensor.name)
        if match is None:
            continue
        if len(tensor.shape) != 2:
            return f"Its tensor {tensor.name[:80]} has {len(tensor.shape)} dimensions; llama.cpp takes two."
        if tensor.type not in _FLOATS and tensor.type not in (2, 3, 6, 7, 8):
            name = TYPES[tensor.type].name if tensor.type in TYPES else str(tensor.type)
            return f"Its tensor {tensor.name[:80]} is of type {name}, which crashes llama.cpp."
        sides.setdefault(match["module"], {})[match["side"]] = tensor
    if not sides:
        return "It holds no LoRA tensors."
    for module, pair in sides.items():
        if len(pair) != 2:
            return f"It is damaged: {module[:80]} has only one of its two matrices."
        a, b = _rank(module, pair["a"]), pair["b"].shape[0]
        if a != b:
            return f"It is damaged: the ranks of {module[:80]} disagree ({a} and {b})."
    return ""
