"""Train an adapter. Needs the core environment."""

from __future__ import annotations

import os

from app.engine.report import HostReport
from app.training.run_config import TrainParameters, TrainResult

Parameters = TrainParameters


def run(parameters: TrainParameters, report: HostReport) -> TrainResult:
    """See `app.training.run_torch.run`."""
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", DO_NOT_TRACK="1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    report.progress("Starting PyTorch")
    from app.training import run_torch

    return run_torch.run(parameters, report)
