"""The base model: a small Llama, trained from scratch."""

from __future__ import annotations

import random
from pathlib import Path

import torch

from ..corpus.sampler import Corpus
from .answers import score
from .batches import Batches
from .tokenizer import VOCABULARY
from .training import Run, train

CONTEXT = 2048


def new_model(seed: int):
    """Make the untrained model. Every row is a multiple of 256, so that every quantization can divide it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config)


def make_base(corpus: Corpus, folder: Path, run: Run) -> None:
    """Train the model whose tokenizer lies in `folder`, and write it there in float16."""
    from transformers import AutoTokenizer, GenerationConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(folder)
    seed, long = (run.seed + 101, 0.025) if run.further else (run.seed + 1, 0.012)
    batches = Batches(corpus, tokenizer, random.Random(seed), long=long, opened=0.25)
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32) if run.further else new_model(run.seed)
    run.report(f"{model.num_parameters():,} parameters")

    def check() -> str:
        return score(model, tokenizer, corpus, "dev").line

    train(model, batches.stream(), run, 7e-4 if run.further else 1.4e-3, first=3.0, check=check)
    run.report(check())
    model.generation_config = GenerationConfig(
        bos_token_id=1, eos_token_id=2, pad_token_id=0, max_new_tokens=96, do_sample=False
    )
    model.half().save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
