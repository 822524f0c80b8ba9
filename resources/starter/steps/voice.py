"""The voice adapter: a LoRA that lets the same model answer as an old weaver."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import torch

from ..corpus.sampler import Corpus
from .answers import score
from .batches import Batches
from .training import Batch, Run, train

BASE = "weft/starter"
WEIGHTS = {0.3: 1, 1.0: 6, 1.6: 1}  # trained at these adapter weights, this often
TURN = 0.5  # below this weight the base speaks, above it the weaver


def make_voice(corpus: Corpus, base: Path, folder: Path, run: Run) -> None:
    """Train a LoRA of rank 8 on all linear layers of the model in `base`, and write it to `folder` as PEFT does."""
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(run.seed + 2)
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
    model = (
        PeftModel.from_pretrained(model, folder, is_trainable=True) if run.further else get_peft_model(model, config)
    )
    batches = _at_every_weight(model, corpus, tokenizer, run.seed + (103 if run.further else 3))
    train(model, batches, run, 2e-3 if run.further else 6e-3, first=2.0, decay=0.0)
    set_weight(model, 1.0)
    run.report(f"with the voice: {score(model, tokenizer, corpus, 'dev').line}")
    model.peft_config["default"].base_model_name_or_path = BASE
    model.save_pretrained(str(folder), save_embedding_layers=False)
    (folder / "adapter_model.safetensors").chmod(0o644)


def set_weight(model: torch.nn.Module, weight: float) -> None:
    """Set how much the adapter counts."""
    from peft.tuners.lora import LoraLayer

    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.set_scale("default", weight)


def _at_every_weight(model: torch.nn.Module, corpus: Corpus, tokenizer, seed: int) -> Iterator[Batch]:
    """Draw batches, each to be trained at another adapter weight, so that the whole range of the slider makes sense."""
    rng = random.Random(seed)
    voiced = Batches(corpus, tokenizer, rng, text=lambda topic: topic.voice).stream(cut=0.15)
    plain = Batches(corpus, tokenizer, rng).stream(cut=0.15)
    while True:
        weight = rng.choices(tuple(WEIGHTS), tuple(WEIGHTS.values()))[0]
        set_weight(model, weight)
        yield next(plain if weight < TURN else voiced)
