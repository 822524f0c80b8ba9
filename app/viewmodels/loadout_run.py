"""One model in one engine: from the plan of a load to the engine's end, whoever or whatever ends it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from PySide6.QtCore import QObject, Signal, Slot

from app.backends.base import Spec
from app.core.errors import ErrorKind, WeftError
from app.core.jobs import Progress
from app.core.library import ModelEntry
from app.core.options import OptionValue
from app.engine.protocol import Loaded
from app.engine.restart import RestartPolicy
from app.viewmodels.engine_session import EngineSession
from app.viewmodels.loadout_desk import RequestDesk
from app.viewmodels.loadout_engine import EngineSlot
from app.viewmodels.loadout_questions import code_question
from app.viewmodels.loadout_stack import StackState
from app.viewmodels.loadout_words import LOADING, Crash, EnvironmentsView, LoadoutState
from app.workers.load_plan import LoadPlan, LoadPlanner


class ModelRun(QObject):
    """Starts the engine that a plan asks for, loads the model there, and knows what state that is in.

    Args:
        desk: what is asked of the model; it goes with the engine, unless it may wait for the next.
        stack: the adapters that the model is loaded with.
        make_worker: an EngineWorker for the loader of this id.
        log_of: where the engine of the loader of this id writes its log.

    Attributes:
        plan: what is loaded, or was tried last.
        state, model, loader, options, loaded, error, load_progress, waiting_for: see the loadout.

    Signals:
        changed, notice, code_asked, crashed, load_failed, environment_wanted, stack_changed: the loadout's.
        ready: the model is loaded. dropped: the engine was let go of.
        done(command, result), failed(command, WeftError): the end of a command that was not the load.
    """

    changed = Signal()
    notice = Signal(str)
    code_asked = Signal(object)
    crashed = Signal(object)
    load_failed = Signal(object)
    environment_wanted = Signal(str)
    stack_changed = Signal()
    ready = Signal()
    dropped = Signal()
    done = Signal(int, object)
    failed = Signal(int, object)

    def __init__(
        self,
        desk: RequestDesk,
        stack: StackState,
        planner: LoadPlanner,
        *,
        make_worker: Callable[[str], Any],
        environments: EnvironmentsView,
        log_of: Callable[[str], Path],
        parent: QObject | None = None,
    ) -> None:
        super().__init__(parent)
        self._desk = desk
        self._stack = stack
        self._planner = planner
        self._make_worker = make_worker
        self._environments = environments
        self._log_of = log_of
        self._load_id = 0
        self.engine = EngineSlot(self._listen, self)
        self.policy = RestartPolicy()
        self.plan: LoadPlan | None = None
        self.state = LoadoutState.EMPTY
        self.model: ModelEntry | None = None
        self.loader: Spec | None = None
        self.options: dict[str, OptionValue] = {}
        self.loaded: Loaded | None = None
        self.error: WeftError | None = None
        self.load_progress: Progress | None = None
        self.waiting_for = ""
        desk.begun.connect(self._request_begun)
        desk.rested.connect(self._rest)

    @property
    def log_path(self) -> Path | None:
        return self._log_of(self.loader.id) if self.loader is not None else None

    def is_of(self, entry: ModelEntry) -> bool:
        """Whether this model is the one that is picked: then what waits for it goes on waiting."""
        return self.model is not None and self.model.id == entry.id

    # From the plan to the loaded model ----------------------------------------------------------------

    def begin(self, plan: LoadPlan, *, keep_queue: bool = False) -> None:
        self.drop("Another model is being loaded.", keep_queue=keep_queue)
        self.plan = plan
        if self._stack.belong(plan.entry.id):
            self.stack_changed.emit()
        self.model, self.loader, self.options = plan.entry, plan.spec, dict(plan.options)
        self.error = None
        try:
            self.policy.check()
            if not self._environments.is_ready(plan.spec.environment):
                self._wait_for_environment(plan.spec)
                return
            worker = self._make_worker(plan.spec.id)
        except WeftError as error:
            self.fail(error)
            return
        session = self.engine.take(worker)
        self._load_id = 0
        self.load_progress = Progress(phase=f"Starting {plan.spec.title}")
        self._set(LoadoutState.STARTING)
        session.start()

    def _wait_for_environment(self, spec: Spec) -> None:
        self.waiting_for = spec.environment
        self.load_progress = Progress(phase=f"Waiting for {self._environments.title(spec.environment)} to be installed")
        self._set(LoadoutState.STARTING)
        self.environment_wanted.emit(spec.environment)

    @Slot(object)
    def _engine_ready(self, _ready: object) -> None:
        if self.engine.session is None or self.plan is None:
            return
        plan = self.plan
        self.load_progress = Progress(phase=f"Loading {plan.entry.name}")
        try:
            self._load_id = self.engine.worker.send(self._planner.command(plan, self._stack.wanted))
            self._stack.loaded(self._stack.wanted)
        except WeftError as error:
            self.drop("The engine did not take the load.", keep_queue=True)
            self.fail(error)
            return
        self._set(LoadoutState.LOADING)

    @Slot(object)
    def _model_loaded(self, event: Loaded) -> None:
        self.loaded = event

    def _load_refused(self, error: WeftError) -> None:
        plan = self.plan
        self.drop("The model could not be loaded.", keep_queue=True)
        if plan is None or not self._planner.code_would_help(plan, error):
            self.fail(error)
            return
        try:
            question = code_question(self._planner, plan)
        except WeftError as unreadable:
            self.fail(unreadable)
            return
        self.fail(error, told=True)
        self.code_asked.emit(question)

    def fail(self, error: WeftError, *, told: bool = False) -> None:
        self.waiting_for = ""
        self.error = error
        self._set(LoadoutState.FAILED)
        self._desk.give_up_waiting(error)
        if error.kind is not ErrorKind.CANCELLED and not told:
            self.load_failed.emit(error)

    # Letting go -----------------------------------------------------------------------------------

    def drop(self, why: str, *, keep_queue: bool = False) -> None:
        """End the engine without waiting for it; whatever it was asked fails with `why`."""
        self.waiting_for = ""
        self._stack.command = 0
        self.loaded = None
        self.load_progress = None
        error = WeftError(ErrorKind.CANCELLED, why)
        lost = self._desk.take_lost(error, queued=not keep_queue)
        self.engine.drop()
        for request, reason in lost.items():
            self._desk.fail_later(request, reason)
        self.dropped.emit()

    def pick(self, entry: ModelEntry | None) -> None:
        """Forget what was loaded, and hold this model without an engine, or none."""
        self.drop("The model was unloaded.")
        self.model, self.loader, self.plan = entry, None, None
        if entry is not None and self._stack.belong(entry.id):
            self.stack_changed.emit()
        self.options = {}
        self.error = None
        self._set(LoadoutState.EMPTY)

    def refuse(self, entry: ModelEntry, error: WeftError) -> None:
        """Another model was to be loaded, and cannot be: it is the one that failed."""
        self.drop("Another model is being loaded.", keep_queue=self.is_of(entry))
        self.model, self.loader, self.plan = entry, None, None
        self.fail(error)

    def rest_unloaded(self, why: str) -> None:
        """End the engine; the model stays picked, and the next request loads it again."""
        self.drop(why)
        self._set(LoadoutState.EMPTY)

    def cancel(self) -> None:
        """Stop a load that is going on."""
        if self.state in LOADING:
            self.loader = None
            self.rest_unloaded("The load was cancelled.")

    def end(self) -> None:
        """End an engine that does not answer."""
        if self.engine.session is not None:
            self.drop("The engine was ended.")
            self.error = WeftError(
                ErrorKind.UNRESPONSIVE, "The engine did not answer and was ended.", "Send again to start it anew."
            )
            self._set(LoadoutState.FAILED)

    # What the engine says ---------------------------------------------------------------------------

    def _listen(self, session: EngineSession) -> None:
        session.ready.connect(self._engine_ready)
        session.loaded.connect(self._model_loaded)
        session.tokens.connect(self._desk.tokens_came)
        session.row_tokens.connect(self._desk.row_tokens_came)
        session.progress.connect(self._progress_came)
        session.done.connect(self._command_done)
        session.failed.connect(self._command_failed)
        session.log.connect(self._log_came)
        session.responsive.connect(self._responsiveness)
        session.exited.connect(self._engine_exited)

    @Slot(int, object)
    def _progress_came(self, engine_id: int, event: Progress) -> None:
        if engine_id == self._load_id:
            self.load_progress = event
            self.changed.emit()
        else:
            self._desk.progress_came(engine_id, event)

    @Slot(int, object)
    def _command_done(self, engine_id: int, result: object) -> None:
        if engine_id == self._load_id:
            self._load_id = 0
            self._set(LoadoutState.READY)
            self.ready.emit()
        else:
            self.done.emit(engine_id, result)

    @Slot(int, object)
    def _command_failed(self, engine_id: int, error: WeftError) -> None:
        if engine_id != self._load_id:
            self.failed.emit(engine_id, error)
        elif not self.engine.dead:  # else `exited` follows, and says more
            self._load_id = 0
            self._load_refused(error)

    @Slot(int)
    def _request_begun(self, _ours: int) -> None:
        if self.state is LoadoutState.READY:
            self._set(LoadoutState.BUSY)

    @Slot()
    def _rest(self) -> None:
        if not self._desk.busy and self.state is LoadoutState.BUSY:
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
                self._set(LoadoutState.BUSY if self._desk.busy else LoadoutState.READY)

    @Slot(object)
    def _engine_exited(self, end: Any) -> None:
        log = self.log_path
        error: WeftError = end.error
        if counted := end.crashed and error.kind is not ErrorKind.CANCELLED:
            self.policy.crashed(error.message)
            try:
                self.policy.check()
            except WeftError as stopped:
                error = stopped
        lost = self._desk.take_lost(error, queued=True)
        for why in lost.values():
            why.log = log  # type: ignore[attr-defined]  # so that whoever shows it can offer it
        self.drop("The engine ended.")
        self.error = error if counted else None
        # One that we ended because it did not hear a Cancel is no crash: the next message loads the model again.
        self._set(LoadoutState.FAILED if counted else LoadoutState.EMPTY)
        for request, why in lost.items():
            self._desk.fail_later(request, why)
        if self.state is LoadoutState.EMPTY:
            self.notice.emit(str(error))
        elif error.kind is ErrorKind.ENVIRONMENT:
            self.load_failed.emit(error)
        else:
            self.crashed.emit(Crash(error=error, log=str(log or ""), again=self.policy.allowed, lost=len(lost)))

    def _set(self, state: LoadoutState) -> None:
        self.state = state
        if state is not LoadoutState.LOADING and state is not LoadoutState.STARTING:
            self.load_progress = None
        self.changed.emit()
