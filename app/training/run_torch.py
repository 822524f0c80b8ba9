"""A training run from RUN.toml to the adapter's folder. Imports torch: only in an engine's child.

Order: check, data, base, packing check, adapter (or what an unfinished run kept of it), a step without effect, the loop, the folder.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import peft
import torch

from app.adapters.repeat_torch import layer_lists
from app.core.errors import ErrorKind, WeftError
from app.engine.reporting import Report
from app.training import methods, methods_save_torch, methods_torch
from app.training.checkpoint_torch import Counters, RunFolder
from app.training.distributed_torch import agreed, is_sharded, prepare, put, shared, wait_long
from app.training.distribution import check_sharded
from app.training.dry_step_torch import try_out
from app.training.estimate import checkpoint_bytes, duration, estimate, words
from app.training.loss_torch import try_head
from app.training.optimizers_torch import make_optimizer
from app.training.packing_torch import PackingCheck, check_packing
from app.training.run_config import RunConfig, TrainParameters, TrainResult
from app.training.run_data_torch import RunData, calibration, objectives, read_data
from app.training.run_finish_torch import BaseHashes, Made, finish, versions
from app.training.run_model_torch import Base, cards, choose_device, choose_dtype, load_base
from app.training.run_resume import check_same, claim, fingerprint, folder_of
from app.training.run_samples_torch import sampler
from app.training.tokenizer import load_tokenizer
from app.training.trainer_control import Control
from app.training.trainer_data_torch import EpochPlan, held_out_measure, in_order
from app.training.trainer_torch import Trainer


def run(parameters: TrainParameters, report: Report, accelerator: Any = None) -> TrainResult:
    """Train. See `Run`.

    Raises:
        WeftError: whatever is wrong with the config, the data, the model or the machine; CANCELLED.
    """
    notes = methods.check(parameters.config)
    methods.check_base(parameters.config, parameters.model)
    here = methods.check_machine(parameters.config, cards(), sharded=is_sharded(accelerator))
    target = Path(parameters.config.output.dir)
    main = accelerator is None or accelerator.is_main_process
    if main:
        claim(target, parameters)
    folder = RunFolder(target, lambda text: report.log("warning", text)) if main else None
    try:
        run = Run(parameters, report, folder, accelerator, notes)
        for text in here:  # of this machine, not of the adapter: the card does not keep it
            run.tell(text)
        return run.go()
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
        self.sharded = is_sharded(accelerator)
        for text in notes:
            self._note(text)

    def _note(self, text: str) -> None:
        self.notes.append(text)
        self.tell(text)

    def tell(self, text: str) -> None:
        """Say a sentence."""
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
        if self.sharded:
            half = choose_dtype(config, choose_device(config, self._local())) is torch.float16
            check_sharded(config, half=half, quantized=self.parameters.model.format in methods.QUANTIZED)
        base = load_base(config, self.parameters.model, self.report, self._local(), in_memory=self.sharded)
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
        self._make_room(tokenizer, base)
        mark = fingerprint(self.parameters, base.files, data.files)
        before = shared(self.accelerator, self._begin(mark))
        check = self._packing(base, data)
        pad = pad_token(tokenizer, data, base)
        device = self.accelerator.device if self.sharded else base.device  # where it is trained
        train, held = objectives(config, data, pad, check, device, chunked=config.train.chunked_loss)
        self.report.progress("Preparing")
        model, first = self._adapter(base, token_ids, data, tokenizer, pad, before is not None)
        if config.method.layer_replication and (lists := layer_lists(model.config.get_text_config(decoder=True))):
            self._note(
                f"PEFT repeats the layers and not what the model's config lists of each: whoever loads the adapter elsewhere sets "
                f"{', '.join(f'{name} = {value}' for name, value in lists.items())} there."
            )
        if not self.sharded:
            self._ask_the_base(model, base, train, held)
        methods_torch.change_base(config, model, first)
        optimizer = make_optimizer(config.train, model, self._places(), self.tell)
        plan = EpochPlan(data.lengths(data.train), config.data_config(), config.train, packing=check is not None)
        scaler = torch.amp.GradScaler(base.device.type) if base.dtype is torch.float16 else None
        self._tell_estimate(model, device)
        hashes = BaseHashes(base.files if self.main else [])
        wrapped = model
        if self.sharded:
            try_head(model, data.examples[0].input_ids, self.accelerator)
        if self.accelerator is not None:
            wrapped, optimizer = prepare(self.accelerator, model, optimizer)
        if self.sharded:
            base.device = device
            self._ask_the_base(model, base, train, held)
        trainer = Trainer(
            config.train,
            wrapped,
            optimizer,
            train,
            plan,
            self.folder,
            self.control,
            self.report,
            held_out=self._measure(held, data, base),
            samples=self._sampler(model, tokenizer, data, base),
            autocast=base.autocast,
            scaler=scaler,
            accelerator=self.accelerator,
            counters=before[0] if before is not None else None,
        )
        if before is not None:
            trainer.restore(*before[1:])
            before = None  # what it holds is twice in memory
        if self.accelerator is not None:  # each process drops out on its own
            torch.manual_seed(
                config.train.seed + 1_000_003 * (self.accelerator.process_index + 1) + trainer.counters.step
            )
        silent, speed = try_out(trainer, plan.longest())
        if silent:
            self._note(
                f"{len(silent)} expert tensors got no gradient on the longest batch: the router did not choose them there."
            )
        self._tell_time(plan, trainer, speed)
        wait_long(self.accelerator, False)
        self.control.tell("state", text="running")
        ended = trainer.run()
        made = Made(
            self.parameters, self.accelerator, self.folder, tokenizer, data, base, model, first, hashes, self.notes
        )
        return finish(made, trainer, ended, self._note, self.report)

    # Parts

    def _places(self) -> list[Path]:
        """Where a paged optimizer's state may lie: the engine's scratch folder; beside the run, where that is too small or in memory.

        Each process has a file of its own, which has no name. A further machine may have no folder of the run's, nor its parents.
        """
        run = folder_of(Path(self.config.output.dir)).absolute()
        return [Path(tempfile.gettempdir()), next(place for place in (run, *run.parents) if place.is_dir())]

    def _measure(self, held: Any, data: RunData, base: Base) -> Callable[[Any], float] | None:
        if held is None:
            return None
        batches = in_order(data.lengths(data.held), self.config.train.batch_size)
        return held_out_measure(held, batches, base.autocast, self.accelerator)

    def _sampler(
        self, model: Any, tokenizer: Any, data: RunData, base: Base
    ) -> Callable[[], list[tuple[str, str]]] | None:
        if not self.main and not self.sharded:
            return None
        given = (self.config, model, tokenizer, data.encoded.template, base.device, base.autocast)
        return sampler(*given, partial(agreed, self.accelerator)) if self.sharded else sampler(*given)

    def _ask_the_base(self, model: Any, base: Base, *parts: Any) -> None:
        """DPO's reference. A model that is shared out is asked with its adapter on, which as yet changes nothing."""
        if self.config.train.objective != "dpo":
            return
        for part in parts:
            if part is not None:
                say = partial(self.report.progress, "Asking the base", unit="pairs")
                part.look_up(model, base.autocast, say, as_it_is=self.sharded)

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

    def _make_room(self, tokenizer: Any, base: Base) -> None:
        """Grow the embeddings where new tokens need it."""
        have = base.model.get_input_embeddings().weight.shape[0]
        if not self.config.method.new_tokens or len(tokenizer) <= have:
            return
        torch.manual_seed(self.config.train.seed)
        base.model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        self._note(
            f"The model's vocabulary grew from {have} to {len(tokenizer)} tokens. Whoever loads the adapter elsewhere calls "
            f"model.resize_token_embeddings({len(tokenizer)}) first and takes the tokenizer from the adapter's folder."
        )

    def _begin(self, mark: dict[str, Any]) -> tuple[Counters, dict[str, torch.Tensor], Any, Any] | None:
        """The checkpoint to go on from, or None; writes down what this run is. The first process's business."""
        if self.folder is None:
            return None
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
            found = self.folder.load(mapped=self.config.train.optimizer.startswith("paged"))
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
        torch.manual_seed(config.train.seed)
        if self.accelerator is not None and not self.main:
            settings, first, trained = shared(self.accelerator, None)
            model = methods_torch.inject(config, base.model, resumed_settings(settings, config))
            methods_torch.set_first(model, first)
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    put(parameter, trained[name])
            return model, first
        model, first = self._first_adapter(base, token_ids, data, tokenizer, pad, resumed)
        if self.accelerator is not None:
            trained = {name: p.detach().cpu() for name, p in model.named_parameters() if p.requires_grad}
            shared(self.accelerator, (methods_save_torch.settings_of(model), first, trained))
        return model, first

    def _first_adapter(
        self, base: Base, token_ids: list[int], data: RunData, tokenizer: Any, pad: int, resumed: bool
    ) -> tuple[Any, dict[str, torch.Tensor]]:
        """`_adapter` where there is one process, or in the first of several."""
        config = self.config
        kept = self.folder.load_init() if self.folder is not None and resumed else None
        if kept is not None:
            settings = resumed_settings(kept[0], config)
            model = methods_torch.inject(config, base.model, settings)
            if isinstance(kept[0].get("target_modules"), list):  # PEFT writes them in another way while it puts them in
                model.peft_config[methods_torch.ADAPTER].target_modules = set(kept[0]["target_modules"])
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

    def _tell_estimate(self, model: Any, device: torch.device) -> None:
        if self.folder is None:
            return
        tensors = [p.numel() for p in model.parameters() if p.requires_grad]
        found = estimate(self.config, self.parameters.model, tensors=tensors, card=device.type == "cuda")
        self.control.tell("estimate", text=words(found), values=msgspec.to_builtins(found))
        need = checkpoint_bytes(self.config, found.trainable) * 2
        free = shutil.disk_usage(self.folder.path).free
        if free < need:
            raise WeftError(
                ErrorKind.DISK_FULL,
                f"The disk has {free / 2**30:.2f} GiB left, and checkpoint and adapter take about {need / 2**30:.2f} GiB.",
                "Free some space, choose an output folder on another disk, or a smaller rank.",
            )

    def _tell_time(self, plan: EpochPlan, trainer: Trainer, speed: float) -> None:
        """How long the steps that are left will take, by the one that was tried. Several processes wait for each other in each turn."""
        processes = 1 if self.accelerator is None else self.accelerator.num_processes
        whole, waited = plan.work(trainer.counters.split, processes, trainer.objective.weight)
        sequences = 1 if self.config.train.objective == "sft" else 2  # of a pair
        seconds = (plan.total - trainer.counters.step) * waited * sequences / max(1e-9, speed)
        rate = speed * whole / max(1.0, waited)
        if self.main:
            text = f"Training will take about {duration(seconds)}, by the step that was tried ({rate:,.0f} tokens a second)."
            self.control.tell("estimate", text=text, values={"seconds": seconds})
        step = self.config.train.batch_size * self.config.train.gradient_accumulation
        if processes > step:
            self._note(
                f"A step learns from {step} examples: of {processes} processes {processes - step} repeat the others' work. "
                "Raise batch_size or gradient_accumulation, or start fewer."
            )


def resumed_settings(kept: dict[str, Any], config: RunConfig) -> peft.LoraConfig:
    """The adapter's resolved config, to begin plain: its values come from the checkpoint."""
    known = {name: value for name, value in kept.items() if name in peft.LoraConfig.__dataclass_fields__}
    for name in ("eva_config", "corda_config", "loftq_config", "runtime_config", "lora_ga_config"):
        known.pop(name, None)
    known["init_lora_weights"] = True
    return peft.LoraConfig(**known, **methods_torch.runtime(config))


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
