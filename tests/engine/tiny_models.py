"""Tiny random models of several architectures, with small tokenizers, for the engine tests.

`make(folder, "llama")` writes a complete model folder in about half a second and returns its ModelEntry. The weights are
random but wide, so that greedy answers vary; the special tokens alone are never the likeliest, so that no answer ends by
itself. Nothing is downloaded.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from app.core.library import ModelEntry, ModelFormat, ModelShape

transformers.utils.logging.disable_progress_bar()  # its monitor thread would outlive a slow test

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>"]
CORPUS = [
    "The warp is held under tension while the weft is drawn through and inserted over and under it.",
    "A loom holds many threads; each pick of the shuttle carries one more across the cloth.",
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich. Größe, Straße, Übermut.",
    "Le cœur déçu mais l'âme plutôt naïve. Ça va? 織り機で布を織る。 Привет, мир! 🧵🪡",
    "def weave(warp, weft):\n    return [a + b for a, b in zip(warp, weft)]\n\nOne, two, three: 1 2 3 4 5 6 7 8 9 0.",
    "What is your name? My name is Weft. How do I add a LoRA? Open the page and drop the folder there.",
]


def byte_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Byte-level BPE of about 400 tokens, as GPT-2 and Qwen have."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        CORPUS * 3,
        trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False),
    )
    return _wrap(core)


def sentencepiece_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """BPE with ▁ for blanks and byte fallback, as Llama 2 and Gemma have; an unknown character is several byte tokens."""
    core = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = [*SPECIAL, *(f"<0x{i:02X}>" for i in range(256))]
    core.train_from_iterator(
        [line for line in CORPUS if line.isascii()] * 3,
        trainers.BpeTrainer(vocab_size=420, special_tokens=special, show_progress=False, max_token_length=6),
    )
    data = json.loads(core.to_str())
    # Byte tokens are ordinary tokens; trained as special ones they would vanish from the text.
    data["added_tokens"] = [t for t in data["added_tokens"] if not t["content"].startswith("<0x")]
    return _wrap(Tokenizer.from_str(json.dumps(data)))


def _wrap(core: Tokenizer) -> transformers.PreTrainedTokenizerFast:
    core.add_special_tokens([AddedToken(t, special=True) for t in SPECIAL])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>", clean_up_tokenization_spaces=False
    )


def config(family: str, vocabulary: int, context: int, **changes: Any) -> Any:
    """A small config of a family: llama, mixtral, qwen2, mistral (sliding window), gemma2 (both kinds of layer), gpt2, phi, mamba."""
    common: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": context,
        "initializer_range": 0.25,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": None,
        "tie_word_embeddings": False,
    }
    if family == "llama":
        return transformers.LlamaConfig(**{**common, **changes})
    if family == "mixtral":
        experts = {"num_local_experts": 3, "num_experts_per_tok": 2}
        return transformers.MixtralConfig(**{**common, **experts, **changes})
    if family == "qwen2":
        return transformers.Qwen2Config(**{**common, "tie_word_embeddings": True, **changes})
    if family == "mistral":
        return transformers.MistralConfig(**{**common, "sliding_window": 24, **changes})
    if family == "gemma2":
        return transformers.Gemma2Config(
            **{
                **common,
                "head_dim": 16,
                "sliding_window": 24,
                "tie_word_embeddings": True,
                "query_pre_attn_scalar": 16,
                **changes,
            }
        )
    if family == "phi":
        return transformers.PhiConfig(**{**common, "num_key_value_heads": 4, **changes})
    if family == "gpt2":
        small = {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": context, "initializer_range": 0.25}
        return transformers.GPT2Config(
            **{"vocab_size": vocabulary, "bos_token_id": 0, "eos_token_id": 1, **small, **changes}
        )
    if family == "mamba":
        small = {
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "state_size": 8,
            "initializer_range": 0.25,
            "pad_token_id": None,
        }
        return transformers.MambaConfig(
            **{"vocab_size": vocabulary, "bos_token_id": 0, "eos_token_id": 1, **small, **changes}
        )
    raise ValueError(family)


def make(
    folder: Path,
    family: str = "llama",
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    tokenizer: str = "byte",
    template: str | None = CHATML,
    form: str = "safetensors",
    shards: bool = False,
    context: int = 512,
    **changes: Any,
) -> ModelEntry:
    """Write a model folder.

    Args:
        family: see `config`; `changes` go into the config.
        tokenizer: `byte` or `sentencepiece`.
        form: `safetensors` or `bin`; shards: several files and an index.

    Returns:
        What the library would say of it. A greedy answer of this model lasts until `max_tokens` or a stop string.
    """
    folder.mkdir(parents=True, exist_ok=True)
    made = byte_tokenizer() if tokenizer == "byte" else sentencepiece_tokenizer()
    if template is not None:
        made.chat_template = template
    made.save_pretrained(folder)
    settings = config(family, len(made), context, **changes)
    settings.dtype = dtype
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(settings).to(dtype).eval()
    with torch.no_grad():  # norms and biases too, so that a lost one shows
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 and not name.endswith(("A_log", "D")):
                parameter.add_(torch.randn_like(parameter) * 0.05)
        # With a row of almost nothing their logits are almost 0, while the largest of hundreds of random ones is far above.
        # The head's row and, where they are tied, the embedding's, whose direction is all that the first norm leaves of it.
        model.get_output_embeddings().weight[made.convert_tokens_to_ids(SPECIAL)] *= 0.01
    model.generation_config.eos_token_id = [1, made.convert_tokens_to_ids("<|im_end|>")]
    model.save_pretrained(folder, max_shard_size="100KB" if shards else "5GB")
    if form == "bin":
        _to_bin(folder)
    return entry(folder, model)


def _to_bin(folder: Path) -> None:
    """Rewrite safetensors as the older pickled files."""
    from safetensors.torch import load_file

    parts = sorted(folder.glob("*.safetensors"))
    names: dict[str, str] = {}
    for number, part in enumerate(parts, 1):
        tensors = load_file(part)
        name = "pytorch_model.bin" if len(parts) == 1 else f"pytorch_model-{number:05d}-of-{len(parts):05d}.bin"
        torch.save(tensors, folder / name)
        names |= dict.fromkeys(tensors, name)
        part.unlink()
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    if len(parts) > 1:
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))


def entry(folder: Path, model: Any) -> ModelEntry:
    """A ModelEntry as the library makes from headers alone."""
    files = tuple(str(p) for p in sorted(folder.iterdir()) if p.suffix in (".safetensors", ".bin"))
    settings = model.config
    heads = getattr(settings, "num_attention_heads", 0) or 0
    hidden = settings.hidden_size
    head_dim = getattr(settings, "head_dim", None) or (hidden // heads if heads else 0)
    parameters = sum(p.numel() for p in model.parameters())
    return ModelEntry(
        id=str(folder),
        name=folder.name,
        path=str(folder),
        format=ModelFormat.TORCH_BIN if any(f.endswith(".bin") for f in files) else ModelFormat.SAFETENSORS,
        architecture=type(model).__name__,
        model_type=settings.model_type,
        parameters=parameters,
        bytes=sum(Path(f).stat().st_size for f in files),
        weight_bytes=sum(p.numel() * p.element_size() for p in model.parameters()),
        shape=ModelShape(
            layers=settings.num_hidden_layers,
            hidden=hidden,
            intermediate=getattr(settings, "intermediate_size", 0) or 0,
            heads=heads,
            kv_heads=getattr(settings, "num_key_value_heads", heads) or 0,
            head_dim=head_dim,
            value_dim=head_dim,
            vocabulary=settings.vocab_size,
            context=getattr(settings, "max_position_embeddings", 0) or 0,
            sliding_window=getattr(settings, "sliding_window", 0) or 0,
        ),
        files=files,
        has_chat_template=(folder / "chat_template.jinja").exists(),
    )
