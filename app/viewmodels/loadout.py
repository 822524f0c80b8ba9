"""Loadout: the one loaded model, its engine, and everything that can happen to them, as one observable object.

Chat and whatever else runs a model talk to this object alone. It picks the loader, starts the engine, loads with the saved
options, hands requests on, and brings a dead engine back with the next request. Unloading ends the engine's process, so that
every byte comes back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from PySide6.QtCore import QObject, Signal, Slot

from app.backends.base import Spec
from app.core.errors import ErrorKind, WeftError
from app.core.jobs import Progress
from app.core.library import AdapterEntry, ModelEntry
from app.core.memory import Machine
from app.core.options import OptionValue
from app.core.stack import AdapterStack
from app.engine.protocol import Generate, GenerateBatch, Loaded
from app.store.library import LibraryStore
from app.store.model_settings import ModelSettings
from app.store.settings import SettingsStore
from app.viewmodels.loadout_desk import RequestDesk
from app.viewmodels.loadout_idle import IdleWatch
from app.viewmodels.loadout_questions import damage, question_before
from app.viewmodels.loadout_requests import Request
from app.viewmodels.loadout_run import ModelRun
from app.viewmodels.loadout_stack import StackState
from app.viewmodels.loadout_teller import StackTeller
from app.viewmodels.loadout_words import LOADING, CodeQuestion, Crash, EnvironmentsView, FitQuestion, LoadoutState
from app.workers.load_plan import LoadPlanner

__all__ = ["CodeQuestion", "Crash", "EnvironmentsView", "FitQuestion", "Loadout", "LoadoutState"]

_LOADED = (LoadoutState.READY, LoadoutState.BUSY, LoadoutState.UNRESPONSIVE)


class Loadout(QObject):
    """The loaded model.

    Signals:
        changed: any property below changed.
        begun(id): the engine has the request now.
        tokens(id, text, count), progress(id, core.jobs.Progress), finished(id, Generated), failed(id, WeftError): of one request.
        row_tokens(id, row, text, count), and finished(id, GeneratedBatch): of a batch.
        notice(text): a sentence worth a toast.
        fit_asked(FitQuestion), code_asked(CodeQuestion), crashed(Crash), load_failed(WeftError): the window decides or tells.
        environment_wanted(name): the load waits for this environment.
        stack_changed: `stack` is another than was set: another model came, or the engine refused it.
        stack_set: somebody set another stack.
    """

    changed = Signal()
    tokens = Signal(int, str, int)
    row_tokens = Signal(int, int, str, int)
    progress = Signal(int, object)
    begun = Signal(int)
    finished = Signal(int, object)
    failed = Signal(int, object)
    notice = Signal(str)
    fit_asked = Signal(object)
    code_asked = Signal(object)
    crashed = Signal(object)
    load_failed = Signal(object)
    environment_wanted = Signal(str)
    stack_changed = Signal()
    stack_set = Signal()

    def __init__(
        self,
        *,
        make_worker: Callable[[str], Any],
        library: LibraryStore,
        model_settings: ModelSettings,
        settings: SettingsStore,
        environments: EnvironmentsView,
        machine: Callable[[], Machine],
        log_of: Callable[[str], Path],
        parent: QObject | None = None,
    ) -> None:
        super().__init__(parent)
        self._library = library
        self._settings = settings
        self._environments = environments
        self.planner = LoadPlanner(model_settings, settings, is_ready=environments.is_ready, machine=machine)
        self._stack = StackState()
        self._desk = RequestDesk(self)
        self._desk.begun.connect(self.begun)  # told before the state that follows from it
        self._run = ModelRun(
            self._desk,
            self._stack,
            self.planner,
            make_worker=make_worker,
            environments=environments,
            log_of=log_of,
            parent=self,
        )
        self._teller = StackTeller(self._run, self._desk, self._stack, self)
        self._idle = IdleWatch(lambda: settings.settings.unload_idle_minutes, self)
        self._connect()

    def _connect(self) -> None:
        desk, run = self._desk, self._run
        for theirs, ours in (
            (desk.tokens, self.tokens),
            (desk.row_tokens, self.row_tokens),
            (desk.progress, self.progress),
            (desk.finished, self.finished),
            (desk.failed, self.failed),
            (run.changed, self.changed),
            (run.notice, self.notice),
            (run.code_asked, self.code_asked),
            (run.crashed, self.crashed),
            (run.load_failed, self.load_failed),
            (run.environment_wanted, self.environment_wanted),
            (run.stack_changed, self.stack_changed),
            (self._teller.notice, self.notice),
            (self._teller.refused, self.stack_changed),
        ):
            theirs.connect(ours)
        desk.rested.connect(self._idle.used)
        run.ready.connect(self._load_finished)
        run.done.connect(self._command_done)
        run.failed.connect(self._command_failed)
        run.dropped.connect(self._idle.stop)
        self._idle.idle.connect(self._unload_idle)

    # What there is ----------------------------------------------------------------------------------

    @property
    def context(self) -> int:
        """Tokens that prompt and answer share, as loaded; 0 when nothing is."""
        return self.loaded.context if self.loaded is not None else 0

    @property
    def memory(self) -> int:
        """Bytes that the loaded model takes, measured by its engine; 0 when nothing is loaded or it is not known."""
        return self.loaded.memory if self.loaded is not None else 0

    @property
    def is_loaded(self) -> bool:
        return self.loaded is not None

    @property
    def state(self) -> LoadoutState:
        return self._run.state

    @property
    def model(self) -> ModelEntry | None:
        """The model that is loaded, is being loaded, failed to load, or waits to be loaded."""
        return self._run.model

    @property
    def loader(self) -> Spec | None:
        return self._run.loader

    @property
    def options(self) -> dict[str, OptionValue]:
        """Changed fields of the loader's options, as loaded or tried last."""
        return self._run.options

    @property
    def loaded(self) -> Loaded | None:
        """What the engine told of the loaded model."""
        return self._run.loaded

    @property
    def error(self) -> WeftError | None:
        """Why the load failed or the engine died."""
        return self._run.error

    @property
    def load_progress(self) -> Progress | None:
        return self._run.load_progress

    @property
    def waiting_for(self) -> str:
        """Name of the environment that the load waits for, or ""."""
        return self._run.waiting_for

    @property
    def log_path(self) -> Path | None:
        return self._run.log_path

    # Loading ----------------------------------------------------------------------------------------

    def select(self, entry: ModelEntry) -> None:
        """Pick a model: loaded at once with Autoload on, else it waits for Load."""
        if self._refused(entry):
            return
        if self._settings.settings.autoload:
            self.load(entry)
            return
        try:
            self.planner.choose_loader(entry)
        except WeftError as error:
            self.load_failed.emit(error)
            return
        self._run.pick(entry)

    def load(
        self,
        entry: ModelEntry,
        loader_id: str | None = None,
        options: Mapping[str, OptionValue] | None = None,
        *,
        anyway: bool = False,
    ) -> None:
        """Load a model in place of the one that is loaded. What goes wrong is told by `load_failed` and `state`.

        Args:
            loader_id: None takes the saved loader, or the best that is ready.
            options: changed fields of the loader's options; None takes those saved for this model.
            anyway: load although the estimate says that it does not fit.
        """
        if self._refused(entry):
            return
        try:
            plan = self.planner.plan(entry, loader_id or "", options)
            question = question_before(self.planner, plan, freed=self.memory, anyway=anyway)
        except WeftError as error:
            if self.is_loaded and not self._run.is_of(entry):
                self.load_failed.emit(error)  # the one that works stays
            else:
                self._run.refuse(entry, error)
            return
        if isinstance(question, FitQuestion):
            self.fit_asked.emit(question)
        elif question is not None:
            self.code_asked.emit(question)
        else:
            if plan != self._run.plan:
                self._run.policy.reset()
            self._run.begin(plan, keep_queue=self._run.is_of(entry))

    def _refused(self, entry: ModelEntry) -> bool:
        """Tell that a model is damaged, before the one that works is given up for it."""
        error = damage(entry)
        if error is not None:
            self.load_failed.emit(error)
        return error is not None

    def load_again(self) -> None:
        """Load what was loaded or tried last, with the same options; the user insists, so crashes are forgiven."""
        if self._run.plan is not None:
            self._run.policy.reset()
            self._run.begin(self._run.plan, keep_queue=True)
        elif self.model is not None:
            self.load(self.model)

    def reload(self, options: Mapping[str, OptionValue] | None = None) -> None:
        """Load the same model again, with other options."""
        if self.model is not None:
            self.load(self.model, self._run.plan.chosen if self._run.plan else None, options)

    def unload(self) -> None:
        """End the engine and forget the model. Also cancels a load."""
        self._run.pick(None)

    def cancel_load(self) -> None:
        """Stop a load that is going on. The model stays picked, so that Load can be pressed again."""
        self._run.cancel()

    def end_engine(self) -> None:
        """End an engine that does not answer. The next request starts it again."""
        self._run.end()

    def environment_ready(self, name: str) -> None:
        """An environment was installed: a load that waits goes on, with whatever loader is ready now."""
        plan = self._run.plan
        if not self.waiting_for or plan is None:
            return
        if self._environments.is_ready(plan.spec.environment):
            self._run.begin(plan, keep_queue=True)
        elif not plan.chosen:
            try:
                other = self.planner.choose_loader(plan.entry)
            except WeftError:
                return  # it goes on waiting for the one that takes the model
            if self._environments.is_ready(other.environment):
                self.load(plan.entry)

    def environment_failed(self, name: str, error: WeftError) -> None:
        """An environment could not be installed: a load that waits for it fails. Who installs it has told why already."""
        if self.waiting_for == name and self._run.plan is not None:
            self._run.fail(error, told=True)

    # Requests ---------------------------------------------------------------------------------------

    def generate(self, request: Generate) -> int:
        """Answer. Returns the id that the signals bear; if nothing is loaded any more, the model is loaded first."""
        return self._ask(request)

    def generate_batch(self, request: GenerateBatch) -> int:
        """Answer rows, each under its own stack; the loadout's own stack is on again afterwards. As `generate`."""
        return self._ask(request)

    def _ask(self, request: Request) -> int:
        made = self._desk.new_id()
        self._idle.used()
        worker = self._run.engine.worker
        if self.state in _LOADED and worker is not None:
            if self._teller.waits:
                self._desk.wait(made, request)  # the newest stack is told first
            else:
                self._desk.send(worker, made, request)
        elif self.state in LOADING:
            self._desk.wait(made, request)
        elif self.model is None:
            error = WeftError(ErrorKind.NOT_FOUND, "No model is loaded.", "Choose one with Ctrl+L.")
            self._desk.fail_later(made, error)
        else:
            self._load_for(made, request, self.model)
        return made

    def _load_for(self, made: int, request: Request, model: ModelEntry) -> None:
        """Nothing is loaded any more: the request brings the model back, and waits for it."""
        try:
            self._run.policy.check()
        except WeftError as error:
            self._desk.fail_later(made, error)
            return
        self._desk.wait(made, request)
        if self._run.plan is not None:
            self._run.begin(self._run.plan, keep_queue=True)
            return
        self.load(model)
        if self.state not in LOADING:
            # The load asked something, or failed at once: the answer does not wait for a dialog.
            why = WeftError(
                ErrorKind.OUT_OF_MEMORY, "The model was not loaded.", "Load it from the bar above, then send again."
            )
            self._desk.give_up(made, self.error or why)

    def cancel(self, request: int) -> None:
        """Stop a request; it ends with `finished` (what there is of it) or `failed` (CANCELLED)."""
        self._desk.cancel(request, self._run.engine.worker)

    # Adapters ---------------------------------------------------------------------------------------

    @property
    def takes_adapters(self) -> bool:
        """Whether a model is loaded by a loader that takes adapters."""
        return self._teller.takes_adapters

    def adapters(self) -> list[AdapterEntry]:
        """The library's adapters."""
        return self._library.adapters()

    @property
    def stack(self) -> AdapterStack:
        """The adapters that the next answer is to have."""
        return self._stack.wanted

    @property
    def baked(self) -> bool:
        """Whether the stack is to be written into the weights."""
        return self._stack.baked

    def set_stack(self, stack: AdapterStack) -> None:
        """Replace the adapter stack: of the loaded model at once, else with the next load."""
        self._stack.wanted = stack
        self._stack.model = self.model.id if self.model is not None else ""
        self._teller.tell()
        self.stack_set.emit()

    @property
    def bakes(self) -> bool:
        """Whether the loader can write adapters into the loaded weights."""
        return self._teller.bakes

    def set_baked(self, on: bool) -> None:
        """Write the stack into the weights, for the model's own speed, or let it be live again: the base comes back exactly."""
        self._stack.baked = on
        self._teller.tell()

    # What the engine says ---------------------------------------------------------------------------

    @Slot(int, object)
    def _command_done(self, engine_id: int, result: object) -> None:
        if engine_id == self._stack.command:
            self._teller.ended(None)
        else:
            self._desk.done(engine_id, result)

    @Slot(int, object)
    def _command_failed(self, engine_id: int, error: WeftError) -> None:
        dead = self._run.engine.dead  # then its end follows, and says more
        if engine_id != self._stack.command:
            self._desk.refused(engine_id, error, dead=dead)
        elif not dead:
            self._teller.ended(error)

    @Slot()
    def _load_finished(self) -> None:
        plan = self._run.plan
        assert plan is not None
        self._idle.used()
        self._idle.start()
        self._teller.tell()  # it may have changed during the load
        self._desk.send_waiting(self._run.engine.worker)
        try:
            if self.loaded is not None:
                self.planner.remember(plan, self.loaded)
            self._library.touch(plan.entry.id)
            if self._settings.settings.last_model != plan.entry.id:
                self._settings.update(last_model=plan.entry.id)
        except WeftError as error:
            self.notice.emit(str(error))  # the model runs; only the memory of it could not be written

    @Slot()
    def _unload_idle(self) -> None:
        if self.state is LoadoutState.READY:
            self._run.rest_unloaded("The model was unloaded.")
            self.notice.emit("The model was unloaded after a while without use. The next message loads it again.")

    def close(self) -> None:
        """End every engine and wait for it: the window is going."""
        self._run.drop("Weft is closing.")
        self._run.engine.wait()
