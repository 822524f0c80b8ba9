"""What cannot be made is refused: on the command line before anything is said or installed, and by the job itself."""

from __future__ import annotations

import math
import os
from pathlib import Path

from app.core.errors import ErrorKind, WeftError
from app.core.export_plan import OWN, ExportPlan, gguf_type


def check_export(plan: ExportPlan) -> None:
    """Refuse what cannot be an export, before anything is written.

    Raises:
        WeftError: BAD_INPUT, NOT_FOUND.
    """
    kind, model, target = gguf_type(plan.type), Path(plan.model), Path(plan.target)
    if not model.exists():
        raise WeftError(ErrorKind.NOT_FOUND, f"There is no model {model}.", "Check the path.")
    if target.suffix.lower() != ".gguf":
        raise WeftError(
            ErrorKind.BAD_INPUT, f"{target.name} does not end in .gguf.", "Name a file such as my-model.gguf."
        )
    if os.path.lexists(target):
        raise WeftError(ErrorKind.BAD_INPUT, f"{target} exists already.", "Choose another name, or move it away first.")
    if kind is OWN and (model.is_dir() or not any(a.weight for a in plan.stack.adapters)):
        raise WeftError(
            ErrorKind.BAD_INPUT,
            "The type base is for GGUF models with adapters: tensors keep the types that they have there.",
            "Choose a type such as q4_k_m.",
        )
    if kind.imatrix and not plan.imatrix:
        raise needs_imatrix(plan.type)
    if plan.imatrix and not Path(plan.imatrix).is_file():
        raise WeftError(ErrorKind.NOT_FOUND, f"There is no text {plan.imatrix}.", "Check the path.")
    if plan.imatrix and kind.direct:
        raise WeftError(ErrorKind.BAD_INPUT, f"The type {plan.type} takes no importance matrix.", "Leave it out.")
    for adapter in plan.stack.adapters:
        if not math.isfinite(adapter.weight):
            raise WeftError(
                ErrorKind.BAD_INPUT, f"The weight of {adapter.name or adapter.path} is no number.", "Set a number."
            )


def needs_imatrix(kind: str) -> WeftError:
    """The refusal of a type that llama.cpp makes only with an importance matrix."""
    return WeftError(
        ErrorKind.BAD_INPUT,
        f"The type {kind} needs an importance matrix.",
        "Name a text with --imatrix (some hundred kilobytes like what the model will read), or choose q4_k_m.",
    )


def check_target(target: Path) -> None:
    """Refuse a folder to make that holds something.

    Raises:
        WeftError: BAD_INPUT; PERMISSION where that cannot be seen.
    """
    try:
        taken = target.exists() and (not target.is_dir() or any(target.iterdir()))
    except OSError as error:
        raise WeftError(
            ErrorKind.PERMISSION,
            f"{target} cannot be written: {error.strerror or error}.",
            "Choose a folder that you may write to.",
        ) from error
    if taken:
        raise WeftError(ErrorKind.BAD_INPUT, f"{target} exists already.", "Choose another name, or remove it first.")
