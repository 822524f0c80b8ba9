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
from app.training.method_config import CONVERTED, NEEDS_CALIBRATION, Init, MethodConfig
from app.training.model_config import ModelConfig, Quantization
from app.training.run_messages import TrainAdjustment, TrainNews, TrainResult
from app.training.train_config import Objective, Optimizer, Scheduler, TrainConfig

__all__ = [
    "CONVERTED",
    "IN_TRAIN",
    "NEEDS_CALIBRATION",
    "DataConfig",
    "Init",
    "MethodConfig",
    "ModelConfig",
    "Objective",
    "Optimizer",
    "OutputConfig",
    "Quantization",
    "RunConfig",
    "Scheduler",
    "TrainAdjustment",
    "TrainConfig",
    "TrainNews",
    "TrainParameters",
    "TrainResult",
]


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
