"""What a model can be exported to, under which name, and what that takes: as far as the library's entry tells."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import msgspec

from app.core.export_plan import OWN, TYPES
from app.core.library import ModelEntry, ModelFormat
from app.core.merge_plan import Packing
from app.core.quantization import PACKED
from app.core.quantize_plan import BITS, CALIBRATED, GROUPS, USUAL_GROUPS, QuantizePlan, packed_like
from app.core.quantized_base import without_mark
from app.core.stack import AdapterStack
from app.viewmodels.units import readable_bytes

SAFETENSORS = "safetensors"
# What becomes of a base that bitsandbytes has packed.
PACKINGS: dict[str, Packing] = {SAFETENSORS: "refuse", "safetensors-16bit": "16bit", "safetensors-again": "again"}
FOLDERS = (ModelFormat.SAFETENSORS, ModelFormat.TORCH_BIN)
FOLDER, COMMON, OTHERS = "Model folder", "GGUF file", "GGUF file, all other types"
_USUAL = "q4_k_m"
_COMMON = (_USUAL, "q5_k_m", "q6_k", "q8_0", "f16")
MARGIN = 64 * 1024 * 1024
_IMPORTS = 600_000_000  # bytes of memory that the libraries of an export take
_CALIBRATING = 900_000_000  # and those that calibrate
_HESSIANS = 2 << 30  # see adapters/calibrate_gptq_torch.py
_QUANTIZED = {
    "gptq": "A folder of packed safetensors, each layer rounded by what it does to a text. Most programs for graphics cards read it.",
    "awq": "A folder of packed safetensors in 4 bits that spares what weighs most over a text. Most programs for graphics cards read it.",
    "hqq": "A folder of packed safetensors, made by the weights alone: no text, and quick.",
}


class ExportChoice(msgspec.Struct, frozen=True, kw_only=True):
    """One format.

    Attributes:
        key: of PACKINGS, `gptq`, `awq`, `hqq`, or a GGUF type. title, help: as shown. group: the heading that it stands under.
        imatrix: it needs an importance matrix.
    """

    key: str
    title: str
    help: str
    group: str = FOLDER
    imatrix: bool = False


class ExportOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What can be said beside format, name and place. See MergePlan, ExportPlan, QuantizePlan and PushPlan.

    Attributes:
        bits: 0 for those of a packed base, else 4.
        group_size: 0 for that of a packed base, else the method's usual one, or less where the model's matrices want it.
        calibration: a text file for GPTQ and AWQ; "" for ours.
        certify: compare the result with what it was made of. text: a text file for that; "" for ours.
        push: where the result goes on the hub, `user/name` or `name`; None for nowhere. private: see PushPlan.
    """

    imatrix: str = ""
    modelfile: bool = False
    shard_size: int = 0
    dtype: str = ""
    bits: int = 0
    group_size: int = 0
    desc_act: bool = False
    calibration: str = ""
    certify: bool = True
    text: str = ""
    push: str | None = None
    private: bool = True


class ExportNeed(msgspec.Struct, frozen=True, kw_only=True):
    """What an export takes, in bytes: on disk while it runs, of it the result, in memory; and what is free."""

    disk: int
    result: int
    memory: int
    disk_free: int
    memory_free: int
    drive: str = ""

    @property
    def sentence(self) -> str:
        between = self.disk - self.result - MARGIN
        way = f", and {readable_bytes(between)} more while it is made" if between > 0 else ""
        where = f"on the drive of {self.drive}" if self.drive else "there"
        return (
            f"About {readable_bytes(self.result)}{way}; {readable_bytes(self.disk_free)} are free {where}. "
            f"Memory: about {readable_bytes(self.memory)} of {readable_bytes(self.memory_free)} free."
        )

    @property
    def problem(self) -> str:
        if self.disk > self.disk_free:
            return f"{readable_bytes(self.disk - self.disk_free)} are missing on that drive. Make room, or choose another place."
        if self.memory > self.memory_free > 0:
            return "There is less memory free than this takes. Eject the model or close other programs first."
        return ""


