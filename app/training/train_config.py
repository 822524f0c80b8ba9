"""[train] of a RUN.toml: steps, optimizer, memory, what is watched. No ML, no Qt."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Literal

import msgspec

from app.core.options import option

Optimizer = Literal[
    "adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit", "lora_plus", "lora_plus_8bit", "lora_fa", "sgd"
]
Scheduler = Literal[
    "linear", "cosine", "cosine_with_min_lr", "constant", "polynomial", "inverse_sqrt", "warmup_stable_decay"
]
Objective = Literal["sft", "dpo", "orpo"]

_steps = partial(option, group="Steps")
_optimizer = partial(option, group="Optimizer")
_memory = partial(option, group="Memory")
_preference = partial(option, group="Preference")
_watching = partial(option, group="Watching")


class TrainConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """[train]: how it is trained."""

    objective: Annotated[
        Objective,
        _steps(
            "Learn by",
            "sft: imitate the answers. dpo, orpo: prefer the chosen answer over the rejected one (preference data).",
        ),
    ] = "sft"
    epochs: Annotated[float, _steps("Epochs", "How often the data is gone through.", ge=0.001, le=10000)] = 3.0
    max_steps: (
        Annotated[int, _steps("Most steps", "Ends the run after so many steps.", ge=1, automatic="as the epochs say")]
        | None
    ) = None
    batch_size: Annotated[
        int,
        _steps(
            "Batch size",
            "Sequences (packed: packs of the maximal length) computed at once. Halved by itself when memory runs out.",
            ge=1,
            le=4096,
            aliases=("per_device_train_batch_size",),
        ),
    ] = 2
    gradient_accumulation: Annotated[
        int,
        _steps(
            "Gradient accumulation",
            "Batches to a step. A step sees batch size × this many sequences.",
            ge=1,
            le=65536,
            aliases=("gradient_accumulation_steps",),
        ),
    ] = 8
    learning_rate: Annotated[
        float, _steps("Learning rate", "2e-4 is usual for LoRA; 1e-5 for DPO.", ge=0, le=10, aliases=("lr",))
    ] = 0.0002
    max_length: Annotated[
        int,
        _steps(
            "Maximal length",
            "Longer examples are cut, or left out as the data section says.",
            ge=8,
            le=1048576,
            unit="tokens",
            aliases=("max_seq_length", "cutoff_len"),
        ),
    ] = 1024
    packing: Annotated[
        Literal["fit", "sequential", "off"],
        _steps(
            "Packing",
            "Several short examples share one sequence, kept apart: two to three times as fast on mixed lengths. fit: as tightly as possible; sequential: in order. RUN.toml takes true and false too.",
        ),
    ] = "fit"
    seed: Annotated[
        int, _steps("Seed", "The same seed gives the same run, on the same machine.", ge=0, le=4294967295)
    ] = 0
    optimizer: Annotated[
        Optimizer,
        _optimizer(
            "Optimizer",
            "adamw; 8-bit ones save memory; paged ones let their state leave a full graphics card or, on the processor, full memory (it lies in a file there); lora_plus trains B faster; lora_fa trains B alone and needs the least memory.",
            aliases=("optim",),
        ),
    ] = "adamw"
    lora_plus_ratio: Annotated[
        float,
        _optimizer(
            "LoRA+ ratio",
            "How many times faster B learns than A.",
            ge=1,
            le=1000,
            advanced=True,
            aliases=("loraplus_lr_ratio",),
        ),
    ] = 16.0
    scheduler: Annotated[
        Scheduler, _optimizer("Schedule", "How the learning rate falls.", aliases=("lr_scheduler_type",))
    ] = "cosine"
    warmup: Annotated[
        float,
        _optimizer(
            "Warm-up",
            "Steps in which the learning rate rises: a share of the run below 1, else a number of steps.",
            ge=0,
            aliases=("warmup_ratio", "warmup_steps"),
        ),
    ] = 0.03
    min_learning_rate: Annotated[
        float,
        _optimizer(
            "Lowest learning rate",
            "Where cosine_with_min_lr, polynomial and warmup_stable_decay end, as a share of the learning rate.",
            ge=0,
            le=1,
            advanced=True,
        ),
    ] = 0.1
    weight_decay: Annotated[
        float, _optimizer("Weight decay", "Pulls weights towards zero.", ge=0, le=10, advanced=True)
    ] = 0.0
    beta1: Annotated[float, _optimizer("Adam beta 1", "Memory of the gradient.", ge=0, le=0.9999, advanced=True)] = 0.9
    beta2: Annotated[float, _optimizer("Adam beta 2", "Memory of its square.", ge=0, le=0.99999, advanced=True)] = 0.999
    epsilon: Annotated[
        float, _optimizer("Adam epsilon", "Keeps the division finite.", ge=1e-12, le=0.1, advanced=True)
    ] = 1e-08
    max_grad_norm: Annotated[
        float, _optimizer("Gradient clipping", "Longest gradient let through; 0 for no limit.", ge=0, advanced=True)
    ] = 1.0
    precision: Annotated[
        Literal["auto", "bf16", "fp16", "fp32"],
        _memory(
            "Precision",
            "Number format of base and arithmetic; the adapter itself stays 32-bit. Automatic: bf16 on a graphics card that has it, else fp32.",
        ),
    ] = "auto"
    gradient_checkpointing: Annotated[
        bool,
        _memory(
            "Gradient checkpointing",
            "Compute activations twice instead of keeping them: much less memory, about a third slower.",
        ),
    ] = False
    chunked_loss: Annotated[
        bool,
        _memory(
            "Loss in pieces",
            "Compute the loss in pieces of the sequence: saves much memory with large vocabularies.",
            advanced=True,
        ),
    ] = True
    beta: Annotated[
        float,
        _preference(
            "Preference strength", "DPO: how close to stay to the base. ORPO: weight of the odds ratio.", ge=0, le=100
        ),
    ] = 0.1
    label_smoothing: Annotated[
        float,
        _preference(
            "Label smoothing",
            "DPO: share of pairs assumed to be labelled the wrong way round.",
            ge=0,
            le=0.49,
            advanced=True,
        ),
    ] = 0.0
    evaluate_every: (
        Annotated[
            int,
            _watching(
                "Measure held-out loss every",
                "Steps between measurements.",
                ge=1,
                unit="steps",
                automatic="ten times in the run, and at its end",
            ),
        ]
        | None
    ) = None
    early_stopping: (
        Annotated[
            int,
            _watching(
                "Stop early after",
                "End the run when the held-out loss has not fallen in so many measurements.",
                ge=1,
                unit="measurements",
                automatic="never",
            ),
        ]
        | None
    ) = None
    keep_best: Annotated[
        bool, _watching("Keep the best", "The adapter is the one with the lowest held-out loss, not the last.")
    ] = False
    checkpoint_every: (
        Annotated[
            int,
            _watching(
                "Checkpoint every",
                "Steps between checkpoints, from which a run resumes.",
                ge=1,
                unit="steps",
                automatic="with each held-out measurement",
            ),
        ]
        | None
    ) = None
    keep_checkpoints: Annotated[
        int,
        _watching(
            "Checkpoints kept", "Older ones are removed after a new one is complete.", ge=1, le=1000, advanced=True
        ),
    ] = 2
    samples: Annotated[
        str,
        _watching(
            "Sample questions",
            "One a line; answered at each measurement, so that one can read what it learns.",
            multiline=True,
        ),
    ] = ""
    sample_tokens: Annotated[
        int,
        _watching(
            "Length of sample answers", "Most tokens of a sample answer.", ge=1, le=4096, unit="tokens", advanced=True
        ),
    ] = 64
