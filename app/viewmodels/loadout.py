"""Loadout: the one loaded model, its engine, and everything that can happen to them, as one observable object.

Chat and whatever else runs a model talk to this object alone. It picks the loader, starts the engine, loads with the saved
options, hands requests on, and brings a dead engine back with the next request. Unloading ends the engine's process, so that
every byte comes back.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from PySide6.QtCore import QObject, QTimer, Signal, Slot

from app.backends.base import Capability, Spec
from app.core.errors import ErrorKind, WeftError
from app.core.jobs import Progress
from app.core.library import AdapterEntry, ModelEntry
from app.core.memory import Machine
from app.core.options import OptionValue
from app.core.stack import AdapterStack
from app.engine.protocol import Generate, GenerateBatch, Loaded, SetAdapters
from app.engine.restart import RestartPolicy
from app.store.library import LibraryStore
from app.store.model_settings import ModelSettings
from app.store.settings import SettingsStore
from app.viewmodels.engine_session import EngineSession
from app.viewmodels.loadout_requests import Request, Requests
from app.viewmodels.loadout_words import CodeQuestion, Crash, EnvironmentsView, FitQuestion, LoadoutState
from app.workers.load_plan import LoadPlan, LoadPlanner

__all__ = ["CodeQuestion", "Crash", "EnvironmentsView", "FitQuestion", "Loadout", "LoadoutState"]

IDLE_CHECK_MS = 30_000


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
    _later = Signal(int, object)

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
        self._make_worker = make_worker
        self._library = library
        self._settings = settings
        self._environments = environments
        self.planner = LoadPlanner(model_settings, settings, is_ready=environments.is_ready, machine=machine)
        self._log_of = log_of
        self._policy = RestartPolicy()
        self._session: EngineSession | None = None
        self._ending: list[EngineSession] = []
        self._plan: LoadPlan | None = None
        self._load_id = 0
        self._requests = Requests()
        self._last_use = time.monotonic()
        self._waiting_for = ""
        self.stack = AdapterStack()
        self._told_stack = AdapterStack()  # the last that the engine was told,
        self._taken_stack = AdapterStack()  # and the last that it took
        self.baked = self._told_baked = False  # whether the stack is to be written into the weights
        self._stack_id = 0  # of the SetAdapters under way
        self.state = LoadoutState.EMPTY
        self.model: ModelEntry | None = None
        self.loader: Spec | None = None
        self.options: dict[str, OptionValue] = {}
        self.loaded: Loaded | None = None
        self.error: WeftError | None = None
        self.load_progress: Progress | None = None
        self._later.connect(self.failed)
        self._idle = QTimer(self)
        self._idle.setInterval(IDLE_CHECK_MS)
        self._idle.timeout.connect(self._unload_if_idle)

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
    def waiting_for(self) -> str:
        """Name of the environment that the load waits for, or ""."""
        return self._waiting_for

    @property
    def log_path(self) -> Path | None:
        return self._log_of(self.loader.id) if self.loader is not None else None

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
        self.unload()
        self.model = entry
        self.changed.emit()

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
            question = self._question(plan, anyway)
        except WeftError as error:
            if self.is_loaded and not self._is(entry):
                self.load_failed.emit(error)  # the one that works stays
                return
            self._drop_engine("Another model is being loaded.", keep_queue=self._is(entry))
            self.model, self.loader, self._plan = entry, None, None
            self._fail_load(error)
            return
        if isinstance(question, FitQuestion):
            self.fit_asked.emit(question)
        elif question is not None:
            self.code_asked.emit(question)
        else:
            if self._plan is None or plan != self._plan:
                self._policy.reset()
            self._begin(plan, keep_queue=self._is(entry))

    def _refused(self, entry: ModelEntry) -> bool:
        """Tell that a model is damaged, before the one that works is given up for it."""
        if entry.problem:
            error = WeftError(
                ErrorKind.CORRUPT, f"{entry.name} cannot be loaded. {entry.problem}", "Download or copy it once more."
            )
            self.load_failed.emit(error)
        return bool(entry.problem)

    def _question(self, plan: LoadPlan, anyway: bool) -> FitQuestion | CodeQuestion | None:
        """What is to be asked before this load."""
        if self.planner.wants_code(plan):
            return self._code_question(plan)
        short = None if anyway else self.planner.shortage(plan, freed=self.memory)
        if short is None:
            return None
        return FitQuestion(
            entry=plan.entry,
            loader=plan.spec,
            options=plan.options,
            estimate=short.estimate,
            machine=short.machine,
            message=short.message,
        )

    def _code_question(self, plan: LoadPlan) -> CodeQuestion:
        code = self.planner.code(plan.entry)
        return CodeQuestion(
            entry=plan.entry, loader=plan.spec, options=plan.options, files=code.files, digest=code.digest
        )

    def _is(self, entry: ModelEntry) -> bool:
        """Whether this model is the one that is picked: then what waits for it goes on waiting."""
        return self.model is not None and self.model.id == entry.id

    def load_again(self) -> None:
        """Load what was loaded or tried last, with the same options; the user insists, so crashes are forgiven."""
        if self._plan is not None:
            self._policy.reset()
            self._begin(self._plan, keep_queue=True)
        elif self.model is not None:
            self.load(self.model)

    def reload(self, options: Mapping[str, OptionValue] | None = None) -> None:
        """Load the same model again, with other options."""
        if self.model is not None:
            self.load(self.model, self._plan.chosen if self._plan else None, options)

    def unload(self) -> None:
        """End the engine and forget the model. Also cancels a load."""
        self._drop_engine("The model was unloaded.")
        self.model = self.loader = self._plan = None
        self.options = {}
        self.error = None
        self._set(LoadoutState.EMPTY)

    def cancel_load(self) -> None:
        """Stop a load that is going on. The model stays picked, so that Load can be pressed again."""
        if self.state in (LoadoutState.STARTING, LoadoutState.LOADING):
            self._drop_engine("The load was cancelled.")
            self.loader = None
            self._set(LoadoutState.EMPTY)

    def end_engine(self) -> None:
        """End an engine that does not answer. The next request starts it again."""
        if self._session is not None:
            self._drop_engine("The engine was ended.")
            self.error = WeftError(
                ErrorKind.UNRESPONSIVE, "The engine did not answer and was ended.", "Send again to start it anew."
            )
            self._set(LoadoutState.FAILED)

    def environment_ready(self, name: str) -> None:
        """An environment was installed: a load that waits goes on, with whatever loader is ready now."""
        if not self._waiting_for or self._plan is None:
            return
        plan = self._plan
        if self._environments.is_ready(plan.spec.environment):
            self._begin(plan, keep_queue=True)
        elif not plan.chosen:
            try:
                other = self.planner.choose_loader(plan.entry)
            except WeftError:
                return  # it goes on waiting for the one that takes the model
            if self._environments.is_ready(other.environment):
                self.load(plan.entry)

    def environment_failed(self, name: str, error: WeftError) -> None:
        """An environment could not be installed: a load that waits for it fails. Who installs it has told why already."""
        if self._waiting_for == name and self._plan is not None:
            self._fail_load(error, told=True)

    # Requests ---------------------------------------------------------------------------------------

    def generate(self, request: Generate) -> int:
        """Answer. Returns the id that the signals bear; if nothing is loaded any more, the model is loaded first."""
        return self._ask(request)

    def generate_batch(self, request: GenerateBatch) -> int:
        """Answer rows, each under its own stack; the loadout's own stack is on again afterwards. As `generate`."""
        return self._ask(request)

    def _ask(self, request: Request) -> int:
        made = self._requests.new_id()
        self._last_use = time.monotonic()
        if (
            self.state in (LoadoutState.READY, LoadoutState.BUSY, LoadoutState.UNRESPONSIVE)
            and self._session is not None
        ):
            if self._stack_id and not self._is_told:
                self._requests.queued[made] = request  # the newest stack is told first
            else:
                self._send(made, request)
        elif self.state in (LoadoutState.STARTING, LoadoutState.LOADING):
            self._requests.queued[made] = request
        elif self.model is None:
            self._fail_later(made, WeftError(ErrorKind.NOT_FOUND, "No model is loaded.", "Choose one with Ctrl+L."))
        else:
            try:
                self._policy.check()
            except WeftError as error:
                self._fail_later(made, error)
                return made
            self._requests.queued[made] = request
            if self._plan is not None:
                self._begin(self._plan, keep_queue=True)
            else:
                self.load(self.model)
                if self.state not in (LoadoutState.STARTING, LoadoutState.LOADING):
                    self._give_up_waiting(made)
        return made

    def cancel(self, request: int) -> None:
        """Stop a request; it ends with `finished` (what there is of it) or `failed` (CANCELLED)."""
        if self._requests.queued.pop(request, None) is not None:
            self._fail_later(request, WeftError(ErrorKind.CANCELLED, "Cancelled."))
        elif (engine_id := self._requests.engine_id(request)) and self._session is not None:
            self._session.worker.cancel(engine_id)

    def _give_up_waiting(self, request: int) -> None:
        """The load asked something, or failed at once: the answer does not wait for a dialog."""
        if self._requests.queued.pop(request, None) is not None:
            why = self.error or WeftError(
                ErrorKind.OUT_OF_MEMORY,
                "The model was not loaded.",
                "Load it from the bar above, then send again.",
            )
            self._fail_later(request, why)

    # Adapters ---------------------------------------------------------------------------------------

    @property
    def takes_adapters(self) -> bool:
        """Whether a model is loaded by a loader that takes adapters."""
        return self.is_loaded and self.loader is not None and Capability.LORA in self.loader.capabilities

    def adapters(self) -> list[AdapterEntry]:
        """The library's adapters."""
        return self._library.adapters()

    def set_stack(self, stack: AdapterStack) -> None:
        """Replace the adapter stack: of the loaded model at once, else with the next load."""
        self.stack = stack
        self._tell_stack()
        self.stack_set.emit()

    @property
    def bakes(self) -> bool:
        """Whether the loader can write adapters into the loaded weights."""
        return self.takes_adapters and self.loader is not None and self.loader.bakes

    def set_baked(self, on: bool) -> None:
        """Write the stack into the weights, for the model's own speed, or let it be live again: the base comes back exactly."""
        self.baked = on
        self._tell_stack()

    def _tell_stack(self) -> None:
        """Tell the engine the stack as it is now; while it works on one, the latest waits for that to end."""
        if self._session is None or not self.is_loaded or self._stack_id or self._is_told:
            return
        baked = self.baked and self.bakes
        try:
            self._stack_id = self._session.worker.send(SetAdapters(adapters=self.stack, baked=baked))
        except WeftError as error:
            self.notice.emit(str(error))
            return
        self._told_stack, self._told_baked = self.stack, baked

    @property
    def _is_told(self) -> bool:
        return self.stack == self._told_stack and (self.baked and self.bakes) == self._told_baked

    def _stack_ended(self, error: WeftError | None) -> None:
        self._stack_id = 0
        if error is None:
            self._taken_stack = self._told_stack
        else:
            self._told_stack = self.stack = self._taken_stack
            self.baked = self._told_baked = False  # what is live always goes
            self.notice.emit(str(error))
            self.stack_changed.emit()
        self._tell_stack()
        if not self._stack_id:
            for ours, request in self._requests.take_queued().items():
                self._send(ours, request)

    # Behind the scenes ------------------------------------------------------------------------------

    def _begin(self, plan: LoadPlan, *, keep_queue: bool = False) -> None:
        self._drop_engine("Another model is being loaded.", keep_queue=keep_queue)
        self._plan = plan
        if self.model is not None and self.model.id != plan.entry.id and self.stack.adapters:
            self.stack = AdapterStack()  # adapters belong to the model that they were chosen for
            self.stack_changed.emit()
        self.model, self.loader, self.options = plan.entry, plan.spec, dict(plan.options)
        self.error = None
        try:
            self._policy.check()
            if not self._environments.is_ready(plan.spec.environment):
                self._wait_for_environment(plan.spec)
                return
            worker = self._make_worker(plan.spec.id)
        except WeftError as error:
            self._fail_load(error)
            return
        session = EngineSession(worker, self)
        session.ready.connect(self._engine_ready)
        session.loaded.connect(self._model_loaded)
        session.tokens.connect(self._tokens_came)
        session.row_tokens.connect(self._row_tokens_came)
        session.progress.connect(self._progress_came)
        session.done.connect(self._command_done)
        session.failed.connect(self._command_failed)
        session.log.connect(self._log_came)
        session.responsive.connect(self._responsiveness)
        session.exited.connect(self._engine_exited)
        session.gone.connect(self._session_gone)
        self._session = session
        self._load_id = 0
        self.load_progress = Progress(phase=f"Starting {plan.spec.title}")
        self._set(LoadoutState.STARTING)
        session.start()

    def _wait_for_environment(self, spec: Spec) -> None:
        self._waiting_for = spec.environment
        self.load_progress = Progress(phase=f"Waiting for {self._environments.title(spec.environment)} to be installed")
        self._set(LoadoutState.STARTING)
        self.environment_wanted.emit(spec.environment)

    def _drop_engine(self, why: str, *, keep_queue: bool = False) -> None:
        """End the engine without waiting for it; whatever it was asked fails with `why`."""
        session, self._session = self._session, None
        self._waiting_for = ""
        self._stack_id = 0
        self.loaded = None
        self.load_progress = None
        self._idle.stop()
        lost = self._requests.take_lost(WeftError(ErrorKind.CANCELLED, why), queued=not keep_queue)
        if session is not None:
            self._ending.append(session)
            session.drop()
        for request, error in lost.items():
            self._fail_later(request, error)

    def _fail_later(self, request: int, error: WeftError) -> None:
        # Never from within generate() or cancel(): the caller does not know the id yet.
        QTimer.singleShot(0, self, lambda: self._later.emit(request, error))

    def _send(self, ours: int, request: Request) -> None:
        assert self._session is not None
        try:
            engine_id = self._session.worker.send(request)
        except WeftError as error:
            self._fail_later(ours, error)
            return
        self._requests.begin(engine_id, ours)
        self.begun.emit(ours)
        if self.state is LoadoutState.READY:
            self._set(LoadoutState.BUSY)

    def _set(self, state: LoadoutState) -> None:
        self.state = state
        if state is not LoadoutState.LOADING and state is not LoadoutState.STARTING:
            self.load_progress = None
        self.changed.emit()

    def _fail_load(self, error: WeftError, *, told: bool = False) -> None:
        self._waiting_for = ""
        self.error = error
        self._set(LoadoutState.FAILED)
        for request in self._requests.take_queued():
            self._fail_later(request, error)
        if error.kind is not ErrorKind.CANCELLED and not told:
            self.load_failed.emit(error)

    @Slot(object)
    def _engine_ready(self, _ready: object) -> None:
        if self._session is None or self._plan is None:
            return
        plan = self._plan
        self.load_progress = Progress(phase=f"Loading {plan.entry.name}")
        try:
            self._load_id = self._session.worker.send(self.planner.command(plan, self.stack))
            self._told_stack, self._taken_stack, self._stack_id = self.stack, self.stack, 0
            self._told_baked = False
        except WeftError as error:
            self._drop_engine("The engine did not take the load.", keep_queue=True)
            self._fail_load(error)
            return
        self._set(LoadoutState.LOADING)

    @Slot(object)
    def _model_loaded(self, event: Loaded) -> None:
        self.loaded = event

    @Slot(int, str, int)
    def _tokens_came(self, engine_id: int, text: str, count: int) -> None:
        if ours := self._requests.running(engine_id):
            self.tokens.emit(ours, text, count)

    @Slot(int, int, str, int)
    def _row_tokens_came(self, engine_id: int, row: int, text: str, count: int) -> None:
        if ours := self._requests.running(engine_id):
            self.row_tokens.emit(ours, row, text, count)

    @Slot(int, object)
    def _progress_came(self, engine_id: int, event: Progress) -> None:
        if engine_id == self._load_id:
            self.load_progress = event
            self.changed.emit()
        elif ours := self._requests.running(engine_id):
            self.progress.emit(ours, event)

    @Slot(int, object)
    def _command_done(self, engine_id: int, result: object) -> None:
        if engine_id == self._load_id:
            self._load_id = 0
            self._load_finished()
            return
        if engine_id == self._stack_id:
            self._stack_ended(None)
            return
        ours = self._requests.end(engine_id)
        if ours:
            self._rest()
            self.finished.emit(ours, result)

    def _load_finished(self) -> None:
        assert self.model is not None and self._plan is not None
        self._last_use = time.monotonic()
        self._set(LoadoutState.READY)
        self._idle.start()
        self._tell_stack()  # it may have changed during the load
        for ours, request in self._requests.take_queued().items():
            self._send(ours, request)
        try:
            if self.loaded is not None:
                self.planner.remember(self._plan, self.loaded)
            self._library.touch(self.model.id)
            if self._settings.settings.last_model != self.model.id:
                self._settings.update(last_model=self.model.id)
        except WeftError as error:
            self.notice.emit(str(error))  # the model runs; only the memory of it could not be written

    @Slot(int, object)
    def _command_failed(self, engine_id: int, error: WeftError) -> None:
        dead = self._session is None or not self._session.worker.client.alive  # then `exited` follows, and says more
        if engine_id == self._load_id:
            if not dead:
                self._load_id = 0
                self._load_refused(error)
            return
        if engine_id == self._stack_id:
            if not dead:
                self._stack_ended(error)
            return
        if dead and self._requests.running(engine_id):
            # Told together with the engine's end, so that nobody hears of it while the state is still BUSY.
            self._requests.keep_last_words(engine_id, error)
            return
        ours = self._requests.end(engine_id)
        if ours:
            self._rest()
            self.failed.emit(ours, error)

    def _load_refused(self, error: WeftError) -> None:
        plan = self._plan
        self._drop_engine("The model could not be loaded.", keep_queue=True)
        if plan is None or not self.planner.code_would_help(plan, error):
            self._fail_load(error)
            return
        try:
            question = self._code_question(plan)
        except WeftError as unreadable:
            self._fail_load(unreadable)
            return
        self._fail_load(error, told=True)
        self.code_asked.emit(question)

    def _rest(self) -> None:
        self._last_use = time.monotonic()
        if not self._requests.busy and self.state is LoadoutState.BUSY:
            self._set(LoadoutState.READY)

    @Slot(str, str)
    def _log_came(self, level: str, text: str) -> None:
        if level in ("warning", "error"):
            self.notice.emit(text)

    @Slot(bool)
    def _responsiveness(self, answers: bool) -> None:
        if not answers:
            self._set(LoadoutState.UNRESPONSIVE)
        elif self.state is LoadoutState.UNRESPONSIVE:
            if self._load_id:
                self._set(LoadoutState.LOADING)
            elif self.loaded is None:
                self._set(LoadoutState.STARTING)
            else:
                self._set(LoadoutState.BUSY if self._requests.busy else LoadoutState.READY)

    @Slot(object)
    def _engine_exited(self, end: Any) -> None:
        log = self.log_path
        error: WeftError = end.error
        if counted := end.crashed and error.kind is not ErrorKind.CANCELLED:
            self._policy.crashed(error.message)
            try:
                self._policy.check()
            except WeftError as stopped:
                error = stopped
        lost = self._requests.take_lost(error, queued=True)
        for why in lost.values():
            why.log = log  # type: ignore[attr-defined]  # so that whoever shows it can offer it
        self._drop_engine("The engine ended.")
        self.error = error if counted else None
        # One that we ended because it did not hear a Cancel is no crash: the next message loads the model again.
        self._set(LoadoutState.FAILED if counted else LoadoutState.EMPTY)
        for request, why in lost.items():
            self._fail_later(request, why)
        if self.state is LoadoutState.EMPTY:
            self.notice.emit(str(error))
        elif error.kind is ErrorKind.ENVIRONMENT:
            self.load_failed.emit(error)
        else:
            self.crashed.emit(Crash(error=error, log=str(log or ""), again=self._policy.allowed, lost=len(lost)))

    @Slot(object)
    def _session_gone(self, session: EngineSession) -> None:
        if session in self._ending:
            self._ending.remove(session)
            session.deleteLater()

    @Slot()
    def _unload_if_idle(self) -> None:
        minutes = self._settings.settings.unload_idle_minutes
        if minutes and self.state is LoadoutState.READY and time.monotonic() - self._last_use > 60 * minutes:
            self._drop_engine("The model was unloaded.")
            self._set(LoadoutState.EMPTY)
            self.notice.emit("The model was unloaded after a while without use. The next message loads it again.")

    def close(self) -> None:
        """End every engine and wait for it: the window is going."""
        self._drop_engine("Weft is closing.")
        for session in list(self._ending):
            session.wait()