def choices(entry: ModelEntry, stack: AdapterStack) -> list[ExportChoice]:
    """Formats that a model can be exported to; none for what cannot."""
    if entry.problem:
        return []
    if entry.format is ModelFormat.BITSANDBYTES and stack.adapters:
        return [
            _UNPACKED,
            ExportChoice(
                key="safetensors-again",
                title=f"Safetensors, packed again ({entry.quantization or 'bitsandbytes'})",
                help="As small as the base. Packing rounds what the adapters changed; how much is measured and said at the end.",
            ),
        ]
    if entry.format in PACKED:
        own = entry.format.value  # the base's own method comes first
        return [_UNPACKED, *(_again(key, entry) for key in sorted(BITS, key=lambda key: key != own))]
    if entry.format not in (*FOLDERS, ModelFormat.GGUF):
        return []
    found: list[ExportChoice] = []
    if entry.format in FOLDERS and stack.adapters:
        sentence = "A model folder like the base's, in its own precision: exact, and every program reads it."
        found.append(ExportChoice(key=SAFETENSORS, title="Safetensors", help=sentence))
    if entry.format in FOLDERS and not entry.vision:
        found += [ExportChoice(key=key, title=key.upper(), help=sentence) for key, sentence in _QUANTIZED.items()]
    if entry.format is ModelFormat.GGUF and stack.adapters:
        sentence = "Every tensor keeps its type; what adapters change is quantized to that again."
        title = f"GGUF, as the base ({entry.quantization})"
        found.append(ExportChoice(key=OWN.name, title=title, help=sentence, group=COMMON))
    found += [_gguf(name, COMMON) for name in _COMMON]
    return found + [_gguf(name, OTHERS) for name in TYPES if name not in _COMMON]


def _gguf(name: str, group: str) -> ExportChoice:
    title = f"GGUF {name.upper()}{' (usual)' if name == _USUAL else ''}"
    return ExportChoice(key=name, title=title, help=TYPES[name].help, group=group, imatrix=TYPES[name].imatrix)


_UNPACKED = ExportChoice(
    key="safetensors-16bit",
    title="Safetensors, in 16 bits",
    help="The base is unpacked first: what packing had lost of it stays lost, and nothing more is.",
)


def _again(key: str, entry: ModelEntry) -> ExportChoice:
    """A packed base unpacked, merged into, and packed again."""
    again = " again" if key == entry.format.value else ""
    how = f"calibrated{again} on a text" if key in CALIBRATED else f"packed{again} by its weights alone"
    return ExportChoice(
        key=key,
        title=f"{key.upper()}{again}",
        help=f"Unpacked, merged into, and {how}: small. What rounding loses is measured and said at the end.",
    )


def method_of(key: str) -> str:
    """`gptq`, `awq` or `hqq`, where a format is one of them; else ""."""
    return key if key in BITS else ""


def bits_of(key: str, options: ExportOptions, entry: ModelEntry) -> int:
    """Bits of a weight that GPTQ, AWQ or HQQ makes: as chosen, else those of a packed base, else 4."""
    allowed = BITS[key]
    wanted = options.bits or packed_like(entry.quantization)[0]
    return wanted if wanted in allowed else 4


def group_of(key: str, options: ExportOptions, entry: ModelEntry) -> int:
    """Weights that share a scale: as chosen, else as in a packed base, else the usual ones, or the most under them that divide its rows."""
    allowed, sizes = GROUPS[key], [size for size in (entry.shape.hidden, entry.shape.intermediate) if size]
    wanted = options.group_size or packed_like(entry.quantization)[1]
    if wanted in allowed:
        return wanted
    usual = USUAL_GROUPS[key]
    fitting = [group for group in allowed if group <= usual and not any(size % group for size in sizes)]
    return fitting[-1] if fitting else usual


def refusal(entry: ModelEntry, base: str = "") -> str:
    """Why a model has no formats to export to. base: the 16-bit model that it was made from, if known."""
    if entry.problem:
        return entry.problem
    of = f": {base}" if base else ""
    if entry.format is ModelFormat.BITSANDBYTES:
        return f"{entry.name} is packed by bitsandbytes, and no adapter is on: export the 16-bit model that it was made from{of}."
    return (
        f"{entry.name} is quantized ({entry.format.value} {entry.quantization}): a merge into it would be rounded away. "
        f"Export from the 16-bit model that it was made from{of}."
    )


def default_name(entry: ModelEntry, stack: AdapterStack) -> str:
    """A name made from the base's and the adapters', as a file may be called."""
    base = entry.name.rpartition("/")[2].removesuffix(".gguf")
    if entry.format is ModelFormat.GGUF and entry.quantization:
        base = re.sub(rf"[-_. ]?{re.escape(entry.quantization)}$", "", base, flags=re.IGNORECASE)
    if entry.format in (*PACKED, ModelFormat.BITSANDBYTES):
        base = without_mark(base)
    names = [base, *(a.name or Path(a.path).stem for a in stack.adapters if a.weight)]
    joined = "-".join(re.sub(r"[^\w.+-]+", "-", name).strip("-.") for name in names)
    return joined[:100].strip("-.") or "model"


