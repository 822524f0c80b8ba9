"""RUN.toml as structs: everything that makes a training run, with help, ranges and defaults. No ML, no Qt.

The window's form, the command line and the task share these. Every field is a bool, a number, a choice or a text, so
that `core.options.describe` makes a form of it; where TOML would naturally hold a list or a table (`targets`,
`rank_pattern`, …), RUN.toml takes that too, and `run_file` turns it into the text that stands here. Names of methods and
options are PEFT's, as its LoRA guide has them.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from app.core.library import ModelEntry
from app.core.options import option
from app.training.data_config import DataConfig

Init = Literal["default", "gaussian", "pissa", "corda", "olora", "eva", "orthogonal", "loftq", "loftq_replace", "off"]
Optimizer = Literal[
    "adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit", "lora_plus", "lora_plus_8bit", "lora_fa", "sgd"
]
Scheduler = Literal[
    "linear", "cosine", "cosine_with_min_lr", "constant", "polynomial", "inverse_sqrt", "warmup_stable_decay"
]
Quantization = Literal["none", "nf4", "fp4", "int8"]
Objective = Literal["sft", "dpo", "orpo"]

CONVERTED: frozenset[str] = frozenset({"pissa", "olora", "corda"})
"""Initialisations that change the base: their adapter is converted when saved, so that it applies to the original."""
NEEDS_CALIBRATION: frozenset[str] = frozenset({"corda", "eva"})


class ModelConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """[model]: the base, and how it is held in memory while training."""

    path: Annotated[
        str, option("Model", "What to train on: a name in the library, a folder, a GGUF file, or `starter`.")
    ] = ""
    quantization: Annotated[
        Quantization,
        option(
            "Quantize the base",
            "QLoRA: hold the frozen base in 4 bits (nf4 suits weights best) or 8 bits with bitsandbytes. A quarter or half of the memory, somewhat slower.",
            group="Model",
            aliases=("load_in",),
        ),
    ] = "none"
    double_quant: Annotated[
        bool,
        option(
            "Double quantization",
            "Quantize the 4-bit scales too: saves 0.4 bits a weight.",
            group="Model",
            advanced=True,
        ),
    ] = True
    attention: Annotated[
        Literal["auto", "sdpa", "eager", "flash_attention_2"],
        option(
            "Attention",
            "The attention code. Automatic is PyTorch's sdpa where the model has it.",
            group="Model",
            advanced=True,
        ),
    ] = "auto"
    device: Annotated[
        Literal["auto", "cpu", "cuda"],
        option(
            "Train on",
            "Automatic: the graphics card if there is one that PyTorch can use.",
            group="Model",
            advanced=True,
        ),
    ] = "auto"
    trust_remote_code: Annotated[
        bool,
        option(
            "Run the model's own code",
            "Only for models that bring Python code which you have read and trust.",
            group="Model",
            advanced=True,
        ),
    ] = False


class MethodConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """[method]: what is trained. The options of PEFT's LoraConfig."""

    kind: Annotated[Literal["lora"], option("Method", "LoRA and its variants.", advanced=True)] = "lora"
    r: Annotated[
        int,
        option(
            "Rank",
            "Size of the adapter: 8 to 32 for a voice or a format, more for knowledge.",
            ge=1,
            le=4096,
            group="Adapter",
            aliases=("rank",),
        ),
    ] = 16
    alpha: Annotated[
        float,
        option(
            "Alpha",
            "Scale of the adapter's effect: alpha / rank (rsLoRA: alpha / √rank). Equal to the rank or twice it is usual.",
            ge=0.001,
            group="Adapter",
            aliases=("lora_alpha",),
        ),
    ] = 16.0
    dropout: Annotated[
        float,
        option(
            "Dropout",
            "Share of the adapter's input left out at random in each step, against learning by heart.",
            ge=0,
            le=0.95,
            group="Adapter",
            aliases=("lora_dropout",),
        ),
    ] = 0.0
    targets: Annotated[
        str,
        option(
            "Trained modules",
            "`all-linear`, or names separated by commas: q_proj, v_proj. The model's own names are offered when one is chosen.",
            group="Adapter",
            aliases=("target_modules",),
        ),
    ] = "all-linear"
    target_regex: Annotated[
        str,
        option(
            "Trained modules by pattern",
            "A regular expression that full module names must match; goes before the list.",
            group="Adapter",
            advanced=True,
        ),
    ] = ""
    exclude: Annotated[
        str,
        option(
            "Left out",
            "Names of modules not to train, separated by commas.",
            group="Adapter",
            advanced=True,
            aliases=("exclude_modules",),
        ),
    ] = ""
    layers: Annotated[
        str,
        option(
            "Only these layers",
            "Layer numbers from 0: 0-3, 10, 12. Empty: all of them.",
            group="Adapter",
            advanced=True,
            aliases=("layers_to_transform",),
        ),
    ] = ""
    layers_pattern: Annotated[
        str,
        option(
            "Name of the layer list",
            "What the model calls its list of layers (layers, h), where it is not found by itself.",
            group="Adapter",
            advanced=True,
        ),
    ] = ""
    target_parameters: Annotated[
        str,
        option(
            "Trained parameters",
            "For experts held in one tensor: parameter names such as mlp.experts.gate_up_proj, separated by commas. Not with dropout or DoRA.",
            group="Adapter",
            advanced=True,
        ),
    ] = ""
    modules_to_save: Annotated[
        str,
        option(
            "Trained in full",
            "Modules trained and saved whole, beside the adapter: embed_tokens, lm_head. Makes large files.",
            group="Adapter",
            advanced=True,
        ),
    ] = ""
    rank_pattern: Annotated[
        str,
        option(
            "Ranks by name",
            "One a line: name or regular expression = rank. q_proj = 32",
            group="Adapter",
            advanced=True,
            multiline=True,
        ),
    ] = ""
    alpha_pattern: Annotated[
        str,
        option(
            "Alphas by name",
            "One a line: name or regular expression = alpha.",
            group="Adapter",
            advanced=True,
            multiline=True,
        ),
    ] = ""
    rslora: Annotated[
        bool,
        option(
            "rsLoRA",
            "Rank-stabilized: scale by alpha / √rank. Lets high ranks learn.",
            group="Variant",
            aliases=("use_rslora",),
        ),
    ] = False
    dora: Annotated[
        bool,
        option(
            "DoRA",
            "Train direction and magnitude apart. Better at low ranks; a step takes about twice as long, and merging is advised for use.",
            group="Variant",
            aliases=("use_dora",),
        ),
    ] = False
    dora_offload: Annotated[
        bool,
        option(
            "DoRA: offload on the fly",
            "Where parts of the model lie in main memory: bring them to the card for DoRA's arithmetic. Faster, for some of the card's memory. No effect without a graphics card.",
            group="Variant",
            advanced=True,
            aliases=("ephemeral_gpu_offload",),
        ),
    ] = False
    init: Annotated[
        Init,
        option(
            "Start from",
            "default: A random, B zero. pissa, olora, corda begin with the base's main directions and are converted when saved, so that they apply to the original base. eva and corda look at a calibration text. loftq starts from what quantization loses. off: A and B random, for debugging only.",
            group="Initialisation",
            aliases=("init_lora_weights",),
        ),
    ] = "default"
    pissa_niter: (
        Annotated[
            int,
            option(
                "PiSSA iterations",
                "Fast approximate PiSSA with so many subspace iterations (16 is nearly exact).",
                ge=0,
                le=256,
                group="Initialisation",
                advanced=True,
                automatic="the full decomposition",
            ),
        ]
        | None
    ) = None
    corda_mode: Annotated[
        Literal["ipm", "kpm"],
        option(
            "CorDA mode",
            "ipm learns the task faster; kpm keeps what the model knows (calibrate with text of that knowledge).",
            group="Initialisation",
            advanced=True,
            aliases=("corda_method",),
        ),
    ] = "ipm"
    eva_rho: Annotated[
        float,
        option(
            "EVA rho",
            "How far ranks may move between layers: 1 not at all, 2 up to twice the rank.",
            ge=1,
            le=16,
            group="Initialisation",
            advanced=True,
            aliases=("rho",),
        ),
    ] = 2.0
    calibration: Annotated[
        str,
        option(
            "Calibration text",
            "A text file for CorDA and EVA.",
            group="Initialisation",
            advanced=True,
            automatic="the training data",
        ),
    ] = ""
    calibration_samples: Annotated[
        int,
        option(
            "Calibration samples",
            "How many pieces of the calibration text are looked at.",
            ge=1,
            le=65536,
            group="Initialisation",
            advanced=True,
        ),
    ] = 64
    low_memory_init: Annotated[
        bool,
        option(
            "EVA: make weights late",
            "Create the adapter without memory and fill it from EVA.",
            group="Initialisation",
            advanced=True,
            aliases=("low_cpu_mem_usage",),
        ),
    ] = False
    loftq_bits: Annotated[
        Literal["4", "8"],
        option(
            "LoftQ bits", "Bits of the quantization that LoftQ prepares for.", group="Initialisation", advanced=True
        ),
    ] = "4"
    loftq_iterations: Annotated[
        int,
        option(
            "LoftQ iterations",
            "Alternating steps between base and adapter. 1: the adapter fits the plain nf4 base.",
            ge=1,
            le=64,
            group="Initialisation",
            advanced=True,
        ),
    ] = 1
    bias: Annotated[
        Literal["none", "all", "lora_only"],
        option(
            "Train biases",
            "Biases are part of the adapter then; switching it off no longer gives the base.",
            group="Variant",
            advanced=True,
        ),
    ] = "none"
    lora_bias: Annotated[
        bool, option("Bias of B", "Give the adapter's B a bias of its own.", group="Variant", advanced=True)
    ] = False
    layer_replication: Annotated[
        str,
        option(
            "Layer replication",
            "Build a deeper model from the same weights: 0-4, 2-5 stacks layers 0 to 3, then 2 to 4 (the end is not included). Such adapters go alone.",
            group="Variant",
            advanced=True,
        ),
    ] = ""
    trainable_tokens: Annotated[
        str,
        option(
            "Trained tokens",
            "Tokens whose embeddings are trained: numbers or the tokens themselves, separated by blanks.",
            group="Tokens",
            advanced=True,
            aliases=("trainable_token_indices",),
        ),
    ] = ""
    new_tokens: Annotated[
        str,
        option(
            "New special tokens",
            "Added to the tokenizer and trained, separated by blanks: <|think|> <|/think|>",
            group="Tokens",
            advanced=True,
        ),
    ] = ""


class TrainConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """[train]: how it is trained."""

    objective: Annotated[
        Objective,
        option(
            "Learn by",
            "sft: imitate the answers. dpo, orpo: prefer the chosen answer over the rejected one (preference data).",
            group="Steps",
        ),
    ] = "sft"
    epochs: Annotated[
        float, option("Epochs", "How often the data is gone through.", ge=0.001, le=10000, group="Steps")
    ] = 3.0
    max_steps: (
        Annotated[
            int,
            option(
                "Most steps", "Ends the run after so many steps.", ge=1, group="Steps", automatic="as the epochs say"
            ),
        ]
        | None
    ) = None
    batch_size: Annotated[
        int,
        option(
            "Batch size",
            "Sequences (packed: packs of the maximal length) computed at once. Halved by itself when memory runs out.",
            ge=1,
            le=4096,
            group="Steps",
            aliases=("per_device_train_batch_size",),
        ),
    ] = 2
    gradient_accumulation: Annotated[
        int,
        option(
            "Gradient accumulation",
            "Batches to a step. A step sees batch size × this many sequences.",
            ge=1,
            le=65536,
            group="Steps",
            aliases=("gradient_accumulation_steps",),
        ),
    ] = 8
    learning_rate: Annotated[
        float,
        option("Learning rate", "2e-4 is usual for LoRA; 1e-5 for DPO.", ge=0, le=10, group="Steps", aliases=("lr",)),
    ] = 2e-4
    max_length: Annotated[
        int,
        option(
            "Maximal length",
            "Longer examples are cut, or left out as the data section says.",
            ge=8,
            le=1048576,
            unit="tokens",
            group="Steps",
            aliases=("max_seq_length", "cutoff_len"),
        ),
    ] = 1024
    packing: Annotated[
        Literal["fit", "sequential", "off"],
        option(
            "Packing",
            "Several short examples share one sequence, kept apart: two to three times as fast on mixed lengths. fit: as tightly as possible; sequential: in order. RUN.toml takes true and false too.",
            group="Steps",
        ),
    ] = "fit"
    seed: Annotated[
        int,
        option("Seed", "The same seed gives the same run, on the same machine.", ge=0, le=4294967295, group="Steps"),
    ] = 0
    optimizer: Annotated[
        Optimizer,
        option(
            "Optimizer",
            "adamw; 8-bit ones save memory; paged ones move their state off a full graphics card; lora_plus trains B faster; lora_fa trains B alone and needs the least memory.",
            group="Optimizer",
            aliases=("optim",),
        ),
    ] = "adamw"
    lora_plus_ratio: Annotated[
        float,
        option(
            "LoRA+ ratio",
            "How many times faster B learns than A.",
            ge=1,
            le=1000,
            group="Optimizer",
            advanced=True,
            aliases=("loraplus_lr_ratio",),
        ),
    ] = 16.0
    scheduler: Annotated[
        Scheduler, option("Schedule", "How the learning rate falls.", group="Optimizer", aliases=("lr_scheduler_type",))
    ] = "cosine"
    warmup: Annotated[
        float,
        option(
            "Warm-up",
            "Steps in which the learning rate rises: a share of the run below 1, else a number of steps.",
            ge=0,
            group="Optimizer",
            aliases=("warmup_ratio", "warmup_steps"),
        ),
    ] = 0.03
    min_learning_rate: Annotated[
        float,
        option(
            "Lowest learning rate",
            "Where cosine_with_min_lr, polynomial and warmup_stable_decay end, as a share of the learning rate.",
            ge=0,
            le=1,
            group="Optimizer",
            advanced=True,
        ),
    ] = 0.1
    weight_decay: Annotated[
        float, option("Weight decay", "Pulls weights towards zero.", ge=0, le=10, group="Optimizer", advanced=True)
    ] = 0.0
    beta1: Annotated[
        float, option("Adam beta 1", "Memory of the gradient.", ge=0, le=0.9999, group="Optimizer", advanced=True)
    ] = 0.9
    beta2: Annotated[
        float, option("Adam beta 2", "Memory of its square.", ge=0, le=0.99999, group="Optimizer", advanced=True)
    ] = 0.999
    epsilon: Annotated[
        float, option("Adam epsilon", "Keeps the division finite.", ge=1e-12, le=0.1, group="Optimizer", advanced=True)
    ] = 1e-8
    max_grad_norm: Annotated[
        float,
        option(
            "Gradient clipping", "Longest gradient let through; 0 for no limit.", ge=0, group="Optimizer", advanced=True
        ),
    ] = 1.0
    precision: Annotated[
        Literal["auto", "bf16", "fp16", "fp32"],
        option(
            "Precision",
            "Number format of base and arithmetic; the adapter itself stays 32-bit. Automatic: bf16 on a graphics card that has it, else fp32.",
            group="Memory",
        ),
    ] = "auto"
    gradient_checkpointing: Annotated[
        bool,
        option(
            "Gradient checkpointing",
            "Compute activations twice instead of keeping them: much less memory, about a third slower.",
            group="Memory",
        ),
    ] = False
    chunked_loss: Annotated[
        bool,
        option(
            "Loss in pieces",
            "Compute the loss in pieces of the sequence: saves much memory with large vocabularies.",
            group="Memory",
            advanced=True,
        ),
    ] = True
    beta: Annotated[
        float,
        option(
            "Preference strength",
            "DPO: how close to stay to the base. ORPO: weight of the odds ratio.",
            ge=0,
            le=100,
            group="Preference",
        ),
    ] = 0.1
    label_smoothing: Annotated[
        float,
        option(
            "Label smoothing",
            "DPO: share of pairs assumed to be labelled the wrong way round.",
            ge=0,
            le=0.49,
            group="Preference",
            advanced=True,
        ),
    ] = 0.0
    evaluate_every: (
        Annotated[
            int,
            option(
                "Measure held-out loss every",
                "Steps between measurements.",
                ge=1,
                unit="steps",
                group="Watching",
                automatic="ten times in the run, and at its end",
            ),
        ]
        | None
    ) = None
    early_stopping: (
        Annotated[
            int,
            option(
                "Stop early after",
                "End the run when the held-out loss has not fallen in so many measurements.",
                ge=1,
                unit="measurements",
                group="Watching",
                automatic="never",
            ),
        ]
        | None
    ) = None
    keep_best: Annotated[
        bool,
        option(
            "Keep the best", "The adapter is the one with the lowest held-out loss, not the last.", group="Watching"
        ),
    ] = False
    checkpoint_every: (
        Annotated[
            int,
            option(
                "Checkpoint every",
                "Steps between checkpoints, from which a run resumes.",
                ge=1,
                unit="steps",
                group="Watching",
                automatic="with each held-out measurement",
            ),
        ]
        | None
    ) = None
    keep_checkpoints: Annotated[
        int,
        option(
            "Checkpoints kept",
            "Older ones are removed after a new one is complete.",
            ge=1,
            le=1000,
            group="Watching",
            advanced=True,
        ),
    ] = 2
    samples: Annotated[
        str,
        option(
            "Sample questions",
            "One a line; answered at each measurement, so that one can read what it learns.",
            group="Watching",
            multiline=True,
        ),
    ] = ""
    sample_tokens: Annotated[
        int,
        option(
            "Length of sample answers",
            "Most tokens of a sample answer.",
            ge=1,
            le=4096,
            unit="tokens",
            group="Watching",
            advanced=True,
        ),
    ] = 64


class OutputConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """[output]: where the adapter goes."""

    dir: Annotated[
        str,
        option(
            "Adapter folder",
            "Where the adapter appears when the run is complete. Relative: in the LoRA library; in a RUN.toml, beside that file.",
        ),
    ] = ""
    overwrite: Annotated[
        bool,
        option(
            "Replace",
            "Replace an adapter that lies there already; the old one goes only when the new one is complete.",
            advanced=True,
        ),
    ] = False


class RunConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One training run."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    method: MethodConfig = MethodConfig()
    train: TrainConfig = TrainConfig()
    output: OutputConfig = OutputConfig()

    def data_config(self) -> DataConfig:
        """The data section with what [train] says about it: maximal length, packing, seed."""
        train = self.train
        return msgspec.structs.replace(self.data, max_length=train.max_length, packing=train.packing, seed=train.seed)


IN_TRAIN: frozenset[str] = frozenset({"max_length", "packing", "seed"})
"""Fields of DataConfig that stand under [train] in a RUN.toml."""


class TrainParameters(msgspec.Struct, frozen=True, kw_only=True):
    """What `tasks/train.py` takes.

    Attributes:
        config: the run, every path absolute. model: the library's entry of its base.
        resume: `no` refuses to touch an unfinished run in the same place; `yes` needs one; `if_there` goes on where there is one
            (what a retried job wants).
        run_file: RUN.toml as text, kept beside the adapter.
    """

    config: RunConfig
    model: ModelEntry
    resume: Literal["no", "yes", "if_there"] = "no"
    run_file: str = ""


