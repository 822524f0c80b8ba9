"""A training run from RUN.toml to the adapter's folder. Imports torch: only in an engine's child.

Order: check, data, base, packing check, adapter (or what an unfinished run kept of it), a step without effect, the loop, the folder.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import shutil
import threading
from pathlib import Path
from typing import Any

import msgspec
import peft
import torch

from app.core.adapter_note import NAME as NOTE
from app.core.adapter_note import AdapterNote, note_bytes
from app.core.errors import ErrorKind, WeftError
from app.engine.reporting import Report
from app.training import card, methods, methods_save_torch, methods_torch
from app.training.checkpoint_torch import Counters, RunFolder, peek, replace_folder, sync_tree
from app.training.estimate import checkpoint_bytes, estimate, words
from app.training.optimizers_torch import make_optimizer
from app.training.packing_torch import PackingCheck, check_packing
from app.training.run_config import RunConfig, TrainParameters, TrainResult
from app.training.run_data_torch import RunData, calibration, data_numbers, objectives, read_data
from app.training.run_model_torch import Base, load_base
from app.training.run_resume import check_same, claim, fingerprint
from app.training.run_samples_torch import sampler
from app.training.tokenizer import load_tokenizer
from app.training.trainer_control import Control
from app.training.trainer_data_torch import EpochPlan, held_out_measure, in_order
from app.training.trainer_torch import Trainer

LIBRARIES = ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "tokenizers", "safetensors")


def run(parameters: TrainParameters, report: Report, accelerator: Any = None) -> TrainResult:
    """Train. See `Run`.

    Raises:
        WeftError: whatever is wrong with the config, the data, the model or the machine; CANCELLED.
    """
    notes = methods.check(parameters.config)
    target = Path(parameters.config.output.dir)
    main = accelerator is None or accelerator.is_main_process
    if main:
        claim(target, parameters)
    folder = RunFolder(target, lambda text: report.log("warning", text)) if main else None
    try:
        return Run(parameters, report, folder, accelerator, notes).go()
    finally:
        if folder is not None:
            folder.close()


class Run:
    """One run and what it is made of."""

    def __init__(
        self, parameters: TrainParameters, report: Report, folder: RunFolder | None, accelerator: Any, notes: list[str]
    ) -> None:
        self.parameters, self.config = parameters, parameters.config
        self.report, self.folder, self.accelerator = report, folder, accelerator
        self.control = Control(report)
        self.notes: list[str] = []
        self.main = folder is not None
        for text in notes:
            self._note(text)

    def _note(self, text: str) -> None:
        self.notes.append(text)
        if self.main:
            self.control.tell("note", text=text)

    def go(self) -> TrainResult:
        """Everything, in order."""
        config = self.config
        torch.manual_seed(config.train.seed)
        self.report.progress("Reading the data")
        tokenizer = load_tokenizer(Path(self.parameters.model.path))
        token_ids = self._tokens(tokenizer)
        data = read_data(config, tokenizer, self.report)
        self._tell_data(data)
        base = load_base(config, self.parameters.model, self.report, self._local())
        try:
            for text in base.notes:
                self._note(text)
            return self._train(tokenizer, token_ids, data, base)
        finally:
            base.close()

    def _local(self) -> int | None:
        return None if self.accelerator is None else self.accelerator.local_process_index

    def _train(self, tokenizer: Any, token_ids: list[int], data: RunData, base: Base) -> TrainResult:
        config = self.config
        grown = self._make_room(tokenizer, base)
        mark = fingerprint(self.parameters, base.files, data.files)
        before = self._begin(mark)
        if self.accelerator is not None:
            self.accelerator.wait_for_everyone()  # the others have looked before the first one writes
        check = self._packing(base, data)
        pad = pad_token(tokenizer, data, base)
        chunked = config.train.chunked_loss and self.accelerator is None
        train, held = objectives(config, data, pad, check, base.device, chunked=chunked)
        self.report.progress("Preparing")
        model, first = self._adapter(base, token_ids, data, tokenizer, pad, before is not None)
        if config.train.objective == "dpo":
            for part in (train, held):
                if part is not None:
                    part.look_up(
                        model, base.autocast, lambda d, n: self.report.progress("Asking the base", d, n, "pairs")
                    )
        methods_torch.change_base(config, model, first)
        optimizer = make_optimizer(config.train, model)
        plan = EpochPlan(data.lengths(data.train), config.data_config(), config.train, packing=check is not None)
        scaler = torch.amp.GradScaler(base.device.type) if base.dtype is torch.float16 else None
        self._tell_estimate(data, model)
        hashes = _Hashes(base.files)
        wrapped = model
        if self.accelerator is not None:
            wrapped, optimizer = self.accelerator.prepare(model, optimizer)
        trainer = Trainer(
            config.train,
            wrapped,
            optimizer,
            train,
            plan,
            self.folder,
            self.control,
            self.report,
            held_out=held_out_measure(held, in_order(data.lengths(data.held), config.train.batch_size), base.autocast)
            if held is not None
            else None,
            samples=sampler(config, model, tokenizer, data.encoded.template, base.device, base.autocast)
            if self.main
            else None,
            autocast=base.autocast,
            scaler=scaler,
            accelerator=self.accelerator,
            counters=before[0] if before is not None else None,
        )
        if before is not None:
            trainer.restore(*before[1:])
        if self.accelerator is not None:  # each process drops out on its own
            torch.manual_seed(
                config.train.seed + 1_000_003 * (self.accelerator.process_index + 1) + trainer.counters.step
            )
        silent = trainer.try_out(plan.longest())
        if silent:
            self._note(
                f"{len(silent)} expert tensors got no gradient on the longest batch: the router did not choose them there."
            )
        self.control.tell("state", text="running")
        ended = trainer.run()
        return self._finish(trainer, ended, data, base, model, first, tokenizer, hashes, grown)

    # Parts

    def _tokens(self, tokenizer: Any) -> list[int]:
        """Add new tokens; the numbers of all tokens whose embeddings are trained."""
        method = self.config.method
        new = method.new_tokens.split()
        if new:
            tokenizer.add_special_tokens({"additional_special_tokens": new}, replace_extra_special_tokens=False)
        found: list[int] = []
        for word in [*method.trainable_tokens.split(), *new]:
            number = int(word) if word.isdigit() and word not in new else tokenizer.convert_tokens_to_ids(word)
            if (
                number is None
                or not 0 <= number < len(tokenizer)
                or (number == tokenizer.unk_token_id and word != tokenizer.unk_token)
            ):
                raise WeftError(
                    ErrorKind.BAD_INPUT,
                    f"The tokenizer has no token {word!r}.",
                    "Name a token as it stands in tokenizer.json, or its number.",
                )
            found.append(number)
        return sorted(set(found))

    def _make_room(self, tokenizer: Any, base: Base) -> int:
        """Grow the embeddings where new tokens need it. Returns the new size, 0 for no change."""
        have = base.model.get_input_embeddings().weight.shape[0]
        if not self.config.method.new_tokens or len(tokenizer) <= have:
            return 0
        torch.manual_seed(self.config.train.seed)
        base.model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        self._note(
            f"The model's vocabulary grew from {have} to {len(tokenizer)} tokens. Whoever loads the adapter elsewhere calls "
            f"model.resize_token_embeddings({len(tokenizer)}) first and takes the tokenizer from the adapter's folder."
        )
        return len(tokenizer)

    def _begin(self, mark: dict[str, Any]) -> tuple[Counters, dict[str, torch.Tensor], Any, Any] | None:
        """The checkpoint to go on from, or None; writes down what this run is."""
        if self.folder is None:
            return peek(Path(self.config.output.dir), self.parameters.resume)
        asked = self.folder.asked()
        mark = {**mark, "threads": torch.get_num_threads(), "versions": versions()}
        if asked is not None and self.parameters.resume != "no":
            check_same(asked, mark)
            torch.set_num_threads(int(asked.get("threads") or torch.get_num_threads()))
            changed = [
                name for name, version in asked.get("versions", {}).items() if mark["versions"].get(name) != version
            ]
            if changed:
                self._note(
                    f"Since the run began {', '.join(changed)} changed: it goes on, though not to the same bits."
                )
            found = self.folder.load()
            if found is not None and self.folder.load_init() is not None:
                self._note(f"The run goes on after step {found[0].step}.")
                return found
        self.folder.ask(mark)
        return None

    def _packing(self, base: Base, data: RunData) -> PackingCheck | None:
        """How sequences that share a row are kept apart; None when they do not share."""
        if self.config.train.packing == "off" or data.encoded.preference:
            return None
        check = check_packing(base.model, self.config.data_config(), seed=self.config.train.seed)
        if check.mode == "off":
            self._note(check.reason)
            self.report.log("warning", check.reason)
            return None
        return check

    def _adapter(
        self, base: Base, token_ids: list[int], data: RunData, tokenizer: Any, pad: int, resumed: bool
    ) -> tuple[Any, dict[str, torch.Tensor]]:
        """The PEFT model, its adapter as it begins, and A₀, B₀."""
        config = self.config
        kept = self.folder.load_init() if self.folder is not None and resumed else None
        torch.manual_seed(config.train.seed)
        if kept is not None:
            settings = resumed_settings(kept[0], config)
            model = methods_torch.inject(config, base.model, settings)
            methods_torch.set_first(model, kept[1])  # what is not trained (LoRA-FA's A) stands in no checkpoint
            return model, kept[1]
        settings = methods_torch.lora_config(config, base.model, token_ids)
        late = config.method.low_memory_init and config.method.init == "eva"
        model = methods_torch.inject(config, base.model, settings, late=late)
        batches = calibration(config, data, tokenizer, pad, base.device)
        methods_torch.initialise(config, model, batches, base.files, self._modules)
        first = methods_torch.first_state(model)
        if self.folder is not None:
            self.folder.save_init(methods_save_torch.settings_of(model), first)
        return model, first

    def _modules(self, phase: str, done: float, total: float) -> None:
        self.report.progress(phase, done, total, "modules")

    def _tell_data(self, data: RunData) -> None:
        found = data.encoded.report
        for text in found.notes:
            self._note(text)
        if found.bad:
            self._note(f"{found.bad} rows could not be used; `--preview` lists them.")
        numbers = {
            "examples": len(data.train),
            "held_out": len(data.held),
            "tokens": found.tokens,
            "trained_tokens": found.trained_tokens,
            "bad": found.bad,
        }
        if self.main:
            self.control.tell("data", values={name: float(value) for name, value in numbers.items()})

    def _tell_estimate(self, data: RunData, model: Any) -> None:
        if self.folder is None:
            return
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        found = estimate(self.config, self.parameters.model, trained=trained)
        self.control.tell("estimate", text=words(found), values=msgspec.to_builtins(found))
        need = checkpoint_bytes(self.config, trained) * 2
        free = shutil.disk_usage(self.folder.path).free
        if free < need:
            raise WeftError(
                ErrorKind.DISK_FULL,
                f"The disk has {free / 2**30:.2f} GiB left, and checkpoint and adapter take about {need / 2**30:.2f} GiB.",
                "Free some space, choose an output folder on another disk, or a smaller rank.",
            )

    # The end

    def _finish(
        self,
        trainer: Trainer,
        ended: str,
        data: RunData,
        base: Base,
        model: Any,
        first: dict[str, torch.Tensor],
        tokenizer: Any,
        hashes: _Hashes,
        grown: int,
    ) -> TrainResult:
        counters, config = trainer.counters, self.config
        held = counters.held_out[-1][1] if counters.held_out and counters.held_out[-1][0] == counters.step else None
        if ended == "nan" and self.folder is not None:
            found = self.folder.load()
            if found is None:
                raise WeftError(
                    ErrorKind.BAD_INPUT,
                    f"After step {counters.step} the loss was no longer a number, before a checkpoint was written.",
                    "Lower the learning rate, raise warmup, or take precision = fp32 (or bf16 instead of fp16).",
                )
            trainer.restore(found[1])
            held = next((loss for step, loss in reversed(counters.held_out) if step == found[0].step), None)
            self._note(
                f"The loss was no longer a number after step {counters.step}; the adapter is that of step {found[0].step}."
            )
        wants_best = (config.train.keep_best or config.train.early_stopping) and self.folder is not None
        if wants_best and counters.best is not None and counters.best_step != counters.step:
            best = self.folder.load_best() if self.folder is not None else None
            if best is not None:
                trainer.restore(best)
                held = counters.best
                self._note(f"The adapter is that of step {counters.best_step}, whose held-out loss was the lowest.")
        before = next((loss for step, loss in counters.held_out if step == 0), None)
        result = TrainResult(
            adapter=config.output.dir,
            ended=ended,  # type: ignore[arg-type]
            steps=counters.step,
            losses=tuple(counters.losses),
            held_out_loss=held,
            base_held_out_loss=before,
            held_out_losses=tuple(counters.held_out),
            tokens=counters.trained_tokens,
            seconds=counters.seconds,
            notes=tuple(self.notes),
        )
        if self.folder is not None:
            self.report.progress("Saving")
            self._save(trainer, result, data, base, model, first, tokenizer, hashes, grown)
            self.folder.remove()
        if self.accelerator is not None:
            self.accelerator.wait_for_everyone()
        return result

    def _save(
        self,
        trainer: Trainer,
        result: TrainResult,
        data: RunData,
        base: Base,
        model: Any,
        first: dict[str, torch.Tensor],
        tokenizer: Any,
        hashes: _Hashes,
        grown: int,
    ) -> None:
        config, target = self.config, Path(self.config.output.dir)
        staged = target.parent / f".partial-{target.name}"
        shutil.rmtree(staged, ignore_errors=True)
        staged.mkdir(parents=True)
        try:
            methods_save_torch.save_adapter(staged, config, model, first, self.parameters.model.path)
            if config.method.new_tokens:
                tokenizer.save_pretrained(staged)
            record = card.RunRecord(
                name=target.name,
                config=config,
                base=self.parameters.model.name,
                base_architecture=self.parameters.model.architecture,
                base_files=hashes.wait(self.report),
                data_files=card.hash_files(data.files, lambda *_: None, lambda: False),
                data=data_numbers(data),
                ended=result.ended,
                steps=result.steps,
                total_steps=trainer.plan.total,
                losses=result.losses,
                held_out_loss=result.held_out_loss,
                held_out_losses=result.held_out_losses,
                trained_parameters=sum(p.numel() for p in trainer.trained.values()),
                tokens=result.tokens,
                seconds=result.seconds,
                device=base.device_words(),
                threads=torch.get_num_threads(),
                finished=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                versions=versions(),
                notes=result.notes,
            )
            (staged / card.RECORD).write_bytes(msgspec.json.format(msgspec.json.encode(record), indent=1))
            note = AdapterNote(run=target.name, title=f"{target.name}, on {card.data_words(record).replace('`', '')}")
            (staged / NOTE).write_bytes(note_bytes(note))
            (staged / "README.md").write_text(card.card(record, self.parameters.model), "utf-8")
            if self.parameters.run_file:
                (staged / "run.toml").write_text(self.parameters.run_file, "utf-8")
            sync_tree(staged)
            replace_folder(staged, target)
        except BaseException:
            shutil.rmtree(staged, ignore_errors=True)
            raise


class _Hashes:
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


def resumed_settings(kept: dict[str, Any], config: RunConfig) -> peft.LoraConfig:
    """The adapter's resolved config, to begin plain: its values come from the checkpoint."""
    known = {name: value for name, value in kept.items() if name in peft.LoraConfig.__dataclass_fields__}
    for name in ("eva_config", "corda_config", "loftq_config", "runtime_config", "lora_ga_config"):
        known.pop(name, None)
    known["init_lora_weights"] = True
    if config.method.dora_offload and torch.cuda.is_available():
        known["runtime_config"] = peft.LoraRuntimeConfig(ephemeral_gpu_offload=True)
    return peft.LoraConfig(**known)


def pad_token(tokenizer: Any, data: RunData, base: Base) -> int:
    """What fills rows up: any token that the model has, since it is masked.

    Raises:
        WeftError: CORRUPT when the data holds tokens that the model has no embedding for.
    """
    rows = base.model.get_input_embeddings().weight.shape[0]
    highest = max((max(example.input_ids) for example in data.examples if example.input_ids), default=0)
    if highest >= rows:
        raise WeftError(
            ErrorKind.CORRUPT,
            f"The tokenizer knows token {highest}, and the model has {rows} embeddings.",
            "Tokenizer and weights do not belong together: download the model again.",
        )
    wanted = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((number for number in wanted if number is not None and number < rows), 0)


def versions() -> dict[str, str]:
    """What the run rests on."""
    found: dict[str, str] = {}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
