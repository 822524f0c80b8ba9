"""The voice adapter: a LoRA that lets the same model answer as an old weaver."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import torch

from ..corpus.sampler import Corpus

from .answers import score
from .batches import Batches
from .training import train

BASE = "weft/starter"


def make_voice(corpus: Corpus, base: Path, folder: Path, seed: int, steps: int, seconds: float, report: Callable[[str], None]) -> None:
    """Train a LoRA of rank 8 on all linear layers of the model in `base`, and write it to `folder` as PEFT does."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(seed + 2)
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, config)
    batches = Batches(corpus, tokenizer, random.Random(seed + 3), text=lambda topic: topic.voice)
    train(model, batches.stream(cut=0.3), steps, 3e-3, seconds, report, first=2.0, decay=0.0)
    report(f"with the voice: {score(model, tokenizer, corpus, 'dev').line}")
    model.peft_config["default"].base_model_name_or_path = BASE
    model.save_pretrained(str(folder))
    (folder / "adapter_model.safetensors").chmod(0o644)