class TrainAdjustment(msgspec.Struct, frozen=True, kw_only=True):
    """What can be changed while a run is at work (Adjust).

    Attributes:
        action: `pause` holds it after the step at hand; `resume` goes on; `stop` ends it and keeps the adapter as it is;
            `checkpoint` writes one now; `sample` answers the sample questions now.
    """

    action: Literal["pause", "resume", "stop", "checkpoint", "sample"]


class TrainNews(msgspec.Struct, frozen=True, kw_only=True):
    """What a run tells beside progress and metrics.

    Attributes:
        kind: `note` (text), `estimate` (text, values), `samples` (step, samples), `checkpoint` (step, text: folder), `state` (text:
            running, paused, stopping), `split` (text: the micro-batch was halved), `data` (values: examples, held_out, tokens, …).
    """

    kind: Literal["note", "estimate", "samples", "checkpoint", "state", "split", "data"]
    step: int = 0
    text: str = ""
    values: dict[str, float] = {}
    samples: tuple[tuple[str, str], ...] = ()


class TrainResult(msgspec.Struct, frozen=True, kw_only=True):
    """How a run ended.

    Attributes:
        adapter: the folder. losses: training loss by step, as metrics had it. held_out_loss: of the adapter as kept; None without held-out data.
        base_held_out_loss: before the first step. ended: complete, stopped (by the user), early (no more improvement), nan (the last good
            checkpoint was kept).
    """

    adapter: str
    ended: Literal["complete", "stopped", "early", "nan"]
    steps: int
    losses: tuple[float, ...]
    held_out_loss: float | None = None
    base_held_out_loss: float | None = None
    held_out_losses: tuple[tuple[int, float], ...] = ()
    tokens: int = 0
    seconds: float = 0.0
    notes: tuple[str, ...] = ()