def name_problem(name: str) -> str:
    """Why a name cannot be that of a file, in a sentence; "" when it can."""
    if not name:
        return "It needs a name."
    if re.search(r'[<>:"/\\|?*\x00-\x1f]', name) or name.strip(". ") != name or len(name) > 120:
        return 'A name has at most 120 characters, none of < > : " / \\ | ? *, and no point at its ends.'
    return ""


def weights_of(entry: ModelEntry) -> int:
    """How many weights a model has, as far as its headers tell."""
    if entry.format in PACKED and not entry.parameters:
        return (entry.weight_bytes or entry.bytes) * 8 // max(1, packed_like(entry.quantization)[0] or 4)
    return entry.parameters or (entry.weight_bytes or entry.bytes) // 2


def sizes(entry: ModelEntry, key: str, dtype: str = "") -> tuple[int, int]:
    """Bytes of the result, and of what lies on disk beside it while it is made: of a merge or a GGUF file."""
    weights = weights_of(entry)
    if key in PACKINGS:
        own = entry.weight_bytes or entry.bytes
        if key == "safetensors-16bit":
            return weights * 2, 0
        return (weights * (4 if dtype == "float32" else 2) if dtype else own), 0
    if key == OWN.name:
        return entry.bytes, 0
    kind = TYPES.get(key)
    if kind is None:
        return 0, 0
    result = int(weights * kind.bits / 8)
    return result, 0 if kind.direct and entry.format is not ModelFormat.GGUF else weights * 2


def estimate(
    entry: ModelEntry, stack: AdapterStack, key: str, options: ExportOptions, disk_free: int, memory_free: int
) -> ExportNeed:
    """What an export takes, as far as the library's entry tells."""
    if method_of(key):
        result, between, memory = _quantized_sizes(entry, stack, key, options)
    else:
        result, between = sizes(entry, key, options.dtype)
        memory = _IMPORTS + (largest(entry) if key in PACKINGS else 3 * largest(entry))
        if options.imatrix and key not in PACKINGS:
            memory += between or result
    return ExportNeed(
        disk=result + between + MARGIN,
        result=result,
        memory=memory,
        disk_free=disk_free,
        memory_free=memory_free,
    )


def _quantized_sizes(entry: ModelEntry, stack: AdapterStack, key: str, options: ExportOptions) -> tuple[int, int, int]:
    """Of GPTQ, AWQ and HQQ: bytes of the result, of what lies beside it on the way, and of memory. See tasks/quantize.py."""
    shape, weights = entry.shape, weights_of(entry)
    kept = min(weights, 2 * shape.vocabulary * shape.hidden)  # embedding and head stay as they are
    result = int((weights - kept) * (bits_of(key, options, entry) + 32 / group_of(key, options, entry)) / 8) + 2 * kept
    merged = bool(stack.adapters) or entry.format in PACKED
    wide = entry.quantization.upper() in ("F32", "F64")
    # Weights in 16 bits are mapped, and a layer's go when it is done; others are converted, and a mixture's experts put together.
    held = 2 * (weights if shape.experts or wide else kept)
    layer = 2 * 4 * (weights - kept) // max(1, shape.layers)
    read = QuantizePlan(model="", target="")
    text = 4 * read.samples * read.length * shape.hidden if key in CALIBRATED else 0
    square = 4 * max(shape.hidden, shape.intermediate) ** 2 if key == "gptq" else 0
    # A mixture's Hessians are held up to a bound, and the one that is worked on three times more.
    squares = 3 * square + max(square, min(_HESSIANS, square * shape.experts))
    return result, (4 if wide else 2) * weights if merged else 0, _CALIBRATING + held + layer + 2 * text + squares


def largest(entry: ModelEntry) -> int:
    """Bytes of the largest tensor in float32, or a guess at it."""
    shape = entry.shape
    widest = max(shape.vocabulary, shape.intermediate)
    return 4 * widest * shape.hidden if widest and shape.hidden else weights_of(entry) // 10


def free_at(folder: Path) -> int:
    """Bytes free on the drive on which a folder lies, or would lie."""
    for place in (folder, *folder.parents):
        try:
            return shutil.disk_usage(place).free
        except OSError:
            continue
    return 0
