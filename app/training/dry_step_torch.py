"""One step's arithmetic on the longest batch before the first step, without effect. Imports torch."""

from __future__ import annotations

import time

import torch

from app.training.checkpoint_torch import random_states, set_random_states
from app.training.distributed_torch import anywhere
from app.training.optimizer_state import state_size
from app.training.trainer_checks_torch import check_gradients, is_out_of_memory, memory_error
from app.training.trainer_torch import Batch, Trainer


def try_out(trainer: Trainer, batch: Batch) -> tuple[list[str], float]:
    """Memory suffices, with half as many rows at once where it does not, and every trained tensor gets a gradient.

    Processes that each hold the whole model try it together, and take half as many rows together: none of them waits in the midst of it
    for one that has no memory. Those that share a model out do wait, so that there memory which runs out ends the run.

    Returns:
        Names of experts that got no gradient (the router did not choose them here); tokens a second of one process.

    Raises:
        WeftError: OUT_OF_MEMORY when not even one row fits; UNSUPPORTED for a trained tensor without gradient.
    """
    states = random_states()
    trainer.model.train()
    together = None if trainer.sharded else trainer.accelerator
    room: torch.Tensor | None = None
    try:
        while True:
            failed: BaseException | None = None
            began, tokens = time.monotonic(), 0
            try:
                room = room_for_state(trainer) if room is None else room
                _, tokens, _, _ = trainer.backward([batch], dry=True)
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                failed = error.with_traceback(None)  # its frames hold the tensors of the attempt
            if not anywhere(together, failed is not None):
                return check_gradients(trainer.trained), tokens / max(1e-9, time.monotonic() - began)
            if not trainer.halve(batch, together=not trainer.sharded):
                raise memory_error(failed) from failed
    finally:
        trainer.optimizer.zero_grad(set_to_none=True)
        set_random_states(states)


def room_for_state(trainer: Trainer) -> torch.Tensor:
    """What the optimizer will take from its first step on, so that this one does without."""
    name, parameters = trainer.train_config.optimizer, list(trainer.trained.values())
    if trainer.optimizer.state or not parameters:
        return torch.empty(0)
    mine = [getattr(each, "to_local", lambda each=each: each)() for each in parameters]  # FSDP: a share of each
    sizes = [state_size(name, [each.numel() for each in mine if each.element_size() == n], n) for n in (2, 4)]
    size = sum(each.rest if name.startswith("paged") else each.total for each in sizes)
    return torch.empty(size, dtype=torch.uint8, device=mine[0].device)
