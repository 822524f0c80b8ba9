"""ExportPlan: which GGUF to make of what; the types there are, and what each is good for. Plain data."""

from __future__ import annotations

from typing import NamedTuple

import msgspec

from app.core.errors import ErrorKind, WeftError
from app.core.stack import AdapterStack


class GgufType(NamedTuple):
    """A type of GGUF file.

    Attributes:
        name: as `--type` takes it. ftype: llama.cpp's number. bits: about, per weight of a large model.
        help: what it is good for, in a sentence. imatrix: llama.cpp makes it only with an importance matrix.
        direct: the converter writes it itself; all others are quantized from a 16-bit file.
    """

    name: str
    ftype: int
    bits: float
    help: str
    imatrix: bool = False
    direct: bool = False


_TYPES = (
    GgufType("f32", 0, 32.0, "Everything in 32 bits: exact, and very large.", direct=True),
    GgufType("bf16", 32, 16.0, "16 bits with the range of 32: exact for bfloat16 models.", direct=True),
    GgufType("f16", 1, 16.0, "16 bits: exact for float16 models.", direct=True),
    GgufType("q8_0", 7, 8.5, "8 bits: next to no loss.", direct=True),
    GgufType("q6_k", 18, 6.6, "6 bits: hardly any loss."),
    GgufType("q5_k_m", 17, 5.7, "5 bits: very little loss."),
    GgufType("q5_k_s", 16, 5.5, "5 bits, a little smaller."),
    GgufType("q4_k_m", 15, 4.9, "4 bits: the usual choice; small, with little loss."),
    GgufType("q4_k_s", 14, 4.6, "4 bits, a little smaller."),
    GgufType("q3_k_l", 13, 4.3, "3 bits, the largest of its kind: clear loss."),
    GgufType("q3_k_m", 12, 3.9, "3 bits: clear loss."),
    GgufType("q3_k_s", 11, 3.5, "3 bits, small: clear loss."),
    GgufType("q2_k", 10, 3.0, "2 bits: heavy loss."),
    GgufType("q2_k_s", 21, 2.8, "2 bits, smaller: heavy loss.", imatrix=True),
    GgufType("iq4_nl", 25, 4.6, "4 bits, non-linear."),
    GgufType("iq4_xs", 30, 4.3, "4 bits, non-linear and smaller."),
    GgufType("iq3_m", 27, 3.7, "3 bits, non-linear mixture."),
    GgufType("iq3_s", 26, 3.5, "3 bits, non-linear."),
    GgufType("iq3_xs", 22, 3.3, "3 bits, non-linear and smaller.", imatrix=True),
    GgufType("iq3_xxs", 23, 3.1, "3 bits, non-linear, smallest of its kind.", imatrix=True),
    GgufType("iq2_m", 29, 2.8, "2 bits, non-linear mixture.", imatrix=True),
    GgufType("iq2_s", 28, 2.6, "2 bits, non-linear.", imatrix=True),
    GgufType("iq2_xs", 20, 2.4, "2 bits, non-linear and smaller.", imatrix=True),
    GgufType("iq2_xxs", 19, 2.2, "2 bits, non-linear, smallest of its kind.", imatrix=True),
    GgufType("iq1_m", 31, 1.9, "Under 2 bits: very heavy loss.", imatrix=True),
    GgufType("iq1_s", 24, 1.7, "Under 2 bits: very heavy loss.", imatrix=True),
    GgufType("q4_0", 2, 4.6, "4 bits of an older kind: quick on some processors."),
    GgufType("q4_1", 3, 5.1, "4 bits of an older kind."),
    GgufType("q5_0", 8, 5.6, "5 bits of an older kind."),
    GgufType("q5_1", 9, 6.1, "5 bits of an older kind."),
    GgufType("tq1_0", 36, 1.8, "For models trained with three values a weight."),
    GgufType("tq2_0", 37, 2.1, "For models trained with three values a weight."),
)
TYPES: dict[str, GgufType] = {each.name: each for each in _TYPES}
# For GGUF bases alone: what adapters change is quantized again to the type it had.
OWN = GgufType("base", -1, 16.0, "For GGUF bases: every tensor keeps its type.", direct=True)


def gguf_type(name: str) -> GgufType:
    """A type by its name, in any case. Raises WeftError BAD_INPUT."""
    found = OWN if name.strip().lower() == OWN.name else TYPES.get(name.strip().lower())
    if found is None:
        raise WeftError(ErrorKind.BAD_INPUT, f"There is no GGUF type {name!r}.", f"Types are: {', '.join(TYPES)}.")
    return found


class ExportPlan(msgspec.Struct, frozen=True, kw_only=True):
    """What to export.

    Attributes:
        model: folder of the base (safetensors or .bin), or a GGUF file.
        stack: adapters that are merged in.
        target: the GGUF file; it must not exist.
        type: see TYPES.
        name: what the file calls the model; "" for one made of the base's and the adapters'.
        imatrix: a text file, for an importance matrix; "" for none. imatrix_chunks: how much of it, in chunks of
            512 tokens; 0 for all.
        pre_tokenizer: llama.cpp's name of how a BPE tokenizer splits text, where it does not recognise it; "" to recognise it.
        modelfile: write an Ollama Modelfile beside it.
        threads: for quantizing; 0 for all.
    """

    model: str
    stack: AdapterStack = AdapterStack()
    target: str
    type: str = "q4_k_m"
    name: str = ""
    imatrix: str = ""
    imatrix_chunks: int = 100
    pre_tokenizer: str = ""
    modelfile: bool = False
    threads: int = 0


class ExportResult(msgspec.Struct, frozen=True, kw_only=True):
    """What an export made.

    Attributes:
        file: where it lies. bytes: its size. type: as asked for. tensors: how many.
        intermediate: bytes of the 16-bit file that was needed on the way; 0 when none was.
        resumed: bytes that an earlier, interrupted run had already written.
        modelfile: its path, or "".
        notes: sentences worth showing. seconds: that it took.
    """

    file: str
    bytes: int
    type: str
    tensors: int
    intermediate: int = 0
    resumed: int = 0
    modelfile: str = ""
    notes: list[str] = []
    seconds: float = 0.0
