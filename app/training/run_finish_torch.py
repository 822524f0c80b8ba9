"""The end of a run: which state is kept, and the adapter's folder with its card. Imports torch: only in an engine's child."""

from __future__ import annotations

import datetime
import importlib.metadata
import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch

from app.core.adapter_note import NAME as NOTE
from app.core.adapter_note import AdapterNote, note_bytes
from app.core.disk import sync_tree
from app.core.errors import ErrorKind, WeftError
from app.engine.reporting import Report
from app.training import card, methods_save_torch
from app.training.checkpoint_torch import RunFolder, replace_folder
from app.training.distributed_torch import shared, wait_long
from app.training.run_config import TrainParameters, TrainResult
from app.training.run_data_torch import RunData, data_numbers
from app.training.run_model_torch import Base
from app.training.trainer_torch import Trainer

LIBRARIES = ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "tokenizers", "safetensors")


class BaseHashes:
    """The base's hashes, made beside the training."""

    def __init__(self, files: list[Path]) -> None:
        self._found: tuple[card.FileHash, ...] = ()
        self._stop = False
        self._thread = threading.Thread(
            target=self._run, args=([path.resolve() for path in files],), name="hashes", daemon=True
        )
        self._thread.start()

    def _run(self, files: list[Path]) -> None:
        try:
            self._found = card.hash_files(files, lambda *_: None, lambda: self._stop)
        except OSError:
            self._found = ()  # the file went away meanwhile: the card then names no hash

    def wait(self, report: Report) -> tuple[card.FileHash, ...]:
        """All of them; until then it is said what is waited for."""
        while self._thread.is_alive():
            report.progress("Saving: hashing the base")
            self._thread.join(0.5)
        return self._found


@dataclass(frozen=True)
class Made:
    """What a run was made of.

    Attributes:
        folder: of the unfinished run; None in all processes but the first. first: A₀ and B₀.
    """

    parameters: TrainParameters
    accelerator: Any
    folder: RunFolder | None
    tokenizer: Any
    data: RunData
    base: Base
    model: Any
    first: dict[str, torch.Tensor]
    hashes: BaseHashes
    notes: list[str]


def finish(made: Made, trainer: Trainer, ended: str, note: Callable[[str], None], report: Report) -> TrainResult:
    """Choose the state that is kept, and write the adapter's folder.

    Args:
        ended: as `Trainer.run` tells it. note: says a sentence and adds it to `made.notes`.

    Raises:
        WeftError: BAD_INPUT where the loss was no longer a number before there was a checkpoint.
    """
    counters = trainer.counters
    held = _kept_state(made, trainer, ended, note)
    before = next((loss for step, loss in counters.held_out if step == 0), None)
    result = TrainResult(
        adapter=made.parameters.config.output.dir,
        ended=ended,  # type: ignore[arg-type]
        steps=counters.step,
        losses=tuple(counters.losses),
        held_out_loss=held,
        base_held_out_loss=before,
        held_out_losses=tuple(counters.held_out),
        tokens=counters.trained_tokens,
        seconds=counters.seconds,
        notes=tuple(made.notes),
    )
    trained = trainer.state() if trainer.sharded else None
    wait_long(made.accelerator, True)  # for the first one's hashes
    if made.folder is not None:
        report.progress("Saving")
        _save(made, trainer, result, trained, report)
        made.folder.remove()
    if made.accelerator is not None:
        made.accelerator.wait_for_everyone()
    return result


def _kept_state(made: Made, trainer: Trainer, ended: str, note: Callable[[str], None]) -> float | None:
    """Go back to the last good checkpoint, or the best state, where the run asks for it. Returns its held-out loss."""
    counters, config = trainer.counters, made.parameters.config
    held = counters.held_out[-1][1] if counters.held_out and counters.held_out[-1][0] == counters.step else None
    if ended == "nan":
        found = shared(made.accelerator, made.folder.load() if made.folder is not None else None)
        if found is None:
            raise WeftError(
                ErrorKind.BAD_INPUT,
                f"After step {counters.step} the loss was no longer a number, before a checkpoint was written.",
                "Lower the learning rate, raise warmup, or take precision = fp32 (or bf16 instead of fp16).",
            )
        trainer.restore(found[1])
        held = next((loss for step, loss in reversed(counters.held_out) if step == found[0].step), None)
        note(
            f"The loss was no longer a number after step {counters.step}; the adapter is that of step {found[0].step}."
        )
    wants_best = config.train.keep_best or config.train.early_stopping
    if wants_best and counters.best is not None and counters.best_step != counters.step:
        best = shared(made.accelerator, made.folder.load_best() if made.folder is not None else None)
        if best is not None:
            trainer.restore(best)
            held = counters.best
            note(f"The adapter is that of step {counters.best_step}, whose held-out loss was the lowest.")
    return held


def _save(
    made: Made, trainer: Trainer, result: TrainResult, trained: dict[str, torch.Tensor] | None, report: Report
) -> None:
    """Fill the folder under another name, and give it its own. trained: see `methods_save_torch.adapter_tensors`."""
    config, target = made.parameters.config, Path(made.parameters.config.output.dir)
    staged = target.parent / f".partial-{target.name}"
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    try:
        methods_save_torch.save_adapter(staged, config, made.model, made.first, made.parameters.model.path, trained)
        if config.method.new_tokens:
            made.tokenizer.save_pretrained(staged)
        record = card.RunRecord(
            name=target.name,
            config=config,
            base=made.parameters.model.name,
            base_architecture=made.parameters.model.architecture,
            base_files=made.hashes.wait(report),
            data_files=card.hash_files(made.data.files, lambda *_: None, lambda: False),
            data=data_numbers(made.data),
            ended=result.ended,
            steps=result.steps,
            total_steps=trainer.plan.total,
            losses=result.losses,
            held_out_loss=result.held_out_loss,
            held_out_losses=result.held_out_losses,
            trained_parameters=sum(p.numel() for p in trainer.trained.values()),
            tokens=result.tokens,
            seconds=result.seconds,
            device=made.base.device_words(),
            threads=torch.get_num_threads(),
            finished=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            versions=versions(),
            notes=result.notes,
        )
        (staged / card.RECORD).write_bytes(msgspec.json.format(msgspec.json.encode(record), indent=1))
        note = AdapterNote(run=target.name, title=f"{target.name}, on {card.data_words(record).replace('`', '')}")
        (staged / NOTE).write_bytes(note_bytes(note))
        (staged / "README.md").write_text(card.card(record, made.parameters.model), "utf-8")
        if made.parameters.run_file:
            (staged / "run.toml").write_text(made.parameters.run_file, "utf-8")
        sync_tree(staged)
        replace_folder(staged, target)
    except BaseException:
        shutil.rmtree(staged, ignore_errors=True)
        raise


def versions() -> dict[str, str]:
    """What the run rests on."""
    found: dict[str, str] = {}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
