"""Random GGUF models of the llama architecture, of any size, with a small SentencePiece vocabulary. Needs gguf and numpy alone.

The vocabulary holds every byte, so that any text can be spelt and characters come in pieces, and short words of a few
letters. Quantized types that gguf-py cannot write are made by llama.cpp's own quantizer.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from app.core.library import ModelEntry, ModelFormat, ModelShape
from app.generation.llama_log import library_log

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
LETTERS = "▁etaoinshr"


def vocabulary(size: int) -> tuple[list[bytes], list[int]]:
    """Tokens and their types: three special ones, 256 bytes, then words."""
    tokens = [b"<unk>", b"<s>", b"</s>", *(f"<0x{i:02X}>".encode() for i in range(256))]
    types = [2, 3, 3, *[6] * 256]
    words = ("".join(word).encode() for n in range(1, 6) for word in itertools.product(LETTERS, repeat=n))
    for word in itertools.islice(words, size - len(tokens)):
        tokens.append(word)
    tokens += [f"▁w{i}".encode() for i in range(len(tokens), size)]
    types += [1] * (size - len(types))
    return tokens, types


def write(
    path: Path,
    *,
    layers: int = 2,
    hidden: int = 64,
    intermediate: int = 128,
    heads: int = 4,
    kv_heads: int = 2,
    vocab: int = 512,
    context: int = 2048,
    kind: str = "F32",
    seed: int = 0,
    template: str = TEMPLATE,
    architecture: str = "llama",
    tied: bool = False,
    spoil: float | None = None,
    split: int = 0,
) -> ModelEntry:
    """Write a model and describe it. Greedy answers never end by themselves.

    Args:
        kind: F32, F16, Q8_0, … of the matrices; K-quants as llama.cpp names files (Q4_K_M).
        spoil: a value to put into one weight (NaN, infinity).
        split: bytes after which another part begins; 0 writes one file.
    """
    if kind.startswith(("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ")):
        return _quantized(path, kind, **{k: v for k, v in locals().items() if k not in ("path", "kind")})
    rng = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, architecture, split_max_size=split)
    head = hidden // heads
    writer.add_context_length(context)
    writer.add_embedding_length(hidden)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(intermediate)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(head)
    writer.add_vocab_size(vocab)
    tokens, types = vocabulary(vocab)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([-float(i) for i in range(vocab)])
    writer.add_token_types(types)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(True)
    if template:
        writer.add_chat_template(template)

    def matrix(name: str, rows: int, columns: int, scale: float | None = None) -> None:
        values = (rng.standard_normal((rows, columns), dtype=np.float32) * (scale or columns**-0.5)).astype(np.float32)
        if spoil is not None and name == "blk.0.ffn_up.weight":
            values[0, 0] = spoil
        if name == ("token_embd.weight" if tied else "output.weight"):
            values[:3] *= 0.01  # the logits of `</s>` and the like are almost 0, and never the largest
        quantized = gguf.GGMLQuantizationType[kind]
        if quantized == gguf.GGMLQuantizationType.F32:
            writer.add_tensor(name, values)
        else:
            writer.add_tensor(name, gguf.quants.quantize(values, quantized), raw_dtype=quantized)

    def norm(name: str) -> None:
        writer.add_tensor(name, np.ones(hidden, np.float32))

    matrix("token_embd.weight", vocab, hidden, 1.0)
    if not tied:
        matrix("output.weight", vocab, hidden, 0.3 * (64 / hidden) ** 0.5)
    norm("output_norm.weight")
    for i in range(layers):
        block = f"blk.{i}."
        norm(block + "attn_norm.weight")
        norm(block + "ffn_norm.weight")
        matrix(block + "attn_q.weight", hidden, hidden)
        matrix(block + "attn_k.weight", kv_heads * head, hidden)
        matrix(block + "attn_v.weight", kv_heads * head, hidden)
        matrix(block + "attn_output.weight", hidden, hidden)
        matrix(block + "ffn_gate.weight", intermediate, hidden)
        matrix(block + "ffn_up.weight", intermediate, hidden)
        matrix(block + "ffn_down.weight", hidden, intermediate)
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    files = [path] if not split else sorted(path.parent.glob(f"{path.stem}-*.gguf"))
    return entry(files, kind)


def entry(files: list[Path], kind: str = "") -> ModelEntry:
    """What the library would say about these files."""
    reader = gguf.GGUFReader(files[0])

    def number(key: str) -> int:
        name = str(reader.fields["general.architecture"].contents())
        field = reader.fields.get(f"{name}.{key}")
        return int(field.contents()) if field else 0

    readers = [reader, *(gguf.GGUFReader(file) for file in files[1:])]
    tensors = [t for part in readers for t in part.tensors]
    heads = number("attention.head_count")
    shape = ModelShape(
        layers=number("block_count"),
        hidden=number("embedding_length"),
        intermediate=number("feed_forward_length"),
        heads=heads,
        kv_heads=number("attention.head_count_kv"),
        head_dim=number("embedding_length") // max(1, heads),
        value_dim=number("embedding_length") // max(1, heads),
        vocabulary=number("vocab_size"),
        context=number("context_length"),
    )
    return ModelEntry(
        id=str(files[0]),
        name=files[0].stem,
        path=str(files[0]),
        format=ModelFormat.GGUF,
        architecture="llama",
        quantization=kind,
        parameters=sum(int(t.n_elements) for t in tensors),
        bytes=sum(file.stat().st_size for file in files),
        weight_bytes=sum(int(t.n_bytes) for t in tensors),
        shape=shape,
        files=tuple(map(str, files)),
    )


def _quantized(path: Path, kind: str, **options: Any) -> ModelEntry:
    import llama_cpp

    source = path.with_suffix(".f16.gguf")
    options.pop("split")
    write(source, kind="F16", **options)
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    params.nthread = 2
    library_log(llama_cpp)  # else it prints a page
    failed = llama_cpp.llama_model_quantize(str(source).encode(), str(path).encode(), params)
    source.unlink()
    assert not failed
    return entry([path], kind)
