"""The loop: steps of accumulated batches, measured and checkpointed, the same bits after a resume. Imports torch.

A step's loss is the sum of its token losses over the number of trained tokens of the whole step, so that packing, batch size and
accumulation do not change what is learnt. Everything that a step does follows from the plan (a pure function of seed and epoch), the
trained tensors, the optimizer's state and the random states: these are what a checkpoint holds.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch

from app.core.errors import ErrorKind, WeftError
from app.engine.reporting import Report
from app.training import schedule
from app.training.checkpoint_torch import Counters, RunFolder, random_states, set_random_states
from app.training.distributed_torch import is_sharded, load_optimizer, put, whole_state, whole_tensor
from app.training.optimizers_torch import set_learning_rates
from app.training.run_config import TrainConfig
from app.training.shares import Batch, Group, deal, share, split_rows
from app.training.trainer_checks_torch import is_out_of_memory, memory_error
from app.training.trainer_control import Control


class Objective(Protocol):
    """What is minimised, on which data."""

    def weight(self, batch: Batch) -> float:
        """What the batch's loss sum is divided by, added over a step: trained tokens, or pairs."""
        ...

    def loss(self, model: Any, batch: Batch) -> tuple[torch.Tensor, int, dict[str, float]]:
        """The loss sum with its graph, the tokens computed, and sums of further numbers worth showing."""
        ...


class Plan(Protocol):
    """Which batches make up which step."""

    total: int

    def groups(self, start: int) -> Iterator[tuple[float, Group]]:
        """(epoch so far, batches) of each step from `start` on."""
        ...


class Ended(Exception):
    """The run ends before its last step."""

    def __init__(self, how: str) -> None:
        super().__init__(how)
        self.how = how


