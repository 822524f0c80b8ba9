"""Tells the engine which adapters are wanted: one change at a time, the newest next."""

from __future__ import annotations

from PySide6.QtCore import QObject, Signal

from app.backends.base import Capability
from app.core.errors import WeftError
from app.viewmodels.loadout_desk import RequestDesk
from app.viewmodels.loadout_run import ModelRun
from app.viewmodels.loadout_stack import StackState


class StackTeller(QObject):
    """Keeps the engine's adapters at what is wanted; what is asked meanwhile waits at the desk for the newest.

    Signals:
        notice(text): why the engine did not take a stack. refused: the stack is what it was before.
    """

    notice = Signal(str)
    refused = Signal()

    def __init__(self, run: ModelRun, desk: RequestDesk, stack: StackState, parent: QObject | None = None) -> None:
        super().__init__(parent)
        self._run, self._desk, self._stack = run, desk, stack

    @property
    def takes_adapters(self) -> bool:
        """Whether a model is loaded by a loader that takes adapters."""
        run = self._run
        return run.loaded is not None and run.loader is not None and Capability.LORA in run.loader.capabilities

    @property
    def bakes(self) -> bool:
        """Whether the loader can write adapters into the loaded weights."""
        return self.takes_adapters and self._run.loader is not None and self._run.loader.bakes

    @property
    def waits(self) -> bool:
        """Whether the newest stack has still to be told, when the engine is done with one before."""
        return bool(self._stack.command) and not self._stack.is_told(bakes=self.bakes)

    def tell(self) -> None:
        """Tell the engine the stack as it is now; while it works on one, the latest waits for that to end."""
        worker, bakes = self._run.engine.worker, self.bakes
        if worker is None or self._run.loaded is None or self._stack.command or self._stack.is_told(bakes=bakes):
            return
        try:
            self._stack.tell(worker, bakes=bakes)
        except WeftError as error:
            self.notice.emit(str(error))

    def ended(self, error: WeftError | None) -> None:
        """The engine took the stack that it was told last, or says why not."""
        if error is None:
            self._stack.taken()
        else:
            self._stack.refused()
            self.notice.emit(str(error))
            self.refused.emit()
        self.tell()
        if not self._stack.command:
            self._desk.send_waiting(self._run.engine.worker)
