"""What goes wrong in a step: tensors that learn nothing, memory that runs out. Imports torch."""

from __future__ import annotations

import torch

from app.core.errors import ErrorKind, WeftError
from app.engine.failures import mentions_out_of_memory
from app.training.distributed_torch import whole_tensor

_SMALLER = "Take a shorter max_length, gradient_checkpointing = true, a smaller rank, or quantization = nf4."


def check_gradients(trained: dict[str, torch.nn.Parameter]) -> list[str]:
    """Every trained tensor has a finite gradient, and A or B of each module one that is not zero.

    Returns:
        Names of tensors in experts that have none: a router need not choose each of them.

    Raises:
        WeftError: INTERNAL, naming the first one without; such a run would learn nothing there and say nothing.
    """
    without: list[str] = []
    alive: dict[str, bool] = {}
    for name, parameter in trained.items():
        gradient = parameter.grad
        if gradient is None:
            without.append(name)
            continue
        module = name.rpartition(".lora_")[0] or name
        alive[module] = alive.get(module, False) or bool(torch.count_nonzero(whole_tensor(gradient)))
    without += [
        name for name, some in alive.items() if not some and ".lora_" in next(n for n in trained if n.startswith(name))
    ]
    bad = [name for name in without if "expert" not in name]
    if bad:
        raise WeftError(
            ErrorKind.UNSUPPORTED,
            f"{bad[0]} gets no gradient{f', nor do {len(bad) - 1} more' if len(bad) > 1 else ''}: training would leave it as it is.",
            "Choose modules that take part in answering text, or another quantization; `targets` and `exclude` say which.",
        )
    return without


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, of the machine or of a card."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and mentions_out_of_memory(str(error))


def memory_error(error: BaseException | None) -> WeftError:
    """What is said where not even one row fits. None: it was another process that had no memory."""
    if error is None:
        return WeftError(
            ErrorKind.OUT_OF_MEMORY,
            "Not even one sequence at once fits into the memory of another process.",
            _SMALLER,
        )
    return WeftError(
        ErrorKind.OUT_OF_MEMORY,
        f"Not even one sequence at once fits into memory. ({' '.join(str(error).split())[:160]})",
        _SMALLER,
    )