class Trainer:
    """One run's loop over a model that is ready to train.

    Args:
        model: with an adapter, on its device. held_out: its loss measure, or None. samples: answers the sample questions.
        folder: of the unfinished run. autocast: a context factory for the forward passes.
        accelerator: accelerate's, in a run of several processes.
    """

    def __init__(
        self,
        train: TrainConfig,
        model: Any,
        optimizer: torch.optim.Optimizer,
        objective: Objective,
        plan: Plan,
        folder: RunFolder | None,
        control: Control,
        report: Report,
        *,
        held_out: Callable[[Any], float] | None = None,
        samples: Callable[[], list[tuple[str, str]]] | None = None,
        autocast: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
        scaler: Any = None,
        accelerator: Any = None,
        counters: Counters | None = None,
    ) -> None:
        self.train_config = train
        self.model, self.optimizer, self.objective, self.plan = model, optimizer, objective, plan
        self.folder, self.control, self.report = folder, control, report
        self.held_out, self.samples, self.autocast, self.scaler = held_out, samples, autocast, scaler
        self.accelerator = accelerator
        self.counters = counters or Counters()
        self.plain = accelerator.unwrap_model(model) if accelerator is not None else model
        self.trained = {name: p for name, p in self.plain.named_parameters() if p.requires_grad}
        self.main = accelerator is None or accelerator.is_main_process
        self.sharded = is_sharded(accelerator)  # tensors are whole only while all processes gather them
        total = max(1, plan.total)
        self.measure_every = train.evaluate_every or max(1, total // 10)
        self.checkpoint_every = train.checkpoint_every or self.measure_every
        self._before: Any = None  # random states before the step at work
        self._saved = -1

    def halve(self, batch: Batch, *, together: bool = False) -> bool:
        """Compute half as many rows at once from now on; in several processes only where all of them do it `together`."""
        self.optimizer.zero_grad(set_to_none=True)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if self.counters.split * 2 > max(1, len(batch)) or (self.accelerator is not None and not together):
            return False
        self.counters.split *= 2
        rows = math.ceil(self.train_config.batch_size / self.counters.split)
        text = (
            f"Memory ran out: batches of {rows} instead of {self.train_config.batch_size} are computed at once, and "
            f"{self.train_config.gradient_accumulation * self.counters.split} instead of "
            f"{self.train_config.gradient_accumulation} of them added up to a step. What is learnt stays the same."
        )
        self.control.tell("split", step=self.counters.step, text=text)
        self.report.log("warning", text)
        return True

    # The run

    def run(self) -> str:
        """Take the steps that are left. Returns how it ended: complete, stopped, early, nan.

        Raises:
            WeftError: CANCELLED (a checkpoint was written); OUT_OF_MEMORY.
        """
        if self.counters.step == 0 and not self.counters.held_out:
            self._measure()
        self.model.train()
        self._mark()
        try:
            for epoch, group in self.plan.groups(self.counters.step):
                self._between()
                self._step(epoch, group)
                self._after_step()
        except Ended as ended:
            if ended.how != "stopped":
                return ended.how
            how = "stopped"
        else:
            how = "complete"
        if not self.counters.held_out or self.counters.held_out[-1][0] != self.counters.step:
            self._measure()
        return how

    def _between(self) -> None:
        """Obey: between batches, with the state of the last complete step at hand."""
        if self.control.paused:
            self.checkpoint()
            began = time.monotonic()
            self.control.wait()
            self._clock += time.monotonic() - began
        if self.control.cancelled:
            self.checkpoint()
            raise WeftError(ErrorKind.CANCELLED, "Cancelled. The run can be resumed from its last step.")
        if self.control.stopping:
            self._rewind()
            raise Ended("stopped")
        if self.control.take("checkpoint"):
            self.checkpoint()
        if self.control.take("sample"):
            self._sample()

    def _step(self, epoch: float, group: Group) -> None:
        states = self._before = random_states()
        while True:
            try:
                loss, tokens, weight, further = self.backward(group)
                break
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                if not self.halve(max(group, key=len)):
                    self._rewind()
                    if not self.sharded:  # the other processes are not here to gather it
                        self.checkpoint()
                    raise memory_error(error) from error
                set_random_states(states)
        factor = schedule.factor(self.train_config, self.counters.step, self.plan.total)
        rate = set_learning_rates(self.optimizer, factor)
        norm = self._clip()
        if not math.isfinite(loss) or (not math.isfinite(norm) and self.scaler is None):
            self.optimizer.zero_grad(set_to_none=True)
            self._rewind()
            self.report.log(
                "warning", f"Step {self.counters.step + 1}: the loss is no longer a number. The run ends here."
            )
            raise Ended("nan")
        if self.scaler is not None:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._count(epoch, loss, rate, norm, tokens, weight, further)

    def backward(self, group: Group, *, dry: bool = False) -> tuple[float, int, float, dict[str, float]]:
        """Forward and backward over a step's batches. Returns mean loss, tokens computed, divisor, further sums.

        Args:
            dry: it does not count, and each process does it alone, so that none waits for one that has no memory.
        """
        weight = sum(self.objective.weight(batch) for batch in group) or 1.0
        parts = [part for batch in group for part in split_rows(batch, self.counters.split)]
        if self.accelerator is not None and not dry:
            parts = deal(parts, self.accelerator.num_processes, self.objective.weight)
        mine, world = share(parts, None if dry else self.accelerator)
        total, tokens, further = 0.0, 0, {}
        for index, (part, counts) in enumerate(mine):
            if index and not dry:
                self._between_parts()
            with self._synchronised(index == len(mine) - 1 and not (dry and not self.sharded)):
                with self.autocast():
                    loss, count, numbers = self.objective.loss(self.model, part)
                loss = loss * (counts * world / weight)
                backward = self.scaler.scale(loss) if self.scaler is not None else loss
                (self.accelerator.backward if self.accelerator is not None else torch.Tensor.backward)(backward)
            if counts:
                total += float(loss.detach()) / world
                tokens += count
            for name, value in numbers.items():  # the same names in all processes
                further[name] = further.get(name, 0.0) + (value if counts else 0.0)
        if self.accelerator is not None and not dry:
            sums = torch.tensor([total, float(tokens), *further.values()], dtype=torch.float64)
            total, tokens_all, *rest = self.accelerator.reduce(sums.to(self.accelerator.device), "sum").tolist()
            tokens, further = int(tokens_all), dict(zip(further, rest, strict=True))
        return total, tokens, weight, further

    def _between_parts(self) -> None:
        """Cancel and stop do not wait for a long step: what it has added up so far is dropped."""
        if self.control.cancelled or self.control.stopping:
            self.optimizer.zero_grad(set_to_none=True)
            self._rewind()
            self._between()

    @contextlib.contextmanager
    def _synchronised(self, last: bool) -> Iterator[None]:
        if self.accelerator is None or last:
            yield
        else:
            with self.accelerator.no_sync(self.model):
                yield

    def _clip(self) -> float:
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        limit = self.train_config.max_grad_norm or math.inf
        if self.accelerator is not None:
            return float(whole_tensor(self.accelerator.clip_grad_norm_(self.model.parameters(), limit)))
        return float(torch.nn.utils.clip_grad_norm_(self.trained.values(), limit))

    def _count(
        self, epoch: float, loss: float, rate: float, norm: float, tokens: int, weight: float, further: dict[str, float]
    ) -> None:
        now = time.monotonic()
        taken = max(1e-9, now - self._clock)
        self._clock = now
        counters = self.counters
        counters.step += 1
        counters.tokens += tokens
        counters.trained_tokens += int(weight)
        counters.seconds += taken
        counters.losses.append(loss)
        if self.scaler is not None:
            counters.scaler = self.scaler.state_dict()
        if not self.main:
            return
        self._recent.append((taken, tokens))
        del self._recent[:-20]
        seconds = sum(t for t, _ in self._recent)
        self.report.metric(
            counters.step,
            {
                "loss": loss,
                "learning_rate": rate,
                "grad_norm": norm,
                "tokens_per_second": sum(n for _, n in self._recent) / seconds,
                "tokens": counters.trained_tokens,
                "epoch": epoch,
                "seconds_left": (self.plan.total - counters.step) * seconds / len(self._recent),
                **{name: value / weight for name, value in further.items()},
            },
        )
        self.report.progress("Training", counters.step, self.plan.total, "steps")

    def _after_step(self) -> None:
        step = self.counters.step
        ended = None
        if step % self.measure_every == 0 or step == self.plan.total:
            ended = self._measure()
        if step % self.checkpoint_every == 0 and step < self.plan.total:
            self.checkpoint()
        if ended:
            raise Ended(ended)

    def _measure(self) -> str | None:
        """Held-out loss and sample answers. Returns "early" when the run is to end, "nan" when it diverged."""
        counters = self.counters
        began = time.monotonic()
        ended = None
        if self.held_out is not None:
            self.report.progress("Measuring", counters.step, self.plan.total, "steps")
            loss = self.held_out(self.model)
            if not math.isfinite(loss):
                return "nan"
            counters.held_out.append((counters.step, loss))
            if self.main:
                self.report.metric(counters.step, {"held_out_loss": loss})
            if counters.step and (counters.best is None or loss < counters.best):
                counters.best, counters.best_step, counters.without_progress = loss, counters.step, 0
                self._keep_best()
            elif counters.step:
                counters.without_progress += 1
                patience = self.train_config.early_stopping
                ended = "early" if patience and counters.without_progress >= patience else None
        self._sample()
        self.model.train()
        self._clock += time.monotonic() - began
        return ended

    def _keep_best(self) -> None:
        wanted = self.train_config.keep_best or self.train_config.early_stopping
        if wanted and (self.folder is not None or self.sharded):
            best = self.state()
            if self.folder is not None:
                self.folder.save_best(best)

    def _sample(self) -> None:
        if self.samples is not None and (self.main or self.sharded):
            answers = self.samples()
            self.model.train()
            if answers and self.main:
                self.control.tell("samples", step=self.counters.step, samples=answers)

    # State

    def _mark(self) -> None:
        self._clock = time.monotonic()
        self._recent: list[tuple[float, int]] = []
        self._before = random_states()

    def _rewind(self) -> None:
        """Random states as they were before the step that is not to count."""
        if self._before is not None:
            set_random_states(self._before)

    def state(self) -> dict[str, torch.Tensor]:
        """The trained tensors, whole, on the processor (under FSDP all processes have to ask)."""
        return {name: whole_tensor(p).cpu().contiguous().clone() for name, p in self.trained.items()}

    def checkpoint(self) -> None:
        """Write a checkpoint of the last complete step."""
        counters = self.counters
        if (self.folder is None and not self.sharded) or counters.step in (self._saved, 0):
            return
        began = time.monotonic()
        trained, optimizer, place = self.state(), self.optimizer.state_dict(), None
        if self.sharded:
            optimizer = whole_state(optimizer)
            self._saved = counters.step  # in all processes alike, also where the disk is full
        if self.folder is not None:
            place = self.folder.save(counters, trained, optimizer, random_states(), self.train_config.keep_checkpoints)
        self._clock += time.monotonic() - began
        if place is not None:
            self._saved = counters.step
            self.control.tell("checkpoint", step=counters.step, text=str(place))

    def restore(self, trained: dict[str, torch.Tensor], optimizer: Any = None, random: Any = None) -> None:
        """Put a checkpoint's state back."""
        for name, parameter in self.trained.items():
            put(parameter, trained[name])
        if optimizer is not None:
            load_optimizer(self.optimizer, optimizer)
        if self.scaler is not None and self.counters.scaler:
            self.scaler.load_state_dict(self.counters.scaler)
        if random is not None:
            set_random_states(random)
        self._saved = self.counters.step

    _clock: float = 0.0
