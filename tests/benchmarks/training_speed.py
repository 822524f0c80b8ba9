"""Mixed-length data: a run of ours and TRL's SFTTrainer by turns, in one process. Prints one JSON object.

Both see the same tokens and labels, in the same steps, with the same optimizer, in float32; TRL with its padded default.
"""

from __future__ import annotations

import json
import logging
import random
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import datasets
import msgspec
import peft
import torch
import transformers
import trl

from app.training import run_torch
from app.training.batches import plan_epoch
from app.training.encode import Encoded, encode
from app.training.loss_torch import sft_chunked
from app.training.rows import load_rows
from app.training.run_config import RunConfig, TrainParameters
from app.training.run_file import from_table
from app.training.tokenizer import load_tokenizer
from tests.engine import tiny_models, training_kit

BATCH, LONGEST, RATE, RANK = 8, 1024, 1e-3, 8


def rows(path: Path, rng: random.Random, count: int) -> None:
    """Prompts and answers whose lengths are spread like those of instruction data: many short, few long."""
    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            words = max(6, min(420, int(rng.lognormvariate(3.6, 1.0))))
            prompt = rng.randint(2, words - 2)
            text = [rng.choice(training_kit.WORDS) for _ in range(words)]
            file.write(json.dumps({"prompt": " ".join(text[:prompt]), "completion": " ".join(text[prompt:])}) + "\n")


def configure(model: Path, data: Path, out: Path) -> RunConfig:
    return from_table(
        {
            "model": {"path": str(model)},
            "data": {"files": [str(data)], "held_out": 0.0},
            "method": {"r": RANK, "alpha": RANK},
            "train": {
                "epochs": 1,
                "batch_size": BATCH,
                "gradient_accumulation": 1,
                "learning_rate": RATE,
                "warmup": 0,
                "max_length": LONGEST,
                "scheduler": "constant",
                "precision": "fp32",
                "checkpoint_every": 100000,
            },
            "output": {"dir": str(out), "overwrite": True},
        }
    )


def ours(config: RunConfig, entry: Any) -> float:
    parameters = msgspec.convert({"config": config, "model": entry, "resume": "no"}, TrainParameters)
    return run_torch.run(parameters, training_kit.Remembering()).seconds


class Clock(transformers.TrainerCallback):
    """Seconds from the first step's begin to the last step's end."""

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.began = getattr(self, "began", None) or time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.ended = time.perf_counter()


def theirs(model_folder: Path, data: Encoded, order: list[int], checkpointing: bool, out: Path) -> float:
    model = transformers.AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    settings = trl.SFTConfig(
        output_dir=str(out / "trl"), per_device_train_batch_size=BATCH, num_train_epochs=1, learning_rate=RATE,
        lr_scheduler_type="constant", warmup_steps=0, weight_decay=0.0, bf16=False, use_cpu=True, max_length=LONGEST,
        gradient_checkpointing=checkpointing, save_strategy="no", report_to=[], disable_tqdm=True, logging_strategy="no",
        train_sampling_strategy="sequential",
    )  # fmt: skip
    examples = [data.examples[n] for n in order]
    dataset = datasets.Dataset.from_list([{"input_ids": list(e.input_ids), "labels": list(e.labels)} for e in examples])
    clock = Clock()
    trainer = trl.SFTTrainer(
        model=model, args=settings, train_dataset=dataset, processing_class=load_tokenizer(model_folder),
        peft_config=peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear"), callbacks=[clock],
    )  # fmt: skip
    torch.manual_seed(0)
    trainer.train()
    trainer.model.save_pretrained(out / "theirs")
    return clock.ended - clock.began


def loss(model_folder: Path, adapter: Path, data: Encoded) -> float:
    """Mean loss of a token over all examples, by a plain loop."""
    model = transformers.AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(model, adapter).eval()
    total, count = 0.0, 0
    with torch.no_grad():
        for example in data.examples:
            ids, labels = (torch.tensor(part)[None].long() for part in (example.input_ids, example.labels))
            found = sft_chunked(model, {"input_ids": ids}, labels)
            assert found is not None
            total, count = total + float(found), count + example.trained
    return total / count


def main(rounds: int, count: int) -> None:
    seed = random.SystemRandom().randrange(1 << 31)
    place = Path(tempfile.mkdtemp())
    entry = tiny_models.make(
        place / "model", "llama", seed=seed, context=2048, hidden_size=192, intermediate_size=528, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=4, vocab_size=4096, initializer_range=0.04,
    )  # fmt: skip
    rows(place / "data.jsonl", random.Random(seed), count)
    config = configure(place / "model", place / "data.jsonl", place / "ours")
    settings = config.data_config()
    data = encode(load_rows(settings), load_tokenizer(place / "model"), settings)
    lengths = [len(e.input_ids) for e in data.examples]
    steps = plan_epoch(lengths, settings, epoch=0, rows=BATCH, accumulation=1, packing=True)
    order = [n for step in steps for batch in step for pack in batch for n in pack]
    padded = sum(
        max(lengths[n] for n in order[at : at + BATCH]) * len(order[at : at + BATCH])
        for at in range(0, len(order), BATCH)
    )
    found: dict[str, Any] = {
        "seed": seed,
        "tokens": sum(lengths),
        "padding": 1 - sum(lengths) / padded,
        "threads": torch.get_num_threads(),
    }
    speeds: dict[str, list[float]] = {"ours": [], "trl": [], "trl as it comes (gradient checkpointing)": []}
    for _ in range(rounds):
        speeds["ours"].append(sum(lengths) / ours(config, entry))
        for name, checkpointing in (("trl", False), ("trl as it comes (gradient checkpointing)", True)):
            speeds[name].append(sum(lengths) / theirs(place / "model", data, order, checkpointing, place))
    found["tokens_per_second"] = speeds
    found["loss"] = {
        "ours": loss(place / "model", place / "ours", data),
        "trl": loss(place / "model", place / "theirs", data),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    transformers.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    main(int(sys.argv[1]), int(sys.argv[2]))
